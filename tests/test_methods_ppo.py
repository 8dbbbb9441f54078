"""Our gating policy as a method: trained once, kept, replayed, and shown every cost weight."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from agents.checkpoint import CHECKPOINT, build_policy, choose_masks
from agents.run import RunConfig
from backbones.artefacts import ArtefactError, load_artefact
from envs.oracles import Oracle
from envs.rules import Rules
from eval.group import Group
from eval.methods import make_method
from eval.methods import ppo as module
from eval.methods.base import Fitted


class Recording(Oracle):
    """Notes who is asked about in which role."""

    def __init__(self, inner):
        self.inner, self.costs, self.asked = inner, inner.costs, set()

    def measure(self, users, plans, roles):
        self.asked |= {(user, role) for user in users.tolist() for role in roles}
        return self.inner.measure(users, plans, roles)


@pytest.fixture(scope="module")
def world(side_world, tmp_path_factory):
    """The digits with a folder of its own and an oracle that notes what it is asked."""
    scenario = replace(side_world.scenario, oracle=Recording(side_world.scenario.oracle))
    return replace(side_world, scenario=scenario, folder=tmp_path_factory.mktemp("methods"))


@pytest.fixture(scope="module")
def method():
    return make_method("ppo", total_timesteps=1)  # SB3 ends after a whole rollout: 64 users, 16 times


@pytest.fixture(scope="module")
def fitted(world, method):
    return method.fit(world, 0.1)


@pytest.fixture(scope="module")
def undecided(fitted):
    """The policy as if it had learned to tell users and prices apart, which a single rollout does not teach."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: value + 0.3 * torch.randn(value.shape, generator=generator) for name, value in sorted(fitted.tensors.items())
    }
    tensors["mlp_extractor.score.4.bias"] = torch.zeros(1)
    return Fitted(tensors, fitted.facts)


@pytest.fixture
def untrained(monkeypatch):
    """Whoever trains now is told off."""

    def told_off(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(PPO, "learn", told_off)


# Training.


def test_training_looks_at_train_and_val_users_alone_and_in_their_roles(world, fitted):
    users = {split: {*world.scenario.users(split).tolist()} for split in ("train", "val")}
    by_role = {role: {user for user, asked in world.scenario.oracle.asked if asked == role} for role in ("validation", "query")}
    assert by_role == {"validation": users["train"], "query": users["val"]}
    assert {role for _, role in world.scenario.oracle.asked} == {"validation", "query"}


def test_the_settings_are_those_of_the_environment(world, method, fitted):
    (run,) = world.folder.glob("ppo-run-*")
    config = RunConfig.load(run)
    assert (config.env, config.seed, config.cost_weight) == ("dsa/DigitsResNet-v0", 0, "uniform:0:0.3")
    assert (config.average, config.ppo["batch_size"], config.total_timesteps) == (0.95, 512, 1)
    assert config.env_kwargs.items() >= world.kwargs.items()
    assert make_method("ppo").run_config(world, 0.1).total_timesteps == 60_000


def test_a_second_fit_trains_nothing(world, method, fitted, untrained):
    again = method.fit(world, 0.1)
    assert again.fingerprint() == fitted.fingerprint()


def test_a_finished_run_is_read_where_its_result_was_lost(world, method, fitted, untrained, tmp_path):
    (run,) = world.folder.glob("ppo-run-*")
    shutil.copytree(run, tmp_path / run.name)
    monkey = replace(world, folder=tmp_path)
    assert method.fit(monkey, 0.1).fingerprint() == fitted.fingerprint()


def test_a_training_that_was_stopped_goes_on(world, tmp_path, monkeypatch):
    whole, part = replace(world, folder=tmp_path / "whole"), replace(world, folder=tmp_path / "part")
    method, learn, begun = make_method("ppo", total_timesteps=2048), PPO.learn, []

    def noted(self, total, **more):
        begun.append((self.num_timesteps, total))
        return learn(self, total, **more)

    def stopped(self, total, **more):
        learn(self, 1024, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(PPO, "learn", stopped)
    with pytest.raises(KeyboardInterrupt):
        method.fit(part, 0.1)
    monkeypatch.setattr(PPO, "learn", noted)
    ends = []
    for here in (whole, part):
        method.fit(here, 0.1)
        (run,) = here.folder.glob("ppo-run-*")
        ends.append(load_artefact(run / "checkpoint", CHECKPOINT)[0])
    assert begun == [(0, 2048), (1024, 1024)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_other_settings_and_seeds_are_other_runs(world, method, fitted, tmp_path):
    here = replace(world, folder=tmp_path)
    for other in (here, replace(here, seed=1)):
        method.fit(other, 0.1)
    make_method("ppo", total_timesteps=1025).fit(here, 0.1)
    assert len([*tmp_path.glob("ppo-run-*")]) == 3


def test_a_world_that_starts_from_the_best_static_mask(text_world, tmp_path):
    world = replace(text_world, folder=tmp_path)
    method = make_method("ppo", total_timesteps=1)
    fitted = method.fit(world, 0.2)
    assert fitted.tensors["mlp_extractor.departure.start"].shape == (6, world.pathways.num_pathways)  # at six cost weights
    masks = method.choose(world, fitted, world.group("val", "support"), 0.05)
    assert masks.shape == (len(world.data.population.val), world.pathways.num_pathways)


def test_a_layerwise_environment_is_decided_layer_by_layer(world, tmp_path):
    here = replace(world, env="dsa/DigitsResNetLayerwise-v0", folder=tmp_path)
    method = make_method("ppo", total_timesteps=1)
    fitted = method.fit(here, 0.1)
    assert fitted.facts["rules"]["layerwise"] and fitted.facts["rules"]["rounds"] == 1
    assert method.choose(here, fitted, here.group("val", "support"), 0.1).shape == (4, here.pathways.num_pathways)


# Cost weights.


def test_one_policy_answers_every_cost_weight_of_its_range(world, method, fitted, undecided, untrained):
    shown = world.group("train", "support")
    assert method.fit(world, 0.0).fingerprint() == method.fit(world, 0.3).fingerprint() == fitted.fingerprint()
    masks = [method.choose(world, undecided, shown, weight) for weight in (0.0, 0.05, 0.3)]
    assert any(not torch.equal(masks[0], other) for other in masks[1:])


def test_one_policy_per_cost_weight(world, tmp_path):
    here, method = replace(world, folder=tmp_path), make_method("ppo", one_for_all=False, total_timesteps=1)
    cheap, dear = method.fit(here, 0.05), method.fit(here, 0.5)
    assert cheap.fingerprint() != dear.fingerprint()
    shown = here.group("val", "support")
    assert method.choose(here, dear, shown, 0.5).shape == (4, here.pathways.num_pathways)
    with pytest.raises(ValueError, match=r"for cost weights of 0.05, not 0.5: fit it for this one"):
        method.choose(here, cheap, shown, 0.5)


def test_a_cost_weight_out_of_range_is_refused_before_anything_is_trained(world, method, fitted, untrained):
    for ask in (
        lambda: method.fit(world, 0.4),
        lambda: method.choose(world, fitted, world.group("val", "support"), 0.4),
    ):
        with pytest.raises(ValueError, match=r"for cost weights of uniform:0:0.3, not 0.4.*one_for_all=False"):
            ask()


# Choosing.


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_are_those_that_the_policy_chooses_in_the_environment(world, method, undecided, split, weight):
    policy = build_policy(undecided.tensors, undecided.facts, world.scenario)
    rules = Rules.from_json(undecided.facts["rules"])
    expected = choose_masks(policy, world.scenario, world.scenario.users(split), weight, rules)
    found = method.choose(world, undecided, world.group(split, "support"), weight).numpy()
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found, axis=0)) > 1


def test_a_shorter_support_is_looked_at_afresh(world, method, undecided):
    shown = world.group("train", "support")
    full, few = (method.choose(world, undecided, group, 0.1) for group in (shown, shown.first(2)))
    assert not torch.equal(full, few)
    one = method.personalise(world, undecided, shown.first(1), 0.1)
    assert one.masks.shape == full.shape and one.logits(shown).isfinite().all()


def test_masks_do_not_depend_on_the_other_users(world, method, undecided):
    shown = world.group("train", "support")
    ragged = shown.pick([torch.arange(1 + 2 * i % 20) for i in range(len(shown))])
    together = method.choose(world, undecided, ragged, 0.1)
    alone = [method.choose(world, undecided, ragged.rows([i]), 0.1) for i in range(len(ragged))]
    assert torch.equal(torch.cat(alone), together)


def test_a_new_user_costs_a_look_and_an_adaptation(world, method, undecided):
    assert method.personalise(world, undecided, world.group("val", "support"), 0.1).adaptations == 2


def test_what_was_fitted_is_enough(world, method, undecided, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "learn", None)
    elsewhere = replace(world, folder=tmp_path / "nothing")
    shown: Group = world.group("val", "support")
    expected = method.choose(world, undecided, shown, 0.1)
    assert torch.equal(method.choose(elsewhere, undecided, shown, 0.1), expected)
    assert not elsewhere.folder.exists()


def test_a_policy_of_another_world_is_refused(digits_world, world, method, fitted):
    with pytest.raises(ArtefactError, match="the policy that ppo was fitted to was trained on other observations"):
        method.choose(digits_world, fitted, digits_world.group("val", "support"), 0.1)

"""The best configuration as methods: one co-training for all three, nobody's test users, and what users adapt from."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import worlds
from stable_baselines3 import PPO

from agents import cotrain
from agents.checkpoint import POLICY, build_policy, choose_masks
from agents.learning import learn
from agents.rivals import best_static
from agents.run import RunConfig
from backbones.artefacts import ArtefactError, load_artefact
from backbones.base import hash_tensors
from envs import MINIATURES
from envs.modelled import started_at
from envs.rules import Rules
from eval.conformance_case import with_other_test_users
from eval.methods import cotrained as module
from eval.methods import cotraining, make_method
from eval.methods.base import Fitted
from eval.methods.cotraining import on_co_trained
from meta.inner import MetaInit, adapt
from meta.trainer import MetaTrainer
from users.batch import Prepared

NAMES = ("cotrained", "cotrained_static", "cotrained_all_on")
TINY = {"total_timesteps": 1, "meta_steps": 3}  # SB3 ends after a whole rollout: 64 users, 16 times


def tiny(name, **more):
    return make_method(name, **TINY | more)


def told_off(*args, **kwargs):
    raise AssertionError("must not be called")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.fixture(scope="module")
def world(side_world, tmp_path_factory):
    """The digits with a folder of their own, and with all that they were made by."""
    kwargs = {**MINIATURES["dsa/DigitsResNet-v0"], **side_world.kwargs, "placement": "side", "pretrain_epochs": 6}
    return replace(side_world, kwargs=kwargs, folder=tmp_path_factory.mktemp("methods"))


@pytest.fixture(scope="module", autouse=True)
def untuned():
    """As if nobody had tuned ``cotrained``, for what is fitted once too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "settings_for", lambda *args: {})
        yield


@pytest.fixture(scope="module")
def trained():
    """What is trained, in order."""
    return []


@pytest.fixture(scope="module")
def fits(world, trained):
    """Every method at two cost weights, where no other scenario, no test user and no frozen state may be made."""
    steps, turns = MetaTrainer._outer_step, cotraining.take_turn

    def turn(*args, **kwargs):
        trained.append("turn")
        return turns(*args, **kwargs)

    def stepped(self):
        begun = {"weights": hash_tensors(self.present().weights)} if self.step == 0 else {}
        trained.append(f"meta-step {self.step} {begun}")
        return steps(self)

    def played(config, scenario, folder, **kwargs):
        trained.append(f"policy of {folder.name.split('-')[0]} on {scenario.fingerprint}")
        return learn(config, scenario, folder, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cotraining, "take_turn", turn)
        patch.setattr(MetaTrainer, "_outer_step", stepped)
        patch.setattr(cotrain, "learn", played)
        patch.setattr(module, "learn", played)
        patch.setattr(RunConfig, "scenario", told_off)
        patch.setattr(Prepared, "__init__", told_off)
        return {(name, weight): tiny(name).fit(world, weight) for weight in (0.1, 0.3) for name in NAMES}


@pytest.fixture(scope="module")
def fitted(fits):
    """What the policy's method learned."""
    return fits["cotrained", 0.1]


@pytest.fixture(scope="module")
def init(fitted):
    """The co-trained initialisation."""
    return MetaInit.from_tensors(cotraining.under("init/", fitted.tensors))


@pytest.fixture(scope="module")
def scenario(world, init):
    """Train and val users on co-trained adapters."""
    return on_co_trained(world, init)


@pytest.fixture(scope="module")
def undecided(fitted):
    """The policy as if it had learned to tell users and prices apart, which a single rollout does not teach."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: value + 0.3 * torch.randn(value.shape, generator=generator) if name.startswith("policy/") else value
        for name, value in sorted(fitted.tensors.items())  # files keep no order
    }
    tensors["policy/mlp_extractor.score.4.bias"] = torch.zeros(1)
    return Fitted(tensors, fitted.facts)


@pytest.fixture
def untrained(monkeypatch):
    """Whoever trains now is told off."""
    monkeypatch.setattr(PPO, "learn", told_off)
    monkeypatch.setattr(MetaTrainer, "_outer_step", told_off)


# One co-training.


def test_the_three_methods_share_one_initialisation_which_is_not_the_environments(world, fits, init):
    own = world.init.tensors()
    for (name, weight), fitted in fits.items():
        assert same(tiny(name).start(world, fitted).tensors(), init.tensors()), (name, weight)
    assert any(not torch.equal(tensor, init.weights[key]) for key, tensor in world.init.weights.items())
    assert init.tensors().keys() == own.keys() and all(own[key].shape == t.shape for key, t in init.tensors().items())


def test_the_turn_is_taken_once_and_then_one_policy_is_trained_on_the_new_adapters(world, fits, trained, scenario):
    policies = [f"policy of cotrain on {world.scenario.fingerprint}", f"policy of cotrained on {scenario.fingerprint}"]
    begun = {"weights": hash_tensors(world.init.weights)}
    steps = [f"meta-step {n} {facts}" for n, facts in enumerate((begun, {}, {}))]
    assert trained == ["turn", policies[0], *steps, policies[1]]
    assert scenario.fingerprint != world.scenario.fingerprint


def test_a_second_fit_trains_nothing(world, fits, untrained):
    for (name, weight), fitted in fits.items():
        assert tiny(name).fit(world, weight).fingerprint() == fitted.fingerprint()


def test_other_settings_are_other_co_trainings(world):
    folders = {tiny("cotrained", **more).run_in(world) for more in ({}, {"total_timesteps": 2}, {"meta_steps": 4})}
    assert len(folders) == 3
    assert {tiny(name).run_in(world) for name in NAMES} < folders
    assert tiny("cotrained").run_in(replace(world, seed=1)) not in folders


def test_the_settings_are_those_of_ppo_and_of_the_environments_meta_training(world):
    config, steps = make_method("cotrained").settings_in(world)
    plain = make_method("ppo").run_config(world, "uniform:0:0.3")
    assert replace(config, cotrain=0) == plain and config.cotrain == 1
    assert (steps.steps, steps.users, steps.keep, steps.seed) == (1, 4, "last", 0)  # half of two steps
    layerwise, _ = make_method("cotrained").settings_in(replace(world, env="dsa/DigitsResNetLayerwise-v0"))
    assert (layerwise.rules.layerwise, layerwise.rules.rounds) == (True, 1)
    bare = replace(world, kwargs={"placement": "side"})
    assert make_method("cotrained").settings_in(bare)[1].steps == 1000


def test_further_steps_deal_examples_anew_if_that_is_asked_for(world):
    plain, other = (make_method("cotrained", resample=resample).settings_in(world)[1] for resample in (None, True))
    assert not plain.resample and other == replace(plain, resample=True)
    dealt = replace(world, kwargs={**world.kwargs, "resample": True})
    assert make_method("cotrained").settings_in(dealt)[1].resample
    assert not make_method("cotrained", resample=False).settings_in(dealt)[1].resample


def test_the_others_stand_on_what_cotrained_was_tuned_to(world, monkeypatch):
    monkeypatch.setattr(
        module, "settings_for", lambda env, kwargs, name: {"cotrained": {"meta_steps": 7, "resample": True}}[name]
    )
    wanted = make_method("cotrained", meta_steps=7, resample=True).run_in(world)
    for name in NAMES[1:]:
        assert make_method(name).run_in(world) == wanted != make_method(name, meta_steps=8).run_in(world)
        assert make_method(name).leans_on == ("cotrained",)


def test_it_is_the_run_that_train_ppo_makes(world, tmp_path):
    method = make_method("cotrained", total_timesteps=1)
    mine = method.fit(replace(world, folder=tmp_path / "methods"), 0.1)
    config, run = method.settings_in(world)[0], tmp_path / "run"
    config.save(run)
    cotrain.cotrain(config, run, progress=False)
    scenario = config.scenario(run)
    learn(config, scenario, run, progress=False)
    init, _ = load_artefact(run / "meta-1", "meta-initialisation")
    policy, facts = load_artefact(run / "policy", POLICY)
    assert same(init, cotraining.under("init/", mine.tensors))
    assert same(policy, cotraining.under("policy/", mine.tensors))
    assert mine.facts == {**facts, "begun_at": world.scenario.fingerprint}


def test_what_was_stopped_goes_on_to_the_same_result(world, tmp_path, monkeypatch):
    """Stopped after a rollout of the turn's policy (it takes two), after two meta-steps, and after one of the last policy's."""
    method = tiny("cotrained", total_timesteps=1025 + 1024)
    whole = method.fit(replace(world, folder=tmp_path / "whole"), 0.1)
    part, played, step, run = replace(world, folder=tmp_path / "part"), PPO.learn, MetaTrainer._outer_step, MetaTrainer.run
    done = []

    def rollouts(self, total, **more):
        done.append(f"{total} from {self.num_timesteps}")
        if self.num_timesteps:
            return played(self, total, **more)
        played(self, 1024, **more)
        raise KeyboardInterrupt

    def stepped(self):
        done.append(f"meta-step {self.step}")
        if done.count("meta-step 2") == 1:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(PPO, "learn", rollouts)
    monkeypatch.setattr(MetaTrainer, "_outer_step", stepped)
    monkeypatch.setattr(MetaTrainer, "run", lambda self: run(self, every=1))
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            method.fit(part, 0.1)
    assert method.fit(part, 0.1).fingerprint() == whole.fingerprint()
    steps = [f"meta-step {n}" for n in (0, 1, 2, 2)]
    assert done == ["1025 from 0", "1 from 1024", *steps, "2049 from 0", "1025 from 1024"]


# Nobody's test users.


def test_what_is_learned_on_has_no_test_users(world, scenario, init):
    assert {*scenario.splits} == {"train", "val"} and scenario.data is world.data
    test = np.array(world.data.population.indices("test"))
    for ask in (
        lambda: scenario.embeddings[test],
        lambda: scenario.statistics[test[:1]],
        lambda: scenario.scores["gradient_norm"][test],
        lambda: np.asarray(scenario.statistics),
        lambda: scenario.oracle.evaluate(test, np.ones((len(test), world.pathways.num_pathways), bool), "query"),
    ):
        with pytest.raises(PermissionError, match="must not see test users"):
            ask()
    fresh, train, val = on_co_trained(world, init), scenario.users("train"), scenario.users("val")
    _ = fresh.embeddings[train[:1]]  # one asks for all of the split, together: in other company the last bits may differ
    assert fresh.look.known.nonzero()[0].tolist() == [*train]
    _ = fresh.statistics[val[1:2]]
    assert fresh.look.known.nonzero()[0].tolist() == [*train, *val]


def test_other_test_users_make_no_difference(world, fits, tmp_path):
    strangers = replace(with_other_test_users(world), folder=tmp_path)
    for name in NAMES:
        assert tiny(name).fit(strangers, 0.1).fingerprint() == fits[name, 0.1].fingerprint(), name


def test_where_adapters_start_as_before_everything_is_as_before(world):
    again, known = started_at(world.scenario, world.init, None), world.scenario
    assert (again.fingerprint, again.made_of, again.name) == (known.fingerprint, known.made_of, known.name)
    users = np.concatenate([known.users("train"), known.users("val")])[::-1]
    masks = np.random.default_rng(0).random((len(users), world.pathways.num_pathways)) < 0.5
    for name in ("embeddings", "statistics"):
        assert np.array_equal(getattr(again, name)[users], getattr(known, name)[users]), name
    for role in ("validation", "query"):
        assert np.array_equal(again.oracle.evaluate(users, masks, role).loss, known.oracle.evaluate(users, masks, role).loss)


def test_embedding_and_precision_are_taken_over():
    known = worlds.world(precision="bfloat16", embedding=("labels", "scores"), placement="side").scenario
    again = started_at(known, known.look.of.init, None)
    assert again.fingerprint == known.fingerprint and again.fingerprint.endswith("-labels-scores")
    assert again.made_of["precision"] == again.oracle.live.precision == "bfloat16"
    assert again.look.embedder.parts == ("labels", "scores")


# Choosing and adapting.


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_are_those_that_the_policy_chooses_on_co_trained_adapters(world, scenario, undecided, split, weight):
    policy = build_policy(cotraining.under("policy/", undecided.tensors), undecided.facts, scenario)
    rules = Rules.from_json(undecided.facts["rules"])
    expected = choose_masks(policy, scenario, scenario.users(split), weight, rules)
    found = tiny("cotrained").choose(world, undecided, world.group(split, "support"), weight).numpy()
    np.testing.assert_array_equal(found, expected)
    assert split == "val" or len(np.unique(found, axis=0)) > 1


def test_users_are_observed_at_the_co_trained_initialisation(world, fitted, scenario):
    look = module._look(fitted.tensors, world, tiny("cotrained").start(world, fitted))
    found = look.observe(look.raw(world.group("val", "support").batch)).numpy()
    val = scenario.users("val")
    np.testing.assert_allclose(found, scenario.statistics[val], atol=1e-5)
    assert np.abs(found - world.scenario.statistics[val]).max() > 1e-3
    np.testing.assert_array_equal(scenario.embeddings[val], world.scenario.embeddings[val])


@pytest.mark.parametrize("name", NAMES)
def test_users_adapt_from_the_co_trained_initialisation(world, fits, init, name):
    shown = world.group("val", "support")
    found = tiny(name).personalise(world, fits[name, 0.1], shown, 0.1)
    masks = torch.ones_like(found.masks) if name == "cotrained_all_on" else found.masks
    assert torch.equal(found.masks, masks) and found.adaptations == (2 if name == "cotrained" else 1)
    assert same(found.weights, adapt(world.pathways, init, shown.batch, masks))
    assert not same(found.weights, adapt(world.pathways, world.init, shown.batch, masks))


@pytest.mark.parametrize("weight", [0.1, 0.3])
def test_the_static_mask_is_the_best_on_co_trained_adapters(world, fits, scenario, weight, monkeypatch):
    mask = fits["cotrained_static", weight].tensors["mask"].numpy()
    assert np.array_equal(mask, best_static(scenario, weight, world.seed))
    judged = []
    monkeypatch.setattr(module, "best_static", lambda scenario, *args: judged.append(scenario) or mask)
    tiny("cotrained_static").fit(world, weight)
    assert judged[0].oracle.live.init.tensors().keys() == scenario.oracle.live.init.tensors().keys()
    assert hash_tensors(judged[0].oracle.live.init.tensors()) == hash_tensors(scenario.oracle.live.init.tensors())


def test_one_policy_answers_every_cost_weight_of_its_range(world, fits, undecided, untrained):
    assert fits["cotrained", 0.1].fingerprint() == fits["cotrained", 0.3].fingerprint()
    shown = world.group("train", "support")
    masks = [tiny("cotrained").choose(world, undecided, shown, weight) for weight in (0.0, 0.3)]
    assert not torch.equal(*masks)
    for ask in (
        lambda: make_method("cotrained").fit(world, 0.4),
        lambda: tiny("cotrained").choose(world, undecided, shown, 0.4),
    ):
        with pytest.raises(ValueError, match=r"for cost weights of uniform:0:0.3, not 0.4"):
            ask()


@pytest.mark.parametrize("name", NAMES)
def test_what_was_co_trained_in_another_world_is_refused(digits_world, fits, name):
    with pytest.raises(ArtefactError, match="what was co-trained was trained on other observations"):
        tiny(name).personalise(digits_world, fits[name, 0.1], digits_world.group("val", "support"), 0.1)


def test_global_random_numbers_are_left_alone(world, fitted, tmp_path):
    def drawn():
        return random.random(), np.random.rand(), float(torch.rand(()))

    results = []
    for work in (False, True):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        if work:
            tiny("cotrained_all_on", meta_steps=1).fit(replace(world, folder=tmp_path), 0.1)
            tiny("cotrained").choose(world, fitted, world.group("val", "support"), 0.1)
        results.append(drawn())
    assert results[0] == results[1]


# Other worlds.


@pytest.mark.parametrize(("kind", "names"), [("digits_world", NAMES[::2]), ("text_world", NAMES)])
def test_adapters_inline_and_worlds_of_texts(request, kind, names, tmp_path):
    world = replace(request.getfixturevalue(kind), folder=tmp_path)
    shown = world.group("val", "support")
    for name in names:
        found = tiny(name, meta_steps=1).fit(world, 0.1)
        predictor = tiny(name).personalise(world, found, shown, 0.1)
        assert predictor.logits(world.group("val", "query")).isfinite().all()
    assert len([*tmp_path.glob("cotrained-run-*")]) == 1

"""Masks learned by gradient descent on relaxed gates, and by plain policy gradient."""

import copy
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from backbones.pathways import population_logits
from envs import known_spec
from envs.oracles import LiveOracle
from envs.planted import planted
from eval.group import Group
from eval.methods import make_method
from eval.methods.hard_concrete import open_gates, open_probability, sampled
from eval.methods.pathway import PathwayPredictor
from eval.methods.relaxed import relaxed_logits
from eval.world import World
from meta.inner import MetaInit, adapt, stacked, user_loss
from users.base import Examples

HURTS, HELPS = 0, -1
"""Pathways of the doctored world: the first one shouts for class 0, the head knows all train users' labels."""


def doctored(world, folder, init):
    """The world with another meta-initialisation."""
    look = copy.copy(world.look)
    look.of = replace(look.of, init=init)
    oracle = LiveOracle(world.data, init)
    return World(world.env, world.kwargs, world.seed, replace(world.scenario, look=look, oracle=oracle), folder)


def still(world):
    """A meta-initialisation whose pathways add nothing and never move."""
    weights = {key: torch.zeros_like(w) for key, w in world.init.weights.items()}
    return MetaInit(weights, torch.zeros_like(world.init.rates), world.init.adapted)


def shout(world, weights, pathway, label):
    """Let a pathway of the side placement add 6 to one label's logit."""
    weights[f"{world.pathways.names[pathway]}.up_bias"][label] = 6.0


@pytest.fixture(scope="module")
def helped(side_world, tmp_path_factory):
    """Pathways that never move: one hurts everybody, one helps everybody, the others do nothing."""
    init = still(side_world)
    shout(side_world, init.weights, HURTS, 0)
    batch, keys = side_world.group("train", "support").batch, side_world.pathways.keys[len(side_world.pathways.names) - 1]
    gates = torch.zeros(len(batch), side_world.pathways.num_pathways, dtype=torch.bool)
    gates[:, HELPS] = True
    head = {key: init.weights[key].clone().requires_grad_() for key in keys}
    optimiser = torch.optim.Adam(list(head.values()), lr=0.1)
    for _ in range(100):
        weights = stacked(replace(init, weights=init.weights | head), len(batch))
        optimiser.zero_grad()
        user_loss(side_world.pathways.logits(batch.frozen, weights, gates), batch).sum().backward()
        optimiser.step()
    init = replace(init, weights=init.weights | {key: w.detach() for key, w in head.items()})
    return doctored(side_world, tmp_path_factory.mktemp("helped"), init)


def labelled(shown, user, labels):
    """The group with other labels for one user, at the same examples."""
    examples = list(shown.examples)
    examples[user] = Examples(examples[user].inputs, labels)
    everybody = shown.batch.labels.clone()
    everybody[user, : len(labels)] = labels
    return replace(shown, examples=tuple(examples), batch=replace(shown.batch, labels=everybody))


@pytest.mark.parametrize("placement", ["digits_world", "side_world", "text_world"])
def test_gates_of_zero_and_one_are_exactly_the_mask(placement, request):
    world = request.getfixturevalue(placement)
    shown = world.group("val", "support")
    masks = torch.rand(len(shown), world.pathways.num_pathways, generator=torch.Generator().manual_seed(1)) < 0.5
    weights = adapt(world.pathways, world.init, shown.batch, torch.ones_like(masks))
    expected = world.pathways.logits(shown.batch.frozen, weights, masks)
    assert not torch.equal(expected, world.pathways.logits(shown.batch.frozen, weights, ~masks))
    torch.testing.assert_close(relaxed_logits(world.pathways, shown.batch.frozen, weights, masks.float()), expected)


@pytest.mark.parametrize("name", ["hard_concrete", "gumbel"])
def test_blocks_that_are_run_or_not_are_refused_and_not_tried(name, side_world):
    blocks = SimpleNamespace(pathways=SimpleNamespace(runs=(1, 2)))
    assert "cannot be partly on" in make_method(name).refuses(blocks)
    assert make_method(name).refuses(side_world) is None


def test_half_a_gate_is_half_of_what_the_pathway_adds(side_world):
    shown = side_world.group("val", "support")
    on = torch.ones(len(shown), side_world.pathways.num_pathways)
    weights = adapt(side_world.pathways, side_world.init, shown.batch, on.bool())
    off, half, full = (relaxed_logits(side_world.pathways, shown.batch.frozen, weights, share * on) for share in (0, 0.5, 1))
    torch.testing.assert_close(half, (off + full) / 2)


@pytest.mark.parametrize("placement", ["digits_world", "side_world"])
def test_the_gradient_of_a_gate_is_that_of_finite_differences(placement, request):
    world = request.getfixturevalue(placement)
    shown = world.group("val", "support")
    gates = torch.full((len(shown), world.pathways.num_pathways), 0.6)
    weights = adapt(world.pathways, world.init, shown.batch, gates > 0)

    def loss(gates):
        return user_loss(relaxed_logits(world.pathways, shown.batch.frozen, weights, gates), shown.batch)

    given = gates.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(given).sum(), given)
    for p in (0, world.pathways.num_pathways - 1):
        step = torch.zeros_like(gates)
        step[:, p] = 0.01
        expected = (loss(gates + step) - loss(gates - step)) / 0.02
        # Users together: where a step crosses a ReLU's edge, a single user's difference is off.
        assert (found[:, p] - expected).norm() < 0.05 * expected.norm()


def test_hard_concrete_gates_are_open_as_often_as_the_closed_form_says():
    log_alpha = torch.tensor([-4.0, -1.0, 0.0, 1.0, 4.0])
    gates = sampled(log_alpha, torch.rand(200_000, 5, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close((gates > 0).float().mean(0), open_probability(log_alpha), atol=5e-3, rtol=0)
    assert ((gates == 1).any(0) & ((gates > 0) & (gates < 1)).any(0)).all()
    assert gates.min() == 0 and gates.max() == 1
    assert open_gates(log_alpha).tolist() == [False, True, True, True, True]


def test_hard_concrete_closes_what_hurts_and_opens_what_helps(helped):
    mask = make_method("hard_concrete", steps=40).fit(helped, 0.1).tensors["mask"]
    assert not mask[HURTS] and mask[HELPS]


def test_a_higher_cost_weight_never_opens_more(helped):
    method = make_method("hard_concrete", steps=40)
    masks = [method.fit(helped, weight).tensors["mask"] for weight in (0.0, 0.1, 1.0, 100.0)]
    for lower, higher in pairwise(masks):
        assert (lower | ~higher).all()
    assert masks[0][HELPS] and not masks[0][HURTS]
    assert not masks[-1].any()


def test_everybody_gets_the_one_mask_and_new_weights_under_it(helped):
    method = make_method("hard_concrete", steps=40)
    fitted, shown = method.fit(helped, 0.1), helped.group("val", "support")
    predictor = method.personalise(helped, fitted, shown, 0.1)
    assert isinstance(predictor, PathwayPredictor)
    assert torch.equal(predictor.masks, fitted.tensors["mask"].expand(len(shown), -1)) and predictor.adaptations == 1


def test_gumbel_gives_users_what_their_own_data_demand(side_world, tmp_path):
    init = still(side_world)
    shout(side_world, init.weights, 0, 0)
    shout(side_world, init.weights, 1, 1)
    world, shown = doctored(side_world, tmp_path, init), side_world.group("val", "support")
    for user, label in enumerate((0, 1, 2)):
        shown = labelled(shown, user, torch.full((shown.counts[user],), label))
    masks = make_method("gumbel").choose(world, make_method("gumbel").fit(world, 0.1), shown, 0.1)
    assert masks[:3, :2].tolist() == [[True, False], [False, True], [False, False]]
    assert not masks[:, 2:].any(), "pathways that do nothing cost all the same"
    assert not make_method("gumbel").choose(world, make_method("gumbel").fit(world, 100.0), shown, 100.0).any()


def test_gumbel_is_not_taken_in_by_labels_that_can_only_be_learned_by_heart(side_world, tmp_path):
    init = still(side_world)
    init.rates[:, HELPS] = 4.0
    world, shown = doctored(side_world, tmp_path, init), side_world.group("val", "support")
    generator = torch.Generator().manual_seed(0)
    shown = labelled(shown, 0, torch.full((shown.counts[0],), 3))
    shown = labelled(shown, 1, torch.randint(10, (shown.counts[1],), generator=generator))
    table = shown.batch.table  # logits of zero: nothing is gained by being less sure
    blank = replace(table, offset=-population_logits(world.model, table))
    shown = replace(shown, batch=replace(shown.batch, table=blank))
    losses = []
    for on in (False, True):
        masks = torch.zeros(len(shown), world.pathways.num_pathways, dtype=torch.bool)
        masks[:, HELPS] = on
        weights = adapt(world.pathways, init, shown.batch, masks)
        losses.append(user_loss(world.pathways.logits(shown.batch.frozen, weights, masks), shown.batch))
    assert (losses[1][:2] < losses[0][:2]).all(), "on what it learns from, the head helps both"
    masks = make_method("gumbel").choose(world, make_method("gumbel").fit(world, 0.0), shown, 0.0)
    assert masks[:2, HELPS].tolist() == [True, False]


def test_gumbel_masks_do_not_depend_on_the_others(side_world):
    method, shown = make_method("gumbel", steps=5), side_world.group("val", "support")
    shown = shown.pick([torch.arange(n) for n in (1, 2, 7, 20)])
    fitted = method.fit(side_world, 0.05)
    masks = method.choose(side_world, fitted, shown, 0.05)
    assert masks.any() and not masks.all()
    for user in range(len(shown)):
        assert torch.equal(method.choose(side_world, fitted, shown.rows([user]), 0.05)[0], masks[user])
    order = [2, 0, 3, 1]
    assert torch.equal(method.choose(side_world, fitted, shown.rows(order), 0.05), masks[order])


def test_gumbel_goes_on_when_every_gate_is_shut(side_world):
    alone = side_world.group("val", "support").rows([0])
    method = make_method("gumbel", steps=80, rate=3.0)
    assert not method.choose(side_world, method.fit(side_world, 1000.0), alone, 1000.0).any()


def test_gumbel_states_what_it_spends(side_world):
    steps = side_world.init.steps
    assert make_method("gumbel", steps=2 * steps).tries(side_world) == 4
    assert make_method("gumbel", steps=1).tries(side_world) == 1


@pytest.fixture(scope="module")
def planted_world(tmp_path_factory):
    """The planted problem, which has no model: only the policy can be looked at."""
    return World("dsa/Planted-v0", {}, 0, planted(), tmp_path_factory.mktemp("planted"))


def reward(world, method, fitted, cost_weight):
    scenario = world.scenario
    users = scenario.users("test")
    seen = {"user": torch.from_numpy(scenario.embeddings[users]), "pathways": torch.from_numpy(scenario.statistics[users])}
    masks = method.policy(world, fitted).masks(seen).numpy()
    return scenario.oracle.evaluate(users, masks).reward(cost_weight).mean()


def test_the_self_critical_policy_nears_the_optimum(planted_world):
    method = make_method("self_critical")
    fitted = method.fit(planted_world, 0.1)
    assert fitted.facts["timesteps"] == 20_000, "as many as PPO for this environment"
    assert reward(planted_world, method, fitted, 0.1) > 0.9 * 0.95  # no static mask gets more than .6 of it


def test_the_self_critical_policy_is_one_per_cost_weight(planted_world):
    method = make_method("self_critical", timesteps=2000)
    cheap, dear = (method.fit(planted_world, weight) for weight in (0.0, 10.0))
    seen = {"user": torch.zeros(1, 32), "pathways": torch.from_numpy(planted_world.scenario.statistics[:1])}
    assert not method.policy(planted_world, dear).masks(seen).any()
    assert method.policy(planted_world, cheap).masks(seen).any()


def test_the_self_critical_policy_asks_for_as_many_masks_as_it_says(planted_world, tmp_path):
    asked = []

    class Counted(type(planted_world.scenario.oracle)):
        def measure(self, users, plans, roles):
            asked.append((roles, users, plans[:, 0]))
            return super().measure(users, plans, roles)

    oracle = planted_world.scenario.oracle
    world = replace(planted_world, folder=tmp_path)
    world = replace(world, scenario=replace(world.scenario, oracle=Counted(oracle.costs, oracle._accuracy)))
    make_method("self_critical", timesteps=150, batch=64, initial_logit=-5.0).fit(world, 0.1)
    trained = [(users, masks) for roles, users, masks in asked if roles == ("validation",)]
    assert [len(users) // 2 for users, _ in trained] == [64, 64, 22]
    train, val = (set(world.scenario.users(split).tolist()) for split in ("train", "val"))
    assert all(set(users.tolist()) <= train for users, _ in trained)
    assert [set(users.tolist()) for roles, users, _ in asked if roles == ("query",)] == [val]
    share = np.concatenate([masks[: len(masks) // 2] for _, masks in trained]).mean()
    assert 0.15 < share < 0.25, "probabilities are bounded to .2, however sure the policy is"
    assert not trained[0][1][64:].any(), "the baseline is the policy's own mask"


def test_layerwise_steps_are_not_taken_for_masks(side_world):
    method, world = make_method("self_critical"), replace(side_world, env="dsa/DigitsResNetLayerwise-v0")
    assert known_spec(world.env).kwargs["layerwise"]
    assert method._lengths(world) == method._lengths(side_world) == (60_000, 4096)


@pytest.mark.parametrize("name", ["hard_concrete", "gumbel", "self_critical"])
def test_nothing_shared_is_changed_and_one_example_is_enough(name, digits_world, tmp_path):
    world, before = replace(digits_world, folder=tmp_path), digits_world.model.fingerprint()
    method = make_method(name, **{"hard_concrete": {"steps": 2}, "gumbel": {}, "self_critical": {"timesteps": 40}}[name])
    fitted = method.fit(world, 0.1)
    again = replace(world, folder=tmp_path / "again")
    assert method.fit(again, 0.1).fingerprint() == fitted.fingerprint()
    shown = world.group("val", "support").pick([torch.arange(n) for n in (1, 3, 20, 1)])
    predictor = method.personalise(world, fitted, shown, 0.1)
    asked = Group.of(world.data, "val", "query")
    served = predictor.serve(torch.stack([asked.inputs(user) for user in range(len(asked))]))
    torch.testing.assert_close(served, predictor.logits(asked), atol=1e-4, rtol=1e-4)
    assert digits_world.model.fingerprint() == before

"""Searches for one user's mask: what they see, what they spend, and what they find."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import worlds

from envs.oracles import Oracle, all_masks
from eval.group import Group
from eval.methods import make_method, searches
from eval.methods.base import Fitted
from eval.methods.searches import Trials
from eval.world import World

NAMES = ("random_search", "greedy", "bayesian")
P = 7
"""Pathways of the digits' worlds."""
FULL = 254
"""A budget for all 127 masks of them."""


@pytest.fixture(autouse=True)
def _optuna(request):
    if "bayesian" in request.node.name:
        pytest.importorskip("optuna", reason="needs the extra `tune`")


@pytest.fixture(scope="module")
def shown(side_world):
    return side_world.group("val", "support")


def chosen(world, name, shown, cost_weight=0.1, **settings):
    return make_method(name, **settings).choose(world, Fitted(), shown, cost_weight).numpy()


def keys(masks):
    """Masks ``[B, P]`` as numbers."""
    return (masks @ (1 << np.arange(masks.shape[1]))).tolist()


def invented(monkeypatch, rewards):
    """Masks are worth what a table ``[U, 2^P]`` says; notes the masks tried per user, in order."""
    tried: dict[int, list[int]] = {user: [] for user in range(len(rewards))}

    def worth(self, users, masks):
        for user, key in zip(users.tolist(), keys(masks), strict=True):
            tried[user].append(key)
        return rewards[users, keys(masks)]

    monkeypatch.setattr(Trials, "worth", worth)
    return tried


# What is measured.


class Silent(Oracle):
    def measure(self, users, plans, roles):
        raise AssertionError("the oracle was asked")


class Shut:
    """Examples that nobody may look at."""

    def __init__(self, data):
        self.pathways, self.population = data.pathways, data.population

    def rows(self, split, role, users):
        raise AssertionError(f"{role} examples of {split} users were looked at")

    part = readouts = batch = rows


@pytest.mark.parametrize("name", NAMES)
def test_a_search_looks_at_nothing_but_what_it_is_shown(side_world, shown, name):
    before = chosen(side_world, name, shown)
    scenario = replace(side_world.scenario, data=Shut(side_world.data), oracle=Silent())
    world = World(side_world.env, side_world.kwargs, side_world.seed, scenario, side_world.folder)
    np.testing.assert_array_equal(chosen(world, name, shown), before)


@pytest.mark.parametrize("which", ["digits_world", "side_world", "text_world"])
def test_rewards_are_those_of_the_oracle_on_halves_of_the_support(which, request):
    world = request.getfixturevalue(which)
    trials = Trials(world, world.group("val", "support"), 0.1, 0)
    users = world.scenario.users("val")
    for mask in np.eye(world.pathways.num_pathways, dtype=bool):
        masks = np.repeat(mask[None], len(users), axis=0)
        expected = world.scenario.oracle.evaluate(users, masks, "support_halves").reward(0.1)
        np.testing.assert_allclose(trials(np.arange(len(users)), masks), expected, atol=1e-6)


def test_a_users_only_example_is_fitted_and_measured(side_world, shown):
    places = [torch.arange(1), *(torch.arange(n) for n in shown.counts[1:])]
    beside, alone = shown.pick(places), shown.first(1).rows([0])
    on = np.ones((1, P), dtype=bool)
    first, second = (Trials(side_world, group, 0.0, 0)(np.zeros(1, dtype=int), on) for group in (beside, alone))
    assert first == second
    weights = searches.adapt(side_world.pathways, side_world.init, alone.batch, torch.ones(1, P, dtype=torch.bool))
    right = side_world.pathways.logits(alone.batch.frozen, weights, torch.ones(1, P, dtype=torch.bool)).argmax(-1)
    assert first == float(right == alone.batch.labels)


def test_a_mask_under_which_adaptation_diverges_is_worth_nothing(side_world, shown, monkeypatch):
    adapt = searches.adapt

    def diverging(pathways, init, support, gates):
        weights = adapt(pathways, init, support, gates)
        return {key: torch.where(gates[:, -1].view(-1, *[1] * (w.ndim - 1)), torch.nan, w) for key, w in weights.items()}

    monkeypatch.setattr(searches, "adapt", diverging)
    trials = Trials(side_world, shown, 0.5, 0)
    mask = np.tile(np.arange(P) == P - 1, (4, 1))
    np.testing.assert_allclose(trials(np.arange(4), mask), -0.5 * trials.costs.alone[-1].item())


# What is spent.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("budget", "spent"), [(2, 2), (9, 8), (24, 24)])
def test_every_user_spends_exactly_the_budget(side_world, shown, name, budget, spent, monkeypatch):
    adapted = []
    adapt = searches.adapt

    def counting(pathways, init, support, gates):
        adapted.append(int(gates.any(1).sum()))
        return adapt(pathways, init, support, gates)

    monkeypatch.setattr(searches, "adapt", counting)
    method = make_method(name, budget=budget)
    assert method.tries(side_world) == spent
    method.choose(side_world, Fitted(), shown, 0.1)
    assert sum(adapted) == spent * len(shown)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [8, FULL])
def test_nothing_is_tried_twice(side_world, shown, name, budget, monkeypatch):
    tried = invented(monkeypatch, np.random.default_rng(0).random((1, 2**P)))
    chosen(side_world, name, shown.rows([0]), budget=budget)
    for masks in tried.values():  # all_off first, which costs nothing
        assert masks[0] == 0 and len(masks) == len({*masks}) == budget // 2 + 1


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_for_more_than_every_mask_is_not_spent(side_world, name):
    assert make_method(name, budget=1000).tries(side_world) == FULL


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_for_no_mask_is_refused(name):
    with pytest.raises(ValueError, match="the least budget; got 1"):
        make_method(name, budget=1)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_spent_is_told_with_the_users_models(side_world, shown, name):
    found = make_method(name, budget=4).personalise(side_world, Fitted(), shown, 0.1)
    assert found.adaptations == 5  # two masks on two halves each, then the one that was chosen
    assert found.masks.shape == (4, P)


# What is found.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [8, 40])
def test_the_mask_is_the_best_of_those_tried_and_the_earliest_of_equals(side_world, shown, name, budget, monkeypatch):
    rewards = np.random.default_rng(1).integers(4, size=(4, 2**P)) / 4
    tried = invented(monkeypatch, rewards)
    found = keys(chosen(side_world, name, shown, budget=budget))
    assert found == [max(masks, key=lambda mask: rewards[user, mask]) for user, masks in tried.items()]


@pytest.mark.parametrize("name", NAMES)
def test_dear_pathways_are_left_off_and_free_ones_taken_where_they_help(side_world, shown, name):
    assert not chosen(side_world, name, shown, cost_weight=50.0).any()
    taught = chosen(side_world, name, shown, cost_weight=0.0, budget=40)
    trials = Trials(side_world, shown, 0.0, 0)
    off, best = (trials(np.arange(4), masks) for masks in (np.zeros_like(taught), taught))
    assert (best >= off).all() and (best > off).any()


def test_greedys_first_step_is_the_best_single_pathway(side_world, shown, monkeypatch):
    rewards = np.random.default_rng(0).random((4, 2**P)) / 2
    singles = [1 << p for p in range(P)]
    rewards[:, 0] = 0
    invented(monkeypatch, rewards)
    found = chosen(side_world, "greedy", shown, budget=2 * P)
    assert keys(found) == [singles[place] for place in rewards[:, singles].argmax(1)]


def test_greedy_goes_on_from_its_first_step_with_one_pathway_more(side_world, shown, monkeypatch):
    rewards = (np.random.default_rng(1).random((4, P)) + 0.1) @ all_masks(P).T  # every pathway helps
    tried = invented(monkeypatch, rewards)
    assert chosen(side_world, "greedy", shown, budget=P * (P + 1)).all()
    sizes = [0, *np.repeat(range(1, P + 1), range(P, 0, -1))]
    for masks in tried.values():
        assert all_masks(P)[masks].sum(1).tolist() == sizes


def test_greedy_spends_the_rest_where_no_pathway_helps(side_world, shown, monkeypatch):
    rewards = np.tile(-np.arange(2.0**P), (4, 1))
    rewards[:, -1] = 1.0  # out of reach of single steps
    invented(monkeypatch, rewards)
    assert not chosen(side_world, "greedy", shown, budget=2 * P).any()
    assert chosen(side_world, "greedy", shown, budget=FULL).all()


def test_bayesian_search_learns_from_what_it_tried(side_world, shown, monkeypatch):
    """On additive rewards it needs fewer masks than random search, users' means over many seeds."""
    gains = np.linspace(-1, 1, P)
    rewards = np.tile(gains @ all_masks(P).T, (4, 1))
    invented(monkeypatch, rewards)
    reached = {}
    for name in ("random_search", "bayesian"):
        found = [chosen(replace(side_world, seed=seed), name, shown, budget=24) for seed in range(6)]
        reached[name] = np.mean([rewards[0, keys(masks)].mean() for masks in found])
    assert reached["bayesian"] > reached["random_search"] + 0.05


def test_bayesian_search_leaves_optunas_talkativeness_as_it_was(side_world, shown, capfd):
    from optuna.logging import get_verbosity

    before = get_verbosity()
    chosen(side_world, "bayesian", shown, budget=4)
    assert get_verbosity() == before
    assert "study" not in capfd.readouterr().err


# One by one.


@pytest.mark.parametrize("name", NAMES)
def test_masks_do_not_depend_on_the_other_users(side_world, shown, name):
    together = chosen(side_world, name, shown)
    order = [2, 0, 3, 1]
    np.testing.assert_array_equal(chosen(side_world, name, shown.rows(order)), together[order])
    alone = [chosen(side_world, name, shown.rows([i]))[0] for i in range(4)]
    np.testing.assert_array_equal(np.stack(alone), together)


@pytest.mark.parametrize("name", NAMES)
def test_users_who_look_alike_are_still_searched_in_orders_of_their_own(side_world, shown, name, monkeypatch):
    tried = invented(monkeypatch, np.zeros((3, 2**P)))
    one = shown.rows([0])
    twins = Group(one.data, ("a", "b", "c"), one.examples * 3, one.batch.rows(torch.zeros(3, dtype=torch.long)))
    make_method(name).choose(side_world, Fitted(), twins, 0.1)
    assert len({tuple(masks) for masks in tried.values()}) > 1


@pytest.mark.parametrize("name", NAMES)
def test_supports_of_one_and_of_different_sizes(side_world, shown, name):
    few = shown.pick([torch.arange(n) for n in (1, 2, 7, 20)])
    found = make_method(name).personalise(side_world, Fitted(), few, 0.0)
    alone = make_method(name).personalise(side_world, Fitted(), few.rows([0]), 0.0)
    assert torch.equal(found.masks[0], alone.masks[0])
    assert found.logits(few).isfinite().all()


def test_many_pathways_are_searched_among_sampled_masks(monkeypatch):
    world = worlds.digits("inline")
    monkeypatch.setattr(type(world.pathways), "num_pathways", 12)
    masks = searches.candidates(world)
    assert masks.shape[1] == 12 and 500 < len(masks) <= 513
    np.testing.assert_array_equal(masks, searches.candidates(world))
    assert make_method("greedy", budget=10_000).tries(world) == 2 * len(masks)

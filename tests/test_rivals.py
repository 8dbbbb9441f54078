"""Rivals of the policy, and the comparison with them: what each may look at, and what is reported."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from recording import RecordingOracle

import agents.rivals
from agents.comparison import METHODS, compare, group_table, summarise, table
from agents.rivals import (
    best_static,
    candidate_masks,
    masks_of_every_density,
    neighbours,
    random_masks,
    searched,
    shuffled_masks,
    suffixes,
    thresholded,
)
from backbones.costs import CostModel
from envs.modelled import modelled_scenario
from envs.oracles import CachedOracle, FormulaOracle, LiveOracle, all_masks
from envs.planted import planted
from meta.inner import MetaInit
from users.batch import Prepared

SEEDS = range(5)


@pytest.fixture(scope="module")
def digits(pathways, population):
    """The digits with five pathways and a start that nobody meta-trained."""
    rates = torch.full((2, pathways.num_pathways), 0.1)
    init = MetaInit(pathways.start(0), rates, torch.ones(pathways.num_pathways, dtype=torch.bool))
    return modelled_scenario("digits", LiveOracle(Prepared(pathways, population), init), "toy", None, {})


def constant(pathways=8, accuracy=0.5):
    """A problem in which every mask is right for everybody."""
    oracle = FormulaOracle(planted().oracle.costs.own[:pathways], lambda users, masks: np.full(len(users), accuracy))
    return replace(planted(), oracle=oracle)


def with_accuracy(scenario, accuracy):
    return replace(scenario, oracle=FormulaOracle(scenario.oracle.costs, accuracy))


def brute_force(scenario, users, cost_weight, role="validation"):
    """Mean reward of every mask."""
    masks = all_masks(len(scenario.pathways))
    asked = (scenario.oracle.evaluate(users, np.repeat(m[None], len(users), axis=0), role) for m in masks)
    return masks, np.array([outcome.reward(cost_weight).mean() for outcome in asked])


# Rivals.


def test_all_masks_are_all_of_them():
    masks = all_masks(5)
    assert masks.shape == (32, 5)
    assert len(np.unique(masks, axis=0)) == 32
    assert not masks[0].any()
    assert masks[-1].all()


@pytest.mark.parametrize("cost_weight", [0.0, 0.1])
@pytest.mark.parametrize("seed", SEEDS)
def test_best_static_is_as_good_as_brute_force_on_planted(seed, cost_weight):
    scenario = planted(seed)
    masks, rewards = brute_force(scenario, scenario.users("train"), cost_weight)
    found = best_static(scenario, cost_weight, seed)
    assert rewards[(masks == found).all(1).argmax()] == pytest.approx(rewards.max(), abs=1e-12)


def test_best_static_is_brute_force_on_the_digits(digits):
    masks, rewards = brute_force(digits, digits.users("train"), 0.1)
    np.testing.assert_array_equal(best_static(digits, 0.1), masks[rewards.argmax()])


def test_best_static_finds_the_one_mask_that_everybody_needs():
    need = np.array([1, 0, 0, 1, 1, 0, 1, 0], dtype=bool)
    scenario = with_accuracy(planted(), lambda users, masks: (masks == need).mean(1))
    np.testing.assert_array_equal(best_static(scenario, 0.01), need)


@pytest.mark.parametrize("seed", range(5))
def test_best_static_is_found_among_more_masks_than_are_tried(seed, monkeypatch):
    monkeypatch.setattr(agents.rivals, "EXHAUSTIVE", 3)
    monkeypatch.setattr(agents.rivals, "SAMPLED", 8)
    need = np.random.default_rng(seed).random(8) < 0.5
    scenario = with_accuracy(planted(), lambda users, masks: (masks == need).mean(1))
    np.testing.assert_array_equal(best_static(scenario, 0.01, seed), need)


def test_neighbours_differ_in_two_pathways_at_most():
    mask = np.array([1, 0, 1, 1, 0], dtype=bool)
    found = neighbours(mask)
    assert len({*map(bytes, found)}) == len(found) == 1 + 5 + 10
    assert ((found ^ mask).sum(1) <= 2).all()


def test_best_static_looks_at_validation_examples_of_train_users_alone():
    scenario = planted()
    oracle = RecordingOracle(scenario.oracle)
    best_static(replace(scenario, oracle=oracle), 0.1)
    assert {*oracle.users("validation")} == {*scenario.users("train").tolist()}
    assert {roles for _, _, roles in oracle.asked} == {("validation",)}


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_random_masks_cost_what_the_policys_masks_cost(density):
    rng = np.random.default_rng(0)
    costs = CostModel.of_pathways(np.array([0.4, 0.3, 0.1, 0.1, 0.05, 0.05]))
    masks = rng.random((500, 6)) < density * np.array([1, 0.2, 1, 0.5, 1, 0.1])
    dealt = random_masks(masks, costs, rng)
    assert dealt.shape == masks.shape
    assert dealt.dtype == bool
    assert costs.of(dealt).mean() == pytest.approx(costs.of(masks).mean(), abs=0.03)


def test_random_masks_use_one_probability_for_all_pathways():
    rng = np.random.default_rng(0)
    masks = np.zeros((4000, 4), dtype=bool)
    masks[:, 0] = True
    rates = random_masks(masks, CostModel.of_pathways(np.full(4, 0.25)), rng).mean(0)
    np.testing.assert_allclose(rates, 0.25, atol=0.04)


@pytest.mark.parametrize("users", [2, 3, 50])
def test_shuffled_masks_are_the_same_masks_with_nobody_at_their_own_place(users):
    numbers = np.arange(users)
    masks = (numbers[:, None] >> np.arange(6) & 1).astype(bool)  # all different, so that places can be told
    for seed in range(20):
        dealt = shuffled_masks(masks, np.random.default_rng(seed))
        order = dealt @ (1 << np.arange(6))
        assert sorted(order) == numbers.tolist()
        assert (order != numbers).all()


def test_shuffling_changes_with_the_draw():
    masks = np.random.default_rng(0).random((30, 8)) < 0.5
    rng = np.random.default_rng(0)
    assert (shuffled_masks(masks, rng) != shuffled_masks(masks, rng)).any()


def test_masks_of_a_single_user_cannot_be_shuffled():
    with pytest.raises(ValueError, match="two users or more"):
        shuffled_masks(np.ones((1, 3), dtype=bool), np.random.default_rng(0))


@pytest.mark.parametrize("score", ["gradient_norm", "relative_gradient"])
def test_a_threshold_is_chosen_on_query_examples_of_val_users_alone(score):
    scenario = planted()
    oracle = RecordingOracle(scenario.oracle)
    thresholded(replace(scenario, oracle=oracle), scenario.users("test"), 0.1, score)
    assert oracle.users("query") == {*scenario.users("val").tolist()}
    assert {roles for _, _, roles in oracle.asked} == {("query",)}


def test_outcomes_of_test_users_do_not_change_the_threshold():
    scenario, test = planted(), planted().users("test")

    def everything_but_test(users, masks):
        return np.where(np.isin(users, test), 1 - masks.mean(1), masks.mean(1))

    both = [
        thresholded(with_accuracy(scenario, accuracy), test, 0.1, "gradient_norm")
        for accuracy in (everything_but_test, lambda users, masks: masks.mean(1))
    ]
    np.testing.assert_array_equal(*both)


def test_thresholds_reach_from_everything_to_nothing():
    scenario = with_accuracy(planted(), lambda users, masks: masks.mean(1))
    assert thresholded(scenario, scenario.users("val"), 0.0, "gradient_norm").all()
    assert not thresholded(scenario, scenario.users("val"), 5.0, "gradient_norm").any()


def test_a_threshold_switches_on_the_highest_scores():
    scenario = planted()
    scores = scenario.scores["gradient_norm"]
    high = scores >= np.quantile(scores[scenario.users("val")], 0.7)
    found = thresholded(
        with_accuracy(scenario, lambda users, masks: (masks == high[users]).mean(1)),
        scenario.users("test"),
        0.0,
        "gradient_norm",
    )
    assert (found == high[scenario.users("test")]).mean() > 0.95


@pytest.mark.parametrize("cost_weight", [0.0, 0.1, 0.9])
def test_a_search_finds_each_users_best_mask(cost_weight):
    scenario, users = planted(), planted().users("test")
    found = searched(scenario, users, cost_weight, "validation", np.ones((1, 8), dtype=bool), "search")
    best = [scenario.user_info[u]["best_mask"] for u in users]
    assert ["".join(str(int(bit)) for bit in mask) for mask in found] == best


def test_a_search_on_the_digits_is_each_users_argmax(digits):
    users = digits.users("test")
    found = searched(digits, users, 0.1, "validation", np.ones((1, 5), dtype=bool), "search")
    mine = digits.oracle.evaluate(users, found).reward(0.1)
    for mask in all_masks(5):
        others = digits.oracle.evaluate(users, np.repeat(mask[None], len(users), axis=0)).reward(0.1)
        assert (mine >= others - 1e-9).all()


def test_ties_in_a_search_go_to_the_cheapest_mask():
    scenario = constant()
    found = searched(scenario, scenario.users("test"), 0.0, "validation", np.ones((1, 8), dtype=bool), "search")
    assert not found.any()


def test_a_search_looks_at_the_role_it_is_told():
    scenario = planted()
    oracle = RecordingOracle(scenario.oracle)
    users = scenario.users("test")[:2]
    searched(replace(scenario, oracle=oracle), users, 0.1, "support_halves", np.ones((1, 8), dtype=bool), "search")
    assert oracle.users("support_halves") == {*users.tolist()}
    assert {roles for _, _, roles in oracle.asked} == {("support_halves",)}


def test_candidates_are_every_mask_while_these_are_few():
    found = candidate_masks(8, np.random.default_rng(0))
    assert {*map(bytes, found)} == {*map(bytes, all_masks(8))}


@pytest.mark.parametrize("pathways", [9, 10, 12, 24])
@pytest.mark.parametrize("seed", SEEDS)
def test_candidates_of_many_pathways_are_at_least_256_with_the_named_masks(pathways, seed):
    rng = np.random.default_rng(seed)
    static = rng.random((1, pathways)) < 0.5
    found = candidate_masks(pathways, rng, static)
    rows = {*map(bytes, found)}
    assert len(rows) == len(found) >= 256
    assert {*map(bytes, np.concatenate([static, suffixes(pathways), np.eye(pathways, dtype=bool)]))} <= rows
    assert suffixes(pathways)[2].tolist() == [False] * (pathways - 2) + [True] * 2


@pytest.mark.parametrize("pathways", [12, 13, 24])
def test_masks_are_of_every_density(pathways):
    """Sizes are even as drawn; of few and of many pathways there are not as many masks."""
    masks = masks_of_every_density(pathways, 256, np.random.default_rng(0))
    assert len(np.unique(masks, axis=0)) == len(masks) == 256
    sizes = np.bincount(masks.sum(1), minlength=pathways + 1)
    even = np.minimum(256 / (pathways + 1), [math.comb(pathways, size) for size in range(pathways + 1)])
    assert (sizes >= 0.5 * even).all()


# The comparison.


@pytest.fixture(scope="module")
def compared(digits):
    """The whole comparison, from an empty cache, and everything that the live oracle was asked."""
    oracle = RecordingOracle(digits.oracle.live)
    fresh = replace(digits, oracle=CachedOracle(oracle, digits.oracle.query_of))
    return compare(fresh, alternating, 0.1, seed=0), oracle


def alternating(users):
    return np.arange(len(users))[:, None] % 2 == np.arange(5)[None] % 2


def test_no_user_is_adapted_twice_under_a_mask_in_a_whole_comparison(compared):
    _, oracle = compared
    pairs = [(user, plan) for user, plan, roles in oracle.asked if {*roles} <= {"validation", "query"}]
    assert len(pairs) == len({*pairs})


def test_test_users_are_searched_but_nothing_is_chosen_on_their_query_examples(digits, compared):
    found, _ = compared
    for name in ("validation_search", "best_static", "all_on"):
        again = digits.oracle.evaluate(digits.users("test"), found[name].masks, "query")
        np.testing.assert_allclose(found[name].accuracy, again.accuracy, atol=1e-6)


def test_every_method_is_reported_with_the_labels_it_used(compared):
    found, _ = compared
    assert {*found} >= {*METHODS}
    labels = {name: result.labels_used for name, result in found.items()}
    assert labels["all_off"] == 0
    assert labels["ppo"] == labels["best_static"] == labels["all_on"] == labels["support_search"] == 20
    assert labels["validation_search"] == labels["all_on_all_labels"] == labels["ppo_all_labels"] == 60


def test_all_on_and_all_off_are_what_they_are_called(compared):
    found, _ = compared
    assert found["all_on"].masks.all()
    assert found["all_on"].cost == pytest.approx(1)
    assert not found["all_off"].masks.any()
    assert found["all_off"].cost == pytest.approx(0)


def test_the_policys_masks_are_measured_and_dealt_to_others(compared):
    found, _ = compared
    np.testing.assert_array_equal(found["ppo"].masks, alternating(np.arange(4)))
    np.testing.assert_array_equal(found["ppo_all_labels"].masks, found["ppo"].masks)
    assert sorted(map(bytes, found["shuffled"].masks)) == sorted(map(bytes, found["ppo"].masks))
    assert found["shuffled"].active_fraction.mean() == pytest.approx(found["ppo"].active_fraction.mean())


def test_the_table_and_the_summary_show_the_same_numbers(digits, compared):
    found, _ = compared
    test = summarise(found, 0.1)
    text = table(test, 0.1)
    for name in METHODS:
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert f"{test['methods'][name]['reward']:.3f}" in row
        reward = found[name].accuracy.mean() - 0.1 * found[name].cost.mean()
        assert test["methods"][name]["reward"] == pytest.approx(reward)
    numbers = [int(line.split("|")[2]) for line in group_table(digits, found).splitlines()[2:]]
    assert sum(numbers) == 4


def test_of_one_user_alone_nothing_is_concluded(compared):
    arrays = ("accuracy", "cost", "active_fraction", "masks")
    one = {
        name: replace(result, **{field: getattr(result, field)[:1] for field in arrays})
        for name, result in compared[0].items()
        if name != "shuffled"
    }
    test = summarise(one, 0.1)
    assert test["ppo_minus_best_static"]["ci95"] is None and test["gap_closed"] is None
    text = table(test, 0.1)
    assert "no interval: one user says nothing of others" in text
    assert "gap closed: not defined, one user says nothing of others" in text

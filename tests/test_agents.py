"""Rivals, the bootstrap, gating policies and their files."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from agents import train_ppo
from agents.bootstrap import gap_closed, paired_difference
from agents.callbacks import BestOnVal
from agents.checkpoint import choose_masks, choose_plans, load_policy, save_policy
from agents.comparison import METHODS, compare, group_table, summarise, table
from agents.evaluate import evaluate_run
from agents.policies import POLICIES
from agents.rivals import best_static, candidate_masks, random_masks, searched, shuffled_masks, thresholded
from backbones.artefacts import ArtefactError
from backbones.costs import CostModel
from envs.core import PathwaySelection
from envs.cost_weights import CostWeight
from envs.modelled import modelled_scenario
from envs.oracles import CachedOracle, FormulaOracle, LiveOracle, Oracle, all_masks
from envs.planted import planted
from envs.rules import Rules
from envs.sb3 import PathwaySelectionVecEnv
from meta.inner import MetaInit
from users.batch import Prepared

SEEDS = range(5)


class RecordingOracle(Oracle):
    """Notes every user, plan and role that is asked for."""

    def __init__(self, inner):
        self.inner, self.costs, self.asked = inner, inner.costs, []

    def measure(self, users, plans, roles):
        for user, plan in zip(users.tolist(), plans, strict=True):
            self.asked.append((user, plan.tobytes(), roles))
        return self.inner.measure(users, plans, roles)

    def users(self, *roles):
        return {user for user, _, asked in self.asked if asked == roles}


@pytest.fixture(scope="module")
def digits(pathways, population):
    """The digits with five pathways and a start that nobody meta-trained."""
    rates = torch.full((2, pathways.num_pathways), 0.1)
    init = MetaInit(pathways.start(0), rates, torch.ones(pathways.num_pathways, dtype=torch.bool))
    return modelled_scenario("digits", LiveOracle(Prepared(pathways, population), init), "toy", None, {})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run's folder."""
    folder = tmp_path_factory.mktemp("runs") / "planted"
    train_ppo.main(f"--env dsa/Planted-v0 -n 512 --no-progress --num-threads 1 -f {folder}".split())
    return folder


def constant(pathways=8, accuracy=0.5):
    """A problem in which every mask is right for everybody."""
    oracle = FormulaOracle(planted().oracle.costs.own[:pathways], lambda users, masks: np.full(len(users), accuracy))
    return replace(planted(), oracle=oracle)


def with_accuracy(scenario, accuracy):
    return replace(scenario, oracle=FormulaOracle(scenario.oracle.costs, accuracy))


def widened(pathways):
    """The planted users with another number of pathways."""
    scenario = planted()
    columns = np.arange(pathways) % 8
    return replace(
        scenario,
        pathways=tuple(f"pathway{p}" for p in range(pathways)),
        statistics=scenario.statistics[:, columns],
        oracle=FormulaOracle(np.full(pathways, 1 / pathways), lambda users, masks: masks.mean(1)),
        scores={name: score[:, columns] for name, score in scenario.scores.items()},
    )


def small_ppo(scenario, policy="GatingPolicy", seed=0):
    env = PathwaySelectionVecEnv(scenario, num_envs=4)
    return PPO(POLICIES[policy], env, n_steps=8, batch_size=16, n_epochs=1, seed=seed, device="cpu")


def meta_of(scenario, policy="GatingPolicy"):
    known = {"policy": policy, "policy_kwargs": {}, "pathways": list(scenario.pathways), "scenario": scenario.fingerprint}
    return known | {"rules": Rules().to_json()}


def logits_of(policy, user, pathways):
    observation = {"user": torch.as_tensor(user), "pathways": torch.as_tensor(pathways)}
    with torch.no_grad():
        return policy.get_distribution(observation).distribution.logits


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
    named = (np.ones(pathways, dtype=bool), np.zeros(pathways, dtype=bool), static[0])
    assert {*map(bytes, named)} <= rows


def test_candidates_of_many_pathways_are_of_every_density():
    density = candidate_masks(24, np.random.default_rng(0)).mean(1)
    assert np.histogram(density, bins=5, range=(0, 1))[0].min() >= 20


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


# The bootstrap.


def test_the_interval_covers_a_known_difference_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        base = rng.normal(size=80)
        interval = paired_difference([base + 0.3 + rng.normal(0, 0.5, 80)], [base], resamples=300, seed=trial)
        covered += interval.low <= 0.3 <= interval.high
        assert interval.low < interval.mean < interval.high
    assert covered >= 51


def test_pairing_matters():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 200)
    better = base + 0.1 + rng.normal(0, 0.05, 200)
    assert paired_difference([better], [base]).low > 0
    assert paired_difference([better], [rng.permutation(base)]).low < 0


def test_the_mean_is_the_average_over_seeds_of_different_size():
    first, second = [np.full(10, 1.0), np.full(30, 2.0)], [np.zeros(10), np.zeros(30)]
    interval = paired_difference(first, second)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((1.5, 1.5, 1.5))


def test_more_users_give_a_narrower_interval():
    rng = np.random.default_rng(0)
    widths = []
    for users in (30, 3000):
        noise = rng.normal(size=users)
        interval = paired_difference([noise], [np.zeros(users)], resamples=500)
        widths.append(interval.high - interval.low)
    assert widths[1] < widths[0] / 5


def test_intervals_are_reproducible():
    values = np.random.default_rng(0).normal(size=50)
    assert paired_difference([values], [values**2]) == paired_difference([values], [values**2])


def test_different_users_per_method_are_refused():
    with pytest.raises(ValueError):
        paired_difference([np.zeros(5)], [np.zeros(4)])


def test_gap_closed_is_the_ratio_of_mean_gains():
    rng = np.random.default_rng(0)
    static = rng.normal(size=100)
    room = rng.uniform(0.5, 1.5, 100)
    gap = gap_closed([static + 0.4 * room], [static], [static + room])
    assert gap.value == pytest.approx(0.4)
    assert gap.ci95 == pytest.approx((0.4, 0.4))
    assert gap.reason is None


def test_gap_closed_has_an_interval_around_it():
    rng = np.random.default_rng(0)
    static, room = rng.normal(size=200), rng.uniform(0.5, 1.5, 200)
    gap = gap_closed([static + room * rng.uniform(0, 1, 200)], [static], [static + room])
    assert gap.ci95[0] < gap.value < gap.ci95[1]
    assert gap.ci95[1] - gap.ci95[0] < 0.2


def test_gap_closed_is_a_ratio_of_means_not_a_mean_of_ratios():
    static = np.zeros(100)
    search = np.tile([0.1, 1.9], 50)
    policy = np.tile([0.1, 0.0], 50)
    assert gap_closed([policy], [static], [search]).value == pytest.approx(0.05)


@pytest.mark.parametrize("shift", [0.0, 0.001, -0.5])
def test_gap_closed_is_undefined_where_the_search_is_not_clearly_above_static(shift):
    rng = np.random.default_rng(0)
    static = rng.normal(size=50)
    search = static + shift + rng.normal(0, 0.2, 50)
    gap = gap_closed([static], [static], search=[search])
    assert gap.value is None
    assert gap.ci95 is None
    assert "validation_search is not above best_static" in gap.reason


# Gating policies.


def test_the_gating_policy_has_the_same_parameters_for_any_number_of_pathways():
    shapes = []
    for pathways in (5, 9):
        state = small_ppo(widened(pathways)).policy.state_dict()
        shapes.append({name: tuple(tensor.shape) for name, tensor in state.items()})
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) > 0


def test_a_gating_policy_serves_another_number_of_pathways():
    few, many = small_ppo(widened(5)).policy, small_ppo(widened(12), seed=1).policy
    many.load_state_dict(few.state_dict())
    scenario = widened(12)
    assert choose_masks(many, scenario, scenario.users("test")).shape == (100, 12)


def test_permuting_pathways_permutes_the_logits():
    scenario = planted()
    policy = small_ppo(scenario).policy
    order = np.random.default_rng(0).permutation(8)
    users = scenario.users("test")[:20]
    user, pathways = scenario.embeddings[users], scenario.statistics[users]
    before, after = logits_of(policy, user, pathways), logits_of(policy, user, pathways[:, order])
    np.testing.assert_allclose(after, before[:, order], atol=1e-5)
    assert before.std() > 0
    assert (before[:, order] - before).abs().max() > 1e-4


def test_the_logits_depend_on_the_user_and_on_the_other_pathways():
    scenario = planted()
    policy = small_ppo(scenario).policy
    user, pathways = scenario.embeddings[:1], scenario.statistics[:1]
    before = logits_of(policy, user, pathways)
    assert (logits_of(policy, scenario.embeddings[1:2], pathways) != before).any()
    other = pathways.copy()
    other[:, 0] += 1
    assert (logits_of(policy, user, other)[:, 1:] != before[:, 1:]).any()


def test_a_new_policy_has_no_opinion():
    scenario = planted()
    chances = logits_of(small_ppo(scenario).policy, scenario.embeddings, scenario.statistics).sigmoid()
    np.testing.assert_allclose(chances, 0.5, atol=0.05)


@pytest.mark.parametrize("policy", ["GatingPolicy", "MultiInputPolicy"])
def test_a_policy_learns_without_complaint_and_chooses_masks(policy):
    scenario = planted()
    model = small_ppo(scenario, policy).learn(64)
    masks = choose_masks(model.policy, scenario, scenario.users("val"))
    assert masks.shape == (100, 8)
    assert masks.dtype == bool


@pytest.mark.parametrize("policy", ["GatingPolicy", "MultiInputPolicy"])
def test_a_saved_policy_chooses_the_same_masks_when_loaded(policy, tmp_path):
    scenario = planted()
    model = small_ppo(scenario, policy).learn(256)
    save_policy(tmp_path / "policy", model.policy, meta_of(scenario, policy))
    loaded, meta = load_policy(tmp_path / "policy", scenario)
    users = np.arange(400)
    mine = choose_masks(model.policy, scenario, users)
    np.testing.assert_array_equal(choose_masks(loaded, scenario, users), mine)
    assert len(np.unique(mine, axis=0)) > 1
    assert meta["pathways"] == list(scenario.pathways)
    for name, tensor in model.policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_policy_arguments_are_used_again_when_loaded(tmp_path):
    scenario = planted()
    env = PathwaySelectionVecEnv(scenario, num_envs=4)
    model = PPO(POLICIES["GatingPolicy"], env, n_steps=8, batch_size=16, policy_kwargs={"hidden": 17}, device="cpu")
    save_policy(tmp_path / "policy", model.policy, {**meta_of(scenario), "policy_kwargs": {"hidden": 17}})
    loaded, _ = load_policy(tmp_path / "policy", scenario)
    users = scenario.users("test")
    np.testing.assert_array_equal(choose_masks(loaded, scenario, users), choose_masks(model.policy, scenario, users))


def test_a_policy_of_other_pathways_is_refused(tmp_path):
    scenario = planted()
    save_policy(tmp_path / "policy", small_ppo(scenario).policy, meta_of(scenario))
    with pytest.raises(ArtefactError, match="trained on the pathways"):
        load_policy(tmp_path / "policy", widened(12))
    renamed = replace(scenario, pathways=tuple(f"layer{p}" for p in range(8)))
    with pytest.raises(ArtefactError, match="trained on the pathways"):
        load_policy(tmp_path / "policy", renamed)


def test_a_policy_of_other_observations_is_refused(tmp_path):
    scenario = planted()
    save_policy(tmp_path / "policy", small_ppo(scenario).policy, meta_of(scenario))
    wider = replace(scenario, embeddings=np.pad(scenario.embeddings, ((0, 0), (0, 3))))
    with pytest.raises(ArtefactError, match="does not fit this scenario's observations"):
        load_policy(tmp_path / "policy", wider)


def test_a_missing_policy_is_named(tmp_path):
    with pytest.raises(ArtefactError, match="no gating policy at"):
        load_policy(tmp_path / "policy", planted())


def test_a_checkpoint_is_not_taken_for_a_policy(run):
    with pytest.raises(ArtefactError, match="not a gating policy"):
        load_policy(run / "checkpoint", planted())


# Files of a run.


def test_a_run_holds_no_file_that_would_be_unpickled(run):
    files = [path for path in run.rglob("*") if path.is_file()]
    others = [p.name for p in files if p.suffix not in {".json", ".safetensors", ".csv", ".md"}]
    assert len(others) == 1
    assert others[0].startswith("events.out.tfevents")
    for path in files:
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, KeyError, IndexError, AttributeError)):
            pickle.loads(path.read_bytes())


def test_evaluating_a_run_unpickles_nothing(run, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(np, "load", refuse)
    assert evaluate_run(run)["env"] == "dsa/Planted-v0"


def test_a_run_is_evaluated_to_the_same_summary_again(run, capsys):
    first, second = evaluate_run(run), evaluate_run(run)
    assert first["test"] == second["test"]
    assert "| ppo |" in capsys.readouterr().out


def test_the_core_that_a_policy_is_built_for_matches_the_environment():
    scenario = planted()
    space = PathwaySelection(scenario, "train", 0.0, 1, 1).observation_space
    assert space == PathwaySelectionVecEnv(scenario, num_envs=1).observation_space


# Departing from a mask.


START = [1.5, -1.5, -1.5, 1.5, 1.5, -1.5, 1.5, -1.5]


def departing(scenario, **kwargs):
    env = PathwaySelectionVecEnv(scenario, num_envs=4)
    return PPO(
        POLICIES["GatingPolicy"],
        env,
        n_steps=8,
        batch_size=16,
        n_epochs=2,
        seed=0,
        device="cpu",
        policy_kwargs={"start": START, **kwargs},
    )


def test_a_policy_with_a_start_begins_with_that_mask_for_everybody():
    scenario = planted()
    policy = departing(scenario).policy
    masks = choose_masks(policy, scenario, np.arange(400))
    assert np.array_equal(masks, np.repeat([[logit > 0 for logit in START]], 400, axis=0))
    logits = logits_of(policy, scenario.embeddings[:50], scenario.statistics[:50])
    assert (logits - torch.tensor(START)).abs().max() < 0.5


def started(rows, at):
    env = PathwaySelectionVecEnv(planted(), num_envs=4, cost_weight="uniform:0:0.3")
    return PPO(POLICIES["GatingPolicy"], env, n_steps=8, batch_size=16, policy_kwargs={"start": rows, "start_at": at}).policy


def test_a_start_per_cost_weight_is_that_of_the_weight_and_between_them_a_mixture():
    scenario, users = planted(), np.arange(20)
    first, second = START, [-logit for logit in START]
    policy, rules = started([first, second], [0.1, 0.2]), Rules(cost_weight="uniform:0:0.3")
    for weight, row in ((0.0, first), (0.1, first), (0.14, first), (0.16, second), (0.2, second), (0.3, second)):
        plans = choose_plans(policy, scenario, users, rules, weight)
        assert (plans[:, -1] == (np.array(row) > 0)).all(), weight
    middle = policy.mlp_extractor.departure(torch.tensor([0.15, 0.125]))
    assert torch.allclose(middle, torch.stack([torch.zeros(8), torch.tensor(START) / 2]), atol=1e-6)


@pytest.mark.parametrize("at", [[0.1], [0.2, 0.1], [0.1, 0.1], [0.0, 0.1, 0.2]])
def test_starts_without_a_rising_cost_weight_each_are_refused(at):
    with pytest.raises(ValueError, match="one rising cost weight for each row"):
        started([START, START], at)


def test_starts_per_cost_weight_need_to_see_it():
    with pytest.raises(ValueError, match="observations show none"):
        departing(planted(), start=[START, START], start_at=[0.1, 0.2])


def test_the_start_is_learned_along():
    model = departing(planted())
    optimised = {id(p) for group in model.policy.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.policy.parameters()} == optimised
    model.learn(64)
    assert (model.policy.mlp_extractor.departure.start.detach() - torch.tensor(START)).abs().max() > 1e-4


def test_a_policy_with_a_start_chooses_the_same_masks_when_loaded(tmp_path):
    scenario = planted()
    policy = departing(scenario).learn(64).policy
    save_policy(tmp_path / "policy", policy, meta_of(scenario) | {"policy_kwargs": {"start": START}})
    loaded, _ = load_policy(tmp_path / "policy", scenario)
    first, second = (logits_of(p, scenario.embeddings, scenario.statistics) for p in (policy, loaded))
    assert torch.equal(first, second)
    with pytest.raises(ArtefactError, match="does not fit"):
        save_policy(tmp_path / "other", policy, meta_of(scenario))
        load_policy(tmp_path / "other", scenario)


def judge(margin, best):
    """What keeps the best policy, by its reward of every val user."""
    core = PathwaySelection(planted(), "train", 0.1, 1, 1)
    found = BestOnVal(None, 0.0, core.scenario, core, Rules(), 1, None, {}, margin)
    found.best = best
    return found


def test_the_first_policy_is_kept_whatever_it_is_worth():
    for margin in (0.0, 1.0):
        assert judge(margin, None)._is_better(np.array([-1.0, -2.0]), 0.0)


@pytest.mark.parametrize(("factor", "kept"), [(0.9, False), (0.999, False), (1.001, True)])
def test_a_margin_keeps_what_is_better_by_more_than_so_many_standard_errors_of_the_difference(factor, kept):
    best = np.array([0.1, 0.9, 0.4, 0.6])
    spread = np.array([-1.0, 1.0, -1.0, 1.0]) * 0.2
    for margin in (1.0, 2.0):
        gain = spread + factor * margin * 0.2 / 2  # the standard error of four such differences is a tenth
        assert judge(margin, best)._is_better(best + gain, 0.0) == kept
    assert judge(0.0, best)._is_better(best + spread + 0.001, 0.0)
    assert not judge(0.0, best)._is_better(best + spread - 0.001, 0.0)


def test_equally_good_is_not_better():
    rewards = np.array([0.3, 0.8])
    for margin in (0.0, 1.0):
        assert not judge(margin, rewards)._is_better(rewards.copy(), 0.0)


def test_the_margin_is_measured_on_the_same_users():
    best = np.linspace(0, 1, 50)  # users differ much more than policies do
    assert judge(1.0, best)._is_better(best + 0.01, 0.0)
    assert not judge(1.0, best)._is_better(best[::-1] + 0.01, 0.0)


def test_what_was_best_survives_a_checkpoint():
    first, second = judge(1.0, np.array([0.25, 0.1 + 0.2])), judge(1.0, None)
    first.next_at, first.averaged_at, first.best_distance, first.history = 7, 5, 0.1, [(0, 0.5), (4, 1 / 3)]
    first.core.cost_weight = CostWeight(0.3, 0.3)
    second.restore(json.loads(json.dumps(first.state())))
    assert np.array_equal(second.best, first.best)
    assert (second.next_at, second.averaged_at, second.best_distance, second.history) == (7, 5, 0.1, first.history)
    assert second.core.cost_weight == first.core.cost_weight
    assert second.state() == first.state()
    empty = judge(1.0, np.ones(2))
    empty.restore(judge(1.0, None).state())
    assert empty.best is None


def test_gap_closed_of_few_users_has_an_interval_that_is_a_number():
    zero, policy, search = (np.array(values) for values in ([0.0] * 4, [0.0, 0.05, 0.1, 0.1], [0.0, 0.2, 0.2, 0.2]))
    found = gap_closed([policy], [zero], [search])
    assert found.ci95 is None or np.isfinite(found.ci95).all()

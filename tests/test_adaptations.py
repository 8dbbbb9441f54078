"""Searches per new user on problems whose best masks are known, and the command for all budgets on the planted one."""

import dataclasses

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF

from envs.oracles import FormulaOracle, all_masks
from envs.planted import planted
from eval import adaptations, budget_report, budgets
from eval.adaptations import needed, paid_back, query_rewards, spending
from eval.mask_searches import (
    Posterior,
    Prior,
    bayesian_optimisation,
    candidates_of,
    expected_improvement,
    greedy_forward,
    random_search,
)

PRIOR = Prior(mean=0.0, deviation=0.3, length=1.5, noise=0.1)
USERS = np.arange(6)
SEARCHES = {
    "random": lambda ask, budget, rng: random_search(USERS, candidates_of(4, rng), ask, budget, rng),
    "greedy": lambda ask, budget, rng: greedy_forward(USERS, 4, ask, budget, rng),
    "bayesian": lambda ask, budget, rng: bayesian_optimisation(USERS, candidates_of(4, rng), ask, budget, PRIOR),
}


class Table:
    """Rewards of all 16 masks for 6 users; remembers what was asked, per user in order."""

    def __init__(self, rewards):
        self.rewards, self.asked = rewards, {user: [] for user in USERS}

    def __call__(self, users, masks):
        places = masks @ (1 << np.arange(4))
        for user, place in zip(users, places, strict=True):
            self.asked[user].append(int(place))
        return self.rewards[users, places]


def additive(rng):
    """A gain or loss per pathway and user: greedy steps lead to the best mask."""
    return (rng.normal(size=(6, 4)) @ all_masks(4).T) + 0.5


@pytest.mark.parametrize("name", SEARCHES)
def test_with_a_budget_of_everything_the_best_mask_is_found(name):
    table = Table(additive(np.random.default_rng(0)))
    found = SEARCHES[name](table, 15, np.random.default_rng(1))
    np.testing.assert_array_equal(found[-1], all_masks(4)[table.rewards.argmax(1)])


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("budget", [1, 3, 7, 40])
def test_no_search_asks_more_than_its_budget_or_the_same_twice_and_all_off_is_free(name, budget):
    table = Table(np.random.default_rng(2).random((6, 16)))
    found = SEARCHES[name](table, budget, np.random.default_rng(3))
    assert found.shape == (budget + 1, 6, 4)
    for asked in table.asked.values():
        assert asked[0] == 0 and len(asked) == len(set(asked)) <= budget + 1
    if budget <= 3:
        assert all(len(asked) == budget + 1 for asked in table.asked.values())


@pytest.mark.parametrize("name", SEARCHES)
def test_the_incumbent_after_n_adaptations_is_the_best_of_all_off_and_the_first_n(name):
    table = Table(np.random.default_rng(4).random((6, 16)))
    found = SEARCHES[name](table, 12, np.random.default_rng(5))
    for user, asked in table.asked.items():
        for count in range(13):
            best = max(asked[: count + 1], key=lambda place: table.rewards[user, place])
            np.testing.assert_array_equal(found[count, user], all_masks(4)[best])


def test_greedy_tries_every_pathway_more_keeps_the_best_and_stops_when_none_is_better():
    rewards = np.zeros((6, 16))
    rewards[:, [0, 1, 2, 4, 8]] = 0.0, 0.2, 0.3, 0.1, 0.1  # pathway 1 first ...
    rewards[:, [3, 6, 10]] = 0.5, 0.2, 0.2  # ... then pathway 0, and no third
    rewards[:, 12] = 0.9  # out of a greedy step's reach
    table = Table(rewards)
    found = greedy_forward(USERS, 4, table, 30, np.random.default_rng(0))
    for asked in table.asked.values():
        assert set(asked[1:5]) == {1, 2, 4, 8} and set(asked[5:8]) == {3, 6, 10} and set(asked[8:]) == {7, 11}
    np.testing.assert_array_equal(found[-1], np.tile(all_masks(4)[3], (6, 1)))
    assert len({tuple(asked) for asked in table.asked.values()}) > 1


def test_random_orders_are_each_users_own():
    table = Table(np.zeros((6, 16)))
    random_search(USERS, candidates_of(4, np.random.default_rng(0)), table, 15, np.random.default_rng(0))
    assert len({tuple(asked) for asked in table.asked.values()}) == 6
    assert all(sorted(asked) == list(range(16)) for asked in table.asked.values())


def test_bayesian_optimisation_needs_fewer_adaptations_than_random_search_where_masks_resemble_each_other():
    scenario = planted()
    users, rng = scenario.users("test"), np.random.default_rng(0)
    ask, candidates = adaptations.asking(scenario, 0.1), candidates_of(8, rng)
    prior = adaptations.fitted_prior(scenario, candidates, 0.1, 16, seed=0)
    guided = query_rewards(scenario, users, bayesian_optimisation(users, candidates, ask, 16, prior), 0.1).mean(1)
    blind = query_rewards(scenario, users, random_search(users, candidates, ask, 16, rng), 0.1).mean(1)
    assert guided[8] > blind[16] + 0.05


def test_the_posterior_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    masks, prior = all_masks(5), dataclasses.replace(PRIOR, length=1.3, noise=0.2)
    tried, values = np.stack([rng.permutation(32)[:9] for _ in range(3)]), rng.normal(size=(3, 9))
    process = Posterior(prior.kernel(masks), prior.noise, users=3, budget=8)
    for place, value in zip(tried.T, values.T, strict=True):
        process.observe(place, value)
    for user in range(3):
        reference = GaussianProcessRegressor(RBF(1.3), alpha=0.2**2, optimizer=None)
        reference.fit(masks[tried[user]].astype(float), values[user])
        mean, deviation = reference.predict(masks.astype(float), return_std=True)
        np.testing.assert_allclose(process.mean[user], mean, atol=1e-9)
        np.testing.assert_allclose(process.variance[user], deviation**2, atol=1e-9)


def test_expected_improvement_is_the_mean_of_what_a_draw_is_above_the_best():
    draws = 0.3 + 0.5 * np.random.default_rng(0).normal(size=400_000)
    found = expected_improvement(np.array([[0.3]]), np.array([[0.25]]), np.array([0.6]))
    assert found[0, 0] == pytest.approx(np.maximum(draws - 0.6, 0).mean(), rel=0.01)


def test_candidates_are_every_mask_but_all_off_or_a_sample_with_all_on():
    rng = np.random.default_rng(0)
    assert len(np.unique(candidates_of(10, rng), axis=0)) == 1023
    many = candidates_of(14, rng)
    assert 400 < len(many) <= 513 and len(np.unique(many, axis=0)) == len(many)
    assert many.any(1).all() and many.all(1).any()


class TwoFaced(FormulaOracle):
    """On validation examples pathway 0 is everything, on query examples it is worth nothing; remembers who was asked what."""

    def __init__(self):
        super().__init__(np.full(8, 1 / 8), lambda users, masks: masks[:, 0].astype(float))
        self.asked = set()

    def measure(self, users, plans, roles):
        self.asked |= {(int(user), role, plan.tobytes()) for user, plan in zip(users, plans, strict=True) for role in roles}
        return super().measure(users, plans, roles) if roles == ("validation",) else np.zeros((len(users), 1, 2))


def test_incumbents_are_chosen_by_validation_and_reported_by_query_rewards():
    scenario = dataclasses.replace(planted(users=40), oracle=TwoFaced())
    users = scenario.users("test")
    found = spending(scenario, lambda users: np.zeros((len(users), 8), dtype=bool), 0.1, seed=0, budget=8)
    assert (found.policy == 0).all()
    for curve in found.searches.values():
        assert curve.shape == (9, len(users)) and (curve[0] == 0).all()
    # within one round greedy has met pathway 0 and believes in it; it is paid for on query examples
    np.testing.assert_allclose(found.searches["greedy forward selection"][8], -0.1 / 8)


def test_the_policy_needs_no_validation_label_of_test_users_and_nobody_more_than_its_budget():
    oracle = TwoFaced()
    scenario = dataclasses.replace(planted(users=40), oracle=oracle)
    adaptations.spending(scenario, lambda users: np.ones((len(users), 8), dtype=bool), 0.1, seed=0, budget=1)
    for user in scenario.users("test"):
        tried = {plan for who, role, plan in oracle.asked if who == user and role == "validation"}
        assert len(tried) <= 1 + adaptations.ORDERS + 2  # all_off, and one per random order and other search
    assert not {(who, role) for who, role, _ in oracle.asked if who in scenario.users("train")}


def test_needed_is_the_first_count_that_reaches_the_goal():
    curve = np.array([0.5, 0.6, 0.7, 0.65, 0.8])
    assert needed(curve, 0.7) == 2 and needed(curve, 0.4) == 0 and needed(curve, 0.81) is None


def test_training_is_paid_back_by_what_every_user_saves():
    assert "needs 12 adaptations per user: 6,000 users" in paid_back(60_000, 12)
    assert "6,001 users" in paid_back(60_001, 12)
    assert "never pays" in paid_back(60_000, 2) and "never pays" in paid_back(60_000, 0)
    assert "no search reaches its reward by 128" in paid_back(126_000, None) and "1,000 users" in paid_back(126_000, None)


FAST = ["--num-threads", "1", "-P", "n_envs:16", "-P", "batch_size:128", "-n", "128"]


@pytest.fixture(scope="module")
def page_and_runs(tmp_path_factory):
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    folder = tmp_path_factory.mktemp("budgets")
    page = folder / "page.md"
    page.write_text(f"before\n{budgets.BEGIN}\nold\n{budgets.END}\nafter\n")
    flags = ["--env", "dsa/Planted-v0", "--seeds", "1", "--runs", str(folder / "runs"), *FAST]
    budgets.main([*flags, "--write", str(page), "--figure", str(folder / "fronts.png")])
    return page, folder / "runs"


def test_the_page_gets_every_table_and_names_the_command_without_folders(page_and_runs):
    page, runs = page_and_runs
    text = page.read_text()
    assert text.startswith(f"before\n{budgets.BEGIN}\n") and text.endswith(f"{budgets.END}\nafter\n") and "old" not in text
    assert "python -m eval.budgets --env dsa/Planted-v0 --seeds 1" in text and str(runs) not in text
    for row in (*budget_report.SHOWN.values(), "Bayesian optimisation", "static masks of every price and size", "pooled"):
        assert f"\n| {row} |" in text
    assert "simultaneous 95 % band" in text and "adaptations to train" in text
    assert all(len({line.count("|") for line in block.splitlines()}) == 1 for block in text.split("\n\n") if block[0] == "|")


def test_both_pictures_are_drawn(page_and_runs):
    for name in ("fronts.png", "fronts-adaptations.png"):
        assert (page_and_runs[0].parent / name).read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_not_repeated(page_and_runs, monkeypatch):
    monkeypatch.setattr("eval.headline.train_ppo", lambda arguments: pytest.fail("trained again"))
    found = budgets.measure_seed(page_and_runs[1], "dsa/Planted-v0", 0, FAST)
    reward = found.found[0.1]["ppo"].reward(0.1).mean()
    assert found.spent.policy.mean() == pytest.approx(reward)
    assert found.points["one policy"][3, :, 1].mean() - 0.1 * found.points["one policy"][3, :, 0].mean() == pytest.approx(
        reward
    )
    assert found.training == 128 + 2 * 100 * 3 + 200 + 100  # steps, two looks at 100 val users at three weights, statistics


def test_of_real_people_everybody_counts_once_however_often_they_are_measured(page_and_runs):
    one = budgets.measure_seed(page_and_runs[1], "dsa/Planted-v0", 0, FAST)
    assert budget_report.by_person([one, one]) == [one, one]  # simulated: others in every seed
    names = tuple(f"person {number:03d}" for number in range(len(one.spent.policy)))
    (twice,) = budget_report.by_person([dataclasses.replace(one, people=names), dataclasses.replace(one, people=names)])
    apart = dataclasses.replace(one, people=tuple(f"{name}, another" for name in names))
    (both,) = budget_report.by_person([dataclasses.replace(one, people=names), apart])
    for found, times in ((twice, 1), (both, 2)):
        assert len(found.people) == found.points["random"].shape[1] == times * len(names)
        assert found.spent.policy.mean() == pytest.approx(one.spent.policy.mean())
        np.testing.assert_allclose(found.static.mean(1), one.static.mean(1))
        np.testing.assert_allclose(found.found[0.1]["ppo"].reward(0.1).mean(), one.found[0.1]["ppo"].reward(0.1).mean())
    assert "real people, averaged over seeds" in budget_report.report([twice], budgets.band_of([twice]), 2, "command")


def test_the_one_policy_chooses_at_every_weight_and_separate_ones_at_their_own(page_and_runs):
    runs, users = page_and_runs[1], np.arange(5)
    one, single = budgets.chooser(runs / "seed0-conditioned"), budgets.chooser(runs / "seed0-cost0.1")
    assert one(users, 0.0).shape == one(users, 0.3).shape == single(users, 0.1).shape == (5, 8)
    with pytest.raises(ValueError, match=r"trained for cost weight 0\.1, not 0\.2"):
        single(users, 0.2)
    with pytest.raises(ValueError, match=r"trained for cost weight uniform:0:0\.3, not 0\.4"):
        one(users, 0.4)


def test_what_went_wrong_is_said_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="error: unknown environment"):
        budgets.main(["--env", "dsa/Nothing-v0", "--runs", str(tmp_path)])

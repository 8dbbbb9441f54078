"""Fronts, hypervolume and the band against numbers worked by hand, and static masks that never see test users."""

import dataclasses

import numpy as np
import pytest

from envs.oracles import FormulaOracle, all_masks
from envs.planted import planted
from eval import fronts
from eval.pareto import concave_front, hypervolume, interpolated, mean_points, pareto_front, simultaneous_band
from eval.statistics import bootstrap_p, holm
from eval.tradeoff import RESAMPLES, _leads

POINTS = np.array([[0.5, 0.7], [0.0, 0.5], [0.5, 0.6], [0.2, 0.55], [1.0, 0.85], [1.0, 0.85], [0.7, 0.65]])


def test_the_front_holds_what_nothing_is_both_cheaper_and_better_than_once():
    np.testing.assert_array_equal(pareto_front(POINTS), [[0, 0.5], [0.2, 0.55], [0.5, 0.7], [1, 0.85]])


def test_of_equally_accurate_points_the_cheapest_stays():
    np.testing.assert_array_equal(pareto_front(np.array([[0.4, 0.5], [0.1, 0.5]])), [[0.1, 0.5]])


def test_the_concave_front_leaves_out_what_a_mixture_of_others_beats():
    # from (0, .5) to (.5, .7) the line is at .58 where the front has .55
    np.testing.assert_array_equal(concave_front(POINTS), [[0, 0.5], [0.5, 0.7], [1, 0.85]])


def test_interpolation_is_the_line_between_corners_and_flat_beyond_the_dearest():
    points = np.array([[0.0, 0.5], [0.2, 0.55], [0.5, 0.7]])
    np.testing.assert_allclose(interpolated(points, np.array([0.0, 0.2, 0.25, 0.5, 0.9])), [0.5, 0.58, 0.6, 0.7, 0.7])


def test_below_the_cheapest_point_there_is_nothing():
    with pytest.raises(ValueError, match=r"no point is as cheap as 0\.1, the cheapest costs 0\.2"):
        interpolated(np.array([[0.2, 0.6]]), np.array([0.1]))


def test_many_leads_at_once_are_each_how_far_the_front_is_below_the_subject():
    rng = np.random.default_rng(0)
    means = np.round(rng.random((500, 8, 2)), 1)  # so coarse that costs and accuracies are often equal
    means[:, 1, 0] = 0.0  # base
    by_hand = [one[0, 1] - interpolated(one[1:], one[:1, 0])[0] for one in means]
    np.testing.assert_allclose(_leads(means.reshape(500, -1)), by_hand, atol=1e-12)


def test_p_values_of_a_bootstrap_are_small_enough_for_many_rivals():
    p_value = bootstrap_p(np.ones(RESAMPLES), [np.zeros(60)])
    assert holm([p_value] * 100)[0] < 0.05


def test_hypervolume_of_two_steps():
    # (.2, .6) rules from .2 to .5, (.5, .8) from there to 1.05; reference accuracy .5
    points = np.array([[0.2, 0.6], [0.5, 0.8], [0.6, 0.7]])
    assert hypervolume(points, (1.05, 0.5)) == pytest.approx(0.3 * 0.1 + 0.55 * 0.3)


@pytest.mark.parametrize("worthless", [[0.3, 0.5], [0.3, 0.2], [1.05, 0.9], [1.2, 0.99]])
def test_points_no_better_than_the_reference_add_no_volume(worthless):
    assert hypervolume(np.array([worthless]), (1.05, 0.5)) == 0
    assert hypervolume(np.array([worthless, [0.5, 0.6]]), (1.05, 0.5)) == pytest.approx(0.55 * 0.1)


def test_means_are_over_users_then_seeds():
    few, many = np.full((1, 1, 2), 1.0), np.zeros((1, 9, 2))
    np.testing.assert_array_equal(mean_points([few, many]), [[0.5, 0.5]])


def noisy_points(rng, shift=0.0, users=80):
    """Three points of users who differ by .1; accuracy rises from .6 by .2 over the costs."""
    costs = np.broadcast_to(np.array([[0.1], [0.5], [0.9]]), (3, users))
    accuracy = 0.58 + 0.25 * costs + shift + 0.1 * rng.normal(size=(1, users)) + 0.02 * rng.normal(size=(3, users))
    return np.stack([costs + 0.02 * rng.normal(size=(3, users)), accuracy], -1)


def static_points(rng, like):
    """The same users under three static masks on the same line, the cheapest below all of the policy's."""
    users = like.shape[1]
    own = like[..., 1].mean(0) - (0.58 + 0.25 * like[..., 0].mean(0))
    costs = np.broadcast_to(np.array([[0.0], [0.5], [1.0]]), (3, users))
    return np.stack([costs, 0.58 + 0.25 * costs + own + 0.02 * rng.normal(size=(3, users))], -1)


def test_the_band_of_a_method_and_itself_is_zero_wide():
    points = noisy_points(np.random.default_rng(0))
    band = simultaneous_band([points], [points], resamples=100)
    np.testing.assert_allclose([band.low, band.difference, band.high], 0, atol=1e-12)
    assert len(band.costs) == 20 and not band.above


def test_the_band_covers_zero_as_often_as_it_says_where_two_methods_are_alike():
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        policy = [noisy_points(rng) for _ in range(2)]
        static = [static_points(rng, points) for points in policy]
        band = simultaneous_band(policy, static, resamples=200, seed=seed)
        covered += bool(((band.low <= 0) & (band.high >= 0)).all())
    assert covered >= 88, covered


def test_the_band_sees_a_shift_of_the_whole_front_and_its_sign():
    rng = np.random.default_rng(1)
    policy = [noisy_points(rng) for _ in range(2)]
    static = [static_points(rng, points) for points in policy]
    better = [points + np.array([0, 0.02]) for points in policy]
    band = simultaneous_band(better, static, resamples=500)
    assert band.above and band.difference == pytest.approx(0.02, abs=0.01)
    assert simultaneous_band(better, static, resamples=500, seed=1).above
    worse = simultaneous_band([points - np.array([0, 0.02]) for points in policy], static, resamples=500)
    assert not worse.above and (worse.high < 0).all()


def test_the_band_is_wider_than_the_interval_at_one_place():
    rng = np.random.default_rng(2)
    policy = [noisy_points(rng)]
    static = [static_points(rng, policy[0])]
    many = simultaneous_band(policy, static, resamples=1000)
    one = simultaneous_band(policy, static, places=1, resamples=1000)  # the cheapest alone
    assert many.high[0] - many.low[0] > 1.1 * (one.high[0] - one.low[0])


def test_users_stay_paired_in_the_band():
    rng = np.random.default_rng(3)
    policy = noisy_points(rng)
    static = static_points(rng, policy)
    paired = simultaneous_band([policy], [static], resamples=300)
    dealt = simultaneous_band([policy], [static[:, rng.permutation(static.shape[1])]], resamples=300)
    assert np.ptp([paired.low[9], paired.high[9]]) < 0.5 * np.ptp([dealt.low[9], dealt.high[9]])


class Watched(FormulaOracle):
    """Remembers whom it was asked about and what."""

    def __init__(self, costs, accuracy):
        super().__init__(costs, accuracy)
        self.asked = set()

    def measure(self, users, plans, roles):
        self.asked |= {(int(user), role) for user in users for role in roles}
        return super().measure(users, plans, roles)


@pytest.fixture
def watched():
    """A planted scenario in which pathway p brings everybody .3 / (p + 1)."""
    scenario = planted(users=40)
    worth = 0.3 / (1 + np.arange(8))
    return dataclasses.replace(scenario, oracle=Watched(np.full(8, 1 / 8), lambda users, masks: 0.1 + masks @ worth))


def test_static_masks_are_the_best_of_every_price_and_size_by_train_users_alone(watched):
    masks = fronts.static_masks(watched, seed=0)
    assert masks.shape == (len(fronts.FINE_WEIGHTS) + 9, 8)
    for weight, mask in zip(fronts.FINE_WEIGHTS, masks, strict=False):
        worth = 0.3 / (1 + np.arange(8)) - weight / 8
        np.testing.assert_array_equal(mask[np.abs(worth) > 1e-9], (worth > 0)[np.abs(worth) > 1e-9])
    np.testing.assert_array_equal(masks[-9:], np.tri(9, 8, -1))
    assert watched.oracle.asked == {(user, "validation") for user in watched.users("train")}


def test_measured_points_are_cost_and_query_accuracy_per_user(watched):
    users = watched.users("test")
    points = fronts.measured(watched, users, fronts.for_everybody(all_masks(8)[[0, 255]], users))
    assert points.shape == (2, len(users), 2)
    np.testing.assert_allclose(points[0], np.tile([0, 0.1], (len(users), 1)))
    np.testing.assert_allclose(points[1, :, 0], 1)
    assert watched.oracle.asked == {(user, "query") for user in users}


def test_random_points_run_from_all_off_to_all_on(watched):
    users = watched.users("test")
    points = fronts.random_points(watched, users, seed=0)
    np.testing.assert_allclose(points[0], np.tile([0, 0.1], (len(users), 1)))
    np.testing.assert_allclose(points[-1, :, 0], 1)
    np.testing.assert_allclose(points.mean(1)[:, 0], fronts.PROBABILITIES, atol=0.08)

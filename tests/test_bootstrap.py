"""The bootstrap: intervals of paired differences, and the share of a gap that is closed."""

import numpy as np
import pytest

from agents.bootstrap import gap_closed, mean_interval, paired_difference


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


def test_the_same_people_in_every_seed_count_once():
    values = np.random.default_rng(0).normal(size=40)
    names, zeros = [str(n) for n in range(40)], np.zeros(40)
    often = paired_difference([values] * 4, [zeros] * 4, people=[names] * 4)
    assert often == mean_interval([values[np.argsort(names)]])
    redrawn = paired_difference([values] * 4, [zeros] * 4)
    assert redrawn.high - redrawn.low < 0.7 * (often.high - often.low)
    turned = paired_difference([values, values[::-1]], [zeros] * 2, people=[names, names[::-1]])
    assert turned == often  # by name, not by place
    with pytest.raises(ValueError):
        paired_difference([values], [zeros], people=[names[:-1]])


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


def test_gap_closed_of_few_users_has_an_interval_that_is_a_number():
    zero, policy, search = (np.array(values) for values in ([0.0] * 4, [0.0, 0.05, 0.1, 0.1], [0.0, 0.2, 0.2, 0.2]))
    found = gap_closed([policy], [zero], [search])
    assert found.value == pytest.approx(0.0625 / 0.15) and np.isfinite(found.ci95).all() and found.ci95[0] < found.value

"""What may be concluded from a results folder: paired differences over units, tested, and corrected for their number.

Two methods are compared on the users and seeds that both have; methods that were run on fewer are compared on those. What a
unit is: :mod:`eval.panel`. Shapes: N rows, U units of a seed.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student

from agents.bootstrap import Interval, Values, mean_interval
from eval.panel import Panel, Rows
from eval.results import BINS

LEVEL = 0.05
"""Of all verdicts of a family together."""
NO_DIFFERENCE = "no difference shown"
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Difference:
    """One method less another over the units that both have: mean and 95 % interval, p-value, how many users and seeds."""

    interval: Interval
    p: float
    users: int
    seeds: int


@dataclass(frozen=True)
class Comparison:
    """A :class:`Difference` among several: ``corrected`` is its p-value after Holm's correction.

    ``verdict``: ``above``, ``below`` or :data:`NO_DIFFERENCE`; all verdicts of a family hold together with 95 %.
    """

    mean: float
    low: float
    high: float
    p: float
    corrected: float
    verdict: str
    users: int
    seeds: int


def difference(panel: Panel, first: Rows, second: Rows, measure: str, weight: float | None = None) -> Difference | None:
    """``first - second`` in a measure (see :meth:`Panel.values`), paired; None where they have no user in common."""
    one, other = panel.align(first, second)
    if not len(one):
        return None
    each = panel.units(one, panel.values(one, measure, weight) - panel.values(other, measure, weight))
    return Difference(mean_interval(each), sign_flip(each), *panel.counts(one))


@lru_cache(maxsize=2)
def _signs(units: int, flips: int, seed: int) -> NDArray[np.float32]:
    return 2 * np.random.default_rng(seed).integers(2, size=(flips, units), dtype=np.int8).astype(np.float32) - 1


def sign_flip(differences: Sequence[Values], flips: int = 10000, seed: int = 0) -> float:
    """Two-sided p-value of the paired permutation test that a mean difference is zero.

    Under the null either of the two could have been the first, so every unit's sign is a coin (Fisher 1935, "The design of
    experiments", section 21). By random flips, the observed one counted among them (Phipson & Smyth 2010, "Permutation
    p-values should never be zero"). Where no random flip comes near, Hoeffding's bound on the share of all flips that do
    (1963, "Probability inequalities for sums of bounded random variables", theorem 2), so that a large difference stays shown
    however many comparisons it is corrected for.

    Args:
        differences: per seed ``[U]``; the statistic is the mean over users, then seeds.
        flips: of all signs.
        seed: of the flips.
    """
    parts = np.concatenate([values / (len(values) * len(differences)) for values in differences])
    flipped = np.abs(_signs(len(parts), flips, seed) @ parts.astype(np.float32))
    slack = 1e-6 * np.abs(parts).sum()  # equal statistics must count as equal
    reached = int((flipped >= abs(parts.sum()) - slack).sum())
    if reached:
        return (1 + reached) / (1 + flips)
    return float(min(1 / (1 + flips), 2 * np.exp(-(parts.sum() ** 2) / (2 * (parts**2).sum()))))


def bootstrap_p(drawn: Values, per_seed: Sequence[NDArray[np.float64]]) -> float:
    """Two-sided p-value for zero of a statistic whose users were resampled within seeds.

    A percentile interval is too short for few users, by a factor sqrt((n - 1) / n) and by a normal's tails instead of
    Student's; the p-value is that of the interval which is lengthened by both (Hesterberg 2015, "What teachers should know
    about the bootstrap", on expanded percentile intervals). Where no resample comes to zero, how far they are from it in their
    standard deviations, so that a large difference stays shown however many comparisons it is corrected for; but never less
    than flipping the signs of so many users could give. One user shows nothing.

    Args:
        drawn: the statistic of every resample ``[R]``.
        per_seed: per seed what was resampled ``[U, ...]``.
    """
    units = sum(map(len, per_seed))
    freedom = units - len(per_seed)
    if not freedom:
        return 1.0
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    deviation = norm.isf(min(1.0, 2 * (1 + tail) / (1 + len(drawn))) / 2)
    if not tail and (spread := drawn.std()) > 0:
        deviation = max(deviation, abs(drawn.mean()) / spread)
    return float(max(2 * student.sf(deviation * np.sqrt(freedom / units), freedom), 2.0 ** (1 - units)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979, "A simple sequentially rejective multiple test procedure")."""
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    steps = np.minimum(1, np.maximum.accumulate(np.asarray(p_values)[order] * factors)) if len(order) else order
    out = np.empty(len(order))
    out[order] = steps
    return out.tolist()


def corrected(family: Mapping[Key, Difference | None]) -> dict[Key, Comparison]:
    """Verdicts on differences that are read together; those that could not be measured (None) are left out."""
    found = {key: one for key, one in family.items() if one is not None}
    return {
        key: Comparison(
            one.interval.mean,
            one.interval.low,
            one.interval.high,
            one.p,
            p,
            NO_DIFFERENCE if p >= LEVEL else "above" if one.interval.mean > 0 else "below",
            one.users,
            one.seeds,
        )
        for (key, one), p in zip(found.items(), holm([one.p for one in found.values()]), strict=True)
    }


@dataclass(frozen=True)
class Spread:
    """How gains are spread over users.

    Attributes:
        bottom_decile: mean of the lowest tenth of the units' gains (at least one unit), per seed, then over seeds.
        worse: share of units with a gain below zero, likewise.
        gains: of all units, pooled.
    """

    bottom_decile: float
    worse: float
    gains: Values


def spread(panel: Panel, rows: Rows, base: Rows) -> Spread | None:
    """Of the gain in accuracy over ``base``; None where they have no user in common."""
    one, other = panel.align(rows, base)
    if not len(one):
        return None
    each = panel.units(one, panel.values(one, "accuracy") - panel.values(other, "accuracy"))
    each = [np.round(gains, 9) for gains in each]  # means over seeds of equal accuracies may differ in their last bit
    lowest = [np.sort(gains)[: -(-len(gains) // 10)].mean() for gains in each]
    worse = [(gains < 0).mean() for gains in each]
    return Spread(float(np.mean(lowest)), float(np.mean(worse)), np.concatenate(each))


def calibration_error(panel: Panel, rows: Rows) -> float | None:
    """Expected calibration error (Guo et al. 2017), of each seed's examples pooled over users, then the mean over seeds.

    The mean over confidence bins, weighted by their examples, of how far the share of hits is from the mean confidence.
    """
    if not len(rows):
        return None
    return float(np.mean([_ece([panel.results["calibration"][at] for at in each]) for each in panel.by_seed(rows)]))


def _ece(cells: Sequence[str]) -> float:
    numbers = np.array(";".join(cells).replace(":", ";").split(";"), np.float64)
    count, confidence, hits = numbers.reshape(len(cells), BINS, 3).sum(0).T
    return float(np.abs(hits - confidence).sum() / count.sum()) if count.sum() else 0.0

"""Accuracy against cost: Pareto fronts, what lies between their points, hypervolume, and whether one front is above another.

A point is ``(cost, accuracy)``; cheaper and more accurate is better. Shapes: K points, U users, G places along a front.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
"""``[K, 2]``, or per user ``[K, U, 2]``."""
WORST_COST = 1.05
"""Where the hypervolume's reference point lies: a little dearer than everything on."""


def pareto_front(points: Points) -> Points:
    """The points ``[F, 2]`` that no other is both at most as dear and at least as accurate as, from cheap to dear.

    Equal points count once, so costs and accuracies both increase strictly.
    """
    ordered = points[np.lexsort((-points[:, 1], points[:, 0]))]
    cheaper = np.concatenate([[-np.inf], np.maximum.accumulate(ordered[:, 1])])[:-1]
    return ordered[ordered[:, 1] > cheaper]


def concave_front(points: Points) -> Points:
    """The corners ``[F, 2]`` of the smallest concave curve above the front (the upper hull; Andrew 1979, monotone chain)."""
    hull: list[Points] = []
    for point in pareto_front(points):
        while len(hull) > 1 and not _bends_down(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return np.array(hull).reshape(-1, 2)


def _bends_down(first: Points, middle: Points, last: Points) -> bool:
    (x, y), (u, v) = middle - first, last - first
    return bool(x * v - y * u < 0)


def interpolated(points: Points, costs: NDArray[np.float64]) -> NDArray[np.float64]:
    """The accuracy ``[G]`` that a method's points ``[K, 2]`` make possible at mean costs ``[G]``.

    The concave front: whoever has two points also has all between them, by a draw that gives each user one or the other; a
    straight line between neighbours of the Pareto front alone would sell a rival short wherever a longer line runs above
    it. Dearer than the dearest point nothing is gained. The corners are the best of the points as measured, so with many
    points luck is among them, for whoever has more.

    Raises:
        ValueError: for a cost below the cheapest point's, at which nothing can be had.
    """
    front = concave_front(points)
    if np.min(costs) < front[0, 0] - 1e-9:
        raise ValueError(
            f"no point is as cheap as {np.min(costs):g}, the cheapest costs {front[0, 0]:g}; add a cheaper mask (all_off) to "
            "the front, or ask from its cheapest point on."
        )
    return np.interp(costs, front[:, 0], front[:, 1])


def hypervolume(points: Points, reference: tuple[float, float]) -> float:
    """The area between a set of points ``[K, 2]`` and a reference point that is worse than all (Zitzler & Thiele 1999).

    In steps, that is, without what mixing points would add, as the measure is defined. Points that are not better than the
    reference in both add nothing.

    Args:
        points: mean costs and accuracies that a method reaches over the cost weights.
        reference: ``(WORST_COST, accuracy of all_off)``.
    """
    worst_cost, worst_accuracy = reference
    front = pareto_front(points[(points[:, 0] < worst_cost) & (points[:, 1] > worst_accuracy)])
    widths = np.append(front[1:, 0], worst_cost)[: len(front)] - front[:, 0]
    return float(widths @ (front[:, 1] - worst_accuracy))


def mean_points(per_seed: Sequence[Points]) -> Points:
    """Mean points ``[K, 2]`` over users within seeds, then over seeds, of ``[K, U, 2]`` per seed."""
    return np.mean([points.mean(1) for points in per_seed], axis=0)


@dataclass(frozen=True)
class Band:
    """One front less another at G places, with a simultaneous interval: it covers the whole true curve with 95 %.

    Attributes:
        costs: ``[G]``. difference: ``[G]``, of accuracies. low, high: ``[G]``.
    """

    costs: NDArray[np.float64]
    difference: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @property
    def above(self) -> bool:
        """Whether the first front is above the second at every place at once."""
        return bool((self.low > 0).all())


def simultaneous_band(
    policy: Sequence[Points], static: Sequence[Points], places: int = 20, resamples: int = 2000, seed: int = 0
) -> Band:
    """The policy's front less the static one, from the policy's cheapest to its dearest mean point.

    Sup-t band of the bootstrap (Montiel Olea & Plagborg-Moller 2019, "Simultaneous confidence bands", algorithm 2 with
    standard errors from the bootstrap): users are resampled within seeds; from the same users both sides' mean points are
    computed anew, pooled over seeds and interpolated; the band is the difference plus and minus its standard errors times
    the 95 % quantile of the largest standardised deviation. The places are evenly spaced costs between the ends of the
    policy's own front, which move with the resample: an end's cost is estimated like the rest.

    Args:
        policy: per seed ``[K, U, 2]``, cost and accuracy of every user at every point.
        static: per seed ``[L, U, 2]``, the same users in the same order. The l-th point of every seed is made in the same
            way (best static mask at the l-th weight, say). Must hold a point as cheap as the policy's cheapest.
        places: G.
        resamples: of the bootstrap.
        seed: of the resampling.
    """
    rng, count = np.random.default_rng(seed), len(policy[0])
    drawn = np.mean([_resampled(p, s, resamples, rng) for p, s in zip(policy, static, strict=True)], axis=0)
    share = np.linspace(0, 1, places)
    costs, difference = _above(mean_points(policy), mean_points(static), share)
    differences = np.stack([_above(means[:count], means[count:], share)[1] for means in drawn])
    errors = differences.std(0)
    deviations = np.abs(differences - difference) / np.where(errors > 0, errors, np.inf)
    width = np.quantile(deviations.max(1), 0.95) * errors
    return Band(costs, difference, difference - width, difference + width)


def _resampled(policy: Points, static: Points, resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Mean points of both sides over the same resampled users of one seed, ``[resamples, K + L, 2]``."""
    both = np.concatenate([policy, static])
    users = both.shape[1]
    counts = rng.multinomial(users, np.full(users, 1 / users), size=resamples)
    return np.einsum("ru,kuc->rkc", counts / users, both, optimize=True)


def _above(policy: Points, static: Points, share: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Costs at shares ``[G]`` of the way from the policy's cheapest to its dearest point, and how far it is above there."""
    costs = policy[:, 0].min() + share * np.ptp(policy[:, 0])
    return costs, interpolated(policy, costs) - interpolated(static, costs)

"""Accuracy against cost over the cost weights of a results folder: hypervolume, and rivals at the cost of one method.

Shapes: K cost weights, U units (:mod:`eval.panel`), R resamples.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.bootstrap import Interval, Values, resampled_means
from eval.panel import Panel, Rows
from eval.pareto import WORST_COST, Points, hypervolume
from eval.statistics import LEVEL, Difference, bootstrap_p, difference

RESAMPLES = 10_000
VOLUMES = 4_000
"""Resamples for hypervolumes, which are computed one by one."""


def points(panel: Panel, method: str, *beside: Rows) -> list[Points]:
    """Per seed (of real people: once) ``[B + K, U, 2]``, cost and accuracy: of the rows beside, then of a method's weights.

    Users and seeds that all of them have; empty where a weight is missing or nobody has all.
    """
    every = [*beside, *(panel.rows(method, weight) for weight in panel.run.cost_weights)]
    aligned = panel.align(*every)
    if not len(aligned[0]):
        return []
    both = [np.stack([panel.values(rows, "cost"), panel.values(rows, "accuracy")], -1) for rows in aligned]
    columns = panel.units(aligned[0], np.stack(both, 1))
    return [each.transpose(1, 0, 2) for each in columns]


def volume(panel: Panel, method: str) -> float | None:
    """Hypervolume over the cost weights, reference ``(WORST_COST, accuracy of base)``; None without a trade-off or base."""
    if not panel.run.methods[method].trades:
        return None
    per_seed = points(panel, method, panel.rows("base"))
    if not per_seed:
        return None
    means = np.mean([each.mean(1) for each in per_seed], axis=0)
    return hypervolume(means[1:], (WORST_COST, float(means[0, 1])))


def volume_lead(panel: Panel, subject: str, rival: str) -> Difference | None:
    """The subject's hypervolume less the rival's, reference as in :func:`volume`, on the users whom both have.

    Users are resampled within seeds, means and fronts computed anew each time. None where one of them has no trade-off.
    """
    if not all(panel.run.methods[name].trades for name in (subject, rival)):
        return None
    mine = [panel.rows(subject, weight) for weight in panel.run.cost_weights]
    per_seed = points(panel, rival, panel.rows("base"), *mine)
    if not per_seed:
        return None
    columns = [each.transpose(1, 0, 2).reshape(each.shape[1], -1) for each in per_seed]
    drawn = np.array([_volumes_apart(means, len(mine)) for means in resampled_means(columns, VOLUMES)])
    low, high = np.percentile(drawn, [2.5, 97.5])
    mean = _volumes_apart(np.mean([each.mean(0) for each in columns], axis=0), len(mine))
    shared = panel.align(panel.rows("base"), *mine, *(panel.rows(rival, weight) for weight in panel.run.cost_weights))[0]
    return Difference(Interval(mean, float(low), float(high)), bootstrap_p(drawn, columns), *panel.counts(shared))


def _volumes_apart(means: Values, count: int) -> float:
    """From mean points in a row ``[2 (1 + K + K)]``, base's first, then the subject's ``count``: its volume less the other."""
    place = means.reshape(-1, 2)
    reference = (WORST_COST, float(place[0, 1]))
    return hypervolume(place[1 : 1 + count], reference) - hypervolume(place[1 + count :], reference)


def at_equal_cost(panel: Panel, subject: str, rival: str) -> Difference | str:
    """The subject's accuracy less what the rival reaches at the subject's mean cost, both at the run's cost weight.

    A rival with a trade-off has its concave front over the cost weights, with ``base`` among its points (whoever can
    personalise can also leave it); users are resampled within seeds, means and front computed anew each time. Resamples in
    which nothing of the rival is as cheap are left out if they are few. A rival without is compared as it is if it is not
    dearer.

    Returns:
        The difference; or words that say why there is none.
    """
    mine, base = panel.rows(subject), panel.rows("base")
    if not panel.run.methods[rival].trades:
        return _without_trade(panel, mine, panel.rows(rival))
    if not len(base):
        return "base was not run"
    per_seed = points(panel, rival, mine, base)
    if not per_seed:
        return "no user was measured at every cost weight"
    columns = [each.transpose(1, 0, 2).reshape(each.shape[1], -1) for each in per_seed]
    mean = float(_leads(np.mean([each.mean(0) for each in columns], axis=0)[None])[0])
    found = _leads(resampled_means(columns, RESAMPLES))
    if not np.isfinite(mean):  # base is not free where all that runs is counted
        return f"nothing of {rival} is as cheap"
    found = found[np.isfinite(found)]
    if len(found) < (1 - LEVEL / 2) * RESAMPLES:
        return f"{rival} is hardly ever cheaper: in {len(found) / RESAMPLES:.0%} of the resamples it has something as cheap"
    low, high = np.percentile(found, [2.5, 97.5])
    shared = panel.align(mine, base, *(panel.rows(rival, weight) for weight in panel.run.cost_weights))[0]
    return Difference(Interval(mean, float(low), float(high)), bootstrap_p(found, columns), *panel.counts(shared))


def _leads(means: NDArray[np.float64]) -> Values:
    """From mean points in rows ``[R, 2 (1 + M)]``, the subject's first: its accuracy less their front at its cost ``[R]``.

    There the others' concave front is as high as the highest line between a point that is no dearer and one that is, or the
    most accurate of those that are no dearer (:func:`eval.pareto.interpolated`); infinite if none is.
    """
    place = means.reshape(len(means), -1, 2)
    below = place[:, :1, 0] - place[:, 1:, 0]  # [R, M], by how much each is cheaper than the subject
    accuracy, no_dearer = place[:, 1:, 1], below >= -1e-9
    pairs = no_dearer[:, :, None] & ~no_dearer[:, None]  # [R, M, M], a point that is no dearer, and one that is
    apart = np.where(pairs, below[:, :, None] - below[:, None], 1.0)
    between = (accuracy[:, None] * below[:, :, None] - accuracy[:, :, None] * below[:, None]) / apart
    lines, points_alone = np.where(pairs, between, -np.inf), np.where(no_dearer, accuracy, -np.inf)
    return place[:, 0, 1] - np.maximum(lines.max((1, 2)), points_alone.max(1))


def _without_trade(panel: Panel, mine: Rows, other: Rows) -> Difference | str:
    one, two = panel.align(mine, other)
    if not len(one):
        return "no user in common"
    costs: list[Any] = [panel.mean(one, "cost"), panel.mean(two, "cost")]
    if costs[1] > costs[0] + 1e-9:
        return f"dearer: cost {costs[1]:.2f} against {costs[0]:.2f}"
    found = difference(panel, one, two, "accuracy")
    assert found is not None
    return found

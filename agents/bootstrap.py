"""Paired bootstrap intervals over users. Shapes: per seed one array ``[U]``, aligned between the compared methods."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % percentile bootstrap interval."""

    mean: float
    low: float
    high: float


def _resampled(columns: Sequence[Values], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Means of ``[U, K]`` columns over resampled users, ``[resamples, K]``; columns stay paired."""
    stacked = np.stack(columns, 1)
    out = np.empty((resamples, stacked.shape[1]))
    for row in range(resamples):
        out[row] = stacked[rng.integers(len(stacked), size=len(stacked))].mean(0)
    return out


def paired_difference(first: Sequence[Values], second: Sequence[Values], resamples: int = 4000, seed: int = 0) -> Interval:
    """Mean of ``first - second``, users resampled within each seed, seeds averaged.

    Args:
        first: per seed ``[U]``.
        second: the same users in the same order.
        resamples: bootstrap resamples.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    each = [a - b for a, b in zip(first, second, strict=True)]
    means = np.mean([_resampled([d], resamples, rng)[:, 0] for d in each], axis=0)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(np.mean([d.mean() for d in each])), float(low), float(high))


@dataclass(frozen=True)
class GapClosed:
    """(policy - static) / (search - static), or None and the reason why it is not defined."""

    value: float | None
    ci95: tuple[float, float] | None
    reason: str | None = None


def gap_closed(
    policy: Sequence[Values], static: Sequence[Values], search: Sequence[Values], resamples: int = 4000, seed: int = 0
) -> GapClosed:
    """How much of the way from the best static mask to a search per user the policy goes.

    A ratio of mean rewards pooled over seeds (and whatever else is passed as further arrays), with a paired bootstrap
    interval. Undefined where the interval of the denominator touches zero.
    """
    room = paired_difference(search, static, resamples, seed)
    if room.low <= 0 <= room.high or room.mean < 0:
        reason = f"validation_search is not above best_static: {room.mean:+.4f} [{room.low:+.4f}, {room.high:+.4f}]"
        return GapClosed(None, None, reason)
    rng = np.random.default_rng(seed)
    drawn = [_resampled([p - s, v - s], resamples, rng) for p, s, v in zip(policy, static, search, strict=True)]
    means = np.mean(drawn, axis=0)
    means = means[means[:, 1] > 0]  # a few resamples of few users may leave no room at all
    low, high = np.percentile(means[:, 0] / means[:, 1], [2.5, 97.5])
    gained = np.mean([(p - s).mean() for p, s in zip(policy, static, strict=True)])
    return GapClosed(float(gained / room.mean), (float(low), float(high)))

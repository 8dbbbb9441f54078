"""Paired bootstrap intervals over users. Shapes: per seed one array ``[U]``, aligned between the compared methods."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.people import People

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % percentile bootstrap interval."""

    mean: float
    low: float
    high: float


@lru_cache(maxsize=4)
def _drawn(sizes: tuple[int, ...], resamples: int, seed: int) -> tuple[NDArray[np.uint8], ...]:
    """How often each user of each seed is in each resample, ``[resamples, U]`` per seed; remembered for the next comparison."""
    rng = np.random.default_rng(seed)
    out = tuple(np.empty((resamples, size), np.uint8) for size in sizes)
    for counts, size in zip(out, sizes, strict=True):
        for row in counts:
            row[:] = np.bincount(rng.integers(size, size=size), minlength=size)
    return out


def resampled_means(per_seed: Sequence[Values], resamples: int = 4000, seed: int = 0) -> Values:
    """Means of ``[U, K]`` columns per seed over users resampled within seeds, seeds averaged: ``[resamples, K]``.

    Columns stay paired, and so do calls with as many users.
    """
    drawn = _drawn(tuple(len(columns) for columns in per_seed), resamples, seed)
    means = np.zeros((resamples, per_seed[0].shape[1]))
    for columns, counts in zip(per_seed, drawn, strict=True):
        for begin in range(0, resamples, 500):  # in pieces: counts are bytes, products need floats
            means[begin : begin + 500] += counts[begin : begin + 500] @ columns / len(columns)
    return means / len(per_seed)


def mean_interval(each: Sequence[Values], resamples: int = 4000, seed: int = 0) -> Interval:
    """Mean of ``[U]`` values per seed, users resampled within each seed, seeds averaged; ``seed`` is of the resampling."""
    means = resampled_means([d[:, None] for d in each], resamples, seed)[:, 0]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(np.mean([d.mean() for d in each])), float(low), float(high))


def paired_difference(
    first: Sequence[Values],
    second: Sequence[Values],
    resamples: int = 4000,
    seed: int = 0,
    people: Sequence[Sequence[str]] | None = None,
) -> Interval:
    """Mean of ``first - second`` with :func:`mean_interval`.

    Args:
        first: per seed ``[U]``.
        second: the same users in the same order.
        resamples: bootstrap resamples.
        seed: of the resampling.
        people: per seed the names of its users, where they are real people: each of them counts once.
    """
    each = [a - b for a, b in zip(first, second, strict=True)]
    if people is not None:
        each = [People(people).mean(each)]
    return mean_interval(each, resamples, seed)


def units(each: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], simulated: bool) -> list[Values]:
    """What intervals are over, from values ``[...]`` by user in each of some runs: differences of those whom both have.

    Args:
        each: per run, by user.
        other: the same runs, in the same order.
        simulated: whether a name is somebody else in every run.

    Returns:
        Of simulated users one array ``[U, ...]`` per run; of real people one in all, each of them averaged over their runs.
    """
    both = [{user: one[user] - two[user] for user in one if user in two} for one, two in zip(each, other, strict=True)]
    rows = [row for row in both if row]
    if simulated:
        return [np.stack([*row.values()]) for row in rows]
    return [People([[*row] for row in rows]).mean([np.stack([*row.values()]) for row in rows])]


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
    both = [np.stack([p - s, v - s], 1) for p, s, v in zip(policy, static, search, strict=True)]
    means = resampled_means(both, resamples, seed)
    means = means[means[:, 1] > 0]  # a few resamples of few users may leave no room at all
    low, high = np.percentile(means[:, 0] / means[:, 1], [2.5, 97.5])
    gained = np.mean([(p - s).mean() for p, s in zip(policy, static, strict=True)])
    return GapClosed(float(gained / room.mean), (float(low), float(high)))

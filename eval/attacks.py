"""Membership inference, as statistics: scores of members and non-members, how well they tell them apart, what that bounds.

Shapes: M members, N non-members, R reference models, S shadow models, X examples.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, binom, norm
from sklearn.metrics import roc_auc_score

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Success:
    """How well an attack tells members from others.

    Attributes:
        auc: probability that a member's score is above another's; .5 is guessing. auc_ci95: its interval (Hanley & McNeil).
        tpr: share of the members found at the false positive rate ``fpr``; tpr_ci95: its exact interval (Clopper & Pearson).
        members, others: how many there were.
    """

    auc: float
    auc_ci95: tuple[float, float]
    tpr: float
    tpr_ci95: tuple[float, float]
    fpr: float
    members: int
    others: int


def success(members: Values, others: Values, fpr: float = 0.01) -> Success:
    """Of scores ``[M]`` and ``[N]``, higher where membership is claimed.

    Raises:
        ValueError: if there are too few others for so small a false positive rate.
    """
    if len(others) * fpr < 1 or not len(members):
        raise ValueError(f"a false positive rate of {fpr:g} takes at least {int(np.ceil(1 / fpr))} non-members, and a member.")
    truth = np.concatenate([np.ones(len(members)), np.zeros(len(others))])
    auc = float(roc_auc_score(truth, np.concatenate([members, others])))
    threshold = np.sort(others)[::-1][int(len(others) * fpr) - 1]  # so many others are at or above it
    threshold = np.nextafter(threshold, np.inf) if (others >= threshold).mean() > fpr else threshold
    hits = int((members >= threshold).sum())
    return Success(
        auc, _auc_interval(auc, len(members), len(others)), hits / len(members), exact(hits, len(members)), fpr,
        len(members), len(others),
    )  # fmt: skip


def exact(hits: int, tries: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a share. Source: Clopper & Pearson 1934."""
    rest = (1 - level) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(rest, hits, tries - hits + 1))
    high = 1.0 if hits == tries else float(beta.ppf(1 - rest, hits + 1, tries - hits))
    return low, high


def _auc_interval(auc: float, members: int, others: int) -> tuple[float, float]:
    """Source: Hanley & McNeil 1982."""
    first, second = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (members - 1) * (first - auc**2) + (others - 1) * (second - auc**2)
    half = 1.96 * np.sqrt(max(variance, 0.0) / (members * others))
    return max(0.0, auc - half), min(1.0, auc + half)


def rmia(target: Values, references: Values, population: Values, population_references: Values, gamma: float = 1.0) -> Values:
    """Offline robust membership inference: how many of a population somebody fits the target better than, relatively.

    Source: Zarifzadeh et al. 2024, "Low-Cost High-Power Membership Inference Attacks" (offline, a = 1: references have seen
    nobody of those asked about, and their mean stands for everybody's).

    Args:
        target: ``[X]``, log likelihoods of those asked about under the attacked model.
        references: ``[R, X]``, under models that have not seen them.
        population: ``[N]``, log likelihoods of others, who are in neither, under the attacked model.
        population_references: ``[R, N]``.
        gamma: by what factor the ratio must be larger.

    Returns:
        ``[X]`` in 0..1.
    """
    mine = target - _log_mean(references)
    theirs = np.sort(population - _log_mean(population_references))
    return np.searchsorted(theirs, mine - np.log(gamma), side="right") / len(theirs)


def _log_mean(logs: Values) -> Values:
    top = logs.max(0)
    return top + np.log(np.exp(logs - top).mean(0))


def lira(target: Values, shadows: Values, inside: NDArray[np.bool_]) -> Values:
    """The likelihood ratio attack with shadow models, per example.

    Source: Carlini et al. 2022, "Membership Inference Attacks From First Principles" (online; variances over all examples).

    Args:
        target: ``[X]``, statistics of examples under the attacked model (see :func:`confidence`).
        shadows: ``[S, X]``, under models trained like it.
        inside: ``[S, X]``, which examples each shadow model was trained on; every example in some and out of some.

    Returns:
        ``[X]``, log likelihood of having been in minus that of having been out.

    Raises:
        ValueError: if some example was in none of the shadow models, or in all.
    """
    if inside.all(0).any() or not inside.any(0).all():
        raise ValueError("some example is in none of the shadow models or in all of them: learn more of them.")
    with_it, without = (np.where(mask, shadows, np.nan) for mask in (inside, ~inside))
    means = [np.nanmean(each, 0) for each in (with_it, without)]
    spreads = [
        max(float(np.sqrt(np.nanmean((each - m) ** 2))), 1e-6) for each, m in zip((with_it, without), means, strict=True)
    ]
    likely = [norm.logpdf(target, m, s) for m, s in zip(means, spreads, strict=True)]
    return likely[0] - likely[1]


def confidence(log_likelihood: Values) -> Values:
    """``log p - log (1 - p)``, which is about normal where p itself is not."""
    return log_likelihood - np.log1p(-np.exp(np.minimum(log_likelihood, -1e-7)))


def audited_epsilon(guesses: int, right: int, canaries: int, delta: float, level: float = 0.95) -> float:
    """The largest epsilon that guesses in one run disprove at a confidence: a lower bound on that of the training.

    Source: Steinke et al. 2023, "Privacy Auditing with One (1) Training Run".

    Args:
        guesses: how many canaries were guessed to be in or out; the others count for nothing.
        right: how many of these guesses are right.
        canaries: that were in or out by coins.
        delta: of the claim.
        level: of confidence.
    """
    low, high = 0.0, 40.0
    if _chance(guesses, right, canaries, delta, low) > 1 - level:
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if _chance(guesses, right, canaries, delta, middle) <= 1 - level else (low, middle)
    return low


def _chance(guesses: int, right: int, canaries: int, delta: float, epsilon: float) -> float:
    """At most so probably are so many guesses right, if the training keeps epsilon and delta."""
    each = 1 / (1 + np.exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, each))
    places = np.arange(1, right + 1)
    sums = np.cumsum(binom.pmf(right - places, guesses, each))
    return min(1.0, tail + float((sums / places).max(initial=0.0)) * 2 * canaries * delta)


def best_guesses(scores: Values, inside: NDArray[np.bool_], delta: float) -> tuple[float, int, int]:
    """Over how many of the most telling scores are guessed: the largest audited epsilon, guesses, and how many were right.

    Who seems to be in is guessed alone, or as many who seem to be out too; the number of guesses is one of six fixed
    shares. For all these choices the level is corrected.

    Args:
        scores: ``[X]`` of canaries, higher where one seems to be in.
        inside: ``[X]``, which were.
        delta: of the claim.
    """
    order, shares = scores.argsort()[::-1], (0.02, 0.1, 0.3, 0.5, 0.7, 1.0)
    best = (0.0, 0, 0)
    for share in shares:
        half = max(1, int(len(scores) * share / 2))
        seem_in, seem_out = int(inside[order[:half]].sum()), int((~inside[order[-half:]]).sum())
        for guesses, right in ((half, seem_in), (2 * half, seem_in + seem_out)):
            found = audited_epsilon(guesses, right, len(scores), delta, 1 - 0.05 / (2 * len(shares)))
            best = max(best, (found, guesses, right))
    return best

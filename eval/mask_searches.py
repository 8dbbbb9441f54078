"""Searches for one user's mask that learn only from trying: random, greedy forward selection, Bayesian optimisation.

Side by side for U users, each search with a history of its own. ``all_off``, the model as it was, costs no adaptation and is
where every search starts. Shapes: U users, B of them, P pathways, M candidate masks, N adaptations at most.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from agents.rivals import all_masks, masks_of_every_density
from envs.oracles import Plans, Users

Ask = Callable[[Users, Plans], NDArray[np.float64]]
"""What masks ``[B, P]`` are worth to the searchers: rewards ``[B]``."""
ENUMERATED, SAMPLED = 10, 512
"""Up to so many pathways every mask is a candidate; beyond, so many masks of random density are."""


class Search:
    """U searches side by side, one per user: the best mask so far, and how it came.

    Args:
        users: ``[U]``. pathways: P. ask: what a mask is worth to the searcher. budget: N, adaptations per user.

    Attributes:
        start: ``[U]``, rewards of ``all_off``. best, reward: ``[U, P]`` and ``[U]``, so far. spent: ``[U]`` adaptations.
    """

    def __init__(self, users: Users, pathways: int, ask: Ask, budget: int) -> None:
        self.users, self.ask, self.budget = users, ask, budget
        self.best = np.zeros((len(users), pathways), dtype=bool)
        self.start = ask(users, self.best)
        self.reward = self.start.copy()
        self.spent = np.zeros(len(users), dtype=np.int64)
        self._trace = np.zeros((budget + 1, len(users), pathways), dtype=bool)

    def try_masks(self, rows: NDArray[np.int64], masks: Plans) -> NDArray[np.float64]:
        """Spend one adaptation for each of some users; their rewards ``[B]``. Equal ones leave the earlier mask in place."""
        found = self.ask(self.users[rows], masks)
        self.spent[rows] += 1
        better = found > self.reward[rows]
        self.best[rows[better]], self.reward[rows[better]] = masks[better], found[better]
        self._trace[self.spent[rows], rows] = self.best[rows]
        return found

    def incumbents(self) -> Plans:
        """The best mask after 0, 1, ... N adaptations, ``[N + 1, U, P]``; who stopped early keeps what there was."""
        after = np.arange(self.budget + 1)[:, None] > self.spent
        self._trace[after] = np.broadcast_to(self.best, self._trace.shape)[after]
        return self._trace


def random_search(users: Users, candidates: Plans, ask: Ask, budget: int, rng: np.random.Generator) -> Plans:
    """Candidates ``[M, P]`` in an order of the user's own, none twice; incumbents ``[N + 1, U, P]``."""
    search = Search(users, candidates.shape[1], ask, budget)
    order = rng.permuted(np.tile(np.arange(len(candidates)), (len(users), 1)), axis=1)[:, :budget]
    for tried in order.T:
        search.try_masks(np.arange(len(users)), candidates[tried])
    return search.incumbents()


def greedy_forward(users: Users, pathways: int, ask: Ask, budget: int, rng: np.random.Generator) -> Plans:
    """Forward selection from ``all_off``: tries every pathway more, keeps the best, ends when none is better.

    The order within a round is random, each user's own; it matters where the budget ends within one. Returns incumbents
    ``[N + 1, U, P]``.
    """
    search = Search(users, pathways, ask, budget)
    base, left = search.best.copy(), np.ones_like(search.best)
    order = rng.random(left.shape)
    active = np.arange(len(users))
    for _ in range(budget):
        if not len(active):
            break
        tried = np.where(left[active], order[active], np.inf).argmin(1)
        masks = base[active].copy()
        masks[np.arange(len(active)), tried] = True
        search.try_masks(active, masks)
        left[active, tried] = False
        over = active[~left[active].any(1)]
        left[over] = ~search.best[over] & (search.best[over] != base[over]).any(1, keepdims=True)
        base[over] = search.best[over]
        active = active[left[active].any(1)]
    return search.incumbents()


@dataclass(frozen=True)
class Prior:
    """A Gaussian process over masks, for what they earn above ``all_off``, with everything fixed beforehand.

    Attributes:
        mean: of the gain. deviation: of the gain, over masks and users. length: scale of the squared-exponential kernel
            ``exp(-h / (2 length^2))``, h the number of bits in which two masks differ. noise: standard deviation, as a
            share of ``deviation``.
    """

    mean: float
    deviation: float
    length: float
    noise: float

    def kernel(self, masks: Plans) -> NDArray[np.float64]:
        """Correlations ``[M, M]``."""
        bits = masks.astype(np.float64)
        differing = bits.sum(1)[:, None] + bits.sum(1) - 2 * bits @ bits.T
        return np.exp(-differing / (2 * self.length**2))


class Posterior:
    """The process of U users at once, each with observations of their own, in units of the prior's deviation.

    One observation more is one more row of every user's Cholesky factor, O(n M): Rasmussen & Williams 2006, chapter 2.

    Attributes:
        mean, variance: ``[U, M]``.
    """

    def __init__(self, kernel: NDArray[np.float64], noise: float, users: int, budget: int) -> None:
        self.kernel, self.noise = kernel, noise
        self.mean, self.variance = np.zeros((users, len(kernel))), np.ones((users, len(kernel)))
        self._rows = np.empty((users, budget + 1, len(kernel)))
        self._count = 0

    def observe(self, tried: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Take in one value ``[U]`` per user, of candidates ``[U]``."""
        users, before = np.arange(len(tried)), self._rows[:, : self._count]
        known = np.take_along_axis(before, tried[:, None, None], axis=2)[..., 0]
        covariance = self.kernel[tried] - np.einsum("un,unm->um", known, before)
        total = self.variance[users, tried] + self.noise**2
        row = covariance / np.sqrt(total)[:, None]
        self.mean += covariance * ((values - self.mean[users, tried]) / total)[:, None]
        self.variance = np.maximum(self.variance - row**2, 0)
        self._rows[:, self._count] = row
        self._count += 1


def expected_improvement(mean: NDArray[np.float64], variance: NDArray[np.float64], best: NDArray[np.float64]) -> NDArray:
    """Of candidates over the best value so far ``[U]`` (Jones, Schonlau & Welch 1998, equation 15), ``[U, M]``."""
    deviation = np.sqrt(np.maximum(variance, 1e-12))
    gain = mean - best[:, None]
    ratio = gain / deviation
    density = np.exp(-(ratio**2) / 2) / np.sqrt(2 * np.pi)
    return gain * torch.special.ndtr(torch.from_numpy(ratio)).numpy() + deviation * density


def bayesian_optimisation(users: Users, candidates: Plans, ask: Ask, budget: int, prior: Prior) -> Plans:
    """The candidate ``[M, P]`` of highest expected improvement, none twice; incumbents ``[N + 1, U, P]``.

    Efficient global optimisation (Jones, Schonlau & Welch 1998) with a process whose hyperparameters are not fitted to the
    few values of one user but fixed beforehand. ``all_off`` is the first observation.
    """
    search = Search(users, candidates.shape[1], ask, budget)
    rows = np.arange(len(users))
    masks = np.concatenate([search.best[:1], candidates])  # all_off first
    process = Posterior(prior.kernel(masks), prior.noise, len(users), budget)
    open_to_try = np.ones((len(users), len(masks)), dtype=bool)
    tried, values = np.zeros(len(users), dtype=np.int64), search.start
    for _ in range(min(budget, len(candidates))):
        open_to_try[rows, tried] = False
        process.observe(tried, (values - search.start - prior.mean) / prior.deviation)
        best = (search.reward - search.start - prior.mean) / prior.deviation
        promise = expected_improvement(process.mean, process.variance, best)
        tried = np.where(open_to_try, promise, -np.inf).argmax(1)
        values = search.try_masks(rows, masks[tried])
    return search.incumbents()


def candidates_of(pathways: int, rng: np.random.Generator) -> Plans:
    """Masks that searches may try, in random order: all but ``all_off`` if P <= 10, else 512 of random density and all_on."""
    if pathways <= ENUMERATED:
        masks = all_masks(pathways)
    else:
        named = np.ones((1, pathways), dtype=bool)
        masks = np.unique(np.concatenate([named, masks_of_every_density(pathways, SAMPLED, rng)]), axis=0)
    return rng.permutation(masks[masks.any(1)])

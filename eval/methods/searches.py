"""Searches for every user's own mask by trying masks, on the support alone.

Shapes: U users, B of them, P pathways, M candidate masks, T masks tried per user.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from envs.oracles import Plans, Users, crossed
from eval.group import Group
from eval.mask_searches import candidates_of, greedy_forward, random_search
from eval.methods.base import Fitted
from eval.methods.pathway import Chooser
from eval.world import World
from meta.inner import adapt, measure
from users.batch import Batch

EACH = 2
"""Adaptations that trying a mask takes: one on either half of the support."""


class Trials:
    """What masks are worth to U users: cross-validated accuracy on their support minus ``cost_weight * cost``.

    Adapted on the examples at even places and measured on those at odd ones, and back (:func:`envs.oracles.crossed`). A mask
    under which adaptation diverges counts as always wrong. Remembers what was tried: ``all_off``, the model as it was, is known
    from the start and takes no adaptation.

    Args:
        world: whose pathways and meta-initialisation.
        shown: the users' support.
        cost_weight: lambda.
        count: T.

    Attributes:
        draws: U generators, each user's own; they follow from the world's seed and the user's id alone.
        candidates: ``[M, P]``, see :func:`candidates`.
        known: per user, rewards by mask, in the order in which they were tried.
    """

    def __init__(self, world: World, shown: Group, cost_weight: float, count: int) -> None:
        self.world, self.batch, self.cost_weight, self.count = world, shown.batch, cost_weight, count
        self.costs = world.pathways.costs
        self.draws = [_numpy(world, user, "mask search") for user in shown.ids]
        self.candidates = candidates(world)
        self.known: list[dict[bytes, float]] = [{} for _ in range(len(shown))]
        self._spare = [iter(draw.spawn(1)[0].permutation(self.candidates)) for draw in self.draws]
        self._bar = tqdm(total=len(shown) * count, desc="search for masks", unit="mask", leave=False, delay=3)
        self(np.arange(len(shown)), np.zeros((len(shown), world.pathways.num_pathways), dtype=bool))

    def __call__(self, users: Users, masks: Plans) -> NDArray[np.float64]:
        """Rewards ``[B]`` of masks ``[B, P]`` for users (positions ``[B]``); nothing is tried twice."""
        keys = [(user, mask.tobytes()) for user, mask in zip(users.tolist(), masks, strict=True)]
        new = np.array([row for row, (user, key) in enumerate(keys) if key not in self.known[user]], dtype=np.int64)
        if len(new):
            for row, reward in zip(new.tolist(), self.worth(users[new], masks[new]).tolist(), strict=True):
                user, key = keys[row]
                self.known[user][key] = reward
            self._bar.update(int(masks[new].any(1).sum()))
        return np.array([self.known[user][key] for user, key in keys])

    def worth(self, users: Users, masks: Plans) -> NDArray[np.float64]:
        """Rewards ``[B]``, found by adapting."""
        gates = torch.from_numpy(masks)
        accuracy, loss = crossed(self.batch.rows(torch.from_numpy(users)), gates, self._fresh)
        right = torch.where(loss.isfinite(), accuracy, 0.0).double().numpy()
        return right - self.cost_weight * self.costs.of(masks)

    def _fresh(self, fit: Batch, on: Batch, gates: Tensor) -> tuple[Tensor, Tensor]:
        pathways = self.world.pathways
        return measure(pathways, adapt(pathways, self.world.init, fit, gates), gates, on)

    @property
    def left(self) -> NDArray[np.int64]:
        """``[U]``: how many masks each user may still try."""
        return np.array([self.count - len(known) + 1 for known in self.known])

    def untried(self, user: int) -> NDArray[np.bool_]:
        """The next mask ``[P]`` of the user's own random order of the candidates that was not tried yet."""
        return next(mask for mask in self._spare[user] if mask.tobytes() not in self.known[user])

    def finish(self) -> Plans:
        """Spend what is left on random candidates; each user's best mask ``[U, P]``, of equal ones the earliest."""
        while len(users := np.flatnonzero(self.left)):
            self(users, np.stack([self.untried(user) for user in users.tolist()]))
        self._bar.close()
        best = [max(known, key=known.__getitem__) for known in self.known]
        return np.stack([np.frombuffer(key, dtype=bool) for key in best])


def candidates(world: World) -> Plans:
    """Masks that random draws come from, ``[M, P]``: all but ``all_off`` if P <= 10, else 512 or so, the same for everybody."""
    return candidates_of(world.pathways.num_pathways, _numpy(world, "candidate masks"))


def _numpy(world: World, *facts: Any) -> np.random.Generator:
    return np.random.default_rng(world.generator(*facts).initial_seed())


class _EachTheirOwn:
    """What searches draw for U users at once, row i by user i's own generator: nobody's draws depend on the others."""

    def __init__(self, draws: Sequence[np.random.Generator]) -> None:
        self._draws = draws

    def permuted(self, rows: NDArray[Any], axis: int) -> NDArray[Any]:
        return np.stack([draw.permuted(row, axis=axis - 1) for draw, row in zip(self._draws, rows, strict=True)])

    def random(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        return np.stack([draw.random(shape[1:]) for draw in self._draws])


@dataclass(frozen=True)
class MaskSearch(Chooser):
    """Abstract: spends a number of adaptations on every user, then keeps the mask of the highest reward, see :class:`Trials`.

    Attributes:
        budget: adaptations spent per user while searching, :data:`EACH` per mask; an odd one is not spent. A user with a single
            example, who is fitted to it and measured on it, is counted the same.
    """

    budget: int = 8

    scope: ClassVar[str] = "mask per user, by optimisation"
    trades: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.budget < EACH:
            raise ValueError(f"trying one mask takes {EACH} adaptations, the least budget; got {self.budget}.")

    @abstractmethod
    def search(self, trials: Trials) -> None:
        """Try at most ``trials.count`` masks per user; what is not spent goes to random ones."""

    def masks_tried(self, world: World) -> int:
        """T, with which the budget is spent; fewer only where there are no more masks."""
        return min(self.budget // EACH, len(candidates(world)))

    def tries(self, world: World) -> int:
        """See :meth:`Chooser.tries`."""
        return EACH * self.masks_tried(world)

    def choose(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Tensor:
        """See :meth:`Chooser.choose`."""
        trials = Trials(world, shown, cost_weight, self.masks_tried(world))
        self.search(trials)
        return torch.from_numpy(trials.finish())


@dataclass(frozen=True)
class RandomSearch(MaskSearch):
    """Random masks, each user's own, none twice.

    Source: Bergstra and Bengio 2012, "Random Search for Hyper-Parameter Optimization".
    """

    def search(self, trials: Trials) -> None:
        """See :meth:`MaskSearch.search`."""
        rng = cast(np.random.Generator, _EachTheirOwn(trials.draws))
        random_search(np.arange(len(trials.draws)), trials.candidates, trials, trials.count, rng)


@dataclass(frozen=True)
class GreedySearch(MaskSearch):
    """Forward selection from ``all_off``: one pathway more in every round, the best one, as long as it helps.

    Within a round pathways are tried in the user's own random order, which matters where the budget ends there. Where no
    pathway more helps, what is left of the budget goes to random masks, so that all searches spend the same.

    Source: Whitney 1971, "A Direct Method of Nonparametric Measurement Selection".
    """

    def search(self, trials: Trials) -> None:
        """See :meth:`MaskSearch.search`."""
        rng = cast(np.random.Generator, _EachTheirOwn(trials.draws))
        greedy_forward(np.arange(len(trials.draws)), trials.world.pathways.num_pathways, trials, trials.count, rng)

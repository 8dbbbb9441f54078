"""One mask for a whole population: ``best_static``, ``adapterdrop``.

Chosen by the mean validation reward of train users (a sample where they are very many). Shapes: U users, P pathways.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from agents.rivals import best_static, outcome_table, some_train_users, suffixes
from envs.oracles import Plans
from eval.group import Group
from eval.methods.base import Fitted
from eval.methods.pathway import Chooser
from eval.world import World


@dataclass(frozen=True)
class OneMask(Chooser):
    """Abstract: everybody has the same mask."""

    scope: ClassVar[str] = "mask per population"
    trades: ClassVar[bool] = True

    @abstractmethod
    def best(self, world: World, cost_weight: float) -> Plans:
        """The mask ``[P]``."""

    def fit(self, world: World, cost_weight: float) -> Fitted:
        """See :meth:`Method.fit`."""
        return Fitted({"mask": torch.from_numpy(self.best(world, cost_weight))})

    def choose(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Tensor:
        """See :meth:`Chooser.choose`."""
        return fitted.tensors["mask"].repeat(len(shown), 1)


@dataclass(frozen=True)
class BestStatic(OneMask):
    """The one mask with the highest mean validation reward of train users: what is to be gained without being personal."""

    def best(self, world: World, cost_weight: float) -> Plans:
        """See :func:`agents.rivals.best_static`."""
        return best_static(world.scenario, cost_weight, world.seed)


@dataclass(frozen=True)
class AdapterDrop(OneMask):
    """The last pathways alone, after Rücklé et al. 2021, "AdapterDrop: On the efficiency of adapters in transformers".

    Kept: adapters of the lowest layers are dropped, everything above stays, and adapters are trained with all numbers dropped
    (the meta-initialisation saw masks of all kinds, these among them). Not kept: their number is chosen by reward instead of
    being given, the head can go as well, and dropping is paid by the environment's cost instead of being timed.
    """

    def best(self, world: World, cost_weight: float) -> Plans:
        """The best suffix; of equal ones the shortest."""
        scenario, pathways = world.scenario, world.pathways.num_pathways
        users = some_train_users(scenario, np.random.default_rng(world.seed))
        masks = suffixes(pathways)
        table = outcome_table(scenario, users, masks, "validation", "how many adapters to drop")
        return masks[table.reward(cost_weight).mean(0).argmax()]

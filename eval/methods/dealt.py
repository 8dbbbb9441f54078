"""What is left of the policy's gain if its masks are nobody's own: ``random`` at its cost, ``shuffled`` among users.

Shapes: U users, V val users, P pathways.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from eval.group import Group
from eval.methods.base import Fitted
from eval.methods.pathway import Chooser
from eval.methods.ppo import Gating
from eval.tuned import settings_for
from eval.world import World


@dataclass(frozen=True)
class Dealt(Chooser):
    """Abstract: masks like the policy's on val users, drawn without looking at the user.

    Val users stand for the test users, of whom a method knows one at a time: masks dealt among either are alike.

    Attributes:
        draw: which of a user's masks, from 0; figures are averaged over :attr:`draws`.
    """

    draw: int = 0

    scope: ClassVar[str] = "mask per population"
    trades: ClassVar[bool] = True
    draws: ClassVar[int] = 10
    leans_on: ClassVar[tuple[str, ...]] = ("ppo",)

    @property
    def highest_weight(self) -> float:
        """See :attr:`Method.highest_weight`: the policy's."""
        return Gating().highest_weight

    def fit(self, world: World, cost_weight: float) -> Fitted:
        """See :meth:`Method.fit`: the policy's masks for val users, ``[V, P]``."""
        policy = Gating(**settings_for(world.env, world.kwargs, "ppo"))
        support = world.group("val", "support")
        return Fitted({"masks": policy.choose(world, policy.fit(world, cost_weight), support, cost_weight)})

    def choose(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Tensor:
        """See :meth:`Chooser.choose`."""
        draws = (world.generator(user, "dealt", self.draw) for user in shown.ids)
        return torch.stack([self.drawn(world, fitted.tensors["masks"], draw) for draw in draws])

    @abstractmethod
    def drawn(self, world: World, masks: Tensor, draw: torch.Generator) -> Tensor:
        """One user's mask ``[P]``, given the policy's for others ``[V, P]``."""


@dataclass(frozen=True)
class Shuffled(Dealt):
    """Somebody else's mask: as good as the policy's own if its masks are right on average, but not personal."""

    def drawn(self, world: World, masks: Tensor, draw: torch.Generator) -> Tensor:
        """See :meth:`Dealt.drawn`."""
        return masks[int(torch.randint(len(masks), (1,), generator=draw))]


@dataclass(frozen=True)
class RandomBits(Dealt):
    """Independent bits, all with the one probability at which the mean cost is the policy's."""

    def drawn(self, world: World, masks: Tensor, draw: torch.Generator) -> Tensor:
        """See :meth:`Dealt.drawn`."""
        probability = world.pathways.costs.probability(float(world.pathways.costs(masks).mean()))
        return torch.rand(masks.shape[1], generator=draw, dtype=torch.float64) < probability

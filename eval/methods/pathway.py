"""Methods on our pathways: some way to choose a mask, then a few gradient steps from the meta-initialisation under it.

Shapes: U users, N examples per user, P pathways, C classes.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backbones.pathways import Pathways, Weights
from eval.group import Group
from eval.methods.base import Fitted, Method, Predictor, Sizes
from eval.world import World
from meta.inner import MetaInit, adapt


class PathwayPredictor(Predictor):
    """U users' adapters along the population model.

    Args:
        pathways: along the model.
        weights: stacked, leading dimension U.
        masks: ``[U, P]`` bool.
        personal: ``[P]`` bool, pathways whose weights are each user's own (ANIL: the head alone); the others' are shared
            and are not stored per user.
        adaptations: see :class:`Predictor`.
    """

    def __init__(self, pathways: Pathways, weights: Weights, masks: Tensor, personal: Tensor, adaptations: int = 1) -> None:
        self.pathways, self.weights, self.personal = pathways, weights, personal
        self.masks: Tensor = pathways.executed(masks)
        self.adaptations = adaptations

    @torch.no_grad()
    def logits(self, asked: Group) -> Tensor:
        """See :meth:`Predictor.logits`."""
        return self.pathways.logits(asked.batch.frozen, self.weights, self.masks)

    @torch.no_grad()
    def serve(self, inputs: Tensor) -> Tensor:
        """See :meth:`Predictor.serve`."""
        return self.pathways.forward(inputs, self.weights, self.masks)

    @property
    def sizes(self) -> Sequence[Sizes]:
        """See :attr:`Predictor.sizes`: weights of 4 bytes, and a bit per pathway for the mask."""
        active = (self.masks * self.pathways.sizes).sum(1).tolist()
        trainable = (self.masks * self.personal * self.pathways.sizes).sum(1).tolist()
        mask = -(-self.masks.shape[1] // 8)
        return [Sizes(t, a, 4 * t + mask) for t, a in zip(trainable, active, strict=True)]


@dataclass(frozen=True)
class Chooser(Method):
    """A way to choose masks; adapters start from the environment's meta-initialisation."""

    @abstractmethod
    def choose(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Tensor:
        """Masks ``[U, P]`` bool, each user's by what that user shows."""

    def tries(self, world: World) -> int:
        """How often a user is adapted before the mask is settled, a look at the support's gradients included."""
        return 0

    def start(self, world: World, fitted: Fitted) -> MetaInit:
        """From where users adapt."""
        return world.init

    def adapt(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Predictor:
        """See :meth:`Method.adapt`."""
        masks = self.choose(world, fitted, shown, cost_weight)
        init = self.start(world, fitted)
        weights = adapt(world.pathways, init, shown.batch, masks)
        return PathwayPredictor(world.pathways, weights, masks, init.adapted, self.tries(world) + 1)


@dataclass(frozen=True)
class AllOn(Chooser):
    """Every pathway, meta-initialised and adapted: the dense rival (``all_on`` of the design)."""

    def choose(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Tensor:
        """See :meth:`Chooser.choose`."""
        return torch.ones(len(shown), world.pathways.num_pathways, dtype=torch.bool)

"""Dense rivals whose start was meta-learned in another way: ``meta_maml``, ``meta_fomaml``, ``meta_anil``, ``meta_reptile``.

Shapes: U users, P pathways.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from envs import known_spec
from envs.modelled import meta_settings
from eval.group import Group
from eval.methods.base import Fitted, Predictor, Sizes
from eval.methods.pathway import Chooser, PathwayPredictor
from eval.world import World
from meta.inner import MetaInit, adapt
from meta.learned import meta_initialisation


class MetaLearnedPredictor(PathwayPredictor):
    """U users' models with every pathway on, of which those that are not personal are everybody's."""

    @property
    def sizes(self) -> Sequence[Sizes]:
        """See :attr:`Predictor.sizes`."""
        return [replace(size, shared=size.active - size.trainable) for size in super().sizes]


@dataclass(frozen=True)
class MetaLearned(Chooser):
    """Abstract: every pathway on, adapted from a start that ``algorithm`` has learned.

    The start is learned as the environment learns its own (steps, rates, seed, masks), but for the algorithm; where that is
    the environment's, its start is taken and nothing is trained.

    Attributes:
        dense: meta-train everybody with every pathway on, as users will be personalised, instead of under the masks of all
            densities that starts for masks need.
    """

    dense: bool = False

    algorithm: ClassVar[str]
    scope: ClassVar[str] = "user"
    space: ClassVar = {"dense": (False, True)}

    def fit(self, world: World, cost_weight: float) -> Fitted:
        """See :meth:`Method.fit`. The start is kept in the world's folder and found again there."""
        given = {"seed": world.seed, **known_spec(world.env).kwargs, **world.kwargs}
        own = meta_settings(given)
        if own.algorithm == self.algorithm and not self.dense and not given.get("init"):
            return Fitted(world.init.tensors())
        # ANIL never adapts the body: if its outputs stayed at zero there would be nothing to learn in it.
        neutral = own.neutral and self.algorithm != "anil"
        wanted = replace(own, algorithm=self.algorithm, neutral=neutral, all_on=1.0 if self.dense else own.all_on)
        return Fitted(meta_initialisation(world.data, wanted, world.folder).tensors())

    def choose(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Tensor:
        """See :meth:`Chooser.choose`."""
        return torch.ones(len(shown), world.pathways.num_pathways, dtype=torch.bool)

    def start(self, world: World, fitted: Fitted) -> MetaInit:
        """See :meth:`Chooser.start`."""
        return MetaInit.from_tensors(fitted.tensors)

    def adapt(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Predictor:
        """See :meth:`Method.adapt`."""
        init, masks = self.start(world, fitted), self.choose(world, fitted, shown, cost_weight)
        return MetaLearnedPredictor(world.pathways, adapt(world.pathways, init, shown.batch, masks), masks, init.adapted)


@dataclass(frozen=True)
class MetaMaml(MetaLearned):
    """Finn et al. 2017, "Model-agnostic meta-learning for fast adaptation of deep networks", second order.

    As in MAML++ (Antoniou et al. 2019) the inner learning rates are learned too, here one per pathway and step.
    """

    algorithm: ClassVar[str] = "maml"


@dataclass(frozen=True)
class MetaFomaml(MetaLearned):
    """MAML's first-order form (Finn et al. 2017): the inner gradients count as constants. Rates are learned as for MAML."""

    algorithm: ClassVar[str] = "fomaml"


@dataclass(frozen=True)
class MetaAnil(MetaLearned):
    """Raghu et al. 2020, "Rapid learning or feature reuse? Towards understanding the effectiveness of MAML".

    The adapters are meta-learned and shared by all, a user changes the head alone. An environment's ``neutral`` start does not
    apply to it.
    """

    algorithm: ClassVar[str] = "anil"


@dataclass(frozen=True)
class MetaReptile(MetaLearned):
    """Nichol et al. 2018, "On first-order meta-learning algorithms": the start moves to where users end.

    Train users are adapted on support and query together; the inner rates stay where the environment starts them. The outer
    step is Adam's, as in the other algorithms here, not plain interpolation.
    """

    algorithm: ClassVar[str] = "reptile"

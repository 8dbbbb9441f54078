"""``feddpa``: a joint and a personal adapter, weighted for every example by its likeness to the user's own.

Shapes: U users, N examples per user, F features, C classes, P pathways.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from eval.group import Group
from eval.methods.base import Fitted, Method, Predictor, Sizes
from eval.methods.joint import SharedPredictor, joint_weights
from eval.methods.pathway import PathwayPredictor
from eval.methods.readout import Scale, train_readouts
from eval.world import World
from meta.inner import MetaInit, adapt
from users.batch import Batch


@dataclass(frozen=True)
class Likeness:
    """How much U users' own examples resemble others, by the frozen model's readout features.

    Attributes:
        centre: ``[F]``, train users' mean, from which directions are taken. own: ``[U, F]``, the mean direction of the
            user's support; the scalar product with it is the mean cosine over the support.
    """

    centre: Tensor
    own: Tensor

    @staticmethod
    def of(support: Batch, centre: Tensor) -> "Likeness":
        """To the users' support examples."""
        directions = normalize(support.frozen.sites[-1] - centre, dim=-1)
        return Likeness(centre, (directions * support.weights[..., None]).sum(1))

    def weights_of(self, features: Tensor, largest: float) -> Tensor:
        """The personal adapter's weight ``[U, N]`` at features ``[U, N, F]``: ``largest`` x mean cosine, within 0..1."""
        cosine = (normalize(features - self.centre, dim=-1) @ self.own[..., None])[..., 0]
        return (largest * cosine).clamp(0, 1)


class DualPredictor(Predictor):
    """U users' joint and personal models, mixed.

    Args:
        joint, personal: of the same users, every pathway on.
        likeness: to the users' support. largest: see :class:`FedDPA`.
    """

    adaptations = 1

    def __init__(self, joint: PathwayPredictor, personal: PathwayPredictor, likeness: Likeness, largest: float) -> None:
        self.joint, self.personal, self.likeness, self.largest = joint, personal, likeness, largest
        self.masks = personal.masks

    def weights_of(self, asked: Group) -> Tensor:
        """The personal model's weight at every example, ``[U, N]`` within 0..1; the rest is the joint one's."""
        return self.likeness.weights_of(asked.batch.frozen.sites[-1], self.largest)

    def logits(self, asked: Group) -> Tensor:
        """See :meth:`Predictor.logits`."""
        return torch.lerp(self.joint.logits(asked), self.personal.logits(asked), self.weights_of(asked)[..., None])

    @torch.no_grad()
    def serve(self, inputs: Tensor) -> Tensor:
        """See :meth:`Predictor.serve`. Three passes: joint, personal, and the frozen model for the likeness."""
        features = self.personal.pathways.model.backbone(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])
        weight = self.likeness.weights_of(features, self.largest)[..., None]
        return torch.lerp(self.joint.serve(inputs), self.personal.serve(inputs), weight)

    @property
    def sizes(self) -> Sequence[Sizes]:
        """See :attr:`Predictor.sizes`: both adapters run; the user's own and the support's mean direction are kept."""
        width = self.likeness.own.shape[1]
        both = zip(self.joint.sizes, self.personal.sizes, strict=True)
        return [Sizes(p.trainable, j.active + p.active, 4 * (p.trainable + width)) for j, p in both]


@dataclass(frozen=True)
class FedDPA(Method):
    """A joint and a personal set of adapters; the more an example resembles the user's own, the more the personal one counts.

    Source: Yang, Long, Shen, Jiang, Blumenstein 2024, "Dual-personalizing adapter for federated foundation models" (the variant
    that trains the joint adapter first and starts the personal one from it). Kept: two adapters, the weight
    ``alpha = w_max * mean cosine`` between the example and the user's training examples, with the paper's sign: likeness
    raises the *personal* weight (in the released code it raises the joint one). Not kept: no federation, the joint
    adapters are those of ``joint``; the personal ones take a few gradient steps on the support; all support examples are
    compared instead of five; features are the frozen model's readout, with train users' mean taken away (else everything
    resembles everything), and a negative mean cosine counts as 0. Outputs are mixed,
    ``(1 - alpha) * joint logits + alpha * personal logits``, where the paper mixes what the two adapters add to each layer: the
    same for heads and side adapters, and the same up to the nonlinearity of later blocks for inline ones.

    Attributes:
        joint_steps, joint_rate: of the joint adapters, see :class:`eval.methods.joint.Joint`.
        steps, rate: full-batch gradient steps of the personal ones, and their learning rate.
        largest: w_max, the weight at a mean cosine of 1. Centred features of different classes point away from each other, so
            that mean cosines are small; values above 1 make up for that, and alpha ends at 1.
    """

    joint_steps: int = 400
    joint_rate: float = 1e-3
    steps: int = 10
    rate: float = 0.1
    largest: float = 0.5

    length: ClassVar[str | None] = "steps"
    space: ClassVar = {"rate": (0.03, 0.1, 0.3, 1.0), "steps": (5, 10, 20), "largest": (0.5, 1.0, 2.0, 4.0)}

    def fit(self, world: World, cost_weight: float) -> Fitted:
        """See :meth:`Method.fit`."""
        weights, facts = joint_weights(world, self.joint_steps, self.joint_rate)
        return Fitted({"centre": Scale.of(train_readouts(world)[0]).centre, **weights}, facts)

    def adapt(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Predictor:
        """See :meth:`Method.adapt`."""
        shared = {key: tensor for key, tensor in fitted.tensors.items() if key != "centre"}
        joint = SharedPredictor(world, shared, len(shown))
        count = world.pathways.num_pathways
        start = MetaInit(shared, torch.full((self.steps, count), self.rate), torch.ones(count, dtype=torch.bool))
        own = adapt(world.pathways, start, shown.batch, joint.masks)
        personal = PathwayPredictor(world.pathways, own, joint.masks, start.adapted)
        return DualPredictor(joint, personal, Likeness.of(shown.batch, fitted.tensors["centre"]), self.largest)

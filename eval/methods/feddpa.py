"""``feddpa``: a joint and a personal adapter, weighted for every example by its likeness to the user's own.

Shapes: U users, N examples per user, F features, C classes, P pathways.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from backbones.pathways import Weights
from envs.modelled import SAMPLE
from eval.group import Group
from eval.methods.base import Fitted, Method, Predictor, Sizes
from eval.methods.joint import Joint, SharedPredictor, for_all, joint_weights
from eval.methods.pathway import PathwayPredictor
from eval.methods.readout import Scale, train_readouts
from eval.tuned import settings_for
from eval.world import World
from meta.inner import user_loss
from users.batch import Batch

EPSILON = 1e-6
"""Adam's. Derivatives that are rounding errors must not become whole steps, which would depend on who else is in the batch."""


@dataclass(frozen=True)
class Likeness:
    """How much U users' own examples resemble others, by the frozen model's readout features.

    Attributes:
        centre: ``[F]``, from which directions are taken. own: ``[U, F]``, the mean direction of the user's support, divided by
            the unit: the scalar product with a direction is the mean cosine over the support, in that unit.
    """

    centre: Tensor
    own: Tensor

    @staticmethod
    def of(support: Batch, centre: Tensor, unit: float = 1.0) -> "Likeness":
        """To the users' support examples."""
        directions = normalize(support.frozen.sites[-1] - centre, dim=-1)
        return Likeness(centre, (directions * support.weights[..., None]).sum(1) / unit)

    def to(self, features: Tensor) -> Tensor:
        """Of examples with features ``[U, N, F]``, ``[U, N]``."""
        return (normalize(features - self.centre, dim=-1) @ self.own[..., None])[..., 0]

    def weights_of(self, features: Tensor, largest: float) -> Tensor:
        """The personal adapter's weight ``[U, N]``, within 0..``largest``, at features ``[U, N, F]``."""
        return largest * self.to(features).clamp(0, 1)


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
        """The personal model's weight at every example, ``[U, N]`` within 0..w_max; the rest is the joint one's."""
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
        return [Sizes(p.trainable, j.active + p.active, 4 * (p.trainable + width), j.shared) for j, p in both]


def usual_likeness(world: World, centre: Tensor) -> float:
    """Mean cosine of train users' query examples to their own support, of directions from ``centre``; at least a thousandth.

    Not that of support examples to each other: every one of them is exactly like itself.
    """
    first = SAMPLE if world.data.population.lazy else None
    support, query = (world.data.readouts("train", role, first) for role in ("support", "query"))
    found = Likeness.of(support, centre).to(query.frozen.sites[-1])
    return max(float((found * query.weights).sum(1).mean()), 1e-3)


@dataclass(frozen=True)
class FedDPA(Method):
    """A joint and a personal set of adapters; the more an example resembles the user's own, the more the personal one counts.

    Source: Yang, Long, Shen, Jiang, Blumenstein 2024, "Dual-personalizing adapter for federated foundation models" (the variant
    that trains the joint adapter first and starts the personal one from it). Kept: two adapters, the weight
    ``alpha = w_max * mean cosine`` between the example and the user's training examples, with the paper's sign: likeness
    raises the *personal* weight (in the released code it raises the joint one). Not kept: no federation, the joint
    adapters are those of ``joint``; the personal ones take a few gradient steps on the support; all support examples are
    compared instead of five; features are the frozen model's readout, by default with train users' mean taken away (else
    everything resembles everything); a negative mean cosine counts as 0; and its unit is what train users' query examples have
    to their own support on average, a few hundredths where centred features of several classes point away from each other.
    Outputs are mixed, ``(1 - alpha) * joint logits + alpha * personal logits``, where the paper mixes what the two adapters add
    to each layer: the same for heads and side adapters, the same up to later blocks' nonlinearity for inline ones.

    Attributes:
        joint_steps, joint_rate: of the joint adapters, see :class:`eval.methods.joint.Joint`; None: as that method was tuned.
        steps, rate: full-batch steps of Adam for the personal ones, and their learning rate.
        largest: w_max, reached by examples as much like the user's own as a user's usually are.
        centred: whether train users' mean is taken away from features (the paper: no).
    """

    joint_steps: int | None = None
    joint_rate: float | None = None
    steps: int = 10
    rate: float = 3e-3
    largest: float = 0.5
    centred: bool = True

    length: ClassVar[str | None] = "steps"
    leans_on: ClassVar[tuple[str, ...]] = ("joint",)
    space: ClassVar = {
        "rate": (1e-3, 3e-3, 1e-2),
        "steps": (5, 10, 20, 40),
        "largest": (0.25, 0.5, 0.75, 1.0),
        "centred": (True, False),
    }

    def fit(self, world: World, cost_weight: float) -> Fitted:
        """See :meth:`Method.fit`."""
        tuned = Joint(**settings_for(world.env, world.kwargs, "joint"))
        weights, facts = joint_weights(world, self.joint_steps or tuned.steps, self.joint_rate or tuned.rate)
        centre = Scale.of(train_readouts(world)[0]).centre
        centre = centre if self.centred else torch.zeros_like(centre)
        return Fitted({"centre": centre, **weights}, {**facts, "unit": usual_likeness(world, centre)})

    def adapt(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Predictor:
        """See :meth:`Method.adapt`."""
        shared = {key: tensor for key, tensor in fitted.tensors.items() if key != "centre"}
        joint = SharedPredictor(world, shared, len(shown))
        # Inline, the network's kinks make much of rounding errors, which differ with the company: one user at a time.
        everybody = range(len(shown))
        chunks = [[*everybody]] if world.pathways.pooled else [[user] for user in everybody]
        parts = [self._personal(world, shared, shown.rows(users).batch) for users in chunks]
        own = {key: torch.cat([part[key] for part in parts]) for key in shared}
        each = torch.ones(world.pathways.num_pathways, dtype=torch.bool)
        personal = PathwayPredictor(world.pathways, own, joint.masks, each)
        likeness = Likeness.of(shown.batch, fitted.tensors["centre"], fitted.facts["unit"])
        return DualPredictor(joint, personal, likeness, self.largest)

    def _personal(self, world: World, shared: Weights, support: Batch) -> Weights:
        """Some users' weights after a few steps from the shared ones; Adam works element by element, so users stay apart."""
        weights = {key: weight.clone().requires_grad_() for key, weight in for_all(shared, len(support)).items()}
        on = torch.ones(len(support), world.pathways.num_pathways, dtype=torch.bool)
        optimiser = torch.optim.Adam(weights.values(), lr=self.rate, eps=EPSILON)
        for _ in range(self.steps):
            optimiser.zero_grad()
            with torch.enable_grad():
                user_loss(world.pathways.logits(support.frozen, weights, on), support).sum().backward()
            optimiser.step()
        return {key: weight.detach() for key, weight in weights.items()}

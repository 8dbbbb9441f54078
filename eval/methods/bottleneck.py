"""``bottleneck``: dense adapters after every block, as people use them: a random start, Adam, nothing meta-learned.

Shapes: U users, N examples per user, P pathways, C classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from backbones.inline import InlinePathways
from backbones.pathways import Frozen, Weights
from eval.group import Group
from eval.methods.base import Fitted, Method, Predictor, Sizes
from eval.methods.finetune import adam
from eval.world import World
from meta.inner import user_loss
from users.batch import Batch, side_by_side

ROOM = 1e9
"""Bytes that activations of users who are trained together may take, roughly."""
LIVES = 8
"""Tensors of a hidden state's size that a block keeps for its gradient, roughly."""


@dataclass(frozen=True)
class Bottleneck(Method):
    """An adapter after every block and the classifier, all on, trained for each user from the same near-identity start.

    Source: Houlsby et al. 2019, "Parameter-efficient transfer learning for NLP". Kept: one adapter behind attention and one
    behind the feed-forward part of every layer, near the identity at first. Other than there: it stands behind the layer norm,
    where our pathways do, it has a ReLU, and layer norms are not trained along. In a ResNet one stands behind every block.

    Users are trained side by side: Adam treats every number alone and the loss is a sum over users, so nobody's steps
    depend on who else is there. Below the first adapter nothing is run again or differentiated.

    Attributes:
        rank: width of an adapter's middle. classifier: whether the classifier is trained as well.
        rate, steps, batch, low_precision: as of :class:`eval.methods.finetune.FineTuned`.
    """

    rank: int = 16
    classifier: bool = True
    rate: float = 3e-3
    steps: int = 20
    batch: int = 32
    low_precision: bool = False

    space: ClassVar = {"rate": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "rank": (4, 8, 16, 32), "steps": (5, 10, 20, 40)}
    length: ClassVar[str | None] = "steps"
    together: ClassVar[int] = 16
    through_backbone: ClassVar[bool] = True

    def adapt(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Predictor:
        """See :meth:`Method.adapt`."""
        pathways = InlinePathways(world.model, self.rank)
        draw = world.generator("bottleneck")
        count = pathways.num_pathways - (not self.classifier)
        start = {k: v for p in range(count) for k, v in pathways.initial(draw, p).items()}
        found = [self._trained(world, pathways, start, shown.rows(users)) for users in self._sets(pathways, shown)]
        weights = {key: torch.cat([each[key] for each in found]) for key in start}
        return BottleneckPredictor(self, world, pathways, weights)

    def _sets(self, pathways: InlinePathways, shown: Group) -> Iterator[list[int]]:
        """Users, in order, as many at a time as there is :data:`ROOM` for."""
        some: list[int] = []
        widest = 0
        for user, count in enumerate(shown.counts):
            sites = pathways.frozen(shown.inputs(user)[:1]).sites
            width = min(count, self.batch) * sum(site.numel() for site in sites) * 4 * LIVES
            if some and max(widest, width) * (len(some) + 1) > ROOM:
                yield some
                some, widest = [], 0
            some, widest = [*some, user], max(widest, width)
        yield some

    def _trained(self, world: World, pathways: InlinePathways, start: Weights, shown: Group) -> Weights:
        """Stacked weights of some users."""
        users = replace(shown, batch=hidden_states(world, pathways, shown))
        weights = {key: value.repeat(len(users), *[1] * value.dim()).requires_grad_() for key, value in start.items()}
        draws = [world.generator(name, "batches") for name in shown.ids]
        optimiser = adam(weights.values(), self.rate)
        some = users.batch
        for _ in range(self.steps):
            if max(shown.counts) > self.batch:
                orders = [torch.randperm(n, generator=draw) for n, draw in zip(shown.counts, draws, strict=True)]
                some = users.pick([order[: self.batch] for order in orders]).batch
            optimiser.zero_grad()
            with torch.enable_grad():
                user_loss(self.run(pathways, some.frozen, weights), some).sum().backward()
            optimiser.step()
        return {key: value.detach() for key, value in weights.items()}

    def gates(self, pathways: InlinePathways, users: int) -> Tensor:
        """``[U, P]`` bool."""
        gates = torch.ones(users, pathways.num_pathways, dtype=torch.bool)
        gates[:, -1] = self.classifier
        return gates

    def run(self, pathways: InlinePathways, frozen: Frozen, weights: Weights) -> Tensor:
        """Logits ``[U, N, C]`` float32."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.low_precision):
            return pathways.logits(frozen, weights, self.gates(pathways, frozen.sites[-1].shape[0])).float()


def hidden_states(world: World, pathways: InlinePathways, group: Group) -> Batch:
    """A group's examples with the hidden states that inline adapters read; computed, unless the world keeps just these."""
    if isinstance(world.pathways, InlinePathways):
        return group.batch
    tables = []
    for user in range(len(group)):
        tables.append(replace(pathways.frozen(group.inputs(user)), offset=group.offset(user)))
    return side_by_side(Frozen.cat(tables), group.examples, torch.arange(sum(group.counts)))


class BottleneckPredictor(Predictor):
    """U users' adapters.

    Args:
        method: that trained them. world: whose model they stand along. pathways: inline. weights: stacked, leading dimension U.
    """

    adaptations = 1

    def __init__(self, method: Bottleneck, world: World, pathways: InlinePathways, weights: Weights) -> None:
        self.method, self.world, self.pathways, self.weights = method, world, pathways, weights
        self.users = len(next(iter(weights.values())))

    @torch.no_grad()
    def logits(self, asked: Group) -> Tensor:
        """See :meth:`Predictor.logits`. Users one by one, which bounds memory."""
        found = asked.batch.labels.new_zeros((*asked.batch.labels.shape, self.world.model.num_classes)).float()
        for user, count in enumerate(asked.counts):
            batch = hidden_states(self.world, self.pathways, asked.rows([user]))
            found[user, :count] = self.method.run(self.pathways, batch.frozen, self._of(user))[0]
        return found

    @torch.no_grad()
    def serve(self, inputs: Tensor) -> Tensor:
        """See :meth:`Predictor.serve`."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.method.low_precision):
            return self.pathways.forward(inputs, self.weights, self.method.gates(self.pathways, self.users)).float()

    def _of(self, user: int) -> Weights:
        return {key: value[user : user + 1] for key, value in self.weights.items()}

    @property
    def sizes(self) -> Sequence[Sizes]:
        """See :attr:`Predictor.sizes`."""
        count = sum(value[0].numel() for value in self.weights.values())
        return [Sizes(count, count, 4 * count)] * self.users

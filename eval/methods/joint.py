"""``joint``: one set of adapters for everybody, trained on all train users' examples together; nothing is personal.

Shapes: U users, M examples in a step, P pathways.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from backbones.pathways import Weights
from envs.modelled import SAMPLE
from eval.group import Group
from eval.methods.base import Fitted, Method, Predictor, Sizes
from eval.methods.pathway import PathwayPredictor
from eval.world import World
from meta.inner import measure, user_loss
from users.batch import Batch

USERS, EXAMPLES = 8, 64
"""Of a step: train users who are drawn, and at most so many of their examples in each role."""
TOGETHER = 16
"""Val users who are measured together."""
LOOKS, PATIENCE = 20, 5
"""How often val users are looked at, and after how many looks without a gain training ends."""
ROLES = ("support", "query")


class SharedPredictor(PathwayPredictor):
    """One set of weights for U users, every pathway on.

    Args:
        world: whose pathways. weights: not stacked. users: U.
    """

    def __init__(self, world: World, weights: Weights, users: int) -> None:
        count = world.pathways.num_pathways
        on, none = torch.ones(users, count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
        super().__init__(world.pathways, for_all(weights, users), on, none, adaptations=0)

    @property
    def sizes(self) -> Sequence[Sizes]:
        """See :attr:`Predictor.sizes`: the adapters run for every user, but are nobody's own; there is no mask to keep."""
        everything = int(self.pathways.sizes.sum())
        return [Sizes(0, everything, 0, shared=everything)] * len(self.masks)


@dataclass(frozen=True)
class Joint(Method):
    """Adam on train users' support and query examples pooled, no inner loop, no adaptation: what is not personal in the gain.

    Source: the global adapter of Yang et al. 2024, "Dual-personalizing adapter for federated foundation models", without a
    federation.

    Attributes:
        steps: at most; the weights with which val users' query examples are answered best are kept, and training ends when
            that has not changed for a quarter of the steps.
        rate: Adam's learning rate.
    """

    steps: int = 400
    rate: float = 1e-3

    scope: ClassVar[str] = "nobody"
    length: ClassVar[str | None] = "steps"
    space: ClassVar = {"steps": (100, 400, 1600), "rate": (3e-4, 1e-3, 3e-3, 1e-2)}

    def fit(self, world: World, cost_weight: float) -> Fitted:
        """See :meth:`Method.fit`."""
        return Fitted(*joint_weights(world, self.steps, self.rate))

    def adapt(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Predictor:
        """See :meth:`Method.adapt`."""
        return SharedPredictor(world, fitted.tensors, len(shown))


def for_all(weights: Weights, users: int) -> Weights:
    """One set of weights with a leading dimension of ``users``, without copies."""
    return {key: weight.expand(users, *weight.shape) for key, weight in weights.items()}


def joint_weights(world: World, steps: int, rate: float) -> tuple[Weights, dict[str, Any]]:
    """One set of all pathways' weights, trained on train users, and the number of ``steps`` that val users chose; kept on disk.

    Args:
        world: whose users. Random start and batches follow from its seed.
        steps: see :class:`Joint`.
        rate: likewise.
    """
    facts = {"steps": steps, "rate": rate, "users": USERS, "examples": EXAMPLES, "looks": LOOKS, "patience": PATIENCE}
    return world.kept("joint", facts, lambda: _train(world, steps, rate))


def _train(world: World, steps: int, rate: float) -> tuple[Weights, dict[str, Any]]:
    weights = {key: weight.requires_grad_() for key, weight in world.pathways.start(world.seed).items()}
    optimiser = torch.optim.Adam(weights.values(), lr=rate)
    every, best, since = max(1, steps // LOOKS), (*_score(world, weights), 0, _copy(weights)), 0
    with tqdm(total=steps, desc="joint adapters", unit="step") as bar:
        for step, batches in zip(range(1, steps + 1), _batches(world), strict=False):
            with torch.enable_grad():
                loss = _loss(world, weights, batches)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            bar.update()
            if step % every and step != steps:
                continue
            score, since = _score(world, weights), since + 1
            bar.set_postfix(val_accuracy=f"{score[0]:.3f}", refresh=False)
            if score > best[:2]:
                best, since = (*score, step, _copy(weights)), 0
            if since >= PATIENCE:
                break
    return best[3], {"steps": best[2]}


def _copy(weights: Weights) -> Weights:
    return {key: weight.detach().clone() for key, weight in weights.items()}


def _batches(world: World) -> Iterator[list[Batch]]:
    """Without end: a few train users' examples, as those of a single user ``[1, M]``, one batch per role."""
    draw, count = world.generator("joint"), len(world.data.population.train)
    while True:
        users = torch.randperm(count, generator=draw)[:USERS]
        yield [_pooled(world.data.rows("train", role, users), draw) for role in ROLES]


def _pooled(batch: Batch, draw: torch.Generator) -> Batch:
    present = batch.weights > 0
    index, labels = batch.index[present], batch.labels[present]
    some = torch.randperm(len(labels), generator=draw)[:EXAMPLES]
    return Batch(batch.table, index[some][None], labels[some][None], torch.full((1, len(some)), 1 / len(some)))


def _loss(world: World, weights: Weights, batches: Sequence[Batch]) -> Tensor:
    """Mean cross-entropy over all examples of the batches."""
    on, one = torch.ones(1, world.pathways.num_pathways, dtype=torch.bool), for_all(weights, 1)
    each = [user_loss(world.pathways.logits(batch.frozen, one, on), batch)[0] * batch.labels.numel() for batch in batches]
    return torch.stack(each).sum() / sum(batch.labels.numel() for batch in batches)


@torch.no_grad()
def _score(world: World, weights: Weights) -> tuple[float, float]:
    """Val users' mean query accuracy, and mean log-likelihood where accuracies are equal."""
    part = world.data.part("val", "query", SAMPLE if world.data.population.lazy else None)
    found = []
    for users in torch.arange(len(part)).split(TOGETHER):
        on = torch.ones(len(users), world.pathways.num_pathways, dtype=torch.bool)
        found.append(torch.stack(measure(world.pathways, for_all(weights, len(users)), on, part.rows(users))))
    accuracy, loss = torch.cat(found, 1).double().mean(1).tolist()
    return accuracy, -loss

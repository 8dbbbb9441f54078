"""What methods share that look at readout features and population logits alone: they never run the backbone to personalise.

Shapes: U users, N examples per user, F features, C classes.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from backbones.base import PopulationModel
from backbones.pathways import population_logits
from envs.modelled import SAMPLE
from eval.group import Group
from eval.methods.base import Predictor
from eval.world import World
from meta.inner import user_loss
from users.batch import Batch

Option = TypeVar("Option")
TOGETHER = 64
"""Val users that are fitted and measured together."""


class ReadoutPredictor(Predictor):
    """U users' changes of the population model's logits, as functions of readout features.

    Args:
        model: the population model, frozen and shared.
    """

    adaptations = 1

    def __init__(self, model: PopulationModel) -> None:
        self.model = model

    @abstractmethod
    def change(self, features: Tensor) -> Tensor:
        """What is added to the logits, ``[U, N, C]`` or of a shape that is broadcast to it, at features ``[U, N, F]``."""

    @torch.no_grad()
    def logits(self, asked: Group) -> Tensor:
        """See :meth:`Predictor.logits`."""
        return self.on(asked.batch)

    @torch.no_grad()
    def on(self, batch: Batch) -> Tensor:
        """Logits ``[U, N, C]`` of a batch of the same users' examples."""
        return population_logits(self.model, batch.frozen) + self.change(batch.frozen.sites[-1])

    @torch.no_grad()
    def serve(self, inputs: Tensor) -> Tensor:
        """See :meth:`Predictor.serve`."""
        features = self.model.backbone(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])
        return torch.nn.functional.linear(features, self.model.weight, self.model.bias) + self.change(features)


@dataclass(frozen=True)
class Scale:
    """Train users' readout features in two facts, so that one setting suits backbones of any scale.

    Attributes:
        centre: ``[F]``, their mean. spread: ``[]``, their root mean square distance from it.
    """

    centre: Tensor
    spread: Tensor

    @staticmethod
    def of(features: Tensor) -> "Scale":
        """That of features ``[M, F]``."""
        centre = features.mean(0)
        return Scale(centre, (features - centre).square().sum(1).mean().sqrt().clamp_min(1e-12))

    def __call__(self, features: Tensor) -> Tensor:
        """Features ``[..., F]`` centred, their mean square length 1."""
        return (features - self.centre) / self.spread


def train_readouts(world: World, role: str = "support") -> tuple[Tensor, Tensor]:
    """Train users' features ``[M, F]`` and labels ``[M]``, every example once per user (of the first users of very many)."""
    batch = world.data.readouts("train", role, SAMPLE if world.data.population.lazy else None)
    present = batch.weights > 0
    return batch.frozen.sites[-1][present], batch.labels[present]


def best_on_val(
    world: World, options: Sequence[Option], predict: Callable[[Option, Batch], ReadoutPredictor], label: str
) -> Option:
    """The option under which val users' query examples are answered best: by accuracy, where equal by likelihood.

    Args:
        world: whose val users.
        options: tried one after the other.
        predict: the option and val users' support to their models.
        label: of the progress bar.
    """
    support, query = (world.data.readouts("val", role) for role in ("support", "query"))
    scores = [_score(support, query, partial(predict, option)) for option in tqdm(options, label, unit="option")]
    return options[max(range(len(options)), key=lambda place: scores[place])]


def _score(support: Batch, query: Batch, predict: Callable[[Batch], ReadoutPredictor]) -> tuple[float, float]:
    """Mean accuracy and mean log-likelihood over users."""
    hits, losses = [], []
    for users in torch.arange(len(support)).split(TOGETHER):
        asked = query.rows(users)
        logits = predict(support.rows(users)).on(asked)
        hits.append(((logits.argmax(-1) == asked.labels) * asked.weights.double()).sum(1))
        losses.append(user_loss(logits, asked))
    return float(torch.cat(hits).mean()), -float(torch.cat(losses).mean())

"""``prototypes``: the nearest class mean, each user's own.

Shapes: U users, N examples per user, F features, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from backbones.base import PopulationModel
from eval.group import Group
from eval.methods.base import Fitted, Method, Predictor, Sizes
from eval.methods.readout import ReadoutPredictor, Scale, best_on_val, train_readouts
from eval.world import World
from users.batch import Batch

STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
PRIORS = (0.0, 1.0, 5.0)
OPTIONS = tuple((strength, prior) for strength in STRENGTHS for prior in PRIORS)
TEMPERATURES = (1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 32.0)


class NearestMeans(ReadoutPredictor):
    """U users' class means.

    Args:
        model: the population model.
        scale: in which distances are measured.
        means: ``[U, C, F]``, so scaled. own: ``[U, C]`` bool, which of them are the user's own.
        strength: of the squared distance. temperature: of the sum.
    """

    def __init__(
        self, model: PopulationModel, scale: Scale, means: Tensor, own: Tensor, strength: float, temperature: float
    ) -> None:
        super().__init__(model)
        self.scale, self.means, self.own, self.strength, self.temperature = scale, means, own, strength, temperature

    def change(self, features: Tensor) -> Tensor:
        """See :meth:`ReadoutPredictor.change`. Of the squared distance, what is the same for all classes is left out."""
        along = self.scale(features) @ self.means.transpose(1, 2)
        near = 2 * along - self.means.square().sum(-1)[:, None]
        usual = torch.nn.functional.linear(features, self.model.weight, self.model.bias)
        return (usual + self.strength * near) / self.temperature - usual

    @property
    def sizes(self) -> Sequence[Sizes]:
        """See :attr:`Predictor.sizes`: the user's own means, and an index for each."""
        width = self.means.shape[2]
        return [Sizes(n * width, n * width, 4 * n * (width + 1)) for n in self.own.sum(1).tolist()]


@dataclass(frozen=True)
class Prototypes(Method):
    """The nearest class mean of a user's support on readout features, added to the population model's logits.

    Source: Snell, Swersky, Zemel 2017, "Prototypical networks for few-shot learning". Kept: a class is the mean of its support
    examples, its logit minus the squared Euclidean distance. Not kept: the embedding is the frozen backbone's instead of one
    trained for this. Ours: ``logits = (population logits - strength * distance^2) / temperature``; with a large
    strength only the distances speak, as in the paper. A user's mean of a class is drawn towards train users' mean of it as
    if that were ``prior`` more examples, and is train users' mean where the support lacks the class (their mean of everything,
    where even they lack it). Strength and prior are chosen on val users, and then the temperature, by accuracy and where that
    is the same by likelihood: it changes answers only through what cross-fitting adds to the logits, which it does not divide.
    """

    def fit(self, world: World, cost_weight: float) -> Fitted:
        """See :meth:`Method.fit`."""
        both = [train_readouts(world, role) for role in ("support", "query")]
        features, labels = (torch.cat(parts) for parts in zip(*both, strict=True))
        scale = Scale.of(features)
        counts, sums = _sums(scale(features)[None], labels[None], torch.ones(1, len(labels)), world.model.num_classes)
        usual = (sums / counts.clamp_min(1)[..., None])[0]

        def predict(option: tuple[float, float], shown: Batch) -> NearestMeans:
            return nearest_means(world.model, scale, usual, shown, *option)

        strength, prior = best_on_val(world, OPTIONS, predict, "strength and prior of prototypes")

        def tempered(temperature: float, shown: Batch) -> NearestMeans:
            return nearest_means(world.model, scale, usual, shown, strength, prior, temperature)

        temperature = best_on_val(world, TEMPERATURES, tempered, "temperature of prototypes")
        tensors = {"centre": scale.centre, "spread": scale.spread, "usual": usual}
        return Fitted(tensors, {"strength": strength, "prior": prior, "temperature": temperature})

    def adapt(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Predictor:
        """See :meth:`Method.adapt`."""
        scale = Scale(fitted.tensors["centre"], fitted.tensors["spread"])
        return nearest_means(world.model, scale, fitted.tensors["usual"], shown.batch, **fitted.facts)


def nearest_means(
    model: PopulationModel,
    scale: Scale,
    usual: Tensor,
    shown: Batch,
    strength: float,
    prior: float,
    temperature: float = 1.0,
) -> NearestMeans:
    """Every user's class means from their support and the ``usual`` ones ``[C, F]``."""
    features = scale(shown.frozen.sites[-1])
    counts, sums = _sums(features, shown.labels, (shown.weights > 0).float(), model.num_classes)
    counts = counts[..., None]
    own = (sums + prior * usual) / (counts + prior).clamp_min(1e-12)
    return NearestMeans(model, scale, torch.where(counts > 0, own, usual), counts[..., 0] > 0, strength, temperature)


def _sums(features: Tensor, labels: Tensor, present: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Every class's number of examples ``[U, C]`` and the sum of their features ``[U, C, F]``."""
    member = one_hot(labels, classes) * present[..., None]
    return member.sum(1), member.transpose(1, 2) @ features

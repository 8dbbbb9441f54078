"""``intercept`` and ``item_covariance`` of :mod:`agents.simple`, as methods.

Shapes: U users, N examples per user, C classes, I items.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from agents.simple import conditioned, constants, intercept_penalty, label_moments, no_covariance, observation_noise
from backbones.base import PopulationModel
from eval.group import Group
from eval.methods.base import CannotServe, Fitted, Method, Predictor, Sizes
from eval.methods.readout import ReadoutPredictor
from eval.world import World


class Constants(ReadoutPredictor):
    """U users' constants on the population model's logits.

    Args:
        model: the population model. constants: ``[U, 1, C]``.
    """

    def __init__(self, model: PopulationModel, constants: Tensor) -> None:
        super().__init__(model)
        self.constants = constants

    def change(self, features: Tensor) -> Tensor:
        """See :meth:`ReadoutPredictor.change`."""
        return self.constants

    @property
    def sizes(self) -> Sequence[Sizes]:
        """See :attr:`Predictor.sizes`."""
        classes = self.constants.shape[2]
        return [Sizes(classes, classes, 4 * classes)] * len(self.constants)


@dataclass(frozen=True)
class Intercept(Method):
    """One constant per class on the population model's logits, by penalised maximum likelihood on the support.

    The penalty is chosen on val users. Users are fitted one at a time, so that none depends on another.

    Source: the random intercept of mixed models, Breslow and Clayton 1993, "Approximate inference in generalized linear mixed
    models"; the population's variance is chosen here instead of being estimated.
    """

    def fit(self, world: World, cost_weight: float) -> Fitted:
        """See :meth:`Method.fit`."""
        return Fitted(facts={"penalty": intercept_penalty(world.data)})

    def adapt(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Predictor:
        """See :meth:`Method.adapt`."""
        each = [shown.rows([user]).batch for user in range(len(shown))]
        return Constants(world.model, torch.cat([constants(world.model, one, fitted.facts["penalty"]) for one in each]))


class ConditionedLabels(Predictor):
    """U users' labels of all items, as a Gaussian that knows those of their support.

    Args:
        mean: ``[I]``. covariance: ``[I, I]``. noise: variance of a label. shown: the users' support.
    """

    adaptations = 1

    def __init__(self, mean: Tensor, covariance: Tensor, noise: float, shown: Group) -> None:
        self.mean, self.covariance, self.noise = mean.numpy(), covariance.numpy(), noise
        self.known = [(one.inputs.numpy(), one.labels.numpy()) for one in shown.examples]

    def logits(self, asked: Group) -> Tensor:
        """See :meth:`Predictor.logits`.

        A label is 1 where the Gaussian is above one half, so its probability is the normal distribution's (probit).
        """
        found = torch.zeros(*asked.batch.labels.shape, 2)
        for row, (known, labels) in enumerate(self.known):
            places = asked.examples[row].inputs.numpy()
            expected, variance = conditioned(self.mean, self.covariance, known, labels, places, self.noise)
            above = torch.from_numpy((expected - 0.5) / variance**0.5)
            # In double precision, and as plus and minus one half of the difference: an expectation hardly above stays above.
            odds = torch.special.log_ndtr(above) - torch.special.log_ndtr(-above)
            found[row, : len(places)] = torch.stack([-odds / 2, odds / 2], -1).float()
        return found

    def serve(self, inputs: Tensor) -> Tensor:
        """Raises :class:`CannotServe`: which item an input is cannot be seen from the input."""
        raise CannotServe(
            "item_covariance reads no inputs, only which item they are, and raw inputs do not say that; ask for `logits` of a "
            "group, which knows its items, and report no inference time for this method."
        )

    @property
    def sizes(self) -> Sequence[Sizes]:
        """See :attr:`Predictor.sizes`: an index and a label per example; there is no parameter of the user's own."""
        return [Sizes(0, 0, 8 * len(labels)) for _, labels in self.known]


@dataclass(frozen=True)
class ItemCovariance(Method):
    """A Gaussian over all items' labels, conditioned on those of the support: what others' taste tells, no item being read.

    Source: the Gaussian model of collaborative filtering, as in Goldberg et al. 2001, "Eigentaste" (who take its principal
    components). Kept: means, covariances of all pairs of items, conditioning on what the user labelled. Ours: the noise of a
    label is chosen on val users, and the model's negative eigenvalues are set to zero. It cannot be served
    (:class:`CannotServe`): raw inputs do not say which item they are.
    """

    together: ClassVar[int] = 1024

    def refuses(self, world: World) -> str | None:
        """See :meth:`Method.refuses`."""
        return no_covariance(world.data.population)

    def fit(self, world: World, cost_weight: float) -> Fitted:
        """See :meth:`Method.fit`. All of train users' labels count, in whatever role."""
        population = world.data.population
        mean, covariance = label_moments(population)
        tensors = {"mean": torch.from_numpy(mean), "covariance": torch.from_numpy(covariance)}
        return Fitted(tensors, {"noise": observation_noise(population, mean, covariance)})

    def adapt(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Predictor:
        """See :meth:`Method.adapt`."""
        return ConditionedLabels(fitted.tensors["mean"], fitted.tensors["covariance"], fitted.facts["noise"], shown)

"""``head``: a linear change of the population model's logits, each user's own.

Shapes: U users, N examples per user, F features, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backbones.base import PopulationModel
from backbones.pathways import population_logits
from eval.group import Group
from eval.methods.base import Fitted, Method, Predictor, Sizes
from eval.methods.logistic import penalised_logistic
from eval.methods.readout import ReadoutPredictor, Scale, best_on_val, train_readouts
from eval.world import World
from users.batch import Batch

PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class Heads(ReadoutPredictor):
    """U users' linear heads on readout features, beside the population model's.

    Args:
        model: the population model. weight: ``[U, F, C]``. bias: ``[U, 1, C]``.
    """

    def __init__(self, model: PopulationModel, weight: Tensor, bias: Tensor) -> None:
        super().__init__(model)
        self.weight, self.bias = weight, bias

    def change(self, features: Tensor) -> Tensor:
        """See :meth:`ReadoutPredictor.change`."""
        return torch.baddbmm(self.bias, features, self.weight)

    @property
    def sizes(self) -> Sequence[Sizes]:
        """See :attr:`Predictor.sizes`."""
        users, features, classes = self.weight.shape
        count = (features + 1) * classes
        return [Sizes(count, count, 4 * count)] * users


@dataclass(frozen=True)
class Head(Method):
    """``population logits + features @ dW + db``, by ridge-penalised logistic regression on each user's support, to optimality.

    Linear probing where what is probed for is the difference to the population's classifier: the penalty draws towards that
    classifier, not towards knowing nothing. It is chosen on val users, at features in train users' scale. Classes that the
    support lacks are drawn down only as far as its examples demand.

    Source: Alain and Bengio 2016, "Understanding intermediate layers using linear classifier probes"; the penalty towards what
    all have in common as in Evgeniou and Pontil 2004, "Regularized multi-task learning".
    """

    def fit(self, world: World, cost_weight: float) -> Fitted:
        """See :meth:`Method.fit`."""
        scale = Scale.of(train_readouts(world)[0])

        def predict(penalty: float, shown: Batch) -> Heads:
            return fitted_heads(world.model, scale, shown, penalty)

        facts = {"penalty": best_on_val(world, PENALTIES, predict, "penalty of head")}
        return Fitted({"centre": scale.centre, "spread": scale.spread}, facts)

    def adapt(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Predictor:
        """See :meth:`Method.adapt`."""
        scale = Scale(fitted.tensors["centre"], fitted.tensors["spread"])
        return fitted_heads(world.model, scale, shown.batch, fitted.facts["penalty"])


def fitted_heads(model: PopulationModel, scale: Scale, shown: Batch, penalty: float) -> Heads:
    """Every user's head from their support alone; the bias is the weight of a feature that is always 1."""
    features = scale(shown.frozen.sites[-1])
    features = torch.cat([features, torch.ones_like(features[..., :1])], -1)
    known = population_logits(model, shown.frozen)
    found = penalised_logistic(known, features, shown.labels, shown.weights > 0, penalty)
    weight = found[:, :-1] / scale.spread  # now of features as the backbone gives them
    return Heads(model, weight, found[:, -1:] - (scale.centre @ weight)[:, None])

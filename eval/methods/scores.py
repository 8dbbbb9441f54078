"""Masks by a score per pathway: on is what reaches a threshold that paid best for val users.

``gradient_norm``, ``relative_gradient``, ``importance``. Shapes: U users, N examples per user, P pathways.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from agents.rivals import best_threshold, val_reward
from backbones.registry import did_you_mean
from eval.group import Group
from eval.methods.base import Fitted
from eval.methods.pathway import Chooser
from eval.world import World
from meta.inner import adapt, user_loss
from users.batch import Batch

CHUNK = 64
"""Val users scored together."""
SCORES = ("relative_change", "first_order")


@dataclass(frozen=True)
class Thresholded(Chooser):
    """Abstract: pathways whose score reaches the threshold are on.

    The threshold is chosen per cost weight by the mean query reward of val users, among 32 quantiles of their scores and "none"
    (:func:`agents.rivals.best_threshold`). A user's mask follows from the support shown alone.
    """

    scope: ClassVar[str] = "mask per user, amortised"
    trades: ClassVar[bool] = True

    @abstractmethod
    def scores(self, world: World, support: Batch) -> Tensor:
        """``[U, P]``, not negative, the higher the likelier on."""

    def fit(self, world: World, cost_weight: float) -> Fitted:
        """See :meth:`Method.fit`."""
        support = world.data.part("val", "support")
        parts = [self.scores(world, support.rows(some)) for some in torch.arange(len(support)).split(CHUNK)]
        known = torch.cat(parts).double().numpy()
        name = type(self).__name__
        threshold = best_threshold(known, val_reward(world.scenario, cost_weight), f"threshold of {name}")
        world.scenario.save()
        return Fitted({"threshold": torch.tensor(threshold, dtype=torch.float64)})

    def choose(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Tensor:
        """See :meth:`Chooser.choose`."""
        return self.scores(world, shown.batch).double() >= fitted.tensors["threshold"]

    def tries(self, world: World) -> int:
        """See :meth:`Chooser.tries`: one look at the support's gradients."""
        return 1


@dataclass(frozen=True)
class GradientNorm(Thresholded):
    """Norm of the support gradient at the meta-initialisation, over sqrt(parameters).

    Source: what Lee et al. 2022 (below) divide by the norm of the weights, without that: cheap, and the first thing to try.
    """

    def scores(self, world: World, support: Batch) -> Tensor:
        """See :meth:`Thresholded.scores`."""
        return world.observe(support)[2].gradient_norm


@dataclass(frozen=True)
class RelativeGradient(Thresholded):
    """Gradient norm over weight norm, after Lee et al. 2022, "Surgical fine-tuning improves adaptation to distribution shifts".

    Kept: the score of their "Auto-RGN" (of the head with the population model's weights, of the others with the adapters').
    Not kept: there it scales every layer's learning rate in each epoch; here it is thresholded once, at the
    meta-initialisation.
    """

    def scores(self, world: World, support: Batch) -> Tensor:
        """See :meth:`Thresholded.scores`."""
        return world.observe(support)[2].relative_gradient


@dataclass(frozen=True)
class Importance(Thresholded):
    """Gu et al. 2024, "Light-PEFT: Lightening parameter-efficient fine-tuning via early pruning".

    Everything is trained for a little (here: the inner loop with every pathway on), then the unimportant is dropped and the
    rest is trained from the start. Kept: that order, and both scores. Not kept: scores are taken at the end of the inner loop
    instead of averaged over the last half of hundreds of steps; whole pathways go, no ranks within them, and nothing of
    the frozen model; a share is not given, but a threshold chosen on val users. Changed: theirs of ranks takes the absolute
    value of a matrix's mean, in which large changes cancel; here it is taken of every parameter's.

    Attributes:
        score: ``relative_change``, their score of modules: mean ``||delta|| / ||h||`` over the support examples; or
            ``first_order``, after that of ranks: mean ``|w * gradient|`` over the pathway's parameters (a mean, as there,
            because costs go by parameters as well). At the meta-initialisation both say little: of a neutral start every
            output is zero, and so are both scores.

    Raises:
        ValueError: for an unknown score, with a suggestion.
    """

    score: str = "relative_change"

    space: ClassVar = {"score": SCORES}

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"unknown score {self.score!r}. {did_you_mean(self.score, SCORES)}")

    def tries(self, world: World) -> int:
        """See :meth:`Chooser.tries`: the inner loop, and for ``first_order`` a gradient after it."""
        return 2 if self.score == "first_order" else 1

    def scores(self, world: World, support: Batch) -> Tensor:
        """See :meth:`Thresholded.scores`; zero where the inner loop diverged."""
        return self._scores(world, support).nan_to_num(0.0, 0.0)

    def _scores(self, world: World, support: Batch) -> Tensor:
        pathways = world.pathways
        on = torch.ones(len(support), pathways.num_pathways, dtype=torch.bool)
        weights = adapt(pathways, world.init, support, on)
        if self.score == "relative_change":
            changes = torch.zeros(*support.labels.shape, pathways.num_pathways)
            with torch.no_grad():
                pathways.logits(support.frozen, weights, on, changes)
            return (changes * support.weights[..., None]).sum(1)
        weights = {key: weight.detach().requires_grad_() for key, weight in weights.items()}
        with torch.enable_grad():
            loss = user_loss(pathways.logits(support.frozen, weights, on), support).sum()
            gradients = torch.autograd.grad(loss, list(weights.values()))
        products = {k: (w.detach() * g).abs().flatten(1) for (k, w), g in zip(weights.items(), gradients, strict=True)}
        none = torch.zeros(len(support), 1)  # of the model's own readout, which has no weights
        each = [torch.cat([products[k] for k in keys], 1) if keys else none for keys in pathways.keys.values()]
        return torch.stack([product.mean(1) for product in each], 1)

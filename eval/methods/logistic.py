"""Penalised logistic regressions, one per user: all users in one tensor program, none seeing the others.

Shapes: U users, N examples per user, D features, C classes, r = min(N, D).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

HISTORY = 10
STEPS = 500
TOLERANCE = 1e-4
"""Largest derivative at which a user's fit counts as done; the mean loss is then right to the sixth place."""
DECREASE, ROUNDING = 1e-4, 1e-13
"""A step must bring this share of what the slope promises; but for rounding, relative to the loss."""
HALVINGS = 40
CURVATURE = 0.25
"""Of a logit's cross-entropy, at most; what the first step is scaled by."""


def penalised_logistic(known: Tensor, features: Tensor, labels: Tensor, present: Tensor, penalty: float) -> Tensor:
    """The weights ``[U, D, C]`` that minimise, for every user alone, summed cross-entropy plus a ridge penalty.

    ``sum over n of cross-entropy(known_n + features_n @ weights, label_n) + penalty / 2 * ||weights||^2``. The sum, not the
    mean: the more examples, the less the penalty holds a user near zero.

    Args:
        known: ``[U, N, C]`` logits that are there already.
        features: ``[U, N, D]``.
        labels: ``[U, N]``.
        present: ``[U, N]`` bool, False where padded.
        penalty: above 0.

    The optimum is unique. It is found by L-BFGS (Liu and Nocedal 1989) in the singular directions of each user's features,
    outside of which the weights are zero, so that curvatures are known but for a factor; with a step length of each user's
    own. Since the penalty makes the objective strongly convex, halving until it decreases is all the line search needed. In
    double precision, so that what users find is the same to float32's last digits whoever else is in the batch.

    Raises:
        ValueError: for a penalty that is not above 0: with classes missing there would be no optimum.
    """
    if penalty <= 0:
        raise ValueError(f"the penalty must be above 0, got {penalty}; without one, separable examples have no optimum.")
    left, size, right = torch.linalg.svd((features * present[..., None]).double(), full_matrices=False)
    problem = _Problem(known.double(), left * size[:, None], labels, present, penalty)
    past = _Past(1 / (CURVATURE * size.square() + penalty)[..., None])
    weights = known.new_zeros(len(known), size.shape[1], known.shape[2], dtype=torch.float64)
    logits, moving = problem.known, present.any(1)
    loss, gradient = problem.loss(logits, weights), problem.gradient(logits, weights)
    for _ in range(STEPS):
        moving = moving & (gradient.abs().amax((1, 2)) > TOLERANCE)
        if not moving.any():
            break
        direction = past.direction(gradient)
        along = problem.features @ direction
        step = _step_length(problem, (logits, weights), (along, direction), loss, gradient, moving)
        moving = step > 0
        moved = step[:, None, None] * direction
        logits, weights = logits + step[:, None, None] * along, weights + moved
        loss, before = problem.loss(logits, weights), gradient
        gradient = problem.gradient(logits, weights)
        past.add(moved, gradient - before)
    return (right.transpose(1, 2) @ weights).to(known.dtype)


def _step_length(
    problem: "_Problem", at: tuple[Tensor, Tensor], to: tuple[Tensor, Tensor], loss: Tensor, gradient: Tensor, moving: Tensor
) -> Tensor:
    """``[U]``: 1, halved until the loss decreases enough (Armijo); 0 for users who are done, or where nothing helps."""
    slope, slack = _dot(gradient, to[1]), ROUNDING * loss.abs()
    step, open_ = moving.double(), moving
    for _ in range(HALVINGS):
        logits, weights = (here + step[:, None, None] * there for here, there in zip(at, to, strict=True))
        open_ = open_ & (problem.loss(logits, weights) > loss + DECREASE * step * slope + slack)
        if not open_.any():
            break
        step = torch.where(open_, step / 2, step)
    return torch.where(open_, 0.0, step)


@dataclass(frozen=True)
class _Problem:
    """Everybody's objective, as a function of weights ``[U, r, C]`` and of the logits ``[U, N, C]`` that they give."""

    known: Tensor
    features: Tensor
    labels: Tensor
    present: Tensor
    penalty: float

    def loss(self, logits: Tensor, weights: Tensor) -> Tensor:
        """``[U]``."""
        hit = logits.gather(-1, self.labels[..., None])[..., 0] - logits.logsumexp(-1)
        return self.penalty / 2 * weights.square().sum((1, 2)) - (hit * self.present).sum(1)

    def gradient(self, logits: Tensor, weights: Tensor) -> Tensor:
        """``[U, r, C]``; padded examples have no features."""
        wrong = logits.softmax(-1).scatter_add(-1, self.labels[..., None], -torch.ones_like(logits[..., :1]))
        return self.features.transpose(1, 2) @ wrong + self.penalty * weights


@dataclass
class _Past:
    """What L-BFGS knows of every user's curvature.

    Attributes:
        inverse: ``[U, r, 1]``, a first guess, up to a factor, of the inverse of the Hessian's diagonal.
        changes: the last changes of weights and gradients, and one over their scalar product.
    """

    inverse: Tensor
    changes: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def add(self, moved: Tensor, bent: Tensor) -> None:
        """Remember a step ``[U, r, C]`` and how the gradient changed; of users who did not move it says nothing."""
        along = _dot(moved, bent)
        self.changes = [*self.changes[1 - HISTORY :], (moved, bent, torch.where(along > 0, 1 / along.clamp_min(1e-300), 0.0))]

    def direction(self, gradient: Tensor) -> Tensor:
        """Downhill, ``[U, r, C]``, by the two-loop recursion."""
        found, shares = -gradient, []
        for moved, bent, over in reversed(self.changes):
            shares.append(over * _dot(moved, found))
            found = found - shares[-1][:, None, None] * bent
        found = found * self.inverse
        if self.changes:
            _, bent, over = self.changes[-1]
            factor = torch.where(over > 0, 1 / (over * _dot(bent, self.inverse * bent)).clamp_min(1e-300), 1.0)
            found = found * factor[:, None, None]
        for (moved, bent, over), share in zip(self.changes, reversed(shares), strict=True):
            found = found + (share - over * _dot(bent, found))[:, None, None] * moved
        return found


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum((1, 2))

"""Penalised logistic regressions, one per user: all users in one tensor program, none seeing the others.

Shapes: U users, N examples per user, D features, C classes.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

HISTORY = 10
STEPS = 500
TOLERANCE = 1e-7
"""Largest derivative at which a user's fit counts as done."""
DECREASE, ROUNDING = 1e-4, 1e-13
"""A step must bring this share of what the slope promises; but for rounding, relative to the loss."""
HALVINGS = 40


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

    The optimum is unique, and found by L-BFGS (Nocedal 1980) with a step length of each user's own. Since the penalty makes
    the objective strongly convex, halving until it decreases is all the line search needed. Computed in double precision, so
    that what users find is the same to float32's last digits whoever else is in the batch.

    Raises:
        ValueError: for a penalty that is not above 0: with classes missing there would be no optimum.
    """
    if penalty <= 0:
        raise ValueError(f"the penalty must be above 0, got {penalty}; without one, separable examples have no optimum.")
    problem = _Problem(known.double(), features.double(), labels, present, penalty)
    weights = known.new_zeros(len(known), features.shape[2], known.shape[2], dtype=torch.float64)
    loss, gradient = problem.at(weights)
    past, moving = _Past(), present.any(1)
    for _ in range(STEPS):
        moving = moving & (gradient.abs().amax((1, 2)) > TOLERANCE)
        if not moving.any():
            break
        direction = past.direction(gradient)
        step = _step_length(problem, weights, direction, loss, gradient, moving)
        moving = step > 0
        after = weights + step[:, None, None] * direction
        loss, new_gradient = problem.at(after)
        past.add(after - weights, new_gradient - gradient)
        weights, gradient = after, new_gradient
    return weights.to(known.dtype)


def _step_length(problem: "_Problem", at: Tensor, direction: Tensor, loss: Tensor, gradient: Tensor, moving: Tensor) -> Tensor:
    """``[U]``: 1, halved until the loss decreases enough (Armijo); 0 for users who are done, or where nothing helps."""
    slope, slack = _dot(gradient, direction), ROUNDING * loss.abs()
    step, open_ = moving.double(), moving
    for _ in range(HALVINGS):
        tried = problem.loss(at + step[:, None, None] * direction)
        open_ = open_ & (tried > loss + DECREASE * step * slope + slack)
        if not open_.any():
            break
        step = torch.where(open_, step / 2, step)
    return torch.where(open_, 0.0, step)


@dataclass(frozen=True)
class _Problem:
    """Everybody's objective."""

    known: Tensor
    features: Tensor
    labels: Tensor
    present: Tensor
    penalty: float

    def loss(self, weights: Tensor) -> Tensor:
        """``[U]``."""
        return self._loss((self.known + self.features @ weights).log_softmax(-1), weights)

    def at(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The loss ``[U]`` and its gradient ``[U, D, C]``."""
        log_p = (self.known + self.features @ weights).log_softmax(-1)
        wrong = (log_p.exp() - torch.nn.functional.one_hot(self.labels, log_p.shape[-1])) * self.present[..., None]
        return self._loss(log_p, weights), self.features.transpose(1, 2) @ wrong + self.penalty * weights

    def _loss(self, log_p: Tensor, weights: Tensor) -> Tensor:
        hit = log_p.gather(-1, self.labels[..., None])[..., 0]
        return -(hit * self.present).sum(1) + self.penalty / 2 * weights.square().sum((1, 2))


@dataclass
class _Past:
    """The last changes of weights and gradients, from which L-BFGS guesses every user's curvature."""

    changes: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def add(self, moved: Tensor, bent: Tensor) -> None:
        """Remember a step ``[U, D, C]`` and how the gradient changed; of users who did not move it says nothing."""
        along = _dot(moved, bent)
        inverse = torch.where(along > 0, 1 / along.clamp_min(1e-300), 0.0)
        self.changes = [*self.changes[1 - HISTORY :], (moved, bent, inverse)]

    def direction(self, gradient: Tensor) -> Tensor:
        """Downhill, ``[U, D, C]``, by the two-loop recursion."""
        found, shares = -gradient, []
        for moved, bent, inverse in reversed(self.changes):
            shares.append(inverse * _dot(moved, found))
            found = found - shares[-1][:, None, None] * bent
        if self.changes:
            _, bent, inverse = self.changes[-1]
            scale = torch.where(inverse > 0, 1 / (inverse * _dot(bent, bent)).clamp_min(1e-300), 1.0)
            found = found * scale[:, None, None]
        for (moved, bent, inverse), share in zip(self.changes, reversed(shares), strict=True):
            found = found + (share - inverse * _dot(bent, found))[:, None, None] * moved
        return found


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum((1, 2))

"""Gradient steps on a matrix whose inputs stay the same, taken where it is small: in the span of a user's examples.

A matrix ``W`` that multiplies fixed inputs ``X`` has the gradient ``X' dZ``, where ``Z = X W``: it never leaves the span of
the inputs, so that after any number of steps ``W = W_0 + X' S``. It suffices to keep ``S`` and ``Z = X W_0 + X X' S``, both as
short as a user's examples are few, and to make ``W`` once, in the end. These are the same steps, up to rounding; what is saved
is the width of the inputs in every one of them.

Source: the dual form of linear models, as in Schoelkopf et al. 2001, "A Generalized Representer Theorem".

Shapes: U users, N examples per user, W width of the inputs, K outputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """One matrix per user and what it multiplies.

    Attributes:
        inputs: ``[U, N, W]``.
        start: the matrices before the first step, ``[U, W, K]``.
        products: what they make of the inputs, ``[U, N, K]``.
        gram: products of the inputs with each other, ``[U, N, N]``.
    """

    inputs: Tensor
    start: Tensor
    products: Tensor
    gram: Tensor

    @staticmethod
    def of(inputs: Tensor, start: Tensor) -> "Span":
        """Of inputs ``[U, N, W]`` and matrices ``[U, W, K]``."""
        return Span(inputs, start, torch.bmm(inputs, start), torch.bmm(inputs, inputs.transpose(1, 2)))

    def rest(self) -> Tensor:
        """``S`` of matrices that have not moved, ``[U, N, K]``."""
        return torch.zeros_like(self.products)

    def product(self, moved: Tensor) -> Tensor:
        """``Z [U, N, K]`` at ``S [U, N, K]``."""
        return torch.baddbmm(self.products, self.gram, moved)

    def matrix(self, moved: Tensor) -> Tensor:
        """``W [U, W, K]`` at ``S [U, N, K]``."""
        return torch.baddbmm(self.start, self.inputs.transpose(1, 2), moved)


def pays(inputs: Tensor, start: Tensor, steps: int) -> bool:
    """Whether so many steps from ``start [U, W, K]`` on inputs ``[U, N, W]`` take fewer multiplications in the span.

    Usually a step multiplies the inputs twice, forward and for the gradient; in the span, the Gram matrix once, which has to be
    made, as have the products with the inputs at the start and in the end.
    """
    examples, width, outputs = inputs.shape[1], inputs.shape[2], start.shape[2]
    usual = steps * 2 * width * outputs
    return examples * width + 2 * width * outputs + steps * examples * outputs < usual

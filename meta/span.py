"""Gradient steps on a matrix whose inputs stay the same, taken where it is small: in the span of a user's examples.

A matrix ``W`` that multiplies fixed inputs ``X`` has the gradient ``X' dZ``, where ``Z = X W``: it never leaves the span of
the inputs, so that after any number of steps ``W = W_0 + X' S``. It suffices to keep ``S`` and ``Z = X W_0 + X X' S``, both as
short as a user's examples are few, and to make ``W`` once, in the end. These are the same steps, up to rounding; what is saved
is the width of the inputs in every one of them.

Source: the dual form of linear models, as in Schoelkopf et al. 2001, "A Generalized Representer Theorem".

Shapes: U users, R of them whose matrices move, N examples per user, W width of the inputs, O outputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from backbones.pathways import rows_of


@dataclass(frozen=True)
class Span:
    """One matrix per user and what it multiplies.

    Attributes:
        users: whose matrices move, ``[R]`` places.
        inputs: theirs, ``[R, N, W]``.
        start: all matrices before the first step, ``[U, W, O]``.
        before: what those that move make of the inputs then, ``[R, N, O]``.
        gram: products of the inputs with each other, ``[R, N, N]``.
    """

    users: Tensor
    inputs: Tensor
    start: Tensor
    before: Tensor
    gram: Tensor

    @staticmethod
    def of(users: Tensor, inputs: Tensor, start: Tensor) -> "Span":
        """Of the inputs ``[R, N, W]`` of some users ``[R]``, and everybody's matrices ``[U, W, O]``."""
        with _exact():
            before, gram = torch.bmm(inputs, rows_of(start, users)), torch.bmm(inputs, inputs.transpose(1, 2))
        return Span(users, inputs, start, before, gram)

    def unmoved(self) -> Tensor:
        """``S [R, N, O]`` of matrices at their start."""
        return torch.zeros_like(self.before)

    def products(self, moved: Tensor) -> Tensor:
        """``Z [R, N, O]`` at ``S [R, N, O]``."""
        with _exact():
            return torch.baddbmm(self.before, self.gram, moved)

    def matrices(self, moved: Tensor) -> Tensor:
        """``W`` of everybody, ``[U, W, O]``, at ``S [R, N, O]``."""
        with _exact():
            found = torch.baddbmm(rows_of(self.start, self.users), self.inputs.transpose(1, 2), moved)
        return found if len(found) == len(self.start) else self.start.index_copy(0, self.users, found)


def _exact() -> torch.autocast:
    """Weights stay float32 under autocast, and here it is weights that are made by products."""
    return torch.autocast("cpu", enabled=False)


def pays(examples: int, width: int, outputs: int, *, steps: int) -> bool:
    """Whether so many steps of ``[width, outputs]`` matrices on so many examples take fewer multiplications in the span.

    Usually a step multiplies the inputs twice, forward and for the gradient; in the span, the Gram matrix once, which has to be
    made, as have the products with the inputs at the start and in the end.
    """
    usual = steps * 2 * width * outputs
    return examples * width + 2 * width * outputs + steps * examples * outputs < usual

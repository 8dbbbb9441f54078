"""``dcft``: the change of every weight matrix is a small tile, repeated over a grid with factors of its own."""

from dataclasses import dataclass
from math import gcd
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from eval.methods.base import Fitted
from eval.methods.finetune import FineTuned, Tunable
from eval.world import World


class Deconvolved(nn.Module):
    """``weight + kron(rows x columns, tile)`` for a frozen weight; a parametrisation of torch.

    Kernels ``[out, in, k, k]`` count as matrices ``[out, in k k]``. At the start ``rows`` is zero, so nothing has changed
    and ``rows`` has a gradient; ``columns`` and ``tile`` are random such that ``kron(columns, tile)`` of inputs of size 1
    has size 1.

    Args:
        weight: that is changed, ``[out, in]`` or ``[out, in, k, k]``.
        size: of the tile, d; where d does not divide both sides, its greatest part that does.
        generator: of the random start.

    Attributes:
        rows: ``[out / d]``. columns: ``[in / d]``. tile: ``[d, d]``.
    """

    def __init__(self, weight: Tensor, size: int, generator: torch.Generator) -> None:
        super().__init__()
        out, inside = len(weight), weight[0].numel()
        size = gcd(size, gcd(out, inside))
        self.rows = nn.Parameter(torch.zeros(out // size))
        self.columns = nn.Parameter(torch.randn(inside // size, generator=generator) * (size / inside) ** 0.5)
        self.tile = nn.Parameter(torch.randn(size, size, generator=generator) / size**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight."""
        return weight + torch.kron(torch.outer(self.rows, self.columns), self.tile).view_as(weight)


def deconvolved(model: Tunable, size: int, generator: torch.Generator) -> None:
    """Put a trainable :class:`Deconvolved` on every linear layer and convolution of the backbone.

    ``torch.nn.utils.parametrize.remove_parametrizations`` merges them for good.
    """
    for module in list(model.backbone.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            change = Deconvolved(module.weight.detach(), size, generator)
            parametrize.register_parametrization(module, "weight", change)


@dataclass(frozen=True)
class Dcft(FineTuned):
    """Updates of all matrices by deconvolution in a subspace of one dimension, and the classifier.

    Source: Zhang et al. 2025, "Parameter-efficient fine-tuning of large language models via deconvolution in subspace".
    Kept: the transposed convolution of a rank-1 matrix whose stride is its kernel's size, which is a Kronecker product;
    ``in / d + out / d + d d`` parameters per matrix. Left out: what keeps several ranks orthogonal (the authors' code has one
    rank too), and a factor for the update's size, for which our start makes up; the authors start all three parts at random,
    we start one at zero, so that users start from the population model.

    Attributes:
        tile: d, side of the kernel. classifier: whether the classifier is trained as well.
    """

    rate: float = 1e-2
    tile: int = 8
    classifier: bool = True

    space: ClassVar = {"rate": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "tile": (2, 4, 8, 16), "steps": (5, 10, 20, 40)}

    def tunable(self, world: World, fitted: Fitted) -> Tunable:
        """See :meth:`FineTuned.tunable`."""
        model = Tunable(world.model)
        deconvolved(model, self.tile, world.generator("dcft"))
        model.classifier.requires_grad_(self.classifier)
        return model

"""A convolution of whose weights a few are changed: what PEFT's SHiRA is for dense layers."""

from typing import Any

import torch
from torch import Tensor, nn


class SparseConv2d(nn.Module):
    """W + S with S zero but for some places; to be used as PEFT's ``peft.tuners.shira.Linear`` is.

    Args:
        base_layer: the convolution, whose weight W counts as a matrix ``[out, in x kernel]``.
        rank: there are rank x (out + in x kernel) places.
        mask: ``[out, in x kernel]``, 1 at these places.
        name: of the adapter.
    """

    def __init__(self, base_layer: nn.Conv2d, rank: int, mask: Tensor, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.shira_weight = nn.ParameterDict()
        self.shira_indices: dict[str, Tensor] = {}
        self.update_layer(name, mask, rank)

    def update_layer(self, name: str, mask: Tensor, rank: int, config: Any = None) -> None:
        """Other places, whose changes start at zero. ``config``, which PEFT's layer needs, is not read."""
        places = mask.nonzero().T.int()
        self.shira_indices[name] = places
        self.shira_weight[name] = nn.Parameter(torch.zeros(places.shape[1]))

    def forward(self, images: Tensor) -> Tensor:
        """The changed convolution."""
        base, weight = self.base_layer, self.base_layer.weight
        for name, values in self.shira_weight.items():
            change = torch.zeros_like(weight.flatten(1)).index_put(tuple(self.shira_indices[name]), values)
            weight = weight + change.view_as(weight)
        return nn.functional.conv2d(images, weight, base.bias, base.stride, base.padding, base.dilation, base.groups)

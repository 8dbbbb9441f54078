"""Biases alone, or biases and the scales of normalisations: the smallest parts of a model that can be tuned where they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from eval.methods.base import Fitted
from eval.methods.finetune import FineTuned, Tunable
from eval.world import World

NORMS = (nn.LayerNorm, nn.GroupNorm, _BatchNorm)


class PerChannel(nn.Module):
    """A convolution followed by ``scale * x + bias`` per output channel, as batch normalisation is before it is folded.

    The bias is taken out of the convolution, whose backward pass would otherwise compute the frozen kernel's gradient along
    with the bias's: a quarter of a step.

    Args:
        convolution: with a bias, which is taken over.
        scales: whether there is a scale, 1 at first.
    """

    def __init__(self, convolution: nn.Conv2d, scales: bool) -> None:
        super().__init__()
        assert convolution.bias is not None
        self.bias = nn.Parameter(convolution.bias.detach().clone(), requires_grad=False)
        self.scale = nn.Parameter(torch.ones_like(self.bias), requires_grad=False) if scales else None
        convolution.bias = None
        self.convolution = convolution

    def forward(self, inputs: Tensor) -> Tensor:
        """``[N, in, H, W]`` to ``[N, out, H', W']``."""
        bias, plain = self.bias[:, None, None], self.convolution(inputs)
        return plain + bias if self.scale is None else torch.addcmul(bias, plain, self.scale[:, None, None])


@dataclass(frozen=True)
class Biases(FineTuned):
    """Abstract: every bias is trained, the classifier's too, and scales where the subclass wants them; no matrix is."""

    rate: float = 1e-2

    space: ClassVar = {"rate": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "steps": (5, 10, 20, 40)}
    scales: ClassVar[bool]

    def tunable(self, world: World, fitted: Fitted) -> Tunable:
        """See :meth:`FineTuned.tunable`."""
        model = Tunable(world.model)
        _open(model.backbone, self.scales)
        for tensor in self._trained(model):
            tensor.requires_grad_()
        return model

    def _trained(self, model: Tunable) -> Iterator[Tensor]:
        for name, value in model.named_parameters():
            if name.endswith("bias"):  # also a bias of several layers in one, "in_proj_bias"
                yield value
        for module in model.modules() if self.scales else ():
            if isinstance(module, PerChannel) and module.scale is not None:
                yield module.scale
            elif isinstance(module, NORMS) and module.weight is not None:
                yield module.weight


def _open(module: nn.Module, scales: bool) -> None:
    """Put :class:`PerChannel` around every convolution with a bias, all through ``module``."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and child.bias is not None:
            setattr(module, name, PerChannel(child, scales))
        else:
            _open(child, scales)


@dataclass(frozen=True)
class BitFit(Biases):
    """Biases and nothing else.

    Source: Ben Zaken et al. 2022, "BitFit: Simple parameter-efficient fine-tuning for transformer-based masked
    language-models". Kept: all biases, those of layer norms included. Of a ResNet it trains the convolutions' biases, which
    are there because batch normalisation was folded into them. Left out: the paper trains a new classifier along with the
    biases; ours is already fitted, and of it the bias alone is trained.
    """

    scales: ClassVar[bool] = False


@dataclass(frozen=True)
class NormAffine(Biases):
    """Biases and the scales of normalisations: per output channel of a convolution, per channel of a layer norm.

    Source: Frankle et al. 2021, "Training BatchNorm and only BatchNorm: on the expressive power of random features in CNNs".
    Kept: scale and shift of every batch normalisation, which are folded into the convolutions and are trained as what they
    have become, a scale and a bias per output channel. Beyond the paper: in a text encoder the linear layers' biases are
    trained as well, and everywhere the classifier's, so that this is :class:`BitFit` with scales.
    """

    scales: ClassVar[bool] = True

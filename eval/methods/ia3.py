"""``ia3``: learned factors on inner activations, one set per user."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from backbones.base import Backbone
from eval.methods.injected import ADAPTER, Injected, modules

SCALED = ("key", "value")
"""Dense layers whose outputs are scaled."""
FEED_FORWARD = "outer"
"""Dense layer whose inputs are scaled: the inner activation of a feed-forward block."""


@dataclass(frozen=True)
class IA3(Injected):
    """(IA)^3 by PEFT.

    Liu et al. 2022, "Few-shot parameter-efficient fine-tuning is better and cheaper than in-context learning".

    Kept: factors, 1 at the start, on keys, values and the feed-forward's inner activation. For convolutional backbones, of
    which the paper says nothing, one factor per output channel of every convolution. Not kept: the paper's extra losses
    (unlikelihood, length normalisation), which are for generated text, and its pre-training of the factors.
    """

    rate: float = 1e-2

    space: ClassVar = {
        "rate": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        "steps": (5, 10, 20, 40),
        "head": ("nothing", "bias", "all"),
    }

    def targets(self, backbone: Backbone) -> list[str]:
        """See :meth:`Injected.targets`."""
        names = (*SCALED, FEED_FORWARD)
        return [p for p, m in modules(backbone).items() if isinstance(m, nn.Conv2d) or p.rpartition(".")[2] in names]

    def inject(self, backbone: Backbone, targets: list[str]) -> Any:
        """See :meth:`Injected.inject`."""
        from peft import IA3Config, IA3Model

        inner = [path for path in targets if path.rpartition(".")[2] == FEED_FORWARD]
        return IA3Model(backbone, IA3Config(target_modules=targets, feedforward_modules=inner), ADAPTER)

"""``bottleneck``: dense adapters after every block, as people use them: a random start, Adam, nothing meta-learned."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from backbones.base import PopulationModel
from eval.methods.base import Fitted
from eval.methods.finetune import FineTuned, Tunable
from eval.world import World


class Adapter(nn.Module):
    """``h + up(relu(down(h)))`` along the channels, the form of our inline pathways; near the identity at first.

    Args:
        width: of h. rank: of the middle. axis: where the channels are. generator: of the random start.
    """

    def __init__(self, width: int, rank: int, axis: int, generator: torch.Generator) -> None:
        super().__init__()
        self.axis, self.down, self.up = axis, skip_init(nn.Linear, width, rank), skip_init(nn.Linear, rank, width)
        for linear, scale in ((self.down, width**-0.5), (self.up, 1e-3 / rank)):
            nn.init.normal_(linear.weight, 0, scale, generator)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """The shape stays."""
        inside = self.down(hidden.movedim(self.axis, -1)).relu()
        return hidden + self.up(inside).movedim(-1, self.axis)


class WithAdapters(Tunable):
    """The population model with an adapter after every block; what requires gradients are the adapters."""

    def __init__(self, model: PopulationModel, rank: int, generator: torch.Generator) -> None:
        super().__init__(model)
        axis, widths = self.backbone.channel_axis, [spec.width for spec in self.backbone.specs()]
        self.adapters = nn.ModuleList([Adapter(width, rank, axis, generator) for width in widths])

    def features(self, inputs: Tensor) -> Tensor:
        """See :meth:`Tunable.features`."""
        hidden = self.backbone.stem(inputs)
        for index, adapter in enumerate(self.adapters):
            hidden = self.backbone.block(index, hidden)
            hidden = hidden.with_tensor(adapter(hidden.tensor))
        return self.backbone.readout(hidden)


@dataclass(frozen=True)
class Bottleneck(FineTuned):
    """An adapter after every block and the classifier, trained for each user from the same near-identity start.

    Source: Houlsby et al. 2019, "Parameter-efficient transfer learning for NLP". Kept: one adapter behind attention and one
    behind the feed-forward part of every layer, near the identity at first, and a trained classifier. Other than there: it
    stands behind the layer norm, where our pathways do, it has a ReLU, and layer norms are not trained along. In a ResNet one
    stands behind every block.

    Attributes:
        rank: width of an adapter's middle. classifier: whether the classifier is trained as well.
    """

    rate: float = 3e-3
    rank: int = 16
    classifier: bool = True

    space: ClassVar = {"rate": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "rank": (4, 8, 16, 32), "steps": (5, 10, 20, 40)}

    def tunable(self, world: World, fitted: Fitted) -> Tunable:
        """See :meth:`FineTuned.tunable`."""
        model = WithAdapters(world.model, self.rank, world.generator("bottleneck"))
        model.classifier.requires_grad_(self.classifier)
        return model

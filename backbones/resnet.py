"""ResNets as chains of residual blocks: a small one for small images, and torchvision's 18, 34 and 50.

Source: He et al. 2016, "Deep Residual Learning for Image Recognition"; blocks and official weights are torchvision's.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import get_model
from torchvision.models.resnet import BasicBlock, Bottleneck

from backbones.artefacts import ArtefactError
from backbones.base import Backbone, Hidden, PopulationModel
from backbones.images import as_images, normalised


class SmallResNet(nn.Module):
    """A trainable ResNet for images of a few pixels: a 3x3 stem without pooling, then torchvision's basic blocks.

    Args:
        num_classes: C.
        in_channels: colour channels of the images.
        widths: channels of each stage; every stage but the first halves the resolution.
        depth: blocks per stage.
        stride: of the stem; 2 halves the resolution at once, which is four times cheaper.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 1,
        widths: Sequence[int] = (24, 32, 48),
        depth: int = 2,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        before = widths[0]
        stages: list[nn.Sequential] = []
        for stage, width in enumerate(widths):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(BasicBlock(before, width, stride, _shortcut(before, width, stride)))
                before = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.fc = nn.Linear(before, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, C]`` of images ``[N, in_channels, H, W]``."""
        return self.fc(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """What the classifier reads, ``[N, widths[-1]]``."""
        hidden = self.relu(self.bn1(self.conv1(images)))
        for stage in self.stages:
            hidden = stage(hidden)
        return hidden.mean((-2, -1))


class ResNetBackbone(Backbone):
    """A frozen ResNet. Batch normalisation is folded into the convolutions, which changes outputs by rounding only.

    Args:
        stem: images to the feature maps that the first block reads.
        stages: the residual blocks, by stage.
        feature_width: channels of the last block.
        reference_shape: ``(channels, height, width)`` at which FLOPs are counted, and to which image files are brought.
        official: images are resized and normalised as torchvision's official weights expect them.
    """

    channel_axis = 1

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Sequential] | nn.ModuleList,
        feature_width: int,
        reference_shape: tuple[int, ...],
        official: bool = False,
    ) -> None:
        super().__init__()
        self.official = official
        named = {f"layer{s + 1}.{b}": block for s, stage in enumerate(stages) for b, block in enumerate(stage.children())}
        self.entry = stem
        self.blocks = nn.ModuleList(named.values())
        self.block_names = tuple(named)
        self.feature_width = feature_width
        self.reference_shape = reference_shape
        for module in (self.entry, *self.blocks):
            _fold_batch_norm(module.eval())
        self.to(memory_format=torch.channels_last)
        self.freeze()

    def prepare(self, raw: Any) -> Tensor:
        """See :func:`backbones.images.as_images`."""
        channels, *size = self.reference_shape
        images = as_images(raw, channels, size)
        return normalised(images, size) if self.official else images

    def settings(self) -> str:
        """See :meth:`Backbone.settings`: strides and normalisation, which the weights do not tell."""
        strides = "".join(str(m.stride[0]) for m in self.modules() if isinstance(m, nn.Conv2d))
        return f"strides={strides}{',official' if self.official else ''}"

    def origin(self, index: int, layer: str) -> str:
        """See :meth:`Backbone.origin`: torchvision's name."""
        return f"{self.block_names[index]}.{layer}" if self.official else super().origin(index, layer)

    def stem(self, inputs: Tensor) -> Hidden:
        """Images ``[N, channels, H, W]`` to feature maps."""
        return Hidden(self.entry(inputs.contiguous(memory_format=torch.channels_last)))

    def block(self, index: int, hidden: Hidden) -> Hidden:
        """Residual block ``index``."""
        return hidden.with_tensor(self.blocks[index](hidden.tensor))

    def readout(self, hidden: Hidden) -> Tensor:
        """Global average pool, ``[N, F]``."""
        return self.pool(hidden)

    def pool(self, hidden: Hidden) -> Tensor:
        """Mean over positions, ``[N, width]``."""
        return hidden.tensor.mean((-2, -1))

    def outline(self, hidden: Hidden) -> Tensor:
        """Means over the four quarters of the map, ``[N, 4 * width]``: early features say little without their place."""
        return nn.functional.adaptive_avg_pool2d(hidden.tensor, 2).flatten(1)


def small_resnet(num_classes: int, state: dict[str, Tensor] | None = None, image_size: int = 8, **shape) -> PopulationModel:
    """The small ResNet as a population model, its own classifier included.

    Args:
        num_classes: C.
        state: ``state_dict`` of a trained :class:`SmallResNet`; random weights without.
        image_size: height and width at which FLOPs are counted.
        shape: ``in_channels``, ``widths``, ``depth`` and ``stride`` of :class:`SmallResNet`.
    """
    network = SmallResNet(num_classes, **shape)
    if state is not None:
        network.load_state_dict(state)
    stem = nn.Sequential(network.conv1, network.bn1, network.relu)
    reference = (network.conv1.in_channels, image_size, image_size)
    backbone = ResNetBackbone(stem, network.stages, network.fc.in_features, reference)
    return PopulationModel(backbone, network.fc.weight, network.fc.bias)


def torchvision_resnet(name: str, weights: str | Path | None = "DEFAULT") -> PopulationModel:
    """``resnet18``, ``resnet34``, ``resnet50`` (any of torchvision's ResNets) as a population model.

    Args:
        name: torchvision's name of the model.
        weights: a name of torchvision's official weights ("DEFAULT", "IMAGENET1K_V1"), downloaded on first use; or
            the path of a local file that holds such a ``state_dict``; or None for random weights, always the same.

    Raises:
        ArtefactError: if the weights cannot be downloaded or the file does not fit.
    """
    local = weights is not None and Path(weights).is_file()
    try:
        with torch.random.fork_rng(devices=[]):  # random weights are those of the name, whatever was drawn before
            torch.manual_seed(0)
            network = get_model(name, weights=None if local or weights is None else str(weights))
    except KeyError as error:
        raise ArtefactError(f"{weights} is neither a file nor a name of torchvision's weights of {name}.") from error
    except (OSError, RuntimeError) as error:
        raise ArtefactError(
            f"the official weights of {name} could not be downloaded ({error}). Pass weights='/path/to/state_dict.pth' "
            "of a copy you have, or weights=None for random ones."
        ) from error
    if local:
        try:
            network.load_state_dict(torch.load(str(weights), weights_only=True, map_location="cpu"))
        except Exception as error:
            raise ArtefactError(f"{weights} does not hold weights of {name}: {error}") from error
    stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
    stages = [network.layer1, network.layer2, network.layer3, network.layer4]
    backbone = ResNetBackbone(stem, stages, network.fc.in_features, (3, 224, 224), official=True)
    return PopulationModel(backbone, network.fc.weight, network.fc.bias)


def _shortcut(before: int, width: int, stride: int) -> nn.Module | None:
    if stride == 1 and before == width:
        return None
    return nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))


def _fold_batch_norm(module: nn.Module) -> None:
    """Merge every convolution with the normalisation after it, in place, all through ``module``."""
    for child in module.children():
        _fold_batch_norm(child)
    if isinstance(module, BasicBlock | Bottleneck):
        pairs = [(f"conv{i}", f"bn{i}") for i in (1, 2, 3) if hasattr(module, f"conv{i}")]
    elif isinstance(module, nn.Sequential):
        names = [name for name, _ in module.named_children()]
        pairs = list(pairwise(names))
    else:
        pairs = []
    for conv, norm in pairs:
        first, second = getattr(module, conv), getattr(module, norm)
        if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
            fused = fuse_conv_bn_eval(first, second)
            assert second.running_var is not None
            scale = second.weight / (second.running_var + second.eps).sqrt()
            fused.register_buffer("scale", scale.detach(), persistent=False)  # of what is added to the convolution's output
            setattr(module, conv, fused)
            setattr(module, norm, nn.Identity())

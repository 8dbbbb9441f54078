"""torchvision's vision transformers as chains of encoder layers.

Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"; layers and official weights are torchvision's.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import VisionTransformer, get_model
from torchvision.models.vision_transformer import EncoderBlock

from backbones.artefacts import ArtefactError
from backbones.base import Backbone, Hidden, PopulationModel
from backbones.images import as_images, normalised


class ViT(Backbone):
    """A frozen vision transformer. Hidden states are ``[N, L, W]``: the class token, then the patches.

    Args:
        network: its modules are taken over and frozen, not copied.
    """

    channel_axis = -1

    def __init__(self, network: VisionTransformer) -> None:
        super().__init__()
        self.patches, self.class_token, self.positions = network.conv_proj, network.class_token, network.encoder.pos_embedding
        self.blocks = nn.ModuleList(network.encoder.layers.children())
        self.block_names = tuple(f"layer{i}" for i in range(len(self.blocks)))
        self.norm, self.feature_width = network.encoder.ln, network.hidden_dim
        self.heads = network.encoder.layers[0].self_attention.num_heads  # type: ignore[union-attr]
        self.reference_shape = (3, network.image_size, network.image_size)
        self.freeze()

    def prepare(self, raw: Any) -> Tensor:
        """Images, as :func:`backbones.images.as_images` takes them, to normalised ones ``[N, 3, size, size]``, uncropped."""
        channels, *size = self.reference_shape
        return normalised(as_images(raw, channels, size), size)

    def stem(self, inputs: Tensor) -> Hidden:
        """Prepared images to tokens with their positions."""
        patches = self.patches(inputs).flatten(2).mT
        return Hidden(torch.cat([self.class_token.expand(len(inputs), -1, -1), patches], 1) + self.positions)

    def block(self, index: int, hidden: Hidden) -> Hidden:
        """Encoder layer ``index``."""
        layer: EncoderBlock = self.blocks[index]  # type: ignore[assignment]
        after = hidden.tensor + attend(layer.self_attention, layer.ln_1(hidden.tensor))
        return hidden.with_tensor(after + layer.mlp(layer.ln_2(after)))

    def readout(self, hidden: Hidden) -> Tensor:
        """The class token after the last norm, ``[N, W]``."""
        return self.norm(hidden.tensor[:, 0])

    def pool(self, hidden: Hidden) -> Tensor:
        """Mean over tokens, ``[N, W]``: early layers have not gathered much in the class token yet."""
        return hidden.tensor.mean(1)

    def settings(self) -> str:
        """The number of heads, which the weights do not tell."""
        return f"heads={self.heads}"


def attend(attention: nn.MultiheadAttention, tokens: Tensor) -> Tensor:
    """Self-attention ``[N, L, W]`` in plain products: PyTorch's fused one has no second derivative and hides its FLOPs."""
    joint = functional.linear(tokens, attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = joint.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    shares = (query @ key.mT * attention.head_dim**-0.5).softmax(-1)
    return attention.out_proj((shares @ value).transpose(1, 2).flatten(2))


def vit_b_16(weights: str | None = "DEFAULT") -> PopulationModel:
    """ViT-B/16 (86M parameters) with its ImageNet classifier.

    Args:
        weights: a name of torchvision's official weights, downloaded on first use; or the path of a file that holds such a
            ``state_dict``; or None for random ones.

    Raises:
        ArtefactError: if the weights are unknown, cannot be downloaded or do not fit; commands report it without a traceback.
    """
    local = weights is not None and Path(weights).is_file()
    try:
        with torch.random.fork_rng(devices=[]):  # random weights are the same whenever they are made
            torch.manual_seed(0)
            network = get_model("vit_b_16", weights=None if local else weights)
        if local:
            network.load_state_dict(torch.load(str(weights), weights_only=True, map_location="cpu"))
    except Exception as error:  # unpickling and torchvision have errors of their own
        raise ArtefactError(
            f"{weights} is no usable file or name of weights of vit_b_16 ({error!r}); give another, or None for random ones."
        ) from error
    return PopulationModel(ViT(network), network.heads.head.weight, network.heads.head.bias)


def vit_tiny() -> ViT:
    """Three random layers on 8x8 images, always the same: enough to try the machinery on the digits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ViT(VisionTransformer(image_size=8, patch_size=4, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64))

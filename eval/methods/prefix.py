"""``prefix``: keys and values of tokens that are not there, before every text, one set per user."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from backbones.base import Backbone
from backbones.bert import Attention, TextBackbone
from eval.methods.injected import Injected
from eval.world import World


@dataclass(frozen=True)
class Prefix(Injected):
    """Prefix tuning on PEFT's prefix encoder.

    Li & Liang 2021, "Prefix-tuning: Optimizing continuous prompts for generation".

    PEFT's own way of handing the prefix over, the argument ``past_key_values`` of a Hugging Face model, does not exist in our
    text backbones, which are chains of blocks; here every attention block reads its part of PEFT's encoder, with the result
    that PEFT has on Hugging Face's model, but that texts keep the positions they were trained at (PEFT counts on from the
    prefix). Kept: one vector per token and layer for keys and one for values; they start as the
    activations of real words (drawn from the vocabulary), not at zero, where all virtual tokens would get the same gradient
    and stay one. Not kept: the network behind the prefix during training. At the start the model is therefore not quite the
    population model: it has read some words before.

    Attributes:
        tokens: virtual tokens.

    Raises:
        ValueError: for less than one token.
    """

    rate: float = 1e-2
    tokens: int = 4

    space: ClassVar = {
        "tokens": (1, 2, 4, 8),
        "rate": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        "steps": (5, 10, 20, 40),
        "head": ("nothing", "bias", "all"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}.")

    def refuses(self, world: World) -> str | None:
        """See :meth:`Method.refuses`."""
        if super().refuses(world):
            return f"a prefix stands before tokens, and {type(world.model.backbone).__name__} does not read any."
        return None

    def targets(self, backbone: Backbone) -> list[str]:
        """See :meth:`Injected.targets`."""
        return [f"blocks.{i}" for i, block in enumerate(backbone.blocks) if isinstance(block, Attention)]

    def inject(self, backbone: Backbone, targets: list[str]) -> Any:
        """See :meth:`Injected.inject`. The result is the backbone itself."""
        from peft import PrefixEncoder, PrefixTuningConfig

        assert isinstance(backbone, TextBackbone)
        config = PrefixTuningConfig(
            num_virtual_tokens=self.tokens,
            num_layers=len(targets),
            token_dim=backbone.feature_width,
            num_attention_heads=1,  # heads are cut out of a vector by the block, in the same order
            num_transformer_submodules=1,
        )
        encoder = PrefixEncoder(config)
        with torch.no_grad():
            encoder.embedding.weight.copy_(_activations(backbone, self.tokens))
        for layer, path in enumerate(targets):
            block: Any = backbone.get_submodule(path)
            block.key, block.value = Preceded(block.key, encoder, 2 * layer), Preceded(block.value, encoder, 2 * layer + 1)
            backbone.blocks[int(path.rpartition(".")[2])] = Prefixed(block, self.tokens)
        return backbone


class Preceded(nn.Module):
    """A projection of tokens, before which those of the virtual ones are put.

    Args:
        projection: of real tokens. encoder: PEFT's. place: which of the encoder's vectors per virtual token.
    """

    def __init__(self, projection: nn.Module, encoder: Any, place: int) -> None:
        super().__init__()
        self.projection, self.encoder, self.place = projection, encoder, place

    def forward(self, hidden: Tensor) -> Tensor:
        """``[N, L, W]`` to ``[N, tokens + L, W]``."""
        found = self.projection(hidden)
        vectors = self.encoder.embedding.weight.unflatten(1, (-1, found.shape[-1]))[:, self.place].to(found.dtype)
        return torch.cat([vectors.expand(len(found), -1, -1), found], 1)


class Prefixed(nn.Module):
    """An attention block whose keys and values are preceded by virtual tokens, to which every token may look."""

    def __init__(self, block: Attention, tokens: int) -> None:
        super().__init__()
        self.block, self.tokens = block, tokens

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """``[N, L, W]`` to ``[N, L, W]``."""
        return self.block(hidden, pad(mask, (self.tokens, 0), value=True))


@torch.no_grad()
def _activations(backbone: TextBackbone, tokens: int) -> Tensor:
    """Keys and values of a text of random words, ``[tokens, layers x 2 x W]`` as PEFT lays them out."""
    hidden = backbone.stem(torch.randint(backbone.vocabulary, (1, tokens)))
    found = []
    for index, block in enumerate(backbone.blocks):
        if isinstance(block, Attention):
            found += [block.key(hidden.tensor)[0], block.value(hidden.tensor)[0]]
        hidden = backbone.block(index, hidden)
    return torch.cat(found, 1)

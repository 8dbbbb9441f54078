"""A frozen model seen as a stem, a chain of blocks and a readout.

Everything else in this project (adapters, gates, statistics, costs) is derived from that chain, so a new backbone is
one subclass of :class:`Backbone` and one line of :func:`backbones.register_backbone`.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Hidden:
    """What flows from block to block.

    Attributes:
        tensor: ``[N, ...]``, the part that adapters read and change.
        context: tensors that travel along untouched (an attention mask, say).
    """

    tensor: Tensor
    context: Mapping[str, Tensor] = field(default_factory=dict)

    def with_tensor(self, tensor: Tensor) -> "Hidden":
        """The same context around another tensor."""
        return Hidden(tensor, self.context)

    def at(self, places: Tensor) -> "Hidden":
        """Some of the examples."""
        return Hidden(self.tensor[places], {name: value[places] for name, value in self.context.items()})

    def first(self, count: int) -> "Hidden":
        """The first so many examples."""
        if count == len(self.tensor):
            return self
        return Hidden(self.tensor[:count], {name: value[:count] for name, value in self.context.items()})


@dataclass(frozen=True)
class BlockSpec:
    """Facts about one block.

    Attributes:
        name: unique within the backbone.
        width: channels of its output, the width of an adapter there.
        parameters: number of (frozen) parameters.
        flops: for one example of the reference input, 2 per multiply-add (torch's counter).
        skippable: whether the identity may stand in for it (same shape in and out).
    """

    name: str
    width: int
    parameters: int
    flops: int
    skippable: bool


class Backbone(nn.Module, ABC):
    """Abstract frozen backbone. Subclasses fill ``blocks`` and the four methods, then call :meth:`freeze`.

    Attributes:
        blocks: the chain, one module per block.
        block_names: one unique name per block.
        channel_axis: where the channels of ``hidden.tensor`` are: 1 for feature maps, -1 for tokens.
        feature_width: F, the width of :meth:`readout`.
        reference_shape: shape of the one example at which FLOPs are counted.
        truncated: how many items :meth:`prepare` has cut off so far because they were too long.
    """

    blocks: nn.ModuleList
    block_names: tuple[str, ...]
    channel_axis: int
    feature_width: int
    reference_shape: tuple[int, ...]
    truncated: int = 0

    @abstractmethod
    def stem(self, inputs: Tensor) -> Hidden:
        """Inputs ``[N, ...]`` to the hidden state that block 0 reads."""

    @abstractmethod
    def block(self, index: int, hidden: Hidden) -> Hidden:
        """Run block ``index``."""

    @abstractmethod
    def readout(self, hidden: Hidden) -> Tensor:
        """The last hidden state to features ``[N, F]``."""

    @abstractmethod
    def pool(self, hidden: Hidden) -> Tensor:
        """Any hidden state to one vector per example, ``[N, width]``."""

    def outline(self, hidden: Hidden) -> Tensor:
        """Any hidden state to what an early readout reads, ``[N, D]``: here what :meth:`pool` gives."""
        return self.pool(hidden)

    def without(self, index: int, hidden: Hidden) -> Hidden:
        """What stands in for block ``index`` where it is left out (one that is skippable): here the identity."""
        return hidden

    def forward(self, inputs: Tensor) -> Tensor:
        """Features ``[N, F]`` of inputs ``[N, ...]``: the whole chain."""
        hidden = self.stem(inputs)
        for index in range(len(self.blocks)):
            hidden = self.block(index, hidden)
        return self.readout(hidden)

    def pieces(self, inputs: Tensor) -> list[Tensor]:
        """Places ``[n]`` of the inputs that are best computed together: here all of them, of texts those of about a length."""
        return [torch.arange(len(inputs))]

    def trimmed(self, inputs: Tensor) -> Tensor:
        """The inputs without what all of them are padded with: here as they are."""
        return inputs

    def freeze(self) -> "Backbone":
        """Evaluation mode for good, no gradients: batch-norm statistics stay as they are."""
        self.requires_grad_(False)
        super().train(False)
        return self

    def train(self, mode: bool = True) -> "Backbone":
        """Does nothing: frozen means frozen, whatever a surrounding module is switched to."""
        return self

    def prepare(self, raw: Any) -> Tensor:
        """Raw items as a population keeps them to what :meth:`stem` reads.

        Here: tensors are taken as they are, ``uint8`` images scaled to 0..1. Backbones that read something else (texts,
        image files) override this.

        Raises:
            ValueError: for items that this backbone cannot read.
        """
        if not isinstance(raw, Tensor):
            raise ValueError(f"{type(self).__name__} reads tensors, not a {type(raw).__name__}; choose another backbone.")
        return raw.float() / 255 if raw.dtype == torch.uint8 else raw

    def origin(self, index: int, layer: str) -> str:
        """The name of a block's layer in the model of another library that this backbone was made of.

        Raises:
            ValueError: where there is no such model.
        """
        raise ValueError(f"{type(self).__name__} is of no other library: {self.block_names[index]}.{layer} has no name there.")

    def settings(self) -> str:
        """Whatever outputs depend on besides the weights (where texts are cut off, say); part of every fingerprint."""
        return ""

    def reference_inputs(self) -> Tensor:
        """One example of the reference shape, at which FLOPs are counted."""
        return torch.zeros(1, *self.reference_shape)

    @torch.no_grad()
    def specs(self) -> tuple[BlockSpec, ...]:
        """One :class:`BlockSpec` per block, measured on the reference input."""
        found = []
        hidden = self.stem(self.reference_inputs())
        for index, name in enumerate(self.block_names):
            with FlopCounterMode(display=False) as counter:
                after = self.block(index, hidden)
            width = after.tensor.shape[self.channel_axis]
            size = sum(p.numel() for p in self.blocks[index].parameters())
            same = after.tensor.shape == hidden.tensor.shape
            found.append(BlockSpec(name, width, size, counter.get_total_flops(), same))
            hidden = after
        return tuple(found)


class PopulationModel(nn.Module):
    """A frozen backbone and the frozen linear classifier on its features: the model before anyone is personal.

    Args:
        backbone: any :class:`Backbone`.
        weight: ``[C, F]``. bias: ``[C]``.
        fold_weight: ``[K, C, F]``, with ``fold_bias`` ``[K, C]``: classifiers that were fitted without the items of one
            fold each, for examples that the classifier itself was fitted on; None without cross-fitting.
    """

    def __init__(
        self,
        backbone: Backbone,
        weight: Tensor,
        bias: Tensor,
        fold_weight: Tensor | None = None,
        fold_bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.weight: Tensor
        self.bias: Tensor
        self.fold_weight: Tensor | None
        self.fold_bias: Tensor | None
        buffers = {"weight": weight, "bias": bias, "fold_weight": fold_weight, "fold_bias": fold_bias}
        for name, value in buffers.items():
            self.register_buffer(name, None if value is None else value.detach().clone())
        backbone.freeze()

    @property
    def num_classes(self) -> int:
        """C."""
        return self.weight.shape[0]

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``[N, C]``."""
        return nn.functional.linear(self.backbone(inputs), self.weight, self.bias)

    def fingerprint(self) -> str:
        """A hash of every weight, by which caches and artefacts recognise the model."""
        return hash_tensors(self.state_dict()) + self.backbone.settings()

    def backbone_fingerprint(self) -> str:
        """The same without the classifier: what frozen features depend on."""
        return hash_tensors(self.backbone.state_dict()) + self.backbone.settings()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (first 16 hex digits) over names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]

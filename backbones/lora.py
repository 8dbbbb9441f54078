"""Low-rank updates of the blocks' own weights: one user's can be merged into the model, many users' run side by side.

Shapes: U users, N examples per user, P pathways, R of the users who run, r rank.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from backbones.base import Hidden, PopulationModel
from backbones.pathways import Frozen, Weights, Work, rows_of
from backbones.through import Batched, ThroughPathways

Layer = nn.Linear | nn.Conv2d
_NOW = threading.local()
"""``updates``: of the block that this thread is running, if any."""


@dataclass(frozen=True)
class Updates:
    """What users of a batch add to the layers of one block.

    Attributes:
        by_layer: ``down`` and ``up`` of the users who have the pathway on, ``[R', ...]`` each.
        rows: ``[R']``, their places among the running users. running: R.
    """

    by_layer: Mapping[Layer, tuple[Tensor, Tensor]]
    rows: Tensor
    running: int


class LoraPathways(ThroughPathways):
    """``W x + up(down(x))`` in place of ``W x``, for every dense layer and every convolution of a block.

    Where batch normalisation is folded into a convolution, the update is of the convolution before it: the numbers are those of
    the original model. ``down`` maps to r channels (with the layer's own kernel, stride and padding where it is a
    convolution), ``up`` back.
    Nothing is scaled: what other libraries call ``alpha / r`` is 1 here.

    Source: Hu et al. 2022, "LoRA"; convolutions as in PEFT; users side by side in batched products as in Chen et al. 2023,
    "Punica", in plain torch.

    Attributes:
        targets: by block, its layers by their names within it.
        rate_scale: a tenth: an update of a layer's weights is felt at every position, and by all later layers.

    Raises:
        ValueError: for a block without such layers, or with a convolution in groups.
    """

    rate_scale = 0.1

    def __init__(self, model: PopulationModel, rank: int = 16, gates: str = "adapters") -> None:
        backbone = model.backbone
        self.targets = tuple(targets_of(*named) for named in zip(backbone.block_names, backbone.blocks, strict=True))
        super().__init__(model, rank, gates)
        for layer in (layer for layers in self.targets for layer in layers.values()):
            if _updated not in layer._forward_hooks.values():
                layer.register_forward_hook(_updated)

    def out_width(self, pathway: int) -> int:
        """See :meth:`Pathways.out_width`."""
        return self.widths[pathway]

    @torch.no_grad()
    def read_widths(self) -> list[int]:
        """See :meth:`Pathways.read_widths`: what goes into the blocks."""
        backbone = self.model.backbone
        first = backbone.stem(backbone.reference_inputs()).tensor.shape[backbone.channel_axis]
        return [first, *(spec.width for spec in backbone.specs()[:-1])]

    def initial(self, generator: torch.Generator, pathway: int) -> Weights:
        """See :meth:`Pathways.initial`: ``<pathway>.<layer>.down`` and ``.up``, shaped as PEFT shapes them."""
        if pathway == self.num_pathways - 1:
            return super().initial(generator, pathway)
        found = {}
        for name, layer in self.targets[pathway].items():
            shape = layer.weight.shape  # out, in(, kernel)
            inside = shape[1:].numel()
            prefix = f"{self.names[pathway]}.{name}"
            found[f"{prefix}.down"] = torch.randn(self.rank, *shape[1:], generator=generator) / inside**0.5
            found[f"{prefix}.up"] = torch.randn(shape[0], self.rank, generator=generator) * 1e-3 / self.rank
        return found

    @torch.no_grad()
    def frozen(self, inputs: Tensor) -> Frozen:
        """Hidden states before every block, channels last, then the readout features."""
        backbone = self.model.backbone
        hidden = backbone.stem(inputs)
        sites = []
        for index in range(len(backbone.blocks)):
            sites.append(hidden.tensor.movedim(backbone.channel_axis, -1).contiguous())
            hidden = backbone.block(index, hidden)
        return Frozen((*sites, backbone.readout(hidden)), hidden.context)

    def work(self, pathway: int, hidden: Hidden, weights: Weights) -> Work:
        """See :meth:`Pathways.work`."""
        if pathway == self.num_pathways - 1:
            return partial(
                self._head, hidden.tensor[None], torch.zeros(1, dtype=torch.int64), Batched({}, weights, torch.ones(0))
            )
        read: dict[nn.Module, Tensor] = {}
        layers = self.targets[pathway]

        def keep(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            read[layer] = inputs[0][None]

        hooks = [layer.register_forward_pre_hook(keep) for layer in layers.values()]
        try:
            self.model.backbone.block(pathway, hidden)
        finally:
            for hook in hooks:
                hook.remove()

        def run() -> None:
            for name, layer in layers.items():
                down, up = (weights[f"{self.names[pathway]}.{name}.{kind}"] for kind in ("down", "up"))
                _added(layer, read[layer], down, up)

        return run

    @torch.no_grad()
    def merged(self, weights: Weights, gates: Tensor) -> PopulationModel:
        """A copy of the model into which one user's updates and head are added: as fast as the bare model.

        Args:
            weights: the user's, without a leading dimension.
            gates: ``[P]`` bool.
        """
        model = deepcopy(self.model)
        for p, name in enumerate(self.names[:-1]):
            for inside in self.targets[p]:
                layer = model.backbone.blocks[p].get_submodule(inside)
                assert isinstance(layer, Layer)
                layer._forward_hooks.clear()
                if gates[p]:
                    down, up = (weights[f"{name}.{inside}.{kind}"] for kind in ("down", "up"))
                    scale = getattr(layer, "scale", torch.ones(len(up)))
                    layer.weight += (scale[:, None] * up @ down.flatten(1)).view(layer.weight.shape)
        if gates[-1]:
            model.weight += weights["head.weight"].T
            model.bias += weights["head.bias"]
        return model

    def _into(self, p: int, hidden: Tensor, users: Tensor, batch: Batched) -> Tensor:
        return hidden

    def _applied(self, p: int, hidden: Tensor, users: Tensor, batch: Batched) -> Tensor:
        rows = batch.gates[users, p].nonzero()[:, 0]
        with self._updating(p, users, rows, batch):
            after = self._block(p, hidden, users, batch)
        if batch.changes is not None and len(rows):
            with torch.no_grad():
                plain = self._block(p, rows_of(hidden, rows), users[rows], batch)
                apart = (rows_of(after, rows) - plain).flatten(2).norm(dim=2)
                batch.changes[users[rows], :, p] = apart / plain.flatten(2).norm(dim=2).clamp_min(1e-12)
        return after

    @contextmanager
    def _updating(self, p: int, users: Tensor, rows: Tensor, batch: Batched) -> Iterator[None]:
        """While block p runs for ``users [R]``, its layers add what those in ``rows [R']`` add."""
        if not len(rows):
            yield
            return
        layers = {
            layer: (
                batch.part(f"{self.names[p]}.{name}.down", users[rows]),
                batch.part(f"{self.names[p]}.{name}.up", users[rows]),
            )
            for name, layer in self.targets[p].items()
        }
        _NOW.updates = Updates(layers, rows, len(users))
        try:
            yield
        finally:
            _NOW.updates = None


def targets_of(name: str, block: nn.Module) -> dict[str, Layer]:
    """The layers of a block that can be updated, by name. Raises ``ValueError`` where there is none, or none that fits."""
    found = {inside: layer for inside, layer in block.named_modules() if isinstance(layer, Layer)}
    if not found:
        raise ValueError(f"block {name!r} has no dense layer and no convolution to update: choose another placement.")
    for inside, layer in found.items():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            raise ValueError(
                f"{name}.{inside} is a convolution in groups, which has no low-rank update: take another placement."
            )
    return found


def _updated(layer: Layer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    """A forward hook: the layer's output with the updates of the users at hand."""
    now: Updates | None = getattr(_NOW, "updates", None)
    if now is None or layer not in now.by_layer:
        return None
    down, up = now.by_layer[layer]
    whole, read = output.unflatten(0, (now.running, -1)), inputs[0].unflatten(0, (now.running, -1))
    added = _added(layer, rows_of(read, now.rows), down, up)
    if len(now.rows) == now.running:
        return output + added.flatten(0, 1)
    return whole.index_add(0, now.rows, added.to(output.dtype)).flatten(0, 1)


def _added(layer: Layer, read: Tensor, down: Tensor, up: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return _of_conv(layer, read, down, up)
    return _of_linear(read, down, up)


def _of_linear(read: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """``[R', N, ..., in]`` to ``[R', N, ..., out]``."""
    flat = read.flatten(1, -2)
    return torch.bmm(torch.bmm(flat, down.transpose(1, 2)), up.transpose(1, 2)).unflatten(1, read.shape[1:-1])


def _of_conv(layer: nn.Conv2d, read: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """``[R', N, in, H, W]`` to ``[R', N, out, H', W']``: users are groups of one convolution."""
    users, rank = down.shape[:2]
    grouped = read.transpose(0, 1).flatten(1, 2)
    inside = torch.nn.functional.conv2d(grouped, down.flatten(0, 1), None, layer.stride, layer.padding, layer.dilation, users)
    size = inside.shape[-2:]
    flat = inside.unflatten(1, (users, rank)).permute(1, 2, 0, 3, 4).flatten(2)
    added = torch.bmm(up, flat).unflatten(2, (-1, *size)).transpose(1, 2)
    scale = getattr(layer, "scale", None)  # of a batch normalisation that was folded into the layer
    return added if scale is None else added * scale[:, None, None]

"""``shira``: a few of the backbone's own weights are changed, each user's own choice of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from backbones.base import Backbone
from eval.methods.base import Sizes
from eval.methods.finetune import State, Tunable
from eval.methods.injected import ADAPTER, Ranked
from eval.methods.sparse_conv import SparseConv2d
from eval.world import World


@dataclass(frozen=True)
class SHiRA(Ranked):
    """SHiRA by PEFT, its mask by connection sensitivity.

    Bhardwaj et al. 2024, "Sparse high rank adapters"; Lee et al. 2019, "SNIP: Single-shot network pruning based on connection
    sensitivity".

    Kept: W + S, S zero but for the weights of largest ``|gradient x weight|`` in every module, as many as a LoRA of that rank
    would have there. The gradient is that of the user's own support loss in the frozen weights W, of all support examples;
    taken in S, which is zero at the start, every score would be zero and every weight kept, as happens in the code published
    with Arnob et al. 2025. Convolutions, which PEFT's SHiRA does not know, by :class:`eval.methods.sparse_conv.SparseConv2d`.
    Not kept: the paper's other masks, and merging several adapters.

    Attributes:
        rank: in every module rank x (inputs + outputs) weights change. where: see :class:`eval.methods.injected.Ranked`.
    """

    rate: float = 3e-3
    rank: int = 2

    space: ClassVar = {
        "rank": (1, 2, 4),
        "rate": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        "steps": (5, 10, 20, 40),
        "head": ("nothing", "bias", "all"),
    }

    def refuses(self, world: World) -> str | None:
        """See :meth:`Method.refuses`."""
        for path in self.targets(world.model.backbone):
            out, width = _matrix(world.model.backbone.get_submodule(path)).shape
            if self.rank * (out + width) > out * width:
                return f"rank {self.rank} would change {self.rank * (out + width)} weights of {path}, which has {out * width}."
        return super().refuses(world)

    def inject(self, backbone: Backbone, targets: list[str]) -> Any:
        """See :meth:`Injected.inject`: until a user comes (:meth:`begin`), the largest weights."""
        from peft import ShiraConfig, ShiraModel

        dense = [path for path in targets if isinstance(backbone.get_submodule(path), nn.Linear)]
        config = ShiraConfig(r=self.rank, target_modules=dense or "dummy-target-modules")
        config.mask_fn = largest({})
        for path in set(targets) - set(dense):
            parent, _, name = path.rpartition(".")
            base: Any = backbone.get_submodule(path)
            layer = SparseConv2d(base, self.rank, config.mask_fn(base, self.rank), ADAPTER)
            setattr(backbone.get_submodule(parent), name, layer)
        return ShiraModel(backbone, config, ADAPTER)

    def begin(self, model: Tunable, inputs: Tensor, labels: Tensor, offset: Tensor) -> None:
        """See :meth:`FineTuned.begin`: choose the weights."""
        tuner: Any = model.backbone
        config, layers = tuner.peft_config[ADAPTER], _layers(model).values()
        bases = [layer.base_layer for layer in layers]
        weights = [base.weight.requires_grad_() for base in bases]
        gradients = [torch.zeros_like(weight) for weight in weights]
        tuner.disable_adapter_layers()  # PEFT's layer reads W without a gradient
        for some in torch.arange(len(labels)).split(self.batch):
            with torch.enable_grad():
                logits = self.run(model, inputs[some]) + offset[some]
                loss = cross_entropy(logits, labels[some], reduction="sum") / len(labels)
            for total, gradient in zip(gradients, torch.autograd.grad(loss, weights), strict=True):
                total += gradient
        tuner.enable_adapter_layers()
        config.mask_fn = largest(dict(zip(bases, gradients, strict=True)))
        for layer in layers:
            layer.base_layer.weight.requires_grad_(False)
            layer.update_layer(ADAPTER, config.mask_fn(layer.base_layer, self.rank), self.rank, config=config)

    def run(self, model: Tunable, inputs: Tensor) -> Tensor:
        """See :meth:`FineTuned.run`."""
        # PEFT makes sparse tensors, and torch wants to be told whether to check them: places taken from a mask are right.
        with torch.sparse.check_sparse_tensor_invariants(enable=False):
            return super().run(model, inputs)

    def own(self, model: Tunable) -> State:
        """See :meth:`FineTuned.own`: the changes, and for each its place in the flattened weight."""
        state = super().own(model)
        for name, layer in _layers(model).items():
            rows, columns = layer.shira_indices[ADAPTER]
            state[f"{name}.places"] = rows * _matrix(layer.base_layer).shape[1] + columns
        return state

    def put(self, model: Tunable, state: State) -> None:
        """See :meth:`FineTuned.put`."""
        super().put(model, state)
        for name, layer in _layers(model).items():
            places, width = state[f"{name}.places"], _matrix(layer.base_layer).shape[1]
            layer.shira_indices[ADAPTER] = torch.stack([places // width, places % width])

    def size(self, state: State) -> Sizes:
        """See :meth:`FineTuned.size`: 4 bytes for a change, and 4 for its place."""
        count = sum(value.numel() for value in state.values() if value.is_floating_point())
        return Sizes(count, count, 4 * sum(value.numel() for value in state.values()))


def largest(gradients: Mapping[nn.Module, Tensor]) -> Callable[..., Tensor]:
    """A ``mask_fn`` of PEFT: 1 at the rank x (inputs + outputs) weights of largest ``|gradient x weight|``.

    Modules without a gradient are judged by ``|weight|``.
    """

    def mask(base: nn.Module, rank: int, **_: Any) -> Tensor:
        weight = _matrix(base).detach()
        score = (weight * gradients[base].flatten(1) if base in gradients else weight).abs()
        chosen = score.flatten().topk(rank * sum(score.shape)).indices
        return torch.zeros_like(score).view(-1).index_fill_(0, chosen, 1.0).view_as(score)

    return mask


def _matrix(base: nn.Module) -> Tensor:
    """The weight as ``[outputs, inputs]``; of a convolution ``[channels, channels x kernel]``."""
    weight: Any = base.weight
    return weight.flatten(1)


def _layers(model: Tunable) -> dict[str, Any]:
    """The modules of which a few weights change, by name."""
    return {name: module for name, module in model.named_modules() if "shira_indices" in vars(module)}

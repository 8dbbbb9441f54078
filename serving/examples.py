"""What users show when they are enrolled and ask later: checked, made ready for the backbone, and kept as bytes.

Shapes: U users, N examples per user, M inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from backbones.base import Backbone
from backbones.bert import PADDING
from backbones.pathways import Frozen, Pathways
from users.base import Examples
from users.batch import CHUNK, Batch, side_by_side

HALF = 65504.0
"""The largest number in half precision."""
_PREPARING = Lock()
"""Tokenizers are not safe for threads: cutting a long text changes how they read the others."""


def ready(backbone: Backbone, inputs: Any) -> Tensor:
    """Raw inputs (a tensor or array of images, a list of texts) as the backbone reads them, ``[M, ...]``.

    Raises:
        ValueError: for no inputs, the wrong kind or shape, or values that are not finite.
    """
    if isinstance(inputs, np.ndarray):
        inputs = inputs.tolist() if inputs.dtype.kind in "OU" else torch.from_numpy(inputs.copy())
    if hasattr(inputs, "__len__") and not len(inputs):
        raise ValueError("there is no input; give one at least.")
    reference = backbone.reference_inputs()
    if isinstance(inputs, Tensor) and inputs.dim() != reference.dim():
        found = inputs
    else:
        with _PREPARING:
            found = backbone.prepare(inputs)
    if found.dim() != reference.dim() or found.is_floating_point() != reference.is_floating_point():
        raise ValueError(
            f"inputs must look like {_described(reference)}, a batch of one, and look like {_described(found)}; add or take "
            "away dimensions, and give images as uint8 (0 to 255) or floating point."
        )
    if not found.numel():
        raise ValueError(f"inputs look like {_described(found)}: there is nothing in them.")
    if not found.is_floating_point():
        return found
    found = found.float()
    if not found.isfinite().all():
        raise ValueError("inputs are NaN or infinite; remove or impute those examples.")
    return found


def labelled(backbone: Backbone, inputs: Any, labels: Sequence[int] | Tensor, classes: int) -> Examples:
    """Inputs that are ready, and their labels.

    Raises:
        ValueError: as :func:`ready`, and for labels that are no class or are not as many as inputs.
    """
    found = ready(backbone, inputs)
    try:
        targets = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"labels must be class indices [N], integers ({error}).") from error
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.dim() != 1:
        raise ValueError(f"labels must be class indices [N], integers; got {_described(targets)}.")
    if targets.dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch finds no least one of these
        targets = targets.long()
    if len(found) != len(targets):
        raise ValueError(f"{len(found)} inputs but {len(targets)} labels; give every input one label.")
    if int(targets.min()) < 0 or int(targets.max()) >= classes:
        raise ValueError(f"labels must be 0 to {classes - 1}, got {int(targets.min())} to {int(targets.max())}.")
    return Examples(_own(found), _own(targets.long()))


def _own(tensor: Tensor) -> Tensor:
    """What was made in inference mode takes part in no gradient; a copy does."""
    return tensor.clone() if tensor.is_inference() else tensor


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor after the other, ``[M, ...]``; texts are padded to the longest.

    Raises:
        ValueError: for images of different sizes.
    """
    if tensors[0].is_floating_point():
        if len(sizes := {tuple(t.shape[1:]) for t in tensors}) > 1:
            raise ValueError(
                f"images of different sizes ({sorted(sizes)}) cannot be learned from together; give them one size."
            )
        return torch.cat(list(tensors))
    width = max(t.shape[1] for t in tensors)
    return torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1]), value=PADDING) for t in tensors])


def batch_of(pathways: Pathways, users: Sequence[Examples]) -> Batch:
    """U users' examples after the frozen model."""
    inputs = joined([each.inputs for each in users])
    frozen = Frozen.cat([pathways.frozen(some) for some in inputs.split(CHUNK)])
    return side_by_side(frozen, users, torch.arange(len(inputs)))


def both(first: Examples, second: Examples) -> Examples:
    """The examples of both, the first ones first. Raises ``ValueError`` for images of different sizes."""
    return Examples(joined([first.inputs, second.inputs]), torch.cat([first.labels, second.labels]))


@dataclass(frozen=True)
class Shelf:
    """The latest ``most`` examples of a user as bytes and back, for :meth:`Personaliser.update`."""

    most: int

    def latest(self, old: Examples | None, new: Examples) -> Examples:
        """The last ones of both; of the new ones all, however many."""
        return new if (kept := self.beside(old, new)) is None else both(kept, new)

    def beside(self, old: Examples | None, new: Examples) -> Examples | None:
        """The last of the old ones, as many as there is room for beside the new; None where that is none."""
        room = self.most - len(new)
        return None if old is None or room < 1 else Examples(old.inputs[-room:], old.labels[-room:])

    def pack(self, examples: Examples) -> bytes:
        """The last of them; nothing where none are to be kept. Images in half precision, if they fit."""
        if not self.most:
            return b""
        inputs, labels = examples.inputs[-self.most :], examples.labels[-self.most :]
        halved = inputs.half() if inputs.is_floating_point() else inputs.int()
        small = halved if inputs.abs().max() <= HALF else inputs
        return save({"inputs": small.contiguous(), "labels": labels.int().contiguous()})

    @staticmethod
    def unpack(record: bytes) -> Examples | None:
        """The inverse; None where nothing was kept."""
        if not record:
            return None
        found = load(record)
        inputs = found["inputs"]
        return Examples(inputs.float() if inputs.is_floating_point() else inputs.long(), found["labels"].long())

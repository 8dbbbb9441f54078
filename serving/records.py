"""A user's mask and adapter as bytes: the mask, the weights that are switched on, and nothing else.

Which weights there are, and of what shape, follows from the pathways, so a record has no header of names and sizes.
Shapes: P pathways.
"""

import struct
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backbones.pathways import Pathways, Weights
from meta.inner import MetaInit

HEADER = struct.Struct("<dI")
PRECISIONS = ("float16", "int8", "int4", "float32")
GROUP = 32
"""Weights that share a scale where there are few bits."""
LEVELS = {"int8": 127, "int4": 7}
LARGEST = {"float16": 65504.0, "int8": 3e38, "int4": 3e38, "float32": 3.4e38}


@dataclass(frozen=True)
class Adapter:
    """What one user runs with.

    Attributes:
        gates: ``[P]`` bool.
        weights: one user's, of every pathway that is on, as far as they are the user's own (others may be there and count for
            nothing).
        cost_weight: the price at which the mask was chosen.
        labels: how many labelled examples it was adapted on.
    """

    gates: Tensor
    weights: Weights
    cost_weight: float
    labels: int


class Codec:
    """Adapters along some pathways to bytes and back.

    Args:
        pathways: they belong to.
        init: what weights that are not each user's own (ANIL: all but the head) are taken from.
        precision: a name in :data:`PRECISIONS`: ``"float16"``, ``"float32"``; or ``"int8"``, ``"int4"``: by how much weights
            differ from the meta-initialisation, in groups of :data:`GROUP` with a scale each, half and a quarter of the bytes
            and a little more, errors of up to 1/254 and 1/14 of a group's largest change.

    Raises:
        ValueError: for an unknown precision.
    """

    def __init__(self, pathways: Pathways, init: MetaInit, precision: str = "float16") -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}; choose from {', '.join(PRECISIONS)}.")
        self.pathways, self.init, self.precision = pathways, init, precision

    def pack(self, adapter: Adapter) -> bytes:
        """An adapter as bytes.

        Raises:
            FloatingPointError: if a weight is not finite, or too large for the precision.
        """
        parts = [
            HEADER.pack(adapter.cost_weight, adapter.labels),
            np.packbits(adapter.gates.numpy(), bitorder="little").tobytes(),
        ]
        parts += [self._pack(key, adapter.weights[key]) for key in self._keys(adapter.gates)]
        return b"".join(parts)

    def unpack(self, record: bytes) -> Adapter:
        """The inverse of :meth:`pack`, as far as the precision goes; weights in float32.

        Raises:
            ValueError: if the bytes are too few or too many.
        """
        count = self.pathways.num_pathways
        mask = -(-count // 8)
        start = HEADER.size + mask
        if len(record) < start:
            raise ValueError(f"a record of {len(record)} bytes is shorter than its header of {start}.")
        cost_weight, labels = HEADER.unpack_from(record)
        bits = np.unpackbits(np.frombuffer(record, np.uint8, mask, HEADER.size), bitorder="little", count=count)
        gates = torch.from_numpy(bits.astype(bool))
        weights, keys = {}, self._keys(gates)
        if (expected := start + sum(map(self._bytes, keys))) != len(record):
            raise ValueError(f"a record of {len(record)} bytes, where its mask asks for {expected}.")
        for key in keys:
            weights[key] = self._unpack(key, record, start)
            start += self._bytes(key)
        return Adapter(gates, weights, cost_weight, labels)

    def _keys(self, gates: Tensor) -> list[str]:
        """Of the weights that are kept: switched on, and the user's own."""
        return [key for p in (gates & self.init.adapted).nonzero()[:, 0].tolist() for key in self.pathways.keys[p]]

    def _bytes(self, key: str) -> int:
        size = self.init.weights[key].numel()
        if self.precision not in LEVELS:
            return size * {"float16": 2, "float32": 4}[self.precision]
        return 2 * -(-size // GROUP) + (size if self.precision == "int8" else -(-size // 2))

    def _pack(self, key: str, weight: Tensor) -> bytes:
        few = self.precision in LEVELS
        values = (weight.detach() - self.init.weights[key] if few else weight.detach()).float().flatten().numpy()
        if not np.abs(values).max(initial=0.0) <= LARGEST[self.precision]:  # also where it is NaN
            raise FloatingPointError(
                f"the weights {key} are not finite or too large for {self.precision}; keep them as float32, or adapt with "
                "lower rates."
            )
        return self._quantised(values) if few else values.astype(self.precision).tobytes()

    def _quantised(self, values: NDArray[np.float32]) -> bytes:
        """Scales, then whole numbers."""
        grouped, levels = _in_groups(values), LEVELS[self.precision]
        scales = _shortened(np.abs(grouped).max(1) / levels)
        steps = np.maximum(_lengthened(scales), np.finfo(np.float32).tiny)[:, None]
        rounded = np.rint(grouped / steps).clip(-levels, levels).astype(np.int8).reshape(-1)[: values.size]
        return scales.tobytes() + (rounded if self.precision == "int8" else _paired(rounded)).tobytes()

    def _unpack(self, key: str, record: bytes, start: int) -> Tensor:
        begin = self.init.weights[key]
        size = begin.numel()
        if self.precision not in LEVELS:
            return torch.from_numpy(np.frombuffer(record, self.precision, size, start).astype(np.float32)).view(begin.shape)
        groups = -(-size // GROUP)
        scales, after = _lengthened(np.frombuffer(record, np.uint16, groups, start)), start + 2 * groups
        if self.precision == "int8":
            whole = np.frombuffer(record, np.int8, size, after)
        else:
            whole = _parted(np.frombuffer(record, np.uint8, -(-size // 2), after), size)
        changes = (_in_groups(whole.astype(np.float32)) * scales[:, None]).reshape(-1)[:size]
        return begin.detach() + torch.from_numpy(changes).view(begin.shape)


def _in_groups(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """``[groups, GROUP]``, padded with zeros."""
    return np.pad(values, (0, -len(values) % GROUP)).reshape(-1, GROUP)


def _shortened(scales: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves (bfloat16), rounded up: however small, a scale is never too small for its group."""
    return (scales.astype(np.float32).view(np.uint32).astype(np.uint64) + 0xFFFF >> 16).astype(np.uint16)


def _lengthened(scales: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (scales.astype(np.uint32) << 16).view(np.float32)


def _paired(whole: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Numbers of -7 to 7, two to a byte."""
    halves = np.pad(whole + 8, (0, len(whole) % 2)).astype(np.uint8).reshape(-1, 2)
    return (halves[:, 0] | halves[:, 1] << 4).astype(np.uint8)


def _parted(pairs: NDArray[np.uint8], size: int) -> NDArray[np.int8]:
    """The inverse of :func:`_paired`."""
    return np.stack([pairs & 15, pairs >> 4], 1).reshape(-1)[:size].astype(np.int8) - 8

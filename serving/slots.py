"""Users whose adapters are in memory: a fixed number of slots in stacked tensors, the least recently asked for giving way.

Shapes: S slots, U users, P pathways.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from backbones.pathways import Pathways, Weights
from meta.inner import MetaInit
from serving.records import Adapter


class Slots:
    """S places for adapters. Not safe for threads: whoever shares it holds a lock.

    Args:
        pathways: that the adapters are along.
        init: shared weights, those of pathways that are off among them.
        count: S.

    Attributes:
        weights: stacked ``[S, ...]``. gates: ``[S, P]``.
        evictions: how often somebody had to give way.

    Raises:
        ValueError: for less than one slot.
    """

    def __init__(self, pathways: Pathways, init: MetaInit, count: int) -> None:
        if count < 1:
            raise ValueError(f"at least one user must fit into memory, got {count} slots.")
        self._keys, self._init = pathways.keys, init
        self.weights: Weights = {key: torch.zeros(count, *value.shape) for key, value in init.weights.items()}
        self.gates = torch.zeros(count, pathways.num_pathways, dtype=torch.bool)
        self.evictions = 0
        self._place: OrderedDict[str, int] = OrderedDict()
        self._free = list(range(count))[::-1]

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, user: str) -> bool:
        return user in self._place

    @property
    def count(self) -> int:
        """S."""
        return len(self.gates)

    def load(self, user: str, adapter: Adapter) -> int:
        """Put a user's adapter into a slot, their own if they have one; who was asked for least recently gives way."""
        place = self._place.pop(user, None)
        if place is None:
            place = self._free.pop() if self._free else self._evict()
        self._place[user] = place
        self._wipe(place)  # also what a pathway that is off now was for somebody else
        self.gates[place] = adapter.gates
        for p in adapter.gates.nonzero()[:, 0].tolist():
            for key in self._keys[p]:
                self.weights[key][place] = adapter.weights.get(key, self._init.weights[key])
        return place

    def _evict(self) -> int:
        self.evictions += 1
        return self._place.popitem(last=False)[1]

    def drop(self, user: str) -> None:
        """Empty a user's slot, if they have one: its numbers are overwritten."""
        place = self._place.pop(user, None)
        if place is not None:
            self._wipe(place)
            self._free.append(place)

    def _wipe(self, place: int) -> None:
        self.gates[place] = False
        for value in self.weights.values():
            value[place] = 0

    def clear(self) -> None:
        """Empty all slots."""
        for user in [*self._place]:
            self.drop(user)

    def touch(self, user: str) -> None:
        """Ask for a user who is there: they give way after all others."""
        self._place.move_to_end(user)

    def take(self, users: Sequence[str]) -> tuple[Weights, Tensor]:
        """Weights ``[U, ...]`` and gates ``[U, P]`` of users who are there, in that order: copies, which nobody changes.

        Raises:
            KeyError: for somebody who is not there.
        """
        places = torch.tensor([self._place[user] for user in users], dtype=torch.int64)
        gates = self.gates[places]
        on = {key for p in gates.any(0).nonzero()[:, 0].tolist() for key in self._keys[p]}
        return {key: value[places] for key, value in self.weights.items() if key in on}, gates

    def bytes(self) -> int:
        """That the slots take up in memory, filled or not."""
        return sum(t.nbytes for t in (*self.weights.values(), self.gates))

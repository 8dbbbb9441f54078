"""What the frozen model made of users' examples, kept as far as the memory that was granted reaches."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from backbones.pathways import Frozen

MEMORY = 4.0
"""GB of frozen states that are kept unless told otherwise."""


@dataclass(frozen=True)
class Seen:
    """One user's examples in one role, after the frozen model.

    Attributes:
        frozen: of N examples.
        labels: ``[N]``.
    """

    frozen: Frozen
    labels: Tensor

    @property
    def bytes(self) -> int:
        """What keeping it takes."""
        offset = [] if self.frozen.offset is None else [self.frozen.offset]
        tensors = (self.labels, *self.frozen.sites, *self.frozen.context.values(), *offset)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Kept:
    """The results used last, at most so many bytes of them; others are made again.

    Args:
        limit: bytes.

    Attributes:
        bytes: of what is kept now; never above ``limit``.
        made: how many results were made so far.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes, self.made = limit, 0, 0
        self._found: OrderedDict[Hashable, Seen] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Seen]) -> Seen:
        """What was kept under ``key``, else what ``make`` gives, which must always be the same."""
        if key in self._found:
            self._found.move_to_end(key)
            return self._found[key]
        made = make()
        self.made += 1
        if made.bytes <= self.limit:
            while self.bytes + made.bytes > self.limit:
                self.bytes -= self._found.popitem(last=False)[1].bytes
            self._found[key] = made
            self.bytes += made.bytes
        return made


class Joined(Sequence[Tensor]):
    """The sites of several users' examples one after the other, each put together when it is first asked for."""

    def __init__(self, parts: Sequence[Frozen]) -> None:
        self._parts = parts
        self._found: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._parts[0].sites)

    def __getitem__(self, p):  # no slices: pathways are asked for one by one
        place = range(len(self))[p]
        if place not in self._found:
            self._found[place] = Frozen.cat([Frozen((part.sites[place],)) for part in self._parts]).sites[0]
        return self._found[place]


def joined(parts: Sequence[Frozen]) -> Frozen:
    """Further examples after each other as by :meth:`Frozen.cat`, of the sites only those that somebody reads."""
    return replace(Frozen.cat([replace(part, sites=()) for part in parts]), sites=Joined(parts))

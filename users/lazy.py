"""Users who are drawn when they are asked for, so that there may be as many as anybody likes."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

if TYPE_CHECKING:
    from users.base import User

T = TypeVar("T")
MANY = 5_000
"""Users of a split up to which simulated users are drawn at once; beyond, when they are asked for."""
KEPT = 1_024
"""Drawn users that are remembered (about 35 KB each on the digits)."""
SAMPLE = 16
"""Users who stand for all in checks and fingerprints."""


class OnDemand(Sequence[T], Generic[T]):
    """``function(n)`` for every n below ``count``, called whenever an element is asked for."""

    def __init__(self, count: int, function: Callable[[int], T]) -> None:
        self._count, self._function = count, function

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[T, ...]: ...
    def __getitem__(self, place: int | slice) -> T | tuple[T, ...]:
        if isinstance(place, slice):
            return tuple(map(self._function, range(self._count)[place]))
        return self._function(range(self._count)[place])


class LazyUsers(OnDemand["User"]):
    """A split whose users are drawn on demand, the latest :data:`KEPT` of them remembered.

    Args:
        count: number of users.
        draw: the n-th user; the same whenever it is called.
        facts: the n-th user's ``info``, without drawing examples.
        name: the n-th user's id.
        sizes: examples of every user by role.
        recipe: JSON-able, everything that the users follow from; stands for them in fingerprints.

    Attributes:
        drawn: how many users were drawn so far, those drawn again included.
    """

    def __init__(
        self,
        count: int,
        draw: "Callable[[int], User]",
        facts: Callable[[int], Mapping[str, Any]],
        name: Callable[[int], str],
        sizes: Mapping[str, int],
        recipe: Mapping[str, Any],
    ) -> None:
        super().__init__(count, self._remembered)
        self._draw, self._facts, self._name = draw, facts, name
        self.sizes, self.recipe = dict(sizes), {**recipe, "count": count}
        self.drawn = 0
        self._kept: OrderedDict[int, User] = OrderedDict()

    def _remembered(self, n: int) -> "User":
        if n not in self._kept:
            self.drawn += 1
            self._kept[n] = self._draw(n)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(n)
        return self._kept[n]

    def info(self, n: int) -> Mapping[str, Any]:
        """The n-th user's ``info``, cheaply."""
        return self._kept[n].info if n in self._kept else self._facts(n)

    @property
    def ids(self) -> tuple[str, ...]:
        """Everybody's id."""
        return tuple(map(self._name, range(len(self))))

    def sample(self) -> "tuple[User, ...]":
        """The first users, who stand for all."""
        return self[:SAMPLE]

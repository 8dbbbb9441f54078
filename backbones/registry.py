"""Named factories that other packages can add to, and errors that say what was probably meant."""

from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Generic, TypeVar

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that names the closest of ``known`` (if any is close) and lists them all."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(known) or 'none'}."


class Registry(Generic[T]):
    """Things by name. Entry points of the group ``dsa.<kind>s`` in other distributions count as registered.

    Args:
        kind: what is registered, in the singular; used in errors and in the entry point group.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._things: dict[str, T] = {}

    def register(self, name: str, thing: T) -> None:
        """Add ``thing``. Raises ``ValueError`` if the name is taken."""
        if name in self._things:
            raise ValueError(f"{self.kind} {name!r} is registered already; choose another name.")
        self._things[name] = thing

    def unregister(self, name: str) -> None:
        """Remove a name again. Raises ``KeyError`` if it was never registered."""
        del self._things[name]

    def decorate(self, name: str) -> Callable[[T], T]:
        """``@registry.decorate("name")`` above a function or class registers it."""

        def add(thing: T) -> T:
            self.register(name, thing)
            return thing

        return add

    def get(self, name: str) -> T:
        """The thing called ``name``. Raises ``ValueError`` with a suggestion if there is none."""
        if name in self._things:
            return self._things[name]
        plugins = entry_points(group=f"dsa.{self.kind}s")
        if name in plugins.names:
            self._things[name] = plugins[name].load()
            return self._things[name]
        raise ValueError(f"unknown {self.kind} {name!r}. {did_you_mean(name, [*self._things, *plugins.names])}")

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._things, *entry_points(group=f"dsa.{self.kind}s").names}))

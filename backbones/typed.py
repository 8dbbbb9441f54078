"""Whether values that were read from text (JSON, YAML, a command line) are of the types that the code says."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

PLAIN: dict[Any, tuple[type, ...]] = {
    bool: (bool,), int: (Integral,), float: (Real,), str: (str,), Path: (Path, str), NoneType: (NoneType,)
}  # fmt: skip
"""What may be given for a type: a whole number is a float as well, and text is a path."""


def misfits(kind: type | Callable[..., Any] | Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """Names of a dataclass's fields, of a function's parameters, or among given hints, whose values are of another type."""
    hints = _hints(kind)
    return [name for name, value in values.items() if name in hints and not fits(value, hints[name])]


def _hints(kind: type | Callable[..., Any] | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(kind, Mapping):
        return kind
    try:
        return get_type_hints(kind)
    except NameError:  # a plug-in's types may be imported for type checkers alone; nothing is said of it then
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type that text can say: plain ones (:data:`PLAIN`), and unions, lists and mappings of these.

    A list may stand for a tuple or a sequence of any length; a truth value is no number. Everything is of any other type.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in PLAIN:
        return isinstance(value, PLAIN[hint]) and (hint is bool or not isinstance(value, bool))
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if isinstance(origin, type) and issubclass(origin, Mapping):
        names, kinds = arguments
        return isinstance(value, Mapping) and all(fits(key, names) and fits(one, kinds) for key, one in value.items())
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, list | tuple) and all(fits(one, arguments[0]) for one in value)
    return True


def check_types(kind: type | Callable[..., Any] | Mapping[str, Any], values: Mapping[str, Any], what: str) -> None:
    """Raise ``ValueError`` if a value is of another type than the hint of its name; ``what``: it is, for the message."""
    for name in misfits(kind, values)[:1]:
        hint = _hints(kind)[name]
        called = getattr(hint, "__name__", str(hint)) if not get_args(hint) else str(hint)
        raise ValueError(f"{what}: {name} must be of type {called}, got {values[name]!r}.")

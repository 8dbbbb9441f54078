"""What a method must say of itself: its class, its hyperparameters, what tuning may choose between."""

import inspect
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn

import yaml

from eval.methods import make_method, method_class
from eval.methods.base import SCOPES, Method


def check_declared(name: str) -> None:
    """Check what needs no world. Raises ``AssertionError`` that names the method, what is wrong and the cure."""
    kind = method_class(name)
    check_class(name, kind)
    check_words(name, kind)
    check_length(name, kind)
    for field in kind.space:
        check_values(name, kind, field)


def check_class(name: str, kind: type[Method]) -> None:
    """A frozen dataclass whose fields have defaults."""
    fine = inspect.isclass(kind) and issubclass(kind, Method) and not inspect.isabstract(kind)
    _require(fine, name, f"{kind!r} is no concrete subclass of Method.", "register such a class.")
    own = is_dataclass(kind) and "__dataclass_params__" in vars(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    _require(own, name, "it is no frozen dataclass.", "put @dataclass(frozen=True) above the class.")
    made = f"{kind.__name__}("
    _require(
        not (kind.__doc__ or made).startswith(made), name, "it has no docstring.", "say whose method it is, what was kept."
    )
    try:
        kind()
    except TypeError as error:
        _fail(name, f"it cannot be made without arguments: {error}.", "give every hyperparameter a default.")


def check_words(name: str, kind: type[Method]) -> None:
    """Class attributes have values that the harness knows."""
    known: dict[str, tuple[Any, ...]] = {"scope": SCOPES, "labels": ("support", "all"), "trades": (True, False)}
    known["through_backbone"] = (True, False)
    for attribute, values in known.items():
        value = getattr(kind, attribute)
        _require(value in values, name, f"{attribute} is {value!r}.", f"choose from {', '.join(map(repr, values))}.")
    for attribute in ("together", "draws"):
        value = getattr(kind, attribute)
        _require(isinstance(value, int) and value > 0, name, f"{attribute} is {value!r}.", "give a number of at least 1.")
    drawn = kind.draws == 1 or "draw" in _fields(kind)
    _require(drawn, name, f"draws is {kind.draws}, but there is no field draw.", "add `draw: int = 0`, or leave draws at 1.")


def check_length(name: str, kind: type[Method]) -> None:
    """``length`` names an integer hyperparameter."""
    if kind.length is None:
        return
    value = getattr(kind(), kind.length, None) if kind.length in _fields(kind) else None
    fine = isinstance(value, int) and not isinstance(value, bool) and value > 0
    cure = "name the integer field that says how long personalising trains, or None."
    _require(fine, name, f"length is {kind.length!r}, whose default is {value!r}.", cure)


def check_values(name: str, kind: type[Method], field: str) -> None:
    """Every value of a field of ``space`` makes a method, and survives YAML, where tuned settings are kept."""
    values = list(kind.space[field])
    known = field in _fields(kind)
    _require(known, name, f"space has {field!r}, which is no field.", f"choose from {', '.join(_fields(kind))}.")
    different = all(value not in values[:n] for n, value in enumerate(values))
    _require(len(values) > 1 and different, name, f"space[{field!r}] is {values}.", "give at least two different values.")
    usual = getattr(kind(), field)
    for value in values:
        alike = usual is None or isinstance(value, type(usual)) or (type(usual), type(value)) == (float, int)
        _require(alike, name, f"{field}={value!r} is of another type than the default {usual!r}.", "give values of one type.")
        try:
            made = make_method(name, **{field: value})
            kept = yaml.safe_load(yaml.safe_dump(value))
        except (ValueError, yaml.YAMLError) as error:
            _fail(name, f"{field}={value!r} of its space is refused: {error}", "leave it out of space, or allow it.")
        kept = tuple(kept) if isinstance(kept, list) else kept
        _require(kept == value, name, f"{field}={value!r} comes back from YAML as {kept!r}.", "use numbers, texts or tuples.")
        _require(getattr(made, field) == value, name, f"{field}={value!r} is not kept.", "do not change fields when made.")


def _fields(kind: type[Method]) -> list[str]:
    return [field.name for field in fields(kind)]  # type: ignore[arg-type]


def _fail(name: str, problem: str, cure: str) -> NoReturn:
    raise AssertionError(f"method {name!r}: {problem} Cure: {cure}")


def _require(fine: bool, name: str, problem: str, cure: str) -> None:
    if not fine:
        _fail(name, problem, cure)

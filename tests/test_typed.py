"""What is taken for a value of a type."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from backbones.typed import check_types, fits, misfits


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (3, int),
        (np.int64(3), int),
        (3, float),
        (np.float32(0.5), float),
        (True, bool),
        ("a", str),
        ("a", Path),
        (None, str | None),
        ([1, 2], list[int]),
        ((1, 2), Sequence[int]),
        ([1, 2], tuple[int, ...]),
        ([], list[int]),
        ({"a": [1]}, Mapping[str, list[int]]),
        ("x", Literal["x", "y"]),
        (object(), Any),
        (7, Callable[[int], str]),
        ("a", Sequence[str] | str),
    ],
)
def test_what_fits(value, hint):
    assert fits(value, hint)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (True, int),
        (False, float),
        (1, bool),
        ("3", int),
        (3.0, int),
        (3, str),
        (None, str),
        ("abc", Sequence[str]),
        (3, list[int]),
        (["a"], list[int]),
        ([1], Mapping[str, int]),
        ({"a": "b"}, Mapping[str, int]),
        ({1: 1}, Mapping[str, int]),
        ("z", Literal["x"]),
        (1.5, int | None),
    ],
)
def test_what_does_not(value, hint):
    assert not fits(value, hint)


def test_fields_and_parameters_are_named():
    @dataclass
    class Facts:
        count: int
        names: list[str]

    def make(count: int = 1, rate: float | None = None, anything=None) -> None: ...

    assert misfits(Facts, {"count": "many", "names": ["a"], "unknown": 3}) == ["count"]
    check_types(make, {"count": 2, "rate": None, "anything": "x"}, "made")
    with pytest.raises(ValueError, match=r"made: rate must be of type float \| None, got 'fast'"):
        check_types(make, {"rate": "fast"}, "made")


def test_types_that_cannot_be_told_are_not_checked():
    def make(count: "Invented") -> None: ...  # noqa: F821

    assert misfits(make, {"count": "many"}) == []

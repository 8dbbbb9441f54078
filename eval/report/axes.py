"""Scales, ticks and the frame that plots are drawn in."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eval.report.picture import Path, Picture, Place, Text

Scale = Callable[[float], float]
"""From a value to a place."""
Rectangle = tuple[float, float, float, float]
"""Left, top, width, height."""


def linear(low: float, high: float, begin: float, end: float) -> Scale:
    """Values from ``low`` to ``high`` evenly between two places; equal values stand in the middle."""
    if high == low:
        return lambda value: (begin + end) / 2
    return lambda value: begin + (value - low) / (high - low) * (end - begin)


def logarithmic(low: float, high: float, begin: float, end: float) -> Scale:
    """Positive values by their ratios; smaller ones than ``low`` stand where it does."""
    inner = linear(math.log(low), math.log(high), begin, end)
    return lambda value: inner(math.log(max(value, low)))


def broken(break_at: float, high: float, begin: float, middle: float, end: float) -> Scale:
    """Evenly from 0 to ``break_at`` as far as ``middle``, then by ratios up to ``high``."""
    even, ratios = linear(0, break_at, begin, middle), logarithmic(break_at, max(high, 2 * break_at), middle + 14, end)
    return lambda value: even(value) if value <= break_at else ratios(value)


def even_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values from ``low`` to ``high``, some ``about`` of them."""
    if high <= low:
        return [low]
    raw = (high - low) / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(step * index, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def ratio_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between, and with few of them their doubles and fives."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high <= 100 * low else (1,)
    return [
        factor * 10.0**power for power in powers for factor in factors if low * 0.999 <= factor * 10.0**power <= high * 1.001
    ]


@dataclass(frozen=True)
class Frame:
    """Where in a picture a plot stands."""

    picture: Picture
    left: float
    top: float
    right: float
    bottom: float

    def across(self, scale: Scale, ticks: Sequence[tuple[float, str]], title: str) -> None:
        """The axis below: grid lines, labels, and the title with its unit."""
        for value, label in ticks:
            x = scale(value)
            self.picture.add(Path([(x, self.top), (x, self.bottom)], "grid", 1))
            self.picture.add(Text(x, self.bottom + 15, label, "muted", 11, "middle"))
        self.picture.add(Text((self.left + self.right) / 2, self.bottom + 33, title, "ink", 12, "middle"))

    def upright(self, scale: Scale, ticks: Sequence[tuple[float, str]], title: str) -> None:
        """The axis on the left; its title stands above it."""
        for value, label in ticks:
            y = scale(value)
            self.picture.add(Path([(self.left, y), (self.right, y)], "grid", 1))
            self.picture.add(Text(self.left - 5, y + 4, label, "muted", 11, "end"))
        self.picture.add(Text(4, self.top - 12, title, "ink", 12))


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near to the wanted ones as lets neighbours keep a gap, in the same order, within bounds if they fit."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    places: list[float] = []
    for index in order:
        places.append(max(wanted[index], low, places[-1] + gap if places else -math.inf))
    limit = high
    for position in reversed(range(len(places))):
        places[position] = min(places[position], limit)
        limit = places[position] - gap
    out = [0.0] * len(wanted)
    for index, place in zip(order, places, strict=True):
        out[index] = place
    return out


def free_spot(at: Place, size: Place, taken: Sequence[Rectangle], frame: Frame) -> Place:
    """A corner ``(left, top)`` for a label near a point: where it overlaps as little as can be, and then the nearest.

    Args:
        at: the point.
        size: the label's width and height.
        taken: boxes that should stay free.
        frame: to stay in.
    """
    (x, y), (width, height) = at, size
    spots = []
    for reach in (10, 18, 28, 40):
        for turn in range(16):
            angle = math.pi * turn / 8
            left, top = x + reach * math.cos(angle) - width / 2, y + reach * math.sin(angle) - height / 2
            if frame.left <= left and left + width <= frame.right and frame.top <= top and top + height <= frame.bottom:
                spots.append((left, top))
    if not spots:
        return x + 6, y - height / 2
    return min(spots, key=lambda spot: sum(_overlap((*spot, width, height), other) for other in taken))


def _overlap(one: Rectangle, other: Rectangle) -> float:
    sides = [min(one[i] + one[i + 2], other[i] + other[i + 2]) - max(one[i], other[i]) for i in (0, 1)]
    return max(0.0, sides[0]) * max(0.0, sides[1])

"""The figures of time: what personalising a user takes, and what predicting takes. Both on scales of ratios."""

from collections.abc import Mapping
from typing import Any

from eval.report.axes import Frame, Scale, logarithmic, ratio_ticks
from eval.report.contents import INFERENCE, Summary, range_text
from eval.report.figures import NAMES, WIDE, clipped, look
from eval.report.picture import Box, Mark, Path, Picture, Shape, Text

STEP = 18.0
SIGNS: tuple[Shape, ...] = ("circle", "square", "triangle")
"""For :data:`INFERENCE`."""


def personalising(summary: Summary) -> Picture | None:
    """Bars of seconds to personalise one user, median (quartiles)."""
    found = {name: one["personalise_seconds"] for name, one in _timed(summary).items() if one.get("personalise_seconds")}
    if not found:
        return None
    title, top = "Seconds to personalise one user", 14.0
    scale, picture = _plot(title, found, _ends(found, "Bars from the left, one per method"), top, "seconds")
    for row, (name, one) in enumerate(found.items()):
        y = top + STEP * row
        said = f"{name}: median (quartiles) {range_text(one)} s"
        picture.add(Box(NAMES, y + 3, max(1.0, scale(one["median"]) - NAMES), STEP - 6, look(name, summary)[1], 0.85, said))
        picture.add(Path([(scale(one["low"]), y + STEP / 2), (scale(one["high"]), y + STEP / 2)], "ink", 1.2))
        picture.add(Text(NAMES - 6, y + 13, clipped(name), "ink", 11.5, "end", name == summary["subject"]))
    return picture


def predicting(summary: Summary) -> Picture | None:
    """Milliseconds to predict for one user and for many, median (quartiles)."""
    found = {name: one["inference_ms"] for name, one in _timed(summary).items() if one.get("inference_ms")}
    if not found:
        return None
    ranges = {f"{name}, {asked}": one[asked] for name, one in found.items() for asked in INFERENCE if asked in one}
    title, top = "Milliseconds to predict", 62.0
    scale, picture = _plot(title, ranges, _ends(ranges, "Signs on a line per method"), top, "milliseconds", len(found))
    for line, (asked, shape) in enumerate(zip(INFERENCE, SIGNS, strict=True)):
        picture.add(Mark(NAMES + 6, 10 + 15.0 * line, shape, "ink", 4), Text(NAMES + 16, 14 + 15.0 * line, asked, "ink", 11.5))
    for row, (name, one) in enumerate(found.items()):
        y, colour = top + STEP * (row + 0.5), look(name, summary)[1]
        picture.add(Text(NAMES - 6, y + 4, clipped(name), "ink", 11.5, "end", name == summary["subject"]))
        for asked, shape in zip(INFERENCE, SIGNS, strict=True):
            if asked in one:
                part = one[asked]
                said = f"{name}, {asked}: median (quartiles) {range_text(part)} ms"
                picture.add(Path([(scale(part["low"]), y), (scale(part["high"]), y)], colour, 1.4, 0.7))
                picture.add(Mark(scale(part["median"]), y, shape, colour, 3.8, said))
    return picture


def _timed(summary: Summary) -> dict[str, Any]:
    """Timings of the methods that the summary knows, in its order."""
    known = (summary["timing"] or {}).get("methods", {})
    return {name: known[name] for name in summary["methods"] if name in known}


def _plot(
    title: str, ranges: Mapping[str, Any], said: str, top: float, unit: str, rows: int | None = None
) -> tuple[Scale, Picture]:
    """A frame with a scale of ratios that holds all ranges."""
    low = min((one["low"] for one in ranges.values() if one["low"] > 0), default=1e-6) / 1.3
    high = max(2 * low, 1.15 * max(one["high"] for one in ranges.values()))
    bottom = top + STEP * (rows or len(ranges))
    picture = Picture(title, said, WIDE, bottom + 40)
    scale = logarithmic(low, high, NAMES, WIDE - 12)
    ticks = [(tick, f"{tick:g}") for tick in ratio_ticks(low, high)]
    Frame(picture, NAMES, top, WIDE - 12, bottom).across(scale, ticks, f"{unit} (scale of ratios)")
    return scale, picture


def _ends(ranges: Mapping[str, Any], what: str) -> str:
    """What is seen, with the fastest and the slowest."""
    order = sorted(ranges, key=lambda name: ranges[name]["median"])
    fast, slow = ((name, ranges[name]["median"]) for name in (order[0], order[-1]))
    return f"{what}. Fastest: {fast[0]} ({fast[1]:.3g}); slowest: {slow[0]} ({slow[1]:.3g})."

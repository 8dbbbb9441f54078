"""The figure of accuracy against cost, with a front for every method that trades one for the other."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.pareto import WORST_COST, pareto_front
from eval.report.axes import Frame, Rectangle, Scale, broken, even_ticks, free_spot, linear, ratio_ticks
from eval.report.contents import COUNTED, Summary, measured
from eval.report.figures import WIDE, clipped, look
from eval.report.picture import Box, Mark, Path, Picture, Place, Text

LEFT, TOP, RIGHT, BOTTOM = 46.0, 34.0, WIDE - 10, 330.0
KEY = 3
"""Columns of the key."""


def accuracy_against_cost(summary: Summary) -> Picture:
    """Points for all methods, numbered by accuracy; lines for those with a trade-off."""
    methods = measured(summary)
    heights = {name: height(name, summary) for name in methods}
    numbers = {name: i + 1 for i, name in enumerate(sorted(methods, key=lambda name: -heights[name]))}
    lines = -(-len(methods) // KEY)
    picture = Picture("Accuracy against cost", _said(summary, methods), WIDE, BOTTOM + 52 + 15.0 * lines)
    frame = Frame(picture, LEFT, TOP, RIGHT, BOTTOM)
    across, upright = _scales(frame, methods, [*heights.values()], summary["counts"])
    for name in sorted((name for name in methods if methods[name]["trades"]), key=lambda name: name == summary["subject"]):
        _front(picture, summary, name, across, upright)
    places = {name: (across(one["means"]["cost"]), upright(heights[name])) for name, one in methods.items()}
    taken: list[Rectangle] = []
    for name, (x, y) in places.items():
        around = 7.5 if name == summary["subject"] else 5.0
        taken.append((x - around, y - around, 2 * around, 2 * around))
    for name in numbers:
        _point(frame, summary, name, numbers[name], places[name], taken)
    for name, number in numbers.items():
        column, line = divmod(number - 1, lines)
        x, y = 8 + column * (WIDE - 8) / KEY, BOTTOM + 56 + 15 * line
        shape, colour = look(name, summary)
        said = Text(x + 8, y, f"{number} {clipped(name, 20)}", "ink", 11.5, bold=name == summary["subject"])
        picture.add(Mark(x, y - 4, shape, colour, 3.5), said)
    return picture


def height(name: str, summary: Summary) -> float:
    """At what accuracy a method stands. One of fewer users than the subject: as far from it as on the users of both."""
    methods, subject = summary["methods"], summary["subject"]
    one, mine = methods[name], methods.get(subject)
    found = one["against"].get(subject, {}).get("accuracy")
    if mine is None or found is None or one["users"] * one["seeds"] >= mine["users"] * mine["seeds"]:
        return one["means"]["accuracy"]
    return mine["means"]["accuracy"] + found["mean"]


def _scales(frame: Frame, methods: Mapping[str, Any], at: Sequence[float], counts: str | None) -> tuple[Scale, Scale]:
    """The axes; costs beyond the whole-model mask's stand behind a break."""
    costs = [one["means"]["cost"] for one in methods.values()] + _of_weights(methods, "cost")
    heights = [*at, *_of_weights(methods, "accuracy")]
    dear = max(costs) > WORST_COST
    middle = LEFT + 0.76 * (RIGHT - LEFT) if dear else RIGHT
    across = broken(WORST_COST, 1.2 * max(costs), LEFT, middle, RIGHT) if dear else linear(0, WORST_COST, LEFT, RIGHT)
    pad = 0.05 * (max(heights) - min(heights)) + 0.005
    upright = linear(min(heights) - pad, max(heights) + pad, BOTTOM, TOP)
    ticks = [(tick, f"{tick:g}") for tick in (0, 0.25, 0.5, 0.75, 1)]
    if dear:
        beyond = [tick for tick in ratio_ticks(1.5, 1.2 * max(costs)) if across(tick) > middle + 26]
        ticks += [(tick, f"{tick:g}") for tick in beyond[:: max(1, len(beyond) // 3)]]
    frame.across(across, ticks, f"cost: {COUNTED[counts]}, share of all pathways on")
    frame.upright(
        upright, [(t, f"{t:g}") for t in even_ticks(min(heights) - pad, max(heights) + pad)], "accuracy on query examples"
    )
    if dear:
        for x in (middle + 4, middle + 9):
            frame.picture.add(Path([(x - 3, BOTTOM + 5), (x + 3, BOTTOM - 5)], "muted", 1.3))
        frame.picture.add(Path([(middle + 6, TOP), (middle + 6, BOTTOM)], "muted", 1, 0.6, dashed=True))
    return across, upright


def _of_weights(methods: Mapping[str, Any], measure: str) -> list[float]:
    each = [point[measure] for one in methods.values() if one["trades"] for point in one["by_cost_weight"].values()]
    return [value for value in each if value is not None]


def _front(picture: Picture, summary: Summary, name: str, across: Scale, upright: Scale) -> None:
    """A method's points at all cost weights, and the line of those that no other of its own beats."""
    colour, mine = look(name, summary)[1], name == summary["subject"]
    up = height(name, summary) - summary["methods"][name]["means"]["accuracy"]
    weights = {w: one for w, one in summary["methods"][name]["by_cost_weight"].items() if one["accuracy"] is not None}
    if not weights:
        return
    front = pareto_front(np.array([[one["cost"], one["accuracy"]] for one in weights.values()]))
    line = [(across(cost), upright(accuracy + up)) for cost, accuracy in front.tolist()]
    picture.add(Path(line, colour, 2.6 if mine else 1.1, 1.0 if mine else 0.6, title=f"{name}: Pareto front"))
    for weight, one in weights.items():
        said = f"{name} at cost weight {weight}: cost {one['cost']:.3f}, accuracy {one['accuracy']:.3f}"
        picture.add(Mark(across(one["cost"]), upright(one["accuracy"] + up), "circle", colour, 2.8 if mine else 1.8, said))


def _point(frame: Frame, summary: Summary, name: str, number: int, place: Place, taken: list[Rectangle]) -> None:
    """A method's sign at the main cost weight, and its number beside it, with a line to it where it had to go far."""
    (shape, colour), means, mine = look(name, summary), summary["methods"][name]["means"], name == summary["subject"]
    at = height(name, summary)
    fewer = f", by its difference from {summary['subject']} on fewer users" if at != means["accuracy"] else ""
    said = f"{name}: cost {means['cost']:.3f}, accuracy {at:.3f}{fewer}"
    wide = Text(0, 0, str(number), size=11).width + 1
    left, top = free_spot(place, (wide, 9.0), taken, frame)
    taken.append((left, top, wide, 9.0))
    middle = (left + wide / 2, top + 4.5)
    if math.dist(middle, place) > 14:
        frame.picture.add(Path([place, middle], colour, 0.6, 0.6))
    frame.picture.add(Mark(*place, shape, "paper", 7.2 if mine else 5.4), Mark(*place, shape, colour, 6 if mine else 4.2, said))
    frame.picture.add(Box(left - 0.5, top - 0.5, wide + 1, 10, "paper", 0.7))
    frame.picture.add(Text(middle[0], top + 8.5, str(number), colour, 11, "middle", bold=True))


def _said(summary: Summary, methods: Mapping[str, Any]) -> str:
    best = max(methods, key=lambda name: height(name, summary))
    said = [f"Scatter plot of {len(methods)} methods at cost weight {summary['cost_weight']:g}, lines are Pareto fronts."]
    for name in dict.fromkeys([best, *([summary["subject"]] if summary["subject"] else []), "base"]):
        if name in methods:
            means = methods[name]["means"]
            said.append(f"{name}: accuracy {height(name, summary):.3f} at cost {means['cost']:.2f}.")
    return " ".join(said)

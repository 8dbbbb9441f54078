"""Several runs on one environment taken together: other folds bring further users, other seeds the same users again."""

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.bootstrap import paired_difference
from eval.bench.clock import Spread
from eval.bench.exit_speeds import BARE
from eval.bench.exits import ALL_ON, Runs, interval, run_name

PerUser = NDArray[np.float64]


def pooled(runs: Runs) -> Runs:
    """A row for all runs of :func:`eval.bench.exits.measure_exits` that differ in seed and fold alone, if several. JSON-able.

    Of a user whom several runs tested the mean over these runs counts (simulated users are others with every seed). Choices
    for a speed go together whatever was chosen; ways that some run lacks are left out.
    """
    alike: dict[str, Runs] = defaultdict(list)
    for run in runs:
        settings = {name: value for name, value in run["settings"].items() if name != "fold"}
        alike[run_name({**run, "settings": settings})].append(run)
    return [_together(name, several) for name, several in alike.items() if len(several) > 1]


def _together(title: str, runs: Runs) -> dict[str, Any]:
    ways = [{_kind(name): way for name, way in run["ways"].items()} for run in runs]
    people: list[list[Hashable]] = [[(run["simulated"] and run["seed"], user) for user in run["users"]] for run in runs]
    common = [name for name in ways[0] if all(name in some for some in ways)]
    right = {name: _per_user(people, [some[name]["each"] for some in ways]) for name in common}
    ratios = {
        name: [some[BARE]["milliseconds"]["median"] / some[name]["milliseconds"]["median"] for some in ways] for name in common
    }
    return {
        "title": title,
        "runs": len(runs),
        "users": len(right[BARE]),
        "ways": {
            name: {
                "accuracy": float(right[name].mean()),
                "less": {rival: asdict(paired_difference([right[name]], [right[rival]])) for rival in (BARE, ALL_ON)},
                "cost": float(np.mean([some[name]["cost"] for some in ways])),
                "speed": asdict(Spread.of(ratios[name])),
            }
            for name in common
        },
    }


def _kind(name: str) -> str:
    """``policy for 1.5x, 0.2`` as ``policy for 1.5x``; others as they are."""
    return name.split(", ")[0] if " for " in name else name


def _per_user(people: list[list[Hashable]], each: list[list[float]]) -> PerUser:
    """Every user's mean over runs, ``[U]``, in the order of first sight."""
    seen: dict[Hashable, list[float]] = defaultdict(list)
    for users, values in zip(people, each, strict=True):
        for user, value in zip(users, values, strict=True):
            seen[user].append(value)
    return np.array([np.mean(values) for values in seen.values()])


def pooled_table(rows: Runs) -> str:
    """The rows as Markdown."""
    lines = [
        "All runs on an environment together; intervals are paired over users, each the mean of the runs that tested them. "
        "Speed: the median of the runs' ratios to the bare model (least - most).",
        "",
        "| runs | way | accuracy | less the bare model | less all on | cost | speed against bare |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        for name, way in row["ways"].items():
            less = [interval(way["less"][rival]) if rival != name else "-" for rival in (BARE, ALL_ON)]
            where = f"{row['title']}, {row['runs']} runs, {row['users']} users" if name == BARE else ""
            speed = Spread(**way["speed"]).text(2)
            lines.append(f"| {where} | {name} | {way['accuracy']:.3f} | {less[0]} | {less[1]} | {way['cost']:.2f} | {speed} |")
    return "\n".join(lines)

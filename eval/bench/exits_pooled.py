"""Several runs with the same settings taken together: other folds bring further users, other seeds the same users again."""

import json
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from eval.bench.clock import Spread
from eval.bench.exit_speeds import BARE
from eval.bench.exits import RIVALS, Row, against, kind, less_cells


def pooled(rows: Sequence[Row]) -> list[Row]:
    """A row for all runs of :func:`eval.bench.exits.measure_exits` that differ in seed and fold alone, where there are several.

    Of a person whom several runs tested the mean over these runs counts; simulated users are others in every run. Choices for a
    speed go together whatever was chosen. Ways that some run lacks are left out, and named under ``missing``.
    """
    alike = defaultdict(list)
    for row in rows:
        alike[json.dumps(row["settings"], sort_keys=True)].append(row)
    return [_together(several) for several in alike.values() if len(several) > 1]


def _together(rows: list[Row]) -> Row:
    ways = [{kind(name): way for name, way in row["ways"].items()} for row in rows]
    every = list(dict.fromkeys(name for some in ways for name in some))
    common = [name for name in every if all(name in some for some in ways)]
    simulated = rows[0]["simulated"]
    compared = against([{name: some[name]["each"] for name in common} for some in ways], simulated)
    people = [user for some in ways for user in some[BARE]["each"]]
    return {
        "title": rows[0]["title"],
        "seeds": sorted({row["seed"] for row in rows}),
        "folds": sorted({row["fold"] for row in rows} - {None}),
        "users": len(people if simulated else set(people)),
        "missing": {name: sum(name not in some for some in ways) for name in every if name not in common},
        "runs": len(rows),
        "ways": {
            name: {
                **compared[name],
                "cost": float(np.mean([some[name]["cost"] for some in ways])),
                "masks": [some[name]["masks"] for some in ways],
                "speed": [some[BARE]["milliseconds"]["median"] / some[name]["milliseconds"]["median"] for some in ways],
            }
            for name in common
        },
    }


def pooled_table(rows: Sequence[Row]) -> str:
    """What :func:`pooled` found, as Markdown."""
    lines = [
        "The runs of an environment together. A person whom several runs tested counts once, with the mean; simulated users "
        "are others in every run. Differences are paired over users. Cost: mean over runs; masks and speed: medians over runs "
        "(least - most). What is `for 1.5x` was chosen in every run by itself.",
        "",
        f"| runs | way | accuracy | {' | '.join(RIVALS.values())} | cost | masks | speed against bare |",
        "| --- " * (6 + len(RIVALS)) + "|",
    ]
    for row in rows:
        folds = f", folds {_listed(row['folds'])}" if row["folds"] else ""
        where = f"{row['title']}, seeds {_listed(row['seeds'])}{folds}: {row['users']} users"
        for name, way in row["ways"].items():
            masks, speed = Spread.of(way["masks"]).text(), Spread.of(way["speed"]).text(2)
            lines.append(
                f"| {where if name == BARE else ''} | {name} | {way['accuracy']:.3f} | {less_cells(way)} | {way['cost']:.2f} "
                f"| {masks} | {speed} |"
            )
    for row in rows:
        for name, count in row["missing"].items():
            lines += [
                "",
                f"{row['title']}: `{name}` is left out, because {count} of {row['runs']} runs have nothing that fast.",
            ]
    return "\n".join(lines)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))

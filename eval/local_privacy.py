"""What it costs to trust nobody: ``python -m eval.local_privacy --write docs/privacy.md --figure docs/local-privacy.png``.

A policy is trained for every epsilon on what devices would send of their users (:mod:`envs.local_release`), and measured on
test users' query examples beside one that sees observations as they are, and beside the best static mask, which sees nothing of
anybody. Runs that are finished are not repeated.
"""

import argparse
import csv
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.bootstrap import Interval, paired_difference
from backbones.artefacts import ArtefactError
from envs.local_release import DELTA
from eval.headline import FURTHER, across, finished, read_run, text_of
from eval.pages import write_between_markers

BEGIN, END = "<!-- local privacy -->", "<!-- end of local privacy -->"
OPEN = float("inf")
Runs = dict[float, list[dict[str, Any]]]
"""By epsilon, the runs of all seeds as :func:`eval.headline.read_run` reads them."""


def runs(epsilons: Sequence[float], seeds: int, folder: Path, env: str, weight: float, extra: Sequence[str]) -> Runs:
    """Trained or found. Infinity: policies see observations as they are."""
    found: Runs = {}
    for epsilon in epsilons:
        flags = [*extra] if epsilon == OPEN else [*extra, "--env-kwargs", f"local_epsilon:{epsilon:g}"]
        paths = [finished(folder / f"epsilon{epsilon:g}-seed{seed}", env, seed, weight, flags) for seed in range(seeds)]
        found[epsilon] = [{**read_run(path)[0], "masks": _masks(path), "users": _users(path)} for path in paths]
    return found


def rewards(found: Runs, epsilon: float, method: str = "ppo") -> list[NDArray[np.float64]]:
    """Per seed ``[U]``; or, where all seeds have the same users, one array of their means, so that nobody counts twice."""
    each = across(found[epsilon], method, "reward")
    same = len({tuple(run["users"]) for run in found[epsilon]}) == 1
    return [np.mean(each, 0)] if same else each


def to(found: Runs, epsilon: float, other: list[NDArray[np.float64]]) -> Interval:
    """The policy's reward at an epsilon minus another one, paired."""
    return paired_difference(rewards(found, epsilon), other)


def table(found: Runs) -> str:
    """A row per epsilon, and the best static mask."""
    lines = ["| epsilon | reward | to no noise | to the best static mask | masks |", "| --- | --- | --- | --- | --- |"]
    static = rewards(found, OPEN, "best_static")
    for epsilon in found:
        title = "observations as they are" if epsilon == OPEN else f"{epsilon:g}"
        against = "-" if epsilon == OPEN else text_of(to(found, epsilon, rewards(found, OPEN)))
        cells = [title, _mean(rewards(found, epsilon)), against, text_of(to(found, epsilon, static))]
        lines.append("| " + " | ".join([*cells, " ".join(str(run["masks"]) for run in found[epsilon])]) + " |")
    lines.append(
        f"| the best static mask | {_mean(static)} | {text_of(paired_difference(static, rewards(found, OPEN)))} | - | 1 |"
    )
    return "\n".join(lines)


def draw(found: Runs, path: Path) -> None:
    """Reward against epsilon, between no noise and the best static mask. Needs matplotlib (extra ``plot``)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes, static = figure.subplots(), rewards(found, OPEN, "best_static")
    level, epsilons = float(np.mean([each.mean() for each in static])), sorted(each for each in found if each != OPEN)
    gains = [to(found, epsilon, static) for epsilon in epsilons]
    top = level + to(found, OPEN, static).mean
    axes.fill_between(epsilons, [level + g.low for g in gains], [level + g.high for g in gains], color="#2e8659", alpha=0.2)
    axes.plot(epsilons, [level + g.mean for g in gains], "o-", color="#2e8659", label="what devices send")
    axes.axhline(top, color="0.2", linewidth=1, label="observations as they are")
    axes.axhline(level, color="0.2", linestyle=":", linewidth=1, label="best static mask")
    axes.set_xscale("log")
    axes.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
    axes.minorticks_off()
    axes.set_xlabel(f"epsilon of what a device sends (delta {DELTA:g})")
    axes.set_ylabel("reward of test users")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _users(folder: Path) -> list[str]:
    with (folder / "users.csv").open() as file:
        return [row["user"] for row in csv.DictReader(file)]


def _masks(folder: Path) -> int:
    return int(json.loads((folder / "summary.json").read_text())["test"]["methods"]["ppo"]["distinct_masks"])


def _mean(each: list[NDArray[np.float64]]) -> str:
    return f"{np.mean([users.mean() for users in each]):.3f}"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.local_privacy",
        description=__doc__,
        epilog=FURTHER,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--env", default="dsa/Tabular-v0", help="environment id (default: %(default)s)")
    parser.add_argument(
        "--epsilon", type=float, nargs="+", default=[1.0, 3.0, 10.0, 30.0, 100.0], help="(default: 1 3 10 30 100)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (default: %(default)s)")
    parser.add_argument("--cost-weight", type=float, default=0.1, help="(default: %(default)s)")
    parser.add_argument(
        "--runs", type=Path, default=Path("logs/local-privacy"), help="folder of the runs (default: %(default)s)"
    )
    parser.add_argument("--write", type=Path, help="page with this table's markers to write it into")
    parser.add_argument("--figure", type=Path, help="where to draw reward against epsilon (needs the extra plot)")
    args, extra = parser.parse_known_args(arguments)
    try:
        if args.seeds < 1 or any(not epsilon > 0 for epsilon in args.epsilon):
            raise ValueError("give at least one seed, and epsilons above 0.")
        found = runs([OPEN, *sorted(args.epsilon, reverse=True)], args.seeds, args.runs, args.env, args.cost_weight, extra)
        command = shlex.join(["python", "-m", "eval.local_privacy", *(sys.argv[1:] if arguments is None else arguments)])
        lead = f"`{args.env}`, cost weight {args.cost_weight:g}, {args.seeds} seeds, {len(rewards(found, OPEN)[0])} test users"
        text = f"{lead}, delta {DELTA:g}; 95 % paired intervals. Written by `{command}`.\n\n{table(found)}"
        print(text)
        if args.write:
            write_between_markers(args.write, text, BEGIN, END)
        if args.figure:
            draw(found, args.figure)
    except (ValueError, ImportError, OSError, ArtefactError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

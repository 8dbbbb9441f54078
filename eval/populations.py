"""The README's table of real populations: ``python -m eval.populations --data-root DATA --write README.md``.

Per population, seed and (where there are folds) fold, trains a gating policy and measures it beside its rivals on test users.
A seed redraws support sampling and training; figures are averaged over a user's seeds first, and intervals are over users.
Runs that are finished are not repeated, so the command can be stopped and called again.
"""

import argparse
import csv
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.bootstrap import Interval, paired_difference
from eval.headline import FURTHER, Run, finished, read_run, text_of, write_between_markers

BEGIN, END = "<!-- populations: begin -->", "<!-- populations: end -->"


WHOLE = ("--env-kwargs", "shrink:false")
"""The table is of adapters that know whole supports alone, as they were before :mod:`meta.shrinkage`."""
QUICK = ("-P", "search:false")
"""The tables show no searches, which take longest where P > 8."""


@dataclass(frozen=True)
class Row:
    """One population of the table.

    Attributes:
        title: for readers. env: id. cost_weight: lambda. folds: how many, 0 for none.
        rival: the simple rival that must be beaten.
        extra: further flags of training.
    """

    title: str
    env: str
    cost_weight: float
    folds: int
    rival: str
    extra: tuple[str, ...] = ()

    def settings(self, seed: int) -> list[tuple[str, list[str]]]:
        """Folder name and flags of every run of a seed."""
        name = self.title.replace(" ", "-").replace(",", "")
        folds = range(self.folds) if self.folds else [None]
        more = [[] if fold is None else ["--env-kwargs", f"fold:{fold}"] for fold in folds]
        return [
            (f"{name}-seed{seed}" + ("" if fold is None else f"-fold{fold}"), [*WHOLE, *self.extra, *flags])
            for fold, flags in zip(folds, more, strict=True)
        ]


ROWS = {
    "unipen": Row("unipen, 3 per class", "dsa/UnipenResNet-v0", 0.05, 0, "intercept"),
    "popquorn": Row("popquorn, new annotators and comments", "dsa/PopquornBert-v0", 0.1, 5, "intercept", QUICK),
    "popquorn-annotators": Row(
        "popquorn, new annotators",
        "dsa/PopquornBert-v0",
        0.1,
        0,
        "intercept",
        ("--env-kwargs", "protocol:new_annotators", *QUICK),
    ),
    "jester": Row("jester, 20 ratings", "dsa/JesterBert-v0", 0.01, 0, "item_covariance", QUICK),
}


@dataclass(frozen=True)
class Measured:
    """A population's runs: figures per method averaged over each user's seeds, and the runs' summaries."""

    row: Row
    users: dict[str, dict[str, NDArray[np.float64]]]
    summaries: list[dict[str, Any]]

    def difference(self, first: str, second: str, field: str) -> Interval:
        """Paired over users."""
        return paired_difference([self.users[first][field]], [self.users[second][field]])


def measured(row: Row, seeds: int, root: Path, common: list[str]) -> Measured:
    """Train and evaluate what is missing, and put the runs together."""
    by_seed: list[tuple[list[str], Run]] = []
    summaries = []
    for seed in range(seeds):
        names: list[str] = []
        parts: list[Run] = []
        for name, flags in row.settings(seed):
            folder = finished(root / name, row.env, seed, row.cost_weight, [*common, *flags])
            run, _ = read_run(folder)
            parts.append(run)
            names += user_names(folder)
            summaries.append(json.loads((folder / "summary.json").read_text()))
        shared = [m for m in parts[0] if all(m in part for part in parts)]
        joined = {m: {f: np.concatenate([part[m][f] for part in parts]) for f in parts[0][m]} for m in shared}
        by_seed.append((names, joined))
    return Measured(row, over_seeds(by_seed), summaries)


def user_names(folder: Path) -> list[str]:
    """The test users of a run in the order of its figures."""
    with (folder / "users.csv").open() as file:
        return [row["user"] for row in csv.DictReader(file)]


def over_seeds(by_seed: Sequence[tuple[list[str], Run]]) -> Run:
    """Each user's mean over the seeds; users whom a seed left out (too few examples there) are averaged over the others."""
    users = sorted({name for names, _ in by_seed for name in names})
    out: Run = {}
    for method, fields in by_seed[0][1].items():
        if not all(method in run for _, run in by_seed):
            continue
        out[method] = {}
        for field in fields:
            table = np.full((len(by_seed), len(users)), np.nan)
            for row, (names, run) in enumerate(by_seed):
                table[row, [users.index(name) for name in names]] = run[method][field]
            out[method][field] = np.nanmean(table, axis=0)
    return out


def accuracies(found: Sequence[Measured]) -> list[str]:
    """What every method reaches on query examples of test users."""
    methods = ("all_off", "intercept", "item_covariance", "best_static", "all_on", "ppo")
    lines = [f"| population | users | {' | '.join(methods)} |", "| --- " * (2 + len(methods)) + "|"]
    for one in found:
        cells = [f"{one.users[m]['accuracy'].mean():.3f}" if m in one.users else "" for m in methods]
        lines.append(f"| {one.row.title} | {len(one.users['ppo']['accuracy'])} | {' | '.join(cells)} |")
    return lines


def policies(found: Sequence[Measured]) -> list[str]:
    """What the policy switches on, and whether it is better than what is simpler."""
    heads = (
        "cost weight",
        "pathways on",
        "cost",
        "masks",
        "accuracy, ppo - simple rival",
        "accuracy, ppo - all_on",
        "reward, ppo - best_static",
        "reward, ppo - shuffled",
        "s per user",
        "all_off, train / val users",
    )
    lines = [f"| population | {' | '.join(heads)} |", "| --- " * (1 + len(heads)) + "|"]
    for one in found:
        tests, weight = [s["test"] for s in one.summaries], one.row.cost_weight
        masks = np.mean([test["methods"]["ppo"]["distinct_masks"] for test in tests])
        off = [np.mean([s["leakage"]["all_off"][split] for s in one.summaries]) for split in ("train", "val")]
        cells = [
            f"{weight:g}",
            f"{one.users['ppo']['active_fraction'].mean():.0%}",
            f"{one.users['ppo']['cost'].mean():.2f}",
            f"{masks:.0f}",
            against_rival(one),
            text_of(one.difference("ppo", "all_on", "accuracy")),
            text_of(one.difference("ppo", "best_static", "reward")),
            text_of(one.difference("ppo", "shuffled", "reward")) if "shuffled" in one.users else "",
            f"{np.median([s['seconds_per_user'] for s in one.summaries]):.2f}",
            f"{off[0]:.3f} / {off[1]:.3f}",
        ]
        lines.append(f"| {one.row.title} | {' | '.join(cells)} |")
    return lines


def against_rival(one: Measured) -> str:
    """The policy's accuracy less the simple rival's, where the population admits that rival."""
    rival = one.row.rival
    return f"{rival}: {text_of(one.difference('ppo', rival, 'accuracy'))}" if rival in one.users else ""


def report(found: Sequence[Measured], seeds: int, command: str) -> str:
    """The whole text between the markers."""
    lead = (
        f"{seeds} seeds, adapters without shrinkage of few examples (`--env-kwargs shrink:false`; with it, over five seeds: "
        "[docs/results.md](docs/results.md)); accuracy on query examples of test users, averaged over a user's seeds; 95 % "
        "paired bootstrap intervals over users (what training varies by is in them only as far as the seeds average it). "
        "`masks`: distinct ones "
        "per run; `s per user`: from raw support examples to adapted weights, one user at a time on the CPU; the last column "
        "on validation examples (train users more than three points above val users would be a defect). "
        f"Written by `{command}`."
    )
    return "\n\n".join([lead, "\n".join(accuracies(found)), "\n".join(policies(found))])


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.populations", description=__doc__, epilog=FURTHER)
    parser.add_argument("names", nargs="*", default=list(ROWS), help=f"which of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (default: %(default)s)")
    parser.add_argument("--data-root", type=Path, help="folder of the data sets (default: $DSA_DATA_ROOT)")
    parser.add_argument("--runs", type=Path, default=Path("logs/populations"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--write", type=Path, help="page with markers to write the tables into (default: print only)")
    args, extra = parser.parse_known_args(arguments)
    if unknown := [name for name in args.names if name not in ROWS]:
        parser.error(f"unknown population {unknown[0]!r}; choose from {', '.join(ROWS)}.")
    common = [*(["--data-root", str(args.data_root)] if args.data_root else []), *extra]
    # The page gets the command, but nobody's folders.
    data = ["--data-root", "DATA"] if args.data_root else []
    names = [] if args.names == list(ROWS) else args.names
    seeds = ["--seeds", str(args.seeds)] if args.seeds != parser.get_default("seeds") else []
    written = ["--write", args.write.name] if args.write else []
    command = shlex.join(["python", "-m", "eval.populations", *names, *seeds, *data, *written])
    try:
        found = [measured(ROWS[name], args.seeds, args.runs, common) for name in args.names]
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    text = report(found, args.seeds, command)
    print(text)
    if args.write:
        write_between_markers(args.write, text, BEGIN, END)


if __name__ == "__main__":
    main()

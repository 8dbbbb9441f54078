"""The README's result table: ``python -m eval.headline``.

Trains a gating policy per seed and cost weight (a seed redraws users, backbone, initialisation and policy; what a seed's
runs share is made once), measures it beside its rivals on test users, and writes the table between the markers of the
README. Runs that are finished are not repeated, so the command can be stopped and called again.
"""

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.bootstrap import Interval, gap_closed, paired_difference
from agents.comparison import EXTRA, METHODS
from agents.train_ppo import main as train_ppo
from backbones.artefacts import write_atomically

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
Run = dict[str, dict[str, NDArray[np.float64]]]
"""Per method the columns of ``users.csv`` that are numbers, ``[U]`` each."""


def finished(root: Path, env: str, seed: int, weight: float, extra: Sequence[str]) -> Path:
    """The folder of one run, trained and evaluated first if it is not yet."""
    folder = root / f"seed{seed}-cost{weight:g}"
    if not (folder / "summary.json").exists():
        if (folder / "config.json").exists():
            train_ppo(["--resume", str(folder)])
        else:
            train_ppo(["--log-dir", str(folder), "--env", env, "--seed", str(seed), "--cost-weight", str(weight), *extra])
    return folder


def read_run(folder: Path) -> tuple[Run, NDArray[np.str_]]:
    """A run's per-user figures by method, and each user's group."""
    with (folder / "users.csv").open() as file:
        rows = list(csv.DictReader(file))
    fields = ("accuracy", "cost", "reward", "active_fraction")
    run = {name: {f: np.array([float(row[f"{name}_{f}"]) for row in rows]) for f in fields} for name in METHODS + EXTRA}
    return run, np.array([row["group"] for row in rows])


def across(runs: Sequence[Run], method: str, field: str) -> list[NDArray[np.float64]]:
    """One array ``[U]`` per seed."""
    return [run[method][field] for run in runs]


def mean(runs: Sequence[Run], method: str, field: str) -> float:
    """Over users and seeds."""
    return float(np.mean([values.mean() for values in across(runs, method, field)]))


def text_of(interval: Interval) -> str:
    """``+0.012 [+0.003, +0.021]``."""
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def method_table(by_weight: dict[float, list[Run]]) -> list[str]:
    """Reward, accuracy and share of pathways per method and cost weight."""
    heads = " | ".join(f"reward at {w:g} | accuracy | on" for w in by_weight)
    lines = [f"| method | {heads} |", "| --- " * (1 + 3 * len(by_weight)) + "|"]
    for name in METHODS + EXTRA:
        cells = [
            f"{mean(runs, name, 'reward'):.3f} | {mean(runs, name, 'accuracy'):.3f} | {mean(runs, name, 'active_fraction'):.0%}"
            for runs in by_weight.values()
        ]
        title = f"**{name}**" if name == "ppo" else name
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def conclusions(by_weight: dict[float, list[Run]]) -> list[str]:
    """Paired differences at each weight, and the gap closed, pooled over the weights at which it is defined."""
    lines = ["| cost weight | ppo - best_static | ppo - shuffled | gap closed |", "| --- | --- | --- | --- |"]
    defined = []
    for weight, runs in by_weight.items():
        rewards = {name: across(runs, name, "reward") for name in ("ppo", "best_static", "shuffled", "validation_search")}
        gap = gap_closed(rewards["ppo"], rewards["best_static"], rewards["validation_search"])
        if gap.value is not None and gap.ci95 is not None:
            defined.append(rewards)
            closed = f"{gap.value:.2f} [{gap.ci95[0]:.2f}, {gap.ci95[1]:.2f}]"
        else:
            closed = f"not defined: {gap.reason}"
        static = text_of(paired_difference(rewards["ppo"], rewards["best_static"]))
        shuffled = text_of(paired_difference(rewards["ppo"], rewards["shuffled"]))
        lines.append(f"| {weight:g} | {static} | {shuffled} | {closed} |")
    if defined:
        pooled = {name: list(np.mean([d[name] for d in defined], axis=0)) for name in defined[0]}
        gap = gap_closed(pooled["ppo"], pooled["best_static"], pooled["validation_search"])
        if gap.value is not None and gap.ci95 is not None:
            lines.append(f"| pooled | | | {gap.value:.2f} [{gap.ci95[0]:.2f}, {gap.ci95[1]:.2f}] |")
    return lines


def group_lines(runs: Sequence[Run], groups: Sequence[NDArray[np.str_]]) -> list[str]:
    """Accuracy of whole-model masks by group of users."""
    lines = ["| users | all_off | all_on |", "| --- | --- | --- |"]
    for group in sorted(set(np.concatenate(list(groups)))):
        cells = [
            float(np.mean([run[m]["accuracy"][g == group].mean() for run, g in zip(runs, groups, strict=True)]))
            for m in ("all_off", "all_on")
        ]
        lines.append(f"| {group} | {cells[0]:.3f} | {cells[1]:.3f} |")
    return lines


def report(folders: dict[float, list[Path]], command: str) -> str:
    """The whole text between the markers."""
    read = {weight: [read_run(folder) for folder in paths] for weight, paths in folders.items()}
    by_weight = {weight: [run for run, _ in pairs] for weight, pairs in read.items()}
    first = next(iter(read.values()))
    users, seeds = len(first[0][1]), len(first)
    seconds: list[dict[str, Any]] = [
        json.loads((path / "summary.json").read_text())["wall_seconds"] for paths in folders.values() for path in paths
    ]
    longest = max(sum(s.values()) for s in seconds)
    lead = (
        f"{seeds} seeds, {users} test users each; 95 % paired bootstrap intervals, users within seeds. Users of a split "
        "share images: the intervals describe new users of the same image pool. `random` and `shuffled` are means of 10 "
        "draws. Labels used per user: `validation_search`, `all_on_all_labels` and `ppo_all_labels` 60, `all_off` none, "
        f"the others 20. Longest run: {longest / 60:.1f} minutes. Written by `{command}`."
    )
    first_runs, groups = [run for run, _ in first], [group for _, group in first]
    blocks = [method_table(by_weight), conclusions(by_weight), group_lines(first_runs, groups)]
    return "\n\n".join([lead, *("\n".join(block) for block in blocks)])


def write_between_markers(path: Path, text: str) -> None:
    """Replace what stands between the markers. Raises ``ValueError`` if the file lacks them."""
    page = path.read_text()
    if BEGIN not in page or END not in page:
        raise ValueError(f"{path} has no lines {BEGIN} and {END} to write the table between.")
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    write_atomically(path, f"{head}{BEGIN}\n{text}\n{END}{tail}".encode())


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.headline", description=__doc__)
    parser.add_argument("--env", default="dsa/DigitsResNet-v0", help="environment id (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (default: %(default)s)")
    parser.add_argument("--cost-weights", type=float, nargs="+", default=[0.05, 0.1, 0.2], help="(default: .05 .1 .2)")
    parser.add_argument("--runs", type=Path, default=Path("logs/headline"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--write", type=Path, help="page with markers to write the table into (default: print only)")
    args, extra = parser.parse_known_args(arguments)
    folders = {
        weight: [finished(args.runs, args.env, seed, weight, extra) for seed in range(args.seeds)]
        for weight in args.cost_weights
    }
    text = report(folders, "python -m eval.headline --write README.md")
    print(text)
    if args.write:
        write_between_markers(args.write, text)


if __name__ == "__main__":
    main()

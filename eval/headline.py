"""The README's result table: ``python -m eval.headline``.

Trains a gating policy per seed and cost weight (a seed redraws users, backbone, initialisation and policy; what a seed's
runs share is made once), measures it beside its rivals on test users, and writes the table between the markers of the
README. Runs that are finished are not repeated, so the command can be stopped and called again.
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

from agents.bootstrap import GapClosed, Interval, paired_difference
from agents.comparison import EXTRA, METHODS, SIMPLE, conclude
from agents.people import People, unit_of
from agents.run import RunConfig
from agents.train_ppo import main as train_ppo
from agents.train_ppo import parse, read_settings
from eval.pages import write_between_markers

FURTHER = "Further flags (-P, -n, --env-kwargs, --num-threads, ...) go on to agents.train_ppo, whose --help lists them."
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
Run = dict[str, dict[str, NDArray[np.float64]]]
"""Per method the columns of ``users.csv`` that are numbers, ``[U]`` each."""
Read = tuple[Run, NDArray[np.str_], list[str]]
"""A run's figures, groups ``[U]`` and ids."""
Rewards = dict[str, NDArray[np.float64]]
"""Per method ``[U]``."""


def finished(folder: Path, env: str, seed: int, weight: float | str, extra: Sequence[str]) -> Path:
    """The folder of one run, trained and evaluated first if it is not yet.

    Raises:
        ValueError: if the folder holds a run with other settings.
    """
    flags = ["--env", env, "--seed", str(seed), "--cost-weight", str(weight), *extra]
    begun = (folder / "config.json").exists()
    if begun and RunConfig.load(folder) != read_settings(parse(flags)):
        raise ValueError(f"{folder} was made with other settings; remove it, or choose another --runs.")
    if not (folder / "summary.json").exists():
        train_ppo(["--resume", str(folder)] if begun else ["--log-dir", str(folder), *flags])
    return folder


def read_run(folder: Path) -> Read:
    """A run's per-user figures by method, each user's group, and who they are."""
    with (folder / "users.csv").open() as file:
        rows = list(csv.DictReader(file))
    fields = ("accuracy", "cost", "reward", "active_fraction")
    names = [name for name in METHODS + EXTRA + SIMPLE if f"{name}_reward" in rows[0]]
    run = {name: {f: np.array([float(row[f"{name}_{f}"]) for row in rows]) for f in fields} for name in names}
    return run, np.array([row["group"] for row in rows]), [row["user"] for row in rows]


def by_person(seeds: Sequence[Read]) -> Read:
    """Runs on the same real people as one: of everybody, who counts once, the mean over the seeds in which they are."""
    everybody = People([names for _, _, names in seeds])
    groups = {name: group for _, of_run, names in seeds for name, group in zip(names, of_run.tolist(), strict=True)}
    run = {
        method: {field: everybody.mean([run[method][field] for run, _, _ in seeds]) for field in fields}
        for method, fields in seeds[0][0].items()
    }
    return run, np.array([groups[name] for name in everybody.names]), everybody.names


def across(runs: Sequence[Run], method: str, field: str) -> list[NDArray[np.float64]]:
    """One array ``[U]`` per seed."""
    return [run[method][field] for run in runs]


def mean(runs: Sequence[Run], method: str, field: str) -> float:
    """Over users and seeds."""
    return float(np.mean([values.mean() for values in across(runs, method, field)]))


def text_of(interval: Interval) -> str:
    """``+0.012 [+0.003, +0.021]``."""
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def method_table(by_weight: dict[float, list[Run]], tests: dict[float, list[dict[str, Any]]]) -> list[str]:
    """Reward, accuracy, share of pathways and distinct masks per method and cost weight."""
    heads = " | ".join(f"reward at {w:g} | accuracy | on | masks" for w in by_weight)
    lines = [f"| method | labels | {heads} |", "| --- " * (2 + 4 * len(by_weight)) + "|"]
    for name in next(iter(by_weight.values()))[0]:
        cells = []
        for weight, runs in by_weight.items():
            rows = [{**test["methods"], **test["equal_labels"], **test["simple"]}[name] for test in tests[weight]]
            masks, labels = (np.mean([row[key] for row in rows]) for key in ("distinct_masks", "labels_used"))
            reward, accuracy, on = (mean(runs, name, field) for field in ("reward", "accuracy", "active_fraction"))
            cells.append(f"{reward:.3f} | {accuracy:.3f} | {on:.0%} | {masks:.0f}")
        title = f"**{name}**" if name == "ppo" else name
        lines.append(f"| {title} | {labels:.0f} | {' | '.join(cells)} |")
    return lines


def conclusions(by_weight: dict[float, list[Run]]) -> list[str]:
    """Paired differences at each weight, and the gap closed, pooled over the weights at which it is defined."""
    lines = [
        "| cost weight | ppo - best_static | ppo - shuffled | accuracy, ppo - all_on | ppo - support_search "
        "| ppo_all_labels - validation_search | gap closed |",
        "| --- " * 7 + "|",
    ]
    defined = []
    for weight, runs in by_weight.items():
        rewards = [{name: values["reward"] for name, values in run.items()} for run in runs]
        done = conclude(rewards)
        if done.gap.value is not None:
            defined.append(rewards)
        cells = [
            text_of(done.minus_static),
            text_of(done.minus_shuffled) if done.minus_shuffled else "",
            text_of(paired_difference(across(runs, "ppo", "accuracy"), across(runs, "all_on", "accuracy"))),
            text_of(paired_difference(across(runs, "ppo", "reward"), across(runs, "support_search", "reward"))),
            text_of(paired_difference(across(runs, "ppo_all_labels", "reward"), across(runs, "validation_search", "reward"))),
            gap_text(done.gap),
        ]
        lines.append(f"| {weight:g} | {' | '.join(cells)} |")
    if defined:
        lines.append(f"| pooled {'| ' * 6}{gap_text(conclude(pooled_over_weights(defined)).gap)} |")
    return lines


def pooled_over_weights(rewards: Sequence[Sequence[Rewards]]) -> list[Rewards]:
    """Per seed and method the mean over cost weights, of rewards by weight, seed and method."""
    seeds = range(len(rewards[0]))
    return [{name: np.mean([each[seed][name] for each in rewards], axis=0) for name in rewards[0][seed]} for seed in seeds]


def gap_text(gap: GapClosed) -> str:
    """The gap closed with its interval, or why it is not defined."""
    if gap.value is None or gap.ci95 is None:
        return f"not defined: {gap.reason}"
    return f"{gap.value:.2f} [{gap.ci95[0]:.2f}, {gap.ci95[1]:.2f}]"


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
    summaries = {
        weight: [json.loads((path / "summary.json").read_text()) for path in paths] for weight, paths in folders.items()
    }
    tests = {weight: [summary["test"] for summary in each] for weight, each in summaries.items()}
    first = next(iter(read.values()))
    seeds = f"{len(first)} seeds, {len(first[0][1])} test users each"
    simulated = all(summary.get("simulated", True) for each in summaries.values() for summary in each)
    if not simulated:
        read = {weight: [by_person(each)] for weight, each in read.items()}
    by_weight = {weight: [run for run, _, _ in each] for weight, each in read.items()}
    first = next(iter(read.values()))
    lead = (
        f"{seeds}; 95 % paired bootstrap intervals, {unit_of(simulated)}. Users of a split may share examples (the "
        "digits' users do): the "
        "intervals then describe new users of the same pool. `labels`: of the user's own, used to choose and adapt; `on`: "
        "share of pathways; `masks`: distinct ones. "
        f"`random` and `shuffled` are means of 10 draws. Written by `{command}`."
    )
    first_runs, groups = [run for run, _, _ in first], [group for _, group, _ in first]
    blocks = [method_table(by_weight, tests), conclusions(by_weight), group_lines(first_runs, groups)]
    return "\n\n".join([lead, *("\n".join(block) for block in blocks)])


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.headline", description=__doc__, epilog=FURTHER)
    parser.add_argument("--env", default="dsa/DigitsResNet-v0", help="environment id (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (default: %(default)s)")
    parser.add_argument("--cost-weights", type=float, nargs="+", default=[0.05, 0.1, 0.2], help="(default: .05 .1 .2)")
    parser.add_argument("--runs", type=Path, default=Path("logs/headline"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--write", type=Path, help="page with markers to write the table into (default: print only)")
    args, extra = parser.parse_known_args(arguments)
    folders = {
        weight: [
            finished(args.runs / f"seed{seed}-cost{weight:g}", args.env, seed, weight, extra) for seed in range(args.seeds)
        ]
        for weight in args.cost_weights
    }
    given = sys.argv[1:] if arguments is None else arguments
    text = report(folders, shlex.join(["python", "-m", "eval.headline", *given]))
    print(text)
    if args.write:
        write_between_markers(args.write, text, BEGIN, END)


if __name__ == "__main__":
    main()

"""Masks that beat the bare model: accuracy and throughput of trained runs whose policies may end inference early."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from agents.bootstrap import Interval, mean_interval, units
from agents.checkpoint import choose_masks, load_policy
from agents.rivals import best_static
from agents.run import RunConfig
from eval.bench.clock import Spread
from eval.bench.exit_runs import exit_runs, fold_of, shared, title
from eval.bench.exit_speeds import BARE, BATCH, MARGIN, POLICY, STATIC, for_speeds, timed
from eval.headline import text_of

ALL_ON = "all_on"
WEIGHTS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
"""Cost weights that are shown, of those that a policy was trained for."""
RIVALS = {BARE: "less the bare model", ALL_ON: "less all on", STATIC: "less best_static"}
"""What ways are compared with, by the heads of columns; policies alone with the one mask for all that was chosen like them."""
Row = dict[str, Any]
"""Figures of one run, or of several together. JSON-able."""


def measure_exits(folders: list[Path], repeats: int = 15) -> list[Row]:
    """One row per run: accuracy on test users' query examples, and milliseconds of a batch of 64 users.

    Args:
        folders: finished runs of ``agents.train_ppo`` on environments whose gates may exit.
        repeats: of every call, at least.

    Raises:
        FileNotFoundError, ValueError: see :func:`eval.bench.exit_runs.exit_runs`; before anything is measured.
    """
    return [measure_exit(folder, config, repeats) for folder, config in zip(folders, exit_runs(folders), strict=True)]


def measure_exit(folder: Path, config: RunConfig, repeats: int) -> Row:
    """One run's figures, the policy at every reported cost weight."""
    scenario = config.scenario(folder)
    users, trained, seed = scenario.users("test"), config.rules.weight, config.seed
    policy, _ = load_policy(folder / "policy", scenario)
    every = np.ones((len(users), len(scenario.pathways)), dtype=bool)
    masks = {BARE: scenario.executed(~every), ALL_ON: every}
    for weight in [w for w in WEIGHTS if trained.low <= w <= trained.high] or trained.reported():
        own = choose_masks(policy, scenario, users, weight if trained.varies else None, config.rules)
        static = scenario.executed(np.tile(best_static(scenario, weight, seed), (len(users), 1)))
        masks |= {f"{POLICY}, {weight:g}": own, f"{STATIC}, {weight:g}": static}
    masks |= for_speeds(scenario, policy, config.rules, seed, repeats)
    accuracy = {name: scenario.oracle.evaluate(users, chosen, "query").accuracy for name, chosen in masks.items()}
    scenario.save()
    first = {(name == BARE, chosen.tobytes()): name for name, chosen in reversed(masks.items())}  # the same masks once
    speed = timed(scenario, "test", {name: masks[name] for name in masks if name in first.values()}, repeats)
    names = [scenario.user_ids[user] for user in users]
    each = {name: dict(zip(names, values.tolist(), strict=True)) for name, values in accuracy.items()}
    compared = against([each], simulated=True)
    return {
        "title": title(config),
        "seed": seed,
        "fold": fold_of(config),
        "settings": shared(config),
        "simulated": scenario.simulated,
        "ways": {
            name: {
                "each": each[name],
                **compared[name],
                "cost": float(scenario.oracle.costs.of(chosen).mean()),
                "masks": len(np.unique(chosen, axis=0)),
                "milliseconds": asdict(speed[first[name == BARE, chosen.tobytes()]]),
            }
            for name, chosen in masks.items()
        },
    }


def against(runs: Sequence[Mapping[str, Mapping[str, float]]], simulated: bool) -> dict[str, dict[str, Any]]:
    """Accuracy of every way of answering, and its paired differences from its :data:`RIVALS`.

    Args:
        runs: per run and way, accuracy by user; all of them have the same ways.
        simulated: whether names are other users in every run, see :func:`agents.bootstrap.units`.
    """
    found = {}
    for name in runs[0]:
        mine = [run[name] for run in runs]
        like = twin(name, [*runs[0]])
        rivals = {BARE: BARE, ALL_ON: ALL_ON} | ({STATIC: like} if like else {})
        apart = {rival: units(mine, [run[way] for run in runs], simulated) for rival, way in rivals.items() if way != name}
        level = units(mine, [dict.fromkeys(one, 0.0) for one in mine], simulated)
        less = {rival: asdict(mean_interval(each)) for rival, each in apart.items()}
        found[name] = {"accuracy": float(np.mean([part.mean() for part in level])), "less": less}
    return found


def kind(name: str) -> str:
    """A way without what was chosen for a speed, which runs differ in: ``policy for 1.5x, 0.2`` is ``policy for 1.5x``."""
    return name.split(", ")[0] if " for " in name else name


def twin(name: str, ways: Sequence[str]) -> str | None:
    """The one mask for all that was chosen at the cost weight, or for the speed, of a policy's way; None for other ways."""
    like = kind(name).replace(POLICY, STATIC, 1)
    return next((way for way in ways if name.startswith(POLICY) and kind(way) == like), None)


def less_cells(way: Mapping[str, Any]) -> str:
    """Differences from the :data:`RIVALS` as cells of a table."""
    return " | ".join(text_of(Interval(**way["less"][rival])) if rival in way["less"] else "-" for rival in RIVALS)


def exits_table(rows: list[Row]) -> str:
    """The runs as Markdown: what each way of answering gets right, and how fast it is."""
    lines = [
        f"A batch of {BATCH} users whose adapters are made already, one example each (people come again where a population has "
        "fewer): medians (least - most) of answering it. Accuracy on test users' query examples, mean over users; differences "
        "are paired over users. Policies and static masks by cost weight; `for 1.5x`: the cost weight, or the one mask for "
        f"all, under which val users' accuracy is highest at {MARGIN} times that speed or more, as measured here. Cost: the "
        "share of what everything on costs, as the environment counts it; masks: different ones.",
        "",
        f"| run | way | accuracy | {' | '.join(RIVALS.values())} | cost | masks | ms | speed against bare |",
        "| --- " * (7 + len(RIVALS)) + "|",
    ]
    for row in rows:
        bare = Spread(**row["ways"][BARE]["milliseconds"])
        where = f"{row['title']}, seed {row['seed']}" + ("" if row["fold"] is None else f", fold {row['fold']}")
        for name, way in row["ways"].items():
            spread = Spread(**way["milliseconds"])
            lines.append(
                f"| {where if name == BARE else ''} | {name} | {way['accuracy']:.3f} | {less_cells(way)} | {way['cost']:.2f} "
                f"| {way['masks']} | {spread.text(1)} | {bare.median / spread.median:.2f} |"
            )
    return "\n".join(lines)

"""Masks that beat the bare model: accuracy and throughput of a trained run whose policy may end inference early."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from agents.bootstrap import paired_difference
from agents.checkpoint import choose_masks, load_policy
from agents.rivals import best_static
from agents.run import RunConfig
from eval.bench.clock import Spread
from eval.bench.exit_speeds import BARE, BATCH, MARGIN, for_speeds, timed

ALL_ON = "all_on"
WEIGHTS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
"""Cost weights that are shown, of those that a policy was trained for."""
SUCH = "dsa/UnipenResNetExit-v0"
Runs = list[dict[str, Any]]


def measure_exits(folders: list[Path], repeats: int = 15) -> Runs:
    """One row per run: accuracy on test users' query examples, and milliseconds of a batch of 64 different users. JSON-able.

    Args:
        folders: finished runs of ``agents.train_ppo`` on an environment whose gates may exit.
        repeats: of every call.

    Raises:
        FileNotFoundError: for a folder that is no run. ValueError: for a run whose gates cannot exit.
    """
    return [measure_exit(folder, repeats) for folder in folders]


def measure_exit(folder: Path, repeats: int) -> dict[str, Any]:
    """One run's figures, the policy at every reported cost weight."""
    config = RunConfig.load(folder)
    scenario = config.scenario(folder)
    if scenario.data is None or not scenario.data.pathways.exits:
        raise ValueError(f"{folder} is a run on {config.env}, where masks run the whole network: give one on {SUCH} say.")
    users, trained, seed = scenario.users("test"), config.rules.weight, config.seed
    policy, _ = load_policy(folder / "policy", scenario)
    every = np.ones((len(users), len(scenario.pathways)), dtype=bool)
    masks = {BARE: scenario.executed(~every), ALL_ON: every}
    for weight in [w for w in WEIGHTS if trained.low <= w <= trained.high] or trained.reported():
        own = choose_masks(policy, scenario, users, weight if trained.varies else None, config.rules)
        static = best_static(scenario, weight, seed)
        masks |= {f"policy, {weight:g}": own, f"best_static, {weight:g}": scenario.executed(np.tile(static, (len(users), 1)))}
    masks |= for_speeds(scenario, policy, config.rules, seed, repeats)
    accuracy = {name: scenario.oracle.evaluate(users, chosen, "query").accuracy for name, chosen in masks.items()}
    scenario.save()
    speed = timed(scenario, "test", masks, repeats)
    settings = {name: value for name, value in sorted(config.env_kwargs.items()) if name != "data_root"}
    return {
        "env": config.env,
        "seed": seed,
        "settings": settings,
        "simulated": scenario.data.population.simulated,
        "users": [scenario.user_ids[user] for user in users],
        "ways": {
            name: {
                "each": accuracy[name].tolist(),
                "accuracy": float(accuracy[name].mean()),
                "less": {rival: asdict(paired_difference([accuracy[name]], [accuracy[rival]])) for rival in (BARE, ALL_ON)},
                "cost": float(scenario.oracle.costs.of(chosen).mean()),
                "masks": len(np.unique(chosen, axis=0)),
                "milliseconds": asdict(speed[name]),
            }
            for name, chosen in masks.items()
        },
    }


def exits_table(runs: Runs) -> str:
    """The runs as Markdown: what each way of answering gets right, and how fast it is."""
    lines = [
        f"A batch of {BATCH} different users, one example each; medians (least - most). Accuracy on test users' queries; "
        "intervals are paired over users. Policies and static masks by cost weight; `for 1.5x`: the cost weight, or the one "
        f"mask for all, with which val users are right most often at {MARGIN} times that speed or more, as measured here.",
        "",
        "| run | way | accuracy | less the bare model | less all on | cost | masks | ms | speed against bare |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        bare = Spread(**run["ways"][BARE]["milliseconds"])
        for name, way in run["ways"].items():
            less = [interval(way["less"][rival]) if rival != name else "-" for rival in (BARE, ALL_ON)]
            spread = Spread(**way["milliseconds"])
            where = f"{run_name(run)}, seed {run['seed']}" if name == BARE else ""
            lines.append(
                f"| {where} | {name} | {way['accuracy']:.3f} | {less[0]} | {less[1]} | {way['cost']:.2f} | {way['masks']} "
                f"| {spread.text(1)} | {bare.median / spread.median:.2f} |"
            )
    return "\n".join(lines)


def run_name(run: dict[str, Any]) -> str:
    """Environment and settings of a run, as tables show them."""
    return ", ".join([run["env"].removeprefix("dsa/"), *(f"{name} {value}" for name, value in run["settings"].items())])


def interval(one: dict[str, float]) -> str:
    """A difference with its interval, as tables show it."""
    return f"{one['mean']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"

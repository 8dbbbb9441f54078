"""Masks that beat the bare model: accuracy and throughput of a trained run whose policy may end inference early."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.bootstrap import paired_difference
from agents.checkpoint import choose_masks, load_policy
from agents.rivals import best_static
from agents.run import RunConfig
from envs.oracles import LiveOracle, Plans
from envs.scenario import Scenario
from eval.bench.clock import Spread, alternating_calls

BATCH = 64
BARE, ALL_ON = "bare", "all_on"
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
    users, trained = scenario.users("test"), config.rules.weight
    policy, _ = load_policy(folder / "policy", scenario)
    every = np.ones((len(users), len(scenario.pathways)), dtype=bool)
    masks = {BARE: scenario.executed(~every), ALL_ON: every}
    for weight in [w for w in WEIGHTS if trained.low <= w <= trained.high] or trained.reported():
        own = choose_masks(policy, scenario, users, weight if trained.varies else None, config.rules)
        static = best_static(scenario, weight, config.seed)
        masks |= {f"policy, {weight:g}": own, f"best_static, {weight:g}": scenario.executed(np.tile(static, (len(users), 1)))}
    accuracy = {name: scenario.oracle.evaluate(users, chosen, "query").accuracy for name, chosen in masks.items()}
    scenario.save()
    speed = alternating_calls(_calls(scenario, masks), repeats)
    return {
        "env": config.env,
        "seed": config.seed,
        "users": len(users),
        "ways": {
            name: {
                "accuracy": float(accuracy[name].mean()),
                "less": {rival: asdict(paired_difference([accuracy[name]], [accuracy[rival]])) for rival in (BARE, ALL_ON)},
                "cost": float(scenario.oracle.costs.of(chosen).mean()),
                "masks": len(np.unique(chosen, axis=0)),
                "milliseconds": asdict(speed[name]),
            }
            for name, chosen in masks.items()
        },
    }


def _calls(scenario: Scenario, masks: dict[str, Plans]) -> dict[str, Callable[[], Tensor]]:
    """A batch of 64 test users, one example each (people come again where there are fewer), by way of answering it."""
    data, live = scenario.data, scenario.oracle.live  # type: ignore[attr-defined]
    assert isinstance(live, LiveOracle)
    pathways, population = data.pathways, data.population
    places = np.arange(BATCH) % len(population.test)
    queries = [population.test[place].query.inputs[:1] for place in places]
    raw = torch.cat(queries)
    inputs = pathways.model.backbone.prepare(raw if population.items is None else population.items.take(raw.tolist()))

    def served(chosen: Plans) -> Callable[[], Tensor]:
        gates = torch.from_numpy(chosen[places])
        with torch.no_grad():
            weights = live.adapted(scenario.users("test")[places], chosen[places][:, None])
        mine = {key: w.detach().clone() for key, w in weights.items()}  # copies, as slots hold them
        return lambda: pathways.forward(inputs[:, None], mine, gates)

    def bare() -> Tensor:
        return pathways.model(inputs)

    calls = {name: served(chosen) if name != BARE else bare for name, chosen in masks.items()}
    return {name: torch.no_grad()(call) for name, call in calls.items()}


def exits_table(runs: Runs) -> str:
    """The runs as Markdown: what each way of answering gets right, and how fast it is."""
    lines = [
        f"A batch of {BATCH} different users, one example each; medians (least - most). Accuracy on test users' queries; "
        "intervals are paired over users. Policies and static masks by cost weight.",
        "",
        "| run | way | accuracy | less the bare model | less all on | cost | masks | ms | speed against bare |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        bare = Spread(**run["ways"][BARE]["milliseconds"])
        for name, way in run["ways"].items():
            less = [_interval(way["less"][rival]) if rival != name else "-" for rival in (BARE, ALL_ON)]
            spread = Spread(**way["milliseconds"])
            where = f"{run['env'].removeprefix('dsa/')}, seed {run['seed']}" if name == BARE else ""
            lines.append(
                f"| {where} | {name} | {way['accuracy']:.3f} | {less[0]} | {less[1]} | {way['cost']:.2f} | {way['masks']} "
                f"| {spread.text(1)} | {bare.median / spread.median:.2f} |"
            )
    return "\n".join(lines)


def _interval(one: dict[str, float]) -> str:
    return f"{one['mean']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"

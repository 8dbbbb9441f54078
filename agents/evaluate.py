"""The held-out table of a run: ``python -m agents.evaluate RUN``.

Loads the best policy (by val users) and measures it beside its rivals on users never seen. Writes ``summary.json``,
``users.csv`` (one row per user) and ``table.md`` into the run's folder. Nothing is unpickled.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.policies import BasePolicy

from agents.checkpoint import choose_masks, load_policy
from agents.comparison import compare, group_table, leakage, leakage_lines, summarise, table, to_json, user_rows
from agents.run import RunConfig
from backbones.artefacts import ArtefactError, write_atomically
from backbones.threads import usable_cores
from envs.scenario import Scenario


def evaluate_run(folder: Path) -> dict[str, Any]:
    """Measure a run's policy and its rivals on test users, print the table and write the files.

    Raises:
        FileNotFoundError: if the folder is no run.
        ArtefactError: if its policy is missing or damaged.
    """
    config = RunConfig.load(folder)
    scenario = config.scenario()
    policy, _ = load_policy(folder / "policy", scenario)
    if config.rounds > 1:
        print(f"note: trained with {config.rounds} rounds, measured (like its rivals) with the first decision alone")
    start = time.perf_counter()
    found = compare(
        scenario,
        lambda users: choose_masks(policy, scenario, users),
        config.cost_weight,
        config.seed,
        search=config.search,
    )
    apart = leakage(scenario)
    scenario.save()
    each = seconds_per_user(scenario, policy)
    spent = max(time.perf_counter() - start, read_seconds(folder)["evaluate"])  # a repetition reads the cached answers
    write_seconds(folder, {"evaluate": spent})
    summary = {
        "env": config.env,
        "seed": config.seed,
        "total_timesteps": config.total_timesteps,
        "cost_weight": config.cost_weight,
        "wall_seconds": read_seconds(folder),
        "test": summarise(found, config.cost_weight),
        "leakage": apart,
        "notes": list(scenario.notes),
        "seconds_per_user": each,
    }
    parts = [table(summary, config.cost_weight), group_table(scenario, found), leakage_lines(apart)]
    if each is not None:
        parts.append(f"seconds to personalise one user, from raw support examples to adapted weights: {each:.3f}")
    if scenario.notes:
        parts.append("\n".join(scenario.notes))
    text = "\n\n".join(parts)
    write_atomically(folder / "summary.json", to_json(summary))
    write_atomically(folder / "users.csv", user_rows(scenario, found, config.cost_weight).encode())
    write_atomically(folder / "table.md", (text + "\n").encode())
    print(f"\n{text}")
    return summary


def seconds_per_user(scenario: Scenario, policy: BasePolicy, users: int = 9) -> float | None:
    """Median seconds from raw support examples to adapted weights, one test user at a time; None in toy problems."""
    if scenario.personalise is None:
        return None

    def choose(observation: dict[str, NDArray[np.float32]]) -> NDArray[np.bool_]:
        return policy.predict(observation, deterministic=True)[0].astype(bool)

    taken = []
    for user in scenario.users("test")[: users + 1]:  # the first one warms up
        start = time.perf_counter()
        scenario.personalise(int(user), choose)
        taken.append(time.perf_counter() - start)
    return float(np.median(taken[1:] or taken))


def read_seconds(folder: Path) -> dict[str, float]:
    """Wall-clock seconds per stage so far; next to nothing for a stage that came from the cache."""
    path = folder / "seconds.json"
    empty = dict.fromkeys(("pretrain", "meta", "ppo", "evaluate"), 0.0)
    return empty | (json.loads(path.read_text()) if path.exists() else {})


def write_seconds(folder: Path, seconds: dict[str, float]) -> None:
    """Remember what some stages took."""
    write_atomically(folder / "seconds.json", json.dumps(read_seconds(folder) | seconds).encode())


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m agents.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, as agents.train_ppo named it")
    parser.add_argument("--num-threads", type=int, default=usable_cores(), help="torch threads (default: the cores, at most 4)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.num_threads)
    try:
        evaluate_run(args.run)
    except (ValueError, FileNotFoundError, FloatingPointError, ArtefactError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

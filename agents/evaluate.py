"""The held-out table of a run: ``python -m agents.evaluate RUN``.

Loads the best policy (by val users) and measures it beside its rivals on users never seen. Writes ``summary.json``,
``users.csv`` (one row per user) and ``table.md`` into the run's folder. Nothing is unpickled.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.policies import BasePolicy

from agents.budget import AtMost
from agents.checkpoint import choose_plans, load_policy
from agents.comparison import Result, compare, group_table, leakage, leakage_lines, summarise, table, to_json, user_rows
from agents.policies import GatingPolicy
from agents.run import RunConfig
from backbones.artefacts import ArtefactError, write_atomically
from envs.cost_weights import CostWeight
from envs.oracles import Plans, Users
from envs.rules import Rules
from envs.scenario import Scenario
from meta.arguments import add_num_threads


def evaluate_run(folder: Path, weights: Sequence[float] = (), max_active: int | None = None) -> dict[str, Any]:
    """Measure a run's policy and its rivals on test users, print the table and write the files.

    Args:
        folder: of the run.
        weights: cost weights to measure at instead of those of the run; the files are then left as they are.
        max_active: an exact budget put on the trained policy; likewise.

    Raises:
        FileNotFoundError: if the folder is no run.
        ArtefactError: if its policy is missing or damaged.
        ValueError: for cost weights that the policy was not trained for.
    """
    config = RunConfig.load(folder)
    scenario, rules = config.scenario(folder), config.rules
    policy, meta = load_policy(folder / "policy", scenario)
    if max_active is not None:
        limit(policy, max_active)
    start = time.perf_counter()
    chosen_at = weights_to_choose_at(CostWeight.parse(meta["cost_weight"]), weights)
    by_weight = {}
    for weight in chosen_at:

        def choose(users: Users, weight: float = weight) -> Plans:
            return choose_plans(policy, scenario, users, rules, weight)

        by_weight[weight] = compare(scenario, choose, weight, config.seed, search=config.search)
    apart = leakage(scenario)
    scenario.save()
    main = chosen_at[len(chosen_at) // 2]
    each = seconds_per_user(scenario, policy, rules, main)
    spent = max(time.perf_counter() - start, read_seconds(folder)["evaluate"])  # a repetition reads the cached answers
    summary = {
        "env": config.env,
        "seed": config.seed,
        "simulated": scenario.simulated,
        "total_timesteps": config.total_timesteps,
        "cost_weight": main,
        "trained_for": config.cost_weight,
        "wall_seconds": {**read_seconds(folder), "evaluate": spent},
        "test": summarise(by_weight[main], main),
        "by_cost_weight": {f"{weight:g}": summarise(found, weight) for weight, found in by_weight.items()},
        "leakage": apart,
        "notes": list(scenario.notes),
        "seconds_per_user": each,
    }
    text = _page(summary, scenario, by_weight[main])
    if not weights and max_active is None:
        write_seconds(folder, {"evaluate": spent})
        write_atomically(folder / "summary.json", to_json(summary))
        for weight, found in by_weight.items():
            name = "users.csv" if weight == main else f"users_at_{weight:g}.csv"
            write_atomically(folder / name, user_rows(scenario, found, weight).encode())
        write_atomically(folder / "table.md", (text + "\n").encode())
    print(f"\n{text}")
    return summary


def weights_to_choose_at(trained: CostWeight, asked: Sequence[float]) -> tuple[float, ...]:
    """Those asked for, or else those of the run. Raises ``ValueError`` for another than the only one it was trained for."""
    if others := [weight for weight in asked if not trained.varies and weight != trained.low]:
        raise ValueError(
            f"the policy is for the cost weight {trained.low:g} alone and would choose by that, not by {others[0]:g}; train "
            "one for a range (--cost-weight uniform:0:0.3) to ask it for several."
        )
    return tuple(asked) or trained.reported()


def _page(summary: Mapping[str, Any], scenario: Scenario, found: Mapping[str, Result]) -> str:
    parts = [table(test, float(weight)) for weight, test in summary["by_cost_weight"].items()]
    parts += [group_table(scenario, found), leakage_lines(summary["leakage"])]
    if summary["seconds_per_user"] is not None:
        each = summary["seconds_per_user"]
        parts.append(f"seconds to personalise one user, from raw support examples to adapted weights: {each:.3f}")
    if scenario.notes:
        parts.append("\n".join(scenario.notes))
    return "\n\n".join(parts)


def limit(policy: BasePolicy, max_active: int) -> None:
    """Put an exact budget on a trained policy: it keeps the ``max_active`` best-scored pathways of those it would switch on."""
    if not isinstance(policy, GatingPolicy) or "turn" in policy.observation_space.spaces:  # type: ignore[attr-defined]
        raise ValueError("--max-active needs a GatingPolicy that scores all pathways at once.")
    AtMost(policy.action_space.shape[0], max_active)  # type: ignore[index]  # refuses impossible budgets
    policy.max_active = max_active


def seconds_per_user(scenario: Scenario, policy: BasePolicy, rules: Rules, weight: float, users: int = 9) -> float | None:
    """Median seconds from raw support examples to adapted weights, one test user at a time.

    None in toy problems, and with several rounds (which :attr:`Scenario.personalise` does not play).
    """
    if scenario.personalise is None or rules.rounds > 1:
        return None

    def choose(observation: dict[str, NDArray[np.float32]]) -> NDArray[np.bool_]:
        alone = replace(scenario, embeddings=observation["user"], statistics=observation["pathways"])
        return choose_plans(policy, alone, np.zeros(1, dtype=np.int64), rules, weight)[:, -1]

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
    add_num_threads(parser)
    parser.add_argument("--cost-weight", type=float, nargs="+", default=[], help="measure at these (default: those of the run)")
    parser.add_argument("--max-active", type=int, help="keep only so many pathways, the best-scored ones")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.num_threads)
    try:
        evaluate_run(args.run, args.cost_weight, args.max_active)
    except (ValueError, OSError, FloatingPointError, ArtefactError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

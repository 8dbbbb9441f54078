"""Cost per step and memory against the number of users: one fresh process per size."""

import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from envs.sb3 import PathwaySelectionVecEnv
from eval.bench.clock import Masks, peak_memory, step_seconds
from eval.bench.ours import live_of, random_masks, scenario_of

ENV = "dsa/DigitsResNet-v0"
USERS = (100, 1_000, 10_000, 100_000)


@dataclass(frozen=True)
class Load:
    """What each size is put through.

    Attributes:
        num_envs: users at a time. steps: vector steps, of which the last quarter is timed, once for users seen for the first
            time and once for the same users again.
        threads: of torch.
        env_kwargs: arguments of the environment. What is learned beforehand is cut short: no step's cost depends on it.
    """

    num_envs: int = 64
    steps: int = 80
    threads: int = 1
    env_kwargs: dict[str, Any] = field(
        default_factory=lambda: {"meta_steps": 2, "pretrain_epochs": 1, "val_users": 16, "test_users": 16}
    )


def measure_size(users: int, load: Load) -> dict[str, float]:
    """Milliseconds per vector step and memory with so many train users; every pair is adapted live. JSON-able.

    Keeps its artefacts in a temporary folder. Sets the threads and ``DSA_CACHE`` of its process: call it in a fresh one.
    """
    torch.set_num_threads(load.threads)
    with TemporaryDirectory() as cache:
        os.environ["DSA_CACHE"] = cache
        start = time.perf_counter()
        scenario = scenario_of(ENV, {**load.env_kwargs, "train_users": users})
        made = time.perf_counter() - start
        env = PathwaySelectionVecEnv(replace(scenario, oracle=live_of(scenario)), load.num_envs)
        env.seed(0)
        env.reset()
        masks = random_masks(env, len(scenario.pathways), repeat=0)
        timed = max(1, load.steps // 4)
        step_seconds(env, masks, load.steps - timed)
        first, again = seconds_twice(env, masks, timed)
    return {
        "users": users,
        "seconds_to_make": made,
        "first_sight_ms": 1e3 * first,
        "seen_before_ms": 1e3 * again,
        "peak_memory_gb": peak_memory() / 1e9,
    }


def seconds_twice(env: PathwaySelectionVecEnv, masks: Masks, steps: int) -> tuple[float, float]:
    """Median seconds of some vector steps, and of the same ones again with the same users under other masks."""
    before = env.core.state()
    first = step_seconds(env, masks, steps)
    env.core.restore(before)
    return float(np.median(first)), float(np.median(step_seconds(env, masks, steps)))


def measure_scale(sizes: tuple[int, ...] = USERS, load: Load | None = None) -> list[dict[str, float]]:
    """One row per number of train users, each measured in a process of its own, so that memory is that size's alone."""
    load = load or Load(threads=torch.get_num_threads())
    rows = []
    for users in tqdm(sizes, desc="users", unit="size"):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            rows.append(pool.submit(measure_size, users, load).result())
    return rows


def scale_table(rows: list[dict[str, float]], load: Load | None = None) -> str:
    """The table of :func:`measure_scale`."""
    number = (load or Load()).num_envs
    lines = [
        f"`{ENV}` with simulated users; median milliseconds per vector step of {number} users, all pairs adapted:",
        "",
        "| train users | users seen before | users seen for the first time | peak memory | seconds to make |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['users']:,.0f} | {row['seen_before_ms']:.1f} ms | {row['first_sight_ms']:.1f} ms "
        f"| {row['peak_memory_gb']:.2f} GB | {row['seconds_to_make']:.1f} |"
        for row in rows
    ]
    least, most = rows[0], rows[-1]
    ratio = most["seen_before_ms"] / least["seen_before_ms"]
    first = most["first_sight_ms"] / least["first_sight_ms"]
    ends = f"with {most['users']:,.0f} users as with {least['users']:,.0f}"
    lines += ["", f"A step costs {ratio:.2f} times as much {ends}; at first sight {first:.2f} times."]
    return "\n".join(lines)

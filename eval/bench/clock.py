"""Clocks and counters: several ways of stepping in one run, floating-point operations, memory, the machine's own peak."""

import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

Masks = Callable[[], NDArray[np.int8]]
"""The next vector step's masks, ``[N, P]``."""


@dataclass(frozen=True)
class Spread:
    """Repeats of one measurement: their median, the least and the most."""

    median: float
    least: float
    most: float

    @staticmethod
    def of(values: list[float]) -> "Spread":
        """Of at least one value."""
        return Spread(float(np.median(values)), min(values), max(values))

    def text(self, digits: int = 0) -> str:
        """``1,234 (1,200 - 1,300)``."""
        return f"{self.median:,.{digits}f} ({self.least:,.{digits}f} - {self.most:,.{digits}f})"


@dataclass(frozen=True)
class Way:
    """One way to step.

    Attributes:
        begin: the number of the repeat to an environment that was reset, and its masks; not timed.
        steps: vector steps per repeat.
    """

    begin: Callable[[int], tuple[VecEnv, Masks]]
    steps: int

    def rate(self, repeat: int) -> float:
        """Steps of single users per second. Only the environment's ``step`` is timed."""
        env, masks = self.begin(repeat)
        return self.steps * env.num_envs / float(step_seconds(env, masks, self.steps).sum())


def step_seconds(env: VecEnv, masks: Masks, steps: int) -> NDArray[np.float64]:
    """Wall-clock seconds of each of some vector steps, ``[steps]``."""
    spent = np.empty(steps)
    for step in range(steps):
        chosen = masks()
        start = time.perf_counter()
        env.step(chosen)
        spent[step] = time.perf_counter() - start
    return spent


def alternating(ways: Mapping[str, Way], repeats: int) -> dict[str, Spread]:
    """Steps per second of several ways on one machine at one time.

    Every way warms up with one vector step. The order is turned by one place from repeat to repeat, so that whatever else
    the machine does falls on all alike.
    """
    names = list(ways)
    for name in tqdm(names, desc="warm up", unit="way"):
        step_seconds(*ways[name].begin(repeats), steps=1)
    found: dict[str, list[float]] = {name: [] for name in names}
    for repeat in tqdm(range(repeats), desc="measure steps", unit="repeat"):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(ways[name].rate(repeat))
    return {name: Spread.of(values) for name, values in found.items()}


def alternating_calls(calls: Mapping[str, Callable[[], object]], repeats: int, seconds: float = 0.0) -> dict[str, Spread]:
    """Milliseconds of several calls, in turns as in :func:`alternating`; each is made once beforehand.

    Args:
        calls: by name.
        repeats: of every call, at least.
        seconds: that all of them go on together, at least: medians of short calls need more repeats.
    """
    names = list(calls)
    for name in names:
        calls[name]()
    found: dict[str, list[float]] = {name: [] for name in names}
    begun, repeat = time.perf_counter(), 0
    with tqdm(total=repeats, desc="measure calls", unit="repeat") as bar:
        while repeat < repeats or time.perf_counter() - begun < seconds:
            turn = repeat % len(names)
            for name in names[turn:] + names[:turn]:
                start = time.perf_counter()
                calls[name]()
                found[name].append(1e3 * (time.perf_counter() - start))
            repeat += 1
            bar.update()
    return {name: Spread.of(values) for name, values in found.items()}


def flops_of(call: Callable[[], object]) -> int:
    """Floating-point operations of one call: matrix products, convolutions and attention, forward and backward.

    Two per multiply-add, as torch's counter has it.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def peak_flops(dtype: torch.dtype, sizes: tuple[int, ...], tries: int = 5) -> float:
    """The most operations per second that torch gets out of a product of two square matrices here."""
    best = 0.0
    for size in sizes:
        left, right = torch.randn(2, size, size).to(dtype)
        torch.mm(left, right)
        for _ in range(tries):
            start = time.perf_counter()
            torch.mm(left, right)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def peak_memory() -> int:
    """The most bytes of memory that this process has had resident."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage would report what the parent had when it started this process
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def machine() -> str:
    """Cores, threads and versions in one line."""
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} torch threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )

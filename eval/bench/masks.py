"""Floating-point operations of adapting a batch of users, against what their masks have on."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backbones import make_backbone
from backbones.pathways import make_pathways
from envs.oracles import LiveOracle
from eval.bench.clock import flops_of
from meta.inner import MetaInit
from users.batch import Prepared
from users.digits import digits_population

PLACEMENTS = ("inline", "side")
INNER_STEPS = 3
Rows = list[dict[str, Any]]


def untrained_oracle(placement: str, users: int) -> LiveOracle:
    """The digits environment's own oracle, its weights random: arithmetic does not depend on them."""
    population = digits_population(train_users=users, val_users=1, test_users=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pathways = make_pathways(placement, make_backbone("resnet-small", num_classes=population.num_classes))
    number = pathways.num_pathways
    init = MetaInit(pathways.start(0), torch.full((INNER_STEPS, number), 0.1), torch.ones(number, dtype=torch.bool))
    return LiveOracle(Prepared(pathways, population), init, chunk=users)


def fixed_density(users: int, pathways: int, on: int) -> NDArray[np.bool_]:
    """Random masks ``[U, P]`` with exactly ``on`` bits each; the same ones every time."""
    order = np.random.default_rng(on).random((users, pathways)).argsort(1)
    return order < on


def from_first(users: int, pathways: int, first: int) -> NDArray[np.bool_]:
    """The mask with the pathway ``first`` and all after it, for everybody; with ``first = P`` all off."""
    return np.repeat((np.arange(pathways) >= first)[None], users, axis=0)


def only(users: int, pathways: int, one: int) -> NDArray[np.bool_]:
    """The mask with one pathway alone, for everybody."""
    return np.repeat((np.arange(pathways) == one)[None], users, axis=0)


def cost_of(oracle: LiveOracle, masks: NDArray[np.bool_], repeats: int) -> dict[str, float]:
    """Operations per user of one batched adaptation, and the median milliseconds of the whole batch."""
    users = np.arange(len(masks))

    def adapt() -> None:
        oracle.adapted(users, masks[:, None])

    adapt()  # warm up, and compute the frozen part
    operations = flops_of(adapt) / len(users)
    return {"flops": operations, "milliseconds": 1e3 * float(np.median([_seconds(adapt) for _ in range(repeats)]))}


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_masks(users: int = 64, repeats: int = 9) -> dict[str, Any]:
    """By placement: one row per number of pathways on, and one per first active pathway. JSON-able."""
    found = {}
    for placement in PLACEMENTS:
        oracle = untrained_oracle(placement, users)
        names = oracle.pathways.names
        number = len(names)
        density = [
            {"on": on, "pathways": number, **cost_of(oracle, fixed_density(users, number, on), repeats)}
            for on in range(number + 1)
        ]
        first = [
            {
                "first": names[p],
                "and_after": cost_of(oracle, from_first(users, number, p), repeats),
                "alone": cost_of(oracle, only(users, number, p), repeats),
            }
            for p in range(number)
        ]
        found[placement] = {"users": users, "by_density": density, "by_first": first}
    return found


def masks_table(found: dict[str, Any]) -> str:
    """The tables of :func:`measure_masks`."""
    return "\n\n".join(_placement_tables(placement, part) for placement, part in found.items())


def _placement_tables(placement: str, part: dict[str, Any]) -> str:
    lines = [
        f"Placement `{placement}`, {part['users']} users in one batch, {INNER_STEPS} gradient steps; per user in millions of "
        "operations, and the median time of the batch:",
        "",
        "| pathways on (which ones differs from user to user) | million operations per user | ms per batch |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {row['on']} of {row['pathways']} | {_cells(row)} |" for row in part["by_density"]]
    lines += [
        "",
        "| first active pathway | it and all after it: million operations | ms | it alone: million operations | ms |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [f"| `{row['first']}` | {_cells(row['and_after'])} | {_cells(row['alone'])} |" for row in part["by_first"]]
    return "\n".join(lines)


def _cells(cost: dict[str, float]) -> str:
    return f"{cost['flops'] / 1e6:,.2f} | {cost['milliseconds']:.1f}"

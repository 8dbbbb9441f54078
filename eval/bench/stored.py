"""What users take on disk and how fast they come back: records of a trained run's own test users, up to a million of them."""

import os
import time
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from tqdm.auto import tqdm

from agents.checkpoint import choose_masks, load_policy
from agents.run import RunConfig
from backbones.base import PopulationModel
from envs.oracles import LiveOracle
from envs.scenario import Scenario
from eval.bench.clock import Spread
from meta.inner import measure
from serving.personaliser import Personaliser, framed
from serving.records import PRECISIONS, Adapter, Codec
from serving.slots import Slots
from serving.store import UserStore

SIZES = (1_000, 1_000_000)
TOGETHER = 5_000
"""Records written in one transaction."""
READS, ENROLMENTS = 3_000, 40
BATCH = 64
Adapters = list[Adapter]
FORGETS = hasattr(os, "posix_fadvise")
"""Whether this system can be asked to put a file out of memory."""


def measure_stored(folder: Path, sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    """Figures of one run. JSON-able.

    Args:
        folder: a finished run of ``agents.train_ppo``.
        sizes: numbers of users in the stores, ascending; the records are those of the run's test users, again and again.

    Raises:
        FileNotFoundError: for a folder that is no run. OSError: if the disk is too small for the largest store twice.
    """
    config = RunConfig.load(folder)
    scenario = config.scenario(folder)
    adapters, gates = adapters_of(folder, config, scenario)
    with TemporaryDirectory(prefix="dsa-bench-") as scratch:
        return {
            "env": config.env,
            "users": len(adapters),
            "active": float(gates.double().mean()),
            "precisions": {precision: rounded(scenario, adapters, precision) for precision in PRECISIONS},
            "peft": peft_checkpoint(scenario.data.pathways.model, Path(scratch)),
            "stores": [stored(folder, adapters, count, Path(scratch)) for count in sizes],
        }


def adapters_of(folder: Path, config: RunConfig, scenario: Scenario) -> tuple[Adapters, torch.Tensor]:
    """Test users' adapters under the policy's masks, and these."""
    users, trained = scenario.users("test"), config.rules.weight
    weight = trained.reported()[len(trained.reported()) // 2]
    policy, _ = load_policy(folder / "policy", scenario)
    masks = choose_masks(policy, scenario, users, weight if trained.varies else None, config.rules)
    live = scenario.oracle.live  # type: ignore[attr-defined]
    assert isinstance(live, LiveOracle)
    gates, found = torch.from_numpy(masks), []
    for rows in np.array_split(np.arange(len(users)), -(-len(users) // BATCH)):
        weights = live.adapted(users[rows], masks[rows][:, None])
        labels = scenario.label_counts["support"][users[rows]]
        for row, place in enumerate(rows):
            own = {key: w[row].clone() for key, w in weights.items()}
            found.append(Adapter(gates[place], own, weight, int(labels[row])))
    return found, gates


def rounded(scenario: Scenario, adapters: Adapters, precision: str) -> dict[str, float]:
    """Bytes of a record, and what test users' query accuracy is after the way to disk and back."""
    pathways, init = scenario.data.pathways, scenario.look.of.init  # type: ignore[union-attr]
    codec = Codec(pathways, init, precision)
    records = [codec.pack(adapter) for adapter in adapters]
    accuracy = []
    for start in range(0, len(adapters), BATCH):
        some = [codec.unpack(record) for record in records[start : start + BATCH]]
        weights = {key: torch.stack([one.weights.get(key, init.weights[key]) for one in some]) for key in init.weights}
        query = scenario.data.rows("test", "query", torch.arange(start, start + len(some)))
        accuracy.append(measure(pathways, weights, torch.stack([one.gates for one in some]), query)[0])
    return {"bytes": float(np.mean([len(record) for record in records])), "accuracy": float(torch.cat(accuracy).mean())}


def peft_checkpoint(model: PopulationModel, scratch: Path) -> dict[str, float]:
    """Bytes on disk of the smallest LoRA that PEFT saves for that model: rank 1 in every dense layer and convolution."""
    layers = [name for name, layer in model.backbone.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    wrapped: Any = get_peft_model(deepcopy(model), LoraConfig(r=1, target_modules=[f"backbone.{name}" for name in layers]))
    folder = scratch / "peft"
    wrapped.save_pretrained(folder)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {"bytes": float(sum(path.stat().st_blocks * 512 for path in files)), "files": float(len(files))}


def stored(folder: Path, adapters: Adapters, count: int, scratch: Path) -> dict[str, Any]:
    """A store of so many users: its size, reading users who are not resident, enrolling further ones, forgetting one."""
    path = scratch / f"{count}.db"
    with Personaliser.from_run(folder, path, precision="int4") as served:
        codec = Codec(served.pathways, served.init, "int4")
        with UserStore(path, served.identity) as store:
            seconds = _filled(store, [framed(codec.pack(adapter)) for adapter in adapters], count)
            slots, draw = Slots(served.pathways, served.init, 1), np.random.default_rng(0)
            taken = [_read(store, codec, slots, f"user-{n}") for n in draw.integers(count, size=READS)]
            again = draw.integers(count, size=READS if FORGETS else 0)
            cold = [_read(store, codec, slots, f"user-{n}", path) for n in again]
            size = store.bytes()
        enrolments = _enrolments(folder, served)
        forgetting = _forgotten(served, "user-0")
    path.unlink()
    return {
        "users": count,
        "bytes_per_user": size / count,
        "seconds": seconds,
        "read": _middle_and_late(taken),
        "cold": _middle_and_late(cold) if cold else None,
        "enrol": asdict(Spread.of(enrolments)),
        "forget": forgetting,
    }


def _filled(store: UserStore, records: list[bytes], count: int) -> float:
    """Write so many users; seconds."""
    start = time.perf_counter()
    for first in tqdm(range(0, count, TOGETHER), desc=f"a store of {count:,} users", unit=f"{TOGETHER} users"):
        some = range(first, min(first + TOGETHER, count))
        store.put({f"user-{n}": records[n % len(records)] for n in some})
    return time.perf_counter() - start


def _read(store: UserStore, codec: Codec, slots: Slots, user: str, cold: Path | None = None) -> float:
    """Milliseconds from asking for somebody who is in no slot until they are in one.

    ``cold``: a store whose files are put out of memory before; None: they stay there.
    """
    for path in (cold, cold.with_name(f"{cold.name}-wal")) if cold else ():
        if path.exists():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    packed = store.get(user)
    slots.load(user, codec.unpack(packed[4:]))
    return 1e3 * (time.perf_counter() - start)


def _forgotten(served: Personaliser, user: str) -> float:
    """Milliseconds of erasing somebody, once."""
    start = time.perf_counter()
    gone = served.forget(user)
    assert gone == 1
    return 1e3 * (time.perf_counter() - start)


def _middle_and_late(taken: list[float]) -> dict[str, float]:
    return {"median": float(np.median(taken)), "p99": float(np.quantile(taken, 0.99))}


def _enrolments(folder: Path, served: Personaliser) -> list[float]:
    """Milliseconds of enrolling a test user, again and again under new names; the first ones warm up."""
    config = RunConfig.load(folder)
    scenario, weights = config.scenario(folder), config.rules.weight.reported()
    population = scenario.data.population
    user, taken = population.test[0].support, []
    inputs = user.inputs if population.items is None else population.items.take(user.inputs.tolist())
    for n in range(ENROLMENTS):
        start = time.perf_counter()
        served.enroll(f"new-{n}", inputs, user.labels, weights[len(weights) // 2])
        taken.append(1e3 * (time.perf_counter() - start))
    return taken[ENROLMENTS // 5 :]


def stored_table(found: dict[str, Any]) -> str:
    """What :func:`measure_stored` found, as Markdown."""
    precisions, stores = found["precisions"], found["stores"]
    lines = [
        f"`{found['env'].removeprefix('dsa/')}`: records of {found['users']} test users under the policy's masks "
        f"({found['active']:.0%} of the pathways), by precision; beside them the smallest LoRA that PEFT saves for that model "
        f"(rank 1, {found['peft']['files']:.0f} files).",
        "",
        "| | bytes per record | accuracy after the way to disk and back |",
        "| --- | --- | --- |",
        *(f"| {name} | {one['bytes']:,.0f} | {one['accuracy']:.4f} |" for name, one in precisions.items()),
        f"| PEFT checkpoint | {found['peft']['bytes']:,.0f} | - |",
        "",
        "Stores of such users in four bits, everything that is on disk counted; reads of users who are not resident, up to "
        "their slot, as the file comes to be in memory by reading, and with all of it put out of memory before each read (what "
        "SQLite itself keeps apart); enrolments from raw examples; forgetting one user, measured once: it rewrites the file, "
        "which many who are forgotten at once share.",
        "",
        "| users | bytes each | read, ms (median, p99) | read from disk, ms (median, p99) | enrolment, ms | forgetting, ms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in stores:
        reads = " | ".join(f"{each['median']:.2f}, {each['p99']:.2f}" if each else "-" for each in (one["read"], one["cold"]))
        size, enrol = f"{one['bytes_per_user']:,.0f}", Spread(**one["enrol"]).text(1)
        lines.append(f"| {one['users']:,} | {size} | {reads} | {enrol} | {one['forget']:,.0f} |")
    ratio = stores[-1]["enrol"]["median"] / stores[0]["enrol"]["median"]
    few, many = (f"{one['users']:,}" for one in (stores[0], stores[-1]))
    lines += ["", f"Enrolling takes {ratio:.2f} of the time with {many} users that it takes with {few}."]
    return "\n".join(lines)

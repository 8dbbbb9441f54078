"""Users who do not all fit into memory: answers per second, against all of them being resident."""

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.run import RunConfig
from eval.bench.clock import Spread, alternating_calls
from eval.bench.stored import adapters_of
from serving.personaliser import Personaliser, framed
from serving.records import Codec
from serving.store import UserStore

BATCH, SLOTS, TIMES = 64, 256, 4
"""Inputs at a time, and how many users fit; there are TIMES as many."""


def measure_residents(folder: Path, repeats: int = 31) -> dict[str, Any]:
    """Milliseconds of a batch of 64 inputs from users drawn uniformly or by Zipf's law, by the number of slots. JSON-able."""
    config = RunConfig.load(folder)
    scenario = config.scenario(folder)
    adapters, _ = adapters_of(folder, config, scenario)
    query = scenario.data.population.test[0].query.inputs[:1]
    items = scenario.data.population.items
    raw = query if items is None else items.take(query.tolist())

    def many(count: int) -> Any:  # as the backbone reads them: a tensor, or a list of texts
        return raw.expand(count, *raw.shape[1:]) if isinstance(raw, Tensor) else [*raw] * count

    with TemporaryDirectory(prefix="dsa-bench-") as scratch:
        path = Path(scratch) / "users.db"
        with Personaliser.from_run(folder, path) as served, UserStore(path, served.identity) as store:
            codec = Codec(served.pathways, served.init)
            records = [framed(codec.pack(adapter)) for adapter in adapters]
            store.put({f"user-{n}": records[n % len(records)] for n in range(TIMES * SLOTS)})
        roomy, tight = (Personaliser.from_run(folder, path, slots=count) for count in (TIMES * SLOTS, SLOTS))
        with roomy, tight:
            roomy.predict([f"user-{n}" for n in range(TIMES * SLOTS)], many(TIMES * SLOTS))
            found = {}
            for law in ("uniform", "zipf"):
                calls = {"all resident": _Asked(roomy, law, many(BATCH)), "a quarter": _Asked(tight, law, many(BATCH))}
                found[law] = {name: asdict(spread) for name, spread in alternating_calls(calls, repeats).items()}
    return found


class _Asked:
    """Batches of inputs of users drawn anew for every call, the same ones for whoever is asked.

    Args:
        served: who answers. law: ``uniform`` or ``zipf``. inputs: BATCH raw ones.
    """

    def __init__(self, served: Personaliser, law: str, inputs: Any) -> None:
        self.served, self.inputs, self.draw = served, inputs, np.random.default_rng(0)
        weights: NDArray[np.float64] = 1 / np.arange(1, TIMES * SLOTS + 1) if law == "zipf" else np.ones(TIMES * SLOTS)
        self.chances = weights / weights.sum()

    def __call__(self) -> Tensor:
        users = self.draw.choice(len(self.chances), size=BATCH, p=self.chances)
        with torch.no_grad():
            return self.served.predict([f"user-{n}" for n in users.tolist()], self.inputs)


def residents_table(found: dict[str, Any]) -> str:
    """What :func:`measure_residents` found, as Markdown."""
    lines = [
        f"{TIMES * SLOTS} users asked for in batches of {BATCH}, with slots for all or for a quarter of them ({SLOTS}).",
        "",
        "| who asks | all resident, ms | a quarter, ms | throughput with a quarter |",
        "| --- | --- | --- | --- |",
    ]
    for law, ways in found.items():
        whole, part = (Spread(**ways[name]) for name in ("all resident", "a quarter"))
        lines.append(f"| {law} | {whole.text(1)} | {part.text(1)} | {whole.median / part.median:.2f} of it |")
    return "\n".join(lines)

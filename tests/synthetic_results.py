"""Results folders with made-up rows: planted differences, so that what is read out of them can be checked."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.results import BINS, COLUMNS, FORMAT, format_row

WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3)
PATHWAYS = ("stem", "block1", "block2", "block3", "head")
GROUPS = ("clean", "noisy", "inverted")


@dataclass(frozen=True)
class Spec:
    """A method's facts, its mean gain over base, and its mean cost at cost weight 0."""

    gain: float
    cost: float
    scope: str = "user"
    labels: str = "support"
    trades: bool = False
    through_backbone: bool = False
    noise: float = 0.02
    always: str = ""
    """The bit of every pathway, for those whose mask never changes."""

    def facts(self) -> dict[str, Any]:
        names = ("scope", "labels", "trades", "through_backbone")
        return {"settings": {"steps": 3}, **{name: getattr(self, name) for name in names}}


AMORTISED, SEARCHED, STATIC = "mask per user, amortised", "mask per user, by optimisation", "mask per population"
SPECS = {
    "base": Spec(0.0, 0.0, "nobody", noise=0.0, always="0"),
    "joint": Spec(0.05, 0.1, "nobody"),
    "head": Spec(0.1, 0.2),
    "full_finetune": Spec(0.12, 40.0, through_backbone=True),
    "all_on": Spec(0.2, 1.0, always="1"),
    "meta_maml": Spec(0.19, 1.0, always="1"),
    "best_static": Spec(0.16, 0.8, STATIC, trades=True),
    "gradient_norm": Spec(0.17, 0.7, SEARCHED, trades=True),
    "validation_search": Spec(0.2, 0.5, SEARCHED, labels="all", trades=True),
    "random": Spec(0.08, 0.5, STATIC, trades=True),
    "ppo": Spec(0.2, 0.5, AMORTISED, trades=True),
}


def write_results(
    folder: Path,
    specs: Mapping[str, Spec] = SPECS,
    *,
    users: int = 40,
    seeds: int = 2,
    simulated: bool = True,
    folds: int | None = None,
    shown: Sequence[int] = (0, 1, 5),
    few_shown: Sequence[int] | None = None,
    fewer: int | None = None,
    failing: Mapping[tuple[str, str], str] | None = None,
    names: Sequence[str] | None = None,
    groups: Sequence[str] = GROUPS,
    timing: bool = True,
    draw: int = 0,
    **facts: Any,
) -> Path:
    """Write a results folder.

    Args:
        folder: made if it is missing.
        specs: the methods. users: per seed. seeds: 0, 1, .... simulated: whether seeds redraw users. folds: users are dealt to.
        shown: sizes of the support-size curve. few_shown: those of methods through a text backbone, if they differ.
        fewer: of users (in seed 0) for methods through a text backbone.
        failing: reasons by method and user. names: of users. groups: dealt to users in turn. timing: whether to write it.
        draw: of the random numbers; users' own accuracies without personalisation do not depend on it.
        facts: of ``run.json``, to change.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = names or [f"u{index:03d}" for index in range(users)]
    run = {"format": FORMAT, "version": "0.0", "env": "dsa/Made-up-v0", "env_kwargs": {}, "seeds": list(range(seeds))}
    run |= {"folds": folds, "cost_weight": 0.1, "cost_weights": list(WEIGHTS), "simulated": simulated, "population": "made-up"}
    run |= {
        "classes": 4,
        "pathways": list(PATHWAYS),
        "costs": [0.2] * len(PATHWAYS),
        "shown": list(shown),
        "counts": "parameters",
    }
    run |= {"few_shown": list(shown if few_shown is None else few_shown)}
    run |= {"methods": {name: spec.facts() for name, spec in specs.items()}, "refused": {"prefix": "no attention here"}}
    run |= {"command": f"python -m eval.run --env dsa/Made-up-v0 --out {folder.name}", "seconds": 12.5, **facts}
    (folder / "run.json").write_text(json.dumps(run))
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for seed in range(seeds):
            for index, (user, start) in enumerate(zip(names, _starts(len(names), seed, simulated), strict=True)):
                known = {
                    "seed": seed,
                    "fold": index % folds if folds else None,
                    "user": user,
                    "group": groups[index % len(groups)],
                }
                for position, (name, spec) in enumerate(specs.items()):
                    if fewer is not None and spec.through_backbone and (seed > 0 or index >= fewer):
                        continue
                    rng = np.random.default_rng([draw, seed, index, position])
                    reason = (failing or {}).get((name, user))
                    for weight, size in _places(spec, run["cost_weight"], run["few_shown"] if spec.through_backbone else shown):
                        row = {**known, "method": name, "cost_weight": weight, "shown": size}
                        made = _row(spec, start, index % len(groups), weight, size, rng)
                        writer.writerow(format_row({**row, **(_failed(reason, made) if reason else made)}))
    if timing:
        (folder / "timing.json").write_text(json.dumps(_timing(specs)))
    return folder


def _starts(users: int, seed: int, simulated: bool) -> np.ndarray:
    """Accuracy without personalisation ``[U]``."""
    return np.random.default_rng([77, seed if simulated else 0]).uniform(0.3, 0.6, users)


def _places(spec: Spec, main: float, shown: Sequence[int]) -> list[tuple[float | None, int | None]]:
    weights: list[float | None] = list(WEIGHTS) if spec.trades else [None]
    return [(weight, None) for weight in weights] + [(main if spec.trades else None, size) for size in shown]


def _row(
    spec: Spec, start: float, group: int, weight: float | None, size: int | None, rng: np.random.Generator
) -> dict[str, Any]:
    gates = rng.random(len(PATHWAYS)) < (0.3 + 0.2 * group if "per user" in spec.scope else spec.cost)
    cost = spec.cost * (1 - 1.5 * (weight or 0)) + (0.02 * rng.normal() if spec.trades else 0)
    grown = spec.gain * (1 - (weight or 0)) * (1.0 if size is None else size / (size + 3))
    noise = spec.noise * rng.normal() if size != 0 else 0.0
    accuracy = float(np.clip(start + grown + noise, 0, 1))
    mask = "".join(str(int(gate)) for gate in gates) if "mask" in spec.scope else spec.always * len(PATHWAYS)
    active = int(1000 * cost)
    labels = 0 if spec.scope == "nobody" else 60 if spec.labels == "all" else 20
    return {
        "status": "ok",
        "mask": mask,
        "accuracy": accuracy,
        "log_likelihood": float(np.log(accuracy + 0.05)),
        "examples": 40,
        "calibration": _calibration(accuracy, 40),
        "reward": accuracy - (0.1 if weight is None else weight) * cost,
        "cost": cost,
        "active_fraction": mask.count("1") / len(PATHWAYS) if mask else None,
        "labels": labels if size is None else size,
        "adaptations": 1,
        "trainable": active,
        "active": active,
        "stored": 4 * active,
        "artefacts": "0" * 8,
    }


def _failed(reason: str, row: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict.fromkeys(row), "status": f"failed: {reason}"}


def _calibration(accuracy: float, count: int) -> str:
    """All examples in the eighth bin, at confidence .75."""
    bins = ["0:0.0:0"] * BINS
    bins[7] = f"{count}:{0.75 * count!r}:{round(accuracy * count)}"
    return ";".join(bins)


def _timing(specs: Mapping[str, Spec]) -> dict[str, Any]:
    asked = ("one user, 1 example", "one user, 64 examples", "64 users, 1 example each")
    return {
        "threads": 1,
        "repeats": 5,
        "users": 8,
        "methods": {
            name: {
                "fit_seconds": 10 * spec.cost,
                "personalise_seconds": _range(0.001 + 0.05 * spec.cost),
                "personalise_peak_bytes": int(1e6 * (1 + spec.cost)),
                "inference_ms": {
                    text: _range(place * (1 + spec.cost / 4)) for text, place in zip(asked, (0.5, 4.0, 6.0), strict=True)
                },
                "flops_per_example": int(2e6 * (1 + spec.cost)),
            }
            for name, spec in specs.items()
        },
    }


def _range(median: float) -> dict[str, float]:
    return {"median": median, "low": 0.8 * median, "high": 1.5 * median}

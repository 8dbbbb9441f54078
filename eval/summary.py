"""``summary.json``: everything that tables, figures and sentences say, computed from the rows of a results folder.

Shapes: P pathways, U units (:mod:`eval.panel`).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.panel import Panel, Rows
from eval.results import Results
from eval.run_facts import FORMAT, ResultsError
from eval.statistics import Difference, calibration_error, corrected, difference, spread
from eval.tradeoff import at_equal_cost, volume, volume_lead

SUBJECT = "ppo"
"""The method that the others are compared with."""
REFERENCES = (SUBJECT, "base")
COMPARED = ("accuracy", "log_likelihood", "reward")
AVERAGED = (
    *("accuracy", "log_likelihood", "reward", "cost", "active_fraction", "labels", "adaptations"),
    *("trainable", "active", "stored"),
)
KINDS = ("not personal", "per user", "meta-learned dense", "masks")
NAMED_USERS = 5
"""Of those for whom a method failed."""


def kind(method: str, scope: str) -> str:
    """Which of :data:`KINDS` a method belongs to."""
    if scope == "nobody":
        return KINDS[0]
    if scope.startswith("mask"):
        return KINDS[3]
    return KINDS[2] if method.startswith(("meta_", "all_on", "cotrained_all_on")) else KINDS[1]


def beside_masks(name: str, method: Mapping[str, Any]) -> bool:
    """Whether a method is compared at cost weights and at equal cost: those that choose masks, and nothing or everything on."""
    return method["kind"] == KINDS[3] or name in ("base", "all_on")


def summarise(results: Results) -> dict[str, Any]:
    """The summary, ready for JSON: numbers, text, and None where something could not be measured.

    Differences under ``against`` are the method less the reference; those under ``subject_less`` the subject less the method.
    Every family of verdicts (one measure against one reference; rewards at all cost weights; equal cost; hypervolumes) is
    corrected by itself, see :func:`eval.statistics.corrected`.

    Raises:
        ResultsError: if no row could be used.
    """
    if not results.ok.any():
        raise ResultsError(f"{results.folder} has no rows of methods that ran; python -m eval.run goes on where it stopped.")
    panel, run = Panel(results), results.run
    names = sorted(run.methods, key=lambda name: KINDS.index(kind(name, run.methods[name].scope)))
    edges = _edges(panel, names)
    methods = {name: _alone(panel, name, edges) for name in names}
    _compare(panel, methods)
    _failures(results, methods)
    return {
        "format": FORMAT,
        **{name: getattr(run, name) for name in ("version", "env", "population", "classes", "command", "seconds", "folds")},
        **{name: getattr(run, name) for name in ("seeds", "simulated", "cost_weight", "cost_weights", "pathways", "counts")},
        "choosers": list(run.choosers),
        "shown": [size for size in _sizes(panel) if any(str(size) in one["curve"] for one in methods.values())],
        "subject": SUBJECT if methods.get(SUBJECT, {}).get("users") else None,
        "refused": dict(run.refused),
        "smaller": dict(run.smaller),
        "gain_edges": edges.tolist(),
        "methods": methods,
        "timing": results.timing,
    }


def _alone(panel: Panel, name: str, edges: NDArray[np.float64]) -> dict[str, Any]:
    """What can be said of a method without the others, but for ``base``."""
    facts, rows, base = panel.run.methods[name], panel.rows(name), panel.rows("base")
    users, seeds = panel.counts(rows)
    gains = spread(panel, rows, base)
    return {
        "kind": kind(name, facts.scope),
        **{field: getattr(facts, field) for field in ("scope", "trades", "through_backbone", "draws")},
        "label_use": facts.labels,
        "settings": dict(facts.settings),
        "users": users,
        "seeds": seeds,
        "means": {measure: panel.mean(rows, measure) for measure in AVERAGED} | {"ece": calibration_error(panel, rows)},
        "gain": gains and {"bottom_decile": gains.bottom_decile, "worse": gains.worse},
        "gain_counts": gains and np.histogram(gains.gains, edges)[0].tolist(),
        "distinct_masks": _distinct(panel, rows),
        "by_cost_weight": _by_cost_weight(panel, name),
        "hypervolume": volume(panel, name),
        "gate_rates": _gate_rates(panel, rows) if "per user" in facts.scope else None,
        "curve": _curve(panel, name),
        "failed": [],
    }


def _by_cost_weight(panel: Panel, name: str) -> dict[str, Any]:
    found = {}
    for weight in panel.run.cost_weights:
        rows = panel.rows(name, weight)
        means = {measure: panel.mean(rows, measure, weight) for measure in ("reward", "accuracy", "cost", "active_fraction")}
        found[f"{weight:g}"] = {**means, "distinct_masks": _distinct(panel, rows)}
    return found


def _distinct(panel: Panel, rows: Rows) -> float | None:
    """Distinct masks among the users of a seed (and fold), the mean over these; None where there are no masks."""
    masks = [set(panel.results["mask"][at]) - {""} for at in panel.by_fit(rows)]
    return float(np.mean([len(each) for each in masks])) if any(masks) else None


def _gate_rates(panel: Panel, rows: Rows) -> dict[str, Any]:
    """By group of users: how many rows, and the share of them with each pathway on ``[P]``."""
    by_group: dict[str, list[list[int]]] = defaultdict(list)
    for at in rows.at[panel.results["mask"][rows.at] != ""]:
        by_group[panel.results["group"][at]].append([int(bit) for bit in panel.results["mask"][at]])
    return {group: {"rows": len(by_group[group]), "on": np.mean(by_group[group], 0).tolist()} for group in sorted(by_group)}


def _curve(panel: Panel, name: str) -> dict[str, Any]:
    """Gain over ``base`` by number of examples shown, the smallest number first."""
    found = {}
    for size in _sizes(panel):
        gain = difference(panel, panel.rows(name, shown=size), panel.rows("base"), "accuracy")
        if gain is not None:
            found[str(size)] = {**asdict(gain.interval), "users": gain.users, "seeds": gain.seeds}
    return found


def _sizes(panel: Panel) -> list[int]:
    """Numbers of examples on the curve, of methods that train through a text backbone (which have fewer) and of the others."""
    return sorted({*panel.run.shown, *panel.run.few_shown})


def _edges(panel: Panel, names: Iterable[str]) -> NDArray[np.float64]:
    """Edges of the bins in which gains are counted: as fine as 60 bins allow, zero among them."""
    found = [each.gains for name in names if (each := spread(panel, panel.rows(name), panel.rows("base"))) is not None]
    gains = np.concatenate([[0.0], *found])
    step = next(step for step in (0.01, 0.02, 0.05) if np.ptp(gains) <= 60 * step or step == 0.05)
    low, high = np.floor(gains.min() / step - 1e-9), np.ceil(gains.max() / step + 1e-9)
    return np.round(np.arange(low, high + 1) * step, 10)


def _compare(panel: Panel, methods: dict[str, dict[str, Any]]) -> None:
    """Add ``against``, ``subject_less``, leads in hypervolume and what is at equal cost."""
    for method in methods.values():
        method |= {"against": {}, "subject_less": {}, "volume_lead": None, "at_equal_cost": None}
    for reference in REFERENCES:
        others = [name for name in methods if name != reference]
        for measure in COMPARED:
            pairs = {name: difference(panel, panel.rows(name), panel.rows(reference), measure) for name in others}
            _note(methods, pairs, ("against", reference, measure))
    weighted = {
        (name, weight): difference(panel, panel.rows(SUBJECT, weight), panel.rows(name, weight), "reward", weight)
        for name, method in methods.items()
        for weight in panel.run.cost_weights
        if name != SUBJECT and beside_masks(name, method)
    }
    for (name, weight), found in corrected(weighted).items():
        methods[name]["subject_less"][f"{weight:g}"] = asdict(found)
    if not len(panel.rows(SUBJECT)):
        return
    _note(methods, {name: volume_lead(panel, SUBJECT, name) for name in methods if name != SUBJECT}, ("volume_lead",))
    shown = [name for name, method in methods.items() if name != SUBJECT and beside_masks(name, method)]
    asked = {name: at_equal_cost(panel, SUBJECT, name) for name in shown if len(panel.rows(name))}
    _note(methods, {name: one for name, one in asked.items() if isinstance(one, Difference)}, ("at_equal_cost",))
    for name, one in asked.items():
        if isinstance(one, str):
            methods[name]["at_equal_cost"] = {"none": one}


def _note(methods: dict[str, dict[str, Any]], family: Mapping[str, Difference | None], path: tuple[str, ...]) -> None:
    """Put a family's comparisons into the methods' entries, at a path of keys."""
    for name, found in corrected(family).items():
        place = methods[name]
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = asdict(found)


def _failures(results: Results, methods: dict[str, dict[str, Any]]) -> None:
    """Add reasons with how many rows they cost, and the first users."""
    rows: Counter[tuple[str, str]] = Counter()
    users: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for at in np.flatnonzero(~results.ok).tolist():
        key = (results["method"][at], results["status"][at].removeprefix("failed").lstrip(": "))
        rows[key] += 1
        users[key][results["user"][at]] = None
    for (name, reason), count in rows.items():
        named = list(users[name, reason])
        said = {"reason": reason, "rows": count, "number_of_users": len(named), "users": named[:NAMED_USERS]}
        methods[name]["failed"].append(said)

"""The policy and its rivals on users never seen: one result per method, and what may be concluded from them."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.bootstrap import GapClosed, Interval, gap_closed, paired_difference
from agents.rivals import SAMPLE, best_static, random_masks, searched, shuffled_masks, thresholded
from agents.simple import simple_rivals
from envs.oracles import Plans, Users
from envs.scenario import Scenario

METHODS = (
    "ppo",
    "all_on",
    "all_off",
    "best_static",
    "random",
    "shuffled",
    "gradient_norm",
    "relative_gradient",
    "validation_search",
    "all_on_all_labels",
)
EXTRA = ("support_search", "ppo_all_labels")
"""For comparisons at equal labels: a search that may use the support alone, and the policy's masks adapted on all."""
SIMPLE = ("intercept", "item_covariance")
"""Rivals that choose no mask (:mod:`agents.simple`), where the population admits them."""
RANDOM_DRAWS = SHUFFLES = 10
ONE = "one user says nothing of others"
ALONE = "masks can be dealt out only among two users or more"


@dataclass(frozen=True)
class Result:
    """One method on U users; draws (of random or shuffled masks) are averaged per user.

    Attributes:
        accuracy, cost, active_fraction: ``[U]``, accuracy on query examples.
        masks: ``[U, P]``, of the first draw.
        labels_used: mean number of the user's labels that the method looked at.
    """

    accuracy: NDArray[np.float64]
    cost: NDArray[np.float64]
    active_fraction: NDArray[np.float64]
    masks: Plans
    labels_used: float

    def reward(self, cost_weight: float) -> NDArray[np.float64]:
        """``[U]``."""
        return self.accuracy - cost_weight * self.cost

    def summary(self, cost_weight: float) -> dict[str, float]:
        """Means over users, as in ``summary.json``."""
        return {
            "reward": float(self.reward(cost_weight).mean()),
            "accuracy": float(self.accuracy.mean()),
            "cost": float(self.cost.mean()),
            "active_fraction": float(self.active_fraction.mean()),
            "distinct_masks": len(np.unique(self.masks, axis=0)),
            "labels_used": self.labels_used,
        }


def compare(
    scenario: Scenario,
    choose: Callable[[Users], Plans],
    cost_weight: float,
    seed: int,
    split: str = "test",
    search: bool = True,
) -> dict[str, Result]:
    """Run every method on a split's users.

    Args:
        scenario: whose users.
        choose: the gating policy, ``users [U] -> masks [U, P]``, or plans ``[U, R, P]`` of several rounds.
        cost_weight: lambda.
        seed: of the random rivals.
        split: ``test`` for reports.
        search: whether to run the searches per user.
    """
    users, shape = scenario.users(split), (len(scenario.users(split)), len(scenario.pathways))
    rng = np.random.default_rng([seed, 77])
    plans = choose(users)
    mine = plans if plans.ndim == 2 else plans[:, -1]
    static = np.repeat(best_static(scenario, cost_weight, seed)[None], len(users), axis=0)
    on, off = np.ones(shape, dtype=bool), np.zeros(shape, dtype=bool)

    def tried(role: str, label: str) -> Plans:
        return searched(scenario, users, cost_weight, role, static[:1], label)

    few = scenario.label_counts["support"][users]
    every = few + scenario.label_counts["validation"][users]
    none = np.zeros_like(few)

    def result(draws: Sequence[Plans], labels: NDArray[np.int64], role: str = "query") -> Result:
        return _result(scenario, users, draws, labels, role)

    found = {
        "ppo": result([plans], few),
        "all_on": result([on], few),
        "all_off": result([off], none),
        "best_static": result([static], few),
        "random": result([random_masks(mine, scenario.oracle.costs, rng) for _ in range(RANDOM_DRAWS)], few),
    }
    if len(users) > 1:
        found["shuffled"] = result([shuffled_masks(mine, rng) for _ in range(SHUFFLES)], few)
    for score in ("gradient_norm", "relative_gradient"):
        found[score] = result([thresholded(scenario, users, cost_weight, score)], few)
    if search:
        found["validation_search"] = result([tried("validation", "search on validation labels")], every)
    found["all_on_all_labels"] = result([on], every, "query_all_labels")
    if search:
        found["support_search"] = result([tried("support_halves", "search on the support alone")], few)
    found["ppo_all_labels"] = result([mine], every, "query_all_labels")
    if scenario.data is not None:
        bare = float(scenario.oracle.costs.of(off[:1])[0])
        for name, (accuracy, parameters) in simple_rivals(scenario.data, split).items():
            cost = parameters if scenario.counts == "parameters" else bare
            found[name] = Result(
                accuracy, np.full(len(users), cost), np.zeros(len(users)), scenario.executed(off), float(few.mean())
            )
    return found


def _result(scenario: Scenario, users: Users, draws: Sequence[Plans], labels: NDArray[np.int64], role: str) -> Result:
    outcomes = [scenario.oracle.evaluate(users, masks, role) for masks in draws]
    draws = [scenario.executed(masks if masks.ndim == 2 else masks[:, -1]) for masks in draws]
    return Result(
        np.mean([o.accuracy for o in outcomes], axis=0),
        np.mean([o.cost for o in outcomes], axis=0),
        np.mean([masks.mean(1) for masks in draws], axis=0),
        draws[0],
        float(labels.mean()),
    )


@dataclass(frozen=True)
class Conclusions:
    """Paired over users and pooled over seeds: the policy against the two rivals that matter most, and the gap.

    Of one user alone ``minus_shuffled`` is None.
    """

    minus_static: Interval
    minus_shuffled: Interval | None
    gap: GapClosed


def conclude(runs: Sequence[Mapping[str, NDArray[np.float64]]]) -> Conclusions:
    """Draw conclusions from per-user rewards ``[U]`` by method, one mapping per seed."""
    by = {name: [run[name] for run in runs] for name in runs[0]}
    gap = GapClosed(None, None, "validation_search was not run (search: false)")
    users = sum(len(rewards) for rewards in by["ppo"])
    if users < 2:
        gap = GapClosed(None, None, ONE)
    elif "validation_search" in by:
        gap = gap_closed(by["ppo"], by["best_static"], by["validation_search"])
    dealt = paired_difference(by["ppo"], by["shuffled"]) if "shuffled" in by else None
    return Conclusions(paired_difference(by["ppo"], by["best_static"]), dealt, gap)


def summarise(found: Mapping[str, Result], cost_weight: float) -> dict[str, Any]:
    """The ``test`` part of ``summary.json``."""
    done = conclude([{name: result.reward(cost_weight) for name, result in found.items()}])

    users = len(found["ppo"].accuracy)

    def difference(interval: Interval) -> dict[str, Any]:
        return {"reward": interval.mean, "ci95": [interval.low, interval.high] if users > 1 else None}

    return {
        "n_users": users,
        "methods": {name: found[name].summary(cost_weight) for name in METHODS if name in found},
        "equal_labels": {name: found[name].summary(cost_weight) for name in EXTRA if name in found},
        "simple": {name: found[name].summary(cost_weight) for name in SIMPLE if name in found},
        "ppo_minus_best_static": difference(done.minus_static),
        "ppo_minus_shuffled": difference(done.minus_shuffled) if done.minus_shuffled else None,
        "ppo_minus_shuffled_reason": None if done.minus_shuffled else ALONE,
        "gap_closed": done.gap.value,
        "gap_closed_ci95": done.gap.ci95,
        "gap_closed_reason": done.gap.reason,
    }


def table(test: Mapping[str, Any], cost_weight: float) -> str:
    """What :func:`summarise` found as Markdown, with what follows from it."""
    lines = [
        f"| method | reward at cost weight {cost_weight:g} | accuracy | cost | on | distinct masks | labels used |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in {**test["methods"], **test["equal_labels"], **test["simple"]}.items():
        lines.append(
            f"| {name} | {row['reward']:.3f} | {row['accuracy']:.3f} | {row['cost']:.3f} "
            f"| {row['active_fraction']:.0%} | {row['distinct_masks']} | {row['labels_used']:.0f} |"
        )
    lines += ["", *_sentences(test)]
    return "\n".join(lines)


def _sentences(test: Mapping[str, Any]) -> list[str]:
    out = []
    for key, rival in (("ppo_minus_best_static", "best_static"), ("ppo_minus_shuffled", "shuffled")):
        if test[key] is None:
            out.append(f"ppo - {rival}: not defined, {test[f'{key}_reason']}")
            continue
        if test[key]["ci95"] is None:
            out.append(f"ppo - {rival}: {test[key]['reward']:+.4f}, no interval: {ONE}")
            continue
        low, high = test[key]["ci95"]
        verdict = "above" if low > 0 else "below" if high < 0 else "no difference shown"
        out.append(f"ppo - {rival}: {test[key]['reward']:+.4f} [{low:+.4f}, {high:+.4f}] ({verdict})")
    if test["gap_closed"] is None:
        out.append(f"gap closed: not defined, {test['gap_closed_reason']}")
    else:
        low, high = test["gap_closed_ci95"]
        out.append(f"gap closed: {test['gap_closed']:.2f} [{low:.2f}, {high:.2f}]")
    users = test["n_users"]
    out.append(
        f"{users} held-out users; 95% paired bootstrap over users. Users of a split may share examples (the digits' "
        "users do): the intervals then describe new users of the same pool of examples. `on` is the share of pathways."
    )
    return out


def group_table(scenario: Scenario, found: Mapping[str, Result], split: str = "test") -> str:
    """Accuracy of four methods by group of users, as Markdown."""
    groups = np.array(scenario.groups)[scenario.users(split)]
    shown = ("all_off", "all_on", "best_static", "ppo")
    lines = [f"| users | number | {' | '.join(shown)} |", "| --- | --- " + "| --- " * len(shown) + "|"]
    for group in sorted(set(groups)):
        rows = groups == group
        values = " | ".join(f"{found[name].accuracy[rows].mean():.3f}" for name in shown)
        lines.append(f"| {group} | {rows.sum()} | {values} |")
    return "\n".join(lines)


def leakage(scenario: Scenario) -> dict[str, dict[str, float]]:
    """Validation accuracy of ``all_off`` and ``all_on`` by split; ``standard_error``, that of train users less val users.

    Train users far above val users: something was fitted on what is rewarded. Of many users :data:`SAMPLE` are asked.
    """
    out: dict[str, dict[str, float]] = {"standard_error": {}}
    for name, bit in (("all_off", False), ("all_on", True)):
        out[name], variance = {}, 0.0
        for split in ("train", "val"):
            users = scenario.users(split)[:SAMPLE]
            masks = np.full((len(users), len(scenario.pathways)), bit)
            accuracy = scenario.oracle.evaluate(users, masks).accuracy
            out[name][split] = float(accuracy.mean())
            variance += float(accuracy.var()) / len(users)
        out["standard_error"][name] = variance**0.5
    return out


def leakage_lines(found: Mapping[str, Mapping[str, float]]) -> str:
    """A sentence per mask; ``all_off`` of train users more than three points above val users' is called a defect."""
    lines = [
        f"{name} on validation examples: {found[name]['train']:.3f} of train users, {found[name]['val']:.3f} of val users"
        for name in ("all_off", "all_on")
    ]
    apart, error = found["all_off"]["train"] - found["all_off"]["val"], found["standard_error"]["all_off"]
    if apart > 0.03:
        lines.append(
            f"DEFECT: more than three points apart ({apart:+.3f}, standard error {error:.3f}): unless it is chance, the "
            "population model was fitted on what is rewarded"
        )
    return "\n".join(lines)


def user_rows(scenario: Scenario, found: Mapping[str, Result], cost_weight: float, split: str = "test") -> str:
    """CSV text: one row per user with their facts and every method's mask, accuracy, cost and reward."""
    users = scenario.users(split)
    facts = sorted({key for u in users for key in scenario.user_info[u]})
    fields = ("mask", "accuracy", "cost", "active_fraction", "reward")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["user", "group", *facts, *(f"{name}_{field}" for name in found for field in fields)])
    for row, user in enumerate(users):
        cells: list[Any] = [scenario.user_ids[user], scenario.groups[user]]
        cells += [scenario.user_info[user].get(key, "") for key in facts]
        for result in found.values():
            accuracy, cost = float(result.accuracy[row]), float(result.cost[row])
            mask = "".join(str(int(bit)) for bit in result.masks[row])
            cells += [mask, accuracy, cost, float(result.active_fraction[row]), accuracy - cost_weight * cost]
        writer.writerow(cells)
    return out.getvalue()


def to_json(summary: Mapping[str, Any]) -> bytes:
    """Indented JSON."""
    return json.dumps(summary, indent=1).encode()

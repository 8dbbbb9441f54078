"""The tables of ``eval.budgets``: one policy for every budget beside separate ones, static masks and searches per user."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from agents.bootstrap import paired_difference
from agents.comparison import Result, conclude
from agents.people import People, unit_of
from envs.cost_weights import REPORTED
from eval.adaptations import BUDGET, POLICY_ADAPTATIONS, Spending, needed, paid_back
from eval.fronts import WEIGHTS
from eval.headline import Rewards, gap_text, pooled_over_weights, text_of
from eval.pareto import WORST_COST, Band, Points, hypervolume, mean_points

RANGE = f"uniform:{min(WEIGHTS):g}:{max(WEIGHTS):g}"
"""Cost weights that the one policy learns from and is shown."""
SPENDING_WEIGHT = 0.1
"""At which reward against adaptations is compared."""
COUNTS = (POLICY_ADAPTATIONS, 8)
"""Adaptations per user at which the policy is compared with searches."""
SHOWN = {
    "ppo": "**one policy**",
    "separate": "separate policies",
    "best_static": "best_static",
    "validation_search": "validation_search",
    "all_on": "all_on",
    "random": "random",
    "gradient_norm": "gradient_norm",
}
"""Methods of the first table, and what they are called there."""


@dataclass(frozen=True)
class Measured:
    """One seed.

    Attributes:
        found: by reported cost weight and method, on test users; ``separate`` beside those of :func:`compare`.
        points: by method ``[K, U, 2]``; those that take a cost weight at each of :data:`WEIGHTS`.
        static: ``[L, U, 2]``, static masks of every price and size.
        spent: what the policy and searches make of adaptations.
        training: adaptations that the one policy was trained with.
        people: who the test users are, if they are real people.
    """

    found: dict[float, dict[str, Result]]
    points: dict[str, Points]
    static: Points
    spent: Spending
    training: int
    people: tuple[str, ...] | None = None


def by_person(seeds: Sequence[Measured]) -> Sequence[Measured]:
    """Seeds of the same real people as one, of everybody's means; simulated users stay, others in every seed."""
    names = [seed.people for seed in seeds if seed.people is not None]
    if not names:
        return seeds
    everybody, first = People(names), seeds[0]

    def result(weight: float, method: str) -> Result:
        each = [seed.found[weight][method] for seed in seeds]
        accuracy, cost, on = (
            everybody.mean([getattr(one, name) for one in each]) for name in ("accuracy", "cost", "active_fraction")
        )
        return replace(each[0], accuracy=accuracy, cost=cost, active_fraction=on)

    return [
        Measured(
            {weight: {method: result(weight, method) for method in of} for weight, of in first.found.items()},
            {name: everybody.mean([seed.points[name] for seed in seeds], axis=1) for name in first.points},
            everybody.mean([seed.static for seed in seeds], axis=1),
            Spending(
                everybody.mean([seed.spent.policy for seed in seeds]),
                {name: everybody.mean([seed.spent.searches[name] for seed in seeds], axis=1) for name in first.spent.searches},
            ),
            round(float(np.mean([seed.training for seed in seeds]))),
            tuple(everybody.names),
        )
    ]


def method_table(seeds: Sequence[Measured]) -> list[str]:
    """Reward, accuracy and share of pathways on, per method and cost weight."""
    heads = " | ".join(f"reward at {w:g} | accuracy | on" for w in REPORTED)
    lines = [f"| method | {heads} |", "| --- " * (1 + 3 * len(REPORTED)) + "|"]
    for name, title in SHOWN.items():
        if any(name not in seed.found[w] for seed in seeds for w in REPORTED):
            continue
        cells = []
        for weight in REPORTED:
            results = [seed.found[weight][name] for seed in seeds]
            reward, accuracy, on = (
                np.mean([values.mean() for values in each])
                for each in (
                    [r.reward(weight) for r in results],
                    [r.accuracy for r in results],
                    [r.active_fraction for r in results],
                )
            )
            cells.append(f"{reward:.3f} | {accuracy:.3f} | {on:.0%}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def conclusions(seeds: Sequence[Measured]) -> list[str]:
    """Paired differences of the one policy at each weight, and the gap closed, pooled over weights where it is defined."""
    rivals = [name for name in ("validation_search", "best_static", "separate") if name in seeds[0].found[REPORTED[0]]]
    titles = [f"one policy - {name}" for name in rivals]
    lines = [f"| cost weight | {' | '.join(titles)} | accuracy, one policy - all_on | gap closed |"]
    lines.append("| --- " * (3 + len(rivals)) + "|")
    defined = []
    for weight in REPORTED:
        found = [seed.found[weight] for seed in seeds]
        rewards = [{name: result.reward(weight) for name, result in each.items()} for each in found]
        gap = conclude(rewards).gap
        if gap.value is not None:
            defined.append(rewards)
        cells = [text_of(paired_difference(_field(rewards, "ppo"), _field(rewards, name))) for name in rivals]
        accuracies = [{name: result.accuracy for name, result in each.items()} for each in found]
        cells.append(text_of(paired_difference(_field(accuracies, "ppo"), _field(accuracies, "all_on"))))
        lines.append(f"| {weight:g} | {' | '.join(cells)} | {gap_text(gap)} |")
    if defined:
        lines.append(f"| pooled {'| ' * (2 + len(rivals))}{gap_text(conclude(pooled_over_weights(defined)).gap)} |")
    return lines


def _field(runs: Sequence[Rewards], name: str) -> list[NDArray[np.float64]]:
    return [run[name] for run in runs]


def volume_table(seeds: Sequence[Measured]) -> list[str]:
    """Hypervolume of every method's mean points."""
    reference = (WORST_COST, float(np.mean([seed.points["all_off"][..., 1].mean() for seed in seeds])))
    volumes = {name: hypervolume(mean_points([s.points[name] for s in seeds]), reference) for name in seeds[0].points}
    volumes["static masks of every price and size"] = hypervolume(mean_points([s.static for s in seeds]), reference)
    lines = ["| method | points | hypervolume |", "| --- | --- | --- |"]
    counts = {name: points.shape[0] for name, points in seeds[0].points.items()}
    for name, volume in sorted(volumes.items(), key=lambda item: -item[1]):
        lines.append(f"| {name} | {counts.get(name, len(seeds[0].static))} | {volume:.4f} |")
    return lines


def band_sentence(band: Band) -> str:
    """Where the policy's front is, in words."""
    count, worst = len(band.costs), int(band.low.argmin())
    above = f"all {count}" if band.above else f"{(band.low > 0).sum()} of {count}"
    return (
        f"The one policy's Pareto front is above the static one at {above} costs from its cheapest point ({band.costs[0]:.3f}) "
        f"to its dearest ({band.costs[-1]:.3f}), by a simultaneous 95 % band. Accuracy differs by {band.difference.min():+.3f} "
        f"to {band.difference.max():+.3f}; the band's lowest point is {band.low[worst]:+.3f}, at cost {band.costs[worst]:.3f}."
    )


def spending_table(seeds: Sequence[Measured]) -> list[str]:
    """Reward after some adaptations per new user, and the policy's lead at its own count and at 8."""
    counts = [2**power for power in range(BUDGET.bit_length())]
    leads = [f"policy at {POLICY_ADAPTATIONS} - search at {count}" for count in COUNTS]
    lines = [f"| adaptations per new user | {' | '.join(map(str, [0, *counts, *leads]))} |"]
    lines.append("| --- " * (2 + len(counts) + len(leads)) + "|")
    mine = [seed.spent.policy for seed in seeds]
    policy = np.mean([values.mean() for values in mine])
    cells = [f"{policy:.3f}" if count == POLICY_ADAPTATIONS else "" for count in [0, *counts]]
    lines.append(f"| **one policy** | {' | '.join(cells)} | | |")
    for name, curve in search_curves(seeds).items():
        differences = [paired_difference(mine, [seed.spent.searches[name][count] for seed in seeds]) for count in COUNTS]
        cells = [f"{curve[count]:.3f}" for count in [0, *counts]] + [text_of(each) for each in differences]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def search_curves(seeds: Sequence[Measured]) -> dict[str, NDArray[np.float64]]:
    """Mean reward ``[N + 1]`` of every search, over users, then seeds."""
    return {name: np.mean([seed.spent.searches[name].mean(1) for seed in seeds], axis=0) for name in seeds[0].spent.searches}


def payback_sentence(seeds: Sequence[Measured]) -> str:
    """After how many users training has paid for itself."""
    policy = float(np.mean([seed.spent.policy.mean() for seed in seeds]))
    reached = [count for curve in search_curves(seeds).values() if (count := needed(curve, policy)) is not None]
    training = round(float(np.mean([seed.training for seed in seeds])))
    clause = paid_back(training, min(reached, default=None))
    return f"The policy took {training:,} adaptations to train and {POLICY_ADAPTATIONS} per new user; {clause}."


def report(seeds: Sequence[Measured], band: Band, count: int, command: str) -> str:
    """The whole text between the markers, of what :func:`by_person` made of ``count`` seeds."""
    first = next(iter(seeds[0].found.values()))["ppo"]
    lead = (
        f"{count} seeds, {len(first.accuracy)} test users each; 95 % paired bootstrap intervals, "
        f"{unit_of(seeds[0].people is None)}. `one policy` learned from cost weights drawn from {min(WEIGHTS):g} to "
        f"{max(WEIGHTS):g} and is shown the one at hand; `separate policies` are trained for one weight each. `on`: share of "
        f"pathways; `random` has the one policy's mean cost. Written by `{command}`."
    )
    volumes = (
        f"Hypervolume of mean cost and accuracy (reference: cost {WORST_COST:g}, accuracy of all_off) over the cost weights "
        f"{', '.join(f'{w:g}' for w in WEIGHTS)}; `random` over its probabilities."
    )
    searches = (
        f"Query reward at cost weight {SPENDING_WEIGHT:g} against adaptations per new user. Searches see the user's validation "
        "labels after every adaptation and keep the best mask so far, the policy sees none of them; its count is its one "
        "adaptation and its statistics. `all_off` costs none."
    )
    blocks = [[lead], method_table(seeds), conclusions(seeds), [volumes], volume_table(seeds), [band_sentence(band)]]
    blocks += [[searches], spending_table(seeds), [payback_sentence(seeds)]]
    return "\n\n".join("\n".join(block) for block in blocks)

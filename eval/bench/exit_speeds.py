"""How long a batch of users takes under masks that may end early, and which choices are fast enough by val users."""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor

from agents.checkpoint import choose_masks
from envs.oracles import LiveOracle, Plans, Users
from envs.rules import Rules
from envs.scenario import Scenario
from eval.bench.clock import Spread, alternating_calls
from eval.fronts import static_masks

BATCH = 64
BARE, POLICY, STATIC = "bare", "policy", "best_static"
"""Ways of answering a batch, or how their names begin."""
SPEEDS = (1.2, 1.5)
"""Times the bare model's speed that is asked for."""
MARGIN = 1.05
"""So much faster on val users, so that the speed holds for others too."""
SECONDS = 20.0
"""Of timing, at least, whatever the repeats: a batch of a small network takes milliseconds, and a choice hangs on it."""
PRICES = 61
"""Cost weights that are tried, over the whole range that a policy was trained for."""
Choose = Callable[[Users], Plans]


def timed(scenario: Scenario, split: str, masks: dict[str, Plans], repeats: int) -> dict[str, Spread]:
    """Milliseconds of a batch under each choice of masks for a split's users, ``[U, P]``; they take turns."""
    return alternating_calls(calls(scenario, split, masks), repeats, SECONDS)


def calls(scenario: Scenario, split: str, masks: dict[str, Plans]) -> dict[str, Callable[[], Tensor]]:
    """A batch of 64 of a split's users, one example each (people come again where there are fewer), by way of answering it."""
    data, live = scenario.data, scenario.oracle.live  # type: ignore[attr-defined]
    assert isinstance(live, LiveOracle)
    pathways, population = data.pathways, data.population
    people = getattr(population, split)
    places = np.arange(BATCH) % len(people)
    raw = torch.cat([people[place].query.inputs[:1] for place in places])
    inputs = pathways.model.backbone.prepare(raw if population.items is None else population.items.take(raw.tolist()))

    def served(chosen: Plans) -> Callable[[], Tensor]:
        gates = torch.from_numpy(chosen[places])
        with torch.no_grad():
            weights = live.adapted(scenario.users(split)[places], chosen[places][:, None])
        mine = {key: w.detach().clone() for key, w in weights.items()}  # copies, as slots hold them
        return lambda: pathways.forward(inputs[:, None], mine, gates)

    def bare() -> Tensor:
        return pathways.model(inputs)

    found = {name: served(chosen) if name != BARE else bare for name, chosen in masks.items()}
    return {name: torch.no_grad()(call) for name, call in found.items()}


def for_speeds(scenario: Scenario, policy: BasePolicy, rules: Rules, seed: int, repeats: int) -> dict[str, Plans]:
    """Test users' masks ``[U, P]`` by the policy, and by one mask for all, that val users choose for each of :data:`SPEEDS`.

    The policy is asked at :data:`PRICES` cost weights; masks for all are those of :func:`eval.fronts.static_masks`. Of what is
    fast enough for val users, that is chosen under which their mean accuracy on query examples is highest, the faster of equal
    ones; where nothing is fast enough, there is no such choice. A policy for one cost weight has nothing to choose between.
    """
    weight = rules.weight
    prices = np.linspace(weight.low, weight.high, PRICES) if weight.varies else [weight.low]
    told = [float(price) if weight.varies else None for price in prices]
    policies = {f"{price:.5g}": partial(_asked, policy, scenario, rules, say) for price, say in zip(prices, told, strict=True)}
    statics = {
        "".join(str(int(bit)) for bit in mask): partial(_same, mask)
        for mask in np.unique(scenario.executed(static_masks(scenario, seed)), axis=0)
    }
    found = {}
    for kind, choices in ((POLICY, policies), (STATIC, statics)):
        for speed, name in fast_enough(scenario, choices, repeats).items():
            found[f"{kind} for {speed:g}x, {name}"] = choices[name](scenario.users("test"))
    return found


def fast_enough(scenario: Scenario, choices: Mapping[str, Choose], repeats: int) -> dict[float, str]:
    """The name of val users' most accurate choice by speed, for as many of :data:`SPEEDS` as some choice reaches."""
    users = scenario.users("val")
    masks: dict[str, Plans] = {}
    for name, choose in choices.items():
        chosen = choose(users)
        for same in [other for other, known in masks.items() if (known == chosen).all()]:  # as neighbouring prices are
            del masks[same]  # the dearer price stays: others' masks are no dearer by it
        masks[name] = chosen
    accuracy = {name: scenario.oracle.evaluate(users, chosen, "query").accuracy.mean() for name, chosen in masks.items()}
    speed = timed(scenario, "val", {BARE: np.zeros_like(next(iter(masks.values()))), **masks}, repeats)
    best = {}
    for wanted in SPEEDS:
        if quick := [name for name in masks if speed[BARE].median >= MARGIN * wanted * speed[name].median]:
            best[wanted] = max(quick, key=lambda name: (accuracy[name], -speed[name].median))
    return best


def _asked(policy: BasePolicy, scenario: Scenario, rules: Rules, price: float | None, users: Users) -> Plans:
    return scenario.executed(choose_masks(policy, scenario, users, price, rules))


def _same(mask: Plans, users: Users) -> Plans:
    return np.tile(mask, (len(users), 1))

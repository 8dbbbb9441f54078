"""Steps per second of the environments against two rivals: the usual way, and our own way one user at a time."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from tqdm.auto import tqdm

from backbones.artefacts import ArtefactError
from envs.oracles import CachedOracle, LiveOracle
from envs.scenario import Scenario
from eval.bench.accuracy import compare_accuracy, compare_precisions, in_bfloat16
from eval.bench.clock import Way, alternating, flops_of, machine, peak_flops
from eval.bench.ours import all_new, all_seen, live_of, scenario_of, some_train_users, uncached
from eval.bench.rival import chosen_rate, usual
from eval.bench.training import trained
from eval.bench.usual import GatedLora

ENVS = ("dsa/DigitsResNet-v0", "dsa/PopquornBert-v0")
TABULAR = "dsa/Tabular-v0"
TABULATED = "dsa/DigitsResNet-v0"
"""Whose answers :data:`TABULAR` holds."""
OPTIONAL = ("dsa/PopquornBert-v0", TABULAR)
"""What needs files that may not be there: these are left out then, and the report says so."""
RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Learning rates that the usual way may choose from."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        num_envs: users at a time. usual: of these, how many the usual way steps per repeat, the next ones every time: it takes
            them one after the other, so that its speed is that of one. repeats: of every way.
        live, seen, tabular: vector steps per repeat. The slow rivals take one.
        policy: environment steps to a trained policy. rival: vector steps from which the rivals' time to it is extrapolated.
        rival_users: how many of the users each of these is taken with.
        rate_users: val users on whom the usual way chooses its learning rate. test_users: whose accuracy is compared.
        masks: per user, for the comparison of precisions. matrices: sides of those whose product is the machine's peak.
    """

    num_envs: int = 64
    usual: int = 16
    repeats: int = 5
    live: int = 8
    seen: int = 100
    tabular: int = 300
    policy: int = 60_000
    rival: int = 4
    rival_users: int = 64
    rate_users: int = 8
    test_users: int = 32
    masks: int = 8
    matrices: tuple[int, ...] = (1024, 2048)


SLOW: dict[str, dict[str, int]] = {"dsa/PopquornBert-v0": {"usual": 4, "rate_users": 2, "test_users": 16, "rival_users": 4}}
"""Sizes where one step of the usual way takes many seconds: sixty steps of it instead of five hundred."""


def measure_env(env_id: str, scenario: Scenario, sizes: Sizes, table: Scenario | None = None) -> dict[str, Any]:
    """All that is reported of one environment, JSON-able.

    Args:
        env_id: whose PPO settings are used.
        scenario: of that id.
        sizes: how much is measured.
        table: of :data:`TABULAR`, if it holds this environment's answers.
    """
    some = some_train_users(scenario, sizes.num_envs)
    live = live_of(scenario)
    lora = GatedLora(live.pathways.model)
    rate = chosen_rate(scenario, lora, RATES, sizes.rate_users)
    rivals = _ways(some, live, lora, rate, sizes)
    if table is not None:
        rivals["tabular"] = uncached(table, table.oracle, sizes.num_envs, sizes.tabular)
    rates = alternating(rivals, sizes.repeats)
    return {
        "users": len(some.users("train")),
        "gradient_steps": live.init.steps,
        "repeats": sizes.repeats,
        "placement": "side" if live.pathways.pooled else "inline",
        "steps_per_second": {name: asdict(spread) for name, spread in rates.items()},
        "rival_steps": {"usual": sizes.usual * sizes.repeats, "unbatched": sizes.num_envs * sizes.repeats},
        "flops_per_step": {name: step_flops(rivals[name]) for name in ("usual", "live")},
        "accuracy": compare_accuracy(scenario, lora, rate, sizes.test_users),
        "usual_learning_rate": rate,
        "bfloat16": compare_precisions(some, sizes.masks),
        "training": training_seconds(env_id, scenario, table, lora, sizes),
    }


def _ways(some: Scenario, live: LiveOracle, lora: GatedLora, rate: float, sizes: Sizes) -> dict[str, Way]:
    number = sizes.num_envs
    return {
        "usual": usual(some, lora, sizes.usual, rate),
        "unbatched": all_new(some, one_at_a_time(live), number, 1),
        "live": all_new(some, live, number, sizes.live),
        "live_bfloat16": all_new(some, in_bfloat16(live), number, sizes.live),
        "cached": all_seen(some, live, number, sizes.seen),
    }


def one_at_a_time(live: LiveOracle) -> LiveOracle:
    """The same oracle without batches."""
    return LiveOracle(live.data, live.init, chunk=1)


def step_flops(way: Way) -> float:
    """Operations per user and step, under the masks of the first repeat."""
    env, masks = way.begin(0)
    chosen = masks()
    return flops_of(lambda: env.step(chosen)) / env.num_envs


def training_seconds(
    env_id: str, scenario: Scenario, table: Scenario | None, lora: GatedLora, sizes: Sizes
) -> dict[str, float]:
    """Seconds to a trained policy: ours measured, from an empty cache; the rivals' extrapolated.

    A rival is given PPO's own time in our live run, and for every step of the environment one step at its rate under masks
    drawn from those that our run asked for (a policy soon switches little on, which is quicker for the rivals too). Its looks
    at val users are not counted.
    """
    assert isinstance(scenario.oracle, CachedOracle)
    live = trained(env_id, scenario, CachedOracle(live_of(scenario), scenario.oracle.query_of), sizes.policy)
    found = {"steps": float(sizes.policy), "live": live.seconds, "live_oracle": live.oracle}
    some, number, single = some_train_users(scenario, sizes.num_envs), sizes.rival_users, one_at_a_time(live_of(scenario))
    rivals = {  # how long a step takes does not depend on the learning rate
        "usual": usual(some, lora, number, RATES[0], sizes.rival, live.masks),
        "unbatched": uncached(some, single, number, sizes.rival, live.masks),
    }
    for name, way in rivals.items():
        found[f"{name}_extrapolated"] = live.rest + sizes.policy / way.rate(0)
    found["rival_steps"] = float(sizes.rival * number)
    if table is not None:
        found["tabular"] = trained(TABULAR, table, table.oracle, sizes.policy).seconds
    return found


def measure_envs(env_kwargs: dict[str, dict[str, Any]] | None = None, sizes: Sizes | None = None) -> dict[str, Any]:
    """The whole section, JSON-able: the machine, each environment, and the ids that were left out.

    Args:
        env_kwargs: by id, arguments other than the id's own.
        sizes: how much is measured.
    """
    given, sizes = env_kwargs or {}, sizes or Sizes()
    made = {env_id: _scenario_or_none(env_id, given.get(env_id, {})) for env_id in (*ENVS, TABULAR)}
    peak = {name: peak_flops(getattr(torch, name), sizes.matrices) for name in ("float32", "bfloat16")}
    measured = {
        env_id: measure_env(env_id, scenario, _sizes_for(env_id, sizes), made[TABULAR] if env_id == TABULATED else None)
        for env_id, scenario in made.items()
        if scenario is not None and env_id != TABULAR
    }
    left_out = [env_id for env_id, scenario in made.items() if scenario is None]
    return {"machine": machine(), "peak": peak, "environments": measured, "left_out": left_out}


def _sizes_for(env_id: str, sizes: Sizes) -> Sizes:
    return replace(sizes, **{name: min(most, getattr(sizes, name)) for name, most in SLOW.get(env_id, {}).items()})


def _scenario_or_none(env_id: str, env_kwargs: dict[str, Any]) -> Scenario | None:
    """None, with the reason on the screen, for an optional environment whose data, model or table are not at hand."""
    try:
        return scenario_of(env_id, env_kwargs)
    except (ArtefactError, ValueError, OSError) as error:
        if env_id not in OPTIONAL:
            raise
        tqdm.write(f"{env_id} is left out: {error}")
        return None

"""Who chose hyperparameters: val users of the environment that they were tuned in, who may be test users of another.

Tuning asks val users. Where two environments read the same people (two protocols of one data set), a val user of one can be a
test user of the other: settings may be taken over, and those people are not measured with them.
"""

from collections.abc import Mapping
from functools import lru_cache
from inspect import signature
from typing import Any

from eval.plan import Plan
from eval.tuned import env_key, read_tuned
from meta.arguments import parse_pairs
from users import population_factory


def choosers_of(env: str, kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """Environments of the same population from which settings of methods were adopted here, as :func:`eval.tuned.env_key`."""
    found, mine = read_tuned(), population_of(env, kwargs)
    entries = {**found.get(env, {}), **found.get(env_key(env, kwargs), {})}
    adopted = {entry["adopted"] for entry in entries.values() if "adopted" in entry}
    return tuple(sorted(key for key in adopted if population_of(*split_key(key)) == mine))


def split_key(key: str) -> tuple[str, dict[str, Any]]:
    """The inverse of :func:`eval.tuned.env_key`."""
    env, *pairs = key.split()
    return env, parse_pairs(pairs, env)


def population_of(env: str, kwargs: Mapping[str, Any]) -> str | None:
    """The name of an environment's population; None in problems without one."""
    plan = Plan(env, kwargs)
    return plan.scenario_arguments(plan.places[0])[1].get("users")


@lru_cache(maxsize=8)
def val_users_of(key: str) -> frozenset[str]:
    """Ids of the people whom tuning asked in an environment (with its default seed, 0). Only the population is made."""
    plan = Plan(*split_key(key))
    arguments = plan.scenario_arguments(plan.places[0])[1]
    factory = population_factory(arguments["users"])
    known = signature(factory).parameters
    population = factory(**{name: value for name, value in arguments.items() if name in known})
    return frozenset(user.user_id for user in population.val)

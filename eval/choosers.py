"""Who chose hyperparameters: val users of the environment that they were tuned in, who may be test users of another.

Tuning asks val users. Where two environments read the same people (two protocols of one data set), a val user of one can be a
test user of the other: settings may be taken over, and those people are not measured there, by whatever method.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from inspect import signature
from typing import Any

from eval.plan import Plan
from eval.tuned import PACKAGED, env_key, read_tuned, tuning
from eval.world import PLACES
from meta.arguments import parse_value
from users import population_factory


def choosers_of(env: str, kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """Environments of the same population from which settings of any method were adopted here, as :func:`eval.tuned.env_key`.

    Of any method, so that all runs of an environment have the same test users.

    Raises:
        ValueError: if settings are said to be those of an environment that is not known.
    """
    found, mine = read_tuned(), population_of(env, kwargs)
    entries = {**found.get(env, {}), **found.get(env_key(env, kwargs), {})}
    adopted = {entry["adopted"]: name for name, entry in entries.items() if "adopted" in entry}
    try:
        return tuple(sorted(key for key in adopted if mine is not None and population_of(*split_key(key)) == mine))
    except ValueError as error:
        raise ValueError(
            f"{PACKAGED}: settings of {', '.join(sorted(set(adopted.values())))} for {env} are said to be adopted from "
            f"{' and '.join(sorted(adopted))}: {error} Adopt them again from an environment that is known: "
            f"{tuning(env, kwargs)} --methods {','.join(sorted(set(adopted.values())))} --again --adopt ENV."
        ) from error


def split_key(key: str) -> tuple[str, dict[str, Any]]:
    """The inverse of :func:`eval.tuned.env_key`, but for what that leaves out."""
    env, *pairs = re.split(r" (?=[A-Za-z_]\w*:)", key)
    split = [pair.partition(":") for pair in pairs]
    return env, {name: None if value == "None" else parse_value(value) for name, _, value in split}


def population_of(env: str, kwargs: Mapping[str, Any]) -> str | None:
    """The name of an environment's population; None in problems without one, and where it is a file of the reader's own."""
    arguments = _arguments(env, kwargs)
    return None if "data" in arguments else arguments.get("users")


@lru_cache(maxsize=8)
def val_users_of(key: str, data_root: str | None = None) -> frozenset[str]:
    """Ids of the people whom tuning asked in an environment (with its default seed, 0). Only the population is made."""
    env, kwargs = split_key(key)
    arguments = _arguments(env, {**kwargs, **({PLACES[0]: data_root} if data_root else {})})
    factory = population_factory(arguments["users"])
    known = signature(factory).parameters
    population = factory(**{name: value for name, value in arguments.items() if name in known})
    return frozenset(user.user_id for user in population.val)


def _arguments(env: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Of the builder of an environment's scenario."""
    plan = Plan(env, kwargs)
    return plan.scenario_arguments(plan.places[0])[1]

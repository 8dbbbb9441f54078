"""Who chose hyperparameters: val users of the environment that they were tuned in, who may be test users of another.

Tuning asks val users. Where two environments read the same people (two protocols of one data set), a val user of one can be a
test user of the other: settings may be taken over, and those people are not measured there, by whatever method. They are known
by a hash of their ids (``val_users.yml`` beside the settings), since another file of theirs may have another split. Who has the
id of one of them in a file of other people is left out too; and the hash of a small number hides nothing.
"""

import re
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from backbones.artefacts import write_atomically
from eval.plan import Plan
from eval.tuned import PACKAGED, env_key, read_tuned, tuning
from meta.arguments import parse_value

HEADER = """\
# Whom `python -m eval.tune_methods` asked: of every environment a hash of each val user's id. Where its settings are used under
# another protocol of the same people, these are no test users, whatever file they are in.
"""


def choosers_of(env: str, kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """Environments of the same population from which settings of any method were adopted here, as :func:`eval.tuned.env_key`.

    Of any method, so that all runs of an environment have the same test users.

    Raises:
        ValueError: if settings are said to be those of an environment that is not known, or of people who are not.
    """
    found, mine = read_tuned(), population_of(env, kwargs)
    entries = {**found.get(env, {}), **found.get(env_key(env, kwargs), {})}
    adopted = {entry["adopted"]: name for name, entry in entries.items() if "adopted" in entry}
    try:
        keys = tuple(sorted(key for key in adopted if mine is not None and population_of(*split_key(key)) == mine))
    except ValueError as error:
        raise ValueError(
            f"{PACKAGED}: settings of {', '.join(sorted(set(adopted.values())))} for {env} are said to be adopted from "
            f"{' and '.join(sorted(adopted))}: {error} Adopt them again from an environment that is known: "
            f"{tuning(env, kwargs)} --methods {','.join(sorted(set(adopted.values())))} --again --adopt ENV."
        ) from error
    asked(keys)  # raises now rather than after the first rows
    return keys


def split_key(key: str) -> tuple[str, dict[str, Any]]:
    """The inverse of :func:`eval.tuned.env_key`, but for what that leaves out."""
    env, *pairs = re.split(r" (?=[A-Za-z_]\w*:)", key)
    split = [pair.partition(":") for pair in pairs]
    return env, {name: None if value == "None" else parse_value(value) for name, _, value in split}


def population_of(env: str, kwargs: Mapping[str, Any]) -> str | None:
    """The name of an environment's population; None in problems without one, and where it is a file of the reader's own."""
    plan = Plan(env, kwargs)
    arguments = plan.scenario_arguments(plan.places[0])[1]
    return None if "data" in arguments else arguments.get("users")


def digest(user_id: str) -> str:
    """By which a person is known."""
    return sha256(user_id.encode()).hexdigest()[:12]


def asked(keys: Iterable[str], settings: Path = PACKAGED) -> frozenset[str]:
    """Digests of the people whom tuning asked in some environments (:func:`eval.tuned.env_key`).

    Raises:
        ValueError: if who was asked is not known.
    """
    keys, known = tuple(keys), _read(_beside(settings))
    if missing := [key for key in keys if key not in known]:
        raise ValueError(f"{_beside(settings)} does not say who was asked in {missing[0]}; restore it, or tune a method there.")
    return frozenset(person for key in keys for person in known[key])


def note_asked(key: str, user_ids: Iterable[str], settings: Path = PACKAGED) -> None:
    """Keep whom tuning asks in an environment, beside the settings that it finds; whom it asked before stays."""
    file = _beside(settings)
    known = _read(file)
    together = sorted({*known.get(key, ()), *map(digest, user_ids)})
    if together != known.get(key):
        ordered = dict(sorted({**known, key: together}.items()))
        text = yaml.safe_dump({name: " ".join(people) for name, people in ordered.items()}, width=120)
        write_atomically(file, (HEADER + "\n" + text).encode())


def _beside(settings: Path) -> Path:
    """Of ``methods.yml``, ``val_users.yml``; of another file of settings, ``NAME-val_users.yml``."""
    return settings.with_name("val_users.yml" if settings.resolve() == PACKAGED.resolve() else f"{settings.stem}-val_users.yml")


def _read(file: Path) -> dict[str, list[str]]:
    if not file.exists():
        return {}
    try:
        return {key: people.split() for key, people in (yaml.safe_load(file.read_text()) or {}).items()}
    except (yaml.YAMLError, AttributeError) as error:
        raise ValueError(f"{file} is not a file of val users ({error!r}); restore it, or remove it and tune again.") from error

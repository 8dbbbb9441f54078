"""What tuning has found, in YAML: environment -> method -> settings that differ from the defaults, and what they are worth.

``hyperparameters/methods.yml`` comes with the package. Written by ``python -m eval.tune_methods``, read by the harness.
"""

import shlex
from collections.abc import Iterable, Mapping
from copy import deepcopy
from functools import lru_cache
from importlib.resources import files
from pathlib import Path, PurePath
from typing import Any

import yaml

from backbones.artefacts import write_atomically
from eval.methods import make_method
from eval.world import PLACES

PACKAGED = Path(str(files("eval").joinpath("hyperparameters/methods.yml")))
"""The file that the harness reads where no other is named."""
HEADER = """\
# Hyperparameters of the harness's methods per environment, chosen on val users: test users are never asked. Written by
#   python -m eval.tune_methods --env ID --trials N
# which gives every method that it is called for the same number of trials, keeps other entries and skips what is finished.
# `settings`: what differs from a method's defaults. `value`, `default_value` (none: failed, or not among the values to try):
# mean over val users of query accuracy, less `cost_weight` (0.1 where it is not said) times cost for methods that trade.
# `trials`: spent in this search; of these `stopped_early` were given up at a fifth of their training and `failed` gave an
# error. `earlier_trials`: in searches of this method that came before. `seconds_*`: of the winner, on one machine. `search`:
# a hash of what the search was. `adopted`: there was none; the settings are those found in that environment (`--adopt`).
"""
Entry = dict[str, Any]
"""What is kept of a method in an environment."""


def env_key(env: str, kwargs: Mapping[str, Any]) -> str:
    """An environment with its arguments as a stable text: ``dsa/Personal-v0 backbone:bert users:popquorn``.

    Of a file or folder given by its whole path only the name counts: the same data may lie elsewhere tomorrow.
    """
    return " ".join([env, *_pairs(kwargs)])


def _pairs(kwargs: Mapping[str, Any]) -> list[str]:
    return [f"{name}:{name_alone(value)}" for name, value in sorted(kwargs.items()) if name not in PLACES]


def name_alone(value: Any) -> Any:
    """Of a whole path its last part; anything else as it is."""
    return PurePath(value).name if isinstance(value, str | PurePath) and PurePath(value).is_absolute() else value


def read_tuned(file: Path = PACKAGED) -> dict[str, dict[str, Entry]]:
    """Entries by environment and method; none if there is no such file.

    Raises:
        ValueError: for a file that is not of that form.
    """
    if not file.exists():
        return {}
    try:
        return deepcopy(_parsed(file.read_text()))
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not a file of tuned methods ({error!r}); restore it, or remove it and tune again."
        ) from error


@lru_cache(maxsize=4)  # a run asks for each of its jobs, and YAML is slow
def _parsed(text: str) -> dict[str, dict[str, Entry]]:
    found = yaml.safe_load(text) or {}
    return {env: {name: _whole(entry) for name, entry in methods.items()} for env, methods in found.items()}


def _whole(entry: Entry) -> Entry:
    """YAML knows lists alone; hyperparameters are tuples."""
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in entry["settings"].items()}
    return {**entry, "settings": settings}


def write_tuned(file: Path, env: str, method: str, entry: Entry) -> None:
    """Put one entry (``env`` is an :func:`env_key`) in its place. Whatever else the file holds is kept."""
    found = read_tuned(file)
    found.setdefault(env, {})[method] = entry
    ordered = {name: dict(sorted(methods.items())) for name, methods in sorted(found.items())}
    write_atomically(file, (HEADER + "\n" + yaml.safe_dump(ordered, sort_keys=False, width=120)).encode())


def entry_for(env: str, kwargs: Mapping[str, Any], method: str, file: Path = PACKAGED) -> Entry | None:
    """What is known of a method in an environment with these arguments, or else in the environment as it is; None: nothing."""
    found = read_tuned(file)
    for key in (env_key(env, kwargs), env):
        if method in found.get(key, {}):
            return found[key][method]
    return None


def timed_entry(env: str, kwargs: Mapping[str, Any], method: str, file: Path = PACKAGED) -> Entry | None:
    """The entry that says what a method took, which is another environment's where its settings are; None: nobody timed it."""
    entry = entry_for(env, kwargs, method, file)
    if entry is not None and "adopted" in entry:
        entry = read_tuned(file).get(entry["adopted"], {}).get(method)
    return entry if entry is not None and "seconds_per_user" in entry else None


def borrowed(env: str, kwargs: Mapping[str, Any], methods: Iterable[str], file: Path = PACKAGED) -> list[str]:
    """Those of some methods whose settings were found in the environment with other arguments than these."""
    found, key = read_tuned(file), env_key(env, kwargs)
    return [name for name in methods if key != env and name in found.get(env, {}) and name not in found.get(key, {})]


def tuning(env: str, kwargs: Mapping[str, Any]) -> str:
    """The beginning of the command that tunes methods there."""
    pairs = _pairs(kwargs)
    return shlex.join(["python", "-m", "eval.tune_methods", "--env", env, *(["--env-kwargs", *pairs] if pairs else [])])


def settings_for(env: str, kwargs: Mapping[str, Any], method: str, file: Path = PACKAGED) -> dict[str, Any]:
    """The tuned settings of a method, see :func:`entry_for`; ``{}``, its defaults, where it was never tuned.

    Raises:
        ValueError: if the method no longer has one of them.
    """
    entry = entry_for(env, kwargs, method, file)
    if entry is None:
        return {}
    try:
        make_method(method, **entry["settings"])
    except ValueError as error:
        how = f' --adopt "{entry["adopted"]}"' if "adopted" in entry else ""
        raise ValueError(
            f"{file}, {env}: {error} Tune it again: {tuning(env, kwargs)} --methods {method} --again{how}"
        ) from error
    return entry["settings"]

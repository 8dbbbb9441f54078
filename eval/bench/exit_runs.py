"""Trained runs whose policies may end inference early: what each is a run of, and whether they can be measured together."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Any

from agents.run import RunConfig
from envs import known_spec
from eval.tuned import env_key
from users import population_factory

SUCH = "dsa/UnipenResNetExit-v0"
ASIDE = ("fold", "data_root")
"""Arguments of environments in which runs may differ that are taken together: other users of one population, other paths."""


def exit_runs(folders: Sequence[Path]) -> list[RunConfig]:
    """What the runs were trained with.

    Raises:
        FileNotFoundError: for a folder that is no run. ValueError: for a run whose gates cannot exit, and for two runs that
            answer for the same thing.
    """
    found: dict[str, Path] = {}
    configs = [RunConfig.load(folder) for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        if "exit" not in (_given(config).get("gates") or ""):
            raise ValueError(f"{folder} is a run on {config.env}, where masks run the whole network: give one on {SUCH} say.")
        same = json.dumps([shared(config), config.seed, fold_of(config)], sort_keys=True)
        if same in found:
            raise ValueError(f"{found[same]} and {folder} are runs of one seed with the same settings: give one of them.")
        found[same] = folder
    return configs


def fold_of(config: RunConfig) -> int | None:
    """Whose users are the test users, given or by default; None for a population without folds."""
    parameter = signature(population_factory(_given(config)["users"])).parameters.get("fold")
    return None if parameter is None else config.env_kwargs.get("fold", parameter.default)


def _given(config: RunConfig) -> dict[str, Any]:
    return {**known_spec(config.env).kwargs, **config.env_kwargs}


def shared(config: RunConfig) -> dict[str, Any]:
    """All that runs have in common which are taken together; JSON-able.

    What they were trained with but for seed, fold, where their data lies, and what only their own report depends on.
    """
    found = {name: value for name, value in asdict(config).items() if name not in ("seed", "search", "tensorboard_log")}
    return {**found, "env_kwargs": {name: value for name, value in sorted(config.env_kwargs.items()) if name not in ASIDE}}


def title(config: RunConfig) -> str:
    """The environment with its arguments, as tables name it: ``PopquornBertExit-v0 rank:4``."""
    return env_key(config.env, shared(config)["env_kwargs"]).removeprefix("dsa/")

"""The search for PPO's settings that ``agents.tune`` runs: what is tried, in which order, and what is remembered on disk.

Proposals come from Optuna's tree-structured Parzen estimator (Bergstra et al. 2011, "Algorithms for Hyper-Parameter
Optimization"); a trial below the median of the earlier ones is given up (Golovin et al. 2017, "Google Vizier").
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import BaseTrial, FrozenTrial, TrialState

from backbones.artefacts import write_atomically

Settings = dict[str, Any]
"""An entry of ``hyperparameters/ppo.yml``, with what ``default`` fills in."""
Objective = Callable[[Settings, Callable[[float, int], None]], float]
"""What settings are worth; it reports values on the way, with the stage, and lets through what the report raises."""
STARTUP = 5
"""Whole trials before one is given up."""


def suggest(trial: BaseTrial, settings: Settings) -> Settings:
    """Settings with what the trial proposes in their place, rounded to what one would write into the YAML file.

    A batch is a rollout, or a half, a quarter or an eighth of it, so that none is left over.
    """
    n_steps = trial.suggest_categorical("n_steps", [4, 8, 16, 32])
    kwargs: Settings = {"hidden": trial.suggest_categorical("hidden", [32, 64, 128])}
    if not settings["warm_start"]:  # which sets it to zero
        kwargs["initial_logit"] = trial.suggest_float("initial_logit", -4, 0, step=0.5)
    return settings | {
        "n_steps": n_steps,
        "batch_size": n_steps * settings["n_envs"] // trial.suggest_categorical("batches", [1, 2, 4, 8]),
        "learning_rate": float(f"{trial.suggest_float('learning_rate', 1e-4, 1e-2, log=True):.2g}"),
        "ent_coef": float(f"{trial.suggest_float('ent_coef', 1e-4, 1e-1, log=True):.2g}"),
        "n_epochs": trial.suggest_int("n_epochs", 2, 20),
        "clip_range": round(trial.suggest_float("clip_range", 0.1, 0.4, step=0.05), 2),
        "average": trial.suggest_categorical("average", [0.0, 0.5, 0.8, 0.9, 0.95]),
        "policy_kwargs": settings["policy_kwargs"] | kwargs,
    }


def proposal_of(settings: Settings) -> dict[str, Any]:
    """What a trial proposes where :func:`suggest` gives just these settings."""
    kwargs = settings["policy_kwargs"]
    names = ("n_steps", "learning_rate", "ent_coef", "n_epochs", "clip_range", "average")
    return {name: settings[name] for name in names} | {
        "batches": settings["n_steps"] * settings["n_envs"] // settings["batch_size"],
        "hidden": kwargs["hidden"],
        "initial_logit": kwargs["initial_logit"],
    }


def open_study(path: Path, wanted: dict[str, Any]) -> optuna.Study:
    """The search remembered in a file, or a new one.

    Args:
        path: of the file.
        wanted: JSON-able; all that determines what settings are worth.

    Raises:
        ValueError: if the file holds a search for something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    drop_torn_line(path)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(path))),
        study_name="tune",
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=2),
    )
    wanted = json.loads(json.dumps(wanted))
    if "wanted" not in study.user_attrs:
        study.set_user_attr("wanted", wanted)
    before = study.user_attrs["wanted"]
    if before != wanted:
        different = [name for name in wanted if before.get(name) != wanted[name]]
        raise ValueError(f"{path} holds trials with another {', '.join(different)}; choose another --out, or remove it.")
    return study


def drop_torn_line(path: Path) -> None:
    """Remove the last line of a file of trials if a kill or a full disk tore it; another behind it would not be read."""
    known = path.read_bytes() if path.exists() else b""
    if known and not known.endswith(b"\n"):
        write_atomically(path, known[: known.rfind(b"\n") + 1])


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that count: run to the end, or given up."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def run_trials(study: optuna.Study, settings: Settings, objective: Objective, trials: int, seed: int) -> None:
    """Run trials until so many are finished; the first one tries the settings as they are.

    The sampler is seeded for each trial, from the number of trials before it: a search that was stopped between two trials
    goes on as it would have, and one that was stopped within a trial does not repeat its random numbers.
    """

    def tried(trial: optuna.Trial) -> float:
        def report(value: float, stage: int) -> None:
            trial.report(value, stage)
            if trial.should_prune():
                raise optuna.TrialPruned

        return objective(suggest(trial, settings), report)

    while len(done := finished(study)) < trials:
        if not done:
            study.enqueue_trial(proposal_of(settings))
        place = int(np.random.default_rng([seed, len(study.trials)]).integers(2**31))
        study.sampler = optuna.samplers.TPESampler(seed=place, constant_liar=False)
        study.optimize(tried, n_trials=1)

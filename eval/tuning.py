"""Choosing a method's hyperparameters on val users, with as many trials as every other method has.

Trials whose value is below the median of the earlier ones after a fifth of their training end there: of the five best
settings at that point four are among the best at the end ("Crafting efficient fine-tuning strategies" 2024).
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch

from eval.methods.base import Method
from eval.proposals import Proposals, Settings, points
from eval.val_users import Measured, ValUsers

SHARE = 1 / 5
"""Of its training, after which a hopeless trial ends."""
STARTUP = 4
"""Earlier trials that a trial must be comparable with before it may be given up."""
Space = Mapping[str, Sequence[Any]]
NOTHING: Space = {}
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
"""What torch says where there is none; it has no class of its own for that on a CPU."""


@dataclass(frozen=True)
class Trial:
    """One point that was tried.

    Attributes:
        settings: what it sets. length: how long it had trained when ``early`` was measured.
        early: its value after a fifth of its training; None: it does not train, or failed.
        whole: at the end; None: given up, or failed. failure: why.
        seconds: that it took.
    """

    settings: Settings
    length: int = 0
    early: float | None = None
    whole: Measured | None = None
    failure: str | None = None
    seconds: float = 0.0

    @property
    def given_up(self) -> bool:
        """Whether it ended at a fifth."""
        return self.whole is None and self.failure is None

    def __str__(self) -> str:
        told = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        if self.failure:
            return f"{told}: failed: {self.failure}"
        return f"{told}: {self.whole.value:.4f}" if self.whole else f"{told}: given up at {self.early:.4f}"


def search_space(kind: type[Method], instead: Space) -> tuple[Space, Settings]:
    """A method's space with other values for some of its hyperparameters, and its defaults, as far as they are among these.

    Raises:
        ValueError: for a value that the method refuses.
    """
    own = {name: tuple(values) for name, values in instead.items() if name in kind().settings()}
    defaults = kind().settings()
    defaults |= {name: values[0] for name, values in own.items() if defaults[name] not in values}
    return {**kind.space, **own}, kind(**defaults).settings()


def trials_in(kind: type[Method], trials: int, instead: Space = NOTHING) -> int:
    """How many of ``trials`` a method's space has points for."""
    return min(trials, points(*search_space(kind, instead)))


def trials_of(kind: type[Method], users: ValUsers, trials: int, seed: int, instead: Space = NOTHING) -> Iterator[Trial]:
    """Try a method's defaults, then other points of its space, none twice; fewer than ``trials`` if the space is smaller.

    The proposals follow from ``seed``, the method and the values, so the same call makes the same trials.

    Args:
        kind: the method.
        users: who say what a trial is worth.
        trials: how many.
        seed: of the proposals.
        instead: values by hyperparameter, in place of those of the method's space.
    """
    facts = f"{seed}:{kind.__module__}:{kind.__qualname__}"
    draws = int.from_bytes(hashlib.sha256(facts.encode()).digest()[:4], "big")
    proposals = Proposals(*search_space(kind, instead), draws)
    earlier: list[Trial] = []
    for _ in range(trials_in(kind, trials, instead)):
        settings = proposals.ask()
        start = perf_counter()
        trial = _tried(kind, settings, users, earlier)
        earlier.append(replace(trial, seconds=perf_counter() - start))
        proposals.tell(trial.whole.value if trial.whole else None, trial.early)
        yield earlier[-1]


def _tried(kind: type[Method], settings: Settings, users: ValUsers, earlier: Sequence[Trial]) -> Trial:
    trial = Trial(settings)
    try:
        method = kind(**settings)
        short = method.shortened(SHARE)
        if method.length is None:
            return replace(trial, whole=users.measure(method))
        early = users.measure(short)
        trial = replace(trial, length=getattr(short, method.length), early=early.value)
        if hopeless(trial, earlier):
            return trial
        whole = early if short == method else users.measure(method)
        return replace(trial, whole=replace(whole, fit_seconds=max(early.fit_seconds, whole.fit_seconds)))
    except (FloatingPointError, ValueError, MemoryError, torch.linalg.LinAlgError) as error:
        return Trial(settings, failure=str(error) or type(error).__name__)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in NO_MEMORY):
            raise
        return Trial(settings, failure=str(error))


def hopeless(trial: Trial, earlier: Sequence[Trial]) -> bool:
    """Whether a trial is below the median of the earlier ones after a fifth of its training.

    Compared are those that had trained no longer by then: where the length itself is tuned, a short training would else be
    given up for being short.
    """
    others = [e.early for e in earlier if e.early is not None and e.length <= trial.length]
    return trial.early is not None and len(others) >= STARTUP and trial.early < float(np.median(others))


@dataclass(frozen=True)
class Tuned:
    """What came of a method's trials; of equal ones the earlier is better, so the defaults need to be beaten.

    Attributes:
        kind: the method. trials: in order, the defaults first.
    """

    kind: type[Method]
    trials: Sequence[Trial]

    @property
    def best(self) -> Trial:
        """The winner. Raises ``ValueError`` if every trial failed."""
        finished = [trial for trial in self.trials if trial.whole]
        if not finished:
            raise ValueError(f"all {len(self.trials)} trials failed, the defaults like this: {self.trials[0].failure}")
        return max(finished, key=lambda trial: trial.whole.value)  # type: ignore[union-attr]

    @property
    def settings(self) -> Settings:
        """Of the winner, what differs from the defaults."""
        defaults = self.kind().settings()
        return {name: value for name, value in self.best.settings.items() if value != defaults[name]}

    def entry(self) -> dict[str, Any]:
        """What is kept, see :mod:`eval.tuned`."""
        best, first = self.best.whole, self.trials[0]
        is_default = all(self.kind().settings()[name] == value for name, value in first.settings.items())
        default = first.whole if is_default else None
        assert best is not None
        return {
            "settings": self.settings,
            "value": round(best.value, 6),
            "default_value": None if default is None else round(default.value, 6),
            "trials": len(self.trials),
            "stopped_early": sum(trial.given_up for trial in self.trials),
            "failed": sum(trial.failure is not None for trial in self.trials),
            "seconds_per_user": float(f"{best.seconds_per_user:.3g}"),
            "fit_seconds": float(f"{best.fit_seconds:.3g}"),
        }

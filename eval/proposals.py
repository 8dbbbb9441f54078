"""Which points of a grid of hyperparameters are tried: first the defaults, then what Optuna proposes, none twice."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product
from math import prod
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState

Settings = dict[str, Any]
RANDOM = 4
"""Points drawn at random before earlier ones say where to look."""
MANY = 100_000
"""Points of a grid that are looked through for one that was not tried yet."""


def points(space: Mapping[str, Sequence[Any]], defaults: Mapping[str, Any]) -> int:
    """How many different points there are: the grid's, and the defaults where they lie beside it."""
    return prod(map(len, space.values())) + (not _on_grid(space, defaults))


def _on_grid(space: Mapping[str, Sequence[Any]], defaults: Mapping[str, Any]) -> bool:
    return all(defaults[name] in values for name, values in space.items())


class Proposals:
    """Points of the grid of ``space``, proposed by a tree-structured Parzen estimator (Bergstra et al. 2011).

    Args:
        space: values by hyperparameter. Numbers count as ordered, everything else does not.
        defaults: all hyperparameters; those of ``space`` are the first point, on the grid or not.
        seed: of the draws.

    Raises:
        ValueError: for a hyperparameter without values, with a value twice, or that is none of ``defaults``.
    """

    def __init__(self, space: Mapping[str, Sequence[Any]], defaults: Mapping[str, Any], seed: int) -> None:
        for name, values in space.items():
            if name not in defaults or not values or any(value in values[:n] for n, value in enumerate(values)):
                raise ValueError(f"space[{name!r}] = {values!r}: give a field of the method and different values for it.")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space = space
        self._first = {name: defaults[name] for name in space}
        self._on_grid = _on_grid(space, self._first)
        self._rng = np.random.default_rng(seed)
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=RANDOM)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._seen: list[Settings] = []
        self._asked: optuna.Trial | None = None

    def __len__(self) -> int:
        """How many different points there are."""
        return points(self.space, self._first)

    def ask(self) -> Settings:
        """A point that was never asked before; there are ``len(self)`` of them."""
        point = self._first if not self._seen else self._proposed()
        if not self._seen and self._on_grid:
            self._asked = self._at(point)
        self._seen.append(point)
        return point

    def tell(self, value: float | None, early: float | None = None) -> None:
        """What the latest point is worth; None with an ``early`` value if it was given up there, without if it failed."""
        trial, self._asked = self._asked, None
        if trial is None:  # defaults that lie beside the grid
            return
        if early is not None:
            trial.report(early, 0)
        state = TrialState.COMPLETE if value is not None else TrialState.FAIL if early is None else TrialState.PRUNED
        self._study.tell(trial, value, state=state)

    def _proposed(self) -> Settings:
        trial = self._study.ask()
        point = self._suggested(trial)
        if point in self._seen:  # the estimator repeats itself: instead a random one of the others
            self._study.tell(trial, state=TrialState.FAIL)
            others = list(islice(self._others(), MANY))
            point = others[int(self._rng.integers(len(others)))]
            trial = self._at(point)
        self._asked = trial
        return point

    def _others(self) -> Iterator[Settings]:
        """Points of the grid that were not asked yet."""
        points = (dict(zip(self.space, values, strict=True)) for values in product(*self.space.values()))
        return (point for point in points if point not in self._seen)

    def _at(self, point: Settings) -> optuna.Trial:
        """A trial of Optuna's at a point."""
        self._study.enqueue_trial({name: list(self.space[name]).index(value) for name, value in point.items()})
        trial = self._study.ask()
        assert self._suggested(trial) == point
        return trial

    def _suggested(self, trial: optuna.Trial) -> Settings:
        """The values that a trial stands for; Optuna sees their places alone."""
        return {name: values[self._place(trial, name, values)] for name, values in self.space.items()}

    @staticmethod
    def _place(trial: optuna.Trial, name: str, values: Sequence[Any]) -> int:
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            return trial.suggest_int(name, 0, len(values) - 1)
        return trial.suggest_categorical(name, list(range(len(values))))

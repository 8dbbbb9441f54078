"""What a run of the harness measures: which methods on which seeds, folds, cost weights, sizes of support and users."""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Any

from backbones.registry import did_you_mean
from backbones.typed import misfits
from envs import known_spec
from envs.scenario import Scenario, builder_of, check_arguments, load_scenario
from eval.methods import make_method
from eval.methods.base import Method
from eval.run_facts import FORMAT, read_json

BASE = "base"
RESTORE = "Restore it (run.json names the command), or measure into a new folder."
INSTEAD = {
    "seed": "seeds are given by --seeds, and all from 0 are measured",
    "rounds": "every method decides once (python -m eval.rounds compares one decision with several)",
}
"""Arguments of environments that the harness does not take, and why."""


@dataclass(frozen=True)
class Place:
    """One draw of a population: a seed, and a fold where there are folds."""

    seed: int
    fold: int | None = None

    def __str__(self) -> str:
        return f"seed{self.seed}" + ("" if self.fold is None else f"-fold{self.fold}")


@dataclass(frozen=True)
class Job:
    """One method at one cost weight (None: it has no trade-off) and one size of support (None: all of it)."""

    method: str
    cost_weight: float | None
    shown: int | None


@dataclass(frozen=True)
class Plan:
    """Everything that determines the rows of a run.

    Attributes:
        env: id. env_kwargs: its further arguments. methods: names; ``base`` is always among them.
        seeds: how many, from 0. folds: how many, 0 for none; the environment's argument ``fold``.
        cost_weight: the one that tables are about. cost_weights: all, for methods with a trade-off.
        shown: sizes of support for the curve, 0 among them; empty for no curve. curve: the methods on it.
        slow_users: test users per fold that methods see which differentiate through a text backbone; slow_seeds: seeds.
        few_shown: sizes of the curve for these.
        settings: hyperparameters by method that are not its defaults; of those that a method leans on, too.
        choosers: environments (:func:`eval.tuned.env_key`) whose val users chose some of these settings: such of them as are
            test users here are measured by no method.
    """

    env: str
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = (BASE,)
    seeds: int = 5
    folds: int = 0
    cost_weight: float = 0.1
    cost_weights: tuple[float, ...] = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3)
    shown: tuple[int, ...] = ()
    curve: tuple[str, ...] = ()
    slow_users: int = 60
    slow_seeds: int = 2
    few_shown: tuple[int, ...] = (0, 2, 10)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    choosers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("seeds", "slow_users", "slow_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.folds < 0 or self.folds == 1:
            raise ValueError(f"folds must be 0 (none) or at least 2, got {self.folds}.")
        if bad := [w for w in (*self.cost_weights, self.cost_weight) if not 0 <= w <= 1]:
            raise ValueError(f"a cost weight must be between 0 and 1, got {bad[0]:g}.")
        if bad := [n for n in (*self.shown, *self.few_shown) if n < 0]:
            raise ValueError(f"numbers of support examples must be at least 0, got {bad[0]}.")
        for name in ("shown", "few_shown", "cost_weights"):
            object.__setattr__(self, name, tuple(sorted({*getattr(self, name)})))
        object.__setattr__(self, "cost_weights", tuple(sorted({*self.cost_weights, self.cost_weight})))
        if BASE not in self.methods:
            raise ValueError(f"every comparison is with {BASE!r}; add it to the methods.")
        self._check_curve_and_folds()
        self._check_weights()
        check_arguments(*self.scenario_arguments(self.places[0]))

    def _check_weights(self) -> None:
        for name in self.methods:
            method = self.method(name)
            if method.trades and self.cost_weights[-1] > method.highest_weight:
                raise ValueError(
                    f"{name} learns for cost weights up to {method.highest_weight:g}, not {self.cost_weights[-1]:g}: take "
                    "lower ones (--cost-weight, --cost-weights), or leave the method out (--methods)."
                )

    def _check_curve_and_folds(self) -> None:
        for name in self.curve:
            if name not in self.methods:
                raise ValueError(
                    f"the curve's methods must be among the methods; {name!r} is not. {did_you_mean(name, self.methods)}"
                )
        if idle := [name for name in self.curve if not self.shown and not self.method(name).through_backbone]:
            raise ValueError(
                f"{idle[0]} is on the curve, and there are no sizes of support: give --shown, or leave out --curve."
            )
        if apart := [name for name in self.curve if self.method(name).labels == "all"]:
            raise ValueError(
                f"the curve shows both kinds of labels to every method; {apart[0]} has all of them anyway, and no curve: leave "
                "it out of --curve."
            )
        if self.folds and "fold" in self.env_kwargs:
            raise ValueError("--folds measures every fold, --env-kwargs fold:... one of them; leave out one of the two.")
        for name, instead in INSTEAD.items():
            if name in self.env_kwargs:
                raise ValueError(f"--env-kwargs {name}:... would do nothing here: {instead}.")

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        return json.loads(json.dumps(asdict(self)))

    @staticmethod
    def from_json(facts: Mapping[str, Any]) -> "Plan":
        """The inverse of :meth:`to_json`."""
        known: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
        if wrong := misfits(Plan, known):
            raise TypeError(f"{', '.join(wrong)} of another type")
        return Plan(**known)

    @property
    def places(self) -> list[Place]:
        """Every seed and fold."""
        folds = range(self.folds) if self.folds else [None]
        return [Place(seed, fold) for seed in range(self.seeds) for fold in folds]

    @property
    def weights(self) -> tuple[float, ...]:
        """All cost weights, the main one first."""
        return (self.cost_weight, *(w for w in self.cost_weights if w != self.cost_weight))

    def method(self, name: str) -> Method:
        """A method with its hyperparameters."""
        return make_method(name, **self.settings.get(name, {}))

    @staticmethod
    def stored(folder: Path) -> "tuple[Plan, list[str]]":
        """What a results folder's ``plan.json`` says, and hashes of the code of every call that measured into it.

        Raises:
            ValueError: if it is of another version, or damaged.
        """
        path = folder / "plan.json"
        found = read_json(path, RESTORE)
        if (other := found.get("format")) != FORMAT:
            raise ValueError(
                f"{folder} holds results of format {other}, this version has {FORMAT}. Go on with the version that began it, "
                "or measure into a new folder."
            )
        try:
            plan = Plan.from_json(found["plan"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds no plan ({error}); was it edited? {RESTORE}") from error
        codes = found.get("code") or []
        return plan, [codes] if isinstance(codes, str) else codes

    def without(self, names: Collection[str]) -> "Plan":
        """This plan less some of its methods, of which ``base`` must not be one."""
        methods, curve = (tuple(name for name in given if name not in names) for given in (self.methods, self.curve))
        settings = {name: values for name, values in self.settings.items() if name not in names}
        return replace(self, methods=methods, curve=curve, settings=settings)

    def extended(self, more: "Plan") -> "Plan":
        """This plan and what another one measures beyond it.

        Raises:
            ValueError: if they differ in what cannot be added: the environment, the main cost weight, a method's settings.
        """
        for name in ("env", "env_kwargs", "folds", "cost_weight", "slow_users", "choosers"):
            if getattr(self, name) != getattr(more, name):
                raise ValueError(f"{name} was {getattr(self, name)} and is now {getattr(more, name)}. Choose another --out.")
        for name in {*self.methods, *self.settings} & {*more.methods, *more.settings}:
            mine, other = self.method(name).settings(), more.method(name).settings()
            if mine != other:
                changed = sorted(key for key in mine if mine[key] != other[key])
                raise ValueError(
                    f"the settings of {name} were others ({', '.join(changed)}). Measure it --again, or choose another --out."
                )
        lists = ("methods", "cost_weights", "shown", "curve", "few_shown")
        joined: dict[str, Any] = {name: tuple(dict.fromkeys((*getattr(self, name), *getattr(more, name)))) for name in lists}
        most = {name: max(getattr(self, name), getattr(more, name)) for name in ("seeds", "slow_seeds")}
        return replace(self, **joined, **most, settings={**more.settings, **self.settings})

    def jobs(self) -> Iterator[Job]:
        """What is measured at every place, the tables first, then the curve."""
        for name in self.methods:
            for weight in self.weights if self.method(name).trades else (None,):
                yield Job(name, weight, None)
        for name in self.curve:
            method = self.method(name)
            for shown in sorted({*self.shown, *self.few_shown}) if method.through_backbone else self.shown:
                yield Job(name, self.cost_weight if method.trades else None, shown)

    def sizes(self, slow: bool) -> tuple[int, ...]:
        """Of the curve, for methods that are measured on few users, or for the others; the few where there are no others."""
        return self.few_shown if slow or not self.shown else self.shown

    def scenario_arguments(self, place: Place) -> tuple[str, dict[str, Any]]:
        """Name and arguments of the scenario's builder at a place."""
        kwargs = {**known_spec(self.env).kwargs, **self.env_kwargs}
        name = kwargs.pop("scenario")
        for rule in ("rounds", "layerwise"):
            kwargs.pop(rule, None)
        if place.fold is not None:
            kwargs["fold"] = place.fold
        if "seed" in signature(builder_of(name)).parameters:
            kwargs["seed"] = place.seed
        return name, kwargs

    def scenario(self, place: Place) -> Scenario:
        """The environment's scenario there, made or loaded."""
        name, kwargs = self.scenario_arguments(place)
        return load_scenario(name, **kwargs)

"""A scenario: everything a pathway-selection environment needs to know, with the modelling already done."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from backbones.artefacts import cache_key
from backbones.costs import COSTS
from backbones.pathways import executed
from backbones.registry import Registry, did_you_mean
from backbones.typed import check_types
from envs.by_user import ByUser, Observed
from envs.oracles import Oracle, Plans, Users

if TYPE_CHECKING:
    from envs.local_release import LocalRelease

Observe = Callable[[Users, Plans], NDArray[np.float32]]
Choose = Callable[[dict[str, NDArray[np.float32]]], NDArray[np.bool_]]
"""A policy: observations ``[B, ...]`` to masks ``[B, P]``."""


@dataclass(frozen=True)
class Scenario:
    """Users, pathways, observations and the oracle.

    Attributes:
        name: for reports.
        pathways: P names.
        splits: positions of the users of ``train``, ``val`` and ``test``.
        user_ids: one per user.
        user_info: facts for ``info`` that no policy sees (kind of shift).
        embeddings: ``[U, E]`` float32. Where there are very many users, computed for those that are asked for, as are
            statistics and scores (:class:`envs.by_user.ByUser`).
        statistics: ``[U, P, S]`` float32, before the first decision.
        oracle: what a mask is worth.
        observe: statistics after some rounds, ``(users [B], plans [B, R, P]) -> [B, P, S]``.
        groups: one label per user by which reports are broken down ("at most one shift").
        label_counts: ``[U]`` numbers of support and of validation labels, by role.
        scores: ``[U, P]`` raw per-pathway scores by name, for rivals that threshold them.
        fingerprint: of the users, the model and the initialisation behind the observations; policies remember it.
        seconds: wall-clock seconds spent on making its parts (0 where they came from the cache).
        save: writes what should outlive the process (answers of the oracle).
        data: the users seen through the model, for rivals that choose no mask; None in problems without examples.
        look: how users are observed, and at what initialisation; likewise.
        personalise: from one user's raw support examples to adapted weights, everything computed afresh; for timing.
        notes: what the reader should know about the examples (texts cut off).
        sent: how devices send what policies see of their users, where they do; else None.
        made_of: what answers depend on, by name: hashes of ``users``, ``backbone`` and ``meta-initialisation``, the name of
            the ``placement``, and ``precision``, ``gates`` and ``cost`` where they are not the usual ones. Empty in problems
            without a model.
    """

    name: str
    pathways: tuple[str, ...]
    splits: Mapping[str, NDArray[np.int64]]
    user_ids: tuple[str, ...]
    user_info: Sequence[Mapping[str, Any]]
    embeddings: NDArray[np.float32] | ByUser
    statistics: NDArray[np.float32] | ByUser
    oracle: Oracle
    observe: Observe
    groups: Sequence[str]
    label_counts: Mapping[str, NDArray[np.int64]]
    scores: Mapping[str, NDArray[np.float64] | ByUser]
    fingerprint: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    save: Callable[[], None] = lambda: None
    data: Any = None
    look: Observed | None = None
    notes: tuple[str, ...] = ()
    personalise: Callable[[int, Choose], Any] | None = None
    sent: "LocalRelease | None" = None
    made_of: Mapping[str, str] = field(default_factory=dict)

    @property
    def counts(self) -> str:
        """What costs go by, a name in :data:`backbones.costs.COSTS`."""
        return self.made_of.get("cost", COSTS[0]).split()[0]

    @property
    def simulated(self) -> bool:
        """Whether another seed means other users, rather than the same people once more."""
        return self.data is None or self.data.population.simulated

    def people(self, split: str) -> tuple[str, ...] | None:
        """Who the users of a split are, if they are real people; what several seeds say of one of them counts once."""
        return None if self.simulated else tuple(self.user_ids[user] for user in self.users(split))

    @property
    def without_users(self) -> str:
        """A fingerprint of all that observations depend on but the users who learn; for what may say nothing of these."""
        facts = {name: what for name, what in self.made_of.items() if name not in ("users", "cost")}
        shown = list(self.look.embedder.parts) if self.look else []
        return f"users unsaid, {cache_key(pathways=list(self.pathways), embedding=shown, **facts)}"

    def executed(self, masks: Plans) -> Plans:
        """What is run for masks ``[..., P]``, see :func:`backbones.pathways.executed`."""
        return executed(self.pathways, masks)

    def users(self, split: str) -> NDArray[np.int64]:
        """Positions of a split's users. Raises ``ValueError`` for an unknown split."""
        if split not in self.splits:
            raise ValueError(f"unknown split {split!r}; choose from {', '.join(self.splits)}.")
        return self.splits[split]


SCENARIOS: Registry[str | Callable[..., Any]] = Registry("scenario")
"""Names to builders, or to ``"module:function"``, imported when first asked for."""
SCENARIOS.register("modelled", "envs.modelled:modelled")
SCENARIOS.register("planted", "envs.planted:planted")
SCENARIOS.register("tabular", "envs.tabular:tabular")


def load_scenario(name: str, **kwargs: Any) -> Scenario:
    """Build a scenario, or return the one already built in this process with the same arguments."""
    check_arguments(name, kwargs)
    return _load(name, tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in kwargs.items())))


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` with a suggestion for an argument that the scenario's builder does not take, or not of such a type.

    A builder that hands arguments on tells which in its attribute ``further_arguments``, a function of all arguments, and may
    check these in ``check_further``, likewise.
    """
    builder = builder_of(name)
    known = {*signature(builder).parameters} - {"more"}
    if further := getattr(builder, "further_arguments", None):
        known |= further(arguments)
    for argument in arguments:
        if argument not in known:
            raise ValueError(f"scenario {name!r} has no argument {argument!r}. {did_you_mean(argument, known)}")
    check_types(builder, arguments, f"scenario {name!r}")
    if check_further := getattr(builder, "check_further", None):
        check_further(arguments)


def builder_of(name: str) -> Callable[..., Scenario]:
    """The function behind a scenario's name."""
    found = SCENARIOS.get(name)
    if isinstance(found, str):
        module, function = found.split(":")
        return getattr(import_module(module), function)
    return found  # an entry point's


def forget_scenarios() -> None:
    """Let go of what this process has built, and of the memory that frozen states take; what is on disk stays."""
    _load.cache_clear()


@cache
def _load(name: str, kwargs: tuple[tuple[str, Any], ...]) -> Scenario:
    return builder_of(name)(**dict(kwargs))

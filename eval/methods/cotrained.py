"""The project's best configuration and what it is made of: ``cotrained``, ``cotrained_static``, ``cotrained_all_on``.

All three adapt users from the same co-trained adapters and differ in who chooses the mask. Shapes: U users, P pathways.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from agents.checkpoint import POLICY, build_policy, choose_plans
from agents.learning import learn
from agents.rivals import best_static
from agents.run import RunConfig
from backbones.artefacts import load_artefact
from envs.cost_weights import CostWeight
from envs.rules import Rules
from envs.statistics import PathwayStatistics
from eval.group import Group
from eval.methods.base import Fitted
from eval.methods.cotraining import CoTrained, Learned, on_co_trained, under
from eval.methods.ppo import RANGE
from eval.methods.undisturbed import undisturbed
from eval.tuned import settings_for
from eval.world import World
from meta.inner import MetaInit
from meta.trainer import MetaConfig

POLICY_AT, LOOK_AT = "policy/", "look/"
"""Prefixes of the policy's tensors, and of those by which statistics are standardised."""


@dataclass(frozen=True)
class CoTrainedGating(CoTrained):
    """The gating policy of ``ppo`` on co-trained adapters, trained anew for them.

    Kept: all of ``ppo`` but the adapters (settings, one policy for all cost weights in :data:`RANGE`, one round). A new user
    costs a look at the gradients on the support, taken at the co-trained initialisation, and no search.

    Source: the policy as in :class:`eval.methods.ppo.Gating`; that adapters and gates are learned in turn is our own.
    """

    scope: ClassVar[str] = "mask per user, amortised"
    trades: ClassVar[bool] = True
    space: ClassVar = {"meta_steps": (None, 1000, 3000), "resample": (None, True)}

    @property
    def highest_weight(self) -> float:
        """See :attr:`Method.highest_weight`."""
        return CostWeight.parse(RANGE).high

    def fit(self, world: World, cost_weight: float) -> Fitted:
        """See :meth:`CoTrained.fit`. Raises ``ValueError`` for a cost weight out of the range."""
        _check(cost_weight)
        return super().fit(world, cost_weight)

    def learned(self, world: World, init: MetaInit, cost_weight: float) -> Learned:
        """The final policy, and how statistics are standardised for it."""
        return world.kept("cotrained", self.facts_in(world), lambda: self._trained(world, init))

    def _trained(self, world: World, init: MetaInit) -> Learned:
        scenario, run = on_co_trained(world, init), self.run_in(world)
        learn(self.settings_in(world)[0], scenario, run)
        policy, facts = load_artefact(run / "policy", POLICY)
        assert scenario.look is not None
        return {POLICY_AT + name: tensor for name, tensor in policy.items()} | _look_tensors(scenario.look.of), facts

    def tries(self, world: World) -> int:
        """See :meth:`Chooser.tries`: the look at the gradients."""
        return 1

    def choose(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Tensor:
        """See :meth:`Chooser.choose`. Raises ``ValueError`` for a cost weight out of the range."""
        _check(cost_weight)
        look = _look(fitted.tensors, world, self.start(world, fitted))
        statistics = look.observe(look.raw(shown.batch))
        embeddings = world.look.embedder.embed(shown.batch)  # sees the population model alone, whatever the adapters
        rules, observed_at = Rules.from_json(fitted.facts["rules"]), fitted.facts["scenario"]
        seen = replace(world.scenario, fingerprint=observed_at, embeddings=embeddings.numpy(), statistics=statistics.numpy())
        with undisturbed():  # a network draws its weights before it is given others
            policy = build_policy(under(POLICY_AT, fitted.tensors), fitted.facts, seen)
            return torch.from_numpy(choose_plans(policy, seen, np.arange(len(shown)), rules, cost_weight)[:, -1])


@dataclass(frozen=True)
class BesideGating(CoTrained):
    """Abstract: on the adapters of ``cotrained`` as that method was tuned, but for what is set here."""

    leans_on: ClassVar[tuple[str, ...]] = ("cotrained",)

    def settings_in(self, world: World) -> tuple[RunConfig, MetaConfig]:
        """See :meth:`CoTrained.settings_in`."""
        set_here = {name: value for name, value in self.settings().items() if value is not None}
        return CoTrainedGating(**settings_for(world.env, world.kwargs, "cotrained") | set_here).settings_in(world)


@dataclass(frozen=True)
class CoTrainedStatic(BesideGating):
    """One mask for everybody on the co-trained adapters, the best for train users: what the policy must beat on them."""

    scope: ClassVar[str] = "mask per population"
    trades: ClassVar[bool] = True

    def learned(self, world: World, init: MetaInit, cost_weight: float) -> Learned:
        """See :func:`agents.rivals.best_static`."""
        return {"mask": torch.from_numpy(best_static(on_co_trained(world, init), cost_weight, world.seed))}, {}

    def choose(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Tensor:
        """See :meth:`Chooser.choose`."""
        return fitted.tensors["mask"].repeat(len(shown), 1)


@dataclass(frozen=True)
class CoTrainedAllOn(BesideGating):
    """Every pathway on the co-trained adapters: beside ``all_on``, what co-training alone has done to them."""

    def learned(self, world: World, init: MetaInit, cost_weight: float) -> Learned:
        """Nothing more."""
        return {}, {}

    def choose(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Tensor:
        """See :meth:`Chooser.choose`."""
        return torch.ones(len(shown), world.pathways.num_pathways, dtype=torch.bool)


def _look_tensors(look: PathwayStatistics) -> dict[str, Tensor]:
    """How statistics are standardised on train users."""
    sites = {f"{LOOK_AT}{p}/{name}": value for p, site in enumerate(look.sites) for name, value in zip("ms", site, strict=True)}
    return {**sites, f"{LOOK_AT}mean": look.mean, f"{LOOK_AT}scale": look.scale}


def _look(tensors: Mapping[str, Tensor], world: World, init: MetaInit) -> PathwayStatistics:
    """The inverse of :func:`_look_tensors`."""
    found = under(LOOK_AT, tensors)
    sites = tuple((found[f"{p}/m"], found[f"{p}/s"]) for p in range(world.pathways.num_pathways))
    return PathwayStatistics(world.pathways, init, sites, found["mean"], found["scale"])


def _check(cost_weight: float) -> None:
    trained = CostWeight.parse(RANGE)
    if not trained.low <= cost_weight <= trained.high:
        raise ValueError(f"the policy of cotrained is for cost weights of {RANGE}, not {cost_weight:g}: take one within.")

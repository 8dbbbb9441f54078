"""``ppo``: our gating policy, trained once on train users; a new user's mask is read off their support."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from agents.checkpoint import POLICY, build_policy, choose_plans
from agents.learning import learn
from agents.run import PPO_SETTINGS, RunConfig, hyperparameters
from backbones.artefacts import load_artefact
from envs import known_spec
from envs.cost_weights import CostWeight
from envs.rules import Rules
from eval.group import Group
from eval.methods.base import Fitted
from eval.methods.pathway import Chooser
from eval.methods.undisturbed import undisturbed
from eval.world import World

RANGE = "uniform:0:0.3"
"""Cost weights that one policy for all learns from and is shown."""


@dataclass(frozen=True)
class Gating(Chooser):
    """A gating policy trained by proximal policy optimisation, with the settings of ``agents/hyperparameters/ppo.yml``.

    Trained on train users' validation rewards, the best by val users kept. A new user costs a look at the gradients on the
    support, of which observations are made, and no search. Adapters are those of the environment (no co-training), and users
    adapt once, in one round.

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms"; conditioned on the cost weight as in Abels et al.
    2019, "Dynamic Weights in Multi-Objective Deep Reinforcement Learning".

    Attributes:
        one_for_all: one policy for all cost weights in :data:`RANGE`, as good as one for each (docs/experiments.md); False: one
            policy per cost weight.
        total_timesteps: adaptations to learn from; None: as many as the settings say. The range needs no more than one weight.
    """

    one_for_all: bool = True
    total_timesteps: int | None = None

    scope: ClassVar[str] = "mask per user, amortised"
    trades: ClassVar[bool] = True

    @property
    def highest_weight(self) -> float:
        """See :attr:`Method.highest_weight`."""
        return CostWeight.parse(RANGE).high if self.one_for_all else super().highest_weight

    def fit(self, world: World, cost_weight: float) -> Fitted:
        """See :meth:`Method.fit`. A training that was stopped goes on from its checkpoint."""
        config = self.run_config(world, RANGE if self.one_for_all else cost_weight)
        _check(config.rules.weight, cost_weight)
        facts: Mapping[str, Any] = {"config": asdict(config)}
        run = world.folder / f"ppo-run-{world.key(**facts)}"
        with undisturbed():
            return Fitted(*world.kept("ppo", facts, lambda: _trained(config, world, run)))

    def run_config(self, world: World, cost_weight: float | str) -> RunConfig:
        """The run's settings: the YAML's for that environment."""
        given = {**known_spec(world.env).kwargs, **world.kwargs}
        settings = hyperparameters(world.env, ["warm_start:false"] if given.get("layerwise") else [])
        if self.total_timesteps is not None:
            settings["total_timesteps"] = self.total_timesteps
        ppo = {name: settings.pop(name) for name in sorted(PPO_SETTINGS & settings.keys())}
        env_kwargs = {**world.kwargs, "rounds": 1}
        return RunConfig(world.env, world.seed, cost_weight, ppo=ppo, env_kwargs=env_kwargs, **settings)

    def tries(self, world: World) -> int:
        """See :meth:`Chooser.tries`: the look at the gradients."""
        return 1

    def choose(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Tensor:
        """See :meth:`Chooser.choose`.

        Raises:
            ValueError: for a cost weight that the policy was not trained for.
        """
        rules = Rules.from_json(fitted.facts["rules"])
        _check(rules.weight, cost_weight)
        with undisturbed():  # a network draws its weights before it is given others
            policy = build_policy(fitted.tensors, fitted.facts, world.scenario, "the policy that ppo was fitted to")
        embeddings, statistics, _ = world.observe(shown.batch)
        seen = replace(world.scenario, embeddings=embeddings.numpy(), statistics=statistics.numpy())
        weight = cost_weight if rules.weight.varies else None
        return torch.from_numpy(choose_plans(policy, seen, np.arange(len(shown)), rules, weight)[:, -1])


def _trained(config: RunConfig, world: World, run: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The best policy of a run, which is begun, gone on with, or only read."""
    config.save(run)
    learn(config, world.scenario, run)
    return load_artefact(run / "policy", POLICY)


def _check(trained: CostWeight, cost_weight: float) -> None:
    if not trained.low <= cost_weight <= trained.high:
        cure = "fit it for this one" if not trained.varies else "take one within, or one policy per weight (one_for_all=False)"
        raise ValueError(f"ppo's policy is for cost weights of {trained.given()}, not {cost_weight:g}: {cure}.")

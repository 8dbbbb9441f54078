"""Co-trained adapters, made once per world and shared by the methods that start from them."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from agents.checkpoint import check_scenario
from agents.cotrain import meta_config, take_turn
from agents.run import RunConfig
from backbones.artefacts import exists
from envs.modelled import started_at
from envs.scenario import Scenario
from eval.methods.base import Fitted
from eval.methods.pathway import Chooser
from eval.methods.ppo import RANGE, Gating
from eval.methods.undisturbed import undisturbed
from eval.world import World
from meta.inner import MetaInit
from meta.store import init_facts, load_init, save_init
from meta.trainer import MetaConfig

Learned = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors and JSON-able facts."""
INIT = "init/"
"""Prefix of the initialisation's tensors."""


@dataclass(frozen=True)
class CoTrained(Chooser):
    """Abstract: users adapt from adapters that were meta-trained on under the masks of a gating policy.

    One turn of :mod:`agents.cotrain`: a policy for the environment's adapters, shown cost weights in :data:`RANGE`, is trained
    for half of ``total_timesteps``; then the adapters go on learning for half as many steps as the environment meta-trains,
    most users under the masks which that policy chooses for them. This happens once per world and settings, whichever
    method and cost weight comes first, in a folder that is laid out like a run of ``agents.train_ppo``.

    Attributes:
        total_timesteps: adaptations that a final policy learns from; None: as many as the settings say.
        meta_steps: further steps of meta-training; None: half of the environment's.
        resample: deal train users' support and query examples anew in each of them; None: where the environment does so.
    """

    total_timesteps: int | None = None
    meta_steps: int | None = None
    resample: bool | None = None

    @abstractmethod
    def learned(self, world: World, init: MetaInit, cost_weight: float) -> Learned:
        """What there is to learn on the co-trained adapters."""

    def fit(self, world: World, cost_weight: float) -> Fitted:
        """See :meth:`Method.fit`. What was stopped goes on from its checkpoints."""
        with undisturbed():
            init = self._co_trained(world)
            tensors, facts = self.learned(world, init, cost_weight)
        shared = {INIT + name: tensor for name, tensor in init.tensors().items()}
        return Fitted({**tensors, **shared}, {**facts, "begun_at": world.scenario.fingerprint})

    def start(self, world: World, fitted: Fitted) -> MetaInit:
        """See :meth:`Chooser.start`. Raises ``ArtefactError`` for what was co-trained in another world."""
        check_scenario("what was co-trained", {"scenario": fitted.facts["begun_at"]}, world.scenario)
        return MetaInit.from_tensors(under(INIT, fitted.tensors))

    def settings_in(self, world: World) -> tuple[RunConfig, MetaConfig]:
        """Settings of the run (those of ``ppo``, so that adapters alone differ), and of the further meta-training."""
        config = replace(Gating(total_timesteps=self.total_timesteps).run_config(world, RANGE), cotrain=1)
        usual = meta_config(config)
        resample = usual.resample if self.resample is None else self.resample
        return config, replace(usual, steps=self.meta_steps or usual.steps, resample=resample)

    def facts_in(self, world: World) -> Mapping[str, Any]:
        """What co-training depends on besides the world; JSON-able."""
        config, steps = self.settings_in(world)
        return {"config": asdict(config), "further": asdict(steps)}

    def run_in(self, world: World) -> Path:
        """The run's folder."""
        return world.folder / f"cotrained-run-{world.key(**self.facts_in(world))}"

    def _co_trained(self, world: World) -> MetaInit:
        """The initialisation after the turn, which is taken, gone on with, or only read."""
        (config, steps), run = self.settings_in(world), self.run_in(world)
        path, facts = config.init_of(run, 1), init_facts(world.data)
        if not exists(path):
            config.save(run)
            save_init(path, take_turn(config, world.scenario, run / "cotrain-1", steps), facts)
        return load_init(path, facts)


def on_co_trained(world: World, init: MetaInit) -> Scenario:
    """The world's train and val users with adapters that start at ``init``; examples and frozen states are the world's own.

    It is built for as long as something is learned on it. Answers of its oracle are kept beside what methods learn.
    """
    return started_at(world.scenario, init, world.folder)


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

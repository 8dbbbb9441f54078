"""What happens during PPO training besides learning: curves, the best policy by val users, checkpoints."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Image
from stable_baselines3.common.policies import BasePolicy
from tqdm.auto import tqdm

from agents.checkpoint import choose_masks, choose_plans, save_checkpoint, save_policy
from envs.core import PathwaySelection
from envs.cost_weights import CostWeight
from envs.oracles import Outcome, Plans
from envs.rendering import gates_as_image
from envs.rules import Rules
from envs.scenario import Scenario


class Curves(BaseCallback):
    """Logs the parts of the training reward, and moves a progress bar.

    Args:
        progress: whether to show the bar.
    """

    def __init__(self, progress: bool) -> None:
        super().__init__()
        self.progress = progress
        self._bar: tqdm | None = None

    def _on_training_start(self) -> None:
        total = self.locals["total_timesteps"]
        self._bar = tqdm(
            total=total,
            initial=self.num_timesteps,
            desc="train the gating policy",
            unit="step",
            disable=not self.progress,
        )

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            for name in {"accuracy", "cost", "active_fraction"} & info.keys():  # a mask that is not whole has no accuracy
                self.logger.record_mean(f"train_users/{name}", info[name])
        assert self._bar is not None
        self._bar.update(self.training_env.num_envs)
        return True

    def _on_training_end(self) -> None:
        assert self._bar is not None
        self._bar.close()


class DualAscent(BaseCallback):
    """Moves the cost weight until the deterministic policy switches on a target share of the pathways of train users.

    Before every rollout ``lambda <- max(0, lambda + rate * (active fraction - target))``: gradient ascent on the multiplier of
    the constraint that the mean active fraction is at most the target (a Lagrangian relaxation, as in constrained reinforcement
    learning: Tessler et al. 2019, "Reward Constrained Policy Optimization").

    Args:
        scenario: whose train users.
        core: the training environment's core, whose cost weight is moved.
        target: active fraction, in 0..1.
        rate: of the ascent, per rollout.
    """

    USERS = 256

    def __init__(self, scenario: Scenario, core: PathwaySelection, target: float, rate: float = 0.1) -> None:
        super().__init__()
        self.scenario, self.core, self.target, self.rate = scenario, core, target, rate
        pool = scenario.users("train")
        self._users = np.random.default_rng(0).permutation(pool)[: self.USERS]

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.num_timesteps == 0:  # nothing was learned yet
            return
        rules = Rules(self.core.cost_weight.low, self.core.rounds, self.core.layerwise)
        active = choose_masks(self.model.policy, self.scenario, self._users, rules=rules).mean()
        weight = max(0.0, self.core.cost_weight.low + self.rate * (float(active) - self.target))
        self.core.cost_weight = CostWeight(weight, weight)
        self.logger.record("train_users/cost_weight", weight)


Evaluated = tuple[dict[str, float], Outcome, Plans]
"""Figures, outcome and last masks ``[U, P]`` of val users at one cost weight."""


class BestOnVal(BaseCallback):
    """Every so often: the deterministic policy on all val users' query examples, the best one kept, a checkpoint.

    All happens between two rollouts, so that a resumed run goes on exactly. What is evaluated and kept is an exponential
    average of the policy's weights over rollouts: rewards are noisy, and the latest weights have learned the latest noise.
    A policy for a range of cost weights is judged by its mean reward over :meth:`envs.cost_weights.CostWeight.reported`; one
    that is to meet a target, first by how near its active fraction is (within :data:`NEAR` it counts as met), then by accuracy.

    Args:
        average: a copy of the policy, to become the average.
        decay: of the average per rollout; 0 keeps the latest weights.
        scenario: whose val users.
        core: the training environment's core, for the checkpoint and the cost weight.
        rules: those of training.
        every: timesteps between two evaluations.
        folder: gets ``policy`` (the best one) and ``checkpoint`` (the latest).
        meta: what :func:`agents.checkpoint.save_policy` needs.
        margin: a later policy is kept only if it is better by more than so many standard errors of the paired difference
            (the one-standard-error rule of Breiman et al. 1984 with 1): among many looks at few val users the best is luck.
        target: active fraction to meet, or None.

    Attributes:
        history: timesteps and mean val reward of every evaluation.
    """

    NEAR = 0.02

    def __init__(
        self,
        average: BasePolicy,
        decay: float,
        scenario: Scenario,
        core: PathwaySelection,
        rules: Rules,
        every: int,
        folder: Path,
        meta: dict[str, Any],
        margin: float = 0.0,
        target: float | None = None,
    ) -> None:
        super().__init__()
        self.scenario, self.core, self.rules = scenario, core, rules
        self.every, self.folder, self.meta = every, folder, meta
        self.average, self.decay = average, decay
        self.margin, self.target = margin, target
        self.best: NDArray[np.float64] | None = None
        self.best_distance = 0.0
        self.history: list[tuple[int, float]] = []
        self.next_at = self.averaged_at = 0
        self.stop_asked = False

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self._update_average()
        if self.stop_asked:
            self.save()  # without another look at val users, which a run that is not stopped does not take
            raise KeyboardInterrupt
        if self.num_timesteps >= self.next_at:
            self.next_at = (self.num_timesteps // self.every + 1) * self.every
            self.evaluate_and_save()

    def _on_training_end(self) -> None:
        self._update_average()
        self.evaluate_and_save()

    def _update_average(self) -> None:
        """Once per rollout, after learning from it; not again where a resumed run begins."""
        if self.num_timesteps > self.averaged_at:
            self.averaged_at = self.num_timesteps
            with torch.no_grad():
                for mean, latest in zip(self.average.parameters(), self.model.policy.parameters(), strict=True):
                    mean.lerp_(latest, 1 - self.decay)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the networks."""
        best = None if self.best is None else self.best.tolist()
        known = {"best": best, "best_distance": self.best_distance, "history": self.history}
        weight = None if self.rules.weight.varies else self.core.cost_weight.low
        return {**known, "next_at": self.next_at, "averaged_at": self.averaged_at, "cost_weight": weight}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state`."""
        self.best = None if state["best"] is None else np.array(state["best"])
        self.best_distance, self.history = state["best_distance"], [(int(at), value) for at, value in state["history"]]
        self.next_at, self.averaged_at = state["next_at"], state["averaged_at"]
        if state["cost_weight"] is not None:
            self.core.cost_weight = CostWeight(state["cost_weight"], state["cost_weight"])

    def _is_better(self, rewards: NDArray[np.float64], distance: float) -> bool:
        if self.best is None or distance != self.best_distance:
            return self.best is None or distance < self.best_distance
        gain = rewards - self.best
        if self.margin and len(gain) < 2:
            return False  # one val user says nothing of how far a gain is chance
        return bool(gain.mean() > self.margin * gain.std() / len(gain) ** 0.5)

    def evaluate_and_save(self) -> None:
        """Log the val users' figures; keep the policy if it is the best yet; write a checkpoint."""
        weights = self.core.cost_weight.reported()
        found = [self._evaluate(weight) for weight in weights]
        for weight, (figures, _, _) in zip(weights, found, strict=True):
            for name, value in figures.items():
                self.logger.record(f"val_users/{name}" + (f"_at_{weight:g}" if len(weights) > 1 else ""), value)
        rewards = np.mean([outcome.reward(weight) for weight, (_, outcome, _) in zip(weights, found, strict=True)], axis=0)
        if len(weights) > 1:
            self.logger.record("val_users/reward", float(rewards.mean()))
        masks = found[len(found) // 2][2]
        for name, rate in zip(self.scenario.pathways, masks.mean(0), strict=True):
            self.logger.record(f"gate_rate/{name}", float(rate))
        shown = [mask.astype(np.int8) for mask in masks[:48]]
        image = gates_as_image(self.scenario.pathways, shown, height=len(shown))
        self.logger.record("gates", Image(image, "HWC"), exclude=("stdout", "log", "json", "csv"))
        self.logger.dump(self.num_timesteps)
        self.history.append((self.num_timesteps, float(rewards.mean())))
        self._keep_if_better(found, rewards)
        self.save()

    def save(self) -> None:
        """Write answers, then a checkpoint: what is played again after a kill finds the answers of the first time."""
        assert isinstance(self.model, PPO)
        self.scenario.save()
        save_checkpoint(self.folder / "checkpoint", self.model, self.average, self.core, self.state())

    def _evaluate(self, weight: float) -> Evaluated:
        """Figures, outcome and last masks ``[U, P]`` of val users at one cost weight."""
        users = self.scenario.users("val")
        plans = choose_plans(self.average, self.scenario, users, self.rules, weight)
        outcome, masks = self.scenario.oracle.evaluate(users, plans, "query"), plans[:, -1]
        rewards = outcome.reward(weight)
        figures = {
            "reward": float(rewards.mean()),
            "accuracy": float(outcome.accuracy.mean()),
            "cost": float(outcome.cost.mean()),
            "active_fraction": float(masks.mean()),
            "reward_spread": float(rewards.std()),
            "distinct_masks": len(np.unique(masks, axis=0)),
        }
        return figures, outcome, masks

    def _keep_if_better(self, found: list[Evaluated], rewards: NDArray[np.float64]) -> None:
        worth, distance = rewards, 0.0
        if self.target is not None:
            figures, outcome, _ = found[0]
            distance = max(0.0, abs(figures["active_fraction"] - self.target) - self.NEAR)
            worth = outcome.accuracy  # the weight moves, so that the reward is no yardstick
        if self._is_better(worth, distance):
            self.best, self.best_distance = worth, distance
            facts = {
                "val_reward": float(rewards.mean()),
                "at": self.num_timesteps,
                "cost_weight": self.core.cost_weight.given(),
            }
            save_policy(self.folder / "policy", self.average, {**self.meta, **facts})


@contextmanager
def stop_between_rollouts(saver: BestOnVal) -> Iterator[None]:
    """Within: the first Ctrl-C saves and stops after the present rollout, a second one stops at once."""

    def ask(signum: int, frame: Any) -> None:
        if saver.stop_asked:
            raise KeyboardInterrupt
        saver.stop_asked = True
        tqdm.write("stopping after this rollout; press Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

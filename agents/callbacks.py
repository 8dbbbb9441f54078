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

from agents.checkpoint import choose_masks, save_checkpoint, save_policy
from envs.core import PathwaySelection
from envs.rendering import gates_as_image
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
            for name in ("accuracy", "cost", "active_fraction"):
                self.logger.record_mean(f"train_users/{name}", info[name])
        assert self._bar is not None
        self._bar.update(self.training_env.num_envs)
        return True

    def _on_training_end(self) -> None:
        assert self._bar is not None
        self._bar.close()


class BestOnVal(BaseCallback):
    """Every so often: the deterministic policy on all val users' query examples, the best one kept, a checkpoint.

    All happens between two rollouts, so that a resumed run goes on exactly. What is evaluated and kept is an exponential
    average of the policy's weights over rollouts: rewards are noisy, and the latest weights have learned the latest noise.

    Args:
        average: a copy of the policy, to become the average.
        decay: of the average per rollout; 0 keeps the latest weights.
        scenario: whose val users.
        core: the training environment's core, for the checkpoint.
        cost_weight: lambda.
        every: timesteps between two evaluations.
        folder: gets ``policy`` (the best one) and ``checkpoint`` (the latest).
        meta: what :func:`agents.checkpoint.save_policy` needs.
        margin: a later policy is kept only if it is better by more than so many standard errors of the paired difference
            (the one-standard-error rule of Breiman et al. 1984 with 1): among many looks at few val users the best is luck.
    """

    def __init__(
        self,
        average: BasePolicy,
        decay: float,
        scenario: Scenario,
        core: PathwaySelection,
        cost_weight: float,
        every: int,
        folder: Path,
        meta: dict[str, Any],
        margin: float = 0.0,
    ) -> None:
        super().__init__()
        self.scenario, self.core, self.cost_weight = scenario, core, cost_weight
        self.every, self.folder, self.meta = every, folder, meta
        self.average, self.decay = average, decay
        self.margin = margin
        self.best: NDArray[np.float64] | None = None
        self.next_at = self.averaged_at = 0
        self.stop_asked = False

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self._update_average()
        if self.stop_asked:
            self.evaluate_and_save()
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
        return {"best": best, "next_at": self.next_at, "averaged_at": self.averaged_at}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state`."""
        self.best = None if state["best"] is None else np.array(state["best"])
        self.next_at, self.averaged_at = state["next_at"], state["averaged_at"]

    def _is_better(self, rewards: NDArray[np.float64]) -> bool:
        if self.best is None:
            return True
        gain = rewards - self.best
        return bool(gain.mean() > self.margin * gain.std() / len(gain) ** 0.5)

    def evaluate_and_save(self) -> None:
        """Log the val users' figures; keep the policy if it is the best yet; write a checkpoint."""
        users = self.scenario.users("val")
        assert isinstance(self.model, PPO)
        masks = choose_masks(self.average, self.scenario, users)
        outcome = self.scenario.oracle.evaluate(users, masks, "query")
        rewards = outcome.reward(self.cost_weight)
        figures = {
            "reward": rewards.mean(),
            "accuracy": outcome.accuracy.mean(),
            "cost": outcome.cost.mean(),
            "active_fraction": masks.mean(),
            "reward_spread": rewards.std(),
            "distinct_masks": len(np.unique(masks, axis=0)),
        }
        for name, value in figures.items():
            self.logger.record(f"val_users/{name}", float(value))
        for name, rate in zip(self.scenario.pathways, masks.mean(0), strict=True):
            self.logger.record(f"gate_rate/{name}", float(rate))
        shown = [mask.astype(np.int8) for mask in masks[:48]]
        image = gates_as_image(len(self.scenario.pathways), shown, height=len(shown))
        self.logger.record("gates", Image(image, "HWC"), exclude=("stdout", "log", "json", "csv"))
        self.logger.dump(self.num_timesteps)
        if self._is_better(rewards):
            self.best = rewards
            facts = {"val_reward": float(rewards.mean()), "at": self.num_timesteps}
            save_policy(self.folder / "policy", self.average, {**self.meta, **facts})
        save_checkpoint(self.folder / "checkpoint", self.model, self.average, self.core, self.state())
        self.scenario.save()


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

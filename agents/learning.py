"""PPO on one scenario: what training, co-training and transfer have in common."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecMonitor

from agents.callbacks import BestOnVal, Curves, DualAscent, stop_between_rollouts
from agents.checkpoint import restore_checkpoint
from agents.policies import POLICIES
from agents.rivals import best_static
from agents.run import RunConfig
from backbones.artefacts import exists
from envs.cost_weights import CostWeight
from envs.rules import Rules
from envs.sb3 import PathwaySelectionVecEnv
from envs.scenario import Scenario
from meta.curves import room_for_curves

WARM = 1.5
"""Logits of a warm start: every bit of the best static mask with a probability of .82."""


def warm_start(scenario: Scenario, weight: CostWeight, seed: int) -> dict[str, Any]:
    """A policy's arguments with which it begins as the best static mask, at each of a range's weights as that one's."""
    at = weight.spread()
    statics = np.stack([best_static(scenario, w, seed) for w in at])
    return {"start": np.where(statics, WARM, -WARM).tolist(), "start_at": list(at), "initial_logit": 0.0}


def learn(
    config: RunConfig,
    scenario: Scenario,
    folder: Path,
    *,
    rules: Rules | None = None,
    start: BasePolicy | None = None,
    events: Path | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> BestOnVal:
    """PPO on a scenario's train users; the best policy by val users goes to ``folder / "policy"``.

    Goes on from the folder's checkpoint if there is one, so that a finished run costs nothing.

    Args:
        config: PPO's settings, the seed, and how long.
        scenario: whose users; the config's own, or another one in its place.
        folder: for the policy and the checkpoint.
        rules: of the episodes; None for the config's.
        start: a policy for the same observations to learn on from; None for a random start.
        events: for the curves; None for ``folder / "tensorboard"``.
        device: of the policy network.
        progress: whether to show a bar.

    Raises:
        ArtefactError: if the folder's checkpoint is damaged, or of another scenario.
        DiskFullError: without room for the checkpoint, the policy or the curves.
        KeyboardInterrupt: after a Ctrl-C, when everything is saved.
    """
    rules = rules or config.rules
    env = PathwaySelectionVecEnv(scenario, config.n_envs, "train", rules.cost_weight, rules.rounds, rules.layerwise)
    env.seed(config.seed)
    kwargs = dict(config.policy_kwargs)
    if config.warm_start:
        kwargs |= warm_start(scenario, rules.weight, config.seed)
    model = PPO(POLICIES[config.policy], VecMonitor(env), policy_kwargs=kwargs, seed=config.seed, device=device, **config.ppo)
    if start is not None:
        model.policy.load_state_dict(start.state_dict())
    meta = {"policy": config.policy, "policy_kwargs": kwargs, "pathways": list(scenario.pathways)}
    meta |= {"scenario": scenario.fingerprint, "rules": rules.to_json()}
    best = BestOnVal(
        deepcopy(model.policy),
        config.average,
        scenario,
        env.core,
        rules,
        config.eval_freq,
        folder,
        meta,
        margin=1.0 if config.warm_start else 0.0,  # depart from the best static mask for a reason only
        target=config.target_active,
    )
    callbacks: list[BaseCallback] = [Curves(progress), best]
    if config.target_active is not None:  # after `best`, so that a checkpoint holds the weight before the next move
        callbacks.append(DualAscent(scenario, env.core, config.target_active))
    with curves(model, events or folder / "tensorboard"):
        if exists(folder / "checkpoint"):
            best.restore(restore_checkpoint(folder / "checkpoint", model, best.average, env.core))
        left = config.total_timesteps - model.num_timesteps
        if left > 0:
            with stop_between_rollouts(best):
                model.learn(left, callback=callbacks, reset_num_timesteps=model.num_timesteps == 0)
            if best.stop_asked:  # during the last rollout
                raise KeyboardInterrupt
    return best


@contextmanager
def curves(model: PPO, events: Path) -> Iterator[None]:
    """Within: the model's curves go to a folder, of a disk that may be full. The thread that writes them ends with it."""
    with room_for_curves(events):
        model.set_logger(configure(str(events), ["tensorboard"]))
        try:
            yield
        finally:
            model.logger.close()

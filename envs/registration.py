"""Gymnasium ids. Nothing here imports torch: the classes are named, not loaded."""

from importlib import import_module
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from backbones.registry import did_you_mean

NAMESPACE = "dsa"
MINIATURES: dict[str, dict[str, Any]] = {}
"""Keyword arguments per id that make an env small enough to try in seconds; conformance tests use them."""


def register(env_id: str, entry_point: str, scenario: str, miniature: dict[str, Any] | None = None, **kwargs: Any) -> None:
    """Register an id with its single and its vector environment.

    Args:
        env_id: ``dsa/Name-v0``.
        entry_point: ``"module:Class"`` of a :class:`envs.single.PathwaySelectionEnv`, whose docstring is its page.
        scenario: a name in :data:`envs.scenario.SCENARIOS`.
        miniature: keyword arguments for a quick try.
        kwargs: defaults of the id.
    """
    gym.register(
        env_id,
        entry_point=entry_point,
        vector_entry_point="envs.vector:PathwaySelectionVectorEnv",
        kwargs={"scenario": scenario, **kwargs},
    )
    MINIATURES[env_id] = miniature or {}


def register_all() -> None:
    """Register our ids; also the target of the ``gymnasium.envs`` entry point. Calling it again does nothing."""
    if "dsa/Planted-v0" in gym.registry:
        return
    register("dsa/Planted-v0", "envs.planted:PlantedEnv", "planted")
    register(
        "dsa/DigitsResNet-v0",
        "envs.digits:DigitsResNetEnv",
        "digits-resnet",
        miniature={
            "train_users": 12,
            "val_users": 4,
            "test_users": 6,
            "pretrain_epochs": 1,
            "meta_steps": 2,
            "meta_users": 4,
        },
    )


def known_spec(env_id: str) -> EnvSpec:
    """The spec of an id, ours or (with its module before a colon) a plug-in's. Raises ``ValueError`` for unknown ones."""
    module, _, env_id = env_id.rpartition(":")
    if module:
        import_module(module)  # "package:namespace/Name-v0", as Gymnasium has it
    ours = [name for name in gym.registry if name.startswith(f"{NAMESPACE}/")]
    if env_id not in gym.registry or "scenario" not in gym.registry[env_id].kwargs:
        raise ValueError(f"unknown environment {env_id!r}. {did_you_mean(env_id, ours)}")
    return gym.registry[env_id]

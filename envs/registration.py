"""Gymnasium ids. Nothing here imports torch: the classes are named, not loaded."""

import warnings
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from backbones.registry import did_you_mean

MINIATURES: dict[str, dict[str, Any]] = {}
"""Keyword arguments per id that make an env small enough to try in seconds; conformance tests use them."""


def register(
    env_id: str,
    users: str | None = None,
    backbone: str | None = None,
    *,
    entry_point: str = "envs.modelled:PersonalEnv",
    scenario: str = "modelled",
    miniature: dict[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    """Register an id with its single and its vector environment: ``register("me/Mine-v0", "table", "minilm", data=...)``.

    Args:
        env_id: ``namespace/Name-v0``.
        users: name of a population; None where the scenario needs none.
        backbone: name of a backbone; likewise.
        entry_point: ``"module:Class"`` of a :class:`envs.single.PathwaySelectionEnv`, whose docstring is its page.
        scenario: a name in :data:`envs.scenario.SCENARIOS`; ``"modelled"`` joins any population and any backbone.
        miniature: keyword arguments for a quick try; conformance tests use them.
        kwargs: defaults of the id, arguments of the scenario's builder.
    """
    named = {name: value for name, value in (("users", users), ("backbone", backbone)) if value is not None}
    gym.register(
        env_id,
        entry_point=entry_point,
        vector_entry_point="envs.vector:PathwaySelectionVectorEnv",
        kwargs={"scenario": scenario, **named, **kwargs},
    )
    MINIATURES[env_id] = miniature or {}


def register_all() -> None:
    """Register our ids; also the target of the ``gymnasium.envs`` entry point. Calling it again does nothing."""
    if "dsa/Planted-v0" in gym.registry:
        return
    register("dsa/Planted-v0", entry_point="envs.planted:PlantedEnv", scenario="planted")
    register("dsa/Tabular-v0", entry_point="envs.tabular:TabularEnv", scenario="tabular")
    small = {"meta_steps": 2, "meta_users": 4}
    few = {"train_users": 12, "val_users": 4, "test_users": 6, "pretrain_epochs": 1}
    digits = {"users": "digits", "backbone": "resnet-small"}
    inline: dict[str, Any] = {"placement": "inline", "outer_rate": 1e-2, "resample": False, "keep": "last", "shrink": False}
    inline |= {**digits, "miniature": small | few}
    register("dsa/DigitsResNet-v0", **inline, entry_point="envs.digits:DigitsResNetEnv")
    register("dsa/DigitsResNetLayerwise-v0", **inline, entry_point="envs.digits:DigitsResNetLayerwiseEnv", layerwise=True)
    register("dsa/Personal-v0", **digits, miniature=small | few)
    unipen: dict[str, Any] = {"users": "unipen", "backbone": "resnet-small"}
    unipen |= {"miniature": small | {"pretrain_epochs": 1, "widths": [8, 16], "auxiliary": None}}
    unipen |= {"widths": [32, 64, 128], "stride": 2, "pretrain_epochs": 40, "pretrain_seed": 0}
    unipen |= {"augment": "handwriting", "auxiliary": "omniglot"}
    unipen |= {"inner_steps": 12, "outer_rate": 3e-3, "rate_of_rates": 0.03, "head_rate": 38.0}
    register(
        "dsa/UnipenResNet-v0",
        **unipen,
        entry_point="envs.unipen:UnipenResNetEnv",
        meta_steps=150,
        inner_rate=2.0,
        neutral=True,
    )
    register(
        "dsa/UnipenResNetExit-v0",
        **unipen | {"miniature": {**unipen["miniature"], "start_steps": 2, "start_copies": 1}},
        entry_point="envs.unipen:UnipenResNetExitEnv",
        gates="exit",
        cost="flops",
        rank=64,
        meta_steps=200,
        inner_rate=0.5,
        start_steps=4000,
        start_copies=4,
        start_augment="handwriting",
        shrink=False,
    )
    second_order: dict[str, Any] = {"algorithm": "maml", "inner_steps": 5, "rate_of_rates": 1e-3}
    register(
        "dsa/PopquornBert-v0",
        "popquorn",
        "minilm",
        entry_point="envs.popquorn:PopquornBertEnv",
        miniature=small,
        meta_steps=200,
        **second_order,
    )
    register(
        "dsa/PopquornBertExit-v0",
        "popquorn",
        "minilm",
        entry_point="envs.popquorn:PopquornBertExitEnv",
        miniature=small,
        gates="exit",
        cost="flops",
        meta_steps=400,
        inner_steps=5,
        inner_rate=0.05,
        outer_rate=3e-3,
        shrink=False,
    )
    register(
        "dsa/JesterBert-v0",
        "jester",
        "minilm",
        entry_point="envs.jester:JesterBertEnv",
        miniature=small,
        meta_steps=500,
        meta_users=64,
        all_on=0.5,
        **second_order,
    )
    _register_plugins()


def _register_plugins() -> None:
    """Call every entry point of the group ``dsa.envs``. One that fails is named and left out: the other ids still work."""
    for point in entry_points(group="dsa.envs"):
        try:
            point.load()()
        except Exception as error:
            owner = point.dist.name if point.dist else "its distribution"
            warnings.warn(
                f"the plug-in {point.value!r} could not register its environments ({error!r}): mend or uninstall {owner}.",
                stacklevel=2,
            )


def known_spec(env_id: str) -> EnvSpec:
    """The spec of an id, ours or (with its module before a colon) a plug-in's. Raises ``ValueError`` for unknown ones."""
    module, _, env_id = env_id.rpartition(":")
    if module:
        import_module(module)  # "package:namespace/Name-v0", as Gymnasium has it
    ours = [name for name, spec in gym.registry.items() if "scenario" in spec.kwargs]
    if env_id not in gym.registry or "scenario" not in gym.registry[env_id].kwargs:
        raise ValueError(f"unknown environment {env_id!r}. {did_you_mean(env_id, ours)}")
    return gym.registry[env_id]

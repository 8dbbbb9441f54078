"""Policies and training state as safetensors and JSON. Nothing is pickled; a stranger's policy runs no code on load."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor

from agents.policies import POLICIES
from backbones.artefacts import ArtefactError, load_artefact, save_artefact
from envs.core import PathwaySelection
from envs.cost_weights import CostWeight
from envs.oracles import Plans, Users
from envs.rules import Rules
from envs.scenario import Scenario

AT_ONCE = 1024
"""Users whose masks are chosen together."""
POLICY, CHECKPOINT = "gating policy", "training checkpoint"


def save_policy(path: Path, policy: BasePolicy, meta: dict[str, Any]) -> None:
    """Save the policy network.

    Args:
        path: without suffix.
        policy: the network.
        meta: JSON-able; must hold ``policy`` and ``policy_kwargs`` to build it again, ``pathways``, ``scenario`` (the
            scenario's fingerprint) and ``rules`` (those it was trained by).
    """
    save_artefact(path, POLICY, policy.state_dict(), meta)


def load_policy(path: Path, scenario: Scenario) -> tuple[BasePolicy, dict[str, Any]]:
    """The policy and its meta, fit for a scenario's observations.

    Raises:
        ArtefactError: if it is damaged, or was trained on other pathways or other observations.
    """
    tensors, meta = load_artefact(path, POLICY)
    return build_policy(tensors, meta, scenario, f"the policy in {path}"), meta


def build_policy(
    tensors: Mapping[str, Tensor], meta: Mapping[str, Any], scenario: Scenario, name: str = "the policy"
) -> BasePolicy:
    """The policy network from what :func:`save_policy` was given, fit for a scenario's observations.

    Args:
        tensors: the network's state.
        meta: see :func:`save_policy`.
        scenario: whose observations.
        name: by which error messages call the policy.

    Raises:
        ArtefactError: if it was trained on other pathways or other observations.
    """
    if list(scenario.pathways) != meta["pathways"]:
        raise ArtefactError(
            f"{name} was trained on the pathways {meta['pathways']}, this scenario has {list(scenario.pathways)}."
        )
    check_scenario(name, meta, scenario)
    core = Rules.from_json(meta["rules"]).core(scenario, slots=1)
    named = POLICIES[meta["policy"]]
    kind = PPO.policy_aliases[named] if isinstance(named, str) else named
    policy = kind(core.observation_space, core.action_space, lambda _: 0.0, **meta["policy_kwargs"])
    try:
        policy.load_state_dict(tensors)
    except RuntimeError as error:
        raise ArtefactError(f"{name} does not fit this scenario's observations: {error}") from error
    policy.set_training_mode(False)
    return policy


def check_scenario(name: str | Path, meta: Mapping[str, Any], scenario: Scenario) -> None:
    """Raise :class:`ArtefactError` if what is called ``name`` was trained on other users, model or initialisation."""
    if meta.get("scenario") not in (scenario.fingerprint, scenario.without_users):
        raise ArtefactError(
            f"{name} was trained on other observations: users, backbone or meta-initialisation differ from those at hand. "
            "Restore the cache folder it was trained with, or train anew."
        )


def choose_plans(policy: BasePolicy, scenario: Scenario, users: Users, rules: Rules, cost_weight: float | None = None) -> Plans:
    """The deterministic policy's plans ``[B, R, P]`` for users ``[B]``, from their support sets.

    Args:
        policy: trained by ``rules``.
        scenario: whose users.
        users: positions, of any splits.
        rules: masks per episode, and whether a step decides one pathway.
        cost_weight: shown to a policy that was trained for a range of them; None: for others.

    Raises:
        ValueError: if the policy was trained for a range and no weight, or one outside of it, is given.
    """
    if cost_weight is None and rules.weight.varies:
        raise ValueError(f"the policy was trained for cost weights {rules.cost_weight}; say at which one it should choose.")
    parts = []
    for some in np.split(users, range(AT_ONCE, len(users), AT_ONCE)):
        core = rules.core(scenario, slots=max(1, len(some)))
        core.place(some, cost_weight if rules.weight.varies else None)
        slots = np.arange(len(some))
        for _ in range(core.steps):
            core.decide(slots, policy.predict(core.observe(slots), deterministic=True)[0])
        parts.append(core.plans)
    return np.concatenate(parts)


def choose_masks(
    policy: BasePolicy, scenario: Scenario, users: Users, cost_weight: float | None = None, rules: Rules | None = None
) -> Plans:
    """The last masks ``[B, P]`` of :func:`choose_plans`; without ``rules`` those that the policy's observations imply."""
    if rules is None:
        spaces = policy.observation_space.spaces  # type: ignore[attr-defined]
        shown = spaces.get("cost_weight")
        weight = CostWeight(*(round(float(end[0]), 6) for end in (shown.low, shown.high))).given() if shown is not None else 0.0
        rules = Rules(weight, layerwise="turn" in spaces)
    return choose_plans(policy, scenario, users, rules, cost_weight)[:, -1]


def save_checkpoint(path: Path, model: PPO, average: BasePolicy, core: PathwaySelection, extra: dict[str, Any]) -> None:
    """Everything that training needs to go on as if it had not stopped, taken between two rollouts."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    tensors: dict[str, Tensor] = {f"policy/{k}": v for k, v in model.policy.state_dict().items()}
    tensors |= {f"average/{k}": v for k, v in average.state_dict().items()}
    optimiser = model.policy.optimizer.state_dict()["state"]
    for index, moments in optimiser.items():
        tensors |= {f"optimiser/{index}/{name}": torch.as_tensor(value) for name, value in moments.items()}
    tensors["torch_rng"] = torch.get_rng_state()
    tensors["numpy_rng"] = torch.from_numpy(np.asarray(keys, dtype=np.int64))
    meta = {
        "num_timesteps": model.num_timesteps,
        "n_updates": model._n_updates,
        "numpy_rng": [kind, position, has_gauss, cached],
        "env": core.state(),
        "scenario": core.scenario.fingerprint,
        **extra,
    }
    save_artefact(path, CHECKPOINT, tensors, meta)


def restore_checkpoint(path: Path, model: PPO, average: BasePolicy, core: PathwaySelection) -> dict[str, Any]:
    """Take over a checkpoint; returns its meta. Raises :class:`ArtefactError` if it is damaged or of another scenario."""
    tensors, meta = load_artefact(path, CHECKPOINT)
    check_scenario(path, meta, core.scenario)
    for name, policy in (("policy/", model.policy), ("average/", average)):
        try:
            policy.load_state_dict({k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)})
        except RuntimeError as error:
            raise ArtefactError(
                f"the checkpoint {path} is of another network than this version builds; train anew into another folder."
            ) from error
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimiser/"):
            _, index, moment = name.split("/")
            state.setdefault(int(index), {})[moment] = value
    model.policy.optimizer.load_state_dict({**model.policy.optimizer.state_dict(), "state": state})
    core.restore(meta["env"])
    model.num_timesteps, model._n_updates = meta["num_timesteps"], meta["n_updates"]
    model._last_obs = core.observe(np.arange(len(core.users)))
    model._last_episode_starts = core.done == 0
    kind, position, has_gauss, cached = meta["numpy_rng"]
    np.random.set_state((kind, tensors["numpy_rng"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch_rng"])
    return meta

"""Co-training: meta-training under the policy's own masks, in turn with training the policy.

Adapters that were meta-trained under random masks are at their best under none in particular. Every turn trains a policy on
the present initialisation, and then the initialisation goes on learning with each user under the masks which that policy
chooses for them, among the usual ones, so that policy and adapters fit each other.
"""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from agents.checkpoint import choose_plans, load_policy
from agents.learning import learn
from agents.run import RunConfig
from backbones.artefacts import exists
from envs.modelled import meta_settings
from envs.scenario import Scenario, forget_scenarios
from meta.inner import MetaInit
from meta.learned import trainer_for
from meta.masks import masks_for
from meta.store import init_facts, save_init
from meta.trainer import Masks, MetaConfig

OWN = 0.7
"""Share of users who are meta-trained under a mask of the policy; the others as in plain meta-training."""
WEIGHTS = 7
"""Cost weights, evenly spaced over the policy's range, at which its masks are taken."""


def cotrain(config: RunConfig, folder: Path, device: str = "cpu", progress: bool = True) -> None:
    """Make ``folder / "meta-1"`` to ``folder / "meta-N"``, N turns; what is there already is not made again.

    Args:
        config: with ``cotrain`` = N turns. A turn's policy is trained for half of ``total_timesteps``, its meta-training
            takes half of the environment's ``meta_steps``.
        folder: of the run.
        device: of the policy network.
        progress: whether to show bars.

    Raises:
        ValueError: if the environment has no model to meta-train.
    """
    for turn in range(1, config.cotrain + 1):
        path = config.init_of(folder, turn)
        if exists(path):
            continue
        scenario = config.scenario(folder, turn - 1)
        if scenario.sent is not None:
            raise ValueError("every turn would have devices send again what they sent: leave out local_epsilon, or cotrain.")
        steps = meta_config(config)
        init = take_turn(config, scenario, folder / f"cotrain-{turn}", steps, device, progress)
        save_init(path, init, {**init_facts(scenario.data), **asdict(steps)})
        forget_scenarios()  # the next one has a model and frozen states of its own


def take_turn(
    config: RunConfig, scenario: Scenario, stage: Path, steps: MetaConfig, device: str = "cpu", progress: bool = True
) -> MetaInit:
    """One turn: a policy for a scenario's adapters, then these adapters meta-trained on under that policy's masks.

    Only train and val users are looked at. What was begun in ``stage`` is gone on with.

    Args:
        config: of the run; this policy is trained for half of its ``total_timesteps``.
        scenario: with the adapters as they stand.
        stage: folder for the policy and for checkpoints.
        steps: how and for how long adapters are meta-trained on, see :func:`meta_config`.
        device: of the policy network.
        progress: whether to show a bar of the policy's training.

    Returns:
        From where adapters start now.

    Raises:
        ValueError: if the scenario has no model to meta-train.
    """
    if scenario.data is None or scenario.look is None:
        raise ValueError(f"co-training needs an environment whose adapters can be meta-trained; {config.env} has none.")
    half = replace(config, total_timesteps=-(-config.total_timesteps // 2))
    learn(half, scenario, stage, device=device, progress=progress)
    own = own_masks(config, scenario, stage / "policy")

    def usual(users: Tensor, generator: torch.Generator) -> Tensor:
        return masks_for(scenario.data.pathways, len(users), generator, steps.all_on)

    return trainer_for(scenario.data, steps, stage, scenario.look.of.init, mixed(own, usual)).run()


def discard_turns(folder: Path) -> None:
    """Make what an earlier run left of its turns in ``folder`` count for nothing, for a new run that begins there."""
    for file in (*folder.glob("meta-[0-9]*.json"), *folder.glob("cotrain-[0-9]*/*.json")):
        file.unlink()
    for events in folder.glob("cotrain-[0-9]*/tensorboard/events.out.tfevents.*"):
        events.unlink()


def meta_config(config: RunConfig) -> MetaConfig:
    """How the environment meta-trains, for half as many steps."""
    whole = meta_settings(config.scenario_arguments()[1])
    return replace(whole, steps=-(-whole.steps // 2))


def own_masks(config: RunConfig, scenario: Scenario, policy: Path) -> Tensor:
    """The deterministic policy's masks for train users at several cost weights, ``[WEIGHTS, U, P]`` bool.

    Those in which nothing is on that has weights to learn (the model's own readout alone) have nothing on here.
    """
    users, weight = scenario.users("train"), config.rules.weight
    trained, _ = load_policy(policy, scenario)
    at = np.linspace(weight.low, weight.high, WEIGHTS if weight.varies else 1)
    plans = [choose_plans(trained, scenario, users, config.rules, float(w))[:, -1] for w in at]
    masks = torch.from_numpy(np.stack(plans))
    assert scenario.data is not None
    return masks & (masks & (scenario.data.pathways.sizes > 0)).any(-1, keepdim=True)


def mixed(own: Tensor, usual: Masks) -> Masks:
    """Which masks ``[B, P]`` users ``[B]`` (positions among train users) are meta-trained under.

    A mask of the policy with probability :data:`OWN` (one with nothing on teaches nothing, and is replaced), else a
    mask of ``usual``.
    """

    def draw(users: Tensor, generator: torch.Generator) -> Tensor:
        others = usual(users, generator)
        chosen = own[torch.randint(len(own), users.shape, generator=generator), users]
        take = (torch.rand(len(users), generator=generator) < OWN) & chosen.any(1)
        return torch.where(take[:, None], chosen, others)

    return draw

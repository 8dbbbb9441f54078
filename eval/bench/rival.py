"""The usual way, measured as ours are: on the same users and examples, with as many gradient steps."""

from collections.abc import Sequence

import numpy as np
import torch
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from envs.oracles import Plans
from envs.scenario import Scenario
from eval.bench.clock import Masks, Way
from eval.bench.ours import live_of, random_masks
from eval.bench.usual import GatedLora, Task, UsualEnv
from users.base import Examples
from users.batch import Prepared


def task_of(data: Prepared, examples: Examples) -> Task:
    """Some examples of a population, raw as its users have them, as a :class:`Task`."""
    population, model = data.population, data.pathways.model
    if population.items is None:
        return Task(model.backbone.prepare(examples.inputs), examples.labels, torch.zeros(model.num_classes))
    offset = data.table.offset
    corrected = torch.zeros(model.num_classes) if offset is None else offset[examples.inputs]
    raw = population.items.take(examples.inputs.tolist())
    return Task(model.backbone.prepare(raw), examples.labels, corrected)


def usual_env(scenario: Scenario, lora: GatedLora, user: int, rate: float, role: str = "validation") -> UsualEnv:
    """The usual environment of one user of a scenario, measured on the examples of a role."""
    live = live_of(scenario)
    one = live.population.users[user]
    support, measured = (task_of(live.data, examples) for examples in (one.support, getattr(one, role)))
    embedding = np.asarray(scenario.embeddings[np.array([user])])[0]
    return UsualEnv(lora, support, measured, embedding, live.init.steps, rate)


def usual(scenario: Scenario, lora: GatedLora, num_envs: int, rate: float, steps: int = 1, pool: Plans | None = None) -> Way:
    """SB3's ``DummyVecEnv`` of the usual environments, one per user; every repeat takes the next ``num_envs`` train users.

    Its masks are those of :func:`eval.bench.ours.random_masks`, as ours are, for the blocks that have a LoRA.
    """
    train = scenario.users("train").tolist()
    groups = []
    for first in range(0, max(1, len(train) - num_envs + 1), num_envs):
        singles = [usual_env(scenario, lora, train[(first + i) % len(train)], rate) for i in range(num_envs)]
        groups.append(DummyVecEnv([lambda single=single: single for single in singles]))  # type: ignore[misc]
    gates = [scenario.pathways.index(block) for block in lora.blocks]

    def begin(repeat: int) -> tuple[VecEnv, Masks]:
        env = groups[repeat % len(groups)]
        env.reset()
        masks = random_masks(env, len(scenario.pathways), repeat, pool)
        return env, lambda: masks()[:, gates]

    return Way(begin, steps)


def chosen_rate(scenario: Scenario, lora: GatedLora, rates: Sequence[float], users: int) -> float:
    """The learning rate of the usual way with the best query accuracy of (at most so many) val users, all blocks on."""
    who = scenario.users("val")[:users].tolist()
    return max(rates, key=lambda rate: usual_accuracy(scenario, lora, who, rate))


def usual_accuracy(scenario: Scenario, lora: GatedLora, users: Sequence[int], rate: float) -> float:
    """Mean query accuracy of the usual way with all blocks on."""
    everything = np.ones(len(lora.blocks), dtype=np.int8)
    envs = (usual_env(scenario, lora, user, rate, "query") for user in users)
    return float(np.mean([env.step(everything)[4]["accuracy"] for env in envs]))

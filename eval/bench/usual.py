"""The usual way to the same job: one Gymnasium environment per user, a PEFT LoRA in the frozen model, SGD on the support.

Written as one would write it well: one model for all environments, LoRA set back in place, switched-off blocks neither
computed nor differentiated, evaluation without gradients.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from backbones.base import PopulationModel

TARGETS = ("conv1", "conv2", "query", "value")
"""Layers that get a LoRA: both convolutions of a residual block, query and value of an attention."""


@dataclass(frozen=True)
class Task:
    """A user's examples in one role, ready for the model.

    Attributes:
        inputs: ``[N, ...]``. labels: ``[N]``.
        offset: ``[N, C]``, by which cross-fitting corrects the population model's logits; zeros without.
    """

    inputs: Tensor
    labels: Tensor
    offset: Tensor


class GatedLora:
    """A frozen model with a PEFT LoRA in every block that has :data:`TARGETS`; blocks can be switched.

    Args:
        model: copied, because PEFT changes modules in place.
        rank: of the LoRA.
        seed: of its random start.

    Attributes:
        model: PEFT's, ``[N, ...]`` to logits ``[N, C]``.
        blocks: names of the blocks with a LoRA. sizes: ``[blocks]`` their parameters.
    """

    def __init__(self, model: PopulationModel, rank: int = 8, seed: int = 0) -> None:
        places = [
            (block, f"backbone.blocks.{index}.{name}")
            for index, block in enumerate(model.backbone.block_names)
            for name, _ in model.backbone.blocks[index].named_modules()
            if name in TARGETS
        ]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[path for _, path in places])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model: Any = get_peft_model(deepcopy(model), config)
        self.blocks = tuple(dict.fromkeys(block for block, _ in places))
        inside = self.model.get_base_model()
        layers = [(block, inside.get_submodule(path)) for block, path in places]
        self.layers: dict[str, list[Any]] = {b: [layer for block, layer in layers if block == b] for b in self.blocks}
        self.parameters = {b: [p for layer in some for p in _lora(layer)] for b, some in self.layers.items()}
        self.sizes = np.array([sum(p.numel() for p in self.parameters[b]) for b in self.blocks])
        self._start = {b: [p.detach().clone() for p in parameters] for b, parameters in self.parameters.items()}

    @torch.no_grad()
    def reset(self) -> None:
        """Every weight back to where it started, in place."""
        for block, start in self._start.items():
            for parameter, value in zip(self.parameters[block], start, strict=True):
                parameter.copy_(value)

    def switch(self, mask: Sequence[int] | NDArray[np.int8]) -> list[torch.nn.Parameter]:
        """Switch the blocks by ``mask [blocks]``; the parameters that are to be trained now."""
        active = []
        for block, on in zip(self.blocks, mask, strict=True):
            for layer in self.layers[block]:
                layer.enable_adapters(bool(on))
            active += self.parameters[block] if on else []
        return active


def _lora(layer: Any) -> list[torch.nn.Parameter]:
    return [*layer.lora_A.parameters(), *layer.lora_B.parameters()]


class UsualEnv(gym.Env[NDArray[np.float32], NDArray[np.int8]]):
    """One user, one decision: which blocks' LoRA is trained on the user's support.

    Args:
        lora: shared by all users' environments.
        support: what LoRA is trained on. measured: what accuracy is measured on.
        embedding: ``[E]``, the observation.
        steps: of SGD. rate: its learning rate.
        cost_weight: of the share of LoRA parameters that are switched on.
    """

    def __init__(
        self,
        lora: GatedLora,
        support: Task,
        measured: Task,
        embedding: NDArray[np.float32],
        steps: int,
        rate: float,
        cost_weight: float = 0.1,
    ) -> None:
        self.lora, self.support, self.measured, self.embedding = lora, support, measured, embedding
        self.steps, self.rate, self.cost_weight = steps, rate, cost_weight
        self.observation_space = spaces.Box(-10.0, 10.0, embedding.shape, np.float32)
        self.action_space = spaces.MultiBinary(len(lora.blocks))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode: nothing is trained yet."""
        super().reset(seed=seed)
        return self.embedding, {}

    def step(self, action: NDArray[np.int8]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Train the chosen blocks from their start, measure, and end the episode."""
        self.lora.reset()
        active = self.lora.switch(action)
        if active:
            self._train(active)
        with torch.no_grad():
            right = self._logits(self.measured).argmax(-1) == self.measured.labels
        accuracy = right.double().mean().item()
        reward = accuracy - self.cost_weight * float(self.lora.sizes @ action / self.lora.sizes.sum())
        return self.embedding, reward, True, False, {"accuracy": accuracy}

    def _train(self, active: list[torch.nn.Parameter]) -> None:
        optimiser = torch.optim.SGD(active, lr=self.rate)
        for _ in range(self.steps):
            optimiser.zero_grad()
            cross_entropy(self._logits(self.support), self.support.labels).backward()
            optimiser.step()

    def _logits(self, task: Task) -> Tensor:
        return self.lora.model(task.inputs) + task.offset

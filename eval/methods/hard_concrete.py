"""``hard_concrete``: one mask for everybody, learned by descending on gates that are sampled from a stretched sigmoid.

Shapes: U users, P pathways, R rates of exchange.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from eval.group import Group
from eval.methods.base import Fitted
from eval.methods.pathway import Chooser
from eval.methods.relaxed import no_relaxation, relaxed_logits
from eval.world import World
from meta.inner import adapt, user_loss

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""Temperature of the sigmoid, and to where it is stretched: the values of the paper."""
EXCHANGE = (0.3, 1.0, 3.0)
"""Multiples of ``penalty`` that are all trained with; val users choose between the masks."""


def sampled(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """Hard-concrete gates in 0..1, many of them exactly 0 or 1.

    Args:
        log_alpha: ``[..., P]``.
        noise: uniform between 0 and 1, of the same shape or one that broadcasts.
    """
    stretched = torch.sigmoid((torch.logit(noise, 1e-6) + log_alpha) / BETA) * (ZETA - GAMMA) + GAMMA
    return stretched.clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """P(gate > 0) in closed form."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def open_gates(log_alpha: Tensor) -> Tensor:
    """Which gates are open, above 0, in the form without noise that is used after training; bool."""
    return torch.sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA > 0


@dataclass(frozen=True)
class HardConcrete(Chooser):
    """L0 gates: Louizos, Welling & Kingma 2018, "Learning Sparse Neural Networks through L0 Regularization".

    Kept: the distribution and its constants, the expected cost by the closed form of P(gate > 0), gates open or closed by the
    form without noise. Changed: a gate is a pathway, not a weight, and counts by its cost; adapters are not trained along but
    adapted afresh, in every step for a few train users with the pathways sampled open, and count as constants (first order);
    what is descended on is the loss on these users' validation examples, which adapting has not seen (no gradient of ours
    sees validation examples; this one's does, in the rival's favour: they are what gates are for). Accuracy is what is
    rewarded, but only the loss can be differentiated: what a unit of reward is worth in loss is a hyperparameter, and
    masks learned at :data:`EXCHANGE` times it are chosen between by val users' query reward.

    Attributes:
        penalty: loss that a unit of reward is worth; multiplies the cost weight.
        rate: of Adam, for log alpha. steps: of Adam (no ``length`` to judge trials by: within a fifth few gates can close).
        users: train users per step.
    """

    scope = "mask per population"
    trades = True
    space: ClassVar[Mapping[str, Sequence[Any]]] = {
        "penalty": (0.3, 1.0, 3.0, 10.0),
        "rate": (0.03, 0.1, 0.3),
        "steps": (50, 100, 200),
    }

    penalty: float = 3.0
    rate: float = 0.1
    steps: int = 100
    users: int = 8

    def refuses(self, world: World) -> str | None:
        """See :meth:`Method.refuses`."""
        return no_relaxation(world.pathways)

    def fit(self, world: World, cost_weight: float) -> Fitted:
        """See :meth:`Method.fit`. Facts: the ``penalty`` chosen, and val users' query reward."""

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            log_alpha = self._trained(world, cost_weight)
            masks = open_gates(log_alpha)
            best, reward = _best_on_val(world, masks, cost_weight)
            return {"mask": masks[best], "log_alpha": log_alpha[best]}, {"penalty": self._penalties[best], "val_reward": reward}

        facts = {**self.settings(), "method": "hard_concrete", "exchange": EXCHANGE, "cost_weight": cost_weight}
        return Fitted(*world.kept("hard-concrete-gates", facts, make))

    def choose(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Tensor:
        """See :meth:`Chooser.choose`."""
        return fitted.tensors["mask"].expand(len(shown), -1).clone()

    @property
    def _penalties(self) -> list[float]:
        return [self.penalty * multiple for multiple in EXCHANGE]

    def _trained(self, world: World, cost_weight: float) -> Tensor:
        """Log alpha at each rate of exchange, ``[R, P]``; all see the same users and the same noise."""
        generator = world.generator("hard_concrete")
        log_alpha = torch.zeros(len(EXCHANGE), world.pathways.num_pathways, requires_grad=True)
        costs = world.scenario.oracle.costs
        price = cost_weight * torch.tensor(self._penalties)
        optimiser = torch.optim.Adam([log_alpha], lr=self.rate)
        everybody = len(world.scenario.users("train"))
        for _ in tqdm(range(self.steps), desc=f"hard concrete gates at cost weight {cost_weight:g}", unit="step"):
            users = torch.randperm(everybody, generator=generator)[: self.users]
            noise = torch.rand(len(users), world.pathways.num_pathways, generator=generator)
            loss = _validation_loss(world, users, sampled(log_alpha[:, None], noise))
            expected = costs(open_probability(log_alpha)).float()
            optimiser.zero_grad()
            (loss + price * expected).sum().backward()
            optimiser.step()
        return log_alpha.detach()


def _validation_loss(world: World, users: Tensor, gates: Tensor) -> Tensor:
    """Mean validation loss ``[R]`` of train users ``[U]``, adapted with the open pathways, under gates ``[R, U, P]``."""
    flat, rows = gates.flatten(0, 1), users.repeat(len(gates))
    support, validation = (world.data.rows("train", role, rows) for role in ("support", "validation"))
    weights = adapt(world.pathways, world.init, support, flat.detach() > 0)
    logits = relaxed_logits(world.pathways, validation.frozen, weights, flat)
    return user_loss(logits, validation).unflatten(0, gates.shape[:2]).mean(1)


def _best_on_val(world: World, masks: Tensor, cost_weight: float) -> tuple[int, float]:
    """Which of the masks ``[R, P]`` has the highest mean query reward over val users (the cheapest of equals), and it."""
    users, oracle = world.scenario.users("val"), world.scenario.oracle
    rewards = np.array(
        [oracle.evaluate(users, np.tile(mask, (len(users), 1)), "query").reward(cost_weight).mean() for mask in masks.numpy()]
    )
    best = int((rewards - 1e-9 * oracle.costs.of(masks.numpy())).argmax())
    return best, float(rewards[best])

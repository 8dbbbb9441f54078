"""``gumbel``: a switch per pathway and user, learned by gradient descent on the user's own support.

Shapes: U users, P pathways, K inner steps of an adaptation, T steps of descent.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from backbones.pathways import Weights
from eval.group import Group
from eval.methods.base import Fitted
from eval.methods.pathway import Chooser
from eval.methods.relaxed import no_relaxation, relaxed_logits
from eval.world import World
from meta.inner import stacked, user_loss

COLD = 0.1
"""The temperature at the last step."""


@dataclass(frozen=True)
class Gumbel(Chooser):
    """Adaptable Adapters: Moosavi et al. 2022, "Adaptable Adapters".

    Kept: a two-way Gumbel-softmax switch per adapter (here as the sigmoid it equals, on the difference of the two
    logits plus logistic noise), learned together with the adapters, the greater logit deciding at the end; then adapters
    anew, from the meta-initialisation, in the chosen places only. Changed: the switches are each user's own. They are
    cross-validated, since on the examples that adapters learn from every adapter helps: two sets of adapters, each learned
    on one half of the support, and the switches descend on the half that each has not seen (a user's only example serves as
    both). Relaxed, with a temperature that falls geometrically to :data:`COLD`; the expected cost is added to the loss. The
    meta-learned rates are spread over the steps, so that adapters travel as far as in an adaptation. Rational activations
    are left out.

    Attributes:
        steps: T; in each one step of the adapters and one of the switches.
        rate: of Adam, for the switches.
        penalty: loss that a unit of reward is worth; multiplies the cost weight.
        temperature: of the first step.
    """

    scope = "mask per user, by optimisation"
    trades = True
    space: ClassVar[Mapping[str, Sequence[Any]]] = {
        "steps": (10, 20, 40),
        "rate": (0.1, 0.3, 1.0),
        "penalty": (0.3, 1.0, 3.0, 10.0),
        "temperature": (0.3, 1.0, 3.0),
    }
    length = "steps"

    steps: int = 20
    rate: float = 0.3
    penalty: float = 1.0
    temperature: float = 1.0

    def refuses(self, world: World) -> str | None:
        """See :meth:`Method.refuses`."""
        return no_relaxation(world.pathways)

    def tries(self, world: World) -> int:
        """Two halves' gradients are one of the whole support; a step takes one for the adapters and one for the switches."""
        return math.ceil(2 * self.steps / world.init.steps)

    @torch.enable_grad()
    def choose(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Tensor:
        """See :meth:`Chooser.choose`. Noise by the user's id, so that nobody's mask depends on who else is there."""
        pathways, users = world.pathways, len(shown)
        learn, judge = _halves(shown)
        noise = torch.stack([self._noise(world, user) for user in shown.ids], 1)
        price, costs = self.penalty * cost_weight, world.scenario.oracle.costs
        switches = torch.zeros(users, pathways.num_pathways, requires_grad=True)
        optimiser = torch.optim.Adam([switches], lr=self.rate)
        weights = stacked(world.init, 2 * users)
        for step in range(self.steps):
            gates = torch.sigmoid((switches + noise[step]) / self._temperature(step)).repeat(2, 1)
            weights = self._moved(world, learn, weights, gates.detach(), step)
            loss = user_loss(relaxed_logits(pathways, judge.batch.frozen, weights, gates), judge.batch)
            expected = price * costs(torch.sigmoid(switches)).float()
            optimiser.zero_grad()
            (loss.sum() / 2 + expected.sum()).backward()
            optimiser.step()
        return switches.detach() > 0

    def _noise(self, world: World, user: str) -> Tensor:
        """Logistic, ``[T, P]``: the difference of two Gumbel variables."""
        uniform = torch.rand(self.steps, world.pathways.num_pathways, generator=world.generator("gumbel", user))
        return torch.logit(uniform, 1e-6)

    def _temperature(self, step: int) -> float:
        return self.temperature * (COLD / self.temperature) ** (step / max(1, self.steps - 1))

    def _moved(self, world: World, learn: Group, weights: Weights, gates: Tensor, step: int) -> Weights:
        """The adapters after one gradient step under relaxed gates ``[2U, P]``, where the meta-initialisation lets them."""
        pathways, init = world.pathways, world.init
        rates = init.rates[step * init.steps // self.steps] * min(1.0, init.steps / self.steps)
        owners = {key: p for p in init.adapted.nonzero()[:, 0].tolist() for key in pathways.keys[p]}
        current = {key: weights[key].detach().requires_grad_() for key in owners}
        losses = user_loss(relaxed_logits(pathways, learn.batch.frozen, weights | current, gates), learn.batch)
        loss = (losses * init.trust(learn.batch)).sum()
        if not loss.requires_grad:  # every gate has come to be exactly 0
            return weights
        found = torch.autograd.grad(loss, list(current.values()), allow_unused=True, materialize_grads=True)
        moved = {key: (current[key] - rates[owners[key]] * g).detach() for key, g in zip(current, found, strict=True)}
        return weights | moved


def _halves(shown: Group) -> tuple[Group, Group]:
    """Two groups of 2U: every user's examples of even places, then of odd ones, and the other way round."""
    even = [torch.arange(0, count, 2) for count in shown.counts]
    odd = [torch.arange(1 if count > 1 else 0, count, 2) for count in shown.counts]
    twice = shown.rows([*range(len(shown)), *range(len(shown))])
    return twice.pick(even + odd), twice.pick(odd + even)

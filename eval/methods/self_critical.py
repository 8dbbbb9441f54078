"""``self_critical``: a policy for masks learned by plain policy gradient, the precedent of gating by reinforcement learning.

Shapes: B users, P pathways.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Bernoulli
from tqdm.auto import tqdm

from agents.run import hyperparameters
from envs import known_spec
from envs.scenario import Scenario
from eval.group import Group
from eval.methods.base import Fitted
from eval.methods.pathway import Chooser
from eval.methods.scorer import Observation, Scorer
from eval.world import World


@dataclass(frozen=True)
class SelfCritical(Chooser):
    """BlockDrop: Wu et al. 2018, "BlockDrop: Dynamic Inference Paths in Residual Networks".

    Kept: one glance decides all gates at once as independent bits, probabilities bounded to ``bound * p + (1 - bound) *
    (1 - p)``, REINFORCE whose baseline is the reward of the policy's own mask thresholded at one half (self-critical), Adam,
    a policy per trade-off, a random start (with real people PPO begins as the best static mask and departs from it by a
    margin, ``warm_start`` in :mod:`agents.learning`: there not the algorithm alone differs). Changed: what is gated are
    pathways of a user, not blocks for an image; the policy network is the scorer that PPO trains here; the reward is ours,
    validation accuracy minus cost weight times cost. The curriculum (deciding about the last blocks first) and the joint
    fine-tuning after it are left out: adapters come from the meta-initialisation for every method alike.

    As many masks are sampled as PPO samples for the environment; those of the baseline come on top (the oracle
    answers equal questions once). What is best by val users' query reward is kept, looked at as often as PPO's.

    Attributes:
        rate: of Adam. batch: users per step. hidden: width of the hidden layers.
        initial_logit: where the logits start; below zero, with few pathways on.
        bound: alpha of the paper.
        timesteps: masks to sample; None: PPO's number for the environment (so there is no ``length`` of its own that trials
            could be judged at a fifth of).
    """

    scope = "mask per user, amortised"
    trades = True
    space: ClassVar[Mapping[str, Sequence[Any]]] = {
        "rate": (0.0003, 0.001, 0.003, 0.01),
        "batch": (32, 64, 128),
        "hidden": (32, 64, 128),
        "initial_logit": (-2.0, -1.0, 0.0),
    }

    rate: float = 0.003
    batch: int = 64
    hidden: int = 64
    initial_logit: float = 0.0
    bound: float = 0.8
    timesteps: int | None = None

    def tries(self, world: World) -> int:
        """The look at the support's gradients."""
        return 1

    def fit(self, world: World, cost_weight: float) -> Fitted:
        """See :meth:`Method.fit`. Facts: ``timesteps``, and val users' query reward of what was kept."""
        total, every = self._lengths(world)

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            scorer, reward = self._trained(world, cost_weight, total, every)
            world.scenario.save()
            return dict(scorer.state_dict()), {"timesteps": total, "val_reward": reward}

        facts = {**self.settings(), "method": "self_critical", "cost_weight": cost_weight, "timesteps": total, "every": every}
        return Fitted(*world.kept("self-critical-policy", facts, make))

    def choose(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Tensor:
        """See :meth:`Chooser.choose`."""
        embeddings, statistics, _ = world.observe(shown.batch)
        return self.policy(world, fitted).masks({"user": embeddings, "pathways": statistics})

    def policy(self, world: World, fitted: Fitted) -> Scorer:
        """The network that :meth:`fit` has learned."""
        scorer = Scorer(world.scenario, self.hidden, self.initial_logit, 0)
        scorer.load_state_dict(fitted.tensors)
        return scorer

    def _lengths(self, world: World) -> tuple[int, int]:
        """Masks to sample, and masks between two looks at val users: PPO's steps, of which a mask may take several."""
        ppo = hyperparameters(world.env, [])
        one_by_one = {**known_spec(world.env).kwargs, **world.kwargs}.get("layerwise", False)
        turns = len(world.scenario.pathways) if one_by_one else 1
        total = ppo["total_timesteps"] // turns if self.timesteps is None else self.timesteps
        return total, ppo["eval_freq"] // turns

    def _trained(self, world: World, cost_weight: float, total: int, every: int) -> tuple[Scorer, float]:
        """The best policy on val users, and their mean query reward under it."""
        scenario, generator = world.scenario, world.generator("self_critical")
        scorer = Scorer(scenario, self.hidden, self.initial_logit, generator.initial_seed())
        optimiser = torch.optim.Adam(scorer.parameters(), lr=self.rate)
        best, kept, done = -np.inf, {}, 0
        with tqdm(total=total, desc=f"self-critical policy at cost weight {cost_weight:g}", unit="mask") as bar:
            for users in self._drawn(scenario.users("train"), total, generator):
                optimiser.zero_grad()
                self._loss(scenario, scorer, users, cost_weight, generator).backward()
                optimiser.step()
                look = done // every < (done + len(users)) // every or done + len(users) == total
                done += len(users)
                bar.update(len(users))
                if look and (reward := _val_reward(scenario, scorer, cost_weight)) > best:
                    best, kept = reward, {name: value.clone() for name, value in scorer.state_dict().items()}
        scorer.load_state_dict(kept)
        return scorer, best

    def _drawn(self, users: NDArray[np.int64], total: int, generator: torch.Generator) -> Iterator[NDArray[np.int64]]:
        """Batches of ``total`` users in all; every user once before anyone twice."""
        laps = [torch.randperm(len(users), generator=generator) for _ in range(-(-total // len(users)))]
        for places in torch.cat(laps)[:total].split(self.batch):
            yield users[places.numpy()]

    def _loss(
        self, scenario: Scenario, scorer: Scorer, users: NDArray[np.int64], cost_weight: float, generator: torch.Generator
    ) -> Tensor:
        """Minus the log probability of one sampled mask per user, times how much better it is than the policy's own."""
        logits = scorer(_observed(scenario, users))
        chance = torch.sigmoid(logits) * (2 * self.bound - 1) + 1 - self.bound
        drawn = torch.rand(chance.shape, generator=generator) < chance.detach()
        asked = torch.cat([drawn, logits.detach() > 0]).numpy()
        rewards = scenario.oracle.evaluate(np.tile(users, 2), asked, "validation").reward(cost_weight)
        sampled, own = torch.from_numpy(rewards).float().chunk(2)
        return -((sampled - own) * Bernoulli(chance).log_prob(drawn.float()).sum(1)).mean()


def _observed(scenario: Scenario, users: NDArray[np.int64]) -> Observation:
    return {
        "user": torch.from_numpy(np.asarray(scenario.embeddings[users])),
        "pathways": torch.from_numpy(np.asarray(scenario.statistics[users])),
    }


def _val_reward(scenario: Scenario, scorer: Scorer, cost_weight: float) -> float:
    """Mean query reward of val users under the policy's own masks."""
    users = scenario.users("val")
    masks = scorer.masks(_observed(scenario, users)).numpy()
    return float(scenario.oracle.evaluate(users, masks, "query").reward(cost_weight).mean())

"""A gating policy under differential privacy: plain policy gradients, one clipped update per user, noise once per round.

PPO's minibatches mix many decisions about one user, so that clipping them would protect decisions, not users. Here every
user of a round contributes one update: the mean over some masks drawn for them of ``advantage * gradient of log
probability``, the other masks' mean reward being the baseline.

Sources: Williams 1992 (REINFORCE); Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; McMahan et al. 2018,
"Learning Differentially Private Recurrent Language Models".

Shapes: U users, M masks per user, P pathways.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, grad, vmap
from tqdm.auto import tqdm

from agents.checkpoint import choose_masks
from agents.policies import GatingPolicy, PathwayScorer
from envs.oracles import Users
from envs.rules import Rules
from envs.scenario import Scenario
from meta.private import PrivateRounds, Updates

PART = "policy"
PUBLIC_RATE = 0.01
TOGETHER = 128
"""Users whose updates are made at a time."""
EVERY = 10
"""Rounds between two looks at val users."""
Log = Callable[[str, float, int], None]


@dataclass(frozen=True)
class PrivateSettings:
    """How a private policy is learned.

    Attributes:
        rounds: that are planned.
        users: per round, in the mean.
        masks: M, drawn for each of them; at least 2.
        hidden: width of the scorer's two hidden layers: noise grows with the root of the number of weights.
        rate: Adam's learning rate, falling to zero along a cosine.
        entropy: weight of the masks' entropy, in units of reward.
        average: decay per round of the average of weights that is kept.
        public_rounds: beforehand, on val users, who are public, at the rate :data:`PUBLIC_RATE`: what they teach need not be
            learned under noise.
    """

    rounds: int = 100
    users: int = 200
    masks: int = 8
    hidden: int = 16
    rate: float = 0.01
    entropy: float = 0.01
    average: float = 0.9
    public_rounds: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("users", 1), ("masks", 2), ("hidden", 1), ("public_rounds", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if not self.rate > 0 or self.entropy < 0 or not 0 <= self.average < 1:
            raise ValueError("rate must be above 0, entropy at least 0, and average at least 0 and below 1.")

    def in_public(self) -> "PrivateSettings":
        """How val users teach the start."""
        return replace(self, rounds=self.public_rounds, public_rounds=0, rate=PUBLIC_RATE)


def check_rules(rules: Rules) -> None:
    """Raise ``ValueError`` for episodes that a private policy cannot be learned from."""
    if rules.layerwise or rules.rounds > 1 or rules.weight.varies:
        raise ValueError(
            "a private policy is learned from one mask per user at one cost weight; leave out layerwise, rounds and ranges."
        )


def new_policy(scenario: Scenario, rules: Rules, settings: PrivateSettings, seed: int) -> GatingPolicy:
    """A policy that has seen nobody."""
    core = rules.core(scenario, slots=1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GatingPolicy(core.observation_space, core.action_space, lambda _: settings.rate, hidden=settings.hidden)


def begun(scenario: Scenario, rules: Rules, settings: PrivateSettings, seed: int) -> GatingPolicy:
    """The policy that learning starts with: one that has seen nobody, or what val users teach."""
    if not settings.public_rounds:
        return new_policy(scenario, rules, settings, seed)
    return learn_private(scenario, rules, settings.in_public(), seed, None, "val")


def scorer(policy: GatingPolicy) -> torch.nn.Sequential:
    """The network whose weights are learned: features of a pathway to its logit."""
    assert isinstance(policy.mlp_extractor, PathwayScorer)
    return policy.mlp_extractor.score


def learn_private(
    scenario: Scenario,
    rules: Rules,
    settings: PrivateSettings,
    seed: int,
    private: PrivateRounds | None,
    split: str = "train",
    log: Log | None = None,
) -> GatingPolicy:
    """A policy learned from a split's users.

    Args:
        scenario: whose users; observations must not be standardised on them if they are promised privacy.
        rules: see :func:`check_rules`.
        settings: rounds and rates.
        seed: of the network and of the masks drawn.
        private: the rounds' guarantee; None for users who are public: nothing is clipped, and no noise added.
        split: whose users learn.
        log: for curves, called with tag, value and round.
    """
    check_rules(rules)
    policy, users = begun(scenario, rules, settings, seed), scenario.users(split)
    score = scorer(policy)
    average, learned = deepcopy(policy), dict(score.named_parameters())
    optimiser = torch.optim.Adam(learned.values(), settings.rate)
    public = np.random.default_rng(seed)
    for step in tqdm(range(settings.rounds), desc="private policy gradients" if private else "policy gradients", unit="round"):
        optimiser.param_groups[0]["lr"] = settings.rate * (1 + np.cos(np.pi * step / settings.rounds)) / 2
        cohort = _public_cohort(len(users), settings.users, public) if private is None else private.cohort(step).numpy()
        draw = public if private is None else np.random.default_rng(_words(private.source(step, "masks")))
        pieces = _updates(policy, scenario, rules, settings, users[cohort], draw)
        found = _mean(pieces, learned) if private is None else private.release(learned, pieces)
        for name, parameter in learned.items():
            parameter.grad = found[name]
        optimiser.step()
        with torch.no_grad():
            share = min(settings.average, (step + 1) / (step + 10))  # the start counts little
            for kept, new in zip(average.parameters(), policy.parameters(), strict=True):
                kept.lerp_(new, 1 - share)
        if log and ((step + 1) % EVERY == 0 or step + 1 == settings.rounds):
            _report(average, scenario, rules, private, log, step + 1)
    return average


def _updates(
    policy: GatingPolicy, scenario: Scenario, rules: Rules, settings: PrivateSettings, users: Users, draw: np.random.Generator
) -> Iterator[Updates]:
    """Users' updates, some of them at a time."""
    for some in np.split(users, range(TOGETHER, len(users), TOGETHER)):
        if len(some):
            features = scorer_features(policy, scenario, rules, some)
            chance = scorer(policy)(features)[..., 0].sigmoid().detach().numpy()
            masks = draw.random((len(some), settings.masks, chance.shape[1])) < chance[:, None]
            rewards = mask_rewards(scenario, rules, some, masks)
            yield policy_updates(policy, features, torch.from_numpy(masks), torch.from_numpy(rewards), settings.entropy)


def policy_updates(policy: GatingPolicy, features: Tensor, masks: Tensor, rewards: Tensor, entropy: float) -> Updates:
    """Each user's gradient of minus their expected reward (and entropy), of the scorer's weights, ``{name: [U, ...]}``.

    Args:
        policy: whose scorer.
        features: ``[U, P, width]``, what it reads.
        masks: ``[U, M, P]`` bool, drawn from it.
        rewards: ``[U, M]``.
        entropy: weight of the entropy.
    """
    score, count = scorer(policy), masks.shape[1]
    others = (rewards.sum(1, keepdim=True) - rewards) / (count - 1)

    def loss(weights: dict[str, Tensor], seen: Tensor, on: Tensor, advantage: Tensor) -> Tensor:
        logits = functional_call(score, weights, (seen,))[..., 0]
        each = torch.nn.functional.logsigmoid(torch.where(on, logits, -logits)).sum(-1)
        chance = logits.sigmoid()
        spread = -(chance * torch.nn.functional.logsigmoid(logits) + (1 - chance) * torch.nn.functional.logsigmoid(-logits))
        return -(advantage * each).mean() - entropy * spread.sum()

    weights = {name: parameter.detach() for name, parameter in score.named_parameters()}
    return vmap(grad(loss), in_dims=(None, 0, 0, 0))(weights, features.detach(), masks, (rewards - others).float())


def scorer_features(policy: GatingPolicy, scenario: Scenario, rules: Rules, users: Users) -> Tensor:
    """What the scorer reads of users, ``[U, P, width]``."""
    core = rules.core(scenario, slots=len(users))
    core.place(users, None)
    seen, _ = policy.obs_to_tensor(core.observe(np.arange(len(users))))
    with torch.no_grad():
        found = policy.extract_features(seen)
    assert isinstance(found, Tensor)
    return found.unflatten(1, (len(scenario.pathways), -1))


def mask_rewards(scenario: Scenario, rules: Rules, users: Users, masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """``[U, M]`` of masks ``[U, M, P]``."""
    each = masks.shape[1]
    plans = scenario.executed(masks.reshape(len(users) * each, -1))
    weight = rules.weight.low
    return scenario.oracle.evaluate(users.repeat(each), plans).reward(weight).reshape(len(users), each)


def _words(source: torch.Generator) -> NDArray[np.int64]:
    """A seed of 256 bits."""
    return torch.randint(2**32, (8,), generator=source).numpy()


def _public_cohort(users: int, expected: int, draw: np.random.Generator) -> NDArray[np.int64]:
    return draw.permutation(users)[:expected]


def _mean(pieces: Iterator[Updates], learned: dict[str, torch.nn.Parameter]) -> Updates:
    found = [*pieces]
    return {name: torch.cat([some[name] for some in found]).mean(0) for name in learned}


def _report(policy: GatingPolicy, scenario: Scenario, rules: Rules, private: PrivateRounds | None, log: Log, step: int) -> None:
    """What val users, who are public, get by the policy as it is, and what was spent so far."""
    users = scenario.users("val")
    masks = scenario.executed(choose_masks(policy, scenario, users, rules=rules))
    found = scenario.oracle.evaluate(users, masks, "query")
    log("val_users/reward", float(found.reward(rules.weight.low).mean()), step)
    log("val_users/accuracy", float(found.accuracy.mean()), step)
    log("val_users/cost", float(found.cost.mean()), step)
    log("val_users/active_fraction", float(masks.mean()), step)
    if private:
        log("privacy/epsilon", private.accountant.spent(), step)

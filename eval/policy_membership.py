"""What a gating policy gives away of the users from whose rewards it was learned.

Shapes: U users, K policies, M masks per user, P pathways.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.policies import GatingPolicy
from agents.private import mask_rewards, scorer, scorer_features
from envs.oracles import Users
from envs.rules import Rules
from envs.scenario import Scenario
from eval.attacks import Success, Values, rmia, success

MASKS = 8
"""Of each policy, at which rewards of a user are looked up."""
TOGETHER = 64


def expected_rewards(
    policies: Sequence[GatingPolicy], scenario: Scenario, rules: Rules, users: Users, masks: int = MASKS, seed: int = 0
) -> Values:
    """What each policy earns with each user in the mean, ``[K, U]``, which is what learning raises.

    All policies are judged by the same masks, drawn from all of them in turn and weighted by importance, so that chance moves
    them together.

    Args:
        policies: of one kind.
        scenario: whose users; rewards of train users are those on validation examples, as in learning.
        rules: that they were learned by, of one decision at one cost weight.
        users: positions ``[U]``.
        masks: drawn of each policy; M is K times as many.
        seed: of the masks.
    """
    draw, found = torch.Generator().manual_seed(seed), []
    for some in np.split(users, range(TOGETHER, len(users), TOGETHER)):
        with torch.no_grad():
            logits = torch.stack([scorer(p)(scorer_features(p, scenario, rules, some))[..., 0] for p in policies])
        by = torch.arange(masks * len(policies)) % len(policies)
        drawn = torch.rand(len(by), len(some), logits.shape[-1], generator=draw) < logits[by].sigmoid()
        likely = torch.stack([_log_chance(each, drawn) for each in logits])  # [K, M, U]
        weight = (likely - torch.logsumexp(likely, 0)).exp()
        earned = torch.from_numpy(mask_rewards(scenario, rules, some, drawn.transpose(0, 1).numpy())).T
        found.append(((weight * earned).sum(1) / weight.sum(1).clamp_min(1e-12)).numpy())
    return np.concatenate(found, 1)


def _log_chance(logits: Tensor, masks: Tensor) -> Tensor:
    """Of masks ``[M, U, P]`` under logits ``[U, P]``: ``[M, U]``."""
    return torch.nn.functional.logsigmoid(torch.where(masks, logits, -logits)).sum(-1).double()


def policy_scores(
    target: GatingPolicy, references: Sequence[GatingPolicy], scenario: Scenario, rules: Rules, users: Users, judged: Users
) -> NDArray[np.float64]:
    """RMIA with rewards in place of log likelihoods, ``[U]``: higher where somebody seems to have taught the policy.

    Args:
        target: the policy under attack.
        references: learned alike from other people.
        scenario: whose users; the initialisation is public, and the same for all policies.
        rules: of all of them.
        users: who are asked about.
        judged: further users, by whom ratios are judged.
    """
    asked, others = (expected_rewards([target, *references], scenario, rules, some) for some in (users, judged))
    return rmia(asked[0], asked[1:], others[0], others[1:])


def policy_membership(
    target: GatingPolicy,
    references: Sequence[GatingPolicy],
    scenario: Scenario,
    rules: Rules,
    members: Users,
    others: Users,
    judged: Users,
) -> Success:
    """Was this user among those from whose rewards the policy was learned? Arguments as in :func:`policy_scores`."""
    inside, outside = (policy_scores(target, references, scenario, rules, some, judged) for some in (members, others))
    return success(inside, outside)

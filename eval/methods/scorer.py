"""The network that turns an observation into one logit per pathway, for learners other than PPO.

Shapes: B observations, P pathways.
"""

import torch
from torch import Tensor, nn

from agents.policies import PathwayFeatures, PathwayScorer
from envs.core import PathwaySelection
from envs.scenario import Scenario

Observation = dict[str, Tensor]
"""``user`` ``[B, E]`` and ``pathways`` ``[B, P, S]``."""


class Scorer(nn.Module):
    """The actor of :class:`agents.policies.GatingPolicy`, without the critic and what SB3 puts around it.

    Args:
        scenario: whose observations.
        hidden: width of the two hidden layers.
        initial_logit: where every pathway's logit starts; below zero, with few pathways on.
        seed: of the random start.
    """

    def __init__(self, scenario: Scenario, hidden: int, initial_logit: float, seed: int) -> None:
        super().__init__()
        self.features = PathwayFeatures(PathwaySelection(scenario, "train", 0.0, 1, 1).observation_space)
        self.pathways, width = self.features.shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.score = PathwayScorer(self.pathways, width, self.features.own, hidden, by_turn=False).score
            last = self.score[-1]
            assert isinstance(last, nn.Linear)
            nn.init.orthogonal_(last.weight, 0.01)
        nn.init.constant_(last.bias, initial_logit)

    def forward(self, seen: Observation) -> Tensor:
        """Logits ``[B, P]``."""
        return self.score(self.features(seen).unflatten(1, (self.pathways, -1)))[..., 0]

    @torch.no_grad()
    def masks(self, seen: Observation) -> Tensor:
        """Pathways with a probability above one half, ``[B, P]`` bool."""
        return self(seen) > 0

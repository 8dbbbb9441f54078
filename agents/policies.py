"""Gating policies: from an observation to one probability per pathway.

Shapes: B observations, P pathways, S statistics, E width of the user embedding.
"""

from typing import Any

import gymnasium as gym
import torch
from stable_baselines3.common.policies import MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from torch import Tensor, nn


class PathwayFeatures(BaseFeaturesExtractor):
    """Per pathway: the user embedding, its own statistics, and their mean and maximum over pathways.

    Args:
        observation_space: ``Dict`` of ``user`` ``[E]`` and ``pathways`` ``[P, S]``.
    """

    def __init__(self, observation_space: gym.spaces.Dict) -> None:
        pathways, statistics = observation_space["pathways"].shape
        self.shape = (pathways, observation_space["user"].shape[0] + 3 * statistics)
        super().__init__(observation_space, features_dim=self.shape[0] * self.shape[1])

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """``[B, P * (E + 3 S)]``."""
        own = observations["pathways"]
        shared = torch.cat([observations["user"], own.mean(1), own.amax(1)], 1)
        return torch.cat([own, shared[:, None].expand(-1, own.shape[1], -1)], -1).flatten(1)


class PathwayScorer(nn.Module):
    """One small network scores every pathway, so that it serves any number of them; another one values the user.

    Args:
        pathways: P. width: of one pathway's features. statistics: S.
        hidden: width of both networks' two hidden layers.
    """

    def __init__(self, pathways: int, width: int, statistics: int, hidden: int) -> None:
        super().__init__()
        self.pathways, self.statistics = pathways, statistics
        self.latent_dim_pi, self.latent_dim_vf = pathways, hidden
        self.score = nn.Sequential(*create_mlp(width, 1, [hidden, hidden], nn.Tanh))
        self.value = nn.Sequential(*create_mlp(width - statistics, hidden, [hidden], nn.Tanh), nn.Tanh())

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[B, P]`` and what the value is read from ``[B, hidden]``."""
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: Tensor) -> Tensor:
        """Logits ``[B, P]``."""
        return self.score(features.unflatten(1, (self.pathways, -1)))[..., 0]

    def forward_critic(self, features: Tensor) -> Tensor:
        """``[B, hidden]`` from what is the same for all pathways: embedding, mean and maximum."""
        return self.value(features.unflatten(1, (self.pathways, -1))[:, 0, self.statistics :])


class GatingPolicy(MultiInputActorCriticPolicy):
    """The shared scorer as an actor-critic policy for Stable-Baselines3.

    ``logit_p = f(embedding, statistics of p, mean and maximum over pathways of the statistics)``, with one ``f`` for
    all pathways.

    Args:
        args, kwargs: as for SB3's ``MultiInputPolicy``.
        hidden: width of the hidden layers.
    """

    def __init__(self, *args: Any, hidden: int = 64, **kwargs: Any) -> None:
        self.hidden = hidden
        super().__init__(*args, **{**kwargs, "features_extractor_class": PathwayFeatures})

    def _build_mlp_extractor(self) -> None:
        pathways, width = self.features_extractor.shape
        statistics = self.observation_space["pathways"].shape[1]
        self.mlp_extractor = PathwayScorer(pathways, width, statistics, self.hidden)

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_net = nn.Identity()  # the scorer's output already is one logit per pathway
        nn.init.orthogonal_(self.mlp_extractor.score[-1].weight, 0.01)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)


POLICIES: dict[str, str | type[GatingPolicy]] = {"GatingPolicy": GatingPolicy, "MultiInputPolicy": "MultiInputPolicy"}
"""What ``policy`` may be in the hyperparameters: ours, or SB3's own network on the flattened observation."""

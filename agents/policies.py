"""Gating policies: from an observation to one probability per pathway.

Shapes: B observations, P pathways, S statistics, E width of the user embedding.
"""

import math
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import torch
from stable_baselines3.common.policies import MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from torch import Tensor, nn

from envs.statistics import NAMES

WAVES = 4
"""A pathway's depth is shown to the scorer as this many cosines and sines as well: where it is matters sharply."""


class PathwayFeatures(BaseFeaturesExtractor):
    """Per pathway: its own statistics, its depth as waves, the user embedding, mean and maximum of the statistics.

    Args:
        observation_space: ``Dict`` of ``user`` ``[E]`` and ``pathways`` ``[P, S]``.
    """

    def __init__(self, observation_space: gym.spaces.Dict) -> None:
        (pathways, statistics), (embedding,) = (observation_space[k].shape or () for k in ("pathways", "user"))
        self.own = statistics + 2 * WAVES
        self.shape = (pathways, self.own + embedding + 2 * statistics)
        super().__init__(observation_space, features_dim=self.shape[0] * self.shape[1])

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """``[B, P * (3 S + 2 WAVES + E)]``."""
        own = observations["pathways"]
        angles = own[..., NAMES.index("depth")][..., None] * torch.arange(1, WAVES + 1, device=own.device) * math.pi
        shared = torch.cat([observations["user"], own.mean(1), own.amax(1)], 1)
        return torch.cat([own, angles.cos(), angles.sin(), shared[:, None].expand(-1, own.shape[1], -1)], -1).flatten(1)


class PathwayScorer(nn.Module):
    """One small network scores every pathway, so that it serves any number of them; another one values the user.

    Args:
        pathways: P. width: of one pathway's features. own: how many of them come first and are the pathway's own.
        hidden: width of both networks' two hidden layers.
    """

    def __init__(self, pathways: int, width: int, own: int, hidden: int) -> None:
        super().__init__()
        self.pathways, self.own = pathways, own
        self.latent_dim_pi, self.latent_dim_vf = pathways, hidden
        self.score = nn.Sequential(*create_mlp(width, 1, [hidden, hidden], nn.Tanh))
        self.value = nn.Sequential(*create_mlp(width - own, hidden, [hidden], nn.Tanh), nn.Tanh())

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[B, P]`` and what the value is read from ``[B, hidden]``."""
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: Tensor) -> Tensor:
        """Logits ``[B, P]``."""
        return self.score(features.unflatten(1, (self.pathways, -1)))[..., 0]

    def forward_critic(self, features: Tensor) -> Tensor:
        """``[B, hidden]`` from what is the same for all pathways: embedding, mean and maximum."""
        return self.value(features.unflatten(1, (self.pathways, -1))[:, 0, self.own :])


class Departure(nn.Module):
    """Adds learned logits ``[P]``, the same for every user."""

    def __init__(self, start: Sequence[float]) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.tensor(start))

    def forward(self, logits: Tensor) -> Tensor:
        """``[B, P]``."""
        return logits + self.start


class GatingPolicy(MultiInputActorCriticPolicy):
    """The shared scorer as an actor-critic policy for Stable-Baselines3.

    ``logit_p = f(embedding, statistics of p, mean and maximum over pathways of the statistics)``, with one ``f`` for
    all pathways.

    Args:
        args, kwargs: as for SB3's ``MultiInputPolicy``.
        hidden: width of the hidden layers.
        initial_logit: where every pathway's logit starts; below zero, training starts with few pathways on, and those
            that make no difference stay off.
        start: ``[P]`` logits to which the scorer's are added, learned along: a mask to depart from; None for none.
    """

    def __init__(
        self,
        *args: Any,
        hidden: int = 128,
        initial_logit: float = 0.0,
        start: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.hidden, self.initial_logit, self.start = hidden, initial_logit, start
        super().__init__(*args, **{**kwargs, "features_extractor_class": PathwayFeatures})

    def _build_mlp_extractor(self) -> None:
        features = self.features_extractor
        assert isinstance(features, PathwayFeatures)
        pathways, width = features.shape
        self.mlp_extractor = PathwayScorer(pathways, width, features.own, self.hidden)  # type: ignore[assignment]

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        # The scorer's output already is one logit per pathway.
        self.action_net = nn.Identity() if self.start is None else Departure(self.start)  # type: ignore[assignment]
        assert isinstance(self.mlp_extractor, PathwayScorer)
        last = self.mlp_extractor.score[-1]
        assert isinstance(last, nn.Linear)
        nn.init.orthogonal_(last.weight, 0.01)
        nn.init.constant_(last.bias, self.initial_logit)
        self.optimizer = self.optimizer_class(
            self.parameters(),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )


POLICIES: dict[str, str | type[GatingPolicy]] = {"GatingPolicy": GatingPolicy, "MultiInputPolicy": "MultiInputPolicy"}
"""What ``policy`` may be in the hyperparameters: ours, or SB3's own network on the flattened observation."""

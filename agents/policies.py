"""Gating policies: from an observation to one probability per pathway.

Shapes: B observations, P pathways, S statistics, E width of the user embedding.
"""

import math
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import torch
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from torch import Tensor, nn

from agents.budget import AtMost
from envs.statistics import NAMES

WAVES = 4
"""A pathway's depth is shown to the scorer as this many cosines and sines as well: where it is matters sharply."""

WEIGHT_SCALE = 10.0
"""Cost weights are about a tenth; the network sees them about one."""


class PathwayFeatures(BaseFeaturesExtractor):
    """Per pathway: its statistics, its depth as waves, the user embedding, mean and maximum of the statistics.

    Where the observation tells them: the cost weight, and whether it is this pathway's turn.

    Args:
        observation_space: ``Dict`` of ``user`` ``[E]`` and ``pathways`` ``[P, S]``, ``cost_weight`` ``[1]``, ``turn`` ``[P]``.
    """

    def __init__(self, observation_space: gym.spaces.Dict) -> None:
        (pathways, statistics), (embedding,) = (observation_space[k].shape or () for k in ("pathways", "user"))
        self.own = statistics + 2 * WAVES + ("turn" in observation_space.spaces)
        self.shape = (pathways, self.own + embedding + 2 * statistics + ("cost_weight" in observation_space.spaces))
        super().__init__(observation_space, features_dim=self.shape[0] * self.shape[1])

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """``[B, P * width]``, each pathway's own features first."""
        seen = observations["pathways"]
        angles = seen[..., NAMES.index("depth")][..., None] * torch.arange(1, WAVES + 1, device=seen.device) * math.pi
        own = [seen, angles.cos(), angles.sin()]
        shared = [observations["user"], seen.mean(1), seen.amax(1)]
        if "cost_weight" in observations:
            shared.append(WEIGHT_SCALE * observations["cost_weight"])
        if "turn" in observations:
            own.append(observations["turn"][..., None])
        common = torch.cat(shared, 1)[:, None].expand(-1, seen.shape[1], -1)
        return torch.cat([*own, common], -1).flatten(1)


class Departure(nn.Module):
    """Learned logits, the same for every user: ``start`` ``[K, P]`` at rising cost weights ``at`` ``[K]``, linear between them.

    One row holds for every weight.
    """

    at: Tensor

    def __init__(self, start: Tensor, at: Tensor) -> None:
        super().__init__()
        self.start = nn.Parameter(start)
        self.register_buffer("at", at, persistent=False)

    def forward(self, weights: Tensor) -> Tensor:
        """``[B, P]`` for cost weights ``[B]``; beyond the first and the last it is theirs."""
        if len(self.at) == 1:
            return self.start.expand(len(weights), -1)
        right = torch.searchsorted(self.at, weights.contiguous()).clamp(1, len(self.at) - 1)
        share = (weights - self.at[right - 1]) / (self.at[right] - self.at[right - 1])
        return torch.lerp(self.start[right - 1], self.start[right], share.clamp(0, 1)[:, None])


class PathwayScorer(nn.Module):
    """One small network scores every pathway, so that it serves any number of them; another one values the user.

    Args:
        pathways: P. width: of one pathway's features. own: how many of them come first and are the pathway's own.
        hidden: width of both networks' two hidden layers.
        by_turn: give the logit of the pathway whose turn it is (the last of its own features) instead of all.
        departure: what is added to the logits; None: nothing.
    """

    def __init__(
        self, pathways: int, width: int, own: int, hidden: int, by_turn: bool, departure: Departure | None = None
    ) -> None:
        super().__init__()
        self.pathways, self.own, self.by_turn = pathways, own, by_turn
        self.latent_dim_pi, self.latent_dim_vf = 1 if by_turn else pathways, hidden
        self.score = nn.Sequential(*create_mlp(width, 1, [hidden, hidden], nn.Tanh))
        self.value = nn.Sequential(*create_mlp(width - own, hidden, [hidden], nn.Tanh), nn.Tanh())
        self.departure = departure

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[B, P]`` and what the value is read from ``[B, hidden]``."""
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: Tensor) -> Tensor:
        """Logits ``[B, P]``, or ``[B, 1]`` by turn."""
        each = features.unflatten(1, (self.pathways, -1))
        logits = self.score(each)[..., 0]
        if self.departure is not None:
            logits = logits + self.departure(each[:, 0, -1] / WEIGHT_SCALE)  # read by one that varies with it only
        return (logits * each[..., self.own - 1]).sum(1, keepdim=True) if self.by_turn else logits

    def forward_critic(self, features: Tensor) -> Tensor:
        """``[B, hidden]`` from what is the same for all pathways: embedding, mean, maximum and cost weight."""
        return self.value(features.unflatten(1, (self.pathways, -1))[:, 0, self.own :])


class GatingPolicy(MultiInputActorCriticPolicy):
    """The shared scorer as an actor-critic policy for Stable-Baselines3.

    ``logit_p = f(embedding, statistics of p, mean and maximum over pathways of the statistics)``, with one ``f`` for
    all pathways.

    Args:
        args, kwargs: as for SB3's ``MultiInputPolicy``.
        hidden: width of the hidden layers.
        initial_logit: where every pathway's logit starts; below zero, training starts with few pathways on, and those
            that make no difference stay off.
        start: ``[P]`` logits to which the scorer's are added, learned along: a mask to depart from; None for none. Where the
            cost weight varies ``[K, P]``, a mask for each of some weights.
        start_at: these weights ``[K]``, rising.
        max_active: an exact budget, see :class:`agents.budget.AtMost`; None for none. May be set later as well.

    Where the observation has a ``turn``, the one bit asked for is that pathway's (the last feature of its own).
    """

    def __init__(
        self,
        *args: Any,
        hidden: int = 128,
        initial_logit: float = 0.0,
        start: Sequence[float] | Sequence[Sequence[float]] | None = None,
        start_at: Sequence[float] = (0.0,),
        max_active: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.hidden, self.initial_logit, self.start, self.max_active = hidden, initial_logit, start, max_active
        self.start_at = start_at
        super().__init__(*args, **{**kwargs, "features_extractor_class": PathwayFeatures})
        if "turn" in self.observation_space.spaces:  # type: ignore[attr-defined]
            for name, value in (("max_active", max_active), ("start", start)):
                if value is not None:
                    raise ValueError(f"{name} needs the scores of all pathways at once; leave it out where steps decide one.")

    def _get_action_dist_from_latent(self, latent_pi: Tensor) -> Distribution:
        logits = self.action_net(latent_pi)
        if self.max_active is None:
            return self.action_dist.proba_distribution(action_logits=logits)
        return AtMost(logits.shape[1], self.max_active).proba_distribution(logits)

    def _build_mlp_extractor(self) -> None:
        features = self.features_extractor
        assert isinstance(features, PathwayFeatures)
        pathways, width = features.shape
        by_turn = "turn" in self.observation_space.spaces  # type: ignore[attr-defined]
        departure = None if self.start is None else self._departure(self.start)
        scorer = PathwayScorer(pathways, width, features.own, self.hidden, by_turn, departure)
        self.mlp_extractor = scorer  # type: ignore[assignment]

    def _departure(self, start: Any) -> Departure:
        rows, at = torch.atleast_2d(torch.tensor(start)), torch.tensor(self.start_at)
        if len(rows) != len(at) or (at.diff() <= 0).any():
            raise ValueError(f"start has {len(rows)} rows, start_at {self.start_at}: give one rising cost weight for each row.")
        if len(at) > 1 and "cost_weight" not in self.observation_space.spaces:  # type: ignore[attr-defined]
            raise ValueError("start has a mask per cost weight, but observations show none; give one mask, or vary the weight.")
        return Departure(rows, at)

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_net = nn.Identity()  # type: ignore[assignment]  # the scorer's output already is one logit per pathway
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

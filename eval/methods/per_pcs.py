"""``per_pcs``: a user's adapters put together from those of others, without a gradient step.

Shapes: U users, N examples per user, P pathways, S sharers, C classes, k pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn.functional import layer_norm, one_hot

from agents.rivals import best_threshold, some_train_users
from backbones.pathways import Pathways, Weights
from envs.oracles import Plans
from envs.statistics import CLIP
from eval.group import Group
from eval.methods.base import Fitted, Method, Predictor, Sizes
from eval.methods.pathway import PathwayPredictor
from eval.world import World
from meta.inner import adapt, measure
from users.batch import Batch

CHUNK = 16
"""Sharers, and val users, looked at together."""
ENTRY = 8
"""Bytes of a piece that a user keeps: the sharer's number and its weight."""


@dataclass(frozen=True)
class PerPcs(Method):
    """Tan et al. 2024, "Personalized Pieces: Efficient personalized large language models through collaborative efforts".

    Some train users share their adapters. A new user gets in each pathway the weighted average of the pieces whose sharers
    are most like them there; who is like whom is seen in what the pathway reads.

    Kept: sharers are found by k-means on user embeddings; the score of a piece is the mean over the user's examples of
    ``norm(x) . norm(g) / sqrt(width)``, ``norm`` being a layer norm; the top k are averaged, every matrix by itself, with the
    softmax of their scores. Not kept: ``g`` is no gate trained on the sharer's examples but the mean of what the pathway reads
    of them, one per label (there, a text's states know its label) and relative to all sharers; sharers are the users nearest
    to the centres, not the most active; their adapters start from the meta-initialisation and are adapted on support and query
    examples with everything on. Ours is that a pathway whose best piece scores below a threshold stays off; it is chosen
    per cost weight by the mean query reward of val users.

    Attributes:
        sharers: S at most; those whose adapters diverge share nothing. top: k at most. temperature: of the softmax.
    """

    sharers: int = 10
    top: int = 3
    temperature: float = 1.0

    scope: ClassVar[str] = "mask per user, amortised"
    trades: ClassVar[bool] = True
    space: ClassVar = {"sharers": (3, 5, 10, 20), "top": (1, 2, 3, 5), "temperature": (0.1, 0.3, 1.0, 3.0)}

    def fit(self, world: World, cost_weight: float) -> Fitted:
        """See :meth:`Method.fit`: pieces, what is known of them, and the threshold."""
        chosen, roles = self._sharers(world), [world.data.part("train", role) for role in ("support", "query")]
        shown = [Batch.joined(*(part.rows(some) for part in roles)) for some in chosen.split(CHUNK)]
        pieces = _pieces(world, shown)
        sound = torch.stack([piece.flatten(1).isfinite().all(1) for piece in pieces.values()]).all(0)
        if not sound.any():
            raise FloatingPointError("the adapters of every sharer diverged; meta-train with a smaller inner_rate.")
        tensors = {name: tensor[sound] for name, tensor in {"sharers": chosen, **pieces}.items()}
        tensors |= _described(world, shown, sound)
        threshold = self._threshold(world, Fitted(tensors), cost_weight)
        return Fitted({**tensors, "threshold": torch.tensor(threshold, dtype=torch.float64)})

    def _sharers(self, world: World) -> Tensor:
        """Who shares: positions ``[S]`` among train users, in order."""
        known = world.scenario
        users = some_train_users(known, np.random.default_rng(world.seed))
        points = np.asarray(known.embeddings[users], dtype=np.float64)
        count = min(self.sharers, len(np.unique(points, axis=0)))
        centres = KMeans(count, n_init=10, random_state=world.seed).fit(points).cluster_centers_
        nearest = np.square(points[:, None] - centres).sum(-1).argmin(0)
        return torch.from_numpy(np.unique(users[nearest]) - known.users("train")[0])

    def _threshold(self, world: World, fitted: Fitted, cost_weight: float) -> float:
        support, query = (world.data.part("val", role) for role in ("support", "query"))
        chunks = torch.arange(len(support)).split(CHUNK)
        found = [self._assembled(world, fitted, support.rows(some)) for some in chunks]

        def reward(masks: Plans) -> float:
            cost = float(world.pathways.costs(torch.from_numpy(masks)).mean())
            gates = torch.from_numpy(masks).split(CHUNK)
            each = [
                measure(world.pathways, weights, mine, query.rows(some))[0]
                for (weights, _, _), mine, some in zip(found, gates, chunks, strict=True)
            ]
            return float(torch.cat(each).double().mean()) - cost_weight * cost

        return best_threshold(torch.cat([best for _, best, _ in found]).double().numpy(), reward, "threshold of pieces")

    def adapt(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Predictor:
        """See :meth:`Method.adapt`."""
        weights, best, kept = self._assembled(world, fitted, shown.batch)
        return Assembled(world.pathways, weights, best.double() >= fitted.tensors["threshold"], kept)

    def _assembled(self, world: World, fitted: Fitted, support: Batch) -> tuple[Weights, Tensor, int]:
        """Averaged pieces of U users, the best score in each pathway ``[U, P]``, and k."""
        pathways, known = world.pathways, fitted.tensors
        scores = torch.stack([_scores(world, known, support, p) for p in range(pathways.num_pathways)], 1)
        kept = min(self.top, scores.shape[-1])
        best, who = scores.topk(kept, dim=-1)
        shares = torch.zeros_like(scores).scatter(-1, who, (best / self.temperature).softmax(-1))
        weights = {
            key: (shares[:, p] @ known[f"piece/{key}"].flatten(1)).unflatten(1, known[f"piece/{key}"].shape[1:])
            for p, keys in pathways.keys.items()
            for key in keys
        }
        return weights, best[..., 0], kept


class Assembled(PathwayPredictor):
    """U users' averages of shared pieces: nobody is adapted, and what a user keeps is k entries per active pathway.

    Args:
        pathways: along the model. weights: the averages, stacked. masks: ``[U, P]`` bool. kept: k.
    """

    def __init__(self, pathways: Pathways, weights: Weights, masks: Tensor, kept: int) -> None:
        super().__init__(pathways, weights, masks, torch.zeros(masks.shape[1], dtype=torch.bool), adaptations=0)
        self.kept = kept

    @property
    def sizes(self) -> Sequence[Sizes]:
        """See :attr:`Predictor.sizes`: the pieces themselves are everybody's."""
        mine = self.masks.sum(1).tolist()
        return [
            Sizes(size.trainable, size.active, size.stored + ENTRY * self.kept * on)
            for size, on in zip(super().sizes, mine, strict=True)
        ]


def _pieces(world: World, shown: Sequence[Batch]) -> dict[str, Tensor]:
    """The sharers' weights, adapted with everything on."""
    found = []
    for batch in shown:
        on = torch.ones(len(batch), world.pathways.num_pathways, dtype=torch.bool)
        found.append(adapt(world.pathways, world.init, batch, on))
    return {f"piece/{key}": torch.cat([weights[key] for weights in found]) for key in found[0]}


def _described(world: World, shown: Sequence[Batch], sound: Tensor) -> dict[str, Tensor]:
    """What each pathway reads of each class: the ``sound`` sharers' ``centre/p [C, width_p]``, and ``gate/p [S, C, width_p]``.

    Gates are what a sharer has beyond the centre, normalised; zero, which scores nothing, for a class that they lack.
    """
    found: dict[str, Tensor] = {}
    for p in range(world.pathways.num_pathways):
        sums, counts = (torch.cat(parts)[sound] for parts in zip(*(_sums(world, batch, p) for batch in shown), strict=True))
        means, present = sums / counts.clamp_min(1e-12), counts > 0
        centre = (means * present).sum(0) / present.sum(0).clamp_min(1)
        gates = layer_norm((means - centre) * present, means.shape[-1:])
        found |= {f"centre/{p}": centre, f"gate/{p}": gates}
    return found


def _read(world: World, batch: Batch, p: int) -> Tensor:
    """What a pathway reads of every example, ``[U, N, width_p]``, in standard deviations of train users' examples, clipped."""
    mean, scale = world.look.of.sites[p]
    return ((world.pathways.pool(p, batch.frozen) - mean) / scale).clamp(-CLIP, CLIP)


def _by_class(world: World, batch: Batch) -> Tensor:
    """``[U, C, N]``: the weight of each example in the row of its label."""
    return (one_hot(batch.labels, world.model.num_classes) * batch.weights[..., None]).transpose(1, 2)


def _sums(world: World, batch: Batch, p: int) -> tuple[Tensor, Tensor]:
    """Weighted sums ``[U, C, width_p]`` of what a pathway reads by label, and the weights ``[U, C, 1]``."""
    classes = _by_class(world, batch)
    return classes @ _read(world, batch, p), classes.sum(2, keepdim=True)


def _scores(world: World, known: dict[str, Tensor], support: Batch, p: int) -> Tensor:
    """How alike users and sharers are in a pathway, ``[U, S]``."""
    read = _read(world, support, p) - known[f"centre/{p}"][support.labels]
    mine = _by_class(world, support) @ layer_norm(read, read.shape[-1:])
    return torch.einsum("ucw,scw->us", mine, known[f"gate/{p}"]) / read.shape[-1] ** 0.5

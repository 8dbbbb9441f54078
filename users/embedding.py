"""What is known of a user from the support set alone, as one vector of the same width for every population."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backbones.base import PopulationModel
from backbones.pathways import population_logits
from backbones.registry import did_you_mean
from users.batch import Batch

WIDTH = 32
"""E, the width of a user embedding, whatever the population or the backbone."""
CLIP = 5.0
"""Embeddings are clipped to +- this many standard deviations of the users it was fitted on."""


PARTS = ("features", "labels", "predictions", "prototypes", "scores")
"""What an embedding may be made of:

* ``features``: mean and standard deviation of the readout features;
* ``labels``: shares of the labels;
* ``predictions``: mean predicted probabilities of the population model;
* ``prototypes``: how each class's mean lies relative to the mean of all, through a fixed random projection to 64 numbers;
* ``scores``: loss, accuracy, mean confidence and mean entropy of the population model, never compressed.
"""
DEFAULT = ("features", "labels", "predictions", "scores")
"""Prototypes add nothing beside the others (docs/embedding.md)."""
PROJECTED = 64
SCORES = 4


def support_features(model: PopulationModel, support: Batch, parts: Sequence[str] = DEFAULT) -> tuple[Tensor, Tensor]:
    """Raw facts about each user's support set, seen through the population model.

    Args:
        model: the frozen model.
        support: U users' support examples.
        parts: names from :data:`PARTS`.

    Returns:
        ``[U, D]``, the parts to compress, side by side, and the scores ``[U, 4]`` (zero if they are not asked for).

    Raises:
        ValueError: for an unknown part, with a suggestion, or none.
    """
    check_parts(parts)
    weights = support.weights[..., None]
    features = support.frozen.sites[-1]
    probabilities = population_logits(model, support.frozen).softmax(-1)
    truth = torch.nn.functional.one_hot(support.labels, model.num_classes)
    mean = (features * weights).sum(1)
    found = []
    if "features" in parts:
        found += [mean, ((features - mean[:, None]).square() * weights).sum(1).sqrt()]
    if "labels" in parts:
        found.append((truth * weights).sum(1))
    if "predictions" in parts:
        found.append((probabilities * weights).sum(1))
    if "prototypes" in parts:
        found.append(_prototypes(features - mean[:, None], truth * weights))
    described = torch.cat(found, 1) if found else mean.new_zeros(len(mean), 1)
    logs = probabilities.clamp_min(1e-8).log()
    right = (probabilities.argmax(-1) == support.labels).float()
    each = torch.stack([-(logs * truth).sum(-1), right, probabilities.amax(-1), -(logs * probabilities).sum(-1)], -1)
    return described, (each * weights).sum(1) * ("scores" in parts)


def check_parts(parts: Sequence[str]) -> None:
    """Raise ``ValueError`` for an unknown part, with a suggestion, or none at all."""
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"unknown part of the embedding {part!r}. {did_you_mean(part, PARTS)}")
    if not parts:
        raise ValueError(f"an embedding needs at least one part of {', '.join(PARTS)}.")


def _prototypes(features: Tensor, weights: Tensor) -> Tensor:
    """Each class's mean of centred features (zero where the user has no example of it), projected: ``[U, PROJECTED]``."""
    means = (weights.transpose(1, 2) @ features) / weights.sum(1)[..., None].clamp_min(1e-12)
    flat = means.flatten(1)
    projection = torch.randn(flat.shape[1], PROJECTED, generator=torch.Generator().manual_seed(0))
    return flat @ projection / flat.shape[1] ** 0.5


@dataclass(frozen=True)
class UserEmbedder:
    """Support sets to embeddings: 28 principal components of the raw facts, then the 4 scores, standardised.

    The first component has unit variance; the others keep theirs relative to it, because blowing up the small ones, which
    are mostly noise, makes policies learn train users by heart.

    Built by :meth:`fit` on the users of one split (``observed_on``: train, or val alone); narrower raw facts or fewer users
    leave trailing components zero.

    Attributes:
        model: the frozen population model.
        mean, scale: of the raw facts over these users.
        axes: ``[D, 28]`` principal directions, scaled so that the first component has unit variance.
        score_mean, score_scale: of the 4 scores.
        parts: what it is made of, names from :data:`PARTS`.
    """

    model: PopulationModel
    mean: Tensor
    scale: Tensor
    axes: Tensor
    score_mean: Tensor
    score_scale: Tensor
    parts: tuple[str, ...] = DEFAULT

    @staticmethod
    def fit(model: PopulationModel, support: Batch, parts: Sequence[str] = DEFAULT) -> "UserEmbedder":
        """Fit on the support sets of train users, or whom ``observed_on`` names."""
        described, scores = support_features(model, support, parts)
        mean, scale = described.mean(0), described.std(0, correction=0).clamp_min(1e-6)
        _, singular, right = torch.linalg.svd((described - mean) / scale, full_matrices=False)
        kept = int((singular > singular.max() * 1e-4).sum())
        axes = torch.zeros(described.shape[1], WIDTH - SCORES)
        kept = min(kept, axes.shape[1])
        axes[:, :kept] = right[:kept].T * len(support) ** 0.5 / singular[0].clamp_min(1e-12)
        spread = scores.std(0, correction=0).clamp_min(1e-6)
        return UserEmbedder(model, mean, scale, axes, scores.mean(0), spread, tuple(parts))

    def embed(self, support: Batch) -> Tensor:
        """``[U, WIDTH]``, within +-``CLIP``."""
        described, scores = support_features(self.model, support, self.parts)
        components = ((described - self.mean) / self.scale) @ self.axes
        return torch.cat([components, (scores - self.score_mean) / self.score_scale], 1).clamp(-CLIP, CLIP)

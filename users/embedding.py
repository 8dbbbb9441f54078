"""What is known of a user from the support set alone, as one vector of the same width for every population."""

from dataclasses import dataclass

import torch
from torch import Tensor

from backbones.base import PopulationModel
from backbones.pathways import population_logits
from users.batch import Batch

WIDTH = 32
"""E, the width of a user embedding, whatever the population or the backbone."""
CLIP = 5.0
"""Embeddings are clipped to +- this many standard deviations of train users."""


def support_features(model: PopulationModel, support: Batch) -> tuple[Tensor, Tensor]:
    """Raw facts about each user's support set, seen through the population model.

    Args:
        model: the frozen model.
        support: U users' support examples.

    Returns:
        ``[U, 2 F + 2 C]``: mean and standard deviation of the readout features, shares of the labels, mean predicted
        probabilities; and ``[U, 4]``: the model's loss, accuracy, mean confidence and mean entropy there.
    """
    weights = support.weights[..., None]
    features = support.frozen.sites[-1]
    probabilities = population_logits(model, support.frozen).softmax(-1)
    truth = torch.nn.functional.one_hot(support.labels, model.num_classes)
    mean = (features * weights).sum(1)
    spread = ((features - mean[:, None]).square() * weights).sum(1).sqrt()
    described = torch.cat([mean, spread, (truth * weights).sum(1), (probabilities * weights).sum(1)], 1)
    logs = probabilities.clamp_min(1e-8).log()
    right = (probabilities.argmax(-1) == support.labels).float()
    each = torch.stack([-(logs * truth).sum(-1), right, probabilities.amax(-1), -(logs * probabilities).sum(-1)], -1)
    return described, (each * weights).sum(1)


@dataclass(frozen=True)
class UserEmbedder:
    """Support sets to embeddings: 28 principal components of the raw facts, then the 4 scores, standardised.

    The first component has unit variance; the others keep theirs relative to it, because blowing up the small ones, which
    are mostly noise, makes policies learn train users by heart.

    Built by :meth:`fit` on train users only; narrower raw facts or fewer users leave trailing components zero.

    Attributes:
        model: the frozen population model.
        mean, scale: of the raw facts over train users.
        axes: ``[2 F + 2 C, 28]`` principal directions, scaled so that the first component has unit variance.
        score_mean, score_scale: of the 4 scores.
    """

    model: PopulationModel
    mean: Tensor
    scale: Tensor
    axes: Tensor
    score_mean: Tensor
    score_scale: Tensor

    @staticmethod
    def fit(model: PopulationModel, support: Batch) -> "UserEmbedder":
        """Fit on the support sets of train users."""
        described, scores = support_features(model, support)
        mean, scale = described.mean(0), described.std(0, correction=0).clamp_min(1e-6)
        _, singular, right = torch.linalg.svd((described - mean) / scale, full_matrices=False)
        kept = int((singular > singular.max() * 1e-4).sum())
        axes = torch.zeros(described.shape[1], WIDTH - scores.shape[1])
        kept = min(kept, axes.shape[1])
        axes[:, :kept] = right[:kept].T * len(support) ** 0.5 / singular[0]
        return UserEmbedder(model, mean, scale, axes, scores.mean(0), scores.std(0, correction=0).clamp_min(1e-6))

    def embed(self, support: Batch) -> Tensor:
        """``[U, WIDTH]``, within +-``CLIP``."""
        described, scores = support_features(self.model, support)
        components = ((described - self.mean) / self.scale) @ self.axes
        return torch.cat([components, (scores - self.score_mean) / self.score_scale], 1).clamp(-CLIP, CLIP)

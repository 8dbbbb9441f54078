"""People who share a few items, and a model that has no opinion of them."""

import numpy as np
import torch

from backbones.base import PopulationModel
from backbones.pathways import make_pathways
from backbones.resnet import small_resnet
from users.base import SPLITS, Examples, Population, User
from users.batch import Prepared
from users.items import TensorItems

ITEMS = 20


def flat_model(classes=2, slope=0.0):
    """A model whose logits are zero, or (with a slope) follow from the image."""
    torch.manual_seed(0)
    backbone = small_resnet(classes, image_size=4, widths=(4,), depth=1).backbone
    weight = slope * torch.randn(classes, backbone.feature_width)
    return PopulationModel(backbone, weight, torch.zeros(classes))


def population(label, users=(30, 12, 16), classes=2, sizes=(6, 3, 8), seed=0):
    """Users whose labels are ``label(rng, user, items)``; ragged: every third has one support example less."""
    rng = np.random.default_rng(seed)

    def user(name, number):
        known, checked, _ = sizes
        places = rng.permutation(ITEMS)[: sum(sizes)]
        labels = np.asarray(label(rng, number, places))
        cuts = np.split(np.arange(sum(sizes)), [known, known + checked])
        cuts[0] = cuts[0][: known - (number % 3 == 0)]
        return User(name, *(Examples(torch.from_numpy(places[c]), torch.from_numpy(labels[c])) for c in cuts))

    split = {s: tuple(user(f"{s}{n}", n) for n in range(count)) for s, count in zip(SPLITS, users, strict=True)}
    images = torch.rand(ITEMS, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return Population("toy", classes, **split, items=TensorItems(images))


def seen_through(population, model=None):
    return Prepared(make_pathways("side", model or flat_model(population.num_classes), 2), population)


def biased(rng, number, items):
    """Mostly one label."""
    return ((rng.random(len(items)) < 0.8) == (number % 2)).astype(np.int64)


LOADINGS = np.where(np.arange(ITEMS) % 3 == 0, -1.5, 1.5)


def one_factor(rng, number, items):
    """A taste that is one number: who likes one half of the items dislikes the other."""
    return (rng.normal() * LOADINGS[items] + rng.normal(0, 0.4, len(items)) > 0).astype(np.int64)


def dense(label=one_factor, seed=0):
    """So many labels that items' covariances can be told."""
    return population(label, users=(200, 20, 40), sizes=(8, 4, 8), seed=seed)

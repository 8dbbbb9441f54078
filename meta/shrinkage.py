"""How far a few examples may move a user: shrinkage towards the shared start, chosen on val users.

A mean loss of one example has a gradient as large as that of a hundred, and says much less. So the inner loss of a user with n
examples is weighted ``scale * n / (n + prior)``: what the mean of n observations counts for beside a prior worth ``prior`` of
them, the empirical Bayes estimate of Efron and Morris 1973, "Stein's estimation rule and its competitors".

Shapes: U users, S numbers of examples, G factors.
"""

from dataclasses import replace
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from backbones.pathways import Pathways
from meta.inner import MetaInit, adapted_accuracy
from meta.masks import sample_masks
from users.batch import Batch

USERS = 100
"""Val users who are asked; the first of them."""
SIZES = (1, 2, 5, 10, 20, 50, 100, 200)
"""Of a user's support examples so many are shown, and all."""
FACTORS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0)
"""By which the inner loss is weighted where accuracies are measured; those between are read off a line."""
SCALES = (1.0, 0.5, 0.7, 1.4, 2.0, 2.8)
PRIORS = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0)


def shrunk(pathways: Pathways, init: MetaInit, support: Batch, query: Batch) -> MetaInit:
    """The meta-initialisation with the scale (its rates are multiplied by it) and the prior that val users do best with.

    Best is the highest query accuracy, averaged over :data:`SIZES` (and over the mask with everything on and random ones). Of
    equal ones the first is taken, which changes nothing.

    Args:
        pathways: as in :func:`meta.inner.adapt`.
        init: as it was learned, from whole supports.
        support: of U val users.
        query: theirs.
    """
    counts = (support.weights > 0).sum(1)
    sizes = [size for size in SIZES if size < int(counts.max())] + [int(counts.max())]
    found = accuracies(pathways, init, support, query, sizes)
    shown = np.minimum(counts.numpy()[:, None], sizes).mean(0)
    choices = list(product(PRIORS, SCALES))
    worth = [_read(found, scale * shown / (shown + prior)).mean() for prior, scale in choices]
    prior, scale = choices[int(np.argmax(worth))]
    return replace(init, rates=init.rates * scale, prior=prior)


def accuracies(pathways: Pathways, init: MetaInit, support: Batch, query: Batch, sizes: list[int]) -> NDArray[np.float64]:
    """Mean query accuracy ``[S, G]`` of users who showed so many examples, their inner losses weighted by :data:`FACTORS`."""
    draw = torch.Generator().manual_seed(0)
    order = (torch.rand(support.weights.shape, generator=draw) - (support.weights > 0).float()).argsort(1)  # padding last
    masks = [torch.ones(len(support), pathways.num_pathways, dtype=torch.bool)]
    masks.append(sample_masks(len(support), pathways.num_pathways, draw, all_on=0.0))
    found = np.zeros((len(sizes), len(FACTORS)))
    grid = list(product(enumerate(sizes), enumerate(FACTORS)))
    for (row, size), (column, factor) in tqdm(grid, desc="shrinkage of few examples", unit="setting"):
        scaled, some = replace(init, rates=init.rates * factor, prior=0.0), first(support, order, size)
        each = [adapted_accuracy(pathways, scaled, some, query, gates) for gates in masks]
        found[row, column] = float(torch.stack(each).mean())
    return found


def first(batch: Batch, order: Tensor, size: int) -> Batch:
    """The first ``size`` examples of every user in an ``order`` ``[U, N]`` of columns that has padding last."""
    chosen = order[:, :size]
    present = (batch.weights.gather(1, chosen) > 0).float()
    index, labels = batch.index.gather(1, chosen), batch.labels.gather(1, chosen)
    return Batch(batch.table, index, labels, present / present.sum(1, keepdim=True).clamp_min(1))


def _read(found: NDArray[np.float64], factors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Accuracies ``[S]`` at one factor per number of examples, between those that were measured."""
    return np.array([np.interp(np.log(f), np.log(FACTORS), row) for f, row in zip(factors, found, strict=True)])

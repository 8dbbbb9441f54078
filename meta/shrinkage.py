"""How far examples may move a user: shrinkage towards the shared start and the number of inner steps, chosen on val users.

A mean loss of one example has a gradient as large as that of a hundred, and says much less. So the inner loss of a user with n
examples is weighted ``scale * n^k / (n^k + prior^k)``. With a sharpness k of 1 that is what the mean of n observations counts
for beside a prior worth ``prior`` of them, the empirical Bayes estimate of Efron and Morris 1973, "Stein's estimation rule and
its competitors"; a higher one (Hill's curve) holds few examples back for longer and lets many go sooner. Held back like this,
few examples might bear more steps than the start was trained with, so these are asked about as well.

Shapes: U users, S numbers of examples, G factors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from backbones.pathways import Pathways
from meta.inner import MetaInit, adapted_accuracy, adapted_along, share
from meta.masks import masks_for
from users.batch import Batch

USERS = 100
"""Val users who are asked; the first of them."""
SIZES = (1, 2, 5, 10, 20, 50, 100, 200)
"""Of a user's support examples so many are shown, and all."""
FACTORS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0)
"""By which the inner loss is weighted where accuracies are measured; those between are read off a line."""
SCALES = (1.0, 0.35, 0.5, 0.7, 1.4, 2.0, 2.8)
PRIORS = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
SHARPNESS = (1.0, 2.0)
REPEATS = (1, 2, 4)
"""How many times as many inner steps as were learned, each at its rate."""
PROMISING = 3
"""Of scales, priors and sharpnesses so many, by what was read off the line, are measured."""


def shrunk(pathways: Pathways, init: MetaInit, support: Batch, query: Batch, dense: bool = False) -> MetaInit:
    """The meta-initialisation with the scale (its rates are multiplied by it), prior, sharpness and steps best for val users.

    What is best, :func:`worth_of` says. Steps cost time: more of them have to be better than the best with fewer by a
    standard error of the paired difference (the rule of Breiman et al. 1984, "Classification and Regression Trees"; the part of
    the worth that is the same for all users, a mean loss, adds nothing to that error).

    Args:
        pathways: as in :func:`meta.inner.adapt`.
        init: as it was learned, from whole supports.
        support: of U val users.
        query: theirs.
        dense: whether users will have every pathway on, instead of masks of all kinds.
    """
    shown = Shown.of(pathways, init, support, query, dense)
    best, worth = init, worth_of(shown.gains(init)[0])
    with tqdm(total=len(FACTORS) + len(REPEATS) * PROMISING, desc="shrinkage of few examples", unit="setting") as bar:
        for repeats, promising in zip(REPEATS, shown.promising(init, bar), strict=True):
            for held in promising:
                tried = held.applied(replace(init, rates=init.rates.repeat(repeats, 1)))
                found = worth_of(shown.gains(tried)[0])
                bar.update()
                gain = found - worth
                if gain.mean() > (tried.steps > best.steps) * gain.std() / len(gain) ** 0.5:
                    best, worth = tried, found
    return best


@dataclass(frozen=True)
class Shrinkage:
    """By how much the inner loss of a user with n examples is weighted."""

    scale: float
    prior: float = 0.0
    sharpness: float = 1.0

    def weight(self, counts: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of users with so many examples, the same shape."""
        return self.scale * share(counts, self.prior, self.sharpness)

    def applied(self, init: MetaInit) -> MetaInit:
        """The start whose rates include the scale."""
        return replace(init, rates=init.rates * self.scale, prior=self.prior, sharpness=self.sharpness)


@dataclass(frozen=True)
class Shown:
    """Val users who show so many of their examples, in an order that is the same for every question.

    Attributes:
        pathways, support, query: of U users.
        order: ``[U, N]`` columns of the support, padding last.
        sizes: S numbers of examples.
        masks: ``[U, P]`` each; accuracies are averaged over them.
        base: accuracies of the bare model, ``[U]``.
    """

    pathways: Pathways
    support: Batch
    query: Batch
    order: Tensor
    sizes: tuple[int, ...]
    masks: tuple[Tensor, ...]
    base: NDArray[np.float64]

    @staticmethod
    def of(pathways: Pathways, init: MetaInit, support: Batch, query: Batch, dense: bool = False) -> "Shown":
        """Sizes up to the largest support, that one included; everything on, and (if not ``dense``) random masks."""
        draw, most = torch.Generator().manual_seed(0), int((support.weights > 0).sum(1).max())
        order = (torch.rand(support.weights.shape, generator=draw) - (support.weights > 0).float()).argsort(1)
        everything = torch.ones(len(support), pathways.num_pathways, dtype=torch.bool)
        masks = (everything,) if dense else (everything, masks_for(pathways, len(support), draw, all_on=0.0))
        base = adapted_accuracy(pathways, init, support, query, ~everything).double().numpy()
        return Shown(pathways, support, query, order, (*(size for size in SIZES if size < most), most), masks, base)

    def gains(self, init: MetaInit, repeats: Sequence[int] = (1,)) -> NDArray[np.float64]:
        """Accuracy on the query examples over the bare model's, of users who start at ``init``.

        After so many times its steps, which have to rise: ``[R, S, U]``.
        """
        sizes = []
        for size in self.sizes:
            some = first(self.support, self.order, size)
            each = [adapted_along(self.pathways, init, some, self.query, gates, repeats)[0] for gates in self.masks]
            sizes.append(torch.stack(each).double().mean(0).numpy() - self.base)
        return np.stack(sizes, 1)

    def promising(self, init: MetaInit, bar: tqdm) -> list[list["Shrinkage"]]:
        """For each of :data:`REPEATS` those worth most by gains at :data:`FACTORS` and on the line between them, best first."""
        counts = np.minimum((self.support.weights > 0).sum(1).numpy()[:, None], self.sizes).mean(0)
        columns = []
        for factor in FACTORS:
            columns.append(self.gains(Shrinkage(factor).applied(init), REPEATS).mean(2))
            bar.update()
        choices = [Shrinkage(*choice) for choice in product(SCALES, PRIORS, SHARPNESS)]
        return [_best(found, choices, counts) for found in np.stack(columns, 2)]


def worth_of(gains: NDArray[np.float64]) -> NDArray[np.float64]:
    """What gains ``[S, U]`` are worth, ``[U]``: the last as much as the way there, less the mean loss where it is largest."""
    way = gains[:-1].mean(0) if len(gains) > 1 else gains[-1]
    return (gains[-1] + way) / 2 + min(0.0, float(gains.mean(1).min()))


def first(batch: Batch, order: Tensor, size: int) -> Batch:
    """The first ``size`` examples of every user in an ``order`` ``[U, N]`` of columns that has padding last."""
    chosen = order[:, :size]
    present = (batch.weights.gather(1, chosen) > 0).float()
    index, labels = batch.index.gather(1, chosen), batch.labels.gather(1, chosen)
    return Batch(batch.table, index, labels, present / present.sum(1, keepdim=True).clamp_min(1))


def _best(found: NDArray[np.float64], choices: Sequence[Shrinkage], counts: NDArray[np.float64]) -> list[Shrinkage]:
    """The :data:`PROMISING` choices worth most, by gains ``[S, G]`` of users with so many examples, ``[S]``."""
    worth = [worth_of(_read(found, held.weight(counts))[:, None])[0] for held in choices]
    return [choices[place] for place in np.argsort(-np.array(worth), kind="stable")[:PROMISING]]


def _read(found: NDArray[np.float64], factors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gains ``[S]`` at one factor per number of examples, between those ``[S, G]`` that were measured."""
    return np.array([np.interp(np.log(f), np.log(FACTORS), row) for f, row in zip(factors, found, strict=True)])

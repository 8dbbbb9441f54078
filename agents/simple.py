"""Rivals that choose no mask: what a constant per user, or the items' covariance, already explains.

Both learn from train users, choose their one setting on val users' query examples, and see the same support labels of a
user as the policy does. Each is a few functions that can be asked about any labelled examples (the harness' methods do), and
one that gives accuracies on a split. Shapes: U users, N examples, M examples asked about, C classes, I items.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from backbones.base import PopulationModel
from backbones.pathways import population_logits
from users.base import ROLES, Population, User
from users.batch import Batch, Prepared

PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
NOISES = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
DENSE = 50
"""Mean labels per item among train users, from which items' covariances can be estimated."""

Array = NDArray[np.float64]


def simple_rivals(data: Prepared, split: str = "test") -> dict[str, tuple[Array, float]]:
    """Query accuracy ``[U]`` and cost in parameters of every simple rival that this population admits, by name."""
    share = data.population.num_classes / float(data.pathways.sizes.sum())
    found = {"intercept": (intercept(data, split), share)}
    if no_covariance(data.population) is None:
        found["item_covariance"] = (item_covariance(data, split), 0.0)
    return found


# A constant per class.


def intercept(data: Prepared, split: str = "test") -> Array:
    """The population model with one constant per class and user on its logits: the user's own bias and nothing else.

    Fitted on the support by penalised maximum likelihood; the penalty draws towards zero.
    """
    return _with_intercept(data, split, intercept_penalty(data)).double().numpy()


def intercept_penalty(data: Prepared) -> float:
    """The penalty under which val users' query examples are answered best."""
    accuracy = {p: _with_intercept(data, "val", p).mean() for p in PENALTIES}
    return max(accuracy, key=lambda p: accuracy[p])


def constants(model: PopulationModel, support: Batch, penalty: float) -> Tensor:
    """What every user's support adds to the population model's logits, ``[U, 1, C]``.

    One optimiser serves all U users and stops when their sum does: under weak penalties a constant may differ by some
    hundredths with the company. Ask for one user at a time where that matters.
    """
    known = population_logits(model, support.frozen)
    present = (support.weights > 0).float()
    found = torch.zeros(len(support), 1, model.num_classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([found], max_iter=100, line_search_fn="strong_wolfe")

    @torch.enable_grad()
    def objective() -> Tensor:
        optimiser.zero_grad()
        losses = functional.cross_entropy((known + found).flatten(0, 1), support.labels.flatten(), reduction="none")
        total = (losses.view(support.labels.shape) * present).sum() + penalty / 2 * found.square().sum()
        total.backward()
        return total

    optimiser.step(objective)
    return found.detach()


def _with_intercept(data: Prepared, split: str, penalty: float) -> Tensor:
    model, support, query = data.pathways.model, data.readouts(split, "support"), data.readouts(split, "query")
    found = (population_logits(model, query.frozen) + constants(model, support, penalty)).argmax(-1)
    return ((found == query.labels) * query.weights).sum(1)


# The items' covariance.


def no_covariance(population: Population) -> str | None:
    """Why the items' covariance cannot be had from this population; None: it can."""
    if population.items is None:
        return f"users of {population.name!r} share no items, so there is nothing whose covariance could be estimated."
    if population.num_classes != 2:
        return f"labels of {population.name!r} are of {population.num_classes} classes; a Gaussian stands for two, 0 and 1."
    labels = sum(len(getattr(user, role)) for user in population.train for role in ROLES)
    if labels < DENSE * len(population.items):
        mean = labels / len(population.items)
        return f"train users of {population.name!r} gave {mean:.1f} labels per item; covariances need at least {DENSE}."
    return None


def item_covariance(data: Prepared, split: str = "test") -> Array:
    """A Gaussian over all items' labels, conditioned on those of the support; no text is read.

    The noise added to the observed labels is chosen on val users.

    Source: the Gaussian model of collaborative filtering, as in Goldberg et al. 2001 (who take its principal components).
    """
    mean, covariance = label_moments(data.population)
    noise = observation_noise(data.population, mean, covariance)
    return _conditioned(mean, covariance, getattr(data.population, split), noise)


def label_moments(population: Population) -> tuple[Array, Array]:
    """Mean ``[I]`` and covariance ``[I, I]`` of all train users' labels, every pair of items from those who labelled both."""
    table = np.full((len(population.train), len(population.items or ())), np.nan)
    for row, user in enumerate(population.train):
        for role in ROLES:
            examples = getattr(user, role)
            table[row, examples.inputs.numpy()] = examples.labels.numpy()
    seen = ~np.isnan(table)
    count = seen.sum(0)
    mean = (np.nansum(table, 0) + 0.5) / (count + 1)
    centred = np.where(seen, table - mean, 0.0)
    together = (seen.T.astype(float) @ seen).clip(1)
    values, vectors = np.linalg.eigh(centred.T @ centred / together)
    return mean, (vectors * values.clip(0)) @ vectors.T


def observation_noise(population: Population, mean: Array, covariance: Array) -> float:
    """The variance of a label around the Gaussian under which val users' query examples are answered best."""
    accuracy = {noise: _conditioned(mean, covariance, population.val, noise).mean() for noise in NOISES}
    return max(accuracy, key=lambda n: accuracy[n])


def conditioned(
    mean: Array, covariance: Array, known: NDArray[np.int64], labels: NDArray[np.int64], asked: NDArray[np.int64], noise: float
) -> tuple[Array, Array]:
    """What is expected of one user's labels of the items ``asked [M]``, given ``labels [N]`` of the items ``known [N]``.

    Returns:
        Expectation ``[M]`` (above 0.5: class 1) and variance ``[M]`` of a label, its noise included.
    """
    inside = covariance[np.ix_(known, known)] + noise * np.eye(len(known))
    across = covariance[np.ix_(asked, known)]
    expected = mean[asked] + across @ np.linalg.solve(inside, labels - mean[known])
    explained = (across * np.linalg.solve(inside, across.T).T).sum(1)
    return expected, (covariance[asked, asked] - explained).clip(0) + noise


def _conditioned(mean: Array, covariance: Array, users: Sequence[User], noise: float) -> Array:
    found = np.empty(len(users))
    for row, user in enumerate(users):
        known, asked = user.support.inputs.numpy(), user.query.inputs.numpy()
        expected, _ = conditioned(mean, covariance, known, user.support.labels.numpy(), asked, noise)
        found[row] = ((expected > 0.5) == user.query.labels.numpy()).mean()
    return found

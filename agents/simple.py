"""Rivals that choose no mask: what a constant per user, or the items' covariance, already explains.

Both learn from train users, choose their one setting on val users' query examples, and see the same support labels of a
user as the policy does. Shapes: U users, N examples, C classes, I items.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from backbones.pathways import population_logits
from users.base import ROLES, User
from users.batch import Prepared

PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
NOISES = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
DENSE = 50
"""Mean labels per item among train users, from which items' covariances can be estimated."""


def simple_rivals(data: Prepared, split: str = "test") -> dict[str, tuple[NDArray[np.float64], float]]:
    """Query accuracy ``[U]`` and cost of every simple rival that this population admits, by name."""
    share = data.population.num_classes / float(data.pathways.sizes.sum())
    found = {"intercept": (intercept(data, split), share)}
    population = data.population
    if population.items is not None and population.num_classes == 2:
        labels = sum(len(getattr(user, role)) for user in population.train for role in ROLES)
        if labels >= DENSE * len(population.items):
            found["item_covariance"] = (item_covariance(data, split), 0.0)
    return found


def intercept(data: Prepared, split: str = "test") -> NDArray[np.float64]:
    """The population model with one constant per class and user on its logits: the user's own bias and nothing else.

    Fitted on the support by penalised maximum likelihood; the penalty draws towards zero.
    """
    accuracy = {p: _with_intercept(data, "val", p).mean() for p in PENALTIES}
    return _with_intercept(data, split, max(accuracy, key=lambda p: accuracy[p])).double().numpy()


def _with_intercept(data: Prepared, split: str, penalty: float) -> Tensor:
    model, support, query = data.pathways.model, data.readouts(split, "support"), data.readouts(split, "query")
    known = population_logits(model, support.frozen)
    present = (support.weights > 0).float()
    constants = torch.zeros(len(support), 1, model.num_classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([constants], max_iter=100, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimiser.zero_grad()
        losses = functional.cross_entropy((known + constants).flatten(0, 1), support.labels.flatten(), reduction="none")
        total = (losses.view(support.labels.shape) * present).sum() + penalty / 2 * constants.square().sum()
        total.backward()
        return total

    optimiser.step(objective)
    found = (population_logits(model, query.frozen) + constants.detach()).argmax(-1)
    return ((found == query.labels) * query.weights).sum(1)


def item_covariance(data: Prepared, split: str = "test") -> NDArray[np.float64]:
    """A Gaussian over all items' labels, conditioned on those of the support; no text is read.

    Means and covariances are those of all train users' labels, every pair of items from the users who labelled both;
    the noise added to the observed ones is chosen on val users.

    Source: the Gaussian model of collaborative filtering, as in Goldberg et al. 2001 (who take its principal components).
    """
    population = data.population
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
    covariance = (vectors * values.clip(0)) @ vectors.T
    accuracy = {noise: _conditioned(mean, covariance, population.val, noise).mean() for noise in NOISES}
    return _conditioned(mean, covariance, getattr(population, split), max(accuracy, key=lambda n: accuracy[n]))


def _conditioned(
    mean: NDArray[np.float64], covariance: NDArray[np.float64], users: Sequence[User], noise: float
) -> NDArray[np.float64]:
    found = np.empty(len(users))
    for row, user in enumerate(users):
        known, asked = user.support.inputs.numpy(), user.query.inputs.numpy()
        inside = covariance[np.ix_(known, known)] + noise * np.eye(len(known))
        shift = np.linalg.solve(inside, user.support.labels.numpy() - mean[known])
        expected = mean[asked] + covariance[np.ix_(asked, known)] @ shift
        found[row] = ((expected > 0.5) == user.query.labels.numpy()).mean()
    return found

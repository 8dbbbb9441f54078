"""What val users say about a method: the query accuracy or reward that hyperparameters are chosen by.

Shapes: U users, N examples per user, C classes.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.group import Group
from eval.methods.base import Method, Predictor
from eval.world import World
from users.roles import by_hash


@dataclass(frozen=True)
class Measured:
    """What val users say about a method.

    Attributes:
        value: mean over users of query accuracy, less cost weight times cost if the method trades.
        fit_seconds: what fitting took (little where something was kept from before).
        seconds_per_user: what personalising took.
    """

    value: float
    fit_seconds: float
    seconds_per_user: float


@dataclass(frozen=True)
class ValUsers:
    """The val users of a world, whom methods are measured on.

    Attributes:
        world: without test users. cost_weight: lambda. limit: how many users (the first by a hash of their ids) where a method
            differentiates through the backbone, which is slow; None: all.
    """

    world: World
    cost_weight: float
    limit: int | None = None

    def places(self, method: Method | type[Method]) -> Tensor:
        """Positions of a method's users within ``val``, ``[U]``."""
        everybody = self.world.data.population.val
        places = range(len(everybody))
        if self.limit is None or not method.through_backbone:
            return torch.tensor(places)
        first = by_hash(places, lambda place: everybody[place].user_id, "tuning")[: self.limit]
        return torch.tensor(sorted(first))

    def measure(self, method: Method) -> Measured:
        """Fit a method and personalise it for the users.

        Raises:
            FloatingPointError: names a user whose logits are not finite.
        """
        users, values, start = self.places(method), [], time.perf_counter()
        fitted = method.fit(self.world, self.cost_weight)
        fit_seconds, seconds = time.perf_counter() - start, 0.0
        for some in users.split(method.together):
            shown, start = shown_to(method, self.world, some), time.perf_counter()
            predictor = method.personalise(self.world, fitted, shown, self.cost_weight)
            seconds += time.perf_counter() - start
            values.append(self._values(method, predictor, self.world.group("val", "query", some)))
        return Measured(float(torch.cat(values).mean()), fit_seconds, seconds / len(users))

    def _values(self, method: Method, predictor: Predictor, query: Group) -> Tensor:
        """Of each of some users, ``[U]`` double."""
        logits, weights = predictor.logits(query), query.batch.weights.double()
        lost = ~logits.isfinite().all(-1) & (weights > 0)
        if lost.any():
            name = query.ids[int(lost.any(1).nonzero()[0, 0])]
            raise FloatingPointError(f"the logits of user {name!r} are not finite; learn more slowly.")
        hits = ((logits.argmax(-1) == query.batch.labels) * weights).sum(1) / weights.sum(1)
        if not method.trades:
            return hits
        costs = self.world.costs_of([size.charged for size in predictor.sizes], predictor.masks)
        return hits - self.cost_weight * torch.tensor(costs, dtype=torch.double)


def shown_to(method: Method, world: World, users: Tensor) -> Group:
    """What val users ``[U]`` show of themselves: the support, or what the method says in :attr:`Method.labels`."""
    support = world.group("val", "support", users)
    return Group.joined(support, world.group("val", "validation", users)) if method.labels == "all" else support

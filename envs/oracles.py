"""What a mask is worth for a user: the answers an environment's reward is made of.

A *plan* is the sequence of masks that a user goes through, ``[R, P]`` bool; one round is the usual case. Shapes: B pairs
of user and plan, R rounds, P pathways. The cost weight is applied above, so one cache serves every weight.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backbones.artefacts import exists, load_artefact, save_artefact
from backbones.costs import CostModel
from backbones.pathways import Weights
from backbones.registry import did_you_mean
from envs.statistics import PathwayStatistics
from meta.inner import MetaInit, adapt, measure
from users.base import ROLES as HELD
from users.base import SPLITS
from users.batch import Batch, Prepared

Users = NDArray[np.int64]
Plans = NDArray[np.bool_]
ROLES = ("validation", "query", "support_halves", "query_all_labels")
"""What can be asked of an oracle. Adapted on the support: accuracy on *validation* (rewards) or *query* (reports).
*support_halves*: adapted on either half of the support, measured on the other (choices that may use 20 labels only).
*query_all_labels*: adapted on support and validation together, measured on query (comparisons at equal labels)."""

PRECISIONS = ("float32", "bfloat16")
"""What the live oracle may compute in."""
PADDED = 128
"""Examples per user that a call's memory is meant for: where the longest have more, fewer users are adapted together."""


def check_precision(precision: str) -> None:
    """Raise ``ValueError`` with a suggestion for an unknown precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}. {did_you_mean(precision, PRECISIONS)}")


def all_masks(pathways: int) -> Plans:
    """Every mask of P pathways, ``[2^P, P]``; the first is all zero, the last all one."""
    return (np.arange(2**pathways)[:, None] >> np.arange(pathways) & 1).astype(bool)


@dataclass(frozen=True)
class Outcome:
    """Answers for B pairs.

    Attributes:
        accuracy: ``[B]`` in 0..1. loss: ``[B]`` mean cross-entropy. cost: ``[B]``, C(last mask) / C(all_on).
    """

    accuracy: NDArray[np.float64]
    loss: NDArray[np.float64]
    cost: NDArray[np.float64]

    def reward(self, cost_weight: float) -> NDArray[np.float64]:
        """``accuracy - cost_weight * cost``, ``[B]``."""
        return self.accuracy - cost_weight * self.cost


class Oracle(ABC):
    """Abstract oracle over a fixed list of users, named by position.

    Attributes:
        costs: of masks.
    """

    costs: CostModel

    @abstractmethod
    def measure(self, users: Users, plans: Plans, roles: tuple[str, ...]) -> NDArray[np.float64]:
        """Adapt once per pair; accuracy and loss on each role's examples, ``[B, len(roles), 2]``."""

    def evaluate(self, users: Users, masks: NDArray[np.bool_], role: str = "validation") -> Outcome:
        """Accuracy, loss and cost of B pairs.

        Args:
            users: ``[B]`` positions.
            masks: ``[B, P]``, or plans ``[B, R, P]``.
            role: one of :data:`ROLES`; ``"validation"`` for rewards, ``"query"`` for reports.
        """
        plans = masks if masks.ndim == 3 else masks[:, None]
        found = self.measure(np.asarray(users), plans.astype(bool), (role,))[:, 0]
        return Outcome(found[:, 0], found[:, 1], self.costs.of(plans[:, -1]))


Fresh = Callable[[Batch, Batch, Tensor], tuple[Tensor, Tensor]]
"""Accuracy and loss ``[U]`` each on the second batch after adaptation on the first, under gates ``[U, P]``."""


def crossed(support: Batch, gates: Tensor, fresh: Fresh) -> tuple[Tensor, Tensor]:
    """Two-fold cross-validation on the support: fitted on even places and measured on odd ones, and back.

    Args:
        support: U users' examples; a user's only example is both fitted and measured.
        gates: ``[U, P]`` bool.
        fresh: how to fit and measure.

    Returns:
        Mean accuracy and mean loss of both ways, ``[U]`` each.
    """
    places = torch.arange(support.labels.shape[1])
    even, odd = support.columns(places[::2]), support.columns(places[1::2] if len(places) > 1 else places)
    there, back = fresh(even, odd, gates), fresh(odd, even, gates)
    accuracy, loss = ((t + b) / 2 for t, b in zip(there, back, strict=True))
    lone = ((support.weights > 0).sum(1) == 1).nonzero()[:, 0]
    if len(lone):
        only = even.rows(lone)
        accuracy[lone], loss[lone] = fresh(only, only, gates[lone])
    return accuracy, loss


class LiveOracle(Oracle):
    """Adapts the real model.

    Args:
        data: the users, seen through a model with pathways; position = place in ``data.population.users``.
        init: where users start.
        chunk: users adapted together; bounds the memory of a call.
        precision: one of :data:`PRECISIONS`. In ``bfloat16`` adaptation and measurement run under torch's autocast: weights,
            learning rates and what is summed up stay float32, products and convolutions are bfloat16.

    Raises:
        ValueError: for an unknown precision, with a suggestion.
    """

    def __init__(self, data: Prepared, init: MetaInit, chunk: int = 64, precision: str = "float32") -> None:
        check_precision(precision)
        self.data, self.init, self.chunk, self.precision = data, init, chunk, precision
        self.pathways, self.population, self.batch, self.rows = data.pathways, data.population, data.batch, data.rows
        self.costs = self.pathways.costs
        self.adaptations = 0
        self._recent: dict[tuple[int, bytes], Weights] = {}
        self._further = False  # whether anybody ever went on from adapted weights: else remembering them only takes up memory

    def measure(self, users: Users, plans: Plans, roles: tuple[str, ...]) -> NDArray[np.float64]:
        """See :meth:`Oracle.measure`. Roles other than ``validation`` and ``query`` take an adaptation of their own."""
        out = np.empty((len(users), len(roles), 2))
        for rows, split, local in self._chunks(users):
            gates = torch.from_numpy(plans[rows, -1])
            weights = self.adapted(users[rows], plans[rows]) if {"validation", "query"} & set(roles) else {}
            for r, role in enumerate(roles):
                if role == "support_halves":
                    found = crossed(self.rows(split, "support", local), gates, self._fresh)
                elif role == "query_all_labels":
                    parts = (self.rows(split, name, local) for name in ("support", "validation"))
                    found = self._fresh(Batch.joined(*parts), self.rows(split, "query", local), gates)
                else:
                    found = self._measured(weights, gates, self.rows(split, role, local))
                out[rows, r] = torch.stack(found, 1).numpy()
        self._refuse_nan(users, out)
        return out

    def _fresh(self, fit: Batch, on: Batch, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Accuracy and loss on one batch after adaptation on another."""
        return self._measured(self._adapt(fit, gates), gates, on)

    def _adapt(self, support: Batch, gates: Tensor, start: Weights | None = None) -> Weights:
        self.adaptations += len(gates)
        with self._autocast():
            return adapt(self.pathways, self.init, support, gates, start)

    def _measured(self, weights: Weights, gates: Tensor, on: Batch) -> tuple[Tensor, Tensor]:
        with self._autocast():
            return measure(self.pathways, weights, gates, on)

    def _autocast(self) -> torch.autocast:
        """Without its cache of cast weights, which would keep those of every inner step."""
        low = self.precision != "float32"
        return torch.autocast("cpu", torch.bfloat16, enabled=low, cache_enabled=False)

    def adapted(self, users: Users, plans: Plans) -> Weights:
        """Stacked weights of users (of one split) after their plans; a plan's last round goes on from the one before."""
        split, local = self._locate(users)
        start = self._recalled(users, plans[:, :-1]) if plans.shape[1] > 1 else None
        weights = self._adapt(self.rows(split, "support", local), torch.from_numpy(plans[:, -1]), start)
        if self._further:
            self._remember(users, plans, weights)
        return weights

    def statistics(self, of: PathwayStatistics, users: Users, plans: Plans) -> Tensor:
        """The observation's statistics ``[B, P, S]`` after the plans: at the weights and masks then."""
        out = torch.empty(len(users), *plans.shape[2:], of.mean.shape[1] + 3)
        for rows, split, local in self._chunks(users):
            gates = torch.from_numpy(plans[rows, -1])
            weights = self._recalled(users[rows], plans[rows])
            raw = of.raw(self.rows(split, "support", local), weights, gates)
            out[torch.from_numpy(rows)] = of.observe(raw, gates)
        return out

    def _recalled(self, users: Users, plans: Plans) -> Weights:
        """What :meth:`adapted` gives: remembered from one of the latest calls, or computed again."""
        self._further = True
        keys = [(int(u), plan.tobytes()) for u, plan in zip(users, plans, strict=True)]
        if all(key in self._recent for key in keys):
            found = [self._recent[key] for key in keys]
            return {name: torch.stack([w[name] for w in found]) for name in found[0]}
        return self.adapted(users, plans)

    def _remember(self, users: Users, plans: Plans, weights: Weights) -> None:
        if len(self._recent) > 512:
            self._recent.clear()
        for row, (user, plan) in enumerate(zip(users, plans, strict=True)):
            self._recent[int(user), plan.tobytes()] = {name: w[row] for name, w in weights.items()}

    def _locate(self, users: Users) -> tuple[str, Tensor]:
        """The one split that the users belong to, and their positions within it."""
        self._check_positions(users)
        splits = [(split, self.population.indices(split)) for split in SPLITS]
        split, inside = next((split, inside) for split, inside in splits if users[0] in inside)
        return split, torch.from_numpy(users - inside.start)

    def _check_positions(self, users: Users) -> None:
        """Raise ``IndexError`` for a position at which nobody is: answers there would be whatever was in memory."""
        count = sum(len(self.population.indices(split)) for split in SPLITS)
        wrong = users[(users < 0) | (users >= count)]
        if len(wrong):
            raise IndexError(f"no user at position {wrong[0]}; the population has {count}, from 0.")

    def _chunks(self, users: Users):
        """Rows, split and positions within it, at most ``chunk`` users of one split at a time."""
        self._check_positions(users)
        for split in SPLITS:
            inside = self.population.indices(split)
            rows = np.flatnonzero((users >= inside.start) & (users < inside.stop))
            for part in np.split(rows, range(self.chunk, len(rows), self.chunk)):
                for some in self._light(part, users):
                    yield some, split, torch.from_numpy(users[some] - inside.start)

    def _light(self, rows: NDArray[np.int64], users: Users) -> Iterator[NDArray[np.int64]]:
        """Rows in pieces whose users are not padded to too much: one with thousands of examples would pad all to as many."""
        if not len(rows):
            return
        sizes = self._sizes[users[rows]]
        cells = self.chunk * PADDED
        if len(rows) * sizes.max() <= cells:
            yield rows
            return
        order = np.argsort(-sizes, kind="stable")
        first = 0
        while first < len(order):
            count = max(1, cells // sizes[order[first]])
            yield rows[order[first : first + count]]
            first += count

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        """Of each user, how many examples the role with the most of them has."""
        return np.max([self.population.sizes(role) for role in HELD], axis=0)

    def _refuse_nan(self, users: Users, out: NDArray[np.float64]) -> None:
        bad = ~np.isfinite(out).all((1, 2))
        if bad.any():
            user = self.population.users[int(users[bad][0])]
            raise FloatingPointError(
                f"adapting user {user.user_id!r} gave a NaN or infinite reward or loss; lower the inner learning rates "
                "(meta-train with a smaller inner_rate) or leave the user out."
            )


class CachedOracle(Oracle):
    """Answers every pair once, and remembers across runs.

    Args:
        live: who is asked when an answer is missing.
        query_of: ``[users]`` bool, for whom the query examples are measured along with the validation examples (in
            the same adaptation), because they will be reported.
        path: where the answers are kept on disk, without suffix; its name carries a hash of all that determines
            them. Without, they live as long as the object.
        limit: answers in memory from which on all are forgotten before the next question; None: never. Not with ``path``.
    """

    def __init__(self, live: Oracle, query_of: NDArray[np.bool_], path: Path | None = None, limit: int | None = None) -> None:
        if path is not None and limit is not None:
            raise ValueError("answers on disk are never forgotten; give a path or a limit, not both.")
        self.live, self.query_of, self.path, self.limit = live, query_of, path, limit
        self.costs = live.costs
        self._rows: dict[tuple[int, bytes], int] = {}
        self._answers = np.full((1024, len(ROLES), 2), np.nan)
        self._changed = False
        if path is not None and exists(path):
            self._load(path)

    def __len__(self) -> int:
        return len(self._rows)

    def measure(self, users: Users, plans: Plans, roles: tuple[str, ...]) -> NDArray[np.float64]:
        """See :meth:`Oracle.measure`."""
        if self.limit is not None and len(self) >= self.limit:
            self._rows.clear()
            self._answers = np.full((1024, len(ROLES), 2), np.nan)
        columns = [ROLES.index(role) for role in roles]
        keys = [(user, plan.tobytes()) for user, plan in zip(users.tolist(), plans, strict=True)]
        rows = np.array([self._row(key) for key in keys], dtype=np.int64)
        _, first = np.unique(rows, return_index=True)
        for column in columns:
            missing = first[np.isnan(self._answers[rows[first], column, 0])]
            along = self.query_of[users[missing]] & (column < 2)
            for both in (False, True):
                ask = missing[along == both]
                asked = [0, 1] if both else [column]
                if len(ask):
                    found = self.live.measure(users[ask], plans[ask], tuple(ROLES[c] for c in asked))
                    self._answers[rows[ask][:, None], asked] = found
                    self._changed = True
        return self._answers[rows][:, columns]

    def _row(self, key: tuple[int, bytes]) -> int:
        row = self._rows.setdefault(key, len(self._rows))
        if row == len(self._answers):
            self._answers = np.concatenate([self._answers, np.full_like(self._answers, np.nan)])
        return row

    def save(self) -> None:
        """Write the answers to ``path``, if there are new ones; those that another process wrote meanwhile are kept."""
        if self.path is None or not self._changed:
            return
        if exists(self.path):
            self._load(self.path)
        keys = list(self._rows)
        plans = b"".join(plan for _, plan in keys)
        ends = np.cumsum([len(plan) for _, plan in keys])
        tensors = {
            "users": torch.tensor([user for user, _ in keys]),
            "plans": torch.frombuffer(bytearray(plans), dtype=torch.uint8),
            "ends": torch.from_numpy(ends),
            "answers": torch.from_numpy(self._answers[: len(keys)]),
        }
        save_artefact(self.path, "oracle cache", tensors, {"pairs": len(keys)})
        self._changed = False

    def _load(self, path: Path) -> None:
        """Take over the answers on disk that are not known yet."""
        tensors, _ = load_artefact(path, "oracle cache")
        ends = [0, *tensors["ends"].tolist()]
        plans, answers = tensors["plans"].numpy().tobytes(), tensors["answers"].numpy()
        users = tensors["users"].tolist()
        rows = [self._row((user, plans[ends[i] : ends[i + 1]])) for i, user in enumerate(users)]
        mine = self._answers[rows]
        self._answers[rows] = np.where(np.isnan(mine), answers, mine)


class FormulaOracle(Oracle):
    """Answers by a formula, for problems whose best masks are known.

    Args:
        costs: ``[P]``, of pathways that cost what they cost themselves; or another model.
        accuracy: ``(users [B], masks [B, P]) -> [B]``; the loss is one minus it.
    """

    def __init__(self, costs: NDArray[np.float64] | CostModel, accuracy: Callable[[Users, Plans], NDArray[np.float64]]) -> None:
        self.costs = costs if isinstance(costs, CostModel) else CostModel.of_pathways(costs)
        self._accuracy = accuracy

    def measure(self, users: Users, plans: Plans, roles: tuple[str, ...]) -> NDArray[np.float64]:
        """See :meth:`Oracle.measure`; the last mask decides, and every role gives the same."""
        accuracy = self._accuracy(users, plans[:, -1])
        return np.repeat(np.stack([accuracy, 1 - accuracy], 1)[:, None], len(roles), 1)

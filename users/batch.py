"""Examples of many users side by side, after the frozen part of the model, which runs once per example.

Shapes: U users, N examples per user, M examples in the table, C classes.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from backbones.artefacts import ArtefactError, cache_key, exists, load_artefact, save_artefact
from backbones.pathways import Frozen, Pathways
from users.base import ROLES, Examples, Population, User
from users.describe import cost_estimate
from users.items import Items, TensorItems
from users.kept import MEMORY, Kept, Seen, joined

LOG = logging.getLogger("dsa")
CHUNK = 256
"""Examples that go through the frozen model together."""
GATHERED = 64
"""Users whose frozen states are looked at together where everybody's are needed."""
MANY = 500
"""Items from which on it is said beforehand what their features will take."""


class _Gathered(Sequence[Tensor]):
    """``tensors[p][index]`` for every p, each when it is first asked for."""

    def __init__(self, tensors: Sequence[Tensor], index: Tensor) -> None:
        self._tensors, self._index = tensors, index
        self._in_order = torch.equal(index.flatten(), torch.arange(index.numel()))
        self._found: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, p):  # no slices: pathways are asked for one by one
        place = range(len(self))[p]
        if place not in self._found:
            tensor = self._tensors[place]
            everything = self._in_order and len(tensor) == self._index.numel()
            self._found[place] = tensor.unflatten(0, self._index.shape) if everything else tensor[self._index]
        return self._found[place]


class Rows(Protocol):
    """Users' examples in one role, of which those of some users can be had: a :class:`Batch`, or a :class:`Part`."""

    def __len__(self) -> int: ...

    def rows(self, users: Tensor) -> "Batch":
        """The examples of some of the users, ``[U']`` positions."""
        ...


@dataclass(frozen=True)
class Batch:
    """U users' examples, as places in a table that they may share.

    Attributes:
        table: the frozen part's results, M examples.
        index: ``[U, N]`` places in the table; users with fewer than N examples are padded.
        labels: ``[U, N]``.
        weights: ``[U, N]``, 1 / (the user's number of examples), 0 where padded; rows sum to 1.
    """

    table: Frozen
    index: Tensor
    labels: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def frozen(self) -> Frozen:
        """The users' part of the table, ``[U, N, ...]``; of the sites only what somebody reads is gathered."""
        rest = Frozen((), self.table.context, self.table.offset).map(lambda t: t[self.index])
        return replace(rest, sites=_Gathered(self.table.sites, self.index))

    @staticmethod
    def of(frozen: Frozen, labels: Tensor, weights: Tensor) -> "Batch":
        """A batch whose examples nobody shares, from tensors ``[U, N, ...]``."""
        index = torch.arange(labels.numel()).view(labels.shape)
        return Batch(frozen.map(lambda t: t.flatten(0, 1)), index, labels, weights)

    def rows(self, users: Tensor) -> "Batch":
        """The batch of some of the users, ``[U']`` positions, in that order and with repetitions if asked."""
        return Batch(self.table, self.index[users], self.labels[users], self.weights[users])

    def columns(self, examples: Tensor) -> "Batch":
        """The batch of some example positions, the same for all users; weights are made to sum to 1 again."""
        weights = self.weights[:, examples]
        total = weights.sum(1, keepdim=True).clamp_min(1e-12)
        return Batch(self.table, self.index[:, examples], self.labels[:, examples], weights / total)

    @staticmethod
    def joined(first: "Batch", second: "Batch") -> "Batch":
        """Both batches' examples for the same users, every example with equal weight."""
        counts = [(batch.weights > 0).sum(1, keepdim=True) for batch in (first, second)]
        weights = [b.weights * n / sum(counts) for b, n in zip((first, second), counts, strict=True)]
        labels, weight = torch.cat([first.labels, second.labels], 1), torch.cat(weights, 1)
        if first.table is second.table:
            return Batch(first.table, torch.cat([first.index, second.index], 1), labels, weight)
        flat = [Batch.of(batch.frozen, batch.labels, batch.weights) for batch in (first, second)]
        index = torch.cat([flat[0].index, flat[1].index + first.index.numel()], 1)
        return Batch(Frozen.cat([part.table for part in flat]), index, labels, weight)


def run_frozen(pathways: Pathways, items: Items, chunk: int = CHUNK, label: str | None = None) -> Frozen:
    """The frozen part over all items, ``chunk`` at a time, neighbours in size together; with a progress bar if named."""
    order = items.order()
    parts = []
    with tqdm(total=len(order), desc=label, unit="item", disable=label is None) as bar:
        for start in range(0, len(order), chunk):
            some = order[start : start + chunk]
            parts.append(pathways.frozen(pathways.model.backbone.prepare(items.take(some))))
            bar.update(len(some))
    table = Frozen.cat(parts)
    if order == sorted(order):
        return table
    back = torch.tensor(order).argsort()
    return table.map(lambda t: t[back])


def side_by_side(table: Frozen, examples: Sequence[Examples], places: Tensor) -> Batch:
    """Users' examples, whose places in the table come one user after the other, ``[sum of N]``, padded to one length."""
    return _beside(table, [e.labels for e in examples], places, max(map(len, examples)))


def _beside(table: Frozen, each: Sequence[Tensor], places: Tensor, width: int) -> Batch:
    """Users with the labels ``each``, padded to ``width`` examples."""
    counts = torch.tensor([len(e) for e in each])
    present = torch.arange(width) < counts[:, None]
    labels = torch.cat(list(each))
    return Batch(table, _padded(places, present), _padded(labels, present), present / counts[:, None])


def stack(pathways: Pathways, users: Sequence[User], role: str, chunk: int = CHUNK) -> Batch:
    """Run the frozen part once over the examples that ``users`` (of a population without items) have in ``role``."""
    examples: list[Examples] = [getattr(user, role) for user in users]
    table = run_frozen(pathways, TensorItems(torch.cat([e.inputs for e in examples])), chunk)
    return side_by_side(table, examples, torch.arange(sum(map(len, examples))))


def fresh_support(pathways: Pathways, population: Population, user: User) -> Batch:
    """One user's support set from raw examples, nothing looked up. Without what cross-fitting would correct."""
    if population.items is None:
        return stack(pathways, [user], "support")
    raw = population.items.take(user.support.inputs.tolist())
    table = pathways.frozen(pathways.model.backbone.prepare(raw))
    return side_by_side(table, [user.support], torch.arange(len(user.support)))


@dataclass(frozen=True)
class Part:
    """Some users' examples in one role, gathered only for those who are asked for.

    Attributes:
        data: whose users.
        split, role: which examples.
        users: ``[U]`` positions within the split.
    """

    data: "Prepared"
    split: str
    role: str
    users: Tensor

    def __len__(self) -> int:
        return len(self.users)

    def rows(self, users: Tensor) -> Batch:
        """The examples of some of the users, ``[U']`` positions among :attr:`users`."""
        return self.data.rows(self.split, self.role, self.users[users])


class Prepared:
    """A population seen through a frozen model with pathways.

    Where users share items, every item's frozen part is computed once and kept, on disk too if it is pooled. Users who own
    their examples go through the model one by one, when somebody asks for them, and the latest of them are kept in memory;
    each alone, so that no result depends on what else was asked for or forgotten. Pooled features of theirs are kept on disk
    as well, a table per split and role, as long as all of them fit into the memory granted.

    Args:
        pathways: along the population model.
        population: whose users.
        folder: where pooled features are kept on disk (under a name that tells model and content); None: nowhere.
        memory: GB (1e9 bytes) of frozen states that are kept of users who own their examples. Beyond it there is only what
            a caller has asked for and still holds. Less memory costs time and changes no result, save where it decides about
            the tables of pooled features, whose last bits may then differ.

    Attributes:
        remarks: what the reader should know about the features (texts cut off); complete once they are computed.
        kept: the frozen states that are kept, see :class:`users.kept.Kept`.

    A damaged file of features is named and made again, since all that it was made of is at hand.

    Raises:
        ValueError: for a memory below 0.
    """

    def __init__(self, pathways: Pathways, population: Population, folder: Path | None = None, memory: float = MEMORY) -> None:
        if not 0 <= memory < float("inf"):
            raise ValueError(f"memory must be a finite number of GB of at least 0, got {memory}.")
        self.pathways, self.population, self.folder = pathways, population, folder
        self.kept = Kept(int(memory * 1e9))
        self._batches: dict[tuple[str, str], Batch] = {}
        self._widths: dict[tuple[str, str], int] = {}
        self._table: Frozen | None = None
        self.remarks: tuple[str, ...] = ()

    def rows(self, split: str, role: str, users: Tensor) -> Batch:
        """The examples of some users, ``[U]`` positions within the split, in that order and with repetitions if asked."""
        if self._tabulated:
            return self.batch(split, role).rows(users)
        seen = [self._seen(split, role, n) for n in users.tolist()]
        places = torch.arange(sum(len(one.labels) for one in seen))
        return _beside(joined([one.frozen for one in seen]), [one.labels for one in seen], places, self._width(split, role))

    def part(self, split: str, role: str, first: int | None = None) -> Part:
        """A split's examples (those of its ``first`` users) in a role, to be gathered in pieces."""
        return Part(self, split, role, torch.arange(len(getattr(self.population, split)))[:first])

    def readouts(self, split: str, role: str, first: int | None = None) -> Batch:
        """A batch of the same users whose only site is the last: all that classifiers and embeddings read, and little."""
        if self._tabulated:
            batch = self.batch(split, role)
            return batch.rows(torch.arange(len(batch))[:first])
        part, found = self.part(split, role, first), []
        for users in torch.arange(len(part)).split(GATHERED):
            some = part.rows(users)
            found.append((some.table.sites[-1], some.labels, some.weights))
        tables, labels, weights = zip(*found, strict=True)
        present = torch.cat(weights) > 0
        index = _padded(torch.arange(int(present.sum())), present)
        return Batch(Frozen((torch.cat(tables),)), index, torch.cat(labels), torch.cat(weights))

    def batch(self, split: str, role: str) -> Batch:
        """All of a split's examples in a role. Where users own their examples it takes the memory of all of them."""
        if not self._tabulated:
            return self.rows(split, role, torch.arange(len(getattr(self.population, split))))
        if (split, role) not in self._batches:
            examples = [getattr(user, role) for user in getattr(self.population, split)]
            if self.population.items is not None:
                found = side_by_side(self.table, examples, torch.cat([e.inputs for e in examples]))
            else:
                items = TensorItems(torch.cat([e.inputs for e in examples]))
                found = side_by_side(self._features(items, f"{split} {role}"), examples, torch.arange(len(items)))
            self._batches[split, role] = found
        return self._batches[split, role]

    @cached_property
    def _tabulated(self) -> bool:
        """Whether all frozen states of a split and role are one table."""
        if self.population.items is not None:
            return True
        if not (self.pathways.pooled and self.folder) or self.population.lazy:
            return False
        examples = sum(int(self.population.sizes(role).sum()) for role in ROLES)
        return examples * sum(self.pathways.widths) * 4 <= self.kept.limit

    def _seen(self, split: str, role: str, n: int) -> Seen:
        """One user's examples after the frozen model, in full precision whatever the caller computes in."""

        def see() -> Seen:
            examples: Examples = getattr(getattr(self.population, split)[n], role)
            with torch.autocast("cpu", enabled=False):
                return Seen(run_frozen(self.pathways, TensorItems(examples.inputs)), examples.labels.clone())

        return self.kept.get((split, role, n), see)

    def _width(self, split: str, role: str) -> int:
        """The most examples that a user of a split has in a role."""
        if (split, role) not in self._widths:
            self._widths[split, role] = int(self.population.sizes(role)[self.population.indices(split)].max())
        return self._widths[split, role]

    @property
    def table(self) -> Frozen:
        """The frozen part of all items of a population that has items."""
        if self._table is None:
            assert self.population.items is not None
            self._table = self._with_offset(self._features(self.population.items, "items"))
        return self._table

    def fitting(self) -> tuple[Frozen, Tensor, Tensor]:
        """What the population model was fitted on: a table, and places ``[M]`` in it with their labels ``[M]``."""
        fitting = self.population.fitting
        assert fitting is not None
        if self.population.items is not None:
            return self.table, fitting.inputs, fitting.labels
        return self._features(TensorItems(fitting.inputs), "fitting"), torch.arange(len(fitting)), fitting.labels

    def _features(self, items: Items, what: str) -> Frozen:
        backbone, before = self.pathways.model.backbone, self.pathways.model.backbone.truncated
        if not (self.pathways.pooled and self.folder):
            table = run_frozen(self.pathways, items)
            self._remark(backbone.truncated - before, what)
            return table
        facts = {"placement": type(self.pathways).__name__, "version": 2}
        if self.pathways.gates != "adapters":
            facts["gates"] = self.pathways.gates
        key = cache_key(model=self.pathways.model.backbone_fingerprint(), items=items.fingerprint(), **facts)
        path = self.folder / f"features-{key}"
        if exists(path):
            try:
                tensors, found = load_artefact(path, "features")
                self._remark(found["truncated"], what)
                return _from_tensors(tensors)
            except ArtefactError as error:
                LOG.warning("%s They are made again now: model and examples are at hand.", error)
        self._announce(items)
        before = backbone.truncated
        table = run_frozen(self.pathways, items, label=f"frozen features of {self.population.name}, {what}")
        cut = backbone.truncated - before
        tensors = {f"site{p}": site for p, site in enumerate(table.sites)}
        save_artefact(path, "features", tensors, {"items": len(items), "truncated": cut})
        self._remark(cut, what)
        return table

    def _announce(self, items: Items) -> None:
        """Say what the features of many items will take, by the speed of a few of middle size."""
        if len(items) < MANY:
            return
        order = items.order()
        probe = order[len(order) // 2 :][:32]
        start = time.perf_counter()
        self.pathways.frozen(self.pathways.model.backbone.prepare(items.take(probe)))
        speed = len(probe) / (time.perf_counter() - start)
        LOG.info("%s", cost_estimate(len(items), sum(self.pathways.widths), speed))

    def _remark(self, truncated: int, what: str) -> None:
        if truncated:
            line = f"{truncated:,} {what} were longer than the model reads and were cut off"
            self.remarks = (*self.remarks, line)
            LOG.warning("%s", line)

    def _with_offset(self, table: Frozen) -> Frozen:
        """What cross-fitting changes in the logits: those of the classifier that has not seen the item, less the model's."""
        folds, model = self.population.folds, self.pathways.model
        if folds is None:
            return table
        if model.fold_weight is None or model.fold_bias is None:
            raise ValueError(f"population {self.population.name!r} is cross-fitted, but the model has no classifiers per fold.")
        features = table.sites[-1]
        held_out = torch.einsum("mf,mcf->mc", features, model.fold_weight[folds]) + model.fold_bias[folds]
        usual = torch.nn.functional.linear(features, model.weight, model.bias)
        return Frozen(table.sites, table.context, torch.where(folds[:, None] < 0, 0.0, held_out - usual))


def _from_tensors(tensors: dict[str, Tensor]) -> Frozen:
    return Frozen(tuple(tensors[f"site{p}"] for p in range(len(tensors))))


def _padded(flat: Tensor, present: Tensor) -> Tensor:
    out = flat.new_zeros(present.shape)
    out[present] = flat
    return out

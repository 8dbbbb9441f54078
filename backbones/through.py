"""What pathways have in common that change what the blocks behind them see.

Shapes: U users, N examples per user, P pathways, R of the users who run, C classes.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from backbones.base import Hidden
from backbones.pathways import Frozen, Pathways, Weights, rows_of


@dataclass(frozen=True)
class Batched:
    """What U users bring along on the way through the network.

    Attributes:
        context: tensors that travel along untouched. weights: stacked. gates: ``[U, P]``.
        changes: if given, ``[U, N, P]`` to be filled with ``||delta|| / ||h||``.
    """

    context: Mapping[str, Tensor]
    weights: Weights
    gates: Tensor
    changes: Tensor | None = None

    def part(self, name: str, users: Tensor) -> Tensor:
        """One of the weights, of some users."""
        return rows_of(self.weights[name], users)


class ThroughPathways(Pathways):
    """Abstract: pathways whose changes go through the rest of the network; the head adds ``features @ weight + bias``.

    Users whose first active pathway is late join the batch there: nothing is computed twice and nothing below the first active
    pathway is differentiated. Hidden states are kept channels last.
    """

    pooled = False

    @abstractmethod
    def _into(self, p: int, hidden: Tensor, users: Tensor, batch: Batched) -> Tensor:
        """Bring running users' states ``[R, N, ...]`` from site p - 1 to where pathway p reads them."""

    @abstractmethod
    def _applied(self, p: int, hidden: Tensor, users: Tensor, batch: Batched) -> Tensor:
        """What the network has behind pathway p, of those users who have it on changed by it."""

    def pool(self, pathway: int, frozen: Frozen) -> Tensor:
        """See :meth:`Pathways.pool`."""
        site = self.site(frozen, self.site_of[pathway])
        if pathway == self.num_pathways - 1:
            return site
        hidden = self._flat(site, frozen.context, torch.arange(len(site)))
        return self.model.backbone.pool(hidden).unflatten(0, site.shape[:2])

    def logits(self, frozen: Frozen, weights: Weights, gates: Tensor, changes: Tensor | None = None) -> Tensor:
        """See :meth:`Pathways.logits`."""
        gates, last = self.executed(gates), len(self.model.backbone.blocks)
        batch = Batched(frozen.context, weights, gates, changes)
        first = self._first(gates)
        order = first.argsort(stable=True)
        starts = torch.bincount(first, minlength=last + 1).tolist()
        running = torch.empty(0, dtype=torch.long)
        hidden = None
        for p in range(last):
            if hidden is not None:
                hidden = self._into(p, hidden, running, batch)
            if starts[p]:
                joining = order[len(running) : len(running) + starts[p]]
                running = torch.cat([running, joining])
                joined = self._joining(p, frozen, joining, batch)
                hidden = joined if hidden is None else torch.cat([hidden, joined])
            if hidden is not None:
                hidden = self._applied(p, hidden, running, batch)
        features = rows_of(frozen.sites[-1], order[len(running) :])
        if hidden is not None:
            features = torch.cat([self._readout(hidden, frozen.context, running), features])
        logits = torch.nn.functional.linear(features, self.model.weight, self.model.bias)
        if frozen.offset is not None:  # before the head, whose change is relative to the logits as they are
            logits = logits + rows_of(frozen.offset, order)
        return rows_of(self._with_head(logits, features, order, batch), order.argsort())

    def forward(self, inputs: Tensor, weights: Weights, gates: Tensor) -> Tensor:
        """See :meth:`Pathways.forward`. Users whose first pathways are off share nothing: each example runs once."""
        backbone, shape, everybody = self.model.backbone, inputs.shape[:2], torch.arange(len(gates))
        entered = backbone.stem(inputs.flatten(0, 1))
        context = {name: value.unflatten(0, shape) for name, value in entered.context.items()}
        batch = Batched(context, weights, self.executed(gates))
        hidden = entered.tensor.movedim(backbone.channel_axis, -1).unflatten(0, shape)
        for p in range(len(backbone.blocks)):
            hidden = self._into(p, hidden, everybody, batch)
            hidden = self._applied(p, hidden, everybody, batch)
        features = self._readout(hidden, context, everybody)
        logits = torch.nn.functional.linear(features, self.model.weight, self.model.bias)
        return self._with_head(logits, features, everybody, batch)

    def _first(self, gates: Tensor) -> Tensor:
        """At which block the masks ``[U, P]`` first change anything; B where they do at none."""
        blocks = len(self.model.backbone.blocks)
        changed = gates[:, :blocks].clone()
        for block, gate in self.runs.items():
            changed[:, block] |= ~gates[:, gate]
        return torch.where(changed.any(1), changed.int().argmax(1), blocks)

    def _joining(self, p: int, frozen: Frozen, users: Tensor, batch: Batched) -> Tensor:
        """States where pathway p reads them, of users for whom nothing before block p is changed."""
        if p not in self.runs or (runs := batch.gates[users, self.runs[p]]).all():
            return rows_of(self.site(frozen, p), users)
        site, without = self.site(frozen, p)[users], (~runs).nonzero()[:, 0]
        before = self._flat(self.site(frozen, p - 1)[users[without]], batch.context, users[without])
        instead = self.model.backbone.without(p, before).tensor.movedim(self.model.backbone.channel_axis, -1)
        return site.index_copy(0, without, instead.unflatten(0, (len(without), -1)))

    def _with_head(self, logits: Tensor, features: Tensor, users: Tensor, batch: Batched) -> Tensor:
        p = self.num_pathways - 1
        rows = batch.gates[users, p].nonzero()[:, 0]
        if not len(rows):
            return logits
        return self._plus(p, logits, self._head(rows_of(features, rows), users[rows], batch), rows, users, batch)

    @staticmethod
    def _head(features: Tensor, users: Tensor, batch: Batched) -> Tensor:
        return torch.baddbmm(batch.part("head.bias", users)[:, None], features, batch.part("head.weight", users))

    @staticmethod
    def _plus(p: int, base: Tensor, delta: Tensor, rows: Tensor, users: Tensor, batch: Batched) -> Tensor:
        """``base [R, N, ...]`` with ``delta`` added for some of its rows; by how much it changes them is taken down."""
        if batch.changes is not None:
            before = rows_of(base, rows).detach().flatten(2).norm(dim=2)
            batch.changes[users[rows], :, p] = delta.detach().flatten(2).norm(dim=2) / before.clamp_min(1e-12)
        return base + delta if len(rows) == len(users) else base.index_add(0, rows, delta.to(base.dtype))

    def _flat(self, hidden: Tensor, context: Mapping[str, Tensor], users: Tensor) -> Hidden:
        """``[R, N, ..., width]`` as the backbone wants it, ``[R * N, ...]`` with channels on their own axis."""
        tensor = hidden.flatten(0, 1).movedim(-1, self.model.backbone.channel_axis)
        return Hidden(tensor, {k: rows_of(v, users).flatten(0, 1) for k, v in context.items()})

    def _block(self, index: int, hidden: Tensor, users: Tensor, batch: Batched) -> Tensor:
        after = self.run_block(index, self._flat(hidden, batch.context, users), rows_of(batch.gates, users)).tensor
        return after.movedim(self.model.backbone.channel_axis, -1).unflatten(0, hidden.shape[:2])

    def _readout(self, hidden: Tensor, context: Mapping[str, Tensor], users: Tensor) -> Tensor:
        return self.model.backbone.readout(self._flat(hidden, context, users)).unflatten(0, hidden.shape[:2])

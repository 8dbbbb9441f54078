"""Adapters at the blocks' outputs, so that later blocks see the change.

Shapes: U users, N examples per user, P pathways, R of the users who run, C classes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from backbones.base import Hidden
from backbones.pathways import Frozen, Pathways, Weights, rows_of


class InlinePathways(Pathways):
    """Bottleneck adapters at the blocks' outputs, ``h + up(relu(down(h)))``, so that later blocks see the change.

    The head adds ``features @ weight + bias`` to the population model's logits. Users whose first active pathway is
    late join the batch there: nothing is computed twice and nothing below the first active pathway is differentiated.

    Source: the adapter is that of Houlsby et al. 2019, with the near-zero start of the up-projection that MAML needs.
    """

    pooled = False

    def out_width(self, pathway: int) -> int:
        """See :meth:`Pathways.out_width`."""
        return self.widths[pathway]

    @torch.no_grad()
    def frozen(self, inputs: Tensor) -> Frozen:
        """Hidden states after every block, channels last, then the readout features."""
        backbone = self.model.backbone
        hidden = backbone.stem(inputs)
        sites = []
        for index in range(len(backbone.blocks)):
            hidden = backbone.block(index, hidden)
            sites.append(hidden.tensor.movedim(backbone.channel_axis, -1).contiguous())
        return Frozen((*sites, backbone.readout(hidden)), hidden.context)

    def pool(self, pathway: int, frozen: Frozen) -> Tensor:
        """See :meth:`Pathways.pool`."""
        site = frozen.sites[pathway]
        if pathway == self.num_pathways - 1:
            return site
        hidden = self._flat(site, frozen.context, torch.arange(len(site)))
        return self.model.backbone.pool(hidden).unflatten(0, site.shape[:2])

    def logits(self, frozen: Frozen, weights: Weights, gates: Tensor, changes: Tensor | None = None) -> Tensor:
        """See :meth:`Pathways.logits`."""
        last = self.num_pathways - 1
        first = torch.where(gates.any(1), gates.int().argmax(1), last)
        order = first.argsort(stable=True)
        starts = torch.bincount(first, minlength=last + 1).tolist()
        running = torch.empty(0, dtype=torch.long)
        hidden = None
        for p in range(last):
            if hidden is not None:
                hidden = self._block(p, hidden, frozen.context, running)
            if starts[p]:
                joining = order[len(running) : len(running) + starts[p]]
                running = torch.cat([running, joining])
                joined = rows_of(frozen.sites[p], joining)
                hidden = joined if hidden is None else torch.cat([hidden, joined])
            if hidden is not None:
                hidden = self._add(p, hidden, hidden, running, weights, gates, changes)
        features = rows_of(frozen.sites[last], order[len(running) :])
        if hidden is not None:
            features = torch.cat([self._readout(hidden, frozen.context, running), features])
        logits = torch.nn.functional.linear(features, self.model.weight, self.model.bias)
        if frozen.offset is not None:  # before the head, whose change is relative to the logits as they are
            logits = logits + rows_of(frozen.offset, order)
        return rows_of(self._add(last, logits, features, order, weights, gates, changes), order.argsort())

    def forward(self, inputs: Tensor, weights: Weights, gates: Tensor) -> Tensor:
        """See :meth:`Pathways.forward`. Users whose first pathways are off share nothing: each example runs once."""
        backbone, shape, everybody = self.model.backbone, inputs.shape[:2], torch.arange(len(gates))
        entered = backbone.stem(inputs.flatten(0, 1))
        context = {name: value.unflatten(0, shape) for name, value in entered.context.items()}
        hidden = entered.tensor.movedim(backbone.channel_axis, -1).unflatten(0, shape)
        for p in range(self.num_pathways - 1):
            hidden = self._block(p, hidden, context, everybody)
            hidden = self._add(p, hidden, hidden, everybody, weights, gates, None)
        features = self._readout(hidden, context, everybody)
        logits = torch.nn.functional.linear(features, self.model.weight, self.model.bias)
        return self._add(self.num_pathways - 1, logits, features, everybody, weights, gates, None)

    def _add(
        self, p: int, base: Tensor, read: Tensor, users: Tensor, weights: Weights, gates: Tensor, changes: Tensor | None
    ) -> Tensor:
        """``base [R, N, ...]`` plus what pathway p makes of ``read``, for those of the running users who have it on."""
        rows = gates[users, p].nonzero()[:, 0]
        if not len(rows):
            return base
        delta = self._delta(p, rows_of(read, rows), weights, users[rows])
        if changes is not None:
            before = rows_of(base, rows).detach().flatten(2).norm(dim=2)
            changes[users[rows], :, p] = delta.detach().flatten(2).norm(dim=2) / before.clamp_min(1e-12)
        return base + delta if len(rows) == len(users) else base.index_add(0, rows, delta.to(base.dtype))

    def _delta(self, p: int, read: Tensor, weights: Weights, users: Tensor) -> Tensor:
        """Pathway p on ``read [R, N, ..., width_p]`` of the users (rows of the stacked weights) ``[R]``."""

        def part(name: str) -> Tensor:
            return rows_of(weights[f"{self.names[p]}.{name}"], users)

        if p == self.num_pathways - 1:
            return torch.baddbmm(part("bias")[:, None], read, part("weight"))
        inside = torch.baddbmm(part("down_bias")[:, None], read.flatten(1, -2), part("down")).relu()
        return torch.baddbmm(part("up_bias")[:, None], inside, part("up")).view(read.shape)

    def _flat(self, hidden: Tensor, context: Mapping[str, Tensor], users: Tensor) -> Hidden:
        """``[R, N, ..., width]`` as the backbone wants it, ``[R * N, ...]`` with channels on their own axis."""
        tensor = hidden.flatten(0, 1).movedim(-1, self.model.backbone.channel_axis)
        return Hidden(tensor, {k: rows_of(v, users).flatten(0, 1) for k, v in context.items()})

    def _block(self, index: int, hidden: Tensor, context: Mapping[str, Tensor], users: Tensor) -> Tensor:
        backbone = self.model.backbone
        after = backbone.block(index, self._flat(hidden, context, users)).tensor
        return after.movedim(backbone.channel_axis, -1).unflatten(0, hidden.shape[:2])

    def _readout(self, hidden: Tensor, context: Mapping[str, Tensor], users: Tensor) -> Tensor:
        return self.model.backbone.readout(self._flat(hidden, context, users)).unflatten(0, hidden.shape[:2])

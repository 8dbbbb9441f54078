"""Pathways beside the model: each reads a pooled hidden state of the frozen chain and adds to the logits.

What they read is computed once per example, so that neither adapting nor stepping ever runs the backbone.
Shapes: U users, N examples per user, P pathways, R users who have a pathway on, C classes, r rank.
"""

from functools import partial

import torch
from torch import Tensor

from backbones.base import Hidden
from backbones.pathways import GATES, PRODUCT, Frozen, Pathways, Under, Weights, Work, population_logits, rows_of

GATHERED = 3
"""How much dearer it is to copy a user's weights and to use them than to use them where they are."""


class SidePathways(Pathways):
    """``logits + sum over active p of up_p(gelu(down_p(norm(h_p))))``, the user's head among them as ``norm(h) @ dW + db``.

    ``norm`` takes mean and scale over the pooled channels away, so that one learning rate suits every depth; what the head
    reads has unit length, whatever the backbone's features are.

    Source: side networks, Sung et al. 2022 ("LST: Ladder Side-Tuning"), reduced to independent pathways so that any
    subset may be on; the near-zero start of the up-projection is that of the inline adapters.
    """

    bears = GATES

    @property
    def pooled(self) -> bool:  # type: ignore[override]
        """See :class:`Pathways`: not where blocks may be left out, which takes the states that the first one reads."""
        return not self.runs

    @torch.no_grad()
    def read_widths(self) -> list[int]:
        """See :meth:`Pathways.read_widths`. What ends inference early reads the outlines of hidden states."""
        backbone = self.model.backbone
        hidden, found = backbone.stem(backbone.reference_inputs()), []
        for index in range(len(backbone.blocks)):
            hidden = backbone.block(index, hidden)
            found.append(self._pooled(hidden).shape[1])
        return found

    def out_width(self, pathway: int) -> int:
        """See :meth:`Pathways.out_width`."""
        return self.model.num_classes

    @torch.no_grad()
    def frozen(self, inputs: Tensor) -> Frozen:
        """Pooled, normalised hidden states after every block, then the readout features."""
        backbone = self.model.backbone
        hidden = backbone.stem(inputs)
        entered = ((hidden.tensor,), hidden.context) if self.runs else ((), {})
        sites = self._sites(hidden, torch.ones(1, self.num_pathways, dtype=torch.bool))
        return Frozen((*entered[0], *sites), entered[1])

    def _sites(self, hidden: Hidden, gates: Tensor) -> list[Tensor]:
        """What is read behind every block, then the readout's features, from the states that the first block reads."""
        sites = []
        for index in range(len(self.model.backbone.blocks)):
            hidden = self.run_block(index, hidden, gates)
            sites.append(self._pooled(hidden))
        return [*sites, self.model.backbone.readout(hidden)]

    @torch.no_grad()
    def under(self, frozen: Frozen, gates: Tensor) -> Frozen:
        """See :meth:`Pathways.under`: the network is run again for users who leave blocks out."""
        gates, runs = self.executed(gates), [*self.runs.values()]
        rows = (~gates[:, runs]).any(1).nonzero()[:, 0]
        if isinstance(frozen, Under) or not len(rows):
            return frozen
        shape = (len(rows), frozen.sites[0].shape[1])
        hidden = Hidden(frozen.sites[0], frozen.context).at(rows)
        hidden = Hidden(hidden.tensor.flatten(0, 1), {name: value.flatten(0, 1) for name, value in hidden.context.items()})
        sites = [site.unflatten(0, shape) for site in self._sites(hidden, gates[rows])]
        before = (self.site(frozen, place) for place in range(len(sites)))
        changed = (old.index_copy(0, rows, new.to(old.dtype)) for old, new in zip(before, sites, strict=True))
        return Under((frozen.sites[0], *changed), frozen.context, frozen.offset)

    def pool(self, pathway: int, frozen: Frozen) -> Tensor:
        """See :meth:`Pathways.pool`."""
        return self.site(frozen, self.site_of[pathway])

    def fixed(self, pathway: int) -> str | None:
        """See :meth:`Pathways.fixed`: the first matrix of every pathway."""
        return self._first(pathway)[0] if self.keys[pathway] else None

    def multiplied(self, pathway: int, frozen: Frozen, rows: Tensor) -> Tensor:
        """See :meth:`Pathways.multiplied`; for the head at unit length."""
        return self._scaled(pathway, super().multiplied(pathway, frozen, rows))

    def logits(self, frozen: Frozen, weights: Weights, gates: Tensor, changes: Tensor | None = None) -> Tensor:
        """See :meth:`Pathways.logits`. ``changes`` are relative to the population model's logits."""
        gates, frozen = self.executed(gates), self.under(frozen, gates)
        logits = base = population_logits(self.model, frozen)
        if self.readout is not None:
            logits = base * gates[:, self.readout, None, None]
        for p in gates.any(0).nonzero()[:, 0].tolist():
            if not self.keys[p]:
                continue
            rows = gates[:, p].nonzero()[:, 0]
            product = weights.get(self._first(p)[0] + PRODUCT)
            if product is None:
                delta = self._delta(p, rows_of(self.pool(p, frozen), rows), weights, rows)
            else:
                delta = self._rest(p, product + rows_of(weights[self._first(p)[1]], rows)[:, None], weights, rows)
            if changes is not None:
                changes[rows, :, p] = (delta.norm(dim=2) / base[rows].norm(dim=2).clamp_min(1e-12)).detach()
            logits = logits + delta if len(rows) == len(gates) else logits.index_add(0, rows, delta.to(logits.dtype))
        return logits

    def forward(self, inputs: Tensor, weights: Weights, gates: Tensor) -> Tensor:
        """See :meth:`Pathways.forward`. Users leave the batch as soon as nothing that they have on reads further."""
        backbone, (users, examples) = self.model.backbone, inputs.shape[:2]
        gates = self.executed(gates)
        depth, order = self.depth(gates).sort(descending=True, stable=True)  # who leaves first is last
        gates = rows_of(gates, order)
        hidden = backbone.stem(rows_of(inputs, order).flatten(0, 1))
        logits = hidden.tensor.new_zeros(users, examples, self.model.num_classes)
        for site in range(int(depth.max())):
            running = int((depth > site).sum())
            hidden = hidden.first(running * examples)
            if site < len(backbone.blocks):
                hidden = self.run_block(site, hidden, gates[:running])
            self._add(logits, site, hidden, weights, gates[:running], order)
        return rows_of(logits, order.argsort())

    def _add(self, logits: Tensor, site: int, hidden: Hidden, weights: Weights, gates: Tensor, users: Tensor) -> None:
        """Add to ``logits [U, N, C]`` what a site's pathways say for the first R users, under their gates ``[R, P]``."""
        speaks = [p for p, read in enumerate(self.site_of) if read == site and (self.keys[p] or p == self.readout)]
        on = [p for p in speaks if gates[:, p].any()]
        last, running = site == len(self.model.backbone.blocks), slice(len(gates))
        if not (on or last):
            return
        read = self.model.backbone.readout(hidden) if last else self._pooled(hidden)
        read = read.unflatten(0, (len(gates), -1))
        if last and self.readout is None:
            logits[running] += self._base(read)
        for p in on:
            rows = gates[:, p].nonzero()[:, 0]
            mine = rows_of(read, rows)
            said = self._base(mine) if p == self.readout else self._said(p, mine, weights, users[rows])
            logits.index_add_(0, rows, said.to(logits.dtype))

    def _said(self, p: int, read: Tensor, weights: Weights, users: Tensor) -> Tensor:
        """As :meth:`_delta`. Copying many users' weights takes longer than to let all speak, the others about nothing."""
        everybody = len(weights[self.keys[p][0]])
        if GATHERED * len(users) < everybody or len(users) == everybody == 1:
            return self._delta(p, read, weights, users)
        wide = read.new_zeros(everybody, *read.shape[1:]).index_copy_(0, users, read)
        return self._delta(p, wide, weights, torch.arange(everybody))[users]

    def _base(self, features: Tensor) -> Tensor:
        return torch.nn.functional.linear(features, self.model.weight, self.model.bias)

    def _pooled(self, hidden: Hidden) -> Tensor:
        backbone = self.model.backbone
        pooled = backbone.outline(hidden) if self.exits else backbone.pool(hidden)
        return torch.nn.functional.layer_norm(pooled, pooled.shape[-1:])

    def work(self, pathway: int, hidden: Hidden, weights: Weights) -> Work:
        """See :meth:`Pathways.work`."""
        alone, site = torch.zeros(1, dtype=torch.int64), self.site_of[pathway]
        if pathway == self.num_pathways - 1:
            return partial(self._delta, pathway, hidden.tensor[None], weights, alone)
        after = self.model.backbone.block(site, hidden)
        return lambda: self._delta(pathway, self._pooled(after)[None], weights, alone)

    def _delta(self, p: int, read: Tensor, weights: Weights, users: Tensor) -> Tensor:
        """What pathway p adds to the logits, ``[R, N, C]``, from ``read [R, N, width_p]``."""
        matrix, bias = (rows_of(weights[key], users) for key in self._first(p))
        return self._rest(p, torch.baddbmm(bias[:, None], self._scaled(p, read), matrix), weights, users)

    def _first(self, p: int) -> tuple[str, str]:
        """Keys of the matrix and the bias that pathway p begins with; those of the head are all that it has."""
        matrix, bias = ("weight", "bias") if p == self.num_pathways - 1 else ("down", "down_bias")
        return f"{self.names[p]}.{matrix}", f"{self.names[p]}.{bias}"

    def _scaled(self, p: int, read: Tensor) -> Tensor:
        """What that matrix multiplies: for the head it has unit length."""
        if p < self.num_pathways - 1:
            return read
        return torch.nn.functional.layer_norm(read, read.shape[-1:]) / read.shape[-1] ** 0.5

    def _rest(self, p: int, begun: Tensor, weights: Weights, users: Tensor) -> Tensor:
        """What pathway p adds to the logits, ``[R, N, C]``, from what its first matrix and bias make of what it reads."""
        if p == self.num_pathways - 1:
            return begun
        up, bias = (rows_of(weights[f"{self.names[p]}.{part}"], users) for part in ("up", "up_bias"))
        return torch.baddbmm(bias[:, None], torch.nn.functional.gelu(begun), up)

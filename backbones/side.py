"""Pathways beside the model: each reads a pooled hidden state of the frozen chain and adds to the logits.

What they read is computed once per example, so that neither adapting nor stepping ever runs the backbone.
Shapes: U users, N examples per user, P pathways, R users who have a pathway on, C classes, r rank.
"""

import torch
from torch import Tensor

from backbones.pathways import Frozen, Pathways, Weights, population_logits, rows_of


class SidePathways(Pathways):
    """``logits + sum over active p of up_p(gelu(down_p(norm(h_p))))``, the user's head among them as ``norm(h) @ dW + db``.

    ``norm`` takes mean and scale over the pooled channels away, so that one learning rate suits every depth; what the head
    reads has unit length, whatever the backbone's features are.

    Source: side networks, Sung et al. 2022 ("LST: Ladder Side-Tuning"), reduced to independent pathways so that any
    subset may be on; the near-zero start of the up-projection is that of the inline adapters.
    """

    pooled = True

    def out_width(self, pathway: int) -> int:
        """See :meth:`Pathways.out_width`."""
        return self.model.num_classes

    @torch.no_grad()
    def frozen(self, inputs: Tensor) -> Frozen:
        """Pooled, normalised hidden states after every block, then the readout features."""
        backbone = self.model.backbone
        hidden = backbone.stem(inputs)
        sites = []
        for index in range(len(backbone.blocks)):
            hidden = backbone.block(index, hidden)
            pooled = backbone.pool(hidden)
            sites.append(torch.nn.functional.layer_norm(pooled, pooled.shape[-1:]))
        return Frozen((*sites, backbone.readout(hidden)))

    def pool(self, pathway: int, frozen: Frozen) -> Tensor:
        """See :meth:`Pathways.pool`."""
        return frozen.sites[pathway]

    def logits(self, frozen: Frozen, weights: Weights, gates: Tensor, changes: Tensor | None = None) -> Tensor:
        """See :meth:`Pathways.logits`. ``changes`` are relative to the population model's logits."""
        logits = base = population_logits(self.model, frozen)
        for p in gates.any(0).nonzero()[:, 0].tolist():
            rows = gates[:, p].nonzero()[:, 0]
            delta = self._delta(p, rows_of(frozen.sites[p], rows), weights, rows)
            if changes is not None:
                changes[rows, :, p] = (delta.norm(dim=2) / base[rows].norm(dim=2).clamp_min(1e-12)).detach()
            logits = logits + delta if len(rows) == len(gates) else logits.index_add(0, rows, delta.to(logits.dtype))
        return logits

    def forward(self, inputs: Tensor, weights: Weights, gates: Tensor) -> Tensor:
        """See :meth:`Pathways.forward`."""
        frozen = self.frozen(inputs.flatten(0, 1)).map(lambda t: t.unflatten(0, inputs.shape[:2]))
        return self.logits(frozen, weights, gates)

    def _delta(self, p: int, read: Tensor, weights: Weights, users: Tensor) -> Tensor:
        """What pathway p adds to the logits, ``[R, N, C]``, from ``read [R, N, width_p]``."""

        def part(name: str) -> Tensor:
            return rows_of(weights[f"{self.names[p]}.{name}"], users)

        if p == self.num_pathways - 1:
            read = torch.nn.functional.layer_norm(read, read.shape[-1:]) / read.shape[-1] ** 0.5
            return torch.baddbmm(part("bias")[:, None], read, part("weight"))
        inside = torch.nn.functional.gelu(torch.baddbmm(part("down_bias")[:, None], read, part("down")))
        return torch.baddbmm(part("up_bias")[:, None], inside, part("up"))

"""Adapters at the blocks' outputs, so that later blocks see the change.

Shapes: U users, N examples per user, P pathways, R of the users who run.
"""

from functools import partial

import torch
from torch import Tensor

from backbones.base import Hidden
from backbones.pathways import Frozen, Weights, Work, rows_of
from backbones.through import Batched, ThroughPathways


class InlinePathways(ThroughPathways):
    """Bottleneck adapters at the blocks' outputs, ``h + up(relu(down(h)))``, so that later blocks see the change.

    Source: the adapter is that of Houlsby et al. 2019, with the near-zero start of the up-projection that MAML needs.
    """

    bears = ("adapters", "skip")

    def out_width(self, pathway: int) -> int:
        """See :meth:`Pathways.out_width`."""
        return self.widths[pathway]

    @torch.no_grad()
    def frozen(self, inputs: Tensor) -> Frozen:
        """Hidden states (before the first block where some may be left out, and) after every block, then readout features.

        All but the features are channels last.
        """
        backbone = self.model.backbone
        hidden = backbone.stem(inputs)
        sites = [hidden.tensor.movedim(backbone.channel_axis, -1).contiguous()] if self.runs else []
        for index in range(len(backbone.blocks)):
            hidden = backbone.block(index, hidden)
            sites.append(hidden.tensor.movedim(backbone.channel_axis, -1).contiguous())
        return Frozen((*sites, backbone.readout(hidden)), hidden.context)

    def work(self, pathway: int, hidden: Hidden, weights: Weights) -> Work:
        """See :meth:`Pathways.work`."""
        backbone, alone, batch = self.model.backbone, torch.zeros(1, dtype=torch.int64), Batched({}, weights, torch.ones(0))
        if pathway == self.num_pathways - 1:
            return partial(self._head, hidden.tensor[None], alone, batch)
        read = backbone.block(pathway, hidden).tensor.movedim(backbone.channel_axis, -1)[None]
        return partial(self._delta, pathway, read, alone, batch)

    def _into(self, p: int, hidden: Tensor, users: Tensor, batch: Batched) -> Tensor:
        return self._block(p, hidden, users, batch)

    def _applied(self, p: int, hidden: Tensor, users: Tensor, batch: Batched) -> Tensor:
        rows = batch.gates[users, p].nonzero()[:, 0]
        if not len(rows):
            return hidden
        return self._plus(p, hidden, self._delta(p, rows_of(hidden, rows), users[rows], batch), rows, users, batch)

    def _delta(self, p: int, read: Tensor, users: Tensor, batch: Batched) -> Tensor:
        """Pathway p on ``read [R, N, ..., width_p]`` of the users (rows of the stacked weights) ``[R]``."""
        down, down_bias, up, up_bias = (
            batch.part(f"{self.names[p]}.{name}", users) for name in ("down", "down_bias", "up", "up_bias")
        )
        inside = torch.baddbmm(down_bias[:, None], read.flatten(1, -2), down).relu()
        return torch.baddbmm(up_bias[:, None], inside, up).view(read.shape)

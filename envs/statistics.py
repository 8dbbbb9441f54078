"""What each pathway looks like for a user before anything is decided: the observation's ``pathways`` part.

Taken on the support set at the meta-initialisation with every gate on, in one forward and one backward pass.
Shapes: U users, N examples, P pathways, S statistics.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from backbones.base import PopulationModel
from backbones.pathways import Pathways, Weights
from meta.inner import MetaInit, stacked, user_loss
from users.batch import Batch, Rows

NAMES = (
    "gradient_norm",
    "gradient_share",
    "gradient_signal_to_noise",
    "activation_shift",
    "relative_change",
    "depth",
    "cost",
    "gate",
)
"""S statistics per pathway, in this order. The first five are standardised on the users they are fitted on, the others are raw:

* ``gradient_norm``: log of the support gradient's norm / sqrt(parameters);
* ``gradient_share``: the pathway's share of the sum of the norms;
* ``gradient_signal_to_noise``: log of the norm of the mean gradient over its spread between parts of the support;
* ``activation_shift``: how far what it reads lies from these users' mean, in their standard deviations (RMS), log;
* ``relative_change``: log of ``||delta|| / ||h||``;
* ``depth``: 0 for the first pathway, 1 for the last;
* ``cost``: of the mask with this pathway alone, its share of all personal parameters say;
* ``gate``: whether it is on (before the first decision: 1).
"""
STANDARDISED = 5
CLIP = 5.0
PARTS = 4
_TINY = 1e-8


@dataclass(frozen=True)
class Raw:
    """Unstandardised facts, ``[U, P]`` each: also what gradient-score rivals threshold.

    Attributes:
        gradient_norm: of the mean support loss, over sqrt(parameters).
        relative_gradient: gradient norm over weight norm (the head's weights include the population model's).
        signal_to_noise, activation_shift, relative_change: see :data:`NAMES`.
    """

    gradient_norm: Tensor
    relative_gradient: Tensor
    signal_to_noise: Tensor
    activation_shift: Tensor
    relative_change: Tensor

    @staticmethod
    def cat(parts: list["Raw"]) -> "Raw":
        """Several groups of users, one after the other."""
        return Raw(*(torch.cat([getattr(p, name) for p in parts]) for name in Raw.__dataclass_fields__))


@dataclass(frozen=True)
class PathwayStatistics:
    """Computes the statistics; built by :meth:`fit` on the users of one split (``observed_on``: train, or val alone).

    Attributes:
        pathways, init: where and at what weights they are taken.
        sites: per pathway, mean and standard deviation of what it reads over these users' support examples.
        mean, scale: ``[P, 5]`` of the standardised ones over these users.
    """

    pathways: Pathways
    init: MetaInit
    sites: tuple[tuple[Tensor, Tensor], ...]
    mean: Tensor
    scale: Tensor

    @staticmethod
    def fit(pathways: Pathways, init: MetaInit, support: Rows) -> "PathwayStatistics":
        """Fit the standardisation on support sets of train users, or whom ``observed_on`` names."""
        sites = tuple(_moments(pathways, p, support) for p in range(pathways.num_pathways))
        blank = torch.zeros(pathways.num_pathways, STANDARDISED)
        unscaled = PathwayStatistics(pathways, init, sites, blank, torch.ones_like(blank))
        values = unscaled._transformed(unscaled.raw(support))
        return PathwayStatistics(pathways, init, sites, values.mean(0), values.std(0, correction=0).clamp_min(1e-6))

    def raw(self, support: Rows, weights: Weights | None = None, gates: Tensor | None = None, chunk: int = 64) -> Raw:
        """Unstandardised facts of U users, at the meta-initialisation with all gates on unless told otherwise."""
        found = []
        for rows in torch.arange(len(support)).split(chunk):
            mine = {k: w[rows] for k, w in weights.items()} if weights else stacked(self.init, len(rows))
            on = torch.ones(len(rows), self.pathways.num_pathways, dtype=torch.bool) if gates is None else gates[rows]
            found.append(self._raw(support.rows(rows), mine, on))
        return Raw.cat(found)

    @torch.enable_grad()  # whoever asks first may do so under no_grad; gradients are part of what is observed
    def _raw(self, support: Batch, weights: Weights, gates: Tensor) -> Raw:
        users, names = len(support), self.pathways.num_pathways
        parts, shares = _parts(support)
        repeated = {k: w.repeat_interleave(PARTS, 0).detach().requires_grad_() for k, w in weights.items()}
        changes = torch.zeros(*parts.labels.shape, names)
        on = gates.repeat_interleave(PARTS, 0)
        loss = user_loss(self.pathways.logits(parts.frozen, repeated, on, changes), parts).sum()
        if loss.requires_grad:
            pieces = torch.autograd.grad(loss, list(repeated.values()), allow_unused=True, materialize_grads=True)
        else:
            pieces = tuple(torch.zeros_like(w) for w in repeated.values())
        gradients = dict(zip(repeated, pieces, strict=True))
        norm, noise, size = (torch.zeros(users, names) for _ in range(3))
        for p in range(names):
            keys = self.pathways.keys[p]
            if not keys:  # the model's own readout: nothing of it is learned
                continue
            flat = torch.cat([gradients[k].flatten(1) for k in keys], 1).unflatten(0, (users, PARTS))
            mean = (flat * shares[..., None]).sum(1)
            norm[:, p] = mean.norm(dim=1)
            noise[:, p] = ((flat - mean[:, None]).square().sum(-1) * shares).sum(1).sqrt()
            size[:, p] = torch.cat([weights[k].detach().flatten(1) for k in keys], 1).norm(dim=1)
        size[:, -1] = _head_size(self.pathways.model, weights)
        shift = torch.stack([self._shift(p, support) for p in range(names)], 1)
        of_parts = (changes * parts.weights[..., None]).sum(1)
        changes = (of_parts.unflatten(0, (users, PARTS)) * shares[..., None]).sum(1)
        scaled = norm / self.pathways.sizes.clamp_min(1).sqrt()
        return Raw(scaled, norm / size.clamp_min(_TINY), norm / noise.clamp_min(_TINY), shift, changes)

    def _shift(self, p: int, support: Batch) -> Tensor:
        mean, scale = self.sites[p]
        mine = (self.pathways.pool(p, support.frozen) * support.weights[..., None]).sum(1)
        return ((mine - mean) / scale).square().mean(1).sqrt()

    def _transformed(self, raw: Raw) -> Tensor:
        share = raw.gradient_norm / raw.gradient_norm.sum(1, keepdim=True).clamp_min(_TINY)
        logs = (raw.gradient_norm, share, raw.signal_to_noise, raw.activation_shift, raw.relative_change)
        return torch.stack([(x + _TINY).log() if i != 1 else x for i, x in enumerate(logs)], -1)

    def observe(self, raw: Raw, gates: Tensor | None = None) -> Tensor:
        """The observation ``[U, P, S]``; the standardised columns lie within +-``CLIP``.

        Args:
            raw: of U users.
            gates: ``[U, P]`` for the column ``gate``; all on without.
        """
        users, pathways = raw.gradient_norm.shape
        values = ((self._transformed(raw) - self.mean) / self.scale).clamp(-CLIP, CLIP)
        depth = torch.linspace(0, 1, pathways).expand(users, -1)
        cost = self.pathways.costs.alone.float().expand(users, -1)
        gate = torch.ones(users, pathways) if gates is None else gates.float()
        return torch.cat([values, torch.stack([depth, cost, gate], -1)], -1)


def _moments(pathways: Pathways, p: int, support: Rows, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of what a pathway reads over all users' examples, ``[width_p]`` each."""
    total, squares, count = torch.zeros(()), torch.zeros(()), 0
    for rows in torch.arange(len(support)).split(chunk):
        some = support.rows(rows)
        read = pathways.pool(p, some.frozen)[some.weights > 0].double()
        total, squares, count = total + read.sum(0), squares + read.square().sum(0), count + len(read)
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp_min(1e-12).sqrt().float()


def _parts(support: Batch) -> tuple[Batch, Tensor]:
    """Deal every user's examples into PARTS users of their own, and each part's share ``[U, PARTS]`` of the examples."""
    count = support.labels.shape[1]
    extra = torch.arange(-(-count // PARTS) * PARTS)
    padded = support.columns(extra.clamp_max(count - 1))
    weights = torch.where(extra < count, support.weights[:, extra.clamp_max(count - 1)], 0.0)
    dealt = weights.unflatten(1, (-1, PARTS)).transpose(1, 2)
    shares = dealt.sum(-1)

    def deal(tensor: Tensor) -> Tensor:
        return tensor.unflatten(1, (-1, PARTS)).transpose(1, 2).flatten(0, 1)

    inside = (dealt / shares[..., None].clamp_min(1e-12)).flatten(0, 1)
    return Batch(padded.table, deal(padded.index), deal(padded.labels), inside), shares


def _head_size(model: PopulationModel, weights: Weights) -> Tensor:
    weight = weights["head.weight"].detach() + model.weight.T
    bias = weights["head.bias"].detach() + model.bias
    return torch.cat([weight.flatten(1), bias], 1).norm(dim=1)

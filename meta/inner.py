"""The inner loop: a few gradient steps for U users with U different masks, in one graph.

Shapes: U users, N examples per user, P pathways, C classes, K inner steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backbones.pathways import PRODUCT, Frozen, Pathways, Weights, rows_of
from meta.span import Span, pays
from users.batch import Batch, Rows


@dataclass(frozen=True)
class MetaInit:
    """From where and how fast a user's adapters start.

    Attributes:
        weights: one set of adapter weights, shared by all users.
        rates: ``[K, P]`` inner learning rates per step and pathway; or, while a user's own share in them is asked for,
            ``[U, K, P]``.
        adapted: ``[P]`` bool, the pathways that the inner loop changes (ANIL: the head alone); the others are used
            at their shared weights.
        prior: how many examples the start counts for: the inner loss of a user with n is weighted n^k / (n^k + prior^k), see
            :mod:`meta.shrinkage`.
        sharpness: k, how suddenly a user's examples outweigh the prior.
    """

    weights: Weights
    rates: Tensor
    adapted: Tensor
    prior: float = 0.0
    sharpness: float = 1.0

    @property
    def steps(self) -> int:
        """K."""
        return self.rates.shape[-2]

    def tensors(self) -> dict[str, Tensor]:
        """Everything as one flat dict, for saving and hashing."""
        prior = {"prior": torch.tensor(self.prior), "sharpness": torch.tensor(self.sharpness)} if self.prior else {}
        weights = {f"weights/{k}": w for k, w in self.weights.items()}
        return {"rates": self.rates, "adapted": self.adapted, **prior, **weights}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> "MetaInit":
        """The inverse of :meth:`tensors`."""
        weights = {k.removeprefix("weights/"): w for k, w in tensors.items() if k.startswith("weights/")}
        prior, sharpness = float(tensors.get("prior", 0.0)), float(tensors.get("sharpness", 1.0))
        return MetaInit(weights, tensors["rates"], tensors["adapted"], prior, sharpness)

    def trust(self, batch: Batch) -> Tensor:
        """By how much users' inner losses on a batch are weighted, ``[U]`` in 0..1."""
        return share((batch.weights > 0).sum(1).float(), self.prior, self.sharpness)


Counts = TypeVar("Counts", Tensor, NDArray[np.float64])


def share(counts: Counts, prior: float, sharpness: float) -> Counts:
    """What numbers of examples count for beside a prior, 0..1: ``n^k / (n^k + prior^k)``, and 0 without examples."""
    powers = counts**sharpness
    return powers / (powers + prior**sharpness + (counts == 0))


def user_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Each user's mean cross-entropy, ``[U]``."""
    flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
    return (flat.view(batch.labels.shape) * batch.weights).sum(1)


def stacked(init: MetaInit, users: int) -> Weights:
    """The shared start for ``users`` users, without copies."""
    return {key: weight.expand(users, *weight.shape) for key, weight in init.weights.items()}


def adapt(
    pathways: Pathways,
    init: MetaInit,
    support: Batch,
    gates: Tensor,
    weights: Weights | None = None,
    *,
    meta: bool = False,
    second_order: bool = False,
) -> Weights:
    """K full-batch gradient steps on each user's support loss.

    Args:
        pathways: the pathways to adapt.
        init: start and learning rates.
        support: the users' support examples.
        gates: ``[U, P]`` bool. A pathway that is off is neither computed nor changed.
        weights: where to start instead of ``init.weights`` (further rounds); stacked, leading dimension U.
        meta: keep the result differentiable with respect to ``init``.
        second_order: differentiate through the inner gradients as well (MAML); otherwise they count as constants.

    Returns:
        Stacked weights. Deterministic: the same arguments give the same result.
    """
    weights = stacked(init, len(support)) if weights is None else dict(weights)
    moving = (gates.any(0) & init.adapted).nonzero()[:, 0].tolist()
    owners = {key: p for p in moving for key in pathways.keys[p]}
    if not owners:
        return weights
    trust, frozen = init.trust(support), pathways.under(support.frozen, gates)
    with torch.set_grad_enabled(meta):
        spans = _spans(pathways, moving, frozen, gates, weights, (support.labels.shape[1], init.steps))
        moved = {key: spans[key].unmoved() if key in spans else weights[key] for key in owners}
    for step in range(init.steps):
        with torch.enable_grad():
            current = dict(_at(key, value, spans) for key, value in moved.items())
            current = current if meta else {key: value.detach().requires_grad_() for key, value in current.items()}
            losses = user_loss(pathways.logits(frozen, weights | current, gates), support)
            loss = (losses * trust).sum()
            gradients = torch.autograd.grad(loss, list(current.values()), create_graph=second_order)
        with torch.set_grad_enabled(meta):
            for (key, p), gradient in zip(owners.items(), gradients, strict=True):
                rate = init.rates[..., step, p]
                rate = rows_of(rate, spans[key].users) if key in spans and rate.dim() else rate
                moved[key] = moved[key] - rate.view(-1, *[1] * (gradient.dim() - 1)) * gradient
    with torch.set_grad_enabled(meta):
        weights |= {key: spans[key].matrices(value) if key in spans else value for key, value in moved.items()}
    return weights if meta else {key: weight.detach() for key, weight in weights.items()}


def _spans(
    pathways: Pathways, moving: Sequence[int], frozen: Frozen, gates: Tensor, weights: Weights, work: tuple[int, int]
) -> dict[str, Span]:
    """By key, matrices that so many examples and steps (``work``) move with fewer multiplications in the examples' span."""
    spans, (examples, steps) = {}, work
    for p in moving:
        key = pathways.fixed(p)
        if key is not None and pays(examples, *weights[key].shape[1:], steps=steps):
            rows = gates[:, p].nonzero()[:, 0]
            spans[key] = Span.of(rows, pathways.multiplied(p, frozen, rows), weights[key])
    return spans


def _at(key: str, moved: Tensor, spans: dict[str, Span]) -> tuple[str, Tensor]:
    """What logits are a function of, under its key: a weight, or in a span what it makes of the inputs."""
    return (key + PRODUCT, spans[key].products(moved)) if key in spans else (key, moved)


@torch.no_grad()
def measure(pathways: Pathways, weights: Weights, gates: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Accuracy ``[U]`` and mean cross-entropy ``[U]`` of adapted users on a batch."""
    logits = pathways.logits(batch.frozen, weights, gates)
    weights_of = batch.weights.double()  # float32 sums to a little more than one
    hits = (logits.argmax(-1) == batch.labels) * weights_of
    wide = torch.promote_types(logits.dtype, torch.float32)  # a share of hits does not fit into bfloat16
    return (hits.sum(1) / weights_of.sum(1)).to(wide), user_loss(logits, batch)


def adapted(
    pathways: Pathways, init: MetaInit, support: Rows, query: Rows, gates: Tensor, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Each user's query accuracy and loss, ``[U]`` each, after adaptation with their own row of ``gates [U, P]``."""
    accuracy, loss = adapted_along(pathways, init, support, query, gates, (1,), chunk)
    return accuracy[0], loss[0]


def adapted_along(
    pathways: Pathways,
    init: MetaInit,
    support: Rows,
    query: Rows,
    gates: Tensor,
    repeats: Sequence[int],
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """As :func:`adapted` after so many times the inner steps, ``[R, U]`` each.

    Every one of the R ``repeats``, which rise, goes on from the one before: it finds what a start with its rates repeated as
    often finds, up to rounding.
    """
    accuracies, losses = [], []
    for users in torch.arange(len(support)).split(chunk):
        seen, asked, on = support.rows(users), query.rows(users), gates[users]
        weights, found = stacked(init, len(users)), []
        for times, before in zip(repeats, (0, *repeats), strict=False):
            for _ in range(times - before):
                weights = adapt(pathways, init, seen, on, weights)
            found.append(measure(pathways, weights, on, asked))
        accuracy, loss = zip(*found, strict=True)
        accuracies.append(torch.stack(accuracy))
        losses.append(torch.stack(loss))
    return torch.cat(accuracies, 1), torch.cat(losses, 1)


def adapted_accuracy(pathways: Pathways, init: MetaInit, support: Rows, query: Rows, gates: Tensor) -> Tensor:
    """The accuracies of :func:`adapted`."""
    return adapted(pathways, init, support, query, gates)[0]

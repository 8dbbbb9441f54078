"""The outer loops: how the shared start learns from the users who were adapted from it.

Each is a function ``(pathways, init, support, query, gates) -> (objective, loss)``: a scalar whose gradient with
respect to ``init`` is the algorithm's meta-gradient, and the users' mean query loss after adaptation, for curves.

Sources: MAML and its first-order form, Finn et al. 2017; rates learned per layer and step, Antoniou et al. 2019 (MAML++);
ANIL, Raghu et al. 2020; Reptile, Nichol et al. 2018.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from backbones.pathways import Pathways
from backbones.registry import Registry
from meta.inner import MetaInit, adapt, user_loss
from users.batch import Batch

OuterLoop = Callable[[Pathways, MetaInit, Batch, Batch, Tensor], tuple[Tensor, Tensor]]
ALGORITHMS: Registry[OuterLoop] = Registry("algorithm")


def maml(
    pathways: Pathways, init: MetaInit, support: Batch, query: Batch, gates: Tensor, *, second_order: bool
) -> tuple[Tensor, Tensor]:
    """Query loss after adaptation, differentiated with respect to the start and the inner rates.

    Args:
        pathways: as in :func:`meta.inner.adapt`, like init, support and gates.
        init: differentiable.
        support: what users are adapted on.
        gates: ``[U, P]`` bool.
        query: what the outer loss is taken on.
        second_order: MAML; without, the inner gradients count as constants (FOMAML).
    """
    weights = adapt(pathways, init, support, gates, meta=True, second_order=second_order)
    loss = user_loss(pathways.logits(query.frozen, weights, gates), query).mean()
    return loss, loss.detach()


def reptile(pathways: Pathways, init: MetaInit, support: Batch, query: Batch, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Half the squared distance from the start to where the users end, its gradient being ``start - mean end``.

    Reptile knows no query set: users are adapted on support and query together. Inner rates are not learned. A pathway
    learns from the users who had it on.
    """
    weights = adapt(pathways, init, Batch.joined(support, query), gates)
    parts = []
    for p in range(pathways.num_pathways):
        users = gates[:, p].nonzero()[:, 0]
        for key in pathways.keys[p] if len(users) else ():
            parts.append((init.weights[key] - weights[key][users].mean(0).detach()).square().sum() / 2)
    with torch.no_grad():
        loss = user_loss(pathways.logits(query.frozen, weights, gates), query).mean()
    return torch.stack(parts).sum(), loss


ALGORITHMS.register("maml", partial(maml, second_order=True))
ALGORITHMS.register("fomaml", partial(maml, second_order=False))
ALGORITHMS.register("anil", partial(maml, second_order=True))
ALGORITHMS.register("reptile", reptile)


def adapted_pathways(algorithm: str, pathways: Pathways) -> Tensor:
    """``[P]`` bool: what the inner loop changes under an algorithm. ANIL: the head alone."""
    adapted = torch.ones(pathways.num_pathways, dtype=torch.bool)
    if algorithm == "anil":
        adapted[:-1] = False
    return adapted

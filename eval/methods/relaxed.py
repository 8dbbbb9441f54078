"""Pathways that are partly on, through which a mask can be learned by gradient descent.

Shapes: U users, N examples per user, P pathways, C classes.
"""

import torch
from torch import Tensor

from backbones.pathways import Frozen, Pathways, Weights, population_logits


def no_relaxation(pathways: Pathways) -> str | None:
    """Why gates of these pathways cannot be relaxed; None: they can."""
    if not pathways.runs:
        return None
    return "gates of blocks (gates='skip') cannot be partly on: leave out the methods that relax gates, or choose other gates."


def relaxed_logits(pathways: Pathways, frozen: Frozen, weights: Weights, gates: Tensor) -> Tensor:
    """Logits ``[U, N, C]`` with gates between 0 and 1, differentiable with respect to them.

    What a pathway adds is linear in its output weights, so that these times a gate give the gate times what it adds. With
    gates of 0 and 1 the logits are exactly those of the mask. A gate of exactly 0 is not computed and gets no gradient; every
    relaxation that reaches 0 is flat there.

    Args:
        pathways: whose logits.
        frozen: sites ``[U, N, ..., width_p]``.
        weights: stacked, leading dimension U.
        gates: ``[U, P]`` float.

    Raises:
        ValueError: for gates of blocks, which are run or not.
    """
    if reason := no_relaxation(pathways):
        raise ValueError(reason)
    outputs, scaled = pathways.outputs, dict(weights)
    for p, keys in pathways.keys.items():
        for key in outputs.intersection(keys):
            gate = gates[:, p].view(-1, *[1] * (weights[key].dim() - 1))
            scaled[key] = weights[key] * gate
    on = gates.detach() > 0
    logits, own = pathways.logits(frozen, scaled, on), pathways.readout
    if own is None:
        return logits
    missing = torch.where(
        on.any(1), gates[:, own] - on[:, own].float(), 0.0
    )  # of the model's own readout, which has no weights
    return logits + population_logits(pathways.model, frozen) * missing[:, None, None]

"""What is written down about one user's predictions. Shapes: N examples, C classes."""

import numpy as np
import torch
from torch import Tensor

BINS = 10
"""Equal-width bins of confidence for the expected calibration error (Guo et al. 2017, "On calibration of modern nets")."""


def measures(logits: Tensor, labels: Tensor) -> dict[str, float | int | str]:
    """Accuracy, mean log-likelihood and calibration counts of one user's logits ``[N, C]`` on labels ``[N]``.

    Raises:
        FloatingPointError: for NaN or infinite logits.
    """
    if not logits.isfinite().all():
        raise FloatingPointError("the logits are NaN or infinite; lower the method's learning rate")
    known = logits.double().log_softmax(-1)
    confidence, guess = known.exp().max(-1)
    hits = guess == labels
    return {
        "accuracy": float(hits.double().mean()),
        "log_likelihood": float(known.gather(1, labels[:, None]).mean()),
        "examples": len(labels),
        "calibration": calibration(confidence.numpy(), hits.numpy()),
    }


def calibration(confidence: np.ndarray, hits: np.ndarray) -> str:
    """Per bin of confidence ``count:sum of confidences:hits``, joined by ``;``: sums of users give a population's error."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    sums, right = (np.bincount(bins, weights=values, minlength=BINS) for values in (confidence, hits))
    return ";".join(f"{n}:{s:.6f}:{h:.0f}" for n, s, h in zip(counts, sums, right, strict=True))


def support_order(support: int, count: int, generator: torch.Generator) -> Tensor:
    """The order in which a user's examples are shown on the support curve, ``[count]``: smaller supports are part of larger.

    First come the ``support`` examples, then the others, each in a random order.
    """
    first, rest = torch.randperm(support, generator=generator), torch.randperm(count - support, generator=generator)
    return torch.cat([first, support + rest])

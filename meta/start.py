"""Where pathways start that have to speak for themselves: fitted to what the population model was fitted on.

Where inference may end before the model's own readout, a pathway must know the classes. A few users cannot teach it that, but
the examples that the classifier was fitted on can.

Source: early exits are trained jointly with weights of their own in Teerapittayanon et al. 2016, "BranchyNet"; here on a frozen
model, and under random masks.
"""

import math

import torch
from torch import Tensor
from tqdm.auto import tqdm

from backbones.pathways import Frozen, Pathways, Weights
from meta.masks import masks_for
from users.batch import Prepared

RATE, DECAY = 3e-3, 0.1
MASKS, EXAMPLES = 8, 64
"""Masks per step, and examples under each of them."""


def fitted_start(data: Prepared, steps: int, seed: int) -> Weights:
    """Weights under which random masks answer the population's ``fitting`` examples best; the head stays at its start.

    Args:
        data: the population, seen through the model.
        steps: of AdamW, its rate falling to zero along a cosine.
        seed: of the random start, the masks and the order of examples.

    Raises:
        ValueError: if the population has no ``fitting`` examples, or nothing but those of a cross-fitted model: users are
            rewarded on these.
    """
    check_fitting(data)
    table, places, labels = data.fitting()
    pathways, draw = data.pathways, torch.Generator().manual_seed(seed)
    weights = {key: weight.requires_grad_() for key, weight in pathways.start(seed).items()}
    head = pathways.num_pathways - 1
    learned = [weights[key] for p in range(head) for key in pathways.keys[p]]
    optimiser = torch.optim.AdamW(learned, lr=RATE, weight_decay=DECAY)
    for step in tqdm(range(steps), desc="fitting where pathways start", unit="step"):
        optimiser.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
        rows = torch.randint(len(labels), (MASKS, EXAMPLES), generator=draw)
        masks = masks_for(pathways, MASKS, draw)
        masks[:, head] = False
        optimiser.zero_grad()
        _loss(pathways, taken(table, places[rows]), labels[rows], weights, masks).backward()
        optimiser.step()
    return {key: weight.detach() for key, weight in weights.items()}


def taken(table: Frozen, places: Tensor) -> Frozen:
    """The examples at some places of a table."""
    return table.map(lambda t: t[places])


def check_fitting(data: Prepared) -> None:
    """Raise ``ValueError`` where there is nothing that a start may be fitted to."""
    population = data.population
    if population.fitting is None or not len(population.fitting):
        raise ValueError(f"population {population.name!r} has no `fitting` examples to start from; set start_steps=0.")
    if population.folds is not None:
        raise ValueError(
            f"the model of population {population.name!r} is cross-fitted: users are rewarded on its fitting examples. "
            "Set start_steps=0, or choose a protocol with examples set aside."
        )


def _loss(pathways: Pathways, frozen: Frozen, labels: Tensor, weights: Weights, masks: Tensor) -> Tensor:
    shared = {key: weight.expand(MASKS, *weight.shape) for key, weight in weights.items()}
    logits = pathways.logits(frozen, shared, masks)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

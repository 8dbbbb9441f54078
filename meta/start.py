"""Where pathways start that have to speak for themselves: fitted to what the population model was fitted on.

Where inference may end before the model's own readout, a pathway must know the classes. A few users cannot teach it that, but
the examples that the classifier was fitted on can.

Source: early exits are trained jointly with weights of their own in Teerapittayanon et al. 2016, "BranchyNet", and taught by
the last one in Phuong and Lampert 2019, "Distillation-based training for multi-exit architectures"; here on a frozen model, and
under random masks.
"""

import math

import torch
from torch import Tensor
from tqdm.auto import tqdm

from backbones.pathways import Frozen, Pathways, Weights, population_logits
from backbones.pretrain import AUGMENTATIONS
from meta.masks import masks_for
from users.batch import CHUNK, Prepared

RATE, DECAY = 3e-3, 0.1
MASKS, EXAMPLES = 8, 64
"""Masks per step, and examples under each of them."""
TEACHER = 0.5
"""What the whole model says of an example counts for so much, and its label for the rest."""
CONSTANTS = [RATE, DECAY, MASKS, EXAMPLES, TEACHER]


def fitted_start(data: Prepared, steps: int, seed: int, copies: int = 0, augment: str = "shift") -> Weights:
    """Weights under which random masks answer the population's ``fitting`` examples best; the head stays at its start.

    The best answer is in between the example's label and what the whole model says.

    Args:
        data: the population, seen through the model.
        steps: of AdamW, its rate falling to zero along a cosine.
        seed: of the random start, the masks, the order of examples and their changes.
        copies: changed copies of every example, beside it: what a model was fitted on is seldom in doubt for it.
        augment: how copies are changed, a name from :data:`backbones.pretrain.AUGMENTATIONS`.

    Raises:
        ValueError: if the population has no ``fitting`` examples, or nothing but those of a cross-fitted model: users are
            rewarded on these; for copies of what are no images.
    """
    check_fitting(data, copies)
    pathways, draw = data.pathways, torch.Generator().manual_seed(seed)
    table, places, labels = with_copies(data, copies, augment, draw) if copies else data.fitting()
    with torch.no_grad():
        said = population_logits(pathways.model, table)[places].softmax(1)
    answers = TEACHER * said + (1 - TEACHER) * torch.nn.functional.one_hot(labels, said.shape[1])
    weights = {key: weight.requires_grad_() for key, weight in pathways.start(seed).items()}
    head = pathways.num_pathways - 1
    learned = [weights[key] for p in range(head) for key in pathways.keys[p]]
    optimiser = torch.optim.AdamW(learned, lr=RATE, weight_decay=DECAY)
    for step in tqdm(range(steps), desc="fitting where pathways start", unit="step"):
        optimiser.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
        rows = torch.randint(len(places), (MASKS, EXAMPLES), generator=draw)
        masks = masks_for(pathways, MASKS, draw)
        masks[:, head] = False
        optimiser.zero_grad()
        _loss(pathways, taken(table, places[rows]), answers[rows], weights, masks).backward()
        optimiser.step()
    return {key: weight.detach() for key, weight in weights.items()}


def with_copies(data: Prepared, copies: int, augment: str, draw: torch.Generator) -> tuple[Frozen, Tensor, Tensor]:
    """As :meth:`users.batch.Prepared.fitting`, with changed copies of every image behind the rest.

    Raises:
        ValueError: for an unknown augmentation, with a suggestion.
    """
    population, backbone, change = data.population, data.pathways.model.backbone, AUGMENTATIONS.get(augment)
    fitting, (table, places, labels) = population.fitting, data.fitting()
    assert fitting is not None
    parts, everything = [], fitting.inputs.repeat(copies, *[1] * (fitting.inputs.dim() - 1))
    for some in tqdm(everything.split(CHUNK), desc="changed copies to start from", unit="batch"):
        raw = some if population.items is None else population.items.take(some.tolist())
        parts.append(data.pathways.frozen(change(backbone.prepare(raw), draw)))
    new = len(table.sites[0]) + torch.arange(copies * len(places))
    return Frozen.cat([table, *parts]), torch.cat([places, new]), labels.repeat(copies + 1)


def taken(table: Frozen, places: Tensor) -> Frozen:
    """The examples at some places of a table."""
    return table.map(lambda t: t[places])


def check_fitting(data: Prepared, copies: int = 0) -> None:
    """Raise ``ValueError`` where there is nothing that a start may be fitted to, or nothing of which copies can be made."""
    population, none = data.population, "start_steps=0 and start_copies=0"
    if population.fitting is None or not len(population.fitting):
        raise ValueError(f"population {population.name!r} has no `fitting` examples to start from; set {none}.")
    seen = data.pathways.model.backbone.reference_inputs()
    if copies and not (seen.is_floating_point() and seen.dim() == 4):
        raise ValueError(f"changed copies are made of images, and population {population.name!r} has none: set start_copies=0.")
    if population.folds is not None:
        raise ValueError(
            f"the model of population {population.name!r} is cross-fitted: users are rewarded on its fitting examples. "
            f"Set {none}, or choose a protocol with examples set aside."
        )


def _loss(pathways: Pathways, frozen: Frozen, answers: Tensor, weights: Weights, masks: Tensor) -> Tensor:
    shared = {key: weight.expand(MASKS, *weight.shape) for key, weight in weights.items()}
    logits = pathways.logits(frozen, shared, masks)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten(0, 1))

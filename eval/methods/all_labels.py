"""Rivals that use support and validation examples of a user: ``all_on_all_labels`` and ``validation_search``.

Shapes: U users, P pathways, M masks.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from agents.rivals import EXHAUSTIVE, best_static, candidate_masks
from backbones.base import hash_tensors
from eval.group import Group
from eval.methods.base import Fitted, Predictor
from eval.methods.pathway import Chooser, PathwayPredictor
from eval.world import World
from meta.inner import adapt, measure


@dataclass(frozen=True)
class AllOnAllLabels(Chooser):
    """Every pathway, adapted on support and validation examples together: what the labels are worth that others choose with."""

    labels: ClassVar[str] = "all"

    def choose(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Tensor:
        """See :meth:`Chooser.choose`."""
        return torch.ones(len(shown), world.pathways.num_pathways, dtype=torch.bool)


@dataclass(frozen=True)
class ValidationSearch(Chooser):
    """Many masks, each adapted on the user's support; kept is the one with the highest reward on their validation examples.

    Every mask where there are at most 8 pathways, else the best static mask and at least 256 others, all-on and all-off among
    them (:func:`agents.rivals.candidate_masks`). Of equally good masks the cheapest is taken.
    """

    scope: ClassVar[str] = "mask per user, by optimisation"
    labels: ClassVar[str] = "all"
    trades: ClassVar[bool] = True

    def fit(self, world: World, cost_weight: float) -> Fitted:
        """See :meth:`Method.fit`: the masks to try, ``[M, P]``."""
        masks = _usual(world)
        if world.pathways.num_pathways > EXHAUSTIVE:
            masks = np.concatenate([masks, best_static(world.scenario, cost_weight, world.seed)[None]])
        return Fitted({"masks": torch.from_numpy(masks)})

    def tries(self, world: World) -> int:
        """See :meth:`Chooser.tries`: M."""
        return len(_usual(world)) + (world.pathways.num_pathways > EXHAUSTIVE)

    def choose(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Tensor:
        """See :meth:`Chooser.choose`."""
        support, validation = _parts(shown)
        masks, costs = fitted.tensors["masks"], world.pathways.costs
        last = int(world.pathways.num_pathways > EXHAUSTIVE)  # the best static mask, which alone follows the cost weight
        kinds = masks.split([len(masks) - last, last]) if last else [masks]
        found = torch.cat([_accuracies(world, each, support, validation) for each in kinds], dim=1)
        return masks[(found - (cost_weight + 1e-9) * costs(masks)).argmax(1)]

    def adapt(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Predictor:
        """See :meth:`Method.adapt`. The weights are those that were judged, adapted on the support alone."""
        masks = self.choose(world, fitted, shown, cost_weight)
        weights = adapt(world.pathways, world.init, _parts(shown)[0].batch, masks)
        return PathwayPredictor(world.pathways, weights, masks, world.init.adapted, self.tries(world) + 1)


_LATEST: dict[str, Tensor] = {}
"""Answers to the latest questions: every cost weight asks almost the same."""
REMEMBERED = 128
"""Questions."""


def _accuracies(world: World, masks: Tensor, support: Group, validation: Group) -> Tensor:
    """Of users adapted under every mask, on their validation examples, ``[U, M]`` double."""
    told = [t for group in (support, validation) for each in group.examples for t in (each.inputs, each.labels)]
    question = hash_tensors({"masks": masks, **{str(n): tensor for n, tensor in enumerate(told)}}) + world.scenario.fingerprint
    if question in _LATEST:
        return _LATEST[question]
    found = torch.empty(len(support), len(masks), dtype=torch.float64)
    for m, mask in enumerate(tqdm(masks, desc="search on validation labels", unit="mask", leave=False, delay=3)):
        gates = mask.repeat(len(support), 1)
        weights = adapt(world.pathways, world.init, support.batch, gates)
        accuracy, _ = measure(world.pathways, weights, gates, validation.batch)
        found[:, m] = accuracy.double().round(decimals=6)  # equal shares of hits may differ in their last bits
    while len(_LATEST) >= REMEMBERED:
        del _LATEST[next(iter(_LATEST))]
    _LATEST[question] = found
    return found


def _usual(world: World) -> np.ndarray:
    """The masks that are tried whatever the cost weight."""
    return candidate_masks(world.pathways.num_pathways, np.random.default_rng(0))


def _parts(shown: Group) -> tuple[Group, Group]:
    if shown.parts is None:
        raise ValueError("a search on validation examples needs them apart from the support: join two groups by Group.joined.")
    return shown.parts

"""Whether a user has changed, so that what they showed earlier misleads.

Shapes: N examples, the earlier ones first, M of them new; K folds; P pathways.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from backbones.pathways import Pathways, Weights
from meta.inner import MetaInit, adapt, measure
from serving.examples import batch_of, both
from serving.records import Adapter
from users.base import Examples
from users.batch import Batch

FOLDS = 5


def has_changed(pathways: Pathways, init: MetaInit, adapter: Adapter, earlier: Examples, new: Examples) -> bool:
    """Whether earlier examples make new ones harder to predict, so that they had better be left out.

    Two questions, both in mean log-likelihood of new examples; a yes to either suffices:

    * Does the adapter made from the earlier examples predict them worse than the bare model does, or than adapters do, with
      everything on, that are made of one half of the new ones and asked about the other?
    * Held out a fifth at a time, are they predicted worse by adapters made of the other new ones and the earlier ones than by
      adapters made of the other new ones alone?

    A single new example cannot be split: the bare model alone is compared. Somebody who is served the bare model has no adapter
    to ask: the second question decides.

    Args:
        pathways: along the model.
        init: where users start.
        adapter: the user's, made from ``earlier``.
        earlier: examples, one at least.
        new: examples, one at least.

    Raises:
        ValueError: for images of different sizes.
    """
    told = _Told(pathways, init, earlier, new)
    weights = {key: value[None] for key, value in (init.weights | adapter.weights).items()}
    known = told.loss_of(weights, adapter.gates)
    if known > told.loss_of(weights, torch.zeros_like(adapter.gates)):
        return True
    if len(new) == 1:
        return False
    personal = bool((adapter.gates & (pathways.sizes > 0)).any())
    if personal and known > told.held_out(2, earlier=False):
        return True
    return told.held_out(FOLDS, earlier=True) > told.held_out(FOLDS, earlier=False)


@dataclass(frozen=True)
class _Told:
    """What one user has shown."""

    pathways: Pathways
    init: MetaInit
    earlier: Examples
    new: Examples

    @cached_property
    def batch(self) -> Batch:
        """All N examples after the frozen model."""
        return batch_of(self.pathways, [both(self.earlier, self.new)])

    @cached_property
    def place(self) -> Tensor:
        """``[N]``: which of the new examples each one is, negative for earlier ones."""
        return torch.arange(-len(self.earlier), len(self.new))

    def held_out(self, folds: int, earlier: bool) -> float:
        """Loss of new examples by adapters made of the other folds, and of the earlier examples or not; everything is on."""
        fold = torch.arange(min(folds, len(self.new)))[:, None]
        asked = (self.place >= 0) & (self.place % len(fold) == fold)
        gates = torch.ones(len(fold), self.pathways.num_pathways, dtype=torch.bool)
        weights = adapt(self.pathways, self.init, self._only(~asked & ((self.place >= 0) | earlier)), gates)
        found = measure(self.pathways, weights, gates, self._only(asked))[1]
        return float((found * asked.sum(1)).sum()) / len(self.new)

    def loss_of(self, weights: Weights, gates: Tensor) -> float:
        """Loss of all new examples by one adapter, ``gates [P]``."""
        return float(measure(self.pathways, weights, gates[None], self._only((self.place >= 0)[None]))[1])

    def _only(self, present: Tensor) -> Batch:
        """The examples alone that are ``present [K, N]``, as K users."""
        columns = present.any(0).nonzero()[:, 0]  # what nobody reads is not computed
        some = self.batch.rows(torch.zeros(len(present), dtype=torch.long)).columns(columns)
        return replace(some, weights=present[:, columns] / present.sum(1, keepdim=True))

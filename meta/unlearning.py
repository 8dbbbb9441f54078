"""Unlearning users from the shared start without training anew: a patch, learned on those who stay, overwrites.

The pathways that users' examples change most get a patch: a random part of their weights (or all) may change, everything else
of the start stays. These first go to where nobody who leaves has ever been: to what val users teach, who are public, or to a
new random start. From there the patch is meta-trained on the users who stay for a fraction of the steps that the start took.
It is kept apart from the start: without it the start is, to the bit, what it was.

Source: Zhong et al. 2025, "Unlearning through Knowledge Overwriting: Reversible Federated Unlearning via Selective Sparse
Adapter" (FUSED): layers chosen by the distance between what users trained and what they were given, sparse adapters on these,
trained on the remaining users. Sparse patches hide those who leave less well than the default, which may change everything
(``docs/privacy.md``); that it begins where they have never been is after Bourtoule et al. 2021, "Machine Unlearning". A patch
is no guarantee: inner rates stay, and below a ``share``, ``density`` or ``fresh`` of 1 weights do. What it leaves behind is
what attacks find (``eval.unlearning``).

Shapes: U users, P pathways.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backbones.pathways import Pathways, Weights
from meta.inner import MetaInit, adapt
from meta.private import together
from meta.trainer import Log, MetaConfig, MetaTrainer
from users.batch import Rows

KIND = "patch of a meta-initialisation"
ASKED = 200
"""At most so many of the users who stay say which pathways are changed most."""


@dataclass(frozen=True)
class Unlearning:
    """How a patch is learned.

    Attributes:
        share: of the pathways that are patched, those that users change most.
        density: share of their weights that the patch may change.
        public_steps: in which val users teach where the patch begins; once, whoever leaves later. 0: a random start.
        fresh: how far these weights first go there from where they are, 0..1 (Ash & Adams 2020, "On Warm-Starting Neural
            Network Training"): what was known by heart goes, the more the further.
        steps: outer steps on the users who stay.
        users: of them per step.
        rate: Adam's learning rate, falling to zero along a cosine.
        seed: of the weights that may change, the users of a step and their masks.

    Raises:
        ValueError: for values out of range.
    """

    share: float = 1.0
    density: float = 1.0
    public_steps: int = 1200
    fresh: float = 1.0
    steps: int = 110
    users: int = 20
    rate: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("share", "density"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}.")
        if not 0 <= self.fresh <= 1:
            raise ValueError(f"fresh must be 0 to 1, got {self.fresh}.")
        if self.steps < 1 or self.users < 1 or self.public_steps < 0 or not self.rate > 0:
            raise ValueError(f"steps and users must be at least 1, public_steps at least 0 and rate above 0, got {self}.")


@dataclass(frozen=True)
class Patch:
    """What is added to a start: ``{key: values}`` at ``{key: places in the flattened weight}``, one dimension each."""

    places: Mapping[str, Tensor]
    values: Mapping[str, Tensor]

    def added_to(self, init: MetaInit) -> MetaInit:
        """The start with the patch. The start itself is not changed: to undo, go back to it."""
        weights = dict(init.weights)
        for key, values in self.values.items():
            weights[key] = weights[key].flatten().index_add(0, self.places[key], values).view_as(weights[key])
        return replace(init, weights=weights)

    def tensors(self) -> dict[str, Tensor]:
        """For saving."""
        named = {"places": self.places, "values": self.values}
        return {f"{what}/{key}": tensor for what, some in named.items() for key, tensor in some.items()}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> "Patch":
        """The inverse of :meth:`tensors`."""
        found: dict[str, dict[str, Tensor]] = {"places": {}, "values": {}}
        for name, tensor in tensors.items():
            what, _, key = name.partition("/")
            found[what][key] = tensor
        return Patch(**found)


@torch.no_grad()
def sensitivity(pathways: Pathways, init: MetaInit, support: Rows) -> Tensor:
    """By how much users change each pathway when they adapt with everything on: mean absolute change of a weight, ``[P]``."""
    total, count = torch.zeros(pathways.num_pathways), min(len(support), ASKED)
    for users in torch.arange(count).split(together(pathways)):
        gates = torch.ones(len(users), pathways.num_pathways, dtype=torch.bool)
        weights = adapt(pathways, init, support.rows(users), gates)
        for p in range(pathways.num_pathways):
            for key in pathways.keys[p]:
                total[p] += (weights[key] - init.weights[key]).abs().sum()
    return total / count / pathways.sizes.clamp_min(1)


def patchable(pathways: Pathways, init: MetaInit, support: Rows, how: Unlearning) -> dict[str, Tensor]:
    """Where the patch may change the start: places in each flattened weight of the most sensitive pathways."""
    bearing = (pathways.sizes > 0).nonzero()[:, 0]
    ranked = bearing[sensitivity(pathways, init, support)[bearing].argsort(descending=True)]
    draw = torch.Generator().manual_seed(how.seed)
    places = {}
    for p in sorted(ranked[: math.ceil(how.share * len(ranked))].tolist()):
        for key in pathways.keys[p]:
            size = init.weights[key].numel()
            places[key] = torch.randperm(size, generator=draw)[: math.ceil(how.density * size)].sort().values
    return places


def plainly(config: MetaConfig) -> MetaConfig:
    """How a start was learned, without what val users chose of it, or taught."""
    return replace(config, keep="last", shrink=False, public_steps=0, neutral=False, random_start=False)


def unlearned(
    pathways: Pathways,
    init: MetaInit,
    support: Rows,
    query: Rows,
    config: MetaConfig,
    how: Unlearning,
    towards: Weights | None = None,
    log: Log | None = None,
) -> Patch:
    """A patch of a start, learned on the users who stay.

    Args:
        pathways: of the start.
        init: the start that has seen somebody who leaves.
        support: examples of those who stay; nobody else's are looked at.
        query: theirs likewise.
        config: how the start was learned: the algorithm, whether examples are dealt anew.
        how: the patch.
        towards: weights that val users taught, see :func:`meta.learned.public_start`; None: random ones.
        log: for curves, as in :meth:`meta.trainer.MetaTrainer.run`.

    Raises:
        ValueError: without the weights that val users are to have taught.
    """
    if how.public_steps and how.fresh and towards is None:
        raise ValueError("this patch begins where val users lead: give their weights (public_start), or public_steps=0.")
    places = patchable(pathways, init, support, how)
    learn = replace(
        plainly(config), steps=how.steps, users=min(how.users, len(support)), inner_steps=init.steps, outer_rate=how.rate,
        seed=how.seed,
    )  # fmt: skip
    trainer, new = MetaTrainer(pathways, support, query, learn, start=init), towards or pathways.start(how.seed + 1)
    for key, weight in trainer.weights.items():
        free = torch.zeros(weight.numel())
        if key in places:
            free[places[key]] = 1
            weight.data.lerp_(new[key], how.fresh * free.view_as(weight))
        weight.register_hook(free.view_as(weight).mul)  # Adam leaves alone what has no gradient
    trainer.log_rates.register_hook(torch.zeros_like)
    found = trainer.run(log).weights
    return Patch(places, {key: (found[key] - init.weights[key]).flatten()[where] for key, where in places.items()})

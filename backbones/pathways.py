"""Pathways: small gateable adapters along a frozen model, for many users in one tensor program.

Shapes: U users, N examples per user, P pathways, C classes, F features, r rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backbones.base import Hidden, PopulationModel
from backbones.costs import CostModel
from backbones.registry import Registry, did_you_mean

Work = Callable[[], object]
GATES = ("adapters", "exit", "skip", "exit+skip")
"""What a mask may switch: personal pathways alone; or the model's own readout too, without which inference may end early; or
every block that the identity may stand in for; or both."""
READOUT, RUN = "readout", ".run"
"""What the pathway of the model's own readout is called, and how the names of the gates of blocks end."""
PRODUCT = ".product"
"""How the key ends of what a matrix makes of fixed inputs, given in place of the matrix: see :meth:`Pathways.fixed`."""

Weights = dict[str, Tensor]
"""Adapter weights by key ``"<pathway>.<part>"``; one user's, or stacked with a leading user dimension."""


@dataclass(frozen=True)
class Frozen:
    """What can be computed before any pathway is chosen, and therefore once per example.

    Attributes:
        sites: P tensors ``[..., width_p]`` with leading dimensions of examples: what pathway p reads as long as no
            pathway before it is on.
        context: tensors that travel along with the hidden states (an attention mask).
        offset: ``[..., C]``, added to the logits whatever the mask; None for zero. A cross-fitted population model
            corrects its logits of the examples that it was fitted on by it.
    """

    sites: Sequence[Tensor]
    context: Mapping[str, Tensor] = field(default_factory=dict)
    offset: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Frozen":
        """Apply ``function`` to every tensor."""
        context = {k: function(v) for k, v in self.context.items()}
        return Frozen(tuple(map(function, self.sites)), context, None if self.offset is None else function(self.offset))

    @staticmethod
    def cat(parts: Sequence["Frozen"]) -> "Frozen":
        """Further examples after each other; shorter sequences are padded with zeros (False in an attention mask).

        Raises:
            ValueError: if some parts have an offset and others have none.
        """
        sites = tuple(_cat(site) for site in zip(*(part.sites for part in parts), strict=True))
        context = {k: _cat([part.context[k] for part in parts]) for k in parts[0].context}
        offsets = [part.offset for part in parts if part.offset is not None]
        if 0 < len(offsets) < len(parts):  # the offset would be lost, or be that of other examples
            raise ValueError(
                f"{len(offsets)} of {len(parts)} parts have an offset from cross-fitting; prepare all of them with the same "
                "population, or none with one that has folds."
            )
        return Frozen(sites, context, torch.cat(offsets) if offsets else None)


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    longest = max(t.shape[1:2] for t in tensors)
    if all(t.shape[1:2] == longest for t in tensors):
        return torch.cat(list(tensors))
    out = tensors[0].new_zeros(sum(map(len, tensors)), *longest, *tensors[0].shape[2:])
    start = 0
    for t in tensors:
        out[start : start + len(t), : t.shape[1]] = t
        start += len(t)
    return out


@dataclass(frozen=True)
class Under(Frozen):
    """What pathways read under masks that leave blocks out; see :meth:`Pathways.under`."""


def population_logits(model: PopulationModel, frozen: Frozen) -> Tensor:
    """Logits ``[..., C]`` with every pathway off, from readout features and offset."""
    logits = torch.nn.functional.linear(frozen.sites[-1], model.weight, model.bias)
    return logits if frozen.offset is None else logits + frozen.offset


class Pathways(ABC):
    """P gateable units along a frozen population model; the last one is the user's head.

    With the gates ``"exit"`` the model's own readout is one more, the last but one. Where it is off its logits count for
    nothing, and nothing is run beyond the deepest block that an active pathway reads (of the head the last one). With the
    gates ``"skip"`` every block of one shape in and out has a gate of its own, ``"<block>.run"``, behind the adapters; where
    it is off the block is not run, see :meth:`Backbone.without`. A mask without anything that speaks (a personal pathway, or
    the readout where it has a gate) is executed as `all_off`, the whole bare model: see :meth:`executed`.

    Sources: early exits, Teerapittayanon et al. 2016, "BranchyNet"; blocks left out, Wu et al. 2018, "BlockDrop", and
    Huang et al. 2016, "Deep Networks with Stochastic Depth".

    Attributes:
        model: the frozen model.
        gates: one of :data:`GATES`.
        names: P unique names: sites in order of depth, the blocks' own gates, ``"readout"``, ``"head"``.
        site_of: how many blocks are before what each pathway reads, or lets run: B for readout and head.
        runs: by block that may be left out, its gate's place among the pathways.
        reach: ``[P]``, how many stretches of the network (the blocks, then the readout) a pathway needs; 0 for blocks' gates.
        widths: what each pathway reads, ``width_p``.
        costs: of masks; personal parameters switched on, as long as nobody sets another model.
        pooled: whether :meth:`frozen` keeps one vector per example and site: little enough to keep on disk.
        bears: the gates that the placement bears, names in :data:`GATES`.
        rate_scale: what share of an inner learning rate the blocks' pathways bear.

    Raises:
        ValueError: for a rank below 1, a block of a name that is taken, and gates that are unknown or that the placement does
            not bear.
    """

    pooled: bool
    bears: tuple[str, ...] = ("adapters",)
    rate_scale: float = 1.0

    def __init__(self, model: PopulationModel, rank: int = 16, gates: str = "adapters") -> None:
        if rank < 1:
            raise ValueError(f"the rank of an adapter must be at least 1, got {rank}.")
        if gates not in GATES:
            raise ValueError(f"unknown gates {gates!r}. {did_you_mean(gates, GATES)}")
        if gates not in self.bears:
            raise ValueError(_not_borne(gates))
        self.model, self.rank, self.gates = model, rank, gates
        blocks = model.backbone.block_names
        if taken := sorted(name for name in blocks if name in ("stem", READOUT, "head") or name.endswith(RUN)):
            raise ValueError(f"a block is called {taken[0]!r}, which means something else here: give it another name.")
        last = len(blocks)
        left_out = [b for b, spec in enumerate(model.backbone.specs()) if spec.skippable] if "skip" in gates else []
        own = (READOUT,) if self.exits else ()
        self.runs = {b: last + place for place, b in enumerate(left_out)}
        self.names = (*blocks, *(f"{blocks[b]}{RUN}" for b in left_out), *own, "head")
        self.site_of = (*range(last), *left_out, *(last for _ in own), last)
        self.reach = torch.tensor([site + 1 if self.exits else last + 1 for site in self.site_of])
        self.reach[[*self.runs.values()]] = 0
        widths = (*self.read_widths(), model.backbone.feature_width)
        self.widths = tuple(widths[site] for site in self.site_of)
        self.keys = {p: tuple(self.initial(torch.Generator(), p)) for p in range(len(self.names))}
        self.sizes = torch.tensor(
            [sum(w.numel() for w in self.initial(torch.Generator(), p).values()) for p in range(len(self.names))]
        )
        self.costs = CostModel.of_pathways(self.sizes.double() / self.sizes.sum())

    @property
    def outputs(self) -> frozenset[str]:
        """Keys of the weights through which pathways speak: with all of them zero, every mask is the population model."""
        parts = ("up", "up_bias", "weight", "bias")
        return frozenset(key for keys in self.keys.values() for key in keys if key.rpartition(".")[2] in parts)

    @property
    def num_pathways(self) -> int:
        """P."""
        return len(self.names)

    def read_widths(self) -> list[int]:
        """What pathways at the blocks read, by block."""
        return [spec.width for spec in self.model.backbone.specs()]

    @property
    def exits(self) -> bool:
        """Whether inference may end before the last block."""
        return "exit" in self.gates

    @property
    def readout(self) -> int | None:
        """Which pathway is the model's own readout; None where that is always on."""
        return self.names.index(READOUT) if self.exits else None

    def depth(self, masks: Tensor) -> Tensor:
        """How many stretches of the network executed masks ``[U, P]`` need, ``[U]``: the blocks, then the readout."""
        if not self.exits:
            return torch.full((len(masks),), self.site_of[-1] + 1)
        return (self.reach * masks).amax(1)

    def executed(self, masks: Tensor) -> Tensor:
        """What is run for masks ``[U, P]``: where nothing speaks, the blocks and the model's own readout are on."""
        speaks, stands = (torch.from_numpy(places) for places in whole_model(self.names))
        if not len(stands):
            return masks
        silent = ~masks[:, speaks].any(1, keepdim=True)
        return masks.index_put((torch.arange(len(masks))[:, None], stands), masks[:, stands] | silent)

    def site(self, frozen: Frozen, place: int) -> Tensor:
        """What is read behind so many blocks, ``[..., width]``; where blocks may be left out, what they start from is first."""
        return frozen.sites[place + bool(self.runs)]

    def under(self, frozen: Frozen, gates: Tensor) -> Frozen:
        """``frozen [U, N, ...]`` as it is under masks ``[U, P]``, for several calls of :meth:`logits`: here as it is."""
        return frozen

    def fixed(self, pathway: int) -> str | None:
        """The key of the matrix of a pathway that multiplies what no weight changes, if it has one.

        In place of such a matrix :meth:`logits` takes its product, under the key with :data:`PRODUCT`: ``[R, N, outputs]`` for
        the R users who have the pathway on.
        """
        return None

    def multiplied(self, pathway: int, frozen: Frozen, rows: Tensor) -> Tensor:
        """What the matrix of :meth:`fixed` multiplies, ``[R, N, width_p]``, for some users: what the pathway reads.

        ``frozen`` is as :meth:`under` has it.
        """
        return rows_of(self.pool(pathway, frozen), rows)

    def run_block(self, index: int, hidden: Hidden, gates: Tensor) -> Hidden:
        """Block ``index`` on the states of R users ``[R * N, ...]`` under their masks ``[R, P]``, of whom some leave it out."""
        backbone = self.model.backbone
        if index not in self.runs or gates[:, self.runs[index]].all():
            return backbone.block(index, hidden)
        places = gates[:, self.runs[index]].repeat_interleave(len(hidden.tensor) // len(gates)).nonzero()[:, 0]
        instead = backbone.without(index, hidden)
        if not len(places):
            return instead
        return instead.with_tensor(instead.tensor.index_copy(0, places, backbone.block(index, hidden.at(places)).tensor))

    @abstractmethod
    def out_width(self, pathway: int) -> int:
        """What an adapter's up-projection writes: channels of its site, or logits."""

    def initial(self, generator: torch.Generator, pathway: int) -> Weights:
        """A random start of one pathway's weights, near enough to zero that all-on equals the model to 1e-2.

        At exactly zero, ``down`` would get no gradient in the first inner step.
        """
        name, width = self.names[pathway], self.widths[pathway]
        if len(self.model.backbone.blocks) <= pathway < len(self.names) - 1:
            return {}  # blocks and readout are the population's
        if name == "head":
            return {
                "head.weight": torch.zeros(width, self.model.num_classes),
                "head.bias": torch.zeros(self.model.num_classes),
            }
        out = self.out_width(pathway)
        return {
            f"{name}.down": torch.randn(width, self.rank, generator=generator) / width**0.5,
            f"{name}.down_bias": torch.zeros(self.rank),
            f"{name}.up": torch.randn(self.rank, out, generator=generator) * 1e-3 / self.rank,
            f"{name}.up_bias": torch.zeros(out),
        }

    @abstractmethod
    def frozen(self, inputs: Tensor) -> Frozen:
        """Run the frozen part on ``inputs [M, ...]``; no gradients."""

    @abstractmethod
    def pool(self, pathway: int, frozen: Frozen) -> Tensor:
        """What a pathway reads, as one vector per example: ``[U, N, width_p]``."""

    @abstractmethod
    def logits(self, frozen: Frozen, weights: Weights, gates: Tensor, changes: Tensor | None = None) -> Tensor:
        """Logits of U users at once.

        Args:
            frozen: sites ``[U, N, ..., width_p]``.
            weights: stacked, leading dimension U; or products in place of some, see :meth:`fixed`.
            gates: ``[U, P]`` bool. A pathway that is off is not computed for that user.
            changes: if given, ``[U, N, P]`` to be filled with ``||delta|| / ||h||`` where a pathway is on.

        Returns:
            ``[U, N, C]``.
        """

    @abstractmethod
    def forward(self, inputs: Tensor, weights: Weights, gates: Tensor) -> Tensor:
        """Logits ``[U, N, C]`` from raw inputs ``[U, N, ...]``: frozen model and pathways in one pass, as when serving."""

    @abstractmethod
    def work(self, pathway: int, hidden: Hidden, weights: Weights) -> Work:
        """What one user's pathway computes beside the frozen model, ready to be run: to be counted, or timed.

        Args:
            pathway: p.
            hidden: states of N examples before block p (of the head: features).
            weights: the user's, leading dimension 1.
        """

    def start(self, seed: int) -> Weights:
        """A random start of every pathway, from one seed."""
        generator = torch.Generator().manual_seed(seed)
        return {k: v for p in range(self.num_pathways) for k, v in self.initial(generator, p).items()}


PLACEMENTS: Registry[Callable[[PopulationModel, int, str], Pathways]] = Registry("placement")


@PLACEMENTS.decorate("inline")
def _inline(model: PopulationModel, rank: int, gates: str) -> Pathways:
    from backbones.inline import InlinePathways

    return InlinePathways(model, rank, gates)


@PLACEMENTS.decorate("lora")
def _lora(model: PopulationModel, rank: int, gates: str) -> Pathways:
    from backbones.lora import LoraPathways

    return LoraPathways(model, rank, gates)


@PLACEMENTS.decorate("side")
def _side(model: PopulationModel, rank: int, gates: str) -> Pathways:
    from backbones.side import SidePathways

    return SidePathways(model, rank, gates)


@cache
def whole_model(names: tuple[str, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of pathways of these names, the places of those that speak, and of those that stand for the model as it was."""
    runs = np.array([name.endswith(RUN) for name in names])
    return (~runs).nonzero()[0], (runs | np.array([name == READOUT for name in names])).nonzero()[0]


def executed(names: Sequence[str], masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """What is run for masks ``[..., P]``: where nothing speaks, such blocks and readout as have a gate are on."""
    speaks, stands = whole_model(tuple(names))
    if not len(stands):
        return masks
    masks = masks.copy()
    masks[..., stands] |= ~masks[..., speaks].any(-1, keepdims=True)
    return masks


def _not_borne(gates: str) -> str:
    if "exit" in gates:
        return f"inference can end early only where no pathway feeds a later block: gates={gates!r} needs placement='side'."
    return (
        f"an update of a block's own weights is nothing without the block: gates={gates!r} needs placement 'inline' or 'side'."
    )


def make_pathways(placement: str, model: PopulationModel, rank: int = 16, gates: str = "adapters") -> Pathways:
    """Pathways of the named placement along ``model``. Raises ``ValueError`` with a suggestion for unknown names."""
    return PLACEMENTS.get(placement)(model, rank, gates)


def rows_of(tensor: Tensor, rows: Tensor) -> Tensor:
    """``tensor[rows]``, without a copy where that is everything in order."""
    if len(rows) == len(tensor) and torch.equal(rows, torch.arange(len(rows))):
        return tensor
    return tensor.index_select(0, rows)

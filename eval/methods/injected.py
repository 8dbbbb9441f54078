"""Adapters that the library PEFT (Mangrulkar et al. 2022) puts into a copy of our own backbones, fine-tuned user by user."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from backbones.base import Backbone
from backbones.registry import did_you_mean
from eval.methods.base import Fitted
from eval.methods.finetune import FineTuned, Tunable
from eval.world import World

ADAPTER = "default"
"""What PEFT calls the adapter: there is one, whose weights are changed from user to user."""
HEADS = ("nothing", "bias", "all")
WHERE = ("usual", "all")


@dataclass(frozen=True)
class Injected(FineTuned):
    """Abstract: which modules of the backbone get adapters, and which adapters, is the subclass's.

    PEFT replaces modules of a copy of the backbone in place; those of the population model are not touched. Every user
    starts from the same random weights, which follow from the world's seed.

    Attributes:
        head: what of the classifier is trained along: ``nothing``, its ``bias``, or ``all``.

    Raises:
        ValueError: for another ``head``.
    """

    head: str = "bias"

    needs: ClassVar[tuple[str, ...]] = ("peft",)

    def __post_init__(self) -> None:
        check_choice("head", self.head, HEADS)

    @abstractmethod
    def targets(self, backbone: Backbone) -> list[str]:
        """Full paths within the backbone of the modules that get an adapter."""

    @abstractmethod
    def inject(self, backbone: Backbone, targets: list[str]) -> Any:
        """Put adapters in, in place: PEFT's model around the backbone, in which they alone require gradients.

        May draw from torch's global random numbers: those are seeded before, and restored afterwards.
        """

    def refuses(self, world: World) -> str | None:
        """See :meth:`Method.refuses`."""
        if self.targets(world.model.backbone):
            return None
        return (
            f"no block of {type(world.model.backbone).__name__} has a module that {type(self).__name__} adapts there; "
            "see `targets` in its file."
        )

    def tunable(self, world: World, fitted: Fitted) -> Tunable:
        """See :meth:`FineTuned.tunable`."""
        with torch.random.fork_rng(devices=[]):
            model = Tunable(world.model)
            torch.manual_seed(world.generator(type(self).__name__, "start").initial_seed())
            model.backbone = self.inject(model.backbone, self.targets(world.model.backbone))
        model.classifier.bias.requires_grad_(self.head != "nothing")
        model.classifier.weight.requires_grad_(self.head == "all")
        return model


@dataclass(frozen=True)
class Ranked(Injected):
    """Abstract: adapters whose size a rank says, on the weights that :func:`matrices` names.

    Attributes:
        rank: of the adapters. where: ``usual`` or ``all``.

    Raises:
        ValueError: for a rank below 1, or another ``where``.
    """

    rank: int = 4
    where: str = "usual"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("where", self.where, WHERE)
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}.")

    def targets(self, backbone: Backbone) -> list[str]:
        """See :meth:`Injected.targets`."""
        return matrices(backbone, self.where)


def check_choice(field: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ``ValueError`` unless the hyperparameter has one of the known values."""
    if value not in known:
        raise ValueError(f"{field}={value!r} is none of {', '.join(known)}. {did_you_mean(value, known)}")


def modules(backbone: Backbone) -> dict[str, nn.Module]:
    """The dense layers and convolutions of the blocks by full path.

    Full paths, because PEFT takes the shorter ``query`` for every module whose path ends so. Without those of torch's own
    ``MultiheadAttention``: it reads their weights without calling them, so that an adapter there would do nothing.
    """
    closed = [path for path, module in backbone.named_modules() if isinstance(module, nn.MultiheadAttention)]
    return {
        path: module
        for path, module in backbone.named_modules()
        if path.startswith("blocks.")
        and isinstance(module, nn.Linear | nn.Conv2d)
        and not any(path.startswith(f"{outer}.") for outer in closed)
    }


def matrices(backbone: Backbone, where: str) -> list[str]:
    """Paths of weights to be updated: ``all`` dense layers and convolutions of the blocks, or the ``usual`` ones.

    Usual are the query and value projections (Hu et al. 2022) and 3x3 convolutions.
    """
    found = modules(backbone)
    if where == "all":
        return list(found)
    return [path for path, module in found.items() if _usual(path, module)]


def _usual(path: str, module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (3, 3)
    return path.rpartition(".")[2] in ("query", "value")

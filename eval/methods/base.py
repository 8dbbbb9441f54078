"""What a way of personalising is: fitted on a population without its test users, then shown users one by one or many at once.

Shapes: U users, N examples per user, P pathways, C classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from backbones.base import hash_tensors
from backbones.pathways import population_logits
from eval.group import Group
from eval.world import World

SCOPES = ("nobody", "user", "mask per population", "mask per user, by optimisation", "mask per user, amortised")
"""What is personal. ``nobody``: the same for all. ``user``: weights alone, no mask is chosen. Else who the mask is chosen for,
and how: one for everybody, one per user by trying or descending on that user's labels, or one per user at a glance by
something learned from others."""


@dataclass(frozen=True)
class Fitted:
    """What a method has learned from train and val users.

    Attributes:
        tensors: by name. facts: JSON-able.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """A hash of the tensors and facts."""
        return hash_tensors({**self.tensors, "facts": torch.tensor(list(repr(sorted(self.facts.items())).encode()))})


@dataclass(frozen=True)
class Sizes:
    """What one user's personal part takes.

    Attributes:
        trainable: parameters that personalising changes. active: parameters beside the model's that take part in predicting.
        stored: bytes that must be kept for the user.
        shared: of the active ones, those that are the same for everybody.
    """

    trainable: int
    active: int
    stored: int
    shared: int = 0

    @property
    def charged(self) -> int:
        """Parameters that the cost is reckoned by: the user's own."""
        return self.active - self.shared


class CannotServe(ValueError):  # it is no mistake
    """Raised by :meth:`Predictor.serve` where a method cannot answer from raw inputs alone; the message says why."""


class Predictor(ABC):
    """U personalised models.

    Attributes:
        masks: ``[U, P]`` bool, the pathways that are on; None where there are none.
        adaptations: how often a user was adapted to get here, statistics of the support included.
    """

    masks: Tensor | None = None
    adaptations: int = 0

    @abstractmethod
    def logits(self, asked: Group) -> Tensor:
        """``[U, N, C]`` for the same users in the same order; what stands in padded places is of no account."""

    @abstractmethod
    def serve(self, inputs: Tensor) -> Tensor:
        """Logits ``[U, N, C]`` of raw inputs ``[U, N, ...]``: the whole model is run, nothing is looked up.

        Equal to :meth:`logits` but for what cross-fitting adds there.

        Raises:
            CannotServe: if raw inputs do not tell enough.
        """

    @property
    @abstractmethod
    def sizes(self) -> Sequence[Sizes]:
        """One per user."""


class Method(ABC):
    """A way of personalising. Subclasses are frozen dataclasses whose fields are the hyperparameters, each with a default.

    Class attributes:
        scope: one of :data:`SCOPES`.
        labels: ``"support"``, or ``"all"`` where support and validation examples are shown, joined (:attr:`Group.parts`).
        trades: whether the cost weight makes a difference; then it is fitted and shown users for each weight.
        space: values that tuning chooses between, by field; empty: nothing to tune.
        length: the field that says how long fitting or personalising trains (tuning stops hopeless trials at a fifth of it);
            None: a fifth would tell nothing, or nothing trains.
        together: users that are personalised in one call.
        through_backbone: whether personalising differentiates through the backbone.
        needs: distributions that must be installed.
        leans_on: methods whose tuned settings the fit takes over; it is made anew when they change.
        draws: over how many draws the figures of one user are averaged, where chance chooses; a method with more than one has
            a field ``draw``.
    """

    scope: ClassVar[str] = "user"
    labels: ClassVar[str] = "support"
    trades: ClassVar[bool] = False
    space: ClassVar[Mapping[str, Sequence[Any]]] = {}
    length: ClassVar[str | None] = None
    together: ClassVar[int] = 64
    through_backbone: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()
    leans_on: ClassVar[tuple[str, ...]] = ()
    draws: ClassVar[int] = 1

    @property
    def highest_weight(self) -> float:
        """The highest cost weight that it can be fitted for."""
        return 1.0

    def refuses(self, world: World) -> str | None:
        """Why this method has no meaning for that population or backbone; None: it has one."""
        return None

    def fit(self, world: World, cost_weight: float) -> Fitted:
        """Learn from train users, choose on val users. ``cost_weight`` counts only if :attr:`trades`. Deterministic."""
        return Fitted()

    @final
    def personalise(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Predictor:
        """Models for U users from what they show, each user's independent of the others'.

        Args:
            world: that the method was fitted on.
            fitted: what :meth:`fit` gave for the same cost weight.
            shown: support examples (see :attr:`labels`). Without any example users get the population model as it is.
            cost_weight: lambda.

        Raises:
            ValueError: if some users show examples and others none.
        """
        if self.scope != "nobody" and not all(shown.counts):
            if any(shown.counts):
                nothing = ", ".join(repr(name) for name, count in zip(shown.ids, shown.counts, strict=True) if not count)
                raise ValueError(f"{nothing} show no example, and others do: personalise those in a group of their own.")
            return Unchanged(world, len(shown))
        return self.adapt(world, fitted, shown, cost_weight)

    @abstractmethod
    def adapt(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Predictor:
        """What :meth:`personalise` does where there is at least one example per user. Deterministic."""

    def settings(self) -> dict[str, Any]:
        """The hyperparameters."""
        return asdict(self)  # type: ignore[call-overload]

    def shortened(self, share: float) -> "Method":
        """The same method, trained for a share of its :attr:`length`, at least 1."""
        if self.length is None:
            return self
        return replace(self, **{self.length: max(1, round(share * getattr(self, self.length)))})  # type: ignore[type-var]


class Unchanged(Predictor):
    """The population model for each of U users."""

    def __init__(self, world: World, users: int) -> None:
        none = torch.zeros(users, world.pathways.num_pathways, dtype=torch.bool)
        self.model, self.masks = world.model, world.pathways.executed(none)

    def logits(self, asked: Group) -> Tensor:
        """See :meth:`Predictor.logits`."""
        return population_logits(self.model, asked.batch.frozen)

    @torch.no_grad()
    def serve(self, inputs: Tensor) -> Tensor:
        """See :meth:`Predictor.serve`."""
        return self.model(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])

    @property
    def sizes(self) -> Sequence[Sizes]:
        """See :attr:`Predictor.sizes`."""
        assert self.masks is not None
        return [Sizes(0, 0, 0)] * len(self.masks)

"""Who is personalised: users with labelled examples in three roles, and populations split by user.

Shapes: U users, N examples per user, P pathways.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backbones.base import hash_tensors
from users.items import Items, TensorItems
from users.lazy import LazyUsers, OnDemand

ROLES = ("support", "validation", "query")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Examples:
    """Labelled examples of one user in one role.

    Attributes:
        inputs: ``[N, ...]`` as the backbone reads them; in a population with ``items`` int64 positions there, ``[N]``.
        labels: ``[N]`` int64 class indices.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def _check_finite(values: Tensor, whose: str, what: str) -> None:
    if values.is_floating_point() and not values.isfinite().all():
        raise ValueError(f"{whose} has NaN or infinite {what}; remove or impute those examples.")


def _check_single(values: Tensor, whose: str, what: str) -> None:
    """Raise ``ValueError`` for floating point numbers that population models do not compute with. Integers are no numbers."""
    if values.is_floating_point() and values.dtype != torch.float32:
        raise ValueError(f"{whose} {what} of {values.dtype}, and models compute in float32; convert them with .float().")


@dataclass(frozen=True)
class User:
    """Somebody with labelled examples.

    Attributes:
        user_id: unique within the population.
        support: what the model may be adapted on.
        validation: what choices are rewarded on.
        query: what is reported.
        info: facts for the reader (the kind of shift, say) that no method may look at.

    A class may be missing from the support; its examples can then be predicted only as far as the population model
    and the meta-initialisation know it.

    Raises:
        ValueError: names the user, the role and the cure, if a role is empty or the inputs are not finite.
    """

    user_id: str
    support: Examples
    validation: Examples
    query: Examples
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for role in ROLES:
            examples: Examples = getattr(self, role)
            if not len(examples):
                cure = "serve them the population model as it is" if role == "support" else "leave the user out"
                raise ValueError(f"user {self.user_id!r} has no {role} examples; give them at least one, or {cure}.")
            if len(examples.inputs) != len(examples.labels):
                raise ValueError(
                    f"user {self.user_id!r} has {len(examples.inputs)} {role} inputs but {len(examples.labels)} labels; "
                    "give every input one label."
                )
            _check_finite(examples.inputs, f"user {self.user_id!r}", f"{role} inputs")


@dataclass(frozen=True)
class Population:
    """Users split into train, val and test; the splits share no user.

    Attributes:
        name: for reports and file names.
        num_classes: C; labels are below it.
        train, val, test: the users of each split; tuples, or :class:`users.lazy.LazyUsers` where there are very many.
        seed: what everything random about the population followed from.
        items: what ``inputs`` are positions in, where users share examples or share a file; None: they are the examples.
        fitting: labelled examples for the population model. Of users who are in no split, so that nothing is rewarded on
            what fitted it; or, with ``folds``, anybody's.
        folds: ``[len(items)]`` int64 for cross-fitting: the population model's logits of an item come from a classifier
            that was fitted without any label of the items of its fold. -1: not used in fitting.
        class_names: C names for reports; empty: the numbers.
        notes: what the loader has to say (users left out, texts cut off), for reports.
        simulated: whether another seed means other users, rather than other draws of the same people's examples.
        fitting_is_public: whether ``fitting`` are examples of nobody whose privacy is at stake.
    """

    name: str
    num_classes: int
    train: Sequence[User]
    val: Sequence[User]
    test: Sequence[User]
    seed: int = 0
    items: Items | None = None
    fitting: Examples | None = None
    folds: Tensor | None = None
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    simulated: bool = False
    fitting_is_public: bool = False

    def __post_init__(self) -> None:
        if self.folds is not None and (self.items is None or len(self.folds) != len(self.items)):
            raise ValueError(f"population {self.name!r} is cross-fitted: `folds` must have one entry for each of its `items`.")
        mine = f"population {self.name!r}"
        if isinstance(self.items, TensorItems):
            _check_finite(self.items.values, mine, "items")
            _check_single(self.items.values, f"{mine} has", "items")
        if empty := [split for split in SPLITS if not getattr(self, split)]:
            why = f" Its loader says: {'; '.join(self.notes)}." if self.notes else ""
            raise ValueError(f"population {self.name!r} has no {empty[0]} users; give it more users, or another split.{why}")
        ids = self.ids
        if len(set(ids)) < len(ids):
            twice = sorted({i for i in ids if ids.count(i) > 1})
            raise ValueError(f"user ids must be unique across splits; these occur twice: {twice[:5]}.")
        for user in self._witnesses():
            for role in ROLES:
                self._check(getattr(user, role), f"user {user.user_id!r} has {role}")
        if self.fitting is not None and len(self.fitting):
            _check_finite(self.fitting.inputs, mine, "fitting inputs")
            self._check(self.fitting, f"{mine} has fitting")

    def _check(self, examples: Examples, whose: str) -> None:
        labels, places = examples.labels, examples.inputs
        if labels.ndim != 1 or len(labels) != len(places):
            raise ValueError(
                f"{whose} labels of shape {[*labels.shape]} for {len(places)} inputs; give every input one class index."
            )
        _check_single(places, whose, "inputs")
        if labels.dtype != torch.int64:
            raise ValueError(f"{whose} labels of {labels.dtype}; give class indices in int64: convert integers with .long().")
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(f"{whose} labels outside 0..{self.num_classes - 1}; map labels to class indices first.")
        if self.items is not None and places.dtype != torch.int64:
            raise ValueError(f"{whose} inputs of {places.dtype}, positions of items are int64; convert them with .long().")
        if self.items is not None and (places.min() < 0 or places.max() >= len(self.items)):
            raise ValueError(f"{whose} inputs outside 0..{len(self.items) - 1}, the items; give positions of items.")

    def _witnesses(self) -> Iterable[User]:
        """The users whose examples are checked: everybody who is there, and some of those who are drawn on demand."""
        for users in self._splits:
            yield from users.sample() if isinstance(users, LazyUsers) else users

    @property
    def _splits(self) -> tuple[Sequence[User], ...]:
        return self.train, self.val, self.test

    @property
    def lazy(self) -> bool:
        """Whether some users are drawn only when they are asked for."""
        return any(isinstance(users, LazyUsers) for users in self._splits)

    @property
    def users(self) -> Sequence[User]:
        """All users: train, then val, then test."""
        if self.lazy:
            return OnDemand(sum(map(len, self._splits)), self._user)
        return (*self.train, *self.val, *self.test)

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of all :attr:`users`, none of whom is drawn for it."""
        each = [u.ids if isinstance(u, LazyUsers) else tuple(user.user_id for user in u) for u in self._splits]
        return tuple(name for names in each for name in names)

    @property
    def infos(self) -> Sequence[Mapping[str, Any]]:
        """``info`` of all :attr:`users`, none of whom is drawn for it."""
        if self.lazy:
            return OnDemand(sum(map(len, self._splits)), self._info)
        return tuple(user.info for user in self.users)

    def sizes(self, role: str) -> NDArray[np.int64]:
        """How many examples each of :attr:`users` has in a role; none of them is drawn for it."""
        each = [
            np.full(len(users), users.sizes[role])
            if isinstance(users, LazyUsers)
            else np.array([len(getattr(user, role)) for user in users])
            for users in self._splits
        ]
        return np.concatenate(each)

    def _place(self, place: int) -> tuple[Sequence[User], int]:
        """The split that a position in :attr:`users` belongs to, and the position there."""
        for users in self._splits:
            if place < len(users):
                return users, place
            place -= len(users)
        raise IndexError(f"no user {place} places after the last one.")

    def _user(self, place: int) -> User:
        users, inside = self._place(place)
        return users[inside]

    def _info(self, place: int) -> Mapping[str, Any]:
        users, inside = self._place(place)
        return users.info(inside) if isinstance(users, LazyUsers) else users[inside].info

    def indices(self, split: str) -> range:
        """Positions in :attr:`users` of one split's users."""
        sizes = [len(getattr(self, name)) for name in SPLITS]
        start = sum(sizes[: SPLITS.index(split)])
        return range(start, start + sizes[SPLITS.index(split)])

    def fingerprint(self, *splits: str) -> str:
        """A hash of every example of every user, of some splits or (none named) of all.

        Users drawn on demand are stood for by what they follow from and by the examples of the first of them.
        """
        tensors = {}
        for split in splits or SPLITS:
            users = getattr(self, split)
            if isinstance(users, LazyUsers):
                recipe = json.dumps(users.recipe, sort_keys=True).encode()
                tensors[f"{split}/recipe"] = torch.frombuffer(bytearray(recipe), dtype=torch.uint8)
                users = users.sample()
            for number, user in enumerate(users):  # answers are kept by position
                for role in ROLES:
                    examples: Examples = getattr(user, role)
                    name = f"{split}/{number}/{user.user_id}/{role}"
                    tensors[f"{name}/inputs"], tensors[f"{name}/labels"] = examples.inputs, examples.labels
        if self.folds is not None:
            tensors["folds"] = self.folds
        return hash_tensors(tensors) + (self.items.fingerprint() if self.items else "")

    def contents(self, split: str) -> str:
        """A hash of a split's examples alone: of what they show, not of where that stands among what other users have."""
        if self.items is None:
            return self.fingerprint(split)
        users = getattr(self, split)
        shown = torch.cat([getattr(user, role).inputs for user in users for role in ROLES]).unique()
        tensors = {}
        for user, role in product(users, ROLES):
            examples: Examples = getattr(user, role)
            tensors[f"{user.user_id}/{role}/inputs"] = torch.searchsorted(shown, examples.inputs)
            tensors[f"{user.user_id}/{role}/labels"] = examples.labels
        return hash_tensors(tensors) + self.items.part(shown.tolist()).fingerprint()

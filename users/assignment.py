"""Which users are fitted on, trained on, validated on and tested on, also where there are few of them."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from users.base import SPLITS
from users.roles import by_hash, is_fitting, position, split_of

PARTS = ("fitting", *SPLITS)
"""Users of the first fit the population model and are in no split."""
SPLIT_SEED = 0


def parts_of(users: Iterable[str], seed: int, fit_share: float, given: Mapping[str, str] | None = None) -> dict[str, str]:
    """The part of each user, by hash and hence whatever their order; no part is empty.

    The split does not depend on the seed: who is a val user under one seed, on whom something may be chosen, is a test user
    under none.

    Args:
        users: ids.
        seed: deals train users to ``fitting``.
        fit_share: share of the train users that go to ``fitting``.
        given: the split of each user; None: by hash.

    Raises:
        ValueError: if there are too few users for every part to have one.
    """
    if given is None:
        given = settled({user: split_of(user, SPLIT_SEED) for user in users}, fit_share)
    else:
        given = {user: given[user] for user in users}
    for name in ("val", "test"):
        if name not in given.values():
            raise ValueError(f"no {name} user has enough examples; give that split more users, or more examples per user.")
    return filled(_dealt(given, seed, fit_share), ("fitting", "train"), seed)


def settled(split: Mapping[str, str], fit_share: float) -> dict[str, str]:
    """A split by hash with empty parts filled; there are two train users at least, of whom one can be fitted on."""
    part = filled(_dealt(split, SPLIT_SEED, fit_share), PARTS, SPLIT_SEED)
    return {user: "train" if part[user] == "fitting" else part[user] for user in part}


def with_fitting(split: Mapping[str, str], able: Mapping[str, bool], seed: int, fit_share: float) -> dict[str, str]:
    """A split with a share of the train users, by hash, in ``fitting``; chance leaves neither ``fitting`` nor ``train`` empty.

    Args:
        split: of each user.
        able: by user, false for those with too few examples to be personalised, who can only be fitted on.
        seed: deals users.
        fit_share: the share.

    Raises:
        ValueError: if one of them is empty and no other train user with enough examples could go there.
    """
    part = _dealt(split, seed, fit_share)
    trained = any(own == "train" and able[user] for user, own in part.items())
    if trained and "fitting" in part.values():
        return part
    among = {user: own for user, own in part.items() if own in ("fitting", "train") and able[user]}
    return {**part, **filled(among, ("fitting", "train"), seed)}


def _dealt(split: Mapping[str, str], seed: int, fit_share: float) -> dict[str, str]:
    return {user: "fitting" if own == "train" and is_fitting(user, seed, fit_share) else own for user, own in split.items()}


def filled(part: dict[str, str], among: Sequence[str], seed: int) -> dict[str, str]:
    """``part``, with a user of the largest part moved to each empty one of ``among``; chance can leave a small table's empty.

    Raises:
        ValueError: if there are fewer users than parts.
    """
    part, users = dict(part), sorted(user for user in part if part[user] in among)
    if len(users) < len(among):
        raise ValueError(
            f"{len(users)} users with enough examples are too few: {', '.join(among)} need one each. "
            "Give more users, or more examples per user."
        )
    for name in among:
        own = {each: [user for user in users if part[user] == each] for each in among}
        if not own[name]:
            largest = max(among, key=lambda each: len(own[each]))
            moved = own[largest][by_hash(range(len(own[largest])), own[largest].__getitem__, "moved", seed)[0]]
            part[moved] = name
    return part


def chosen(part: Mapping[str, str], most: int, seed: int) -> list[str]:
    """At most ``most`` users, by hash; one of each part among them."""
    ranked = sorted(part, key=lambda user: (position("chosen", seed, user), user))
    first = {part[user]: user for user in reversed(ranked)}
    rest = [user for user in ranked if user != first[part[user]]]
    return sorted([*first.values(), *rest][:most])


def check_classes(
    names: Sequence[str], labels: NDArray[np.int64], parts: NDArray[np.str_], users: Sequence[str], fit_share: float
) -> None:
    """Every class must be known to the population model, which can predict no other.

    Args:
        names: C names of classes.
        labels: ``[R]`` class indices.
        parts: ``[R]`` the part of each one's user.
        users: ``[R]`` that user.
        fit_share: for the cure.

    Raises:
        ValueError: names the class, who has it, and the cure.
    """
    if len(names) < 2:
        raise ValueError(f"every example has the label {names[0]!r}; there must be two labels at least.")
    seen: Collection[int] = set(labels[np.isin(parts, ("fitting", "train"))].tolist())
    fitted: Collection[int] = set(labels[parts == "fitting"].tolist())
    for c, name in enumerate(names):
        if c in fitted:
            continue
        having = sorted({users[row] for row in np.flatnonzero(labels == c).tolist()})
        who = (
            f"{len(having)} user{'s' if len(having) > 1 else ''} ({', '.join(having[:3])}{', ...' if len(having) > 3 else ''})"
        )
        if c not in seen:
            raise ValueError(
                f"no train user has the label {name!r}; it occurs only among val and test, for {who}. Remove or merge the "
                "label, or put one of those users in train."
            )
        raise ValueError(
            f"no user who fits the population model has the label {name!r}; it occurs for {who}. Choose a larger fit_share "
            f"than {fit_share}, or another seed, or remove or merge the label."
        )

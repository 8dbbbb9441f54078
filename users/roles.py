"""Who and what goes where: users to splits, a user's examples to roles. By hashes: the order of a file counts nothing."""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

import torch

from users.base import SPLITS, Examples, User

MINIMUM = 2
"""Labels that a user must have beyond the support: one for validation and one for query."""


def position(*parts: Hashable) -> float:
    """A place in [0, 1) that follows from ``parts`` alone."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big") / 2**56


def by_hash(rows: Iterable[int], key: Callable[[int], Hashable], *salt: Hashable) -> list[int]:
    """``rows`` in a random order that follows from ``salt`` and each row's ``key(row)``."""
    return sorted(rows, key=lambda row: (position(*salt, key(row)), str(key(row))))


def split_of(user_id: Hashable, seed: int, val: float = 0.15, test: float = 0.2) -> str:
    """``train``, ``val`` or ``test``, with about those shares of users."""
    place = position("split", seed, user_id)
    return "test" if place < test else "val" if place < test + val else "train"


def splits_given(path: Path, rows: Iterable[tuple[str, str]], labelled: Iterable[str]) -> dict[str, str]:
    """The split of each user, sorted by id.

    Args:
        path: of the table that gives the splits, for errors.
        rows: its users and their splits.
        labelled: the users who have examples; none may be missing from the table.

    Raises:
        ValueError: names the file, the user and what is wrong.
    """
    found: dict[str, str] = {}
    for user, split in rows:
        if split not in SPLITS:
            raise ValueError(f"{path}: user {user!r} has split {split!r}, not one of {', '.join(SPLITS)}.")
        if user in found:
            raise ValueError(f"{path}: user {user!r} is there twice; remove one of the rows.")
        found[user] = split
    if missing := sorted_ids(set(labelled) - found.keys()):
        raise ValueError(
            f"{path} gives no split for user {missing[0]!r}, who has examples ({len(missing)} such users); add a row for each "
            "of them, or take all files from one download."
        )
    return {user: found[user] for user in sorted_ids(found)}


def sorted_ids(ids: Iterable[str]) -> list[str]:
    """Ids by size where all are whole numbers, else by letters."""
    ids = list(ids)
    return sorted(ids, key=lambda name: (int(name), name)) if all(map(str.isdecimal, ids)) else sorted(ids)


def is_fitting(user_id: Hashable, seed: int, share: float) -> bool:
    """Whether a train user's labels fit the population model instead of being adapted to."""
    return position("fitting", seed, user_id) < share


def user_from(
    user_id: Hashable, inputs: torch.Tensor, labels: torch.Tensor, roles: tuple[list[int], list[int], list[int]], **info
) -> User:
    """A user with the examples at the positions of each role."""
    support, validation, query = (Examples(inputs[rows], labels[rows]) for rows in roles)
    return User(str(user_id), support, validation, query, info)


def deal(rows: Sequence[int], support: int, validation: int) -> tuple[list[int], list[int], list[int]]:
    """Rows in order: the first to support, the next to validation, the rest to query."""
    rows = list(rows)
    return rows[:support], rows[support : support + validation], rows[support + validation :]


def dropped_note(what: str, dropped: Sequence[Hashable], why: str) -> tuple[str, ...]:
    """One line that counts and names (the first of) those left out; nothing if nobody was."""
    if not dropped:
        return ()
    names = ", ".join(map(str, sorted(dropped, key=str)[:12])) + (", ..." if len(dropped) > 12 else "")
    return (f"{len(dropped)} {what} left out ({why}): {names}",)

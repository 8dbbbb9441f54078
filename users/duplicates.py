"""One person under two ids: a promise to users is worth half to them, and equal examples give them away."""

import hashlib
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor
from tqdm.auto import tqdm

from users.base import ROLES, Population, User

SHOWN = 3
"""Pairs that an error names."""


def duplicates(population: Population, *splits: str) -> Iterator[tuple[str, str]]:
    """Pairs of users of some splits who have exactly the same examples, in whatever roles and order."""
    seen: dict[bytes, str] = {}
    each, total = [getattr(population, split) for split in splits], sum(len(getattr(population, split)) for split in splits)
    bar = tqdm(chain(*each), desc="looking for users with the same examples", unit="user", total=total, disable=total < 2_000)
    for user in bar:
        known = seen.setdefault(content(user), user.user_id)
        if known != user.user_id:
            yield known, user.user_id


def content(user: User) -> bytes:
    """A digest of all of a user's examples that does not depend on their roles and their order."""
    parts = [getattr(user, role) for role in ROLES]
    rows = sorted(one for part in parts for one in map(_row, part.inputs, part.labels))
    return hashlib.sha256(b"".join(rows)).digest()


def _row(item: Tensor, label: Tensor) -> bytes:
    both = item.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() + label.numpy().tobytes()
    return hashlib.sha256(both).digest()


def check_duplicates(population: Population, *splits: str) -> None:
    """Raise ``ValueError`` if users of some splits have exactly the same examples; names some.

    Somebody with two ids and other examples under each looks like two people: whoever loads them must join them.
    """
    found = list(duplicates(population, *splits))
    if found:
        named = ", ".join(f"{first!r} and {second!r}" for first, second in found[:SHOWN])
        raise ValueError(
            f"{len(found)} {' or '.join(splits)} users have exactly the examples of another ({named}): a guarantee for each id "
            "is half of one for the person behind two, and none for whoever is a val user too. Join them into one user."
        )

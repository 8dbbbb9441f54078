"""One person under two ids: a promise to users is worth half to them, and equal examples give them away."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm.auto import tqdm

from users.base import ROLES, Population, User

SHOWN = 3
"""Pairs that an error names."""


def duplicates(population: Population, split: str) -> Iterator[tuple[str, str]]:
    """Pairs of users of a split who have exactly the same examples, in whatever roles and order."""
    seen: dict[bytes, str] = {}
    users = getattr(population, split)
    for user in tqdm(users, desc="looking for users with the same examples", unit="user", disable=len(users) < 2_000):
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


def check_duplicates(population: Population, split: str) -> None:
    """Raise ``ValueError`` if users of a split have exactly the same examples; names some.

    Somebody with two ids and other examples under each looks like two people: whoever loads them must join them.
    """
    found = list(duplicates(population, split))
    if found:
        named = ", ".join(f"{first!r} and {second!r}" for first, second in found[:SHOWN])
        raise ValueError(
            f"{len(found)} {split} users have exactly the examples of another ({named}): a guarantee for each id is half of "
            "one for the person behind two. Join them into one user."
        )

"""One person under two ids: a promise to users is worth half to them, and equal examples give them away."""

import hashlib
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain

import torch
from torch import Tensor
from tqdm.auto import tqdm

from users.base import ROLES, Population, User
from users.items import Items

SHOWN = 3
"""Pairs that an error names."""


def duplicates(population: Population, *splits: str) -> Iterator[tuple[str, str]]:
    """Pairs of users of some splits who have exactly the same examples, in whatever roles and order."""
    seen: dict[bytes, str] = {}
    content = contents(population.items)
    each, total = [getattr(population, split) for split in splits], sum(len(getattr(population, split)) for split in splits)
    bar = tqdm(chain(*each), desc="looking for users with the same examples", unit="user", total=total, disable=total < 2_000)
    for user in bar:
        known = seen.setdefault(content(user), user.user_id)
        if known != user.user_id:
            yield known, user.user_id


def contents(items: Items | None) -> Callable[[User], bytes]:
    """A function that digests all of a user's examples, whatever their roles and their order.

    Args:
        items: what users' inputs are positions in: two positions may hold the same, and are read once each. None: inputs are
            the examples.
    """

    @cache
    def item(place: int) -> bytes:
        assert items is not None
        return items.part([place]).fingerprint().encode()

    def row(given: Tensor, label: Tensor) -> bytes:
        shown = _bytes(given) if items is None else item(int(given))
        return hashlib.sha256(shown + label.numpy().tobytes()).digest()

    def content(user: User) -> bytes:
        parts = [getattr(user, role) for role in ROLES]
        rows = sorted(one for part in parts for one in map(row, part.inputs, part.labels))
        return hashlib.sha256(b"".join(rows)).digest()

    return content


def _bytes(example: Tensor) -> bytes:
    return example.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


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

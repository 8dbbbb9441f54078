"""Simulated users of real handwritten digits: scikit-learn's 1,797 images of 8x8 pixels.

Source of the images: the test part of the UCI "Optical Recognition of Handwritten Digits" set, as scikit-learn ships
it. Nothing is downloaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from users.base import Examples, Population, User
from users.shifts import SHIFTS

KINDS = ("none", "inverted", "rotated", "noisy", "faint", "moved_and_blurred", "swapped_labels")
POOLS = {"pretrain": 0.28, "train-fit": 0.28, "train-reward": 0.14, "val": 0.12, "test": 0.18}
GROUPS = ("at most one shift", "two shifts")
SUPPORT, VALIDATION, QUERY = 20, 40, 60


@dataclass(frozen=True)
class DigitsPools:
    """The five disjoint image pools.

    Attributes:
        images: ``[1797, 1, 8, 8]`` float32 in 0..1. labels: ``[1797]``.
        rows: positions by pool name.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    rows: dict[str, NDArray[np.int64]]

    def pretraining(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels for the backbone, which no user has."""
        rows = self.rows["pretrain"]
        return torch.from_numpy(self.images[rows]), torch.from_numpy(self.labels[rows])


def digits_pools(seed: int = 0) -> DigitsPools:
    """Deal the images into five pools (28, 28, 14, 12 and 18 %)."""
    data = load_digits()
    images = (data.images / 16).astype(np.float32)[:, None]
    order = np.random.default_rng([seed, 0]).permutation(len(images))
    ends = (np.cumsum(list(POOLS.values()))[:-1] * len(images)).astype(int)
    rows = dict(zip(POOLS, np.split(order, ends), strict=True))
    return DigitsPools(images, data.target.astype(np.int64), rows)


def digits_population(
    seed: int = 0,
    train_users: int = 600,
    val_users: int = 120,
    test_users: int = 240,
    shifts: Sequence[str] = KINDS,
    two_shifts: float = 1 / 3,
) -> Population:
    """A population in which every user sees the digits through a shift (or two) of their own.

    Each user has 20 support, 40 validation and 60 query images; within a user no image is in two roles. Train users
    take support and query from the pool *train-fit* and validation from *train-reward*; val and test users have a pool
    each. Users of a split share images, so intervals over users describe new users of this image pool.

    Args:
        seed: everything follows from it; the n-th user of a split is the same whatever the number of users.
        train_users: users to learn from.
        val_users: users to choose by.
        test_users: users to report.
        shifts: names from the registry of :mod:`users.shifts` to draw from, with equal probability.
        two_shifts: share of users who have two different shifts (other than ``none``) at once.

    ``User.info`` holds ``shifts``, the names in the order in which they were applied ("inverted+noisy"), and ``group``.

    Raises:
        ValueError: for an unknown shift, with a suggestion, or a number of users below one.
    """
    for name in shifts:
        SHIFTS.get(name)
    pools = digits_pools(seed)
    counts = {"train": train_users, "val": val_users, "test": test_users}
    splits = {}
    for number, (split, count) in enumerate(counts.items()):
        if count < 1:
            raise ValueError(f"{split}_users must be at least 1, got {count}.")
        draws = (np.random.default_rng([seed, 1 + number, n]) for n in range(count))
        splits[split] = tuple(_user(f"{split}-{n}", split, pools, shifts, two_shifts, rng) for n, rng in enumerate(draws))
    return Population(
        "digits", 10, splits["train"], splits["val"], splits["test"], seed=seed, fitting=Examples(*pools.pretraining())
    )


def _user(user_id: str, split: str, pools: DigitsPools, kinds: Sequence[str], two: float, rng: np.random.Generator) -> User:
    rows = _draw_rows(split, pools, rng)
    names = _draw_shifts(kinds, two, rng)
    images, labels = pools.images[rows], pools.labels[rows]
    for name in names:
        images, labels = SHIFTS.get(name)(images, labels, rng)
    inputs, targets = torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(np.ascontiguousarray(labels))
    cuts = (SUPPORT, VALIDATION, QUERY)
    parts = [Examples(x, y) for x, y in zip(inputs.split(cuts), targets.split(cuts), strict=True)]
    support, validation, query = parts
    return User(user_id, support, validation, query, {"shifts": "+".join(names), "group": GROUPS[len(names) - 1]})


def _draw_rows(split: str, pools: DigitsPools, rng: np.random.Generator) -> NDArray[np.int64]:
    """Positions of one user's support, validation and query images, in that order."""
    if split != "train":
        return rng.choice(pools.rows[split], SUPPORT + VALIDATION + QUERY, replace=False)
    fit = rng.choice(pools.rows["train-fit"], SUPPORT + QUERY, replace=False)
    reward = rng.choice(pools.rows["train-reward"], VALIDATION, replace=False)
    return np.concatenate([fit[:SUPPORT], reward, fit[SUPPORT:]])


def _draw_shifts(kinds: Sequence[str], two: float, rng: np.random.Generator) -> tuple[str, ...]:
    real = [kind for kind in kinds if kind != "none"]
    if len(real) > 1 and rng.random() < two:
        return tuple(str(name) for name in rng.choice(real, 2, replace=False))
    return (str(rng.choice(list(kinds))),)

"""Simulated users of real handwritten digits: scikit-learn's 1,797 images of 8x8 pixels.

Source of the images: the test part of the UCI "Optical Recognition of Handwritten Digits" set, as scikit-learn ships
it. Nothing is downloaded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from users.base import Examples, Population, User
from users.lazy import MANY, LazyUsers
from users.shifts import SHIFTS

KINDS = ("none", "inverted", "rotated", "noisy", "faint", "moved_and_blurred", "swapped_labels")
POOLS = {"pretrain": 0.28, "train-fit": 0.28, "train-reward": 0.14, "val": 0.12, "test": 0.18}
GROUPS = ("at most one shift", "two shifts")
SIZES = {"support": 20, "validation": 40, "query": 60}
SUPPORT, VALIDATION, QUERY = SIZES.values()


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
    shifts: Sequence[str] | str = KINDS,
    two_shifts: float = 1 / 3,
) -> Population:
    """A population in which every user sees the digits through a shift (or two) of their own.

    Each user has 20 support, 40 validation and 60 query images; within a user no image is in two roles. Train users
    take support and query from the pool *train-fit* and validation from *train-reward*; val and test users have a pool
    each. Users of a split share images, so intervals over users describe new users of this image pool. Splits of more
    than 5,000 users are drawn on demand (:class:`users.lazy.LazyUsers`), so that 100,000 users cost no memory.

    Args:
        seed: everything follows from it; the n-th user of a split is the same whatever the number of users.
        train_users: users to learn from.
        val_users: users to choose by.
        test_users: users to report.
        shifts: names from the registry of :mod:`users.shifts` to draw from, with equal probability; or one name.
        two_shifts: share of users who have two different shifts (other than ``none``) at once.

    ``User.info`` holds ``shifts``, the names in the order in which they were applied ("inverted+noisy"), and ``group``.

    Raises:
        ValueError: for an unknown shift, with a suggestion, or a number of users below one.
    """
    shifts = (shifts,) if isinstance(shifts, str) else tuple(shifts)
    for name in shifts:
        SHIFTS.get(name)
    pools = digits_pools(seed)
    counts = {"train": train_users, "val": val_users, "test": test_users}
    splits: dict[str, Sequence[User]] = {}
    for number, (split, count) in enumerate(counts.items()):
        if count < 1:
            raise ValueError(f"{split}_users must be at least 1, got {count}.")
        source = _Source(seed, 1 + number, split, pools, shifts, two_shifts)
        splits[split] = source.lazy(count) if count > MANY else tuple(map(source.user, range(count)))
    fitting = Examples(*pools.pretraining())
    train, val, test = (splits[name] for name in ("train", "val", "test"))
    return Population("digits", 10, train, val, test, seed=seed, fitting=fitting, simulated=True, fitting_is_public=True)


@dataclass(frozen=True)
class _Source:
    """Draws the users of one split, each from random numbers of their own.

    Attributes:
        seed, stream: of the random numbers, beside the user's number.
        split: whose pools the images come from.
        pools, kinds, two: images, names of shifts, and the share of users with two.
    """

    seed: int
    stream: int
    split: str
    pools: DigitsPools
    kinds: tuple[str, ...]
    two: float

    def user(self, n: int) -> User:
        """The n-th user."""
        rows, names, rng = self._begun(n)
        images, labels = self.pools.images[rows], self.pools.labels[rows]
        for name in names:
            images, labels = SHIFTS.get(name)(images, labels, rng)
        inputs, targets = torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(np.ascontiguousarray(labels))
        cuts = tuple(SIZES.values())
        support, validation, query = (Examples(x, y) for x, y in zip(inputs.split(cuts), targets.split(cuts), strict=True))
        return User(self.name(n), support, validation, query, _info(names))

    def lazy(self, count: int) -> LazyUsers:
        """The first ``count`` users, drawn on demand."""
        recipe = {"digits": self.split, "seed": self.seed, "shifts": self.kinds, "two_shifts": self.two}
        return LazyUsers(count, self.user, lambda n: _info(self._begun(n)[1]), self.name, SIZES, recipe)

    def name(self, n: int) -> str:
        """The n-th user's id."""
        return f"{self.split}-{n}"

    def _begun(self, n: int) -> tuple[NDArray[np.int64], tuple[str, ...], np.random.Generator]:
        """Positions of the n-th user's images, the names of their shifts, and the random numbers from there on."""
        rng = np.random.default_rng([self.seed, self.stream, n])
        rows = _draw_rows(self.split, self.pools, rng)
        return rows, _draw_shifts(self.kinds, self.two, rng), rng


def _info(names: Sequence[str]) -> Mapping[str, str]:
    return {"shifts": "+".join(names), "group": GROUPS[len(names) - 1]}


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

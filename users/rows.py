"""A table's rows: counted per user in a first pass, kept for some of the users in a second."""

import math
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from backbones.registry import did_you_mean
from users.base import SPLITS
from users.roles import by_hash
from users.streaming import Source

INCOMPLETE = 0.1
"""Share of rows that may lack a value and be left out; a table that lacks more is probably not what was meant."""
MOST_CLASSES = 100
WHOLE = re.compile(r"[+-]?[0-9]+")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
LONGEST_NUMBER = 100
MISSING = frozenset(("na", "<na>", "n/a", "null", "none"))
"""What a missing value is written as where labels are numbers; where they are words it may be one of them."""


@dataclass
class Census:
    """What the first pass finds.

    Attributes:
        rows: complete rows of each user.
        splits: the split of each user; None: the table has no such column.
        incomplete: number of rows that lack a value. places: the first of them.
    """

    rows: Counter[str] = field(default_factory=Counter)
    splits: dict[str, str] | None = None
    incomplete: int = 0
    places: list[int] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Rows of the table."""
        return self.rows.total() + self.incomplete


def count(source: Source, columns: Sequence[str]) -> Census:
    """The first pass; ``columns`` are user, label, content and, where there is one, split.

    Raises:
        ValueError: for a table without rows or with too many incomplete ones, an unknown split, or a user in two.
    """
    census = Census(splits={} if len(columns) > 3 else None)
    for place, (user, label, content, *split) in tqdm(
        source.rows(columns), f"counting {source.path.name}", source.length, unit="row"
    ):
        if _complete(user, label, content):
            census.rows[user.strip()] += 1
            if census.splits is not None:
                _note_split(census.splits, user.strip(), split[0].strip(), f"{source.path}, {source.place} {place}")
        else:
            census.incomplete += 1
            census.places += [place] if len(census.places) < 10 else []
    if not census.total:
        raise ValueError(f"{source.path} has a header but no rows.")
    if census.incomplete > INCOMPLETE * census.total:
        raise ValueError(
            f"{source.path}: {census.incomplete:,} of {census.total:,} rows lack a value ({places_of(source, census)}); "
            "fill them in, or remove the rows."
        )
    return census


def places_of(source: Source, census: Census) -> str:
    """Where the first incomplete rows are."""
    return f"{source.place} {', '.join(map(str, census.places))}" + (", ..." if census.incomplete > len(census.places) else "")


def _complete(user: str, label: str, content: str) -> bool:
    """No cell is empty, and the label is not what pandas writes for a missing number."""
    return bool(user.strip() and content.strip() and label.strip() and label.strip().lower() != "nan")


def _note_split(splits: dict[str, str], user: str, split: str, where: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"{where}: unknown split {split!r}. {did_you_mean(split, SPLITS)}")
    if splits.setdefault(user, split) != split:
        raise ValueError(
            f"{where}: user {user!r} is in {split} here and in {splits[user]} above; splits must be by user, so give all "
            "rows of a user the same split, or remove the column to have users split by hash."
        )


@dataclass(frozen=True)
class Rows:
    """What the second pass keeps, without repetitions, sorted by user, content and label. R rows, M contents.

    Attributes:
        users: ``[R]`` ids. items: ``[R]`` positions in ``contents``. labels: ``[R]`` positions in ``classes``.
        contents: M distinct texts or paths, sorted. places: M, the row where each was first found.
        classes: names, sorted; of numbers, by size.
        few: users with too few rows once repetitions are left out; the rest is without them.
        repeated: rows that were left out as repetitions. contested: rows that were left out because their
            user gave that content another label too. unlabelled: rows that were left out for such a label as ``NA`` among
            numbers. beyond: rows that were left out because their user has more than ``most``.
    """

    users: list[str]
    items: NDArray[np.int64]
    labels: NDArray[np.int64]
    contents: tuple[str, ...]
    places: tuple[int, ...]
    classes: tuple[str, ...]
    few: list[str]
    repeated: int
    contested: int
    unlabelled: int
    beyond: int


def collect(source: Source, columns: Sequence[str], readers: Sequence[str], total: int, enough: int, most: int) -> Rows:
    """The second pass: the rows of ``readers`` who have ``enough`` different ones, of a table of ``total`` rows.

    Of who has more than ``most``, so many are kept, by a hash of user and content.

    Raises:
        ValueError: for labels that are no classes.
    """
    reader_of = {user: number for number, user in enumerate(readers)}
    contents: dict[str, int] = {}
    labels: dict[str, int] = {}
    places, flat = array("q"), array("q")
    spelt = str.strip if columns[2] == "text" else _paths_below(source.path.parent)
    for place, (user, label, content, *_) in tqdm(source.rows(columns), f"reading {source.path.name}", total, unit="row"):
        reader = reader_of.get(user.strip())
        if reader is None or not _complete(user, label, content):
            continue
        item = contents.setdefault(spelt(content), len(contents))
        if item == len(places):
            places.append(place)
        flat.extend((reader, item, labels.setdefault(label.strip(), len(labels))))
    every = np.frombuffer(flat, np.int64).reshape(-1, 3)
    triples, names, classes = _classified(every, list(labels), f"{source.path}: column {columns[1]!r}")
    spellings = list(contents)
    order, rank = _ranks(spellings)
    distinct = np.unique(np.stack([triples[:, 0], rank[triples[:, 1]], classes[triples[:, 2]]]), axis=1)
    repeated = len(triples) - distinct.shape[1]
    # One content under two labels cannot be dealt to roles: the user would be adapted on what they are asked.
    again = (np.diff(distinct[:2], axis=1) == 0).all(0)
    clear = ~(np.append(again, False) | np.insert(again, 0, False))
    contested, distinct = int((~clear).sum()), distinct[:, clear]
    per_reader = np.bincount(distinct[0], minlength=len(readers))
    able = distinct[:, per_reader[distinct[0]] >= enough]
    kept = _at_most(able, most, lambda reader, item: (readers[reader], spellings[order[item]]))
    items, place_of = np.unique(kept[1], return_inverse=True)
    used, label_of = np.unique(kept[2], return_inverse=True)
    return Rows(
        [readers[number] for number in kept[0]],
        place_of,
        label_of,
        tuple(spellings[order[item]] for item in items),
        tuple(places[order[item]] for item in items),
        tuple(names[c] for c in used),
        [user for user, own in zip(readers, per_reader, strict=True) if own < enough],
        repeated,
        contested,
        len(every) - len(triples),
        able.shape[1] - kept.shape[1],
    )


def _classified(
    every: NDArray[np.int64], labels: Sequence[str], where: str
) -> tuple[NDArray[np.int64], tuple[str, ...], NDArray[np.int64]]:
    """The rows ``[R, 3]`` whose labels are no marks of a missing number, names of classes, and the class of each label.

    Raises:
        ValueError: for labels that are no classes, and if too many are missing.
    """
    known = _known(labels)
    triples = every[np.isin(every[:, 2], known)]
    missing = len(every) - len(triples)
    if missing > INCOMPLETE * len(every):
        marks = ", ".join(repr(label) for label in labels if label.lower() in MISSING)
        raise ValueError(
            f"{where}: {missing:,} of {len(every):,} labels are {marks} where the others are numbers; fill them in, or remove "
            "the rows."
        )
    names, of_known = class_names([labels[label] for label in known], len(triples), where)
    classes = np.zeros(len(labels), np.int64)  # what is not known is in none of the rows that are left
    classes[known] = of_known
    return triples, names, classes


def _paths_below(folder: Path) -> Callable[[str], str]:
    """Gives one file one name, relative to the folder, by whatever path and links it is spelt."""
    base = os.path.realpath(folder)

    @cache
    def spelt(name: str) -> str:
        return os.path.relpath(os.path.realpath(folder / name.strip()), base)

    return spelt


def _known(labels: Sequence[str]) -> list[int]:
    """Positions of the labels that are none of the marks of a missing number; of all labels where the others are words."""
    known = [place for place, label in enumerate(labels) if label.lower() not in MISSING]
    numbers = _numbers([labels[place] for place in known]) or []
    return known if len(set(numbers)) > 1 else list(range(len(labels)))


def _at_most(rows: NDArray[np.int64], most: int, key: Callable[[int, int], Hashable]) -> NDArray[np.int64]:
    """``rows`` ``[3, R]``, sorted by their first line, with at most so many of each of its values, by a hash of ``key``."""
    starts = np.flatnonzero(np.diff(rows[0], prepend=-1))
    parts: list[int] = []
    for own in np.split(np.arange(rows.shape[1]), starts[1:]):
        kept = own.tolist()
        if len(kept) > most:
            kept = sorted(by_hash(kept, lambda row: key(rows[0, row], rows[1, row]), "most")[:most])
        parts += kept
    return rows[:, parts]


def _ranks(texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The sorting order of distinct texts, and the rank of each."""
    order = np.array(sorted(range(len(texts)), key=texts.__getitem__), dtype=np.int64)
    return order, order.argsort()


def class_names(values: Sequence[str], rows: int, where: str) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Names of classes, sorted (if all are numbers, by size), and the class of each of ``values``.

    Raises:
        ValueError: if there are too many distinct values, or they are fractions of which hardly one occurs twice.
    """
    numbers = _numbers(values)
    distinct: list = sorted(set(values if numbers is None else numbers))
    fractions = numbers is not None and not all(float(number).is_integer() for number in numbers)
    if len(distinct) > MOST_CLASSES or (fractions and len(distinct) > rows / 2):
        examples = ", ".join(values[:3])
        cure = (
            "merge rare values"
            if numbers is None
            else "it looks like a continuous rating, so bin it first (say, into 5 levels)"
        )
        raise ValueError(f"{where} has {len(distinct):,} different values ({examples}, ...), too many for classes; {cure}.")
    place = {value: number for number, value in enumerate(distinct)}
    names = (str(int(v) if isinstance(v, float) and v.is_integer() else v) for v in distinct)
    return tuple(names), np.array([place[value] for value in (values if numbers is None else numbers)], dtype=np.int64)


def _numbers(values: Sequence[str]) -> list[int | float] | None:
    """The values as finite numbers, if they all are; whole ones of any length as they are, where a float would round them."""
    if not all(len(value) <= LONGEST_NUMBER and NUMBER.fullmatch(value) for value in values):
        return None
    numbers = [int(value) if WHOLE.fullmatch(value) else float(value) for value in values]
    return numbers if all(map(math.isfinite, numbers)) else None

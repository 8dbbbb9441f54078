"""A table's rows: counted per user in a first pass, kept for some of the users in a second."""

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from backbones.registry import did_you_mean
from users.base import SPLITS
from users.streaming import Source

INCOMPLETE = 0.1
"""Share of rows that may lack a value and be left out; a table that lacks more is probably not what was meant."""
MOST_CLASSES = 100


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
            user gave that content another label too.
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


def collect(source: Source, columns: Sequence[str], readers: Sequence[str], total: int, enough: int) -> Rows:
    """The second pass: the rows of ``readers`` who have ``enough`` different ones, of a table of ``total`` rows.

    Raises:
        ValueError: for labels that are no classes.
    """
    reader_of = {user: number for number, user in enumerate(readers)}
    contents: dict[str, int] = {}
    labels: dict[str, int] = {}
    places, flat = array("q"), array("q")
    texts = columns[2] == "text"  # as users and labels, they are the same whatever white space is around; paths may not be
    for place, (user, label, content, *_) in tqdm(source.rows(columns), f"reading {source.path.name}", total, unit="row"):
        reader = reader_of.get(user.strip())
        if reader is None or not _complete(user, label, content):
            continue
        item = contents.setdefault(content.strip() if texts else content, len(contents))
        if item == len(places):
            places.append(place)
        flat.extend((reader, item, labels.setdefault(label.strip(), len(labels))))
    names, classes = class_names(list(labels), len(flat) // 3, f"{source.path}: column {columns[1]!r}")
    triples = np.frombuffer(flat, np.int64).reshape(-1, 3)
    order, rank = _ranks(list(contents))
    distinct = np.unique(np.stack([triples[:, 0], rank[triples[:, 1]], classes[triples[:, 2]]]), axis=1)
    repeated = len(triples) - distinct.shape[1]
    # One content under two labels cannot be dealt to roles: the user would be adapted on what they are asked.
    again = (np.diff(distinct[:2], axis=1) == 0).all(0)
    clear = ~(np.append(again, False) | np.insert(again, 0, False))
    contested, distinct = int((~clear).sum()), distinct[:, clear]
    per_reader = np.bincount(distinct[0], minlength=len(readers))
    kept = distinct[:, per_reader[distinct[0]] >= enough]
    items, place_of = np.unique(kept[1], return_inverse=True)
    used, label_of = np.unique(kept[2], return_inverse=True)
    named = list(contents)
    return Rows(
        [readers[number] for number in kept[0]],
        place_of,
        label_of,
        tuple(named[order[item]] for item in items),
        tuple(places[order[item]] for item in items),
        tuple(names[c] for c in used),
        [user for user, own in zip(readers, per_reader, strict=True) if own < enough],
        repeated,
        contested,
    )


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
    fractions = numbers is not None and not all(number.is_integer() for number in numbers)
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


def _numbers(values: Sequence[str]) -> list[float] | None:
    """The values as finite numbers, if they all are."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None

"""Anybody's labelled examples by user: a CSV or Parquet file with columns ``user_id``, ``label`` and ``text`` or ``image``."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from backbones.registry import did_you_mean
from users.assignment import PARTS, check_classes, chosen, parts_of, settled
from users.base import SPLITS, Examples, Population, User
from users.items import ImageFiles, Items, TextItems
from users.judgements import Judgements
from users.roles import MINIMUM, dropped_note
from users.rows import Census, Rows, collect, count, places_of
from users.streaming import Source, open_table

SUPPORT, FEWEST = 20, 4
"""Support examples of a user who has plenty, and rows that a user must have where the support follows from their number."""


def table(
    data: str | Path,
    seed: int = 0,
    support: int | None = None,
    fit_share: float = 0.25,
    max_users: int = 2000,
    max_rows: int = 500,
) -> Population:
    """Users of a table; splits are by user, and neither they nor roles depend on the order of the rows.

    One row is one label that one user gave one text or image. Of each user ``support`` rows are known (picked by a hash of
    the text or path), the rest is halved in validation and query. Labels may be words or numbers, at most 100 different
    ones. Left out, and counted in ``Population.notes``: repetitions of a row, rows whose user gave the same
    content another label too, rows that lack a value (the label ``nan`` lacks one, and ``NA`` and its like among numbers), and
    users with too few rows. White space around ids, labels, texts and paths counts for nothing. Image files are told apart by
    their paths: copies of a file are different images.

    The file is read twice, row by row: to count rows per user, then to keep the rows of the users who were chosen. Of
    1,000,000 rows of 20,000 users (80 MB of CSV) that took 6 s and 40 MB of memory on one core; of Parquet, 4 s and 85 MB.

    Args:
        data: ``.csv``, ``.csv.gz`` (UTF-8 with a header) or ``.parquet`` with columns ``user_id``, ``label``, either
            ``text`` or ``image`` (paths, relative to the file's folder), and, if splits are given, ``split``: train, val
            or test, the same for all rows of a user.
        seed: chooses users, deals train users to fitting, and rows to roles; who is val or test does not depend on it, unless
            repetitions leave so few users that a split would be empty.
        support: rows that are known of a user; users need two more. None: 20, or half of the user's rows if that is less,
            and users need four.
        fit_share: share of the train users whose rows fit the population model; they are personalised no more.
        max_users: at most so many users are read, those who fit the population model included.
        max_rows: of who has more, so many different rows are read, by hash: one user's thousands would cost what thousands of
            users do.

    Raises:
        FileNotFoundError: if the file, or an image that is used, is missing.
        ValueError: names the file, the line and the cure for whatever is wrong with the table; or impossible arguments.
        ImportError: for Parquet without pyarrow.
    """
    enough = _enough(support, fit_share, max_users, max_rows)
    source = open_table(Path(data))
    columns = _columns(source)
    census = count(source, columns)
    able = [user for user, rows in census.rows.items() if rows >= enough]
    part = parts_of(able, seed, fit_share, census.splits)
    splits = {user: "train" if own == "fitting" else own for user, own in part.items()}
    readers = chosen(part, max_users, seed)
    rows = collect(source, columns, readers, census.total, enough, max_rows)
    left = {user: splits[user] for user in set(rows.users)}
    part = parts_of(left, seed, fit_share, left if census.splits is not None or _whole(left) else settled(left, fit_share))
    check_classes(rows.classes, rows.labels, np.array([part[user] for user in rows.users]), rows.users, fit_share)
    few = [*rows.few, *(census.rows.keys() - set(able))]
    notes = (
        *_left_out(source, census, rows),
        *dropped_note("users", few, f"fewer than {enough} different rows"),
        *([f"{len(readers):,} of {len(able):,} users were chosen by hash (max_users)"] if len(readers) < len(able) else []),
        f"{list(part.values()).count('fitting'):,} further users fit the population model and are in no split",
    )
    return _population(source, _items(source, columns[2], rows), rows, part, seed, support, notes)


def _enough(support: int | None, fit_share: float, max_users: int, max_rows: int) -> int:
    """Rows that a user needs. Raises ``ValueError`` for impossible arguments of :func:`table`."""
    if (support is not None and support < 1) or not 0 < fit_share < 1 or max_users < len(PARTS):
        raise ValueError(
            f"support must be at least 1, fit_share between 0 and 1 and max_users at least {len(PARTS)}, "
            f"got {support}, {fit_share} and {max_users}."
        )
    enough = FEWEST if support is None else support + MINIMUM
    if max_rows < enough:
        raise ValueError(f"max_rows must be at least {enough}, which a user needs (support and {MINIMUM}), got {max_rows}.")
    return enough


def _whole(split: Mapping[str, str]) -> bool:
    """Nobody need be moved: there are val and test users, and two train users, of whom one can be fitted on."""
    count = Counter(split.values())
    return bool(count["val"] and count["test"] and count["train"] > 1)


def _columns(source: Source) -> list[str]:
    """``user_id``, ``label``, ``text`` or ``image``, and ``split`` where there is one."""
    for name in ("user_id", "label"):
        source.require(name)
    contents = [name for name in ("text", "image") if name in source.columns]
    if len(contents) == 2:
        raise ValueError(
            f"{source.path} has a column 'text' and a column 'image'; keep the one that is to be classified, and rename or "
            "remove the other."
        )
    if not contents:
        hints = [did_you_mean(name, source.columns) for name in ("text", "image")]
        hint = max(hints, key=lambda each: each.startswith("Did"))
        raise ValueError(f"{source.path} has neither a column 'text' nor a column 'image'. {hint}")
    columns = ["user_id", "label", *contents, *(["split"] if "split" in source.columns else [])]
    for name in columns:
        source.require(name)
    return columns


def _items(source: Source, column: str, rows: Rows) -> Items:
    """The texts, or the image files if they are there."""
    if column == "text":
        return TextItems(rows.contents)
    paths = tuple(source.path.parent / name for name in rows.contents)
    missing = [(place, path) for place, path in zip(rows.places, paths, strict=True) if not path.is_file()]
    if missing:
        place, path = min(missing)
        raise FileNotFoundError(
            f"{source.path}, {source.place} {place}: there is no image {path} ({len(missing):,} of {len(paths):,} images are "
            "missing). Paths are relative to the table's folder."
        )
    return ImageFiles(paths)


def _left_out(source: Source, census: Census, rows: Rows) -> list[str]:
    notes = []
    if census.incomplete:
        notes.append(f"{census.incomplete:,} rows left out (a value is missing): {places_of(source, census)}")
    if rows.repeated:
        notes.append(f"{rows.repeated:,} rows left out (the same user, content and label as another row)")
    if rows.contested:
        notes.append(f"{rows.contested:,} rows left out (their user gave the same content another label too)")
    if rows.unlabelled:
        notes.append(f"{rows.unlabelled:,} rows left out (a label such as NA where the others are numbers)")
    if rows.beyond:
        notes.append(f"{rows.beyond:,} rows left out (beyond the max_rows of their user, by hash)")
    return notes


def _population(
    source: Source, items: Items, rows: Rows, part: dict[str, str], seed: int, support: int | None, notes: tuple[str, ...]
) -> Population:
    judged = Judgements(rows.users, rows.items.tolist(), rows.labels.tolist(), rows.contents)
    split: dict[str, list[User]] = {name: [] for name in SPLITS}
    fitting: list[int] = []
    for user, own in judged.rows().items():
        if part[user] == "fitting":
            fitting += own
            continue
        known = min(SUPPORT, len(own) // 2) if support is None else support
        dealt = judged.user(user, own, seed, known)
        assert dealt is not None, "users with too few rows are left out before"
        split[part[user]].append(dealt)
    inputs, labels = judged.tensors
    return Population(
        f"table-{source.path.name.split('.')[0]}",
        len(rows.classes),
        tuple(split["train"]),
        tuple(split["val"]),
        tuple(split["test"]),
        seed=seed,
        items=items,
        fitting=Examples(inputs[fitting], labels[fitting]),
        class_names=rows.classes,
        notes=notes,
    )

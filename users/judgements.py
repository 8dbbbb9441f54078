"""Texts judged by many people: what the populations of annotators and readers share."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from users.base import User
from users.files import Row, rows_of
from users.roles import MINIMUM, by_hash, deal, sorted_ids, user_from


@dataclass(frozen=True)
class Judgements:
    """Who judged what and how, row by row.

    Attributes:
        users: ``[R]`` ids. items: ``[R]`` positions of texts. labels: ``[R]`` class indices.
        keys: one stable name per text, by which rows are dealt.
    """

    users: list[str]
    items: list[int]
    labels: list[int]
    keys: tuple[str, ...]

    @staticmethod
    def of(triples: Sequence[tuple[str, str, int]], keys: Iterable[str]) -> "Judgements":
        """From users, keys of what they judged, and labels."""
        keys = tuple(keys)
        place = {key: number for number, key in enumerate(keys)}
        return Judgements([user for user, *_ in triples], [place[key] for _, key, _ in triples], [t[2] for t in triples], keys)

    def rows(self) -> Mapping[str, list[int]]:
        """Each user's rows."""
        found: dict[str, list[int]] = defaultdict(list)
        for row, user in enumerate(self.users):
            found[user].append(row)
        return found

    @cached_property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions and labels, ``[R]`` int64 each."""
        return torch.tensor(self.items), torch.tensor(self.labels)

    def in_order(self, rows: Iterable[int], *salt: object) -> list[int]:
        """Rows of one user in a random order that follows from ``salt`` and the texts alone."""
        return by_hash(rows, lambda row: self.keys[self.items[row]], *salt)

    def user(self, user_id: str, rows: Iterable[int], seed: int, support: int, validation: int | None = None) -> User | None:
        """A user whose rows were dealt by hash: support, then validation (None: half of the rest), then query.

        Returns None if too few are left beyond the support.
        """
        order = self.in_order(rows, "roles", seed, user_id)
        left = len(order) - support
        if left < MINIMUM or (validation or 0) >= left:
            return None
        return self.with_roles(user_id, deal(order, support, left // 2 if validation is None else validation))

    def with_roles(self, user_id: str, roles: tuple[list[int], list[int], list[int]]) -> User:
        """A user with given rows per role."""
        return user_from(user_id, *self.tensors, roles)


def read_judgements(items_path: Path, labels_path: Path) -> tuple[dict[str, str], Judgements, tuple[str, ...]]:
    """Texts by id out of one table, who gave which of them which label out of another, and notes; see :func:`joined`.

    Raises:
        ValueError: names the file and what is wrong: an id of two texts, a text that is not there, or that somebody judged
            twice (which could put it into two of their roles).
    """
    texts: dict[str, str] = {}
    for row in rows_of(items_path, ("item_id", "text")):
        note_text(texts, row, "item_id")
    labels: dict[tuple[str, str], int] = {}
    for row in rows_of(labels_path, ("user_id", "item_id", "label")):
        user, item = row["user_id"], row["item_id"]
        if item not in texts:
            raise ValueError(f"{row.where}: text {item!r} is judged, which {items_path} does not have; restore both files.")
        if (user, item) in labels:
            raise ValueError(f"{row.where}: user {user!r} judges text {item!r} a second time; remove one of the rows.")
        labels[user, item] = row.integer("label")
    return joined(texts, labels)


def note_text(texts: dict[str, str], row: Row, column: str) -> None:
    """Put a row's text under its id. Raises ``ValueError`` if that has another text already."""
    if texts.setdefault(row[column], row["text"]).strip() != row["text"].strip():
        cure = "give each text an id of its own, or restore the file"
        raise ValueError(f"{row.where}: {column} {row[column]!r} has another text above; {cure}.")


def joined(
    texts: Mapping[str, str], labels: Mapping[tuple[str, str], int]
) -> tuple[dict[str, str], Judgements, tuple[str, ...]]:
    """Texts by id and their judgements, with texts that read the same (white space around them aside) made one.

    Under two ids a text could go to two roles of somebody, or to two folds. Its least id stands for all; of what somebody
    says of it several times one is kept, or none if they contradict themselves. Notes say what was left out.

    Args:
        texts: by id.
        labels: by user and id.
    """
    first: dict[str, str] = {}
    stands = {key: first.setdefault(texts[key].strip(), key) for key in sorted_ids(texts)}
    given: dict[tuple[str, str], list[int]] = defaultdict(list)
    for (user, key), label in labels.items():
        given[user, stands[key]].append(label)
    kept = [(*pair, own[0]) for pair, own in given.items() if len(set(own)) == 1]
    left = {key: text for key, text in texts.items() if stands[key] == key}
    contested = sum(len(own) for own in given.values()) - sum(len(given[pair[:2]]) for pair in kept)
    again = len(labels) - len(kept) - contested
    notes = (
        (len(texts) - len(left), "texts are the same as another one, and taken for it"),
        (again, "judgements left out (the same user, text and label as another one)"),
        (contested, "judgements left out (their user judged the same text otherwise too)"),
    )
    return left, Judgements.of(kept, left), tuple(f"{count} {what}" for count, what in notes if count)

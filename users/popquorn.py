"""Offensiveness judgements by annotator: social-media comments, offensive (2 or more of 5) or not.

Source: Pei and Jurgens 2023, "When Do Annotator Demographics Matter? Measuring the Influence of Annotator Demographics
with the POPQUORN Dataset". Content warning: real comments, some of them offensive.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from users.assignment import with_fitting
from users.base import Examples, Population, User
from users.files import data_root as root_of
from users.files import find, rows_of
from users.items import TextItems
from users.judgements import Judgements, joined, note_text, read_judgements
from users.roles import by_hash, dropped_note, sorted_ids, splits_given

PROTOCOLS = ("new_annotators", "new_annotators_and_comments")
FOLDS = 5
SUPPORT, VALIDATION = 20, 10
FILES = ("items.csv.gz", "labels.csv.gz", "users.csv")
RAW = "raw_data.csv"


def popquorn(
    data_root: str | Path | None = None,
    seed: int = 0,
    protocol: str = "new_annotators_and_comments",
    fold: int = 0,
    fit_share: float = 0.4,
) -> Population:
    """Annotators as users: 20 judgements are support, 10 validation (at most, where folds decide), the rest query.

    * ``new_annotators``: train, val and test annotators, of ``users.csv`` where there is one, have comments in common; a
      share of the train annotators fits the population model and is personalised no more.
    * ``new_annotators_and_comments``: five folds over all annotators and over all comments. The annotators of ``fold`` are
      test users; what is asked of them are the comments of ``fold`` alone, whose judgements are removed from everything
      else: fitting, meta-learning, policy, supports. The annotators of the next fold are val users. What train users are
      rewarded on and what val users are asked (validation and query) are the comments of the next fold, which no support
      and no query of a train user holds: choices are made on comments as new to the meta-initialisation as the test's.
      The population model is fitted on all train users' judgements and cross-fitted over comments, so that every comment
      is new to it.

    Args:
        data_root: folder that holds ``popquorn_offensiveness/`` with ``items.csv.gz``, ``labels.csv.gz`` and
            ``users.csv``, or the authors' own ``raw_data.csv`` (also in a folder ``offensiveness``).
        seed: deals judgements to roles; the folds do not depend on it.
        protocol: one of :data:`PROTOCOLS`.
        fold: 0 to 4, for the second protocol.
        fit_share: for the first protocol.

    Raises:
        FileNotFoundError: with what was looked for. ValueError: for damaged files or impossible arguments.
    """
    if protocol not in PROTOCOLS or fold not in range(FOLDS):
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)} and fold 0 to {FOLDS - 1}, got {protocol!r}, {fold}.")
    if not 0 < fit_share < 1:
        raise ValueError(f"fit_share must be between 0 and 1, got {fit_share}.")
    source = _read(data_root)
    if protocol == "new_annotators" and fold != 0:
        raise ValueError("fold belongs to the protocol new_annotators_and_comments; leave it out.")
    if protocol == "new_annotators":
        return _new_annotators(source, seed, fit_share)
    return _new_comments(source, seed, fold)


@dataclass(frozen=True)
class _Source:
    """What the files say: texts by id, judgements, the split of each annotator (if given), and what was left out."""

    texts: Mapping[str, str]
    judged: Judgements
    splits: Mapping[str, str]
    notes: tuple[str, ...] = ()


def _read(root: str | Path | None) -> _Source:
    places = [root_of(root) / folder / RAW for folder in ("popquorn_offensiveness", "offensiveness", ".")]
    raw = next((path for path in places if path.is_file()), None)
    if raw is not None:
        return _read_raw(raw)
    items_path, labels_path, users_path = find(root, "popquorn_offensiveness", FILES, instead=places)
    texts, judged, notes = read_judgements(items_path, labels_path)
    given = ((row["user_id"], row["split"]) for row in rows_of(users_path, ("user_id", "split")))
    return _Source(texts, judged, splits_given(users_path, given, judged.users), notes)


def _read_raw(path: Path) -> _Source:
    """The authors' table. Of repeated judgements the first is kept: unlike our own files, it is not ours to mend."""
    texts: dict[str, str] = {}
    labels: dict[tuple[str, str], int] = {}
    repeated = 0
    for row in rows_of(path, ("instance_id", "user_id", "text", "offensiveness")):
        pair, label = (row["user_id"], row["instance_id"]), int(row.number("offensiveness") >= 2)
        note_text(texts, row, "instance_id")
        repeated += pair in labels
        labels.setdefault(pair, label)
    note = f"{repeated} judgements left out (the same annotator and comment as an earlier row of {path.name})"
    texts, judged, notes = joined(texts, labels)
    return _Source(texts, judged, {}, (*notes, note) if repeated else notes)


def _new_annotators(source: _Source, seed: int, share: float) -> Population:
    rows = source.judged.rows()
    folds = _folds(rows, "annotator")
    dealt = {name: source.judged.user(name, rows[name], seed, SUPPORT, VALIDATION) for name in sorted_ids(rows)}
    by_fold = {name: "test" if folds[name] == 0 else "val" if folds[name] == 1 else "train" for name in dealt}
    able = {name: user is not None for name, user in dealt.items()}
    part = with_fitting({name: source.splits.get(name, by_fold[name]) for name in dealt}, able, seed, share)
    fitting = [row for name, own in part.items() if own == "fitting" for row in rows[name]]
    users = {name: (own, dealt[name]) for name, own in part.items() if own != "fitting"}
    return _population(source, users, fitting, None, seed)


def _new_comments(source: _Source, seed: int, fold: int) -> Population:
    judged, rows = source.judged, source.judged.rows()
    annotators, comments = _folds(rows, "annotator"), _folds(judged.keys, "comment")
    of_item = [comments[key] for key in judged.keys]
    following = (fold + 1) % FOLDS
    fitting, users = [], {}
    for name in sorted_ids(rows):
        order = judged.in_order(rows[name], "roles", seed, name)
        asked, unseen = ([row for row in order if of_item[judged.items[row]] == of] for of in (fold, following))
        known = [row for row in order if row not in {*asked, *unseen}]
        if annotators[name] == fold:
            split, known = "test", [row for row in order if row not in set(asked)]
            roles = known[:SUPPORT], known[SUPPORT : SUPPORT + VALIDATION], asked
        elif annotators[name] == following:
            split, roles = "val", (known[:SUPPORT], known[SUPPORT : SUPPORT + VALIDATION], unseen)
        else:
            split, roles = "train", (known[:SUPPORT], unseen[:VALIDATION], known[SUPPORT:])
            fitting += known + unseen
        users[name] = (split, judged.with_roles(name, roles) if all(roles) else None)
    crossed = torch.tensor([-1 if of == fold else (of - following) % FOLDS for of in of_item])
    return _population(source, users, fitting, crossed, seed)


def _folds(names: Iterable[str], what: str) -> dict[str, int]:
    """Five parts of equal size, by hash."""
    order = sorted(set(names))
    return {order[place]: rank % FOLDS for rank, place in enumerate(by_hash(range(len(order)), order.__getitem__, what))}


def _population(
    source: _Source, users: dict[str, tuple[str, User | None]], fitting: list[int], folds: torch.Tensor | None, seed: int
) -> Population:
    inputs, labels = source.judged.tensors
    train, val, test = (tuple(user for of, user in users.values() if of == name and user) for name in ("train", "val", "test"))
    dropped = [name for name, (_, user) in users.items() if user is None]
    return Population(
        "popquorn",
        2,
        train,
        val,
        test,
        seed=seed,
        items=TextItems(tuple(source.texts.values())),
        fitting=Examples(inputs[fitting], labels[fitting]),
        folds=folds,
        class_names=("not offensive", "offensive"),
        notes=(
            *dropped_note("annotators", dropped, f"too few judgements beyond the {SUPPORT} of the support"),
            *source.notes,
        ),
    )

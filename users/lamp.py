"""LaMP, personalisation of language models: a profile of what somebody wrote or rated, and one question about the same person.

Source: Salemi, Mysore, Bendersky and Zamani 2024, "LaMP: When Large Language Models Meet Personalization"; the files are
published at https://lamp-benchmark.github.io.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from backbones.registry import did_you_mean
from users.assignment import PARTS, SPLIT_SEED, check_classes, chosen, filled, parts_of
from users.base import SPLITS, Examples, Population, User
from users.files import data_root as root_of
from users.files import find
from users.items import TextItems
from users.lamp_files import RELATED, TASKS, Question, questions_of
from users.roles import MINIMUM, by_hash, deal, dropped_note, position, user_from

FILES = ("train_questions.json", "train_outputs.json", "dev_questions.json", "dev_outputs.json")
TEST_FILES = ("test_questions.json", "test_outputs.json")


def lamp(
    data_root: str | Path | None = None,
    task: str = "LaMP-2",
    seed: int = 0,
    support: int = 20,
    fit_share: float = 0.25,
    max_users: int | None = 2000,
) -> Population:
    """Questions as users: the profile is support and validation, the question itself the query (one example).

    * ``LaMP-1``, citations: the titles in an author's profile and as many titles by hash from other authors of the same
      part are told apart. The query is the two candidate references of the question: the one that the author cites is to
      be taken for the author's, the other not. The benchmark has no labels in this task's profiles and asks which of the
      two; this is our construction, and its accuracy is not comparable with the benchmark's.
    * ``LaMP-2``, a movie's tag from its description; also the older files, a news article's category from its text.
    * ``LaMP-3``, the score (1 to 5) of a product review from its text.

    Profile entries with an empty text, with the text of the query or with a text that has another label too are left out. A
    label that no train question has is an error. Train questions are train users, dev questions val users, test questions
    test users. The benchmark keeps ``test_outputs.json``: without it the dev questions are split in halves, val and test,
    such that questions with the same profile stay together. Take the files of the split by user; in those of the split by
    time, people recur.

    A whole JSON file is in memory while it is read, as Python objects several times its size; LaMP-3 takes the most.

    Args:
        data_root: folder that holds ``LaMP_2/`` (or ``LaMP-2/``, or the files themselves): ``train_questions.json``,
            ``train_outputs.json``, ``dev_questions.json``, ``dev_outputs.json`` and perhaps the same two for test.
        task: LaMP-1, LaMP-2 or LaMP-3.
        seed: chooses users, deals train users to fitting and profiles to roles; who is val or test does not depend on it.
        support: profile entries that are known of a user, half of the profile at most; the others are validation.
        fit_share: share of the train users whose profiles and questions fit the population model; they are users no longer.
        max_users: at most so many users altogether, those who fit the population model included; None: all.

    Raises:
        FileNotFoundError: with what was looked for. ValueError: for damaged files (names file and question), for labels
            that the train files lack, and for impossible arguments.
    """
    task = task.replace("_", "-")
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r} of LaMP. {did_you_mean(task, TASKS)}")
    if support < 1 or not 0 < fit_share < 1 or (max_users is not None and max_users < len(PARTS)):
        raise ValueError(
            f"support must be at least 1, fit_share between 0 and 1 and max_users at least {len(PARTS)}, "
            f"got {support}, {fit_share} and {max_users}."
        )
    questions, halved = _questions(data_root, task)
    able = {name: q for name, q in questions.items() if len(q.profile) >= MINIMUM and q.query}
    part = _parts(able, halved, seed, fit_share)
    picked = chosen(part, len(part) if max_users is None else max_users, seed)
    part = {name: part[name] for name in picked}
    used = {name: able[name] for name in picked}
    contested = sum(question.contested for question in used.values())
    if task == "LaMP-1":
        used = _paired(used, part, seed)
    notes = (
        *(["there is no test_outputs.json: half of the dev users are val users, half are test users"] if halved else []),
        *dropped_note("users", list(questions.keys() - able), f"fewer than {MINIMUM} profile entries, or an empty question"),
        *([f"{contested:,} texts left out (their profile gives them two labels)"] if contested else []),
        *([f"{len(part):,} of {len(able):,} users were chosen by hash (max_users)"] if len(part) < len(able) else []),
        f"{list(part.values()).count('fitting'):,} further users fit the population model and are in no split",
    )
    return _population(task, used, part, seed, support, fit_share, notes)


def _questions(data_root: str | Path | None, task: str) -> tuple[dict[str, Question], bool]:
    """All questions by id, and whether there is no test file, so that dev is to be halved."""
    folder = task if (root_of(data_root) / task).is_dir() else task.replace("-", "_")
    train, train_golds, dev, dev_golds = find(data_root, folder, FILES)
    files = [("train", train, train_golds), ("val", dev, dev_golds)]
    test, test_golds = (train.parent / name for name in TEST_FILES)
    if test_golds.is_file():
        files.append(("test", test, test_golds))
    questions: dict[str, Question] = {}
    for split, path, golds in files:
        found = questions_of(task, split, path, golds)
        if twice := questions.keys() & found.keys():
            raise ValueError(
                f"{path} has a question {min(twice)!r} that another split has as well; take files of one download."
            )
        questions |= found
    known = {label for q in questions.values() if q.split == "train" for _, label in (*q.profile, *q.query)}
    for name, question in questions.items():
        if strange := sorted({label for _, label in (*question.profile, *question.query)} - known):
            raise ValueError(
                f"question {name!r} of {question.split} has the label {strange[0]!r}, which no train question has. "
                f"{did_you_mean(strange[0], known)} Take all files from one download."
            )
    return questions, not test_golds.is_file()


def _parts(questions: Mapping[str, Question], halved: bool, seed: int, fit_share: float) -> dict[str, str]:
    """Fitting, train, val or test; questions with the same profile go together, for they may be the same person's."""
    splits = {_person(question): question.split for question in questions.values()}
    if halved:
        dev = [person for person, split in splits.items() if split == "val"]
        halves = {p: "val" if position("half", SPLIT_SEED, p) < 0.5 else "test" for p in dev}
        splits |= filled(halves, ("val", "test"), SPLIT_SEED)
    part = parts_of(splits, seed, fit_share, splits)
    return {name: part[_person(question)] for name, question in questions.items()}


def _person(question: Question) -> str:
    return f"{question.split} {question.person}"  # two people may have labelled the same few things


def _paired(questions: Mapping[str, Question], part: Mapping[str, str], seed: int) -> dict[str, Question]:
    """Profiles of LaMP-1 with as many titles of others; of the same part only, so that parts share nothing by this."""
    paired = {}
    for name in PARTS:
        own = {user: question for user, question in questions.items() if part[user] == name}
        titles = sorted({title for question in own.values() for title, _ in question.profile})
        pool = [titles[place] for place in by_hash(range(len(titles)), titles.__getitem__, "pool", seed)]
        for user, question in own.items():
            others = _others(question, pool, position("others", seed, user))
            if not others:
                raise ValueError(
                    f"there are no papers of other {name} authors to tell those of user {user!r} from; give more users."
                )
            paired[user] = replace(question, profile=(*question.profile, *((title, RELATED[0]) for title in others)))
    return paired


def _others(question: Question, pool: Sequence[str], start: float) -> list[str]:
    """As many titles as the profile has, from a place in the shuffled pool on, without those of profile and query."""
    own = {title for title, _ in (*question.profile, *question.query)}
    first = int(start * len(pool))
    order = (pool[(first + step) % len(pool)] for step in range(len(pool)))
    return list(islice((title for title in order if title not in own), len(question.profile)))


def _population(
    task: str,
    questions: Mapping[str, Question],
    part: Mapping[str, str],
    seed: int,
    support: int,
    fit_share: float,
    notes: tuple[str, ...],
) -> Population:
    rows = [(user, *row) for user in sorted(questions) for row in (*questions[user].profile, *questions[user].query)]
    classes, labels = np.unique([label for *_, label in rows], return_inverse=True)
    texts = sorted({text for _, text, _ in rows})
    place = {text: number for number, text in enumerate(texts)}
    owners = [user for user, *_ in rows]
    check_classes(classes.tolist(), labels, np.array([part[user] for user in owners]), owners, fit_share)
    inputs, targets = torch.tensor([place[text] for _, text, _ in rows]), torch.from_numpy(labels)
    split: dict[str, list[User]] = {name: [] for name in SPLITS}
    fitting: list[int] = []
    first = 0
    for user in sorted(questions):
        profile = range(first, first + len(questions[user].profile))
        first = profile.stop + len(questions[user].query)
        if part[user] == "fitting":
            fitting += range(profile.start, first)
            continue
        order = by_hash(profile, lambda row: rows[row][1:], "roles", seed, user)
        known, rest, _ = deal(order, min(support, len(order) // 2), len(order))
        split[part[user]].append(user_from(user, inputs, targets, (known, rest, list(range(profile.stop, first)))))
    return Population(
        task.lower(),
        len(classes),
        tuple(split["train"]),
        tuple(split["val"]),
        tuple(split["test"]),
        seed=seed,
        items=TextItems(tuple(texts)),
        fitting=Examples(inputs[fitting], targets[fitting]),
        class_names=tuple(classes.tolist()),
        notes=notes,
    )

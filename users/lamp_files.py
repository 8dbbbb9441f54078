"""The JSON files of LaMP: questions with profiles, and their answers."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from users.files import json_of

TASKS = ("LaMP-1", "LaMP-2", "LaMP-3")
RELATED = ("not this author's", "this author's")
"""Labels of LaMP-1, which has none of its own."""
REFERENCES = re.compile(r'\[1\]: "(.*?)" \[2\]: "(.*)"\s*$', re.DOTALL)

Rows = tuple[tuple[str, str], ...]
"""Texts and their labels."""


@dataclass(frozen=True)
class Question:
    """A question, and the profile of who is asked. ``person`` is the same for questions with the same profile.

    ``contested`` texts of the profile are left out: they have two labels, and could be adapted on and asked about.
    """

    split: str
    person: str
    profile: Rows
    query: Rows
    contested: int = 0


def questions_of(task: str, split: str, questions: Path, outputs: Path) -> dict[str, Question]:
    """Questions by id, in the order of their file.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: names the file, the question and what is wrong with it.
    """
    golds = _golds(task, outputs)
    found: dict[str, Question] = {}
    entries = _json(questions)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{questions} should hold a list of questions, and at least one; restore it.")
    for number, entry in enumerate(entries):
        name = str(_value(entry, "id", f"{questions}, number {number + 1} of the questions"))
        where = f"{questions}, question {name!r}"
        if name in found:
            raise ValueError(f"{where} is there twice; restore the file.")
        if name not in golds:
            raise ValueError(f"{where} has no answer in {outputs}; take both from one download.")
        found[name] = _question(task, split, entry, golds[name], where)
    if strangers := golds.keys() - found.keys():
        raise ValueError(
            f"{outputs} answers a question {min(strangers)!r} that {questions} does not ask; take both from one download."
        )
    return found


def _question(task: str, split: str, entry: Any, gold: str, where: str) -> Question:
    prompt, profile = _value(entry, "input", where), _value(entry, "profile", where)
    if not isinstance(prompt, str) or not isinstance(profile, list):
        raise ValueError(f"{where}: 'input' should be a string and 'profile' a list; restore the file.")
    query = (
        _references(prompt, gold, where) if task == "LaMP-1" else ((_asked(task, prompt, where), _label(task, gold, where)),)
    )
    asked = {text for text, _ in query}
    entries = [_profile_row(task, each, f"{where}, profile") for each in profile]
    ids = [str(_value(each, "id", f"{where}, profile")) for each in profile]  # of their own in every profile, in some files
    whole = sorted("\x1e".join((name, *row)) for name, row in zip(ids, entries, strict=True))
    rows = dict.fromkeys(entries)  # without repetitions
    labels = Counter(text for text, _ in rows)
    try:
        person = sha256("\x1f".join(whole).encode()).hexdigest()
        for text in asked:
            text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds half a character ({error.reason}); restore the file.") from error
    return Question(
        split,
        person,
        tuple((text, label) for text, label in rows if text and text not in asked and labels[text] == 1),
        query if all(asked) else (),
        sum(count > 1 for text, count in labels.items() if text and text not in asked),
    )


def _profile_row(task: str, entry: Any, where: str) -> tuple[str, str]:
    if task == "LaMP-1":
        return _string(entry, "title", where), RELATED[1]
    if task == "LaMP-3":
        return _string(entry, "text", where), _label(task, _value(entry, "score", where), where)
    news = isinstance(entry, Mapping) and "category" in entry
    text, label = ("text", "category") if news else ("description", "tag")
    return _string(entry, text, where), _label(task, _value(entry, label, where), where)


def _asked(task: str, prompt: str, where: str) -> str:
    """The text in a prompt: what follows the first of the words that introduce it, as the text may contain them too."""
    markers = (" review: ",) if task == "LaMP-3" else (" description: ", " article: ")
    marker = min((m for m in markers if m in prompt), key=prompt.index, default=None)
    if marker is None:
        raise ValueError(f"{where}: the input should contain {' or '.join(map(repr, markers))}; is this a file of {task}?")
    return prompt.partition(marker)[2].strip()


def _references(prompt: str, gold: str, where: str) -> Rows:
    """Both candidates, the one that the author cites labelled as the author's."""
    parts = REFERENCES.search(prompt)
    if parts is None or gold not in ("[1]", "[2]"):
        raise ValueError(f'{where}: the input should end in [1]: "..." [2]: "..." and the answer be [1] or [2], not {gold!r}.')
    return tuple((parts[k].strip(), RELATED[gold == f"[{k}]"]) for k in (1, 2))


def _label(task: str, value: Any, where: str) -> str:
    label = str(value).strip()
    if task == "LaMP-3":
        label = label.removesuffix(".0")
        if label not in ("1", "2", "3", "4", "5"):
            raise ValueError(f"{where}: a score should be 1 to 5, not {value!r}; restore the file.")
    if not label:
        raise ValueError(f"{where}: a label is empty; restore the file.")
    return label


def _golds(task: str, path: Path) -> dict[str, str]:
    outputs = _json(path)
    of = str(_value(outputs, "task", str(path)))
    if not of.replace("_", "-").startswith(task):
        raise ValueError(f"{path} is of task {of!r}, not {task}; give the folder of {task}.")
    golds = _value(outputs, "golds", str(path))
    if not isinstance(golds, list):
        raise ValueError(f"{path}: 'golds' should be a list of answers; restore the file.")
    return {str(_value(gold, "id", f"{path}, golds")): str(_value(gold, "output", f"{path}, golds")) for gold in golds}


def _value(entry: Any, key: str, where: str) -> Any:
    if not isinstance(entry, Mapping) or entry.get(key) is None:
        held = [name for name in entry if entry[name] is not None] if isinstance(entry, Mapping) else []
        has = f"it has {', '.join(map(str, held))}" if isinstance(entry, Mapping) else f"it is {type(entry).__name__}"
        raise ValueError(f"{where}: an entry has no {key!r} ({has}); restore the file.")
    return entry[key]


def _string(entry: Any, key: str, where: str) -> str:
    return str(_value(entry, key, where)).strip()


def _json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; take all files from one download.")
    return json_of(path)

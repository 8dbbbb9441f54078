"""Real populations in miniature: who loads them, what is in their files and in what was read, and how to alter a file."""

import csv
import gzip
import io
from collections import Counter
from functools import partial

import miniatures
import numpy as np
import pytest

from users.base import ROLES, SPLITS
from users.jester import jester
from users.popquorn import popquorn
from users.unipen import unipen

NEW_COMMENTS = "new_annotators_and_comments"
LOADERS = {
    "unipen": unipen,
    "jester": jester,
    "annotators": partial(popquorn, protocol="new_annotators"),
    "comments": partial(popquorn, protocol=NEW_COMMENTS, fold=2),
}
SPLIT_BY_FILE = ("unipen", "jester", "annotators")
FOLDER = {"unipen": "unipen_chars", "jester": "jester5k", "annotators": "popquorn_offensiveness"}
FOLDER["comments"] = FOLDER["annotators"]
DROPPED = {"unipen": {"900", "901"}, "jester": {"77"}, "annotators": {"77"}, "comments": {"77"}}
every_loader = pytest.mark.parametrize("name", LOADERS)
split_by_file = pytest.mark.parametrize("name", SPLIT_BY_FILE)


def write_all(root):
    for write in (miniatures.unipen, miniatures.popquorn, miniatures.jester, miniatures.omniglot):
        write(root)
    return root


def read_csv(path):
    data = path.read_bytes()
    return list(csv.reader(io.StringIO((gzip.decompress(data) if path.suffix == ".gz" else data).decode(), newline="")))


def write_csv(path, rows, encoding="utf-8"):
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    data = text.getvalue().encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def edit_csv(path, change):
    """Let ``change(header, rows)`` alter the lists of a table in place."""
    header, *rows = read_csv(path)
    change(header, rows)
    write_csv(path, [header, *rows])


def edit_npz(path, change):
    """Let ``change(arrays)`` alter the arrays of a file in place."""
    with np.load(path) as file:
        arrays = dict(file)
    change(arrays)
    np.savez_compressed(path, **arrays)


def content(population, examples):
    """How often which thing is there under which label, wherever it is in the file."""
    things = population.items.take(examples.inputs.tolist())
    keys = things if isinstance(things, list) else [image.numpy().tobytes() for image in things]
    return Counter(zip(keys, examples.labels.tolist(), strict=True))


def described(population):
    """Every user's split and contents by role, by id."""
    return {
        user.user_id: (split, {role: content(population, getattr(user, role)) for role in ROLES}, user.info)
        for split in SPLITS
        for user in getattr(population, split)
    }


def everything(population, user):
    return sum((content(population, getattr(user, role)) for role in ROLES), Counter())


def truth(root, name):
    """``{user: Counter of (thing, label)}``, read from the files without the loader."""
    folder = root / FOLDER[name]
    found = {}
    if name == "unipen":
        with np.load(folder / "unipen_chars.npz") as file:
            for user, image, label in zip(file["user_id"], file["images"], file["label"], strict=True):
                found.setdefault(str(user), Counter())[image.tobytes(), int(label)] += 1
        return found
    texts = dict(read_csv(folder / "items.csv.gz")[1:])
    for user, item, _, label in read_csv(folder / "labels.csv.gz")[1:]:
        found.setdefault(user, Counter())[texts[item], int(label)] += 1
    return found


def splits_of(root, name):
    header, *rows = read_csv(root / FOLDER[name] / "users.csv")
    return {row[0]: row[header.index("split")] for row in rows}


def ids(population, split):
    return {user.user_id for user in getattr(population, split)}

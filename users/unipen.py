"""Handwritten characters by writer: isolated letters and digits of the UNIPEN collection, 62 classes.

Source: Guyon et al. 1994, "UNIPEN project of on-line data exchange and recognizer benchmarks"; drawn as 28x28 images.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from users.assignment import with_fitting
from users.base import Examples, Population, User
from users.files import arrays_of, find, json_of, rows_of
from users.items import TensorItems
from users.roles import by_hash, dropped_note, splits_given, user_from

SIZE = (28, 28)
LEFT = 20
"""Images that a writer must have beyond the support."""


def unipen(data_root: str | Path | None = None, seed: int = 0, shots: int = 3, fit_share: float = 0.7) -> Population:
    """Writers as users; what to predict is always one of all 62 characters.

    Per class ``min(shots, n - 1)`` images are support; the others are halved into validation and query by a hash.
    Images that a writer has more than once, under two labels perhaps, are in no role.

    Args:
        data_root: folder that holds ``unipen_chars/`` with ``unipen_chars.npz``, ``users.csv`` and ``meta.json``.
        seed: deals images to roles. The split of writers is that of ``users.csv``, and who of the train writers fits the
            population model does not depend on the seed either, so that one backbone serves all seeds.
        shots: support images per class.
        fit_share: share of the train writers whose images fit the population model; they are users no longer.

    ``User.info`` holds ``collection`` and ``classes``, the number of classes that the writer wrote.

    Raises:
        FileNotFoundError: with what was looked for. ValueError: for a damaged file or impossible arguments.
    """
    if shots < 1 or not 0 < fit_share < 1:
        raise ValueError(f"shots must be at least 1 and fit_share between 0 and 1, got {shots} and {fit_share}.")
    images_path, users_path, meta_path = find(data_root, "unipen_chars", ("unipen_chars.npz", "users.csv", "meta.json"))
    data = arrays_of(images_path, ("images", "label", "user_id"))
    _check(images_path, data)
    names = _class_names(meta_path)
    labels = torch.from_numpy(data["label"].astype(np.int64))
    digests = [sha256(image.tobytes()).hexdigest() for image in data["images"]]
    split: dict[str, list[User]] = {"train": [], "val": [], "test": []}
    fitting, dropped, ambiguous = [], [], 0
    writers = _writers(users_path, data["user_id"])
    mine = {writer: np.flatnonzero(data["user_id"] == int(writer)) for writer in writers}
    clear = {writer: _clear(own, digests) for writer, own in mine.items()}
    roles = {writer: _roles(own, data["label"], digests, shots, seed, writer) for writer, own in clear.items()}
    able = {writer: bool(support) and len(first) + len(rest) >= LEFT for writer, (support, first, rest) in roles.items()}
    for writer, name in with_fitting({writer: of for writer, (of, _) in writers.items()}, able, 0, fit_share).items():
        if name == "fitting":
            fitting.append(mine[writer])
        elif not able[writer]:
            dropped.append(writer)
        else:
            ambiguous += len(mine[writer]) - len(clear[writer])
            info = {"collection": writers[writer][1], "classes": len(set(data["label"][clear[writer]].tolist()))}
            split[name].append(user_from(writer, torch.arange(len(labels)), labels, roles[writer], **info))
    chosen = torch.from_numpy(np.concatenate(fitting)) if fitting else torch.empty(0, dtype=torch.long)
    return Population(
        "unipen",
        len(names),
        train=tuple(split["train"]),
        val=tuple(split["val"]),
        test=tuple(split["test"]),
        seed=seed,
        items=TensorItems(torch.from_numpy(data["images"])[:, None]),
        fitting=Examples(chosen, labels[chosen]),
        class_names=names,
        notes=(
            *dropped_note("writers", dropped, f"fewer than {LEFT} images beyond the support, or no class twice"),
            *([f"{ambiguous} images left out (their writer has them more than once)"] if ambiguous else []),
        ),
    )


def _check(path: Path, data: Mapping[str, NDArray]) -> None:
    """Raise ``ValueError`` if the arrays do not go together, or are not of what is expected."""
    images, label, writer = data["images"], data["label"], data["user_id"]
    if images.dtype != np.uint8 or images.shape[1:] != SIZE:
        raise ValueError(f"{path}: images should be uint8 [N, 28, 28], not {images.dtype} {list(images.shape)}; restore it.")
    for name, values in (("label", label), ("user_id", writer)):
        if values.dtype.kind not in "iu" or values.shape != images.shape[:1]:
            raise ValueError(
                f"{path}: {name} should be {len(images)} whole numbers, one for each image, not {values.dtype} "
                f"{list(values.shape)}; restore it."
            )


def _class_names(path: Path) -> tuple[str, ...]:
    meta = json_of(path)
    names = meta.get("classes") if isinstance(meta, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} should have a list of names as 'classes'; restore it.")
    return tuple(names)


def _writers(path: Path, with_images: NDArray) -> dict[str, tuple[str, str]]:
    """Split and collection of each writer, sorted."""
    rows = [(str(row.integer("user_id")), row) for row in rows_of(path, ("user_id", "collection", "split"))]
    given = splits_given(path, ((name, row["split"]) for name, row in rows), map(str, np.unique(with_images).tolist()))
    collections = {name: row["collection"] for name, row in rows}
    return {name: (split, collections[name]) for name, split in given.items()}


def _clear(rows: NDArray[np.int64], digests: list[str]) -> NDArray[np.int64]:
    """``rows`` of one writer without the images that are there more than once.

    The copies could go to two roles, and which of them goes where would follow from the order of the file.
    """
    count = Counter(digests[row] for row in rows)
    return rows[np.array([count[digests[row]] == 1 for row in rows], dtype=bool)]


def _roles(
    rows: NDArray[np.int64], labels: NDArray, digests: list[str], shots: int, seed: int, writer: str
) -> tuple[list[int], list[int], list[int]]:
    by_class: dict[int, list[int]] = defaultdict(list)
    for row in by_hash(rows.tolist(), digests.__getitem__, "unipen", seed, writer):
        by_class[int(labels[row])].append(row)
    support = [row for own in by_class.values() for row in own[: min(shots, len(own) - 1)]]
    left = [row for own in by_class.values() for row in own[min(shots, len(own) - 1) :]]
    rest = by_hash(left, digests.__getitem__, "half", seed, writer)
    return support, rest[: len(rest) // 2], rest[len(rest) // 2 :]

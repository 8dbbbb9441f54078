"""Jokes by reader: 100 jokes, rated good (above zero) or not.

Source: Goldberg, Roeder, Gupta and Perkins 2001, "Eigentaste: A Constant Time Collaborative Filtering Algorithm".
"""

from pathlib import Path

from users.assignment import with_fitting
from users.base import Examples, Population, User
from users.files import find, rows_of
from users.items import TextItems
from users.judgements import read_judgements
from users.roles import MINIMUM, dropped_note, splits_given

FILES = ("items.csv.gz", "labels.csv.gz", "users.csv")


def jester(
    data_root: str | Path | None = None, seed: int = 0, support: int = 20, fit_share: float = 0.2, max_users: int | None = None
) -> Population:
    """Readers as users: does this reader like this joke? ``support`` ratings are known, the rest is halved.

    Args:
        data_root: folder that holds ``jester5k/`` with ``items.csv.gz``, ``labels.csv.gz`` and ``users.csv``.
        seed: deals ratings to roles and train readers to fitting; the split of readers is that of ``users.csv``.
        support: ratings that are known of a reader.
        fit_share: share of the train readers whose ratings fit the population model; they are users no longer.
        max_users: at most so many readers per split (the first by id), for quick tries; None: all.

    Raises:
        FileNotFoundError: with what was looked for. ValueError: for damaged files or impossible arguments.
    """
    if support < 1 or not 0 < fit_share < 1:
        raise ValueError(f"support must be at least 1 and fit_share between 0 and 1, got {support} and {fit_share}.")
    items_path, labels_path, users_path = find(data_root, "jester5k", FILES)
    texts, judged, notes = read_judgements(items_path, labels_path)
    rows = judged.rows()
    given = ((row["user_id"], row["split"]) for row in rows_of(users_path, ("user_id", "split")))
    split: dict[str, list[User]] = {"train": [], "val": [], "test": []}
    fitting, dropped = [], []
    splits = splits_given(users_path, given, rows)
    able = {reader: len(rows.get(reader, ())) >= support + MINIMUM for reader in splits}
    for reader, name in with_fitting(splits, able, seed, fit_share).items():
        if name == "fitting":
            fitting += rows.get(reader, [])
        elif max_users is None or len(split[name]) < max_users:
            user = judged.user(reader, rows.get(reader, []), seed, support)
            split[name].append(user) if user else dropped.append(reader)
    inputs, labels = judged.tensors
    return Population(
        "jester",
        2,
        train=tuple(split["train"]),
        val=tuple(split["val"]),
        test=tuple(split["test"]),
        seed=seed,
        items=TextItems(tuple(texts.values())),
        fitting=Examples(inputs[fitting], labels[fitting]),
        class_names=("not funny", "funny"),
        notes=(*dropped_note("readers", dropped, f"no ratings beyond the {support} of the support"), *notes),
    )

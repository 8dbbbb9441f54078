import csv
import gzip
import inspect
import io
import json
import re
import shutil
from collections import Counter
from functools import partial

import miniatures
import numpy as np
import pytest
import torch

from users.base import ROLES, SPLITS
from users.files import arrays_of
from users.jester import jester
from users.omniglot import omniglot
from users.popquorn import FOLDS, popquorn
from users.roles import sorted_ids
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


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data root with every miniature; not to be changed."""
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def raw_root(tmp_path_factory):
    """The same judgements as the authors' one table."""
    return miniatures.popquorn_raw(tmp_path_factory.mktemp("raw"))


@pytest.fixture
def copy(root, tmp_path):
    """A copy of ``root`` to be changed."""
    return shutil.copytree(root, tmp_path / "copy")


@pytest.fixture(scope="module")
def by_fold(root):
    """The second protocol's population of every fold."""
    return [popquorn(root, fold=fold) for fold in range(FOLDS)]


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


@every_loader
def test_a_population_is_read_whole_and_says_what_it_is(name, root):
    population = LOADERS[name](root)
    classes = len(miniatures.CLASSES) if name == "unipen" else 2
    assert population.num_classes == len(population.class_names) == classes
    assert population.seed == 0
    assert set(population.fitting.labels.tolist()) == set(range(classes))
    assert (population.folds is not None) == (name == "comments")


@every_loader
def test_users_have_their_own_examples_and_nobody_elses(name, root):
    population, true = LOADERS[name](root), truth(root, name)
    for user in population.users:
        assert not everything(population, user) - true[user.user_id]


@split_by_file
def test_splits_are_those_of_the_file_and_share_no_user(name, root):
    population, splits = LOADERS[name](root), splits_of(root, name)
    for split in SPLITS:
        assert {splits[user] for user in ids(population, split)} == {split}
    for split in ("val", "test"):
        assert ids(population, split) == {user for user in splits if splits[user] == split} - DROPPED[name]
    assert not ids(population, "train") & ids(population, "val")
    assert not (ids(population, "train") | ids(population, "val")) & ids(population, "test")


@split_by_file
def test_every_label_of_a_user_has_a_role(name, root):
    population, true = LOADERS[name](root), truth(root, name)
    for user in population.users:
        assert everything(population, user) == true[user.user_id]


@every_loader
def test_nothing_is_in_two_roles_of_a_user_or_twice_in_one(name, root):
    population = LOADERS[name](root)
    for user in population.users:
        places = torch.cat([getattr(user, role).inputs for role in ROLES]).tolist()
        assert len(set(places)) == len(places)
        assert len(everything(population, user)) == len(places)


@split_by_file
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_model_is_fitted_on_just_those_train_users_who_are_no_longer_users(name, root, seed):
    population, true = LOADERS[name](root, seed=seed), truth(root, name)
    fitting = {user for user, split in splits_of(root, name).items() if split == "train"} - ids(population, "train")
    assert fitting and population.train
    assert content(population, population.fitting) == sum((true[user] for user in fitting), Counter())


@split_by_file
def test_a_larger_fitting_share_takes_more_train_users_and_no_others(name, root):
    few, many = (LOADERS[name](root, fit_share=share) for share in (0.3, 0.6))
    assert ids(many, "train") < ids(few, "train")
    assert len(many.fitting) > len(few.fitting)
    assert [ids(many, split) for split in ("val", "test")] == [ids(few, split) for split in ("val", "test")]


@every_loader
def test_those_left_out_are_counted_and_named(name, root):
    population = LOADERS[name](root)
    (note,) = population.notes
    assert note.startswith(f"{len(DROPPED[name])} ")
    assert set(note.split(": ")[-1].split(", ")) == DROPPED[name]
    assert not DROPPED[name] & {user.user_id for user in population.users}


@every_loader
def test_nobody_left_out_is_no_note(name, copy):
    if name == "unipen":
        edit_csv(copy / FOLDER[name] / "users.csv", lambda header, rows: rows.__delitem__(slice(-2, None)))
        edit_npz(copy / FOLDER[name] / "unipen_chars.npz", without_left_out)
    else:
        for file in ("users.csv", "labels.csv.gz"):
            edit_csv(copy / FOLDER[name] / file, lambda header, rows: rows.__setitem__(slice(None), without_scarce(rows)))
    assert LOADERS[name](copy).notes == ()


def without_left_out(arrays):
    kept = arrays["user_id"] < miniatures.FEW
    arrays |= {name: array[kept] for name, array in arrays.items()}


def without_scarce(rows):
    return [row for row in rows if row[0] != miniatures.SCARCE]


@every_loader
def test_the_same_seed_gives_the_same_population(name, root):
    assert LOADERS[name](root, seed=3).fingerprint() == LOADERS[name](root, seed=3).fingerprint()


@every_loader
def test_another_seed_deals_roles_anew(name, root):
    first, second = (described(LOADERS[name](root, seed=seed)) for seed in (0, 1))
    common = [user for user in first.keys() & second.keys() if first[user][0] != "train"]
    assert len(common) > 4
    for user in common:
        assert first[user][0] == second[user][0]
        for role in ("support", "validation"):
            assert first[user][1][role] != second[user][1][role]


@every_loader
def test_users_of_one_seed_are_dealt_differently(name, root):
    """Two users with the same labelled things must not get the same roles: the hash knows the user."""
    population = LOADERS[name](root)
    if name == "unipen":
        return  # no two writers have an image in common
    pairs = 0
    for one in population.test:
        for other in population.test:
            shared = [set(torch.cat([getattr(u, r).inputs for r in ROLES]).tolist()) for u in (one, other)]
            both = shared[0] & shared[1]
            supports = [set(u.support.inputs.tolist()) & both for u in (one, other)]
            pairs += one is not other and supports[0] != supports[1]
    assert pairs == len(population.test) * (len(population.test) - 1)


@every_loader
def test_the_order_of_the_files_rows_counts_nothing(name, root, copy):
    rng = np.random.default_rng(5)
    folder = copy / FOLDER[name]
    for path in [*folder.glob("*.csv"), *folder.glob("*.csv.gz")]:
        edit_csv(path, lambda header, rows: rng.shuffle(rows))
    if name == "unipen":
        edit_npz(folder / "unipen_chars.npz", reorder(rng))
    first, second = LOADERS[name](root), LOADERS[name](copy)
    assert described(first) == described(second)
    assert content(first, first.fitting) == content(second, second.fitting)
    assert not torch.equal(first.users[0].support.inputs, second.users[0].support.inputs)  # they did move
    if name == "comments":
        folds = [dict(zip(p.items.texts, p.folds.tolist(), strict=True)) for p in (first, second)]
        assert folds[0] == folds[1]


def reorder(rng):
    def change(arrays):
        order = rng.permutation(len(arrays["label"]))
        for key in arrays:
            arrays[key] = arrays[key][order]

    return change


def test_writers_images_are_bytes_of_one_channel(root):
    population = unipen(root)
    image = population.items.take(population.test[0].support.inputs)
    assert (image.dtype, image.shape[1:]) == (torch.uint8, (1, 28, 28))
    assert population.class_names == miniatures.CLASSES
    assert population.items.values.max() > 100


@pytest.mark.parametrize("shots", [1, 2, 3])
def test_writers_support_has_some_of_every_class_and_the_rest_is_halved(root, shots):
    left = 20
    for user in unipen(root, shots=shots).users:
        counts = torch.stack([torch.bincount(getattr(user, role).labels, minlength=62) for role in ROLES])
        total = counts.sum(0)
        assert counts[0].tolist() == [min(shots, n - 1) if n else 0 for n in total.tolist()]
        validation, query = counts[1:].sum(1).tolist()
        assert validation + query >= left
        assert query - validation in (0, 1)
        assert user.info["classes"] == (total > 0).sum()


def test_writers_halves_are_not_divided_by_class(root):
    for user in unipen(root).test:
        assert len(set(user.validation.labels.tolist()) & set(user.query.labels.tolist())) > 2


def test_writers_who_have_too_little_beyond_the_support_are_left_out(root):
    everybody, fewer = unipen(root, shots=3), unipen(root, shots=4)  # of their 8 classes 2 or 3 images each are left
    assert len(fewer.users) < len(everybody.users)
    assert str(len(everybody.users) - len(fewer.users) + 2) == fewer.notes[0].split()[0]


def test_writers_know_where_they_wrote(root):
    header, *rows = read_csv(root / "unipen_chars" / "users.csv")
    place = {row[0]: row[header.index("collection")] for row in rows}
    for user in unipen(root).users:
        assert user.info["collection"] == place[user.user_id]


@pytest.mark.parametrize("name", ["annotators", "comments"])
def test_annotators_have_20_and_10_labels_and_are_asked_the_rest(name, root):
    population, true = LOADERS[name](root), truth(root, name)
    for user in population.users:
        assert len(user.support) == 20
        few = name == "comments" and user not in population.test  # two folds are kept for others
        assert 1 <= len(user.validation) <= 10 if few else len(user.validation) == 10
        if name == "annotators":
            assert len(user.query) == true[user.user_id].total() - 30


@pytest.mark.parametrize("fold", range(FOLDS))
def test_new_comments_are_asked_of_test_users_and_known_to_nobody(by_fold, root, fold):
    population, true = by_fold[fold], truth(root, "comments")
    new = {text for text, of in zip(population.items.texts, population.folds.tolist(), strict=True) if of == -1}
    known = [population.fitting]
    for user in population.test:
        asked = Counter({key: n for key, n in true[user.user_id].items() if key[0] in new})
        assert content(population, user.query) == asked
        known += [user.support, user.validation]
    known += [getattr(user, role) for user in (*population.train, *population.val) for role in ROLES]
    for examples in known:
        assert not {text for text, _ in content(population, examples)} & new


@pytest.mark.parametrize("fold", range(FOLDS))
def test_rewards_and_choices_are_made_on_comments_that_no_gradient_of_the_shared_start_saw(by_fold, root, fold):
    population, true = by_fold[fold], truth(root, "comments")
    following = {text for text, of in zip(population.items.texts, population.folds.tolist(), strict=True) if of == 0}
    for user in population.train:
        for role in ("support", "query"):
            assert not {text for text, _ in content(population, getattr(user, role))} & following
        assert {text for text, _ in content(population, user.validation)} <= following
    for user in population.val:
        asked = Counter({key: n for key, n in true[user.user_id].items() if key[0] in following})
        assert content(population, user.query) == asked
        for role in ("support", "validation"):
            assert not {text for text, _ in content(population, getattr(user, role))} & following


def test_every_annotator_is_a_test_user_once_and_a_val_user_once(by_fold, root):
    everybody = set(truth(root, "comments")) - DROPPED["comments"]
    for split in ("test", "val"):
        assert Counter(i for p in by_fold for i in ids(p, split)) == Counter(everybody)
    for fold, population in enumerate(by_fold):
        assert ids(population, "val") == ids(by_fold[(fold + 1) % FOLDS], "test")
        assert ids(population, "train") == everybody - ids(population, "val") - ids(population, "test")


def test_every_comment_is_new_once_and_the_parts_are_equal(by_fold):
    new = torch.stack([p.folds == -1 for p in by_fold])
    assert (new.sum(0) == 1).all()
    assert new.sum(1).tolist() == [24] * FOLDS


def test_the_parts_for_cross_fitting_are_those_that_are_new_elsewhere(by_fold):
    parts = {frozenset((p.folds == -1).nonzero()[:, 0].tolist()) for p in by_fold}
    for population in by_fold:
        assert population.folds.dtype == torch.int64
        assert set(population.folds.tolist()) == {-1, 0, 1, 2, 3}
        assert {frozenset((population.folds == k).nonzero()[:, 0].tolist()) for k in range(-1, 4)} == parts
        assert (population.folds[population.fitting.inputs] >= 0).all()


def test_the_model_for_new_comments_is_fitted_on_train_users_alone(by_fold, root):
    true, with_scarce = truth(root, "comments"), 0
    for population in by_fold:
        new = {text for text, of in zip(population.items.texts, population.folds.tolist(), strict=True) if of == -1}
        train = sum((true[user] for user in ids(population, "train")), Counter())
        scarce = true[miniatures.SCARCE]
        expected = [Counter({k: n for k, n in part.items() if k[0] not in new}) for part in (train, train + scarce)]
        fitted = content(population, population.fitting)
        assert fitted in expected
        with_scarce += fitted == expected[1]
    assert with_scarce == FOLDS - 2  # whoever is left out as a user fits as long as they are neither val nor test


def test_the_folds_do_not_depend_on_the_seed(by_fold, root):
    other = popquorn(root, seed=9, fold=1)
    assert torch.equal(other.folds, by_fold[1].folds)
    assert [ids(other, split) for split in SPLITS] == [ids(by_fold[1], split) for split in SPLITS]


@pytest.mark.parametrize("fold", [0, 3])
def test_the_authors_table_gives_the_same_population(by_fold, raw_root, fold):
    ours, theirs = by_fold[fold], popquorn(raw_root, fold=fold)
    assert described(ours) == described(theirs)
    assert content(ours, ours.fitting) == content(theirs, theirs.fitting)


def test_the_authors_table_has_every_judgement_and_splits_of_its_own(root, raw_root):
    true = truth(root, "annotators")
    population = popquorn(raw_root, protocol="new_annotators")
    assert not ids(population, "val") & ids(population, "test")
    for user in population.users:
        assert everything(population, user) == true[user.user_id]
    other = popquorn(raw_root, protocol="new_annotators", seed=4)
    assert [ids(other, split) for split in ("val", "test")] == [ids(population, split) for split in ("val", "test")]


@pytest.mark.parametrize("folder", ["popquorn_offensiveness", "offensiveness", "."])
def test_the_authors_table_is_found_in(tmp_path, folder):
    assert popquorn(miniatures.popquorn_raw(tmp_path, folder=folder)).test


def test_offensive_is_a_rating_of_two_or_more(raw_root):
    (path,) = raw_root.glob("*/raw_data.csv")
    rating = {(user, text): float(rated) for _, user, text, rated, *_ in read_csv(path)[1:]}
    population = popquorn(raw_root)
    for user in population.users:
        for (text, label), _ in everything(population, user).items():
            assert label == (rating[user.user_id, text] >= 2)


@pytest.mark.parametrize("support", [5, 20])
def test_readers_have_as_many_known_ratings_as_asked_and_the_rest_is_halved(root, support):
    for user in jester(root, support=support).users:
        assert len(user.support) == support
        assert len(user.query) - len(user.validation) in (0, 1)


def test_readers_can_be_limited_to_the_first_of_every_split(root):
    whole, part = jester(root), jester(root, max_users=3)
    for split in SPLITS:
        assert getattr(part, split) and [u.user_id for u in getattr(part, split)] == [
            u.user_id for u in getattr(whole, split)[:3]
        ]
    assert content(part, part.fitting) == content(whole, whole.fitting)


def test_drawings_come_with_their_characters(root):
    drawings = omniglot(root)
    assert (drawings.inputs.dtype, drawings.inputs.shape) == (torch.uint8, (120, 1, 28, 28))
    assert drawings.labels.dtype == torch.int64
    with np.load(root / "omniglot28" / "omniglot28.npz") as file:
        assert np.array_equal(drawings.inputs[:, 0].numpy(), file["images"])
        assert np.array_equal(drawings.labels.numpy(), file["character"])


EVERY = LOADERS | {"omniglot": omniglot}
FILES = {
    "unipen": ("unipen_chars.npz", "users.csv", "meta.json"),
    "jester": ("items.csv.gz", "labels.csv.gz", "users.csv"),
    "annotators": ("items.csv.gz", "labels.csv.gz", "users.csv"),
    "omniglot": ("omniglot28.npz",),
}
ONE_FILE = [(name, file) for name, files in FILES.items() for file in files]
TABLES = [(name, file) for name, file in ONE_FILE if "csv" in file]
ARCHIVES = [("unipen", "unipen_chars.npz"), ("omniglot", "omniglot28.npz")]


def file_of(root, name, file):
    return root / (FOLDER | {"omniglot": "omniglot28"})[name] / file


@pytest.mark.parametrize(("name", "file"), ONE_FILE)
def test_a_missing_file_is_named(name, file, copy):
    path = file_of(copy, name, file)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"missing: {re.escape(str(path))} .*--data-root"):
        EVERY[name](copy)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_with_nothing_lists_all_that_was_looked_for(name, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        EVERY[name](tmp_path)
    for file in FILES[name]:
        assert file in str(caught.value)


def test_a_folder_with_nothing_lists_the_authors_table_too(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        popquorn(tmp_path)
    for folder in ("popquorn_offensiveness", "offensiveness", "."):
        assert str(tmp_path / folder / "raw_data.csv") in str(caught.value)


@pytest.mark.parametrize("name", EVERY)
def test_without_a_data_root_the_error_says_how_to_name_one(name, monkeypatch):
    monkeypatch.delenv("DSA_DATA_ROOT", raising=False)
    with pytest.raises(ValueError, match=r"--data-root .*DSA_DATA_ROOT"):
        EVERY[name]()


@pytest.mark.parametrize("name", FILES)
def test_the_data_root_may_come_from_the_environment_or_be_the_folder_itself(name, root, monkeypatch):
    monkeypatch.setenv("DSA_DATA_ROOT", str(root))
    assert EVERY[name]() is not None
    monkeypatch.setenv("DSA_DATA_ROOT", str(root / "nowhere"))
    assert EVERY[name](file_of(root, name, "")) is not None  # what is given goes first


@pytest.mark.parametrize(("name", "file"), ARCHIVES)
@pytest.mark.parametrize("damage", ["truncated", "half of it", "empty", "overwritten", "one bit", "no archive", "one array"])
def test_a_damaged_archive_is_named(name, file, damage, copy):
    path = file_of(copy, name, file)
    whole, array = path.read_bytes(), io.BytesIO()
    np.save(array, np.arange(3))
    path.write_bytes(
        {
            "truncated": whole[:-1],
            "half of it": whole[: len(whole) // 2],
            "empty": b"",
            "overwritten": whole[:2000] + b"\xff" * 500 + whole[2500:],
            "one bit": whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
            "no archive": b"<html>404</html>" * 20,
            "one array": array.getvalue(),
        }[damage]
    )
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is damaged \(.*\); restore it\."):
        EVERY[name](copy)


def test_of_a_damaged_archive_nothing_wrong_is_read(tmp_path):
    """Wherever a byte is wrong: the arrays as they were, or one error that names the file; and the file is closed."""
    path, expected = tmp_path / "a.npz", {"images": np.arange(40), "label": np.ones(3, np.uint8)}
    np.savez_compressed(path, **expected)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            found = arrays_of(path, tuple(expected))
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert all(np.array_equal(found[name], array) for name, array in expected.items())


def test_a_pickle_is_never_read(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"a\.npz is damaged .*allow_pickle"):
        arrays_of(tmp_path / "a.npz", ("images",))


@pytest.mark.parametrize(("name", "file"), ARCHIVES)
def test_a_missing_array_is_named(name, file, copy):
    path = file_of(copy, name, file)
    edit_npz(path, lambda arrays: arrays.pop("images"))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} has no array 'images'; it has "):
        EVERY[name](copy)


@pytest.mark.parametrize(("name", "file"), [table for table in TABLES if table[1].endswith(".gz")])
def test_a_truncated_table_is_named(name, file, copy):
    path = file_of(copy, name, file)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        EVERY[name](copy)


@pytest.mark.parametrize(("name", "file"), TABLES)
def test_a_missing_column_is_named(name, file, copy):
    path = file_of(copy, name, file)
    column = {"users.csv": "split", "items.csv.gz": "text", "labels.csv.gz": "label"}[file]
    edit_csv(path, lambda header, rows: header.__setitem__(header.index(column), "other"))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} has no column '{column}'\. .*Known: .*other"):
        EVERY[name](copy)


@pytest.mark.parametrize(("name", "file"), TABLES)
def test_an_empty_table_is_named(name, file, copy):
    path = file_of(copy, name, file)
    path.write_bytes(gzip.compress(b"") if path.suffix == ".gz" else b"")
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is empty"):
        EVERY[name](copy)


@pytest.mark.parametrize(("name", "file"), TABLES)
def test_a_table_that_is_not_utf8_is_named(name, file, copy):
    path = file_of(copy, name, file)
    header, *rows = read_csv(path)
    rows[-1][-1] = "caf\xe9"
    write_csv(path, [header, *rows], encoding="latin-1")
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is not UTF-8"):
        EVERY[name](copy)


@pytest.mark.parametrize(("name", "file"), TABLES)
def test_a_row_that_is_too_short_is_named_with_its_line(name, file, copy):
    path = file_of(copy, name, file)
    edit_csv(path, lambda header, rows: rows[1].__delitem__(slice(1, None)))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line \d+: 1 fields where the header has \d; mend"):
        EVERY[name](copy)


@pytest.mark.parametrize(("name", "file"), TABLES)
def test_a_row_that_is_too_long_is_named_with_its_line(name, file, copy):
    path = file_of(copy, name, file)
    edit_csv(path, lambda header, rows: rows[0].append("more"))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line 2: \d fields where the header has \d; put texts"):
        EVERY[name](copy)


@pytest.mark.parametrize(("name", "file"), TABLES)
def test_a_quote_that_is_not_closed_is_named(name, file, copy):
    path = file_of(copy, name, file)
    data = path.read_bytes()
    zipped = path.suffix == ".gz"
    broken = (gzip.decompress(data) if zipped else data) + b'"1,2'
    path.write_bytes(gzip.compress(broken) if zipped else broken)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line \d+: .*double quote that is not closed"):
        EVERY[name](copy)


@pytest.mark.parametrize(("name", "file"), [table for table in TABLES if table[1].endswith(".gz")])
@pytest.mark.parametrize("damage", ["not zipped", "overwritten", "checksum"])
def test_a_damaged_table_is_named(name, file, damage, copy):
    path = file_of(copy, name, file)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "not zipped": gzip.decompress(whole),
            "overwritten": whole[:300] + b"\xff" * 50 + whole[350:],
            "checksum": whole[:-8] + bytes(4) + whole[-4:],
        }[damage]
    )
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is (damaged after line \d+ .*; restore it|not UTF-8)"):
        EVERY[name](copy)


@pytest.mark.parametrize("name", ["jester", "annotators"])
def test_a_byte_order_mark_in_a_zipped_table_is_no_part_of_a_column(name, root, copy):
    for file in ("items.csv.gz", "labels.csv.gz"):
        path = file_of(copy, name, file)
        path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + gzip.decompress(path.read_bytes())))
    assert LOADERS[name](copy).fingerprint() == LOADERS[name](root).fingerprint()


def test_a_byte_order_mark_is_no_part_of_a_column(raw_root, tmp_path):
    (path,) = raw_root.glob("*/raw_data.csv")
    (tmp_path / "raw_data.csv").write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert popquorn(tmp_path).fingerprint() == popquorn(raw_root).fingerprint()


@pytest.mark.parametrize("name", ["jester", "annotators", "comments"])
def test_a_judgement_of_an_unknown_text_is_named(name, copy):
    path = copy / FOLDER[name] / "labels.csv.gz"
    edit_csv(path, lambda header, rows: rows[7].__setitem__(1, "999"))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line 9: text '999' is judged, which .*items\.csv\.gz"):
        LOADERS[name](copy)


@split_by_file
def test_an_unknown_split_is_named(name, copy):
    path = copy / FOLDER[name] / "users.csv"
    edit_csv(path, lambda header, rows: rows[-5].__setitem__(-1, "holdout"))
    message = rf"{re.escape(str(path))}: user '\d+' has split 'holdout', not one of train, val, test\."
    with pytest.raises(ValueError, match=message):
        LOADERS[name](copy)


@split_by_file
def test_a_user_without_a_split_is_named(name, copy):
    path = copy / FOLDER[name] / "users.csv"
    first = min(int(user) for user in splits_of(copy, name))
    edit_csv(path, lambda header, rows: rows.__setitem__(slice(None), [row for row in rows if int(row[0]) not in (first, 77)]))
    count = 1 if name == "unipen" else 2
    message = rf"{re.escape(str(path))} gives no split for user '{first}', who has examples \({count} such users\); add a row"
    with pytest.raises(ValueError, match=message):
        LOADERS[name](copy)


@split_by_file
def test_a_user_with_two_splits_is_named(name, copy):
    path = copy / FOLDER[name] / "users.csv"
    edit_csv(path, lambda header, rows: rows.append([*rows[0][:-1], "test"]))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: user '\d+' is there twice"):
        LOADERS[name](copy)


@every_loader
def test_users_are_sorted_by_id_whatever_the_order_of_the_file(name, copy):
    for path in (copy / FOLDER[name]).glob("*s.csv*"):
        edit_csv(path, lambda header, rows: rows.reverse())
    population = LOADERS[name](copy)
    for split in SPLITS:
        order = [int(user.user_id) for user in getattr(population, split)]
        assert order == sorted(order) and len(order) > 1


def test_ids_are_sorted_as_numbers_only_where_all_are():
    assert sorted_ids(["10", "9", "1"]) == ["1", "9", "10"]
    assert sorted_ids(["10", "9", "a"]) == ["10", "9", "a"]


@pytest.mark.parametrize(
    ("name", "file", "column"),
    [("jester", "labels.csv.gz", "label"), ("annotators", "labels.csv.gz", "label"), ("unipen", "users.csv", "user_id")],
)
@pytest.mark.parametrize("wrong", ["", "nan", "good", "1.5"])
def test_what_is_no_whole_number_is_named_with_its_line(name, file, column, wrong, copy):
    path = file_of(copy, name, file)
    edit_csv(path, lambda header, rows: rows[3].__setitem__(header.index(column), wrong))
    message = rf"{re.escape(str(path))}, line 5: {column} '{wrong}' is no whole number; mend"
    with pytest.raises(ValueError, match=message):
        LOADERS[name](copy)


@pytest.mark.parametrize("wrong", ["", "nan", "inf", "very"])
def test_what_is_no_rating_is_named_with_its_line(wrong, tmp_path):
    path = miniatures.popquorn_raw(tmp_path) / "offensiveness" / "raw_data.csv"
    edit_csv(path, lambda header, rows: rows[0].__setitem__(header.index("offensiveness"), wrong))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line 2: offensiveness '{wrong}' is no number"):
        popquorn(tmp_path)


@pytest.mark.parametrize("name", ["jester", "annotators"])
def test_a_label_that_is_no_class_is_named(name, copy):
    edit_csv(copy / FOLDER[name] / "labels.csv.gz", lambda header, rows: [row.__setitem__(-1, "7") for row in rows])
    with pytest.raises(ValueError, match=r"labels outside 0\.\.1"):
        LOADERS[name](copy)


def test_classes_that_cannot_be_read_are_named(copy):
    path = copy / "unipen_chars" / "meta.json"
    broken = ["{", "[]", json.dumps({"names": []}), json.dumps({"classes": []}), json.dumps({"classes": [1, 2]})]
    for content in (*(text.encode() for text in broken), b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            unipen(copy)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("unipen", {"shots": 0}, "shots must be at least 1.*got 0"),
        ("unipen", {"fit_share": 0.0}, "fit_share between 0 and 1"),
        ("unipen", {"fit_share": 1.0}, "fit_share between 0 and 1"),
        ("comments", {"fold": 7}, "fold 0 to 4, got .* 7"),
        ("comments", {"fold": -1}, "fold 0 to 4, got .* -1"),
        ("comments", {"protocol": "new_planets"}, f"protocol must be one of new_annotators, {NEW_COMMENTS}.*'new_planets'"),
        ("comments", {"fit_share": 0.0}, "fit_share must be between 0 and 1, got 0"),
        ("annotators", {"fit_share": 1.5}, "fit_share must be between 0 and 1, got 1.5"),
        ("jester", {"support": 0}, "support must be at least 1"),
        ("jester", {"fit_share": 2.0}, "fit_share between 0 and 1"),
    ],
)
def test_impossible_arguments_are_refused_before_anything_is_read(name, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        LOADERS[name](tmp_path, **arguments)


@split_by_file
def test_a_split_without_users_is_named(name, copy):
    path = copy / FOLDER[name] / "users.csv"
    edit_csv(path, lambda header, rows: [row.__setitem__(-1, "test") for row in rows if row[-1] == "val"])
    with pytest.raises(ValueError, match="has no val users"):
        LOADERS[name](copy)


def test_images_that_a_writer_has_more_than_once_are_in_no_role(copy):
    """In the real collection one writer has one, under two labels."""

    def change(arrays):
        for writer in set(arrays["user_id"].tolist()) - {miniatures.ONCE}:
            rows = np.flatnonzero(arrays["user_id"] == writer)
            firsts = [rows[arrays["label"][rows] == label][0] for label in set(arrays["label"][rows].tolist())]
            arrays["images"][firsts[:2]] = arrays["images"][firsts[0]]

    path = copy / "unipen_chars" / "unipen_chars.npz"
    edit_npz(path, change)
    population, true = unipen(copy, shots=1), truth(copy, "unipen")
    for user in population.users:
        images = Counter(image for image, _ in true[user.user_id].elements())
        assert everything(population, user) == Counter({k: n for k, n in true[user.user_id].items() if images[k[0]] == 1})
        assert max(images.values()) == 2
    assert population.notes[-1] == f"{2 * len(population.users)} images left out (their writer has them more than once)"
    edit_npz(path, reorder(np.random.default_rng(1)))
    assert described(unipen(copy, shots=1)) == described(population)


@pytest.mark.parametrize("name", ["jester", "annotators", "comments"])
def test_a_text_that_was_judged_twice_is_named(name, copy):
    path = copy / FOLDER[name] / "labels.csv.gz"
    edit_csv(path, lambda header, rows: rows.append([*rows[4][:-1], "0"]))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line \d+: user '\d+' judges text '\d+' a second time"):
        LOADERS[name](copy)


def test_of_repetitions_in_the_authors_table_the_first_counts(raw_root, tmp_path):
    (path,) = raw_root.glob("*/raw_data.csv")
    header, *rows = read_csv(path)
    place = header.index("offensiveness")
    again = [[*row[:place], "1.0" if float(row[place]) >= 2 else "5.0", *row[place + 1 :]] for row in rows[::3]]
    write_csv(tmp_path / "raw_data.csv", [header, *rows, *again])
    ours, once = popquorn(tmp_path), popquorn(raw_root)
    assert ours.fingerprint() == once.fingerprint()
    note = f"{len(again)} judgements left out (the same annotator and comment as an earlier row of raw_data.csv)"
    assert ours.notes == (*once.notes, note)


def test_miniatures_are_the_same_for_a_seed_and_others_for_another(root, raw_root, tmp_path):
    again = write_all(tmp_path / "again")
    miniatures.popquorn_raw(again)
    for path in [*root.rglob("*"), *raw_root.rglob("*.csv")]:
        if path.is_file() and path.suffix != ".npz":
            home = root if path.is_relative_to(root) else raw_root
            assert (again / path.relative_to(home)).read_bytes() == path.read_bytes()
    for name, file in ARCHIVES:
        with np.load(file_of(root, name, file)) as first, np.load(file_of(again, name, file)) as second:
            assert all(np.array_equal(first[key], second[key]) for key in first.files)
    other = miniatures.jester(tmp_path / "other", seed=1)
    assert jester(other).fingerprint() != jester(root).fingerprint()


def test_loaders_take_a_seed_and_a_root():
    for loader in (unipen, popquorn, jester):
        assert list(inspect.signature(loader).parameters)[:2] == ["data_root", "seed"]

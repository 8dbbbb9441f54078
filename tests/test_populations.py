"""What is read of real people: who they are, what they have, and in which roles, from every kind of file."""

import inspect
from collections import Counter

import miniatures
import numpy as np
import pytest
import torch
from populations import (
    DROPPED,
    FOLDER,
    LOADERS,
    content,
    described,
    edit_csv,
    edit_npz,
    every_loader,
    everything,
    ids,
    read_csv,
    split_by_file,
    splits_of,
    truth,
)

from users.base import ROLES, SPLITS
from users.jester import jester
from users.omniglot import omniglot
from users.popquorn import popquorn
from users.roles import sorted_ids
from users.unipen import unipen


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


def test_loaders_take_a_seed_and_a_root():
    for loader in (unipen, popquorn, jester):
        assert list(inspect.signature(loader).parameters)[:2] == ["data_root", "seed"]

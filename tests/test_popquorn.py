"""Popquorn's annotators: two protocols, folds of comments that are new, and the authors' own table."""

from collections import Counter

import miniatures
import pytest
import torch
from populations import DROPPED, LOADERS, content, described, everything, ids, read_csv, truth, write_csv

from users.base import ROLES, SPLITS
from users.popquorn import FOLDS, popquorn


@pytest.fixture(scope="module")
def by_fold(root):
    """The second protocol's population of every fold."""
    return [popquorn(root, fold=fold) for fold in range(FOLDS)]


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

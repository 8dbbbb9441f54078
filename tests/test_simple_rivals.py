"""Rivals that choose no mask: a constant per user, and the items' covariance."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tastes import ITEMS, biased, dense, flat_model, one_factor, population, seen_through

from agents import simple
from agents.simple import NOISES, PENALTIES, _conditioned, _with_intercept, intercept, item_covariance, simple_rivals
from backbones.pathways import population_logits
from users.base import ROLES, SPLITS, Examples, User


def constant(rng, number, items):
    """One label for everything, half of the users each."""
    return np.full(len(items), number % 2)


def all_off(data, split="test"):
    batch = data.batch(split, "query")
    hits = population_logits(data.pathways.model, batch.frozen).argmax(-1) == batch.labels
    return (hits * batch.weights).sum(1).numpy()


def changed(population, split, role, function, only=None):
    """The population with ``function`` of some users' labels in one role."""

    def user(place, one):
        if only is not None and place not in only:
            return one
        examples = getattr(one, role)
        return replace(one, **{role: Examples(examples.inputs, function(examples.labels))})

    return replace(population, **{split: tuple(user(n, one) for n, one in enumerate(getattr(population, split)))})


def flip(labels):
    return 1 - labels


# A constant per user.


def test_a_constant_is_recovered_from_the_support():
    data = seen_through(population(constant))
    assert intercept(data).tolist() == [1.0] * 16
    assert all_off(data).mean() == 0.5


def test_a_bias_is_recovered_and_better_than_everything_off():
    data = seen_through(population(biased, users=(4, 20, 60)))
    assert intercept(data).mean() > all_off(data).mean() + 0.15
    assert intercept(data).mean() > 0.7


def test_classes_have_a_constant_each():
    data = seen_through(population(lambda rng, number, items: np.full(len(items), number % 4), classes=4))
    assert intercept(data).tolist() == [1.0] * 16


def test_the_constants_are_those_of_penalised_maximum_likelihood():
    model = flat_model(slope=4.0)
    data, penalty = seen_through(population(biased, seed=2), model), 0.7
    support, query = data.batch("test", "support"), data.batch("test", "query")
    known, asked = (population_logits(model, batch.frozen) for batch in (support, query))
    grid = torch.linspace(-6, 6, 4001)[:, None]  # by symmetry the two classes' constants are opposite
    found = _with_intercept(data, "test", penalty)
    for row in range(len(support)):
        present = support.weights[row] > 0
        sign = 2 * support.labels[row][present] - 1
        margin = (known[row, present, 1] - known[row, present, 0])[None]
        loss = torch.nn.functional.softplus(-sign * (margin + 2 * grid)).sum(1) + penalty * grid[:, 0].square()
        best = grid[loss.argmin()]
        guess = (asked[row, :, 1] - asked[row, :, 0] + 2 * best > 0).long()
        assert found[row].item() == pytest.approx((guess == query.labels[row]).float().mean().item())


def test_the_penalty_is_the_one_that_serves_val_users_best():
    data = seen_through(population(biased, seed=4), flat_model(slope=4.0))
    accuracy = [_with_intercept(data, "val", p).mean() for p in PENALTIES]
    assert len({float(a) for a in accuracy}) > 1
    assert np.array_equal(intercept(data), _with_intercept(data, "test", PENALTIES[int(np.argmax(accuracy))]).numpy())


# The items' covariance.


def item_means(population):
    """Accuracy of what most train users said of each item."""
    votes = np.zeros((ITEMS, 2))
    for user in population.train:
        for role in (user.support, user.validation, user.query):
            np.add.at(votes, (role.inputs.numpy(), role.labels.numpy()), 1)
    asked = [user.query for user in population.test]
    return np.mean([(votes.argmax(1)[e.inputs.numpy()] == e.labels.numpy()).mean() for e in asked])


def test_a_single_factor_is_found_and_better_than_the_items_means():
    people = dense()
    found = item_covariance(seen_through(people)).mean()
    assert found > 0.85
    assert found > item_means(people) + 0.2


def test_without_anything_in_common_the_items_means_are_what_is_left():
    def popular(rng, number, items):
        return (rng.random(len(items)) < np.where(items % 2, 0.9, 0.1)).astype(np.int64)

    people = dense(popular)
    assert item_covariance(seen_through(people)).mean() == pytest.approx(item_means(people), abs=0.03)


@pytest.mark.parametrize("sign", [-1, 1])
def test_what_is_known_moves_what_is_expected_of_other_items(sign):
    covariance = np.array([[0.25, sign * 0.2], [sign * 0.2, 0.25]])
    places = [torch.tensor([0]), torch.tensor([1])]
    for label in (0, 1):
        expected = torch.tensor([label if sign > 0 else 1 - label])
        user = User("u", Examples(places[0], torch.tensor([label])), *(Examples(places[1], expected) for _ in range(2)))
        for noise in NOISES:
            assert _conditioned(np.array([0.5, 0.5]), covariance, (user,), noise).tolist() == [1.0]


def test_the_noise_is_the_one_that_serves_val_users_best(monkeypatch):
    people, asked = dense(seed=5), []

    def spy(mean, covariance, users, noise):
        asked.append((users, noise))
        return np.full(len(users), noise == 0.2, dtype=float)

    monkeypatch.setattr(simple, "_conditioned", spy)
    item_covariance(seen_through(people))
    assert asked == [*((people.val, noise) for noise in NOISES), (people.test, 0.2)]


# What they look at.


RIVALS = {"intercept": intercept, "item_covariance": item_covariance}
every_rival = pytest.mark.parametrize("rival", RIVALS)


def lively(label=one_factor):
    """People, and a model that has an opinion."""
    return dense(label, seed=3), flat_model(slope=4.0)


@every_rival
def test_answers_to_be_predicted_change_no_prediction(rival):
    people, model = lively()
    before, after = (RIVALS[rival](seen_through(p, model)) for p in (people, changed(people, "test", "query", flip)))
    np.testing.assert_allclose(after, 1 - before, atol=1e-6)
    assert np.std(before) > 0.05


@every_rival
def test_validation_labels_of_val_and_test_users_count_nothing(rival):
    people, model = lively()
    other = changed(changed(people, "test", "validation", flip), "val", "validation", flip)
    assert np.array_equal(RIVALS[rival](seen_through(people, model)), RIVALS[rival](seen_through(other, model)))


@every_rival
def test_a_test_users_labels_count_for_nobody_else(rival):
    people, model = lively()
    other = changed(changed(people, "test", "support", flip, {0}), "test", "query", flip, {0})
    first, second = (RIVALS[rival](seen_through(p, model)) for p in (people, other))
    np.testing.assert_allclose(first[1:], second[1:], atol=1e-6)


@every_rival
def test_the_users_own_support_counts(rival):
    people, model = dense(biased if rival == "intercept" else one_factor), flat_model()
    other = changed(people, "test", "support", flip)
    assert RIVALS[rival](seen_through(people, model)).mean() > RIVALS[rival](seen_through(other, model)).mean() + 0.1


def test_train_users_labels_count_for_the_covariance_in_every_role():
    people, model = lively()
    before = item_covariance(seen_through(people, model))
    for role in ("support", "validation", "query"):
        noise = changed(people, "train", role, lambda labels: torch.randint(2, labels.shape))
        assert not np.array_equal(item_covariance(seen_through(noise, model)), before)


def test_they_can_be_measured_on_another_split():
    people, model = lively()
    data = seen_through(people, model)
    assert [len(found) for found, _ in simple_rivals(data, "val").values()] == [20, 20]


# Where they appear.


def test_dense_labels_of_two_classes_on_shared_items_admit_both():
    found = simple_rivals(seen_through(dense()))
    assert [*found] == ["intercept", "item_covariance"]
    sizes = seen_through(dense()).pathways.sizes
    assert found["intercept"][1] == pytest.approx(2 / float(sizes.sum()))
    assert found["item_covariance"][1] == 0
    assert all(accuracy.shape == (40,) and ((accuracy >= 0) & (accuracy <= 1)).all() for accuracy, _ in found.values())


def test_so_many_labels_per_item_are_dense(monkeypatch):
    data = seen_through(dense())
    labels = sum(len(getattr(user, role)) for user in data.population.train for role in ROLES)
    for least, admitted in ((labels / ITEMS, True), ((labels + 1) / ITEMS, False)):
        monkeypatch.setattr(simple, "DENSE", least)
        assert ("item_covariance" in simple_rivals(data)) == admitted


def test_three_classes_admit_the_constant_alone():
    three = population(lambda rng, number, items: np.full(len(items), number % 3), (200, 4, 4), 3, (8, 4, 8))
    assert [*simple_rivals(seen_through(three))] == ["intercept"]


def test_examples_that_nobody_shares_admit_the_constant_alone():
    people = dense()

    def part(examples):
        return Examples(people.items.take(examples.inputs.tolist()), examples.labels)

    def user(one):
        return User(one.user_id, part(one.support), part(one.validation), part(one.query))

    alone = replace(people, items=None, **{s: tuple(map(user, getattr(people, s))) for s in SPLITS})
    first, second = simple_rivals(seen_through(people)), simple_rivals(seen_through(alone))
    assert [*second] == ["intercept"]
    assert np.array_equal(first["intercept"][0], second["intercept"][0])

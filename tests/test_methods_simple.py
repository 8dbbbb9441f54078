"""Methods that look at features and logits alone, and the two that share adapters: what each must not get wrong."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tastes import biased, dense, flat_model, population, seen_through
from torch.nn.functional import cross_entropy, normalize

from agents.simple import constants, item_covariance
from backbones.pathways import Frozen, population_logits
from eval.group import Group
from eval.methods import feddpa, make_method
from eval.methods import joint as joint_module
from eval.methods.feddpa import Likeness
from eval.methods.head import PENALTIES, fitted_heads
from eval.methods.joint import joint_weights
from eval.methods.logistic import penalised_logistic
from eval.methods.prototypes import nearest_means
from eval.methods.readout import Scale, best_on_val
from eval.methods.unchanged import Base
from users.batch import Batch


def personalised(world, name, shown, **settings):
    method = make_method(name, **settings)
    return method.personalise(world, method.fit(world, 0.1), shown, 0.1)


def accuracy(predictor, asked):
    hits = (predictor.logits(asked).argmax(-1) == asked.batch.labels) * asked.batch.weights
    return hits.sum(1)


def batch_of(features, labels, present=None):
    present = torch.ones(labels.shape) if present is None else present
    return Batch.of(Frozen((features,)), labels, present / present.sum(1, keepdim=True))


# Logistic regressions side by side.


def objective(weights, known, features, labels, present, penalty):
    losses = cross_entropy((known + features @ weights).flatten(0, 1), labels.flatten(), reduction="none")
    return (losses.view(labels.shape) * present).sum() + penalty / 2 * weights.square().sum()


@pytest.mark.parametrize("penalty", [0.03, 3.0])
@pytest.mark.parametrize("examples", [1, 30])
def test_what_is_found_is_the_optimum(penalty, examples):
    known, features = torch.randn(3, examples, 4), 5 * torch.randn(3, examples, 6)
    labels, present = torch.randint(3, (3, examples)), torch.ones(3, examples, dtype=torch.bool)
    present[1, 1:] = False
    weights = penalised_logistic(known, features, labels, present, penalty).double().requires_grad_()
    objective(weights, known.double(), features.double(), labels, present, penalty).backward()
    assert weights.grad.abs().max() < 1e-3


def test_users_are_fitted_as_if_alone_and_padding_counts_nothing():
    known, features, labels = torch.randn(5, 20, 4), torch.randn(5, 20, 6), torch.randint(4, (5, 20))
    present = torch.arange(20) < torch.tensor([20, 1, 7, 13, 2])[:, None]
    together = penalised_logistic(known, features, labels, present, 0.1)
    for user, count in enumerate(present.sum(1).tolist()):
        few = (known, features, labels, present)
        alone = penalised_logistic(*(part[user : user + 1, :count] for part in few), 0.1)
        torch.testing.assert_close(alone[0], together[user], atol=1e-6, rtol=0)


def test_more_examples_are_held_less_by_the_penalty():
    known, features, labels = torch.zeros(1, 40, 2), torch.ones(1, 40, 1), torch.ones(1, 40, dtype=torch.long)
    few, many = (penalised_logistic(known, features, labels, (torch.arange(40) < n)[None], 1.0) for n in (2, 40))
    assert many[0, 0, 1] > 2 * few[0, 0, 1] > 0


def test_without_a_penalty_there_is_no_optimum():
    none = torch.zeros(1, 1, 2), torch.ones(1, 1, 1), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="above 0"):
        penalised_logistic(*none, 0.0)


# A constant per class.


def test_intercept_adds_the_penalised_maximum_of_likelihood(text_world):
    shown, asked = text_world.group("val", "support"), text_world.group("val", "query")
    method = make_method("intercept")
    fitted = method.fit(text_world, 0.1)
    added = method.personalise(text_world, fitted, shown, 0.1).logits(asked) - Base().personalise(
        text_world, fitted, asked, 0.1
    ).logits(asked)
    known = population_logits(text_world.model, shown.batch.frozen)
    ones = torch.ones(*shown.batch.labels.shape, 1)
    best = penalised_logistic(known, ones, shown.batch.labels, shown.batch.weights > 0, fitted.facts["penalty"])
    torch.testing.assert_close(added, best.expand_as(added), atol=2e-3, rtol=0)
    assert best.abs().max() > 0.1


def test_intercept_depends_on_nobody_else():
    world = SimpleNamespace(data=seen_through(population(biased), flat_model(slope=4.0)))
    world.model = world.data.pathways.model
    shown = Group.of(world.data, "test", "support")
    method = make_method("intercept")
    fitted = method.fit(world, 0.1)
    together = method.personalise(world, fitted, shown, 0.1).constants
    for user in (0, 7):
        assert torch.equal(method.personalise(world, fitted, shown.rows([user]), 0.1).constants[0], together[user])
        one = constants(world.model, shown.rows([user]).batch, fitted.facts["penalty"])
        assert torch.equal(one[0], together[user])


# The items' covariance.


@pytest.fixture(scope="module")
def tastes():
    data = seen_through(dense())
    return SimpleNamespace(data=data, model=data.pathways.model)


def test_item_covariance_answers_as_the_rival_of_the_same_name(tastes):
    method = make_method("item_covariance")
    assert method.refuses(tastes) is None
    predictor = method.personalise(tastes, method.fit(tastes, 0.1), Group.of(tastes.data, "test", "support"), 0.1)
    found = accuracy(predictor, Group.of(tastes.data, "test", "query"))
    assert found.mean() > 0.85
    torch.testing.assert_close(found.double().numpy(), item_covariance(tastes.data), atol=1e-6, rtol=0)


def test_item_covariance_is_as_sure_as_it_should_be(tastes):
    shown, asked = (Group.of(tastes.data, "test", role) for role in ("support", "query"))
    predictor = personalised(tastes, "item_covariance", shown)
    sure = predictor.logits(asked).softmax(-1)
    hits = (sure.argmax(-1) == asked.batch.labels).float()
    assert sure.amax(-1).mean() == pytest.approx(hits.mean().item(), abs=0.1)
    fewer = personalised(tastes, "item_covariance", shown.first(1)).logits(asked).softmax(-1)
    assert fewer.amax(-1).mean() < sure.amax(-1).mean() - 0.05


def test_item_covariance_refuses_where_it_has_no_meaning(tastes, digits_world, text_world):
    method = make_method("item_covariance")
    three = population(lambda rng, number, items: items % 3, classes=3)
    few = population(biased, users=(4, 4, 4))
    for world, why in (
        (digits_world, "share no items"),
        (SimpleNamespace(data=seen_through(three)), "3 classes"),
        (SimpleNamespace(data=seen_through(few)), "at least 50"),
        (text_world, "at least 50"),
    ):
        assert why in method.refuses(world)


def test_item_covariance_says_why_it_cannot_be_served(tastes):
    shown = Group.of(tastes.data, "test", "support")
    with pytest.raises(ValueError, match="which item"):
        personalised(tastes, "item_covariance", shown).serve(torch.zeros(len(shown), 1, 1, 4, 4))


# Linear heads.


def test_a_head_learns_swapped_labels():
    model = flat_model(3, slope=3.0)
    features = torch.randn(2, 60, model.weight.shape[1])
    said = torch.nn.functional.linear(features, model.weight).argmax(-1)
    labels = torch.stack([said[0], torch.tensor([1, 0, 2])[said[1]]])
    heads = fitted_heads(model, Scale.of(features.flatten(0, 1)), batch_of(features, labels), 0.3)
    assert ((heads.on(batch_of(features, labels)).argmax(-1) == labels).float().mean(1) > 0.9).all()
    assert heads.weight[1].norm() > 1.5 * heads.weight[0].norm()  # who agrees with the population needs little


def test_a_heads_penalty_draws_to_the_population_model(side_world):
    shown, asked = side_world.group("val", "support"), side_world.group("val", "query")
    scale = Scale.of(shown.batch.frozen.sites[-1].flatten(0, 1))
    usual = population_logits(side_world.model, asked.batch.frozen)
    apart = [
        (fitted_heads(side_world.model, scale, shown.batch, penalty).logits(asked) - usual).abs().max().item()
        for penalty in (0.1, 10.0, 1e6)
    ]
    assert apart[0] > apart[1] > 10 * apart[2] and apart[2] < 1e-3


def test_features_of_another_scale_make_no_other_head():
    model = flat_model(3)
    features, labels = torch.randn(2, 12, model.weight.shape[1]), torch.randint(3, (2, 12))
    moved = 300 * features + 50
    plain = fitted_heads(model, Scale.of(features.flatten(0, 1)), batch_of(features, labels), 0.3)
    other = fitted_heads(model, Scale.of(moved.flatten(0, 1)), batch_of(moved, labels), 0.3)
    torch.testing.assert_close(plain.change(features), other.change(moved), atol=1e-3, rtol=0)


# Class means.


@pytest.fixture
def corners():
    """A user with examples of classes 0 and 1 of three, one of them padded, on two features; a third as train users know it."""
    model = flat_model(3)
    model.weight, model.bias = torch.zeros(3, 2), torch.tensor([0.0, 0.0, 0.3])
    features = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])
    shown = batch_of(features, torch.tensor([[0, 0, 1, 0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]]))
    usual = torch.tensor([[5.0, 5.0], [5.0, 5.0], [-1.0, -1.0]])
    return SimpleNamespace(model=model, scale=Scale(torch.zeros(2), torch.ones(())), usual=usual, shown=shown)


def test_means_are_the_users_own_where_there_are_examples(corners):
    found = nearest_means(corners.model, corners.scale, corners.usual, corners.shown, 1.0, 0.0)
    assert found.means[0].tolist() == [[2.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]
    assert found.own.tolist() == [[True, True, False]]
    assert found.sizes[0].stored == 2 * 2 * 4 + 2 * 4
    drawn = nearest_means(corners.model, corners.scale, corners.usual, corners.shown, 1.0, 2.0)
    torch.testing.assert_close(drawn.means[0, 0], torch.tensor([3.5, 2.5]))  # two of the user's, two as usual


def test_logits_are_the_population_models_less_squared_distances(corners):
    asked = batch_of(torch.tensor([[[2.0, 1.0], [-1.0, 0.0]]]), torch.zeros(1, 2, dtype=torch.long))
    for strength, temperature in ((0.5, 1.0), (2.0, 4.0)):
        found = nearest_means(corners.model, corners.scale, corners.usual, corners.shown, strength, 0.0, temperature)
        distance = torch.tensor([[1.0, 4.0, 13.0], [9.0, 2.0, 1.0]])
        expected = (corners.model.bias - strength * distance) / temperature
        torch.testing.assert_close(found.on(asked)[0].log_softmax(-1), expected.log_softmax(-1))


def test_what_cross_fitting_adds_is_added_once(corners):
    asked = batch_of(torch.randn(1, 3, 2), torch.zeros(1, 3, dtype=torch.long))
    offset = torch.randn(1, 3, 3)
    with_offset = replace(asked, table=replace(asked.table, offset=offset[0]))
    for temperature in (1.0, 8.0):
        found = nearest_means(corners.model, corners.scale, corners.usual, corners.shown, 1.0, 0.0, temperature)
        torch.testing.assert_close(found.on(with_offset) - found.on(asked), offset)


def test_prototypes_help_users_whose_classes_look_different(side_world):
    shown, asked = side_world.group("val", "support"), side_world.group("val", "query")
    found = accuracy(personalised(side_world, "prototypes", shown), asked).mean()
    assert found > accuracy(Base().personalise(side_world, None, shown, 0.1), asked).mean() + 0.05


# Choices on val users.


def test_the_option_is_the_one_that_serves_val_users_query_best(side_world):
    scale, scores = Scale.of(side_world.group("train", "support").batch.frozen.sites[-1].flatten(0, 1)), {}
    shown, asked = side_world.group("val", "support"), side_world.group("val", "query")

    def predict(penalty, support):
        return fitted_heads(side_world.model, scale, support, penalty)

    for penalty in PENALTIES:
        scores[penalty] = accuracy(predict(penalty, shown.batch), asked).mean().item()
    assert len(set(scores.values())) > 1
    best = best_on_val(side_world, PENALTIES, predict, "penalty")
    assert scores[best] == pytest.approx(max(scores.values()))


# Shared adapters.


def test_users_without_examples_are_not_personalised_among_others(side_world):
    head = make_method("head")
    fitted, shown = head.fit(side_world, 0.1), side_world.group("val", "support", torch.tensor([0, 1]))
    mixed = shown.pick([torch.arange(3), torch.arange(0)])
    with pytest.raises(ValueError, match=r"show no example, and others do: personalise those in a group of their own"):
        head.personalise(side_world, fitted, mixed, 0.1)
    none = mixed.rows([1])
    asked = side_world.group("val", "query", torch.tensor([1]))
    base = make_method("base")
    bare = base.personalise(side_world, base.fit(side_world, 0.1), none, 0.1).logits(asked)
    assert torch.equal(head.personalise(side_world, fitted, none, 0.1).logits(asked), bare)


def test_joint_gives_everybody_the_same_and_learns_something(side_world):
    shown, asked = side_world.group("val", "support"), side_world.group("val", "query")
    method = make_method("joint", steps=150, rate=1e-2)
    fitted = method.fit(side_world, 0.1)
    predictor = method.personalise(side_world, fitted, shown, 0.1)
    assert torch.equal(predictor.logits(asked), method.personalise(side_world, fitted, shown.first(0), 0.1).logits(asked))
    assert predictor.sizes[0].stored == predictor.sizes[0].trainable == 0
    base = Base().personalise(side_world, fitted, shown, 0.1)
    assert accuracy(predictor, asked).mean() > accuracy(base, asked).mean() + 0.03
    assert 0 < fitted.facts["steps"] <= 150


def test_joint_stops_where_val_users_do_best(side_world, monkeypatch):
    """Every look goes down but one: the weights of that one are kept, and patience ends training."""
    scores, seen = iter([0.5, 0.4, 0.6, *[0.1] * 30]), []

    def score(world, weights):
        seen.append({key: weight.detach().clone() for key, weight in weights.items()})
        return next(scores), 0.0

    monkeypatch.setattr(joint_module, "_score", score)
    weights, facts = joint_module._train(side_world, 40, 1e-2)
    assert facts["steps"] == 2 * (40 // joint_module.LOOKS)
    assert len(seen) == 3 + joint_module.PATIENCE
    for key, weight in weights.items():
        assert torch.equal(weight, seen[2][key])
    assert any(not torch.equal(weights[key], seen[-1][key]) for key in weights)


def test_joint_that_only_harms_is_left_out(side_world):
    shown, asked = side_world.group("val", "support"), side_world.group("val", "query")
    base = accuracy(Base().personalise(side_world, None, shown, 0.1), asked).mean()
    assert accuracy(personalised(side_world, "joint", shown, steps=5, rate=30.0), asked).mean() >= base - 0.01


def test_joint_pools_examples_not_users():
    features, present = torch.arange(8.0).view(2, 4, 1), torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0]])
    pooled = joint_module._pooled(batch_of(features, torch.zeros(2, 4, dtype=torch.long), present), torch.Generator())
    assert sorted(pooled.frozen.sites[0].flatten().tolist()) == [0, 1, 2, 3, 4]
    torch.testing.assert_close(pooled.weights, torch.full((1, 5), 0.2))


def test_joint_is_trained_once(side_world, monkeypatch):
    first, _ = joint_weights(side_world, 3, 1e-3)
    monkeypatch.setattr(joint_module, "_train", lambda *arguments: pytest.fail("it is trained again"))
    again, _ = joint_weights(side_world, 3, 1e-3)
    assert all(torch.equal(first[key], again[key]) for key in first)


# A joint and a personal adapter.


def test_likeness_raises_the_personal_weight():
    """The sign that the released code has wrong."""
    centre = torch.tensor([5.0, 5.0])
    own = centre + torch.tensor([[[2.0, 0.1], [4.0, -0.2], [77.0, -300.0]]])
    support = batch_of(own, torch.zeros(1, 3, dtype=torch.long), torch.tensor([[1.0, 1.0, 0.0]]))
    angles = torch.tensor([0.0, 30.0, 60.0, 85.0, 120.0, 180.0]).deg2rad()
    asked = centre + 4 * torch.stack([angles.cos(), angles.sin()], -1)[None]
    found = Likeness.of(support, centre).weights_of(asked, 0.5)[0]
    torch.testing.assert_close(found, 0.5 * angles.cos().clamp(0), atol=2e-3, rtol=0)
    assert (found[:-3].diff() < -0.01).all() and found[-2:].tolist() == [0.0, 0.0]


def test_likeness_is_the_mean_cosine_in_a_unit():
    own, asked, centre = torch.randn(2, 5, 7), torch.randn(2, 3, 7), torch.randn(7)
    batch = batch_of(own, torch.zeros(2, 5, dtype=torch.long))
    mine, theirs = (normalize(features - centre, dim=-1) for features in (own, asked))
    expected = ((theirs @ mine.transpose(1, 2)).mean(2) / 0.3).clamp(0, 1)
    torch.testing.assert_close(Likeness.of(batch, centre, 0.3).weights_of(asked, 1.0), expected)


@pytest.mark.parametrize("centred", [True, False])
def test_new_examples_of_a_users_own_kind_are_as_like_as_the_unit_says(side_world, centred):
    """However few examples the support has, each of which is like itself."""
    shown, asked = side_world.group("train", "support"), side_world.group("train", "query")
    method = make_method("feddpa", joint_steps=1, centred=centred)
    fitted = method.fit(side_world, 0.1)
    likeness = method.personalise(side_world, fitted, shown, 0.1).likeness
    found = (likeness.to(asked.batch.frozen.sites[-1]) * asked.batch.weights).sum(1).mean()
    assert found.item() == pytest.approx(1, abs=1e-4)


def test_the_joint_half_is_trained_as_joint_was_tuned(side_world, monkeypatch):
    monkeypatch.setattr(
        feddpa, "settings_for", lambda env, kwargs, method: {"steps": 3, "rate": 0.01} if method == "joint" else {}
    )
    weights, _ = joint_weights(side_world, 3, 0.01)
    found = make_method("feddpa").fit(side_world, 0.1).tensors
    assert all(torch.equal(found[key], weight) for key, weight in weights.items())


def seen_as(group, features):
    """The group, had its examples other readout features: all that the weight looks at beside the adapters' reading."""
    frozen = group.batch.frozen
    sites = (*(frozen.sites[p] for p in range(len(frozen.sites) - 1)), features)
    batch = Batch.of(replace(frozen, sites=sites), group.batch.labels, group.batch.weights)
    return replace(group, batch=batch)


@pytest.mark.parametrize("settings", [{}, {"centred": False}])
def test_what_is_unlike_the_users_own_is_left_to_the_joint_adapter(side_world, settings):
    shown, asked = side_world.group("val", "support"), side_world.group("val", "query")
    method = make_method("feddpa", joint_steps=5, largest=1.0, rate=1e-2, **settings)
    fitted = method.fit(side_world, 0.1)
    predictor = method.personalise(side_world, fitted, shown, 0.1)
    own = predictor.likeness.own[:, None].expand(*asked.batch.labels.shape, -1)
    like, unlike = (seen_as(asked, fitted.tensors["centre"] + sign * own) for sign in (1, -1))
    assert (predictor.weights_of(unlike) == 0).all() and (predictor.weights_of(like) > 0.99).all()
    joint, personal = (part.logits(unlike) for part in (predictor.joint, predictor.personal))
    assert (joint - personal).abs().max() > 0.1
    assert torch.equal(predictor.logits(unlike), joint)
    torch.testing.assert_close(predictor.logits(like), predictor.personal.logits(like))
    weight = predictor.weights_of(asked)[..., None]
    assert 0 < weight.mean() < 1
    mixed = (1 - weight) * predictor.joint.logits(asked) + weight * predictor.personal.logits(asked)
    torch.testing.assert_close(predictor.logits(asked), mixed)


def test_the_personal_adapter_starts_from_the_joint_one_and_fits_the_support(side_world):
    shown = side_world.group("val", "support")
    joint = personalised(side_world, "feddpa", shown, joint_steps=5, joint_rate=1e-3, rate=1e-9).personal.weights
    weights, _ = joint_weights(side_world, 5, 1e-3)
    for key, weight in weights.items():
        torch.testing.assert_close(joint[key], weight.expand_as(joint[key]), atol=1e-6, rtol=0)
    tuned = personalised(side_world, "feddpa", shown, joint_steps=5, rate=1e-2, steps=40)
    assert accuracy(tuned.personal, shown).mean() > accuracy(tuned.joint, shown).mean() + 0.3
    size = int(side_world.pathways.sizes.sum())
    assert tuned.sizes[0].trainable == size and tuned.sizes[0].stored == 4 * (size + tuned.likeness.own.shape[1])


def test_inline_a_users_personal_adapter_is_the_same_to_the_bit_in_any_company(digits_world):
    shown = digits_world.group("val", "support")
    ragged = shown.pick([torch.arange(1 + 4 * user) for user in range(len(shown))])
    method = make_method("feddpa", joint_steps=1)
    fitted = method.fit(digits_world, 0.1)
    together = method.personalise(digits_world, fitted, ragged, 0.1).personal.weights
    alone = method.personalise(digits_world, fitted, ragged.rows([1]), 0.1).personal.weights
    assert all(torch.equal(alone[key][0], together[key][1]) for key in together)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("intercept", {}), ("head", {}), ("prototypes", {}), ("joint", {"steps": 5}), ("feddpa", {"joint_steps": 5})],
)
def test_serving_gives_the_logits_less_what_cross_fitting_adds(text_world, name, settings):
    shown, asked = text_world.group("val", "support"), text_world.group("val", "query").first(4)
    method = make_method(name, **settings)
    fitted = method.fit(text_world, 0.1)
    for user in (0, 1):
        predictor = method.personalise(text_world, fitted, shown.rows([user]), 0.1)
        offset = asked.offset(user)
        assert offset.abs().max() > 1e-3
        looked_up = predictor.logits(asked.rows([user]))[0] - offset
        torch.testing.assert_close(predictor.serve(asked.inputs(user)[None])[0], looked_up, atol=1e-4, rtol=0)

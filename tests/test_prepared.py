"""Prepared populations: every item through the model once, features on disk, and classifiers that are cross-fitted."""

from dataclasses import replace

import miniatures
import pytest
import torch
from toys import COUNT, of_one, some_masks, strong_weights, toy

from backbones.base import PopulationModel
from backbones.hub import hf_encoder
from backbones.pathways import make_pathways, population_logits
from meta.inner import MetaInit, adapt, measure
from users.base import ROLES, SPLITS, Examples, User
from users.batch import Prepared, run_frozen, side_by_side, stack
from users.items import TensorItems, TextItems

PLACEMENTS = ("inline", "lora", "side")


@pytest.fixture(params=PLACEMENTS)
def either(request, model):
    """Pathways of each placement along the small ResNet."""
    return make_pathways(request.param, model, rank=4)


def written_out(population):
    """The same users with the items themselves as inputs."""

    def user(one):
        roles = [Examples(population.items.take(getattr(one, r).inputs), getattr(one, r).labels) for r in ROLES]
        return User(one.user_id, *roles)

    return replace(population, items=None, **{s: tuple(map(user, getattr(population, s))) for s in SPLITS})


@pytest.fixture
def calls(side, monkeypatch):
    """How many examples went through ``side.frozen``, call by call."""
    seen, original = [], side.frozen

    def counted(inputs):
        seen.append(len(inputs))
        return original(inputs)

    monkeypatch.setattr(side, "frozen", counted)
    return seen


def off_logits(pathways, batch):
    off = torch.zeros(len(batch), pathways.num_pathways, dtype=torch.bool)
    return pathways.logits(batch.frozen, strong_weights(pathways, len(batch)), off)


def test_users_of_different_sizes_are_padded_with_weight_zero(either):
    population = toy()
    prepared = Prepared(either, population)
    for split in SPLITS:
        for role in ROLES:
            batch, users = prepared.batch(split, role), getattr(population, split)
            sizes = [len(getattr(user, role)) for user in users]
            assert batch.labels.shape == (len(users), max(sizes))
            for row, (user, size) in enumerate(zip(users, sizes, strict=True)):
                mine = getattr(user, role)
                assert torch.equal(batch.labels[row, :size], mine.labels)
                assert torch.equal(batch.index[row, :size], mine.inputs)
                torch.testing.assert_close(batch.weights[row, :size], torch.full((size,), 1 / size))
                assert not batch.weights[row, size:].any()


def test_what_is_padded_counts_nothing_in_a_measurement(either):
    population = toy()
    batch = Prepared(either, population).batch("train", "query")
    weights, gates = strong_weights(either, 3), some_masks(either, 3)
    accuracy, loss = measure(either, weights, gates, batch)
    for row, user in enumerate(population.train):
        alone = side_by_side(batch.table, [user.query], user.query.inputs)
        one = slice(row, row + 1)
        expected = measure(either, of_one(weights, row), gates[one], alone)
        torch.testing.assert_close(torch.cat([accuracy[one], loss[one]]), torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_items_and_inputs_written_out_give_the_same_logits(either):
    population = toy()
    shared, own = Prepared(either, population), Prepared(either, written_out(population))
    for split in SPLITS:
        for role in ROLES:
            batches = [each.batch(split, role) for each in (shared, own)]
            weights, gates = strong_weights(either, len(batches[0])), some_masks(either, 6)[-len(batches[0]) :]
            first, second = (either.logits(batch.frozen, weights, gates)[batch.weights > 0] for batch in batches)
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_stacked_users_are_those_of_a_prepared_population(either):
    population = written_out(toy())
    first, second = stack(either, population.train, "query", chunk=3), Prepared(either, population).batch("train", "query")
    assert torch.equal(first.labels, second.labels)
    for p in range(either.num_pathways):
        torch.testing.assert_close(first.frozen.sites[p], second.frozen.sites[p], rtol=1e-5, atol=1e-5)


def test_every_item_goes_through_the_model_once_however_many_users_share_it(side, calls):
    prepared = Prepared(side, toy())
    for split in SPLITS:
        for role in ROLES:
            assert prepared.batch(split, role) is prepared.batch(split, role)
    assert sum(calls) == COUNT


def test_features_on_disk_are_used_again(side, calls, tmp_path):
    first = Prepared(side, toy(), tmp_path).batch("train", "query")
    assert sum(calls) == COUNT
    calls.clear()
    second = Prepared(side, toy(), tmp_path).batch("train", "query")
    assert not calls
    for p in range(side.num_pathways):
        assert torch.equal(first.frozen.sites[p], second.frozen.sites[p])


def test_features_of_inputs_written_out_are_kept_per_role(side, calls, tmp_path):
    population = written_out(toy())
    for _ in range(2):
        prepared = Prepared(side, population, tmp_path)
        batches = [prepared.batch("train", role) for role in ROLES]
    assert calls == [sum(len(getattr(user, role)) for user in population.train) for role in ROLES]
    assert len(list(tmp_path.glob("*.json"))) == 3
    assert torch.equal(batches[0].frozen.sites[0], stack(side, population.train, "support").frozen.sites[0])


def test_other_items_are_other_features(side, calls, tmp_path):
    Prepared(side, toy(), tmp_path).batch("train", "query")
    values = toy().items.values.clone()
    values[-1, 0, 0, 0] ^= 1
    Prepared(side, toy(TensorItems(values)), tmp_path).batch("train", "query")
    assert sum(calls) == 2 * COUNT


@pytest.mark.parametrize("changed", ["classifier", "backbone"])
def test_features_depend_on_the_backbone_and_not_on_the_classifier(side, model, changed, tmp_path, trained_network):
    from backbones.resnet import small_resnet

    Prepared(side, toy(), tmp_path).batch("train", "query")
    other = small_resnet(10, trained_network.state_dict(), widths=(8, 16), depth=2)
    (other.weight if changed == "classifier" else other.backbone.blocks[0].conv1.weight).data.mul_(1.5)
    batch = Prepared(make_pathways("side", other, rank=4), toy(), tmp_path).batch("train", "query")
    assert len(list(tmp_path.glob("*.json"))) == (1 if changed == "classifier" else 2)
    images = toy().items.take(toy().train[0].query.inputs).float() / 255
    torch.testing.assert_close(off_logits(make_pathways("side", other, 4), batch)[0, :7], other(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("file", ["*.json", "*.safetensors"])
@pytest.mark.parametrize("damage", ["altered", "truncated"])
def test_a_damaged_file_of_features_is_named_and_made_again(side, calls, tmp_path, caplog, file, damage):
    first = Prepared(side, toy(), tmp_path).batch("train", "query")
    (path,) = tmp_path.glob(file)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data) if damage == "altered" else bytes(data[: len(data) // 2]))
    calls.clear()
    caplog.clear()
    again = Prepared(side, toy(), tmp_path).batch("train", "query")
    assert sum(calls) == COUNT
    said = caplog.text
    assert str(path) in said and "made again" in said
    assert all(torch.equal(a, b) for a, b in zip(first.frozen.sites, again.frozen.sites, strict=True))
    calls.clear()
    caplog.clear()
    Prepared(side, toy(), tmp_path).batch("train", "query")
    assert not calls and not caplog.text  # mended


def test_hidden_states_that_are_not_pooled_are_not_kept_on_disk(pathways, tmp_path):
    assert not pathways.pooled
    Prepared(pathways, toy(), tmp_path).batch("train", "query")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("chunk", [3, 256])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_texts_get_the_logits_that_each_gets_alone(tmp_path_factory, placement, chunk):
    folder = miniatures.text_encoder(tmp_path_factory.mktemp("encoder"))
    torch.manual_seed(3)
    backbone = hf_encoder(folder)
    pathways = make_pathways(placement, PopulationModel(backbone, torch.randn(10, 32), torch.randn(10)), rank=4)
    words = [word for word in miniatures.WORDS if word.isalpha()]
    texts = tuple(" ".join(words[(7 * n + i) % len(words)] for i in range(1 + 5 * n % 13)) for n in range(COUNT))
    population = toy(TextItems(texts))
    table = run_frozen(pathways, population.items, chunk)
    users = population.train
    batch = side_by_side(table, [u.query for u in users], torch.cat([u.query.inputs for u in users]))
    weights, gates = strong_weights(pathways, 3), some_masks(pathways, 3)
    logits = pathways.logits(batch.frozen, weights, gates)
    with torch.no_grad():
        for row, user in enumerate(users):
            for column, place in enumerate(user.query.inputs.tolist()):
                alone = pathways.frozen(backbone.prepare([texts[place]])).map(lambda t: t[None])
                expected = pathways.logits(alone, of_one(weights, row), gates[row : row + 1])[0, 0]
                torch.testing.assert_close(logits[row, column], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shown", [True, False])
def test_adapting_lowers_the_support_loss_of_those_with_something_on(either, shown):
    population = toy() if shown else written_out(toy())
    support = Prepared(either, population).batch("train", "support")
    count = either.num_pathways
    gates = torch.zeros(3, count, dtype=torch.bool)
    gates[1], gates[2, [0, 2]] = True, True
    init = MetaInit(either.start(0), torch.full((8, count), 0.05 * either.rate_scale), torch.ones(count, dtype=torch.bool))
    start = {key: weight.expand(3, *weight.shape) for key, weight in init.weights.items()}
    weights = adapt(either, init, support, gates)
    before, after = (measure(either, each, gates, support)[1] for each in (start, weights))
    assert after[0] == before[0]
    assert (after[1:] < before[1:]).all()
    for p, keys in either.keys.items():
        moved = [any(not torch.equal(weights[key][user], start[key][user]) for key in keys) for user in range(3)]
        assert moved == gates[:, p].tolist()


def test_changes_are_filled_where_a_pathway_is_on_and_nowhere_else(either):
    batch = Prepared(either, toy()).batch("train", "support")
    gates = some_masks(either, 3)
    changes = torch.full((3, batch.labels.shape[1], either.num_pathways), torch.nan)
    either.logits(batch.frozen, strong_weights(either, 3), gates, changes)
    assert torch.equal(changes.isfinite(), gates[:, None].expand_as(changes))
    assert (changes[gates[:, None].expand_as(changes)] > 0).all()
    assert not changes.requires_grad


# Cross-fitting


@pytest.fixture
def crossed(model):
    """A model with three fold classifiers, and the population that they are for."""
    torch.manual_seed(4)
    fold_weight, fold_bias = torch.randn(3, 10, 16), torch.randn(3, 10)
    folded = PopulationModel(model.backbone, model.weight, model.bias, fold_weight, fold_bias)
    return folded, toy(folds=torch.arange(COUNT) % 4 - 1)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_with_everything_off_an_item_gets_the_classifier_that_has_not_seen_it(crossed, placement):
    model, population = crossed
    pathways = make_pathways(placement, model, rank=4)
    prepared, met = Prepared(pathways, population), set()
    for split in SPLITS:
        batch = prepared.batch(split, "query")
        logits = off_logits(pathways, batch)
        for row, user in enumerate(getattr(population, split)):
            for column, place in enumerate(user.query.inputs.tolist()):
                fold = int(population.folds[place])
                met.add(fold)
                features = model.backbone(population.items.values[place : place + 1].float() / 255)[0]
                usual = fold == -1
                weight, bias = (model.weight, model.bias) if usual else (model.fold_weight[fold], model.fold_bias[fold])
                torch.testing.assert_close(logits[row, column], weight @ features + bias, rtol=1e-4, atol=1e-4)
    assert met == {-1, 0, 1, 2}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_pathways_add_to_the_cross_fitted_logits_what_they_add_to_the_others(crossed, placement):
    model, population = crossed
    pathways = make_pathways(placement, model, rank=4)
    weights, gates = strong_weights(pathways, 3), some_masks(pathways, 3)
    added = []
    for one in (population, replace(population, folds=None)):
        batch = Prepared(pathways, one).batch("train", "support")
        added.append(pathways.logits(batch.frozen, weights, gates) - off_logits(pathways, batch))
    torch.testing.assert_close(*added, rtol=1e-4, atol=1e-3)
    assert added[0].abs().max() > 0.1


def test_cross_fitted_features_on_disk_are_those_without(crossed, tmp_path):
    model, population = crossed
    pathways = make_pathways("side", model, rank=4)
    first = Prepared(pathways, population, tmp_path).batch("train", "query")
    plain = Prepared(pathways, replace(population, folds=None), tmp_path).batch("train", "query")
    again = Prepared(pathways, population, tmp_path).batch("train", "query")
    assert len(list(tmp_path.glob("*.json"))) == 1
    assert plain.frozen.offset is None
    assert torch.equal(first.frozen.offset, again.frozen.offset)


def test_a_cross_fitted_population_needs_classifiers_per_fold(either):
    with pytest.raises(ValueError, match="population 'toy' is cross-fitted, but the model has no classifiers per fold"):
        Prepared(either, toy(folds=torch.zeros(COUNT, dtype=torch.int64))).batch("train", "query")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_heads_change_is_relative_to_the_cross_fitted_logits(crossed, placement):
    model, population = crossed
    pathways = make_pathways(placement, model, rank=4)
    batch = Prepared(pathways, population).batch("train", "support")
    weights, gates = strong_weights(pathways, 3), torch.zeros(3, pathways.num_pathways, dtype=torch.bool)
    gates[1:, -1] = True
    changes = torch.full((*batch.labels.shape, pathways.num_pathways), torch.nan)
    logits = pathways.logits(batch.frozen, weights, gates, changes)
    base = population_logits(model, batch.frozen)
    assert batch.frozen.offset.abs().max() > 0.1
    expected = (logits - base).norm(dim=2) / base.norm(dim=2)
    torch.testing.assert_close(changes[1:, :, -1], expected[1:], rtol=1e-4, atol=1e-4)
    assert torch.equal(logits[0], base[0])

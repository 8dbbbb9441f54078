import os
import re
from dataclasses import replace

import miniatures
import numpy as np
import pytest
import torch
from PIL import Image

from backbones.base import PopulationModel
from backbones.hub import hf_encoder
from backbones.images import as_images
from backbones.pathways import Frozen, make_pathways, population_logits
from meta.inner import MetaInit, adapt, measure
from users.base import ROLES, SPLITS, Examples, Population, User
from users.batch import Batch, Prepared, run_frozen, side_by_side, stack
from users.items import ImageFiles, TensorItems, TextItems

PLACEMENTS = ("inline", "lora", "side")
COUNT = 40
"""Items of the toy populations."""


@pytest.fixture(params=PLACEMENTS)
def either(request, model):
    """Pathways of each placement along the small ResNet."""
    return make_pathways(request.param, model, rank=4)


@pytest.fixture
def side(model):
    return make_pathways("side", model, rank=4)


def strong_weights(pathways, users):
    return {k: torch.randn(users, *w.shape) * 0.3 for k, w in pathways.start(0).items()}


def of_one(weights, user):
    return {k: w[user : user + 1] for k, w in weights.items()}


def some_masks(pathways, users):
    """Different masks; user 0 has everything off, user 1 everything on."""
    gates = torch.rand(users, pathways.num_pathways) < 0.5
    gates[0], gates[1] = False, True
    return gates


def side_frozen(pathways, users, examples):
    """The frozen part of random images, ``[U, N, ...]``, and the images."""
    images = torch.rand(users, examples, 1, 8, 8)
    return pathways.frozen(images.flatten(0, 1)).map(lambda t: t.unflatten(0, (users, examples))), images


def toy(items=None, folds=None):
    """Six users who share items, of different sizes; a fourth of the items is nobody's."""
    draw = torch.Generator().manual_seed(1)

    def examples(count):
        return Examples(torch.randperm(30, generator=draw)[:count], torch.randint(10, (count,), generator=draw))

    users = [User(f"u{n}", examples(4 + n), examples(2 + n % 3), examples(7 - n)) for n in range(6)]
    if items is None:
        images = torch.randint(256, (COUNT, 1, 8, 8), dtype=torch.uint8, generator=draw)
        items = TensorItems(images)
    return Population("toy", 10, tuple(users[:3]), tuple(users[3:4]), tuple(users[4:]), items=items, folds=folds)


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


# Items


def test_texts_are_taken_in_the_order_asked_and_kept_shortest_first():
    items = TextItems(("three words here", "one", "two words", "", "uno"))
    assert len(items) == 5
    assert items.take([2, 0, 2]) == ["two words", "three words here", "two words"]
    assert items.order() == [3, 1, 4, 2, 0]


def test_tensors_are_taken_in_the_order_asked_and_stay_bytes():
    values = torch.arange(12, dtype=torch.uint8).view(4, 1, 3)
    items = TensorItems(values)
    assert items.order() == [0, 1, 2, 3]
    for positions in ([3, 0, 3], torch.tensor([3, 0, 3])):
        taken = items.take(positions)
        assert taken.dtype == torch.uint8
        assert torch.equal(taken, values[[3, 0, 3]])


def test_fingerprints_of_texts_know_content_order_and_borders():
    texts = [("ab", "c"), ("a", "bc"), ("c", "ab"), ("ab", "C"), ("ab", "c", ""), ("abc",)]
    assert len({TextItems(each).fingerprint() for each in texts}) == len(texts)
    assert TextItems(("ab", "c")).fingerprint() == TextItems(("ab", "c")).fingerprint()


def test_fingerprints_of_tensors_know_values_shape_and_type():
    values = torch.zeros(2, 6, dtype=torch.uint8)
    other = values.clone()
    other[1, 5] = 1
    kinds = [values, other, values.view(2, 2, 3), values.bool()]
    assert len({TensorItems(each).fingerprint() for each in kinds}) == len(kinds)
    assert TensorItems(values.clone()).fingerprint() == TensorItems(values).fingerprint()


@pytest.fixture
def pictures(tmp_path):
    paths = tuple(tmp_path / f"{name}.png" for name in "abc")
    for number, path in enumerate(paths):
        Image.new("L", (4 + number, 3), 50 * number).save(path)
    return ImageFiles(paths)


def test_image_files_are_opened_when_they_are_taken(pictures):
    taken = pictures.take([2, 0])
    assert [image.size for image in taken] == [(6, 3), (4, 3)]
    assert [image.getpixel((0, 0)) for image in taken] == [100, 0]
    assert (len(pictures), pictures.order()) == (3, [0, 1, 2])


def test_fingerprints_of_image_files_know_order_and_every_change_of_content(pictures):
    first = pictures.fingerprint()
    assert ImageFiles(pictures.paths).fingerprint() == first
    assert ImageFiles(pictures.paths[::-1]).fingerprint() != first
    before = pictures.paths[1].stat()
    Image.new("L", (40, 30), 7).save(pictures.paths[1])
    os.utime(pictures.paths[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert pictures.fingerprint() != first


def test_fingerprints_of_image_files_stay_when_their_folder_moves(tmp_path):
    home = tmp_path / "first"
    home.mkdir()
    Image.new("L", (4, 3)).save(home / "1.png")
    first = ImageFiles((home / "1.png",)).fingerprint()
    moved = home.rename(tmp_path / "second")
    assert ImageFiles((moved / "1.png",)).fingerprint() == first
    assert ImageFiles(()).fingerprint() == ImageFiles(()).fingerprint() != first


@pytest.mark.parametrize("damage", ["text", "truncated", "missing"])
def test_an_image_that_cannot_be_read_is_named_with_a_cure(pictures, damage):
    path = pictures.paths[1]
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"no image" if damage == "text" else path.read_bytes()[:50])
    pictures.take([0, 2])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} cannot be read .*mend the file or take its row out"):
        pictures.take([0, 1])


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_sixteen_bits_look_as_those_of_eight_do(tmp_path, channels):
    shades = np.arange(0, 256, 17, dtype=np.uint16).reshape(4, 4)
    Image.fromarray((shades * 257).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(shades.astype(np.uint8)).save(tmp_path / "usual.png")
    pictures = ImageFiles((tmp_path / "deep.png", tmp_path / "usual.png")).take([0, 1])
    assert pictures[0].mode.startswith("I")
    for size in ((4, 4), (6, 8)):
        deep, usual = as_images(pictures, channels, size)
        assert deep.shape == (channels, *size)
        torch.testing.assert_close(deep, usual, atol=1 / 255, rtol=0)


@pytest.mark.parametrize(("mode", "kind"), [("F", np.float32), ("I", np.int32)])
def test_images_whose_white_is_unknown_are_named_with_a_cure(tmp_path, mode, kind):
    Image.fromarray(np.full((4, 4), 0.5 if mode == "F" else 70_000, dtype=kind)).save(tmp_path / "vague.tiff")
    with pytest.raises(ValueError, match=rf"vague\.tiff holds numbers of 32 bits .*mode {mode}.*8 or 16 bits per channel"):
        as_images(ImageFiles((tmp_path / "vague.tiff",)).take([0]), 3, (4, 4))


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        ([0, 3], [0, 10], r"population 'toy' has fitting labels outside 0\.\.9; map labels"),
        ([0, 3], [-1, 0], r"population 'toy' has fitting labels outside 0\.\.9; map labels"),
        ([0, COUNT], [0, 1], r"population 'toy' has fitting inputs outside 0\.\.39, the items"),
        ([-1, 3], [0, 1], r"population 'toy' has fitting inputs outside 0\.\.39, the items"),
    ],
)
def test_fitting_examples_outside_classes_or_items_are_refused(inputs, labels, message):
    with pytest.raises(ValueError, match=message):
        replace(toy(), fitting=Examples(torch.tensor(inputs), torch.tensor(labels)))


def test_fitting_examples_within_classes_and_items_or_none_are_fine():
    for inputs, labels in (([0, COUNT - 1], [0, 9]), ([], [])):
        replace(toy(), fitting=Examples(torch.tensor(inputs, dtype=torch.long), torch.tensor(labels, dtype=torch.long)))


# Batches


class Spied(tuple):
    """Sites that remember which were asked for."""

    def __new__(cls, *args):
        made = super().__new__(cls, *args)
        made.asked = []
        return made

    def __getitem__(self, p):
        self.asked.append(p)
        return super().__getitem__(p)


def small_batch(sites=3, examples=9, offset=True, users=2, columns=4, table=None):
    """Random places in a table whose tensors all differ."""
    if table is None:
        tensors = tuple(torch.randn(examples, 2, 3) for _ in range(sites))
        table = Frozen(tensors, {"mask": torch.rand(examples, 2) < 0.5}, torch.randn(examples, 5) if offset else None)
    index = torch.randint(len(table.sites[0]), (users, columns))
    present = torch.rand(users, columns) < 0.7
    present[:, 0] = True
    return Batch(table, index, torch.randint(5, (users, columns)), present / present.sum(1, keepdim=True))


def row_of(frozen, *place):
    """Everything that is known of one example."""
    return [*(site[place] for site in frozen.sites), *(c[place] for c in frozen.context.values()), frozen.offset[place]]


def same_rows(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_batch_holds_what_its_index_says():
    batch = small_batch()
    for user in range(2):
        for column in range(4):
            expected = row_of(batch.table, int(batch.index[user, column]))
            assert same_rows(row_of(batch.frozen, user, column), expected)


def test_of_the_sites_only_those_that_are_read_are_gathered_and_once():
    batch = small_batch()
    sites = Spied(batch.table.sites)
    batch = replace(batch, table=replace(batch.table, sites=sites))
    frozen = batch.frozen
    assert sites.asked == []
    first = frozen.sites[1]
    assert frozen.sites[1] is first
    assert batch.frozen.sites[1] is first
    assert sites.asked == [1]
    assert torch.equal(frozen.sites[-1], sites[2][batch.index])
    assert len(frozen.sites) == 3
    with pytest.raises(IndexError):
        frozen.sites[3]


def test_an_offset_that_is_none_stays_none():
    assert small_batch(offset=False).frozen.offset is None


def test_rows_of_a_shared_table_are_the_users_asked_for():
    batch = small_batch(users=3)
    picked = batch.rows(torch.tensor([2, 0, 2]))
    assert picked.table is batch.table
    for row, user in enumerate([2, 0, 2]):
        assert torch.equal(picked.labels[row], batch.labels[user])
        assert torch.equal(picked.weights[row], batch.weights[user])
        assert all(same_rows(row_of(picked.frozen, row, c), row_of(batch.frozen, user, c)) for c in range(4))


def test_columns_of_a_shared_table_are_the_examples_asked_for():
    batch = small_batch(users=3)
    picked = batch.columns(torch.tensor([3, 0]))
    for user in range(3):
        for column, old in enumerate([3, 0]):
            assert picked.labels[user, column] == batch.labels[user, old]
            assert same_rows(row_of(picked.frozen, user, column), row_of(batch.frozen, user, old))
            assert (picked.weights[user, column] > 0) == (batch.weights[user, old] > 0)
    torch.testing.assert_close(picked.weights.sum(1), torch.ones(3))


@pytest.mark.parametrize("shared", [True, False])
def test_joined_batches_are_both_users_examples_side_by_side(shared):
    first = small_batch(users=3)
    second = small_batch(users=3, columns=2, examples=7, table=first.table if shared else None)
    joined = Batch.joined(first, second)
    assert (joined.table is first.table) == shared
    for user in range(3):
        count = sum(int((b.weights[user] > 0).sum()) for b in (first, second))
        for column in range(6):
            batch, old = (first, column) if column < 4 else (second, column - 4)
            assert same_rows(row_of(joined.frozen, user, column), row_of(batch.frozen, user, old))
            assert joined.labels[user, column] == batch.labels[user, old]
            assert joined.weights[user, column] == pytest.approx(float(batch.weights[user, old] > 0) / count)


def test_joined_sequences_of_different_lengths_are_padded_with_nothing():
    long, short = small_batch(), small_batch()
    cut = Frozen(short.table.sites, short.table.context).map(lambda t: t[:, :1])
    short = replace(short, table=cut)
    joined = Batch.joined(replace(long, table=replace(long.table, offset=None)), short).frozen
    assert torch.equal(joined.sites[0][:, :4], long.frozen.sites[0])
    assert torch.equal(joined.sites[0][:, 4:, :1], short.frozen.sites[0])
    assert not joined.sites[0][:, 4:, 1:].any() and not joined.context["mask"][:, 4:, 1:].any()


def test_joining_with_an_offset_and_without_is_refused():
    """Losing the one offset, or applying it to the wrong examples, would change logits without a word."""
    first, second = small_batch(), small_batch(offset=False)
    for pair in ((first, second), (second, first)):
        with pytest.raises(ValueError, match="1 of 2 parts have an offset from cross-fitting; prepare all of them with"):
            Batch.joined(*pair)
    joined = Batch.joined(first, small_batch(columns=2)).frozen
    assert torch.equal(joined.offset[:, :4], first.frozen.offset)


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


# Prepared populations


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


# Side pathways


def side_by_hand(pathways, image, weights, gates):
    """One user's logits of one image, and ``||delta|| / ||logits||`` per pathway, the formula written out."""
    model, backbone = pathways.model, pathways.model.backbone
    hidden, reads = backbone.stem(image[None]), []
    for index in range(len(backbone.blocks)):
        hidden = backbone.block(index, hidden)
        pooled = hidden.tensor.mean((2, 3))[0]
        reads.append((pooled - pooled.mean()) / (pooled.var(unbiased=False) + 1e-5).sqrt())
    features = backbone.readout(hidden)[0]
    base = total = model.weight @ features + model.bias
    changes = torch.full((pathways.num_pathways,), torch.nan)
    for p, name in enumerate(pathways.names):
        if not gates[p]:
            continue
        if name == "head":
            unit = torch.nn.functional.layer_norm(features, features.shape[-1:]) / features.shape[-1] ** 0.5
            delta = unit @ weights["head.weight"] + weights["head.bias"]
        else:
            inside = torch.nn.functional.gelu(reads[p] @ weights[f"{name}.down"] + weights[f"{name}.down_bias"])
            delta = inside @ weights[f"{name}.up"] + weights[f"{name}.up_bias"]
        changes[p] = delta.norm() / base.norm()
        total = total + delta
    return total, changes


def test_side_logits_and_changes_are_what_each_users_mask_and_weights_say(side):
    frozen, images = side_frozen(side, 6, 3)
    weights, gates = strong_weights(side, 6), some_masks(side, 6)
    changes = torch.full((6, 3, side.num_pathways), torch.nan)
    logits = side.logits(frozen, weights, gates, changes)
    for user in range(6):
        own = {key: weight[user] for key, weight in weights.items()}
        for example in range(3):
            expected, moved = side_by_hand(side, images[user, example], own, gates[user])
            torch.testing.assert_close(logits[user, example], expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(changes[user, example], moved, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert torch.equal(logits, side.logits(frozen, weights, gates))  # asking for changes changes nothing


def test_side_pathways_all_off_are_the_population_model(side):
    frozen, images = side_frozen(side, 4, 3)
    off = torch.zeros(4, side.num_pathways, dtype=torch.bool)
    logits = side.logits(frozen, strong_weights(side, 4), off)
    assert torch.equal(logits, population_logits(side.model, frozen))
    torch.testing.assert_close(logits, side.model(images.flatten(0, 1)).view(4, 3, 10), rtol=1e-5, atol=1e-5)


def test_side_pathways_all_on_start_as_the_population_model(side):
    frozen, _ = side_frozen(side, 4, 3)
    start = {key: weight.expand(4, *weight.shape) for key, weight in side.start(0).items()}
    logits = side.logits(frozen, start, torch.ones(4, side.num_pathways, dtype=torch.bool))
    expected = population_logits(side.model, frozen)
    assert (logits - expected).norm() < 1e-2 * expected.norm()
    assert not torch.equal(logits, expected)  # at exactly zero the down-projections would never learn


def test_side_pathways_that_nobody_has_on_are_not_read_and_not_in_the_graph(side):
    frozen, _ = side_frozen(side, 3, 2)
    sites = Spied(frozen.sites)
    gates = torch.zeros(3, side.num_pathways, dtype=torch.bool)
    gates[1:, 2] = True
    weights = {key: weight.requires_grad_() for key, weight in strong_weights(side, 3).items()}
    side.logits(replace(frozen, sites=sites), weights, gates).sum().backward()
    assert set(sites.asked) <= {2, -1}
    assert {key for key, weight in weights.items() if weight.grad is not None} == set(side.keys[2])


def test_side_pathways_that_a_user_has_off_are_not_computed_for_them(side):
    frozen, _ = side_frozen(side, 6, 2)
    gates = some_masks(side, 6)
    weights = strong_weights(side, 6)
    for p, keys in side.keys.items():
        for key in keys:
            weights[key][~gates[:, p]] = torch.nan
        if p < side.num_pathways - 1:  # the classifier reads the last site of everyone
            frozen.sites[p][~gates[:, p]] = torch.nan
    weights = {key: weight.requires_grad_() for key, weight in weights.items()}
    logits = side.logits(frozen, weights, gates)
    assert logits.isfinite().all()
    logits.square().sum().backward()
    for p, keys in side.keys.items():
        for key in keys:
            reached = weights[key].grad.flatten(1).abs().sum(1) > 0
            assert torch.equal(reached, gates[:, p]), key


def test_side_logits_of_a_user_do_not_depend_on_the_others(side):
    frozen, _ = side_frozen(side, 6, 3)
    weights, gates = strong_weights(side, 6), some_masks(side, 6)
    logits = side.logits(frozen, weights, gates)
    for user in range(6):
        one = slice(user, user + 1)
        alone = side.logits(frozen.map(lambda t, one=one: t[one]), of_one(weights, user), gates[one])
        torch.testing.assert_close(logits[one], alone, rtol=1e-5, atol=1e-5)
    order = torch.randperm(6)
    turned = side.logits(frozen.map(lambda t: t[order]), {k: w[order] for k, w in weights.items()}, gates[order])
    torch.testing.assert_close(turned, logits[order], rtol=1e-5, atol=1e-5)


def test_side_pathways_read_pooled_states_of_mean_zero_and_scale_one(side):
    frozen, _ = side_frozen(side, 2, 5)
    for p in range(side.num_pathways):
        read = side.pool(p, frozen)
        assert read.shape == (2, 5, side.widths[p])
        if p < side.num_pathways - 1:
            torch.testing.assert_close(read.mean(-1), torch.zeros(2, 5), rtol=0, atol=1e-5)
            torch.testing.assert_close(read.std(-1, unbiased=False), torch.ones(2, 5), rtol=0.05, atol=0.05)


def test_side_pathways_never_run_the_backbone_again(side, monkeypatch):
    frozen, _ = side_frozen(side, 2, 3)

    def refuse(*_):
        raise AssertionError("the backbone was run")

    for method in ("stem", "block", "readout"):
        monkeypatch.setattr(type(side.model.backbone), method, refuse)
    side.logits(frozen, strong_weights(side, 2), torch.ones(2, side.num_pathways, dtype=torch.bool))


def test_both_placements_have_the_same_names_and_heads(model):
    inline, side = (make_pathways(placement, model, rank=4) for placement in ("inline", "side"))
    assert inline.names == side.names and inline.widths == side.widths
    assert inline.sizes[-1] == side.sizes[-1]
    assert side.sizes[:-1].tolist() == [width * 4 + 4 + 4 * 10 + 10 for width in side.widths[:-1]]


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

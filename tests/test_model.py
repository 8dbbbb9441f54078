"""The population model: the classifier on a backbone's features, a backbone learned from images, and their arguments."""

from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

import miniatures
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from backbones import BACKBONES, register_backbone
from backbones.artefacts import load_artefact
from backbones.base import PopulationModel, hash_tensors
from backbones.pretrain import AUGMENTATIONS, Labelled, pretrain
from backbones.resnet import SmallResNet, small_resnet
from meta import images, prepare
from meta import model as module
from meta.arguments import add_flags, given, parse_pairs, parse_value
from meta.images import pretrained_resnet
from meta.model import STRENGTHS, population_model
from meta.prepare import further_arguments, prepared
from users import POPULATIONS, register_population
from users.base import Examples, Population, User
from users.digits import digits_pools, digits_population
from users.items import TensorItems, TextItems
from users.unipen import unipen

CLASSES = 3
FITTED = 240
"""Items that are fitted on; the users have others."""


@pytest.fixture(scope="module")
def pictures():
    """300 digits and which of three kinds each is."""
    found, labels = digits_pools(0).pretraining()
    return torch.as_tensor(found)[:300], torch.as_tensor(labels)[:300] % CLASSES


@pytest.fixture
def toy(pictures):
    """Three users who share digits with the examples that the classifier is fitted on; some of these come twice."""
    values, labels = pictures
    draw = torch.Generator().manual_seed(0)

    def part():
        places = torch.randperm(300 - FITTED, generator=draw)[:6] + FITTED
        return Examples(places, labels[places])

    users = [User(name, part(), part(), part()) for name in "abc"]
    places = torch.cat([torch.arange(FITTED), torch.arange(0, FITTED, 5)])
    wrong = labels[places].clone()
    wrong[FITTED::2] = (wrong[FITTED::2] + 1) % CLASSES  # some are judged differently by somebody else
    return Population(
        "toy",
        CLASSES,
        *((user,) for user in users),
        items=TensorItems(values),
        fitting=Examples(places, wrong),
    )


@pytest.fixture
def plain(model):
    """The name of a backbone without a classifier."""
    register_backbone("plain", lambda: model.backbone)
    yield "plain"
    BACKBONES.unregister("plain")


@pytest.fixture(scope="module")
def features(model, pictures):
    """Readout features of all digits."""
    with torch.no_grad():
        return model.backbone(pictures[0]).numpy()


def kept(folder):
    """What the only file of a classifier says."""
    (path,) = folder.glob("classifier-*.json")
    return load_artefact(path.with_suffix(""), "classifier")


def by_hand(features, examples, strength, rows=None):
    """Probabilities ``[300, C]`` of a fit on some of the examples, one row per example."""
    rows = torch.arange(len(examples)) if rows is None else rows
    fit = LogisticRegression(C=strength, max_iter=2000).fit(features[examples.inputs[rows]], examples.labels[rows])
    return torch.from_numpy(fit.predict_proba(features)).float()


def held_out_loss(features, examples, strength, parts):
    """Log loss of every example under the fit without its part."""
    total = 0.0
    for part in parts.unique():
        own = (parts == part).nonzero()[:, 0]
        probability = by_hand(features, examples, strength, (parts != part).nonzero()[:, 0])
        total -= probability[examples.inputs[own], examples.labels[own]].log().sum().item()
    return total


def probabilities(features, weight, bias):
    return torch.nn.functional.linear(torch.from_numpy(features), weight, bias).softmax(-1)


# The classifier.


def test_the_classifier_is_the_penalised_fit_on_the_fitting_examples(toy, plain, features, tmp_path):
    made = population_model(plain, toy, tmp_path)
    expected = by_hand(features, toy.fitting, kept(tmp_path)[1]["strength"])
    torch.testing.assert_close(probabilities(features, made.weight, made.bias), expected, rtol=0, atol=5e-3)


def test_two_classes_are_the_penalised_fit_too(toy, plain, features, tmp_path):
    fitting = Examples(toy.fitting.inputs, (toy.fitting.labels == 1).long())
    users = [User(n, *(Examples(torch.arange(4) + FITTED, torch.arange(4) % 2) for _ in range(3))) for n in "abc"]
    two = Population("two", 2, *((user,) for user in users), items=toy.items, fitting=fitting)
    made = population_model(plain, two, tmp_path)
    assert made.weight.shape == (2, features.shape[1]) and made.bias.shape == (2,)
    expected = by_hand(features, fitting, kept(tmp_path)[1]["strength"])
    torch.testing.assert_close(probabilities(features, made.weight, made.bias), expected, rtol=0, atol=5e-3)


def test_nobody_but_the_fitting_examples_counts(toy, plain, tmp_path):
    made = population_model(plain, toy, tmp_path)
    strangers = [User(n, *(Examples(torch.arange(9), torch.zeros(9).long()) for _ in range(3))) for n in "xyz"]
    others = replace(toy, train=(strangers[0],), val=(strangers[1],), test=(strangers[2],))
    assert population_model(plain, others, tmp_path).fingerprint() == made.fingerprint()
    assert len([*tmp_path.glob("*.json")]) == 1
    labels = toy.fitting.labels.clone()
    labels[:40] = (labels[:40] + 1) % CLASSES
    changed = replace(toy, fitting=Examples(toy.fitting.inputs, labels))
    assert population_model(plain, changed, tmp_path).fingerprint() != made.fingerprint()


def test_the_penalty_has_the_least_loss_on_what_was_left_out(toy, plain, features, tmp_path):
    population_model(plain, toy, tmp_path, seed=3)
    parts = torch.randint(4, toy.fitting.labels.shape, generator=torch.Generator().manual_seed(3))
    place = STRENGTHS.index(kept(tmp_path)[1]["strength"])
    assert 0 < place < len(STRENGTHS) - 1
    before, chosen, after = (held_out_loss(features, toy.fitting, STRENGTHS[place + d], parts) for d in (-1, 0, 1))
    assert chosen < before and chosen < after


def test_noise_is_penalised_more_than_what_can_be_learned(toy, plain, pictures, tmp_path):
    strengths = []
    for name, labels in (("clear", pictures[1][:FITTED]), ("noise", torch.randint(CLASSES, (FITTED,)))):
        fitting = Examples(torch.arange(FITTED), labels)
        population_model(plain, replace(toy, fitting=fitting), tmp_path / name)
        strengths.append(kept(tmp_path / name)[1]["strength"])
    assert strengths[0] >= 10 * strengths[1]


def test_too_few_examples_to_choose_by_get_the_strongest_penalty(toy, plain, tmp_path):
    first = torch.stack([(toy.fitting.labels == c).nonzero()[0, 0] for c in range(CLASSES)])
    few = Examples(toy.fitting.inputs[first], toy.fitting.labels[first])
    population_model(plain, replace(toy, fitting=few), tmp_path)
    assert kept(tmp_path)[1]["strength"] == STRENGTHS[0]


def test_folds_have_classifiers_that_saw_nothing_of_them(toy, plain, features, tmp_path):
    folds = torch.full((300,), -1)
    folds[:FITTED] = torch.arange(FITTED) % 4
    folds[:4] = -1  # fitted on, but corrected by nobody
    made = population_model(plain, replace(toy, folds=folds), tmp_path)
    strength, of = kept(tmp_path)[1]["strength"], folds[toy.fitting.inputs]
    assert made.fold_weight.shape == (4, CLASSES, features.shape[1])
    seen = set()
    for k in range(4):
        found = probabilities(features, made.fold_weight[k], made.fold_bias[k])
        expected = by_hand(features, toy.fitting, strength, (of != k).nonzero()[:, 0])
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
        seen.add(hash_tensors({"weight": made.fold_weight[k]}))
    assert len(seen) == 4
    whole = by_hand(features, toy.fitting, strength)
    torch.testing.assert_close(probabilities(features, made.weight, made.bias), whole, rtol=0, atol=5e-3)


def test_a_folds_own_labels_do_not_move_its_classifier_at_a_given_penalty(toy, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STRENGTHS", (0.1,))
    folds = torch.arange(300) % 3
    turned = toy.fitting.labels.clone()
    mine = folds[toy.fitting.inputs] == 1
    turned[mine] = (turned[mine] + 1) % CLASSES
    first, second = (
        population_model(plain, replace(toy, folds=folds, fitting=Examples(toy.fitting.inputs, labels)), tmp_path)
        for labels in (toy.fitting.labels, turned)
    )
    torch.testing.assert_close(first.fold_weight[1], second.fold_weight[1], rtol=1e-3, atol=1e-4)
    assert (first.fold_weight[0] - second.fold_weight[0]).abs().max() > 1e-2


def test_other_folds_and_another_seed_are_other_files(toy, plain, tmp_path):
    population_model(plain, toy, tmp_path)
    for number, (folds, seed) in enumerate([(torch.arange(300) % 3, 0), (torch.arange(300) % 2, 0), (None, 1)]):
        population_model(plain, replace(toy, folds=folds), tmp_path, seed)
        assert len([*tmp_path.glob("*.json")]) == 2 + number


def test_a_class_without_an_example_is_named_with_a_cure(toy, plain, tmp_path):
    some = (toy.fitting.labels != 1).nonzero()[:, 0]
    fitting = Examples(toy.fitting.inputs[some], toy.fitting.labels[some])
    with pytest.raises(ValueError, match=r"no example that fits .* has the label .*: give more users, or let more .*fit_share"):
        population_model(plain, replace(toy, fitting=fitting), tmp_path)
    assert not [*tmp_path.glob("*.json")]


def test_the_classifier_is_fitted_once_and_then_loaded(toy, plain, tmp_path, monkeypatch):
    made = population_model(plain, toy, tmp_path)
    monkeypatch.setattr(module, "readouts", lambda *args: pytest.fail("computed features again"))
    monkeypatch.setattr(LogisticRegression, "fit", lambda *args: pytest.fail("fitted again"))
    again = population_model(plain, toy, tmp_path)
    assert again.fingerprint() == made.fingerprint()


def test_a_population_without_items_is_fitted_on_its_inputs(toy, plain, pictures, tmp_path):
    def part(examples):
        return Examples(pictures[0][examples.inputs], examples.labels)

    def user(one):
        return User(one.user_id, part(one.support), part(one.validation), part(one.query))

    splits = {split: (user(getattr(toy, split)[0]),) for split in ("train", "val", "test")}
    written_out = replace(toy, items=None, fitting=part(toy.fitting), **splits)
    first, second = population_model(plain, toy, tmp_path), population_model(plain, written_out, tmp_path)
    torch.testing.assert_close(first.weight, second.weight, rtol=1e-2, atol=1e-2)


def test_features_of_an_item_are_computed_once(model, toy, monkeypatch):
    seen, original = [], model.backbone.forward
    monkeypatch.setattr(model.backbone, "forward", lambda inputs: (seen.append(len(inputs)), original(inputs))[1])
    found = module.readouts(model.backbone, toy.items, torch.tensor([7, 3, 7, 7, 250]))
    assert sum(seen) == 3
    torch.testing.assert_close(found, original(toy.items.take([7, 3, 7, 7, 250])))


def test_a_classifier_of_the_backbones_own_is_kept_where_there_is_nothing_to_fit_on(model, tmp_path):
    population = replace(digits_population(0, 1, 1, 1), fitting=None)
    register_backbone("whole", lambda: model)
    try:
        assert population_model("whole", population, tmp_path) is model
        other = replace(toy_population(2), fitting=None)
        with pytest.raises(ValueError, match="'two' has no `fitting` examples for the classifier of backbone 'whole'"):
            population_model("whole", other, tmp_path)
    finally:
        BACKBONES.unregister("whole")
    assert not [*tmp_path.iterdir()]


def test_a_classifier_of_the_backbones_own_gives_way_to_a_fitted_one(model, toy, tmp_path):
    weight, bias = torch.full((CLASSES, model.backbone.feature_width), 9.0), torch.zeros(CLASSES)
    register_backbone("whole", lambda: PopulationModel(model.backbone, weight, bias))
    try:
        made = population_model("whole", toy, tmp_path)
    finally:
        BACKBONES.unregister("whole")
    assert not torch.equal(made.weight, weight)
    assert kept(tmp_path)[0]["weight"].shape == weight.shape


def test_a_plain_backbone_needs_fitting_examples(toy, plain, tmp_path):
    with pytest.raises(ValueError, match=r"'toy' has no `fitting` examples .* register a backbone that brings a classifier"):
        population_model(plain, replace(toy, fitting=None), tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "resnet-small",
    ],
)
def test_fitting_examples_that_are_none_at_all_are_refused_in_words(toy, plain, tmp_path, name):
    empty = replace(toy, fitting=Examples(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)))
    with pytest.raises(ValueError, match=r"'toy' (sets no|has no `fitting`)"):
        population_model(name, empty, tmp_path)


def toy_population(classes):
    users = [User(n, *(Examples(torch.rand(3, 1, 8, 8), torch.arange(3) % classes) for _ in range(3))) for n in "abc"]
    return Population("two", classes, *((user,) for user in users))


# A backbone learned from images.


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data root with writers and with drawings without users."""
    root = tmp_path_factory.mktemp("data")
    miniatures.unipen(root)
    return miniatures.omniglot(root)


@pytest.fixture(scope="module")
def writers(root):
    return unipen(root)


SMALL = {"pretrain_epochs": 1, "widths": (4,), "stride": 2}
RICH = SMALL | {"augment": "handwriting", "auxiliary": "omniglot"}


def test_writing_is_learned_along_with_other_drawings_once_and_then_loaded(writers, root, tmp_path, monkeypatch):
    made = pretrained_resnet(writers, tmp_path, 0, **RICH, data_root=root)
    assert made.num_classes == 62
    assert made(writers.items.take([0, 1]).float() / 255).isfinite().all()
    monkeypatch.setattr(images, "pretrain", lambda *args, **kwargs: pytest.fail("trained again"))
    again = pretrained_resnet(writers, tmp_path, 0, **RICH, data_root=root)
    assert again.fingerprint() == made.fingerprint()


def test_whatever_changes_the_backbone_changes_its_file(writers, root, tmp_path):
    variants = [
        RICH,
        RICH | {"augment": "shift"},
        RICH | {"auxiliary": None},
        RICH | {"pretrain_seed": 1},
        RICH | {"pretrain_epochs": 2},
        RICH | {"widths": (8,)},
    ]
    for count, variant in enumerate(variants, 1):
        pretrained_resnet(writers, tmp_path, 0, **variant, data_root=root)
        assert len([*tmp_path.glob("*.json")]) == count, variant


def test_another_stride_is_another_file(writers, tmp_path):
    for stride in (1, 2):
        pretrained_resnet(writers, tmp_path, 0, **SMALL | {"stride": stride})
    assert len([*tmp_path.glob("*.json")]) == 2


def test_one_seed_of_pre_training_serves_all_seeds(writers, tmp_path):
    models = [pretrained_resnet(writers, tmp_path, seed, **SMALL, pretrain_seed=0) for seed in (0, 1, 2)]
    own = pretrained_resnet(writers, tmp_path, 0, **SMALL)
    assert len({one.fingerprint() for one in [*models, own]}) == 1
    assert len([*tmp_path.glob("*.json")]) == 1
    assert pretrained_resnet(writers, tmp_path, 1, **SMALL).fingerprint() != own.fingerprint()


def test_users_count_nothing_in_pre_training(writers, tmp_path):
    made = pretrained_resnet(writers, tmp_path, 0, **SMALL)
    fewer = replace(writers, train=writers.train[:1], test=writers.test[:1])
    assert pretrained_resnet(fewer, tmp_path, 0, **SMALL).fingerprint() == made.fingerprint()
    assert len([*tmp_path.glob("*.json")]) == 1


def test_the_digits_are_learned_as_ever(tmp_path):
    population = digits_population(0, 1, 1, 1)
    made = pretrained_resnet(population, tmp_path, 5, pretrain_epochs=1, widths=(4,))
    torch.manual_seed(5)
    network = SmallResNet(10, in_channels=1, widths=(4,), stride=1)
    fitting = population.fitting
    pretrain(network, Labelled(fitting.inputs, fitting.labels), epochs=1, seed=5, augment="shift")
    assert torch.equal(made.weight, network.fc.weight)
    torch.testing.assert_close(made(fitting.inputs[:5]), network(fitting.inputs[:5]))


def test_positions_among_items_and_images_written_out_make_the_same_backbone(writers, tmp_path):
    def part(examples):
        return Examples(writers.items.take(examples.inputs.tolist()), examples.labels)

    def user(one):
        return User(one.user_id, part(one.support), part(one.validation), part(one.query))

    splits = {split: (user(getattr(writers, split)[0]),) for split in ("train", "val", "test")}
    written_out = replace(writers, items=None, fitting=part(writers.fitting), **splits)
    models = [pretrained_resnet(population, tmp_path, 0, **SMALL) for population in (writers, written_out)]
    assert models[0].fingerprint() == models[1].fingerprint()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"augment": "handwritng"}, r"unknown augmentation 'handwritng'\. Did you mean 'handwriting'"),
        ({"auxiliary": "omnigot"}, r"unknown auxiliary corpus 'omnigot'\. Did you mean 'omniglot'"),
    ],
)
def test_unknown_names_are_answered_with_a_suggestion_before_anything_is_trained(writers, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        pretrained_resnet(writers, tmp_path, 0, **SMALL | wrong)
    assert not [*tmp_path.iterdir()]


def test_no_images_set_aside_and_what_are_no_images_are_refused(writers, tmp_path):
    with pytest.raises(ValueError, match="'unipen' has no `fitting` images"):
        pretrained_resnet(replace(writers, fitting=None), tmp_path, 0, **SMALL)
    texts = replace(writers, items=TextItems(("words",) * len(writers.items)))
    with pytest.raises(ValueError, match="resnet-small learns from images of one size in memory"):
        pretrained_resnet(texts, tmp_path, 0, **SMALL)


# Pre-training.


def strokes(count=6):
    images = torch.zeros(count, 1, 28, 28)
    images[:, :, 6:22, 12:16] = 1
    return images


def test_another_hand_keeps_the_shape_and_differs_per_image_and_by_its_generator():
    change, images = AUGMENTATIONS.get("handwriting"), strokes()
    first, again, other = (change(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first.shape == images.shape
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not any(torch.equal(first[0], image) for image in first[1:])
    assert torch.equal(images, strokes())


def test_another_hand_is_still_that_writing():
    images = strokes(40)
    changed = AUGMENTATIONS.get("handwriting")(images, torch.Generator().manual_seed(0))
    ink = changed.sum((1, 2, 3)) / images.sum((1, 2, 3))
    assert 0.8 < ink.mean() < 1.2 and ink.min() > 0.4 and ink.max() < 1.8
    assert changed.min() >= 0 and changed.max() <= 1 + 1e-5
    overlap = (changed * images).sum((1, 2, 3)) / images.sum((1, 2, 3))
    assert 0.3 < overlap.mean() < 0.99


def test_a_shift_moves_by_at_most_a_pixel_each_way():
    images = torch.rand(3, 1, 8, 8)
    moves = set()
    for seed in range(40):
        out = AUGMENTATIONS.get("shift")(images, torch.Generator().manual_seed(seed))
        padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
        moves |= {(y, x) for y in range(3) for x in range(3) if torch.equal(out, padded[..., y : y + 8, x : x + 8])}
    assert len(moves) == 9


def test_bytes_are_scaled_and_floats_are_not():
    labels, rows = torch.arange(4), torch.tensor([2, 0])
    numbers = torch.arange(4, dtype=torch.uint8)[:, None, None, None] * 85
    images, picked = Labelled(numbers, labels).batch(rows)
    assert images.flatten().tolist() == pytest.approx([2 / 3, 0]) and picked.tolist() == [2, 0]
    assert torch.equal(Labelled(numbers.float(), labels).batch(rows)[0], numbers[rows].float())


def learned(seed=0, **more):
    torch.manual_seed(0)
    network = SmallResNet(2, widths=(4,), depth=1, stride=2)
    draw = torch.Generator().manual_seed(3)
    data = Labelled(torch.rand(40, 1, 28, 28, generator=draw), torch.arange(40) % 2)
    return pretrain(network, data, epochs=1, seed=seed, **more).state_dict()


def test_pre_training_follows_its_seed_and_what_is_learned_along():
    def along(labels):
        pixels = torch.randint(256, (30, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
        return Labelled(pixels, labels)

    five, turned = along(torch.arange(30) % 5), along((torch.arange(30) // 6).flip(0))
    alone, again, both = learned(), learned(), learned(along=five)
    assert all(torch.equal(alone[key], again[key]) for key in alone)
    assert all(torch.equal(both[key], value) for key, value in learned(along=five).items())
    assert both.keys() == alone.keys()  # the second classifier is thrown away
    assert not torch.equal(both["conv1.weight"], alone["conv1.weight"])
    assert not torch.equal(both["conv1.weight"], learned(along=turned)["conv1.weight"])
    assert not torch.equal(learned(seed=1)["conv1.weight"], alone["conv1.weight"])


def test_a_registered_augmentation_is_used():
    seen = []
    AUGMENTATIONS.register("seen", lambda images, draw: (seen.append(len(images)), images)[1])
    try:
        learned(augment="seen")
    finally:
        AUGMENTATIONS.unregister("seen")
    assert sum(seen) == 40


# From names to a prepared population.


@pytest.fixture
def seen():
    """A population ``mine`` and a backbone ``my-net`` that note their arguments."""
    found = {}

    def population(seed, **kwargs):
        found["population"] = {"seed": seed, **kwargs}
        return digits_population(seed, 2, 1, 1)

    def factory(data, shots=2, data_root=None, seed=0):
        return population(seed, data=data, shots=shots, data_root=data_root)

    def backbone(width=4, data_root=None):
        found["backbone"] = {"width": width, "data_root": data_root}
        return small_resnet(10, widths=(width,), depth=1).backbone

    register_population("mine", factory)
    register_backbone("my-net", backbone)
    yield found
    POPULATIONS.unregister("mine")
    BACKBONES.unregister("my-net")


def test_population_and_backbone_each_get_what_they_know(seen, tmp_path):
    data = prepared("mine", "my-net", "side", 2, 3, tmp_path, {"data": "x", "width": 8, "data_root": "r"})
    assert seen["population"] == {"seed": 3, "data": "x", "shots": 2, "data_root": "r"}
    assert seen["backbone"] == {"width": 8, "data_root": "r"}
    assert data.pathways.rank == 2 and data.pathways.num_pathways == 2 and data.population.seed == 3
    assert [*tmp_path.glob("classifier-*.json")]


def test_an_argument_that_the_population_needs_is_named_with_its_flag(seen, tmp_path):
    with pytest.raises(ValueError, match=r"population 'mine' needs `data`; pass --data \(data=\.\.\.\)"):
        prepared("mine", "my-net", "side", 2, 0, tmp_path, {})
    assert seen == {}


@pytest.mark.parametrize(
    ("users", "backbone", "placement", "message"),
    [
        ("mien", "my-net", "side", r"unknown population 'mien'\. Did you mean 'mine'"),
        ("mine", "my-nit", "side", r"unknown backbone 'my-nit'\. Did you mean 'my-net'"),
        ("mine", "my-net", "sid", r"unknown placement 'sid'\. Did you mean 'side'"),
    ],
)
def test_unknown_names_are_answered_with_a_suggestion(seen, tmp_path, users, backbone, placement, message):
    with pytest.raises(ValueError, match=message):
        prepared(users, backbone, placement, 2, 0, tmp_path, {"data": "x"})


def test_further_arguments_are_those_of_both_without_the_seed(seen):
    assert further_arguments({"users": "mine", "backbone": "my-net"}) == {"data", "shots", "data_root", "width"}
    assert {"augment", "data_root", "shots"} <= further_arguments({"users": "unipen", "backbone": "resnet-small"})
    assert "source" in further_arguments({"users": "jester", "backbone": "bert"})
    assert not {"population", "folder", "seed"} & further_arguments({"users": "unipen", "backbone": "resnet-small"})


class Reached(Exception):
    """The population was made."""


def reached(*args, **kwargs):
    raise Reached


@pytest.mark.parametrize(
    "factory", [lambda seed: digits_population(seed, 1, 1, 1), lambda seed=0, **more: digits_population(seed, 1, 1, 1)]
)
def test_a_population_need_not_give_its_seed_a_default_and_may_take_anything(factory, tmp_path, monkeypatch):
    register_population("free", factory)
    monkeypatch.setattr(prepare, "population_model", reached)
    try:
        with pytest.raises(Reached):
            prepared("free", "resnet-small", "side", 2, 0, tmp_path, {})
    finally:
        POPULATIONS.unregister("free")


# Arguments of the command lines.


def parsed(*arguments):
    parser = ArgumentParser()
    add_flags(parser)
    return given(parser.parse_args(arguments))


def test_only_what_was_given_is_an_argument_and_paths_are_strings():
    assert parsed() == {}
    found = parsed("--users", "table", "--data", "a/b.csv", "--data-root", "/data", "--max-users", "0", "--shots", "2")
    assert found == {"users": "table", "data": str(Path("a/b.csv")), "data_root": "/data", "max_users": 0, "shots": 2}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1e3", 1000),
        ("3", 3),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("[a, b]", ["a", "b"]),
        ("{hidden: 32}", {"hidden": 32}),
        ("new_annotators", "new_annotators"),
        ("", None),
    ],
)
def test_values_are_yaml_and_scientific_numbers_are_numbers(text, value):
    found = parse_value(text)
    assert found == value and type(found) is type(value)


def test_a_value_that_is_not_finite_is_a_number_too():
    assert np.isnan(parse_value("nan")) and parse_value("-inf") == -np.inf


def test_pairs_are_split_at_the_first_colon():
    assert parse_pairs(["data:C:/x.csv", "fold:2"], "-K") == {"data": "C:/x.csv", "fold": 2}
    with pytest.raises(ValueError, match=r"-K takes name:value, got \['fold=2'\]"):
        parse_pairs(["fold=2"], "-K")


def test_what_is_no_yaml_is_refused_in_words():
    with pytest.raises(ValueError, match="embedding"):
        parse_pairs(["embedding:[features"], "--env-kwargs")

"""What every outer step draws: users, masks, and the examples dealt to support and query."""

from dataclasses import replace

import pytest
import torch

from meta.masks import sample_masks
from meta.outer import ALGORITHMS
from meta.trainer import MetaConfig, MetaTrainer, redealt
from users.base import Examples, Population, User
from users.batch import Prepared
from users.items import TensorItems


def test_every_outer_step_draws_users_and_masks_anew(pathways, batches):
    seen = []

    def spy(pathways, init, support, query, gates):
        seen.append((tuple(support.labels.flatten().tolist()), tuple(gates.flatten().tolist())))
        return ALGORITHMS.get("fomaml")(pathways, init, support, query, gates)

    ALGORITHMS.register("spy", spy)
    try:
        MetaTrainer(pathways, *batches, MetaConfig("spy", steps=6, users=3, all_on=0.0)).run()
    finally:
        ALGORITHMS.unregister("spy")
    labels, gates = zip(*seen, strict=True)
    assert len(set(labels)) == len(set(gates)) == 6


def test_sampled_masks_are_never_empty():
    draw = torch.Generator().manual_seed(0)
    for pathways in (1, 2, 7):
        assert sample_masks(3000, pathways, draw, all_on=0.0).any(1).all()


def test_sampled_masks_are_all_on_as_often_as_asked():
    draw = torch.Generator().manual_seed(0)
    shares = [sample_masks(4000, 7, draw, all_on).all(1).float().mean().item() for all_on in (0.0, 0.5, 1.0)]
    assert shares[0] < 0.25  # a high density turns everything on by chance
    assert 0.48 < shares[1] < 0.5 + shares[0] / 2 + 0.04
    assert shares[2] == 1


def test_densities_of_sampled_masks_spread_over_the_whole_range():
    counts = sample_masks(8000, 7, torch.Generator().manual_seed(0), all_on=0.0).sum(1).bincount(minlength=8) / 8000
    assert counts[0] == 0
    assert (counts[1:] > 0.05).all()


def test_no_pathway_is_favoured_by_sampled_masks():
    rates = sample_masks(8000, 7, torch.Generator().manual_seed(0), all_on=0.0).float().mean(0)
    assert (rates - rates.mean()).abs().max() < 0.03


def test_sampled_masks_follow_their_generator():
    first, again, other = (sample_masks(50, 7, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# Dealing examples to support and query anew.


def dealt_users(items):
    """Users of different sizes, of classes with one example and with many; who shares items has positions for inputs."""
    draw = torch.Generator().manual_seed(6)

    def user(name, *sizes):
        places = torch.randperm(40, generator=draw)[: sum(sizes)]
        labels = torch.randint(3, places.shape, generator=draw)
        labels[0] = 7  # an only one
        inputs = places if items is not None else torch.rand(len(places), 1, 8, 8, generator=draw)
        return User(name, *map(Examples, inputs.split(sizes), labels.split(sizes)))

    sizes = ((9, 3, 12), (4, 3, 7), (12, 3, 2), (1, 3, 1))
    return tuple(user(str(n), *size) for n, size in enumerate(sizes))


@pytest.fixture(params=["items", "inputs"])
def uneven(request, pathways):
    """Support and query of users of different sizes, from one table or from two."""
    items = TensorItems(torch.rand(40, 1, 8, 8)) if request.param == "items" else None
    users = dealt_users(items)
    one = dealt_users(items)[:1]
    population = Population("uneven", 10, users, (replace(one[0], user_id="v"),), (replace(one[0], user_id="t"),), items=items)
    prepared = Prepared(pathways, population)
    return prepared.batch("train", "support"), prepared.batch("train", "query"), prepared.batch("train", "validation")


def belongings(*batches):
    """Per user what they have of every label, as sorted tuples of features."""
    found = []
    for row in range(len(batches[0])):
        own = []
        for batch in batches:
            present = batch.weights[row] > 0
            read = batch.frozen.sites[-1][row][present]
            own += [(int(label), *feature.tolist()) for label, feature in zip(batch.labels[row][present], read, strict=True)]
        found.append(sorted(own))
    return found


def deal(batches, seed):
    return redealt(*batches[:2], torch.Generator().manual_seed(seed))


def test_examples_dealt_anew_keep_labels_weights_and_padding(uneven):
    for before, after in zip(uneven, deal(uneven, 0), strict=False):
        assert torch.equal(after.labels, before.labels)
        assert torch.equal(after.weights, before.weights)
        assert after.index.shape == before.index.shape


def test_examples_are_dealt_among_the_users_own_support_and_query_alone_with_their_labels(uneven):
    for seed in range(10):
        support, query = deal(uneven, seed)
        assert belongings(support, query) == belongings(*uneven[:2])
        validation = belongings(uneven[2])
        assert not any({*dealt} & {*kept} for dealt, kept in zip(belongings(support, query), validation, strict=True))


def test_examples_are_dealt_anew_by_the_generator_and_in_every_step(uneven):
    first, again, other = ([batch.index for batch in deal(uneven, seed)] for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    moved = [belongings(deal(uneven, seed)[0])[0] != belongings(uneven[0])[0] for seed in range(5)]
    assert all(moved)


def test_every_example_of_a_class_comes_to_the_support_sometimes(uneven):
    seen = {}
    for seed in range(60):
        for label, *feature in belongings(deal(uneven, seed)[0])[0]:
            seen.setdefault(label, set()).add(tuple(feature))
    everything = {}
    for label, *feature in belongings(*uneven[:2])[0]:
        everything.setdefault(label, set()).add(tuple(feature))
    kept = {label: everything[label] for label in seen}
    assert seen == kept and max(map(len, kept.values())) > 3


def test_meta_training_deals_anew_only_if_asked(pathways, batches):
    seen = []

    def spy(pathways, init, support, query, gates):
        seen.append((support.labels.clone(), support.frozen.sites[-1].clone()))
        return ALGORITHMS.get("fomaml")(pathways, init, support, query, gates)

    ALGORITHMS.register("spy", spy)
    try:
        for resample in (False, True):
            MetaTrainer(pathways, *batches, MetaConfig("spy", steps=1, users=12, resample=resample)).run()
    finally:
        ALGORITHMS.unregister("spy")
    assert torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[0][1], seen[1][1])

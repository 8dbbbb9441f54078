from dataclasses import replace

import pytest
import torch

from meta.inner import MetaInit, adapt
from meta.shrinkage import accuracies, first, shrunk
from meta.trainer import MetaConfig, MetaTrainer, meta_initialisation
from tests.test_meta import everything_on, lively_init
from users.batch import Batch, Prepared, stack


@pytest.fixture(scope="module")
def batches(pathways, population):
    return [stack(pathways, population.train, role) for role in ("support", "query")]


def moved(pathways, init, batch):
    after = adapt(pathways, init, batch, everything_on(len(batch), pathways))
    return {key: after[key] - init.weights[key] for key in after}


@pytest.mark.parametrize(("size", "prior"), [(1, 3.0), (5, 5.0), (10, 2.5)])
def test_so_many_examples_beside_a_prior_move_a_user_by_their_share(pathways, batches, size, prior):
    init, some = lively_init(pathways, steps=1), first(batches[0], torch.arange(20).expand(12, -1), size)
    free, held = moved(pathways, init, some), moved(pathways, replace(init, prior=prior), some)
    for key in free:
        torch.testing.assert_close(held[key], free[key] * size / (size + prior), rtol=1e-4, atol=1e-6)


def test_without_a_prior_nothing_is_held_back_and_without_examples_nothing_moves(pathways, batches):
    init, support = lively_init(pathways), batches[0]
    assert torch.equal(init.trust(support), torch.ones(12))
    nothing = Batch(support.table, support.index, support.labels, torch.zeros_like(support.weights))
    for prior in (0.0, 4.0):
        assert torch.equal(replace(init, prior=prior).trust(nothing), torch.zeros(12))


def test_a_prior_is_kept_and_none_leaves_a_start_what_it_was(pathways):
    init = lively_init(pathways)
    assert "prior" not in init.tensors()
    assert MetaInit.from_tensors(init.tensors()).prior == 0
    assert MetaInit.from_tensors(replace(init, prior=20.0).tensors()).prior == 20


def test_the_first_examples_are_those_of_the_order_without_padding(batches):
    support = batches[0]
    weights = support.weights.clone()
    weights[3, 2:] = 0
    padded = replace(support, weights=weights / weights.sum(1, keepdim=True))
    order = torch.arange(20).flip(0).repeat(12, 1)
    order[3] = torch.tensor([1, 0, *range(2, 20)])
    some = first(padded, order, 4)
    assert torch.equal(some.labels[0], support.labels[0, [19, 18, 17, 16]])
    assert torch.equal(some.index[3, :2], support.index[3, [1, 0]])
    assert torch.allclose(some.weights[[0, 3]], torch.tensor([[0.25] * 4, [0.5, 0.5, 0, 0]]))


def test_accuracies_are_those_of_users_who_showed_so_much(pathways, batches):
    support, query = batches
    found = accuracies(pathways, lively_init(pathways, rate=0.01), support, query, [1, 20])
    nearly = accuracies(pathways, lively_init(pathways, rate=0.01 * 1.4), support, query, [20])
    assert found.shape == (2, 11)
    assert found[1, 8] == pytest.approx(nearly[0, 7])  # a factor of 1.4 is a rate of 1.4
    assert (found[0] != found[1]).any()


def test_users_who_are_asked_what_they_showed_are_trusted_and_those_with_foreign_labels_are_not(pathways, batches):
    slow, fast, support = lively_init(pathways, rate=0.005), lively_init(pathways, rate=0.5), batches[0]

    def strength(init):
        return float(init.rates[0, 0] * init.trust(support)[0])

    same = shrunk(pathways, slow, support, support)
    wrong = replace(support, labels=(support.labels + 3) % 10)
    other = shrunk(pathways, fast, wrong, support)
    assert strength(same) > strength(slow) and strength(other) < strength(fast) / 2
    assert all(same.weights[key] is slow.weights[key] for key in slow.weights)


def test_shrinking_keeps_what_was_learned_apart_and_learns_nothing_again(pathways, population, tmp_path, monkeypatch):
    data, config = Prepared(pathways, population), MetaConfig(steps=2, users=4)
    plain = meta_initialisation(data, config, tmp_path)
    monkeypatch.setattr(MetaTrainer, "run", None)
    found = meta_initialisation(data, replace(config, shrink=True), tmp_path)
    again = meta_initialisation(data, replace(config, shrink=True), tmp_path)
    assert found.prior == again.prior and torch.equal(found.rates, again.rates)
    assert torch.equal(found.rates / found.rates[0, 0], plain.rates / plain.rates[0, 0])
    assert len([*tmp_path.glob("shrunk-*.json")]) == len([*tmp_path.glob("meta-*.json")]) == 1


def test_meta_training_that_goes_on_from_a_shrunk_start_keeps_its_prior(pathways, batches):
    start = replace(lively_init(pathways), prior=7.0)
    trainer = MetaTrainer(pathways, *batches, MetaConfig(steps=2, users=4, inner_steps=2), start=start)
    assert trainer.run().prior == 7

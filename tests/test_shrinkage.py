from dataclasses import replace

import numpy as np
import pytest
import torch
from meta_runs import everything_on, lively_init

from meta.inner import MetaInit, adapt, adapted, adapted_accuracy, adapted_along
from meta.learned import meta_initialisation
from meta.shrinkage import Shown, Shrinkage, first, shrunk, worth_of
from meta.trainer import MetaConfig, MetaTrainer
from users.batch import Batch, Prepared, stack


@pytest.fixture(scope="module")
def batches(pathways, population):
    return [stack(pathways, population.train, role) for role in ("support", "query")]


def moved(pathways, init, batch):
    after = adapt(pathways, init, batch, everything_on(len(batch), pathways))
    return {key: after[key] - init.weights[key] for key in after}


@pytest.mark.parametrize(
    ("size", "prior", "sharpness", "share"), [(1, 3.0, 1.0, 0.25), (5, 5.0, 1.0, 0.5), (10, 5.0, 2.0, 0.8)]
)
def test_so_many_examples_beside_a_prior_move_a_user_by_their_share(pathways, batches, size, prior, sharpness, share):
    init, some = lively_init(pathways, steps=1), first(batches[0], torch.arange(20).expand(12, -1), size)
    free, held = moved(pathways, init, some), moved(pathways, replace(init, prior=prior, sharpness=sharpness), some)
    for key in free:
        torch.testing.assert_close(held[key], free[key] * share, rtol=1e-4, atol=1e-6)


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
    kept = MetaInit.from_tensors(replace(init, prior=20.0, sharpness=2.0).tensors())
    assert (kept.prior, kept.sharpness) == (20, 2)


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


def test_gains_are_those_over_the_bare_model_of_users_who_showed_so_much(pathways, batches):
    support, query = batches
    init = lively_init(pathways, rate=0.01)
    shown = Shown.of(pathways, init, support, query)
    assert shown.sizes == (1, 5, 20)
    some = first(support, shown.order, 5)
    each = [adapted_accuracy(pathways, init, some, query, gates) for gates in shown.masks]
    bare = adapted_accuracy(pathways, init, some, query, torch.zeros_like(shown.masks[0]))
    torch.testing.assert_close(torch.from_numpy(shown.gains(init)[0, 1]), (each[0] + each[1]).double() / 2 - bare.double())
    assert shown.masks[0].all() and not shown.masks[1].all()


def test_gains_after_more_steps_are_those_of_a_start_with_its_rates_repeated(pathways, batches):
    init = lively_init(pathways, rate=0.01, steps=2)
    shown = Shown.of(pathways, init, *batches)
    along = shown.gains(init, (1, 2, 4))
    alone = [shown.gains(replace(init, rates=init.rates.repeat(times, 1)))[0] for times in (1, 2, 4)]
    np.testing.assert_array_equal(along, alone)
    assert not np.array_equal(along[0], along[2])


def test_accuracy_and_loss_after_more_steps_are_so_in_spans_too(side, population):
    support, query = (stack(side, population.train, role) for role in ("support", "query"))
    few, gates, init = support.columns(torch.arange(2)), everything_on(len(support), side), lively_init(side, steps=4)
    along = adapted_along(side, init, few, query, gates, (1, 3))
    for place, times in enumerate((1, 3)):
        alone = adapted(side, replace(init, rates=init.rates.repeat(times, 1)), few, query, gates)
        torch.testing.assert_close(torch.stack(alone), torch.stack([part[place] for part in along]))


def test_the_end_counts_as_much_as_the_way_there_and_a_loss_counts_again():
    gains = np.array([[0.0, 0.2], [0.1, 0.3], [0.4, 0.6]])
    np.testing.assert_allclose(worth_of(gains), [0.225, 0.425])
    lossy = gains - [[0.3], [0.0], [0.0]]  # the mean user loses .2 with the fewest examples
    np.testing.assert_allclose(worth_of(lossy), [0.225 - 0.075 - 0.2, 0.425 - 0.075 - 0.2])
    np.testing.assert_allclose(worth_of(gains[-1:]), gains[-1])


def scripted(monkeypatch, gain_of):
    """Val users whose gains follow from steps, scale and prior alone."""
    spread = np.linspace(-0.01, 0.01, 12)

    def gains(shown, init, repeats=(1,)):
        longer = [replace(init, rates=init.rates.repeat(times, 1)) for times in repeats]
        return np.stack([[gain_of(init, size) + spread * (init.steps - 2) for size in shown.sizes] for init in longer])

    monkeypatch.setattr(Shown, "gains", gains)


@pytest.mark.parametrize(("more", "repeats"), [(0.0, 1), (0.001, 1), (0.02, 4), (-0.02, 1)])
def test_more_steps_are_taken_where_they_win_by_a_standard_error(pathways, batches, monkeypatch, more, repeats):
    monkeypatch.setattr("meta.shrinkage.REPEATS", (1, 2, 4))
    scripted(monkeypatch, lambda init, size: more * init.steps)
    found = shrunk(pathways, lively_init(pathways, steps=2), *batches)
    assert found.steps == 2 * repeats


@pytest.mark.parametrize("wanted", [Shrinkage(1.4, 10.0), Shrinkage(0.7, 5.0, 2.0), Shrinkage(1.0)])
def test_scale_prior_and_sharpness_are_those_at_which_val_users_gain_most(pathways, batches, monkeypatch, wanted):
    monkeypatch.setattr("meta.shrinkage.SIZES", (1, 2, 5, 10, 50))

    def gain(init, size):
        weight = Shrinkage(float(init.rates[0, 0]) / 0.1, init.prior, init.sharpness).weight(np.array(float(size)))
        return -abs(np.log(weight) - np.log(wanted.weight(np.array(float(size)))))

    scripted(monkeypatch, gain)
    found = shrunk(pathways, lively_init(pathways, rate=0.1), *batches)
    assert (found.prior, found.sharpness) == (wanted.prior, wanted.sharpness)
    assert float(found.rates[0, 0]) == pytest.approx(wanted.scale / 10)


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
    proportions = (plain.rates / plain.rates[0, 0]).repeat(found.steps // plain.steps, 1)
    torch.testing.assert_close(found.rates / found.rates[0, 0], proportions)
    assert len([*tmp_path.glob("shrunk-*.json")]) == len([*tmp_path.glob("meta-*.json")]) == 1


def test_meta_training_that_goes_on_from_a_shrunk_start_keeps_how_it_shrinks(pathways, batches):
    start = replace(lively_init(pathways), prior=7.0, sharpness=2.0)
    trainer = MetaTrainer(pathways, *batches, MetaConfig(steps=2, users=4, inner_steps=2), start=start)
    found = trainer.run()
    assert (found.prior, found.sharpness) == (7.0, 2.0)

"""The inner loop: what a step is, whom it moves, and that nobody feels anybody else."""

import pytest
import torch
from meta_runs import everything_on, lively_init

from backbones.pathways import Frozen
from meta.inner import MetaInit, adapt, adapted, measure, stacked
from users.batch import Batch, stack


@pytest.fixture(scope="module")
def masks(pathways):
    """A mask per train user, among them all on, all off, one adapter and the head alone."""
    some = torch.rand(12, pathways.num_pathways, generator=torch.Generator().manual_seed(1)) < 0.5
    some[0], some[1], some[2], some[3] = True, False, False, False
    some[2, 1] = some[3, -1] = True
    return some


def test_adaptation_is_deterministic_to_the_bit(pathways, batches, masks):
    first, second = (adapt(pathways, lively_init(pathways), batches[0], masks) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_adaptation_lowers_every_users_support_loss(pathways, batches):
    init, on = lively_init(pathways, rate=0.002), everything_on(12, pathways)
    before = measure(pathways, stacked(init, 12), on, batches[0])[1]
    after = measure(pathways, adapt(pathways, init, batches[0], on), on, batches[0])[1]
    assert (after < before).all()


def test_a_user_does_not_feel_the_data_of_another(pathways, batches, masks):
    init, support = lively_init(pathways), batches[0]
    sites = tuple(site.clone() for site in support.frozen.sites)
    for site in sites:
        site[5] = torch.rand_like(site[5])
    labels = support.labels.clone()
    labels[5] = (labels[5] + 1) % 10
    before = adapt(pathways, init, support, masks)
    after = adapt(pathways, init, Batch.of(Frozen(sites), labels, support.weights), masks)
    others = torch.arange(12) != 5
    for key in before:
        torch.testing.assert_close(after[key][others], before[key][others], rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(after[key][5], before[key][5]) for key in before)


def test_a_user_adapts_in_a_batch_as_alone(pathways, batches, masks):
    init, support = lively_init(pathways), batches[0]
    together = adapt(pathways, init, support, masks)
    for row in range(12):
        alone = adapt(pathways, init, support.rows(torch.tensor([row])), masks[row : row + 1])
        for key in together:
            torch.testing.assert_close(together[key][row], alone[key][0], rtol=1e-4, atol=1e-5)


def test_pathways_that_are_off_stay_as_they_were_to_the_bit_and_the_others_move(pathways, batches, masks):
    init = lively_init(pathways)
    weights = adapt(pathways, init, batches[0], masks)
    for p, keys in pathways.keys.items():
        for key in keys:
            moved = (weights[key] != init.weights[key]).flatten(1).any(1)
            assert torch.equal(moved, masks[:, p]), key


def test_one_step_is_one_gradient_step(pathways, population):
    init = lively_init(pathways, steps=1)
    init.rates[0] = torch.tensor([0.01, 0.02, 0.03, 0.04, 0.05])
    support = stack(pathways, population.train[:1], "support")
    gates = torch.tensor([[True, False, True, True, True]])
    weights = {k: w.clone().requires_grad_() for k, w in init.weights.items()}
    logits = pathways.logits(support.frozen, {k: w[None] for k, w in weights.items()}, gates)
    torch.nn.functional.cross_entropy(logits[0], support.labels[0]).backward()
    adapted = adapt(pathways, init, support, gates)
    for p, keys in pathways.keys.items():
        for key in keys:
            step = init.rates[0, p] * weights[key].grad if gates[0, p] else 0
            torch.testing.assert_close(adapted[key][0], init.weights[key] - step, rtol=1e-5, atol=1e-6)


def test_every_step_and_pathway_has_a_rate_of_its_own(pathways, batches):
    init, on = lively_init(pathways, steps=2), everything_on(12, pathways)
    init.rates[:, 1] = 0
    weights = adapt(pathways, init, batches[0], on)
    for p, keys in pathways.keys.items():
        moved = {bool((weights[key] != init.weights[key]).any()) for key in keys}
        assert moved == {p != 1}
    one, init.rates[1] = MetaInit(init.weights, init.rates[:1], init.adapted), 0
    first, both = adapt(pathways, one, batches[0], on), adapt(pathways, init, batches[0], on)
    assert all(torch.equal(first[key], both[key]) for key in first)


def test_two_rounds_of_one_step_are_one_round_of_two(pathways, batches, masks):
    two = lively_init(pathways, steps=2)
    one = MetaInit(two.weights, two.rates[:1], two.adapted)
    halfway = adapt(pathways, one, batches[0], masks)
    untouched = {k: w.clone() for k, w in halfway.items()}
    rounds = adapt(pathways, one, batches[0], masks, halfway)
    whole = adapt(pathways, two, batches[0], masks)
    for key in whole:
        torch.testing.assert_close(rounds[key], whole[key])
        assert torch.equal(halfway[key], untouched[key])


def test_adaptation_leaves_the_start_and_no_graph_behind(pathways, batches, masks):
    init = lively_init(pathways)
    before = {k: w.clone() for k, w in init.weights.items()}
    weights = adapt(pathways, init, batches[0], masks)
    assert all(torch.equal(init.weights[key], before[key]) for key in before)
    assert not any(w.requires_grad for w in weights.values())


def test_with_every_mask_off_nothing_is_adapted(pathways, batches):
    init = lively_init(pathways)
    weights = adapt(pathways, init, batches[0], ~everything_on(12, pathways))
    assert all(torch.equal(w, init.weights[key].expand_as(w)) for key, w in weights.items())


def test_measure_is_accuracy_and_cross_entropy(pathways, population, batches):
    accuracy, loss = measure(pathways, stacked(lively_init(pathways), 12), ~everything_on(12, pathways), batches[1])
    for row, one in enumerate(population.train):
        logits = pathways.model(one.query.inputs)
        right = (logits.argmax(-1) == one.query.labels).float().mean()
        torch.testing.assert_close(accuracy[row], right)
        torch.testing.assert_close(loss[row], torch.nn.functional.cross_entropy(logits, one.query.labels))


def test_adapted_accuracy_is_the_same_in_chunks(pathways, batches, masks):
    init = lively_init(pathways)
    expected, _ = measure(pathways, adapt(pathways, init, batches[0], masks), masks, batches[1])
    for chunk in (5, 64):
        torch.testing.assert_close(adapted(pathways, init, *batches, masks, chunk=chunk)[0], expected)


def test_a_meta_initialisation_survives_being_a_flat_dict(pathways):
    init = lively_init(pathways)
    again = MetaInit.from_tensors(init.tensors())
    assert again.weights.keys() == init.weights.keys()
    assert all(torch.equal(again.weights[key], init.weights[key]) for key in init.weights)
    assert torch.equal(again.rates, init.rates) and torch.equal(again.adapted, init.adapted)

import pytest
import torch
from meta_runs import everything_on, lively_init

import meta.inner
from backbones.pathways import GATES, make_pathways
from meta.inner import MetaInit, adapt, user_loss
from meta.span import Span, pays
from users.batch import stack


@pytest.fixture
def shown(side, population):
    return stack(side, population.train, "support")


@pytest.fixture
def counted(monkeypatch):
    """How many matrices have been moved in a span."""
    made = []
    monkeypatch.setattr(meta.inner.Span, "of", lambda *args, of=Span.of: made.append(args) or of(*args))
    return made


def masks(users, pathways):
    gates = torch.rand(users, pathways, generator=torch.Generator().manual_seed(1)) < 0.6
    gates[0], gates[1] = True, False
    return gates


def both_ways(monkeypatch, make):
    """What ``make`` makes with every matrix moved in its span, and with none."""
    found = []
    for always in (True, False):
        monkeypatch.setattr(meta.inner, "pays", lambda *_, always=always, **__: always)
        found.append(make())
    return found


def test_a_matrix_that_moves_in_the_span_of_its_inputs_goes_where_gradient_descent_goes():
    draw = torch.Generator().manual_seed(0)
    inputs, start = torch.randn(3, 4, 9, generator=draw).double(), torch.randn(3, 9, 2, generator=draw).double()
    users = torch.tensor([0, 2])
    span, matrix = Span.of(users, inputs[users], start), start
    moved = span.unmoved()
    for _ in range(5):
        moved = moved - 0.05 * torch.tanh(span.products(moved))  # the gradient by the products of some loss
        matrix = matrix - 0.05 * inputs.transpose(1, 2) @ torch.tanh(inputs @ matrix)
    torch.testing.assert_close(span.matrices(moved)[users], matrix[users])
    torch.testing.assert_close(span.products(moved), (inputs @ matrix)[users])
    assert torch.equal(span.matrices(moved)[1], start[1]) and not torch.allclose(matrix, start, atol=0.1)


@pytest.mark.parametrize("kind", GATES)
def test_adaptation_is_the_same_in_the_span_as_in_the_matrices_themselves(model, population, monkeypatch, counted, kind):
    side = make_pathways("side", model, rank=4, gates=kind)
    shown = stack(side, population.train, "support")
    init, gates = lively_init(side, rate=0.3, steps=3), masks(len(shown), side.num_pathways)
    inside, outside = both_ways(monkeypatch, lambda: adapt(side, init, shown, gates))
    assert len(counted) == sum(map(bool, side.keys.values())) and inside.keys() == outside.keys() == init.weights.keys()
    for key in inside:
        torch.testing.assert_close(inside[key], outside[key], atol=1e-5, rtol=1e-4)
        assert torch.equal(inside[key][1], init.weights[key]), "nothing of somebody who has nothing on moves"
    assert not torch.allclose(inside["head.weight"][0], init.weights["head.weight"], atol=1e-3)


@pytest.mark.parametrize("everybody", [False, True])
def test_weights_stay_float32_in_the_span_under_autocast(side, shown, monkeypatch, everybody):
    init, gates = lively_init(side, rate=0.3, steps=3), masks(len(shown), side.num_pathways) | everybody

    def lower():
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return adapt(side, init, shown, gates)

    inside, outside = both_ways(monkeypatch, lower)
    exact = adapt(side, init, shown, gates)
    for key, weight in inside.items():
        assert weight.dtype == torch.float32

        def apart(found, key=key):
            return float((found[key] - exact[key]).norm())

        assert apart(inside) <= 1.5 * apart(outside) + 1e-6
    side.logits(shown.frozen, inside, gates)


def test_only_what_pays_is_moved_in_its_span(side, shown, counted):
    init = lively_init(side, rate=0.3, steps=4)
    few = shown.columns(torch.arange(2))
    adapt(side, init, shown, everything_on(len(shown), side))
    assert not counted  # twenty images, and features no wider than 32
    adapt(side, init, few, everything_on(len(shown), side))
    assert len(counted) == side.num_pathways


def test_pathways_that_are_not_adapted_have_no_span(side, shown, counted, monkeypatch):
    monkeypatch.setattr(meta.inner, "pays", lambda *_, **__: True)
    init = lively_init(side)
    adapted = torch.arange(side.num_pathways) == side.num_pathways - 1
    adapt(side, MetaInit(init.weights, init.rates, adapted), shown, everything_on(len(shown), side))
    assert len(counted) == 1


def test_further_steps_go_on_in_the_span(side, shown, monkeypatch):
    init, gates = lively_init(side, rate=0.3, steps=2), masks(len(shown), side.num_pathways)
    longer = MetaInit(init.weights, init.rates.repeat(2, 1), init.adapted)
    inside, outside = both_ways(monkeypatch, lambda: adapt(side, init, shown, gates, adapt(side, init, shown, gates)))
    at_once = both_ways(monkeypatch, lambda: adapt(side, longer, shown, gates))[0]
    for key in inside:
        torch.testing.assert_close(inside[key], outside[key], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(inside[key], at_once[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("own_rates", [False, True])
def test_meta_gradients_are_the_same_in_the_span(side, shown, monkeypatch, second_order, own_rates):
    gates = masks(len(shown), side.num_pathways)

    def gradients():
        init = lively_init(side, rate=0.3, steps=2)
        rates = init.rates.expand(len(shown), *init.rates.shape).clone() if own_rates else init.rates.clone()
        wanted = [weight.requires_grad_() for weight in init.weights.values()] + [rates.requires_grad_()]
        init = MetaInit(init.weights, rates, init.adapted)
        weights = adapt(side, init, shown, gates, meta=True, second_order=second_order)
        return torch.autograd.grad(user_loss(side.logits(shown.frozen, weights, gates), shown).sum(), wanted)

    inside, outside = both_ways(monkeypatch, gradients)
    for one, other in zip(inside, outside, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_it_pays_for_few_examples_of_wide_inputs_and_for_many_steps():
    assert pays(10, 384, 8, steps=5) and not pays(200, 384, 8, steps=5)
    assert not pays(10, 384, 8, steps=1) and pays(200, 384, 8, steps=60)
    assert not pays(20, 384, 2, steps=5)  # of two classes' head the Gram matrix is dearer
    assert not pays(100, 16, 8, steps=60)


def test_pathways_inside_the_model_move_as_they_did(pathways, batches, counted):
    adapt(pathways, lively_init(pathways), batches[0], everything_on(12, pathways))
    assert not counted

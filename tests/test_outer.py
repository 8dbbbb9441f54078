"""Outer loops: their gradients against finite differences and by hand, and what each of them adapts."""

import pytest
import torch
from meta_runs import FOUR, everything_on, lively_init

from backbones.pathways import make_pathways
from backbones.resnet import small_resnet
from meta.inner import MetaInit, adapt, measure, user_loss
from meta.outer import ALGORITHMS, adapted_pathways
from users.base import Examples, User
from users.batch import Batch, stack


@pytest.fixture
def tiny():
    """Two users, two adapters and a head in double precision, with weights at which curvature matters."""
    model = small_resnet(3, image_size=4, widths=(4,), depth=2)
    pathways = make_pathways("inline", model, rank=2)
    model.double()

    def part(count):
        return Examples(torch.rand(count, 1, 4, 4, dtype=torch.double), torch.randint(3, (count,)))

    users = [User(str(n), part(4), part(2), part(5)) for n in range(2)]
    support, query = (stack(pathways, users, role) for role in ("support", "query"))
    weights = {k: w.double() + 0.5 * torch.randn(w.shape, dtype=torch.double) for k, w in pathways.start(0).items()}
    rates = torch.rand(2, 3, dtype=torch.double) * 0.5 + 0.1
    gates = torch.tensor([[True, True, True], [False, True, True]])
    return pathways, MetaInit(weights, rates, torch.ones(3, dtype=torch.bool)), support, query, gates


def moved(init, direction, distance):
    """The start and the inner rates, moved by so much along a direction."""
    weights = {k: (w + distance * direction[k]).requires_grad_() for k, w in init.weights.items()}
    return MetaInit(weights, init.rates + distance * direction["rates"], init.adapted)


def slopes(tiny, algorithm, adapted=None):
    """An algorithm's meta-gradient along random directions, and the query loss's finite differences there."""
    pathways, init, support, query, gates = tiny
    if adapted is not None:
        init = MetaInit(init.weights, init.rates, adapted)
    outer = ALGORITHMS.get(algorithm)
    leaves = {k: w.clone().requires_grad_() for k, w in [*init.weights.items(), ("rates", init.rates)]}
    start = MetaInit({k: leaves[k] for k in init.weights}, leaves["rates"], init.adapted)
    gradients = torch.autograd.grad(outer(pathways, start, support, query, gates)[0], list(leaves.values()))
    found, expected = [], []
    for _ in range(4):
        direction = {k: torch.randn_like(leaf) for k, leaf in leaves.items()}
        found.append(sum((g * d).sum() for g, d in zip(gradients, direction.values(), strict=True)))
        ends = [outer(pathways, moved(init, direction, d), support, query, gates)[1] for d in (1e-6, -1e-6)]
        expected.append((ends[0] - ends[1]) / 2e-6)
    return torch.stack(found), torch.stack(expected)


def test_mamls_gradient_is_that_of_the_query_loss_after_adaptation(tiny):
    found, expected = slopes(tiny, "maml")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_anils_gradient_is_that_of_the_query_loss_after_adapting_the_head(tiny):
    found, expected = slopes(tiny, "anil", torch.tensor([False, False, True]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_fomamls_gradient_leaves_the_curvature_out(tiny):
    found, expected = slopes(tiny, "fomaml")
    assert found.isfinite().all()
    assert ((found - expected).abs() > 0.1 * expected.abs()).any()


def test_fomamls_gradient_is_the_mean_gradient_at_the_adapted_weights(tiny):
    pathways, init, support, query, gates = tiny
    start = MetaInit({k: w.clone().requires_grad_() for k, w in init.weights.items()}, init.rates, init.adapted)
    objective, loss = ALGORITHMS.get("fomaml")(pathways, start, support, query, gates)
    objective.backward()
    ends = {k: w.requires_grad_() for k, w in adapt(pathways, init, support, gates).items()}
    at_ends = user_loss(pathways.logits(query.frozen, ends, gates), query).mean()
    at_ends.backward()
    torch.testing.assert_close(loss, at_ends.detach())
    for key, end in ends.items():
        torch.testing.assert_close(start.weights[key].grad, end.grad.sum(0))


def test_reptiles_gradient_is_the_start_minus_the_mean_end(tiny):
    pathways, init, support, query, gates = tiny
    start = MetaInit({k: w.clone().requires_grad_() for k, w in init.weights.items()}, init.rates, init.adapted)
    ALGORITHMS.get("reptile")(pathways, start, support, query, gates)[0].backward()
    ends = adapt(pathways, init, Batch.joined(support, query), gates)
    for p, keys in pathways.keys.items():
        for key in keys:
            expected = init.weights[key] - ends[key][gates[:, p]].mean(0)
            torch.testing.assert_close(start.weights[key].grad, expected)
            assert expected.abs().max() > 1e-4


def test_a_pathway_that_nobody_had_on_is_not_meta_trained(tiny):
    pathways, init, support, query, _ = tiny
    gates = torch.tensor([[False, True, False], [False, True, True]])
    for algorithm in FOUR:
        start = MetaInit({k: w.clone().requires_grad_() for k, w in init.weights.items()}, init.rates, init.adapted)
        ALGORITHMS.get(algorithm)(pathways, start, support, query, gates)[0].backward()
        reached = {p for p, keys in pathways.keys.items() for key in keys if start.weights[key].grad is not None}
        assert reached == {1, 2}, algorithm


@pytest.mark.parametrize("algorithm", FOUR)
def test_only_anil_restricts_the_inner_loop_and_to_the_head(pathways, batches, algorithm):
    init = lively_init(pathways)
    init = MetaInit(init.weights, init.rates, adapted_pathways(algorithm, pathways))
    weights = adapt(pathways, init, batches[0], everything_on(12, pathways))
    moved = {key.rsplit(".", 1)[0] for key, w in weights.items() if not torch.equal(w, init.weights[key].expand_as(w))}
    assert moved == ({"head"} if algorithm == "anil" else set(pathways.names))


def test_anils_shared_adapters_are_used_as_they_are(pathways, batches):
    init, on = lively_init(pathways), everything_on(12, pathways)
    head_only = MetaInit(init.weights, init.rates, adapted_pathways("anil", pathways))
    off = on.clone()
    off[:, :-1] = False
    with_adapters = measure(pathways, adapt(pathways, head_only, batches[0], on), on, batches[1])[1]
    without = measure(pathways, adapt(pathways, head_only, batches[0], off), off, batches[1])[1]
    assert ((with_adapters - without).abs() > 1e-4).all()

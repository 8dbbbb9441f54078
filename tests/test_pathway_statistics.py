"""Statistics of pathways on the digits in miniature: what they show, of whom, and that nobody else matters."""

import numpy as np
import pytest
import torch
from varied import changed, ragged, random_masks

from backbones.pathways import make_pathways
from envs.oracles import LiveOracle
from envs.statistics import NAMES, STANDARDISED, PathwayStatistics
from meta.inner import MetaInit, stacked, user_loss
from users.batch import Prepared, stack


def fitted(live):
    return PathwayStatistics.fit(live.pathways, live.init, live.batch("train", "support"))


def test_statistics_have_one_finite_row_per_pathway(digits):
    users, pathways = len(digits.user_ids), len(digits.pathways)
    assert digits.statistics.shape == (users, pathways, len(NAMES))
    assert np.isfinite(digits.statistics).all()
    assert np.isfinite(digits.embeddings).all()


def test_statistics_are_standardised_on_train_users(live):
    statistics = fitted(live)
    raw = statistics.raw(live.batch("train", "support"))
    # Clipping would shift the mean a little.
    values = ((statistics._transformed(raw) - statistics.mean) / statistics.scale).numpy()
    np.testing.assert_allclose(values.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(values.std(0), 1, atol=1e-2)


def test_the_observed_statistics_are_close_to_standardised(digits):
    shown = digits.statistics[digits.users("train")][..., :STANDARDISED]
    assert np.abs(shown.mean(0)).max() < 0.2


def test_raw_columns_are_depth_cost_and_gate(digits, live):
    depth, cost, gate = np.moveaxis(digits.statistics[..., -3:], -1, 0)
    pathways = len(digits.pathways)
    np.testing.assert_allclose(depth, np.broadcast_to(np.linspace(0, 1, pathways), depth.shape), atol=1e-6)
    np.testing.assert_allclose(cost, np.broadcast_to(live.costs.own, cost.shape), atol=1e-6)
    assert (gate == 1).all()


@pytest.mark.parametrize(("part", "moves"), [("support", True), ("validation", False), ("query", False)])
def test_observations_depend_on_the_support_alone(live, part, moves):
    other = LiveOracle(Prepared(live.pathways, changed(live.population, part, scale=0.5)), live.init)
    shown = [fitted(live).observe(fitted(live).raw(o.batch("test", "support"))) for o in (live, other)]
    assert torch.equal(*shown) != moves


def test_the_statistics_of_a_round_are_at_its_weights_and_mask(digits, live):
    statistics = PathwayStatistics.fit(live.pathways, live.init, live.batch("train", "support"))
    users, plans = digits.users("val")[:2], random_masks(2, len(digits.pathways))[:, None]
    found = digits.observe(users, plans)
    weights = live.adapted(users, plans)
    gates = torch.from_numpy(plans[:, -1])
    support = live.batch("val", "support").rows(torch.arange(2))
    expected = statistics.observe(statistics.raw(support, weights, gates), gates).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert (found[..., : STANDARDISED - 2] != digits.statistics[users][..., : STANDARDISED - 2]).any()
    np.testing.assert_array_equal(found[..., NAMES.index("gate")], plans[:, -1])


def test_statistics_of_a_user_are_the_same_alone_or_in_a_batch(live):
    statistics, support = fitted(live), live.batch("test", "support")
    together = statistics.observe(statistics.raw(support))
    for row in range(len(support)):
        alone = statistics.observe(statistics.raw(support.rows(torch.tensor([row]))))
        np.testing.assert_allclose(alone[0], together[row], atol=2e-3)


def test_statistics_hold_gradients_whoever_asks(live):
    """Users of an open-ended population are observed when a policy is asked, which may be under no_grad."""
    statistics, support = fitted(live), live.batch("test", "support")
    expected = statistics.observe(statistics.raw(support))
    with torch.no_grad():
        found = statistics.observe(statistics.raw(support))
    assert torch.equal(found, expected) and not found.requires_grad
    assert (statistics.raw(support).gradient_norm > 0).all()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 20])
def test_statistics_of_a_user_with_few_examples_are_finite_and_do_not_depend_on_padding(live, size):
    statistics = fitted(live)
    population = ragged(live.population, [size, 20])
    both, alone = (stack(live.pathways, population.test[:n], "support") for n in (2, 1))
    one, other = (statistics.raw(batch) for batch in (alone, both))
    for name in vars(one):
        assert getattr(other, name).isfinite().all(), name
        np.testing.assert_allclose(getattr(one, name)[0].log1p(), getattr(other, name)[0].log1p(), atol=1e-3, err_msg=name)


def test_the_gradient_norm_is_that_of_the_mean_support_loss(live):
    """Dealing the support into parts must not change the gradient of the whole."""
    support = live.batch("val", "support").rows(torch.tensor([2]))
    weights = {k: w.detach().clone().requires_grad_() for k, w in stacked(live.init, 1).items()}
    gates = torch.ones(1, live.pathways.num_pathways, dtype=torch.bool)
    user_loss(live.pathways.logits(support.frozen, weights, gates), support).sum().backward()
    found = fitted(live).raw(support).gradient_norm[0]
    for p, keys in live.pathways.keys.items():
        norm = torch.cat([weights[k].grad.flatten() for k in keys]).norm() / live.pathways.sizes[p] ** 0.5
        assert float(found[p]) == pytest.approx(float(norm), rel=1e-3)


def test_another_number_of_pathways_gives_as_many_rows(live):
    wider = make_pathways("inline", live.pathways.model, rank=2)
    assert wider.num_pathways == live.pathways.num_pathways
    init = MetaInit(wider.start(0), torch.full((2, wider.num_pathways), 0.1), torch.ones(wider.num_pathways).bool())
    oracle = LiveOracle(Prepared(wider, live.population), init)
    assert fitted(oracle).raw(oracle.batch("val", "support")).gradient_norm.shape == (4, wider.num_pathways)

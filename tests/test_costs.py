"""What masks cost, by hand and in the mean of independent bits."""

import itertools

import numpy as np
import pytest
import torch

from backbones.costs import CostModel


@pytest.fixture
def costs():
    """Two stretches that cost 2 and 4, two pathways that need one and both, and 1 that always runs."""
    return CostModel(torch.tensor([0.5, 0.25]).double(), torch.tensor([2.0, 4.0]).double(), torch.tensor([1, 2]), 1.0, 8.0)


def test_a_mask_pays_for_its_pathways_and_for_the_stretches_up_to_the_deepest(costs):
    masks = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], dtype=bool)
    np.testing.assert_allclose(costs.of(masks), [1 + 8, 1 + 0.5 + 2, 1 + 0.25 + 2 + 4, 1 + 0.75 + 2 + 4])
    np.testing.assert_allclose(costs.alone, [3.5, 7.25])


def test_of_probabilities_it_is_the_mean_over_masks(costs):
    chance = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)
    masks = torch.tensor([*itertools.product([0.0, 1.0], repeat=2)], dtype=torch.float64)
    weights = (masks * chance + (1 - masks) * (1 - chance)).prod(1)
    expected = (weights * costs(masks)).sum()
    torch.testing.assert_close(costs(chance), expected)
    mine, theirs = (torch.autograd.grad(value, chance)[0] for value in (costs(chance), expected))
    torch.testing.assert_close(mine, theirs)


def test_shares_are_of_everything_on(costs):
    shares = costs.scaled()
    masks = np.array([[0, 0], [1, 0], [1, 1]], dtype=bool)
    np.testing.assert_allclose(shares.of(masks), costs.of(masks) / 7.75)


def test_the_probability_of_a_mean_cost_is_found():
    costs = CostModel.of_pathways(np.array([0.5, 0.3, 0.2]))
    assert costs.probability(0.37) == pytest.approx(0.37)
    deep = CostModel(torch.zeros(3).double(), torch.tensor([1.0]).double(), torch.tensor([1, 1, 1]))
    assert deep.probability(0.5) == pytest.approx(1 - 0.5 ** (1 / 3))


def test_nothing_is_lost_on_disk(costs):
    again = CostModel.from_tensors(costs.tensors())
    masks = np.array([[0, 0], [0, 1], [1, 1]], dtype=bool)
    np.testing.assert_array_equal(again.of(masks), costs.of(masks))


def test_of_two_probabilities_of_a_cost_it_is_the_one_with_more_on():
    costs = CostModel(torch.zeros(3).double(), torch.ones(3).double(), torch.tensor([1, 2, 3]), 0.0, 3.0).scaled()
    found = costs.probability(0.9)
    assert float(costs(torch.full((3,), found).double())) == pytest.approx(0.9)
    assert float(costs(torch.full((3,), 0.02).double())) > 0.9 > float(costs(torch.full((3,), found - 0.05).double()))
    cheapest = costs.probability(0.0)
    around = [float(costs(torch.full((3,), p).double())) for p in (cheapest - 0.05, cheapest, cheapest + 0.05)]
    assert around[1] == min(around)

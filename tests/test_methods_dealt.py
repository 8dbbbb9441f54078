"""Masks like the policy's that are nobody's own: random bits at its cost, and its masks shuffled among users."""

import pytest
import torch

from eval.methods import make_method
from eval.methods.base import Fitted


@pytest.fixture
def policy_masks(digits_world):
    """What a policy may have chosen for 40 others: one of three masks."""
    kinds = torch.tensor([[1, 0, 0, 0, 0, 0, 1], [0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1]], dtype=torch.bool)
    return Fitted({"masks": kinds[torch.arange(40) % 3]})


def drawn(name, world, fitted, draws=40):
    shown = world.group("train", "support")
    return torch.cat([make_method(name, draw=n).choose(world, fitted, shown, 0.1) for n in range(draws)])


def test_shuffled_masks_are_the_policys_own_as_often(digits_world, policy_masks):
    masks = drawn("shuffled", digits_world, policy_masks)
    kinds, counts = masks.unique(dim=0, return_counts=True)
    assert {tuple(kind) for kind in kinds.tolist()} == {tuple(kind) for kind in policy_masks.tensors["masks"].tolist()}
    assert (counts / len(masks)).min() > 0.25


def test_random_masks_cost_what_the_policys_do(digits_world, policy_masks):
    costs = digits_world.pathways.costs
    wanted = costs(policy_masks.tensors["masks"]).mean()
    masks = drawn("random", digits_world, policy_masks, draws=200)
    assert costs(masks).mean() == pytest.approx(float(wanted), abs=0.02)
    assert masks.float().mean(0).std() < 0.03  # every bit with the same probability


def test_a_users_draw_does_not_depend_on_the_others(digits_world, policy_masks):
    shown = digits_world.group("train", "support")
    for name in ("random", "shuffled"):
        everybody = make_method(name, draw=3).choose(digits_world, policy_masks, shown, 0.1)
        some = make_method(name, draw=3).choose(digits_world, policy_masks, shown.rows([4, 2]), 0.1)
        assert torch.equal(some, everybody[[4, 2]])


def test_the_masks_are_those_of_the_trained_policy(digits_world, monkeypatch):
    monkeypatch.setattr("eval.methods.dealt.settings_for", lambda *args: {"total_timesteps": 128})
    policy = make_method("ppo", total_timesteps=128)
    support = digits_world.group("val", "support")
    own = policy.choose(digits_world, policy.fit(digits_world, 0.1), support, 0.1)
    for name in ("random", "shuffled"):
        assert torch.equal(make_method(name).fit(digits_world, 0.1).tensors["masks"], own)

"""The planted problem: what is said to be known about it is true."""

import gymnasium as gym
import numpy as np
import pytest

from envs.oracles import all_masks
from envs.planted import PATHWAYS, planted

MASKS = all_masks(PATHWAYS)
COST_WEIGHT = 0.1
SEEDS = range(5)


def rewards(scenario, users, cost_weight):
    """``[users, masks]``."""
    outcome = scenario.oracle.evaluate(np.repeat(users, len(MASKS)), np.tile(MASKS, (len(users), 1)))
    return outcome.reward(cost_weight).reshape(len(users), len(MASKS))


def best_masks(scenario, users):
    return np.array([[int(bit) for bit in scenario.user_info[u]["best_mask"]] for u in users], dtype=bool)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_best_mask_is_the_only_argmax_over_all_masks(seed):
    scenario = planted(seed)
    users = np.random.default_rng(seed).choice(len(scenario.user_ids), 20, replace=False)
    table = rewards(scenario, users, COST_WEIGHT)
    np.testing.assert_array_equal(MASKS[table.argmax(1)], best_masks(scenario, users))
    assert ((table == table.max(1, keepdims=True)).sum(1) == 1).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_optimum_is_one_minus_half_the_cost_weight_on_average(seed, split):
    scenario = planted(seed)
    optimum = rewards(scenario, scenario.users(split), COST_WEIGHT).max(1).mean()
    assert optimum == pytest.approx(1 - COST_WEIGHT / 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_best_static_mask_earns_at_most_sixty_percent_of_the_optimum(seed):
    scenario = planted(seed)
    table = rewards(scenario, scenario.users("train"), COST_WEIGHT)
    assert table.mean(0).max() <= 0.6 * table.max(1).mean()


def test_users_come_in_pairs_of_opposite_needs_within_a_split():
    scenario = planted(3)
    for split in ("train", "val", "test"):
        best = best_masks(scenario, scenario.users(split))
        np.testing.assert_array_equal(best[::2], ~best[1::2])


def test_users_need_different_masks():
    scenario = planted()
    assert len(np.unique(best_masks(scenario, np.arange(400)), axis=0)) > 20


def test_an_optimal_episode_earns_the_optimum_in_the_environment():
    env = gym.make("dsa/Planted-v0", cost_weight=0.4)
    for _ in range(10):
        _, info = env.reset()
        best = np.array([int(bit) for bit in info["best_mask"]], dtype=np.int8)
        assert env.step(best)[1] == pytest.approx(1 - 0.4 * best.mean())
        env.reset(options={"user": info["user"]})
        assert env.step(1 - best)[1] == pytest.approx(-0.4 * (1 - best.mean()))


def test_the_needs_can_be_read_from_the_observation():
    scenario = planted()
    read = scenario.statistics[..., 0] > 0
    assert (read == best_masks(scenario, np.arange(400))).mean() > 0.95


def test_seeds_make_different_problems_and_the_same_seed_the_same():
    assert np.array_equal(planted(1).embeddings, planted(1).embeddings)
    assert not np.array_equal(planted(1).embeddings, planted(2).embeddings)

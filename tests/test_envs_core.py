"""The core under the shells: its errors, its users, and its state."""

import gymnasium as gym
import numpy as np
import pytest
from varied import SLOTS, WIDTH, random_masks

from envs.core import PathwaySelection
from envs.planted import PlantedEnv, planted
from envs.scenario import load_scenario


def core(**kwargs):
    settings = {"split": "train", "cost_weight": 0.1, "rounds": 1, "slots": 3, **kwargs}
    return PathwaySelection(planted(), **settings)


def started(**kwargs):
    made = core(**kwargs)
    for slot in range(len(made.users)):
        made.seed(slot, 100 + slot)
    made.reset(np.arange(len(made.users)))
    return made


# Errors: each names the cause and the cure.


@pytest.mark.parametrize("bits", [0, 7, 9])
def test_a_mask_of_the_wrong_length_is_refused(bits):
    env = gym.make("dsa/Planted-v0").unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match=f"8 bits, one per pathway; got an action of shape .{bits},"):
        env.step(np.zeros(bits, dtype=np.int8))


def test_a_scalar_action_is_refused():
    env = gym.make("dsa/Planted-v0").unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match="8 bits"):
        env.step(1)


@pytest.mark.parametrize("value", [0.5, -1, 2, float("nan"), float("inf"), "1", None])
def test_a_mask_with_other_values_than_bits_is_refused(value):
    env = gym.make("dsa/Planted-v0").unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match="only 0 and 1"):
        env.step([value] * WIDTH)


def test_the_refusal_shows_the_value_that_is_wrong():
    env = gym.make("dsa/Planted-v0").unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"0\.5"):
        env.step([0.0] * (WIDTH - 1) + [0.5])


@pytest.mark.parametrize("kind", [bool, np.int8, np.int64, np.float32])
def test_bits_of_any_numeric_type_are_taken(kind):
    env = gym.make("dsa/Planted-v0").unwrapped
    env.reset(seed=0)
    mask = random_masks(1)[0]
    assert env.step(mask.astype(kind))[4]["mask"].tolist() == mask.astype(int).tolist()


def test_a_refused_action_leaves_the_episode_as_it_was():
    first, second = started(), started()
    with pytest.raises(ValueError, match="only 0 and 1"):
        first.step(SLOTS, np.full((3, WIDTH), 0.5))
    assert first.state() == second.state()


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_an_impossible_cost_weight_is_refused(weight):
    with pytest.raises(ValueError, match="cost_weight must be"):
        gym.make("dsa/Planted-v0", cost_weight=weight)


@pytest.mark.parametrize("rounds", [0, -1, 1.5])
def test_an_impossible_number_of_rounds_is_refused(rounds):
    with pytest.raises(ValueError, match="whole number of at least 1"):
        gym.make("dsa/Planted-v0", rounds=rounds)


def test_no_slots_are_refused():
    with pytest.raises(ValueError, match="at least one user at a time"):
        core(slots=0)


def test_an_unknown_split_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown split 'validation'; choose from train, val, test"):
        gym.make("dsa/Planted-v0", split="validation")


def test_an_unknown_render_mode_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown render_mode 'humn'; choose from ansi, rgb_array"):
        PlantedEnv("planted", render_mode="humn")


def test_a_step_after_the_end_is_refused():
    env = gym.make("dsa/Planted-v0").unwrapped
    env.reset(seed=0)
    env.step(np.zeros(WIDTH, dtype=np.int8))
    with pytest.raises(RuntimeError, match=r"episode is over; call reset\(\)"):
        env.step(np.zeros(WIDTH, dtype=np.int8))


@pytest.mark.parametrize("user", ["nobody", 400, -1])
def test_an_unknown_user_is_refused(user):
    env = gym.make("dsa/Planted-v0")
    with pytest.raises(ValueError, match=f"no user .*{user}"):
        env.reset(seed=0, options={"user": user})


def test_an_unknown_scenario_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match=r"unknown scenario 'plantd'\. Did you mean 'planted'"):
        load_scenario("plantd")


@pytest.mark.parametrize("users", [0, 12, -8])
def test_a_planted_population_of_impossible_size_is_refused(users):
    with pytest.raises(ValueError, match="multiple of 8"):
        planted(users=users)


# Users and state.


@pytest.mark.parametrize("asked", ["user-7", 7])
def test_a_user_can_be_asked_for_by_id_and_by_position(asked):
    env = gym.make("dsa/Planted-v0")
    observation, info = env.reset(seed=0, options={"user": asked})
    assert info["user"] == "user-7"
    np.testing.assert_array_equal(observation["user"], env.unwrapped.core.scenario.embeddings[7])


def test_asking_for_a_user_takes_no_place_in_the_sequence():
    env = gym.make("dsa/Planted-v0")
    order = [env.reset(seed=5)[1]["user"], env.reset()[1]["user"]]
    assert env.reset(seed=5)[1]["user"] == order[0]
    env.reset(options={"user": "user-7"})
    assert env.reset()[1]["user"] == order[1]


def test_restoring_a_state_goes_on_exactly():
    first, second = started(rounds=3, slots=3), core(rounds=3, slots=3)
    masks = random_masks(3 * 12).reshape(12, 3, WIDTH)
    first.step(SLOTS, masks[0])
    first.step(SLOTS[:1], masks[1][:1])
    second.restore(first.state())
    assert second.state() == first.state()
    for actions in masks[2:]:
        over = np.flatnonzero(first.done >= 3)
        assert first.reset(over) == second.reset(over)
        np.testing.assert_equal(first.observe(SLOTS), second.observe(SLOTS))
        one, other = first.step(SLOTS, actions), second.step(SLOTS, actions)
        np.testing.assert_array_equal(one.rewards, other.rewards)
        np.testing.assert_equal(one.infos, other.infos)
    assert second.state() == first.state()


def test_a_states_rewards_depend_on_what_was_earned_before():
    first, second = started(rounds=2), core(rounds=2)
    first.step(SLOTS, random_masks(3))
    second.restore({**first.state(), "earned": [0.0] * 3})
    rewards = [c.step(SLOTS, random_masks(3, seed=1)).rewards for c in (first, second)]
    assert (rewards[0] != rewards[1]).any()


def test_slots_out_of_step_are_answered_as_if_alone():
    mixed, alone = started(rounds=3), started(rounds=3)
    masks = random_masks(6).reshape(2, 3, WIDTH)
    mixed.step(SLOTS[:1], masks[0][:1])
    mixed_rewards = mixed.step(SLOTS, masks[1]).rewards
    alone.step(SLOTS[:1], masks[0][:1])
    expected = [alone.step(SLOTS[s : s + 1], masks[1][s : s + 1]).rewards[0] for s in SLOTS]
    np.testing.assert_allclose(mixed_rewards, expected, atol=1e-14)

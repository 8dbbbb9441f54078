"""What every registered environment must satisfy. Registering an id is enough for it to be tested here."""

import inspect
import json
import pickle
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import envs
from envs.scenario import SCENARIOS
from envs.single import PathwaySelectionEnv

IDS = [env_id for env_id in gym.registry if env_id.startswith("dsa/")]
STEP_KEYS = {
    "user",
    "accuracy",
    "loss",
    "cost",
    "active_fraction",
    "mask",
    "reward_accuracy",
    "reward_cost",
}
HEADINGS = [
    "## Description",
    "## Observation space",
    "## Action space",
    "## Rewards",
    "## Starting state",
    "## Episode end",
    "## Arguments",
    "## Versions",
]

pytestmark = pytest.mark.parametrize("env_id", IDS)


def make(env_id, **kwargs):
    return gym.make(env_id, **{**envs.MINIATURES.get(env_id, {}), **kwargs})


def actions_for(env, count, seed=0):
    return np.random.default_rng(seed).integers(0, 2, (count, env.action_space.n)).astype(np.int8)


def episodes(env, actions, seed=None):
    """Everything that resets and steps give, as comparable tuples."""
    seen = [env.reset(seed=seed)]
    for action in actions:
        seen.append(env.step(action))
        if seen[-1][2]:
            seen.append(env.reset())
    return seen


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_equal(one, other)


def user_order(env, count, seed):
    users = [env.reset(seed=seed)[1]["user"]]
    return users + [env.reset()[1]["user"] for _ in range(count - 1)]


def constructor_arguments(env_id):
    """Names of what ``gym.make(env_id, ...)`` takes: the shell's arguments and the scenario builder's."""
    module, function = SCENARIOS.get(gym.spec(env_id).kwargs["scenario"]).split(":")
    builder = getattr(__import__(module, fromlist=[function]), function)
    shell = inspect.signature(PathwaySelectionEnv.__init__).parameters
    return ({*shell} | {*inspect.signature(builder).parameters}) - {"self", "scenario", "scenario_kwargs"}


def test_gymnasium_checker_has_no_complaint(env_id):
    gymnasium_check_env(make(env_id).unwrapped)


# `pathways` is a matrix on purpose, one row per pathway; the gating policy reads it as such.
@pytest.mark.filterwarnings("ignore:Your observation pathways has an unconventional shape:UserWarning")
def test_sb3_checker_has_no_complaint(env_id):
    sb3_check_env(make(env_id).unwrapped)


def test_equal_seeds_give_equal_episodes(env_id):
    env = make(env_id)
    actions = actions_for(env, 50)
    assert_same(episodes(env, actions, seed=3), episodes(make(env_id), actions, seed=3))


def test_seeding_again_starts_the_same_sequence_of_users_again(env_id):
    env = make(env_id)
    assert user_order(env, 8, seed=5) == user_order(env, 8, seed=5)


def test_different_seeds_give_different_user_orders(env_id):
    env = make(env_id)
    assert user_order(env, 8, seed=0) != user_order(env, 8, seed=1)


def test_unseeded_environments_draw_their_own_order(env_id):
    assert user_order(make(env_id), 10, seed=None) != user_order(make(env_id), 10, seed=None)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_user_of_the_split_is_seen_once_before_anyone_twice(env_id, split):
    env = make(env_id, split=split)
    scenario = env.unwrapped.core.scenario
    everyone = sorted(scenario.user_ids[u] for u in scenario.users(split))
    seen = user_order(env, 2 * len(everyone), seed=1)
    assert sorted(seen[: len(everyone)]) == everyone
    assert sorted(seen[len(everyone) :]) == everyone
    assert seen[: len(everyone)] != seen[len(everyone) :]


def test_splits_share_no_user(env_id):
    scenario = make(env_id).unwrapped.core.scenario
    users = np.concatenate([scenario.users(split) for split in ("train", "val", "test")])
    assert len(np.unique(users)) == len(users) == len(scenario.user_ids) == len(set(scenario.user_ids))


def test_a_pickled_environment_goes_on_with_equal_steps(env_id):
    env = make(env_id, cost_weight=0.3, rounds=2)
    copy = pickle.loads(pickle.dumps(env))
    actions = actions_for(env, 12)
    assert_same(episodes(env, actions, seed=4), episodes(copy, actions, seed=4))


def test_the_spec_survives_json(env_id):
    env = make(env_id, cost_weight=0.25)
    spec = EnvSpec.from_json(env.spec.to_json())
    assert spec == env.spec
    actions = actions_for(env, 3)
    assert_same(episodes(gym.make(spec), actions, seed=2), episodes(env, actions, seed=2))


def test_render_ansi_names_pathways_and_users(env_id):
    env = make(env_id, render_mode="ansi")
    user = env.reset(seed=0)[1]["user"]
    env.step(actions_for(env, 1)[0])
    text = env.render()
    assert isinstance(text, str)
    assert user in text
    assert all(name in text for name in env.unwrapped.core.scenario.pathways)


def test_render_ansi_distinguishes_on_from_off(env_id):
    texts = []
    for bit in (0, 1):
        env = make(env_id, render_mode="ansi")
        env.reset(seed=0)
        env.step(np.full(env.action_space.n, bit, dtype=np.int8))
        texts.append(env.render())
    assert texts[0] != texts[1]


def test_render_rgb_array_is_an_image_that_changes_with_the_mask(env_id):
    env = make(env_id, render_mode="rgb_array")
    env.reset(seed=0)
    before = env.render()
    env.step(np.ones(env.action_space.n, dtype=np.int8))
    after = env.render()
    for image in (before, after):
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3
    assert (before != after).any()


def test_render_without_a_mode_warns(env_id):
    env = make(env_id).unwrapped
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="render_mode"):
        assert env.render() is None


def test_closing_twice_is_harmless(env_id):
    env = make(env_id)
    env.reset(seed=0)
    env.close()
    env.close()


def test_one_step_episodes_end_terminated_and_never_truncated(env_id):
    env = make(env_id)
    env.reset(seed=0)
    _, reward, terminated, truncated, _ = env.step(actions_for(env, 1)[0])
    assert type(reward) is float
    assert terminated is True
    assert truncated is False


def test_three_rounds_end_after_three_and_their_rewards_sum_to_the_value_of_the_last_mask(env_id):
    env = make(env_id, rounds=3, cost_weight=0.2)
    for episode in range(3):
        env.reset(seed=episode)
        steps = [env.step(action) for action in actions_for(env, 3, seed=episode)]
        assert [step[2] for step in steps] == [False, False, True]
        assert not any(step[3] for step in steps)
        last = steps[-1][4]
        value = last["accuracy"] - 0.2 * last["cost"]
        assert sum(step[1] for step in steps) == pytest.approx(value, abs=1e-12)
        assert last["mask"].tolist() == actions_for(env, 3, seed=episode)[-1].tolist()


def test_several_rounds_show_the_gates_that_were_chosen(env_id):
    env = make(env_id, rounds=2)
    env.reset(seed=0)
    action = actions_for(env, 1)[0]
    observation = env.step(action)[0]
    np.testing.assert_array_equal(observation["pathways"][:, -1], action)


def test_the_reward_is_accuracy_minus_weighted_cost(env_id):
    env = make(env_id, cost_weight=0.7)
    for action in actions_for(env, 10):
        env.reset()
        _, reward, _, _, info = env.step(action)
        assert reward == pytest.approx(info["accuracy"] - 0.7 * info["cost"], abs=1e-12)
        assert reward == pytest.approx(info["reward_accuracy"] + info["reward_cost"], abs=1e-12)
        assert info["active_fraction"] == pytest.approx(action.mean())
        assert 0 <= info["accuracy"] <= 1


def test_info_has_its_keys_and_is_jsonable(env_id):
    env = make(env_id)
    _, before = env.reset(seed=0)
    action = actions_for(env, 1)[0]
    _, _, _, _, after = env.step(action)
    assert "user" in before
    assert {*after} >= STEP_KEYS | {*before}
    assert {key: after[key] for key in before} == before
    listed = {**after, "mask": after["mask"].tolist()}
    assert json.loads(json.dumps(listed)) == listed
    assert listed["mask"] == action.tolist()


def test_observations_lie_within_their_space(env_id):
    env = make(env_id, rounds=2)
    for step in episodes(env, actions_for(env, 20), seed=0):
        assert env.observation_space.contains(step[0])
        assert all(np.isfinite(part).all() for part in step[0].values())


def test_the_observation_is_user_and_pathways_and_nothing_else(env_id):
    env = make(env_id)
    observation, _ = env.reset(seed=0)
    assert {*observation} == {*env.observation_space.spaces} == {"user", "pathways"}
    assert observation["user"].shape == (32,)
    assert observation["pathways"].shape[0] == env.action_space.n


def test_returned_observations_and_infos_are_the_callers_own(env_id):
    env = make(env_id)
    scenario = env.unwrapped.core.scenario
    user = scenario.user_ids[scenario.users("train")[0]]
    observation, info = env.reset(seed=0, options={"user": user})
    kept = {name: part.copy() for name, part in observation.items()}
    for part in observation.values():
        part[...] = 99
    info.clear()
    again, told = env.reset(options={"user": user})
    np.testing.assert_equal(again, kept)
    assert told["user"] == user


def test_the_docstring_has_the_fixed_headings_in_order(env_id):
    lines = [line.strip() for line in inspect.getdoc(type(make(env_id).unwrapped)).splitlines()]
    assert [line for line in lines if line.startswith("## ")] == HEADINGS


def test_the_docstring_mentions_every_constructor_argument(env_id):
    page = inspect.getdoc(type(make(env_id).unwrapped)).split("## Arguments")[1]
    missing = [name for name in constructor_arguments(env_id) if f"``{name}``" not in page]
    assert missing == []


def test_the_docstring_mentions_every_key_of_info(env_id):
    env = make(env_id)
    env.reset(seed=0)
    info = env.step(actions_for(env, 1)[0])[4]
    page = inspect.getdoc(type(env.unwrapped))
    assert [key for key in info if f"``{key}``" not in page] == []


def test_importing_envs_registers_the_id_without_importing_torch(env_id):
    code = f"import sys, envs, gymnasium; gymnasium.spec({env_id!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

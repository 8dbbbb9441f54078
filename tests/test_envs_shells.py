"""The three shells are one environment: plain Gymnasium, Gymnasium vector, and Stable-Baselines3's VecEnv."""

import pickle
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import load_env_creator
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecMonitor

import envs
from envs.oracles import Oracle
from envs.sb3 import PathwaySelectionVecEnv, make_sb3
from envs.scenario import load_scenario
from envs.vector import PathwaySelectionVectorEnv

IDS = [env_id for env_id in gym.registry if env_id.startswith("dsa/")]
PLAYED = [
    (env_id, rounds)
    for env_id in IDS
    for rounds in ((1, 2) if load_env_creator(gym.spec(env_id).entry_point).several_rounds else (1,))
]
pytestmark = pytest.mark.usefixtures("real_data")
SEED, SLOTS = 11, 3
ATOL = 1e-5
"""Stable-Baselines3 takes rewards as float32."""
OBSERVED = 100
"""By how much more statistics may differ: standardised float32 gradients, which batches of another size move by up to 1e-4."""
SHELLS = [PathwaySelectionVectorEnv, PathwaySelectionVecEnv]

each_id = pytest.mark.parametrize("env_id", IDS)
each_number_of_rounds = pytest.mark.parametrize(("env_id", "rounds"), PLAYED)


class CountingOracle(Oracle):
    """Notes the size of every call."""

    def __init__(self, inner):
        self.inner, self.costs, self.calls = inner, inner.costs, []

    def measure(self, users, plans, roles):
        self.calls.append(len(users))
        return self.inner.measure(users, plans, roles)


def miniature(env_id):
    return envs.MINIATURES.get(env_id, {})


def batched(env_id, **kwargs):
    mode = "vector_entry_point"
    return gym.make_vec(env_id, num_envs=SLOTS, vectorization_mode=mode, **miniature(env_id), **kwargs)


def synchronous(env_id, **kwargs):
    same = {"autoreset_mode": AutoresetMode.SAME_STEP}
    args = {**miniature(env_id), **kwargs}
    return gym.make_vec(env_id, num_envs=SLOTS, vectorization_mode="sync", vector_kwargs=same, **args)


def single(env_id, **kwargs):
    return gym.make(env_id, **miniature(env_id), **kwargs)


def actions_for(space, count, slots=SLOTS):
    return np.random.default_rng(0).integers(0, 2, (count, slots, space.n)).astype(np.int8)


def counted_planted():
    scenario = load_scenario("planted", users=64)
    oracle = CountingOracle(scenario.oracle)
    return replace(scenario, oracle=oracle), oracle


def assert_equal(first, second, atol=0.0):
    """Equal dictionaries, tuples and arrays of whatever depth; floats up to ``atol``, observations up to its hundredfold."""
    if isinstance(first, dict):
        assert {*first} == {*second}
        for key, value in first.items():
            assert_equal(value, second[key], atol)
    elif isinstance(first, list | tuple) or (isinstance(first, np.ndarray) and first.dtype == object):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other, atol)
    elif isinstance(first, np.ndarray | float):
        room = OBSERVED if np.asarray(first).dtype == np.float32 else 1
        np.testing.assert_allclose(first, second, rtol=0, atol=room * atol)
    else:
        assert first == second


@each_number_of_rounds
def test_the_vector_shell_equals_synchronous_single_environments(env_id, rounds):
    mine, theirs = batched(env_id, rounds=rounds), synchronous(env_id, rounds=rounds)
    assert mine.single_observation_space == theirs.single_observation_space
    assert mine.observation_space == theirs.observation_space
    assert mine.action_space == theirs.action_space
    assert_equal(mine.reset(seed=SEED), theirs.reset(seed=SEED))
    # Costs are one matrix product per batch; later rounds compute float32 statistics in batches of another size.
    atol = 1e-14 if rounds == 1 else ATOL
    for actions in actions_for(mine.single_action_space, mine.unwrapped.core.steps + 8):
        assert_equal(mine.step(actions), theirs.step(actions), atol)
    assert_equal(mine.reset(), theirs.reset(), atol)


@pytest.mark.parametrize(("env_id", "rounds"), [*dict(PLAYED).items()])
def test_the_vector_shell_resets_masked_slots_alone(env_id, rounds):
    mine, theirs = batched(env_id, rounds=rounds), synchronous(env_id, rounds=rounds)
    mine.reset(seed=SEED)
    theirs.reset(seed=SEED)
    first, second = actions_for(mine.single_action_space, 2)
    assert_equal(mine.step(first), theirs.step(first), ATOL)
    mask = np.array([True, False, True])
    assert_equal(mine.reset(options={"reset_mask": mask}), theirs.reset(options={"reset_mask": mask.copy()}), ATOL)
    assert_equal(mine.step(second), theirs.step(second), ATOL)


def test_seeds_of_slots_outside_the_reset_mask_are_left_alone():
    mine, theirs = batched("dsa/Planted-v0"), synchronous("dsa/Planted-v0")
    mask = np.array([True, False, False])
    for env in (mine, theirs):
        env.reset(seed=SEED)
        env.reset(seed=3, options={"reset_mask": mask.copy()})
    for actions in actions_for(mine.single_action_space, 3):
        assert_equal(mine.step(actions), theirs.step(actions))


def test_a_list_of_seeds_seeds_each_slot():
    mine, theirs = batched("dsa/Planted-v0"), synchronous("dsa/Planted-v0")
    assert_equal(mine.reset(seed=[5, 1, 9]), theirs.reset(seed=[5, 1, 9]))


def test_a_slot_whose_seed_is_none_goes_on_with_its_sequence():
    mine, theirs = batched("dsa/Planted-v0"), synchronous("dsa/Planted-v0")
    for env in (mine, theirs):
        env.reset(seed=SEED)
    assert_equal(mine.reset(seed=[5, None, None]), theirs.reset(seed=[5, None, None]))


def test_a_list_with_too_few_seeds_is_refused():
    with pytest.raises(ValueError, match="seed"):
        batched("dsa/Planted-v0").reset(seed=[1, 2])


@each_id
def test_the_vector_shell_begins_with_the_user_asked_for(env_id):
    mine, theirs = batched(env_id), synchronous(env_id)
    scenario = mine.unwrapped.core.scenario
    user = scenario.user_ids[scenario.users("train")[-1]]
    results = [env.reset(seed=SEED, options={"user": user}) for env in (mine, theirs)]
    assert results[0][1]["user"].tolist() == [user] * SLOTS
    assert_equal(*results)


def test_the_vector_shell_declares_same_step_autoreset():
    assert batched("dsa/Planted-v0").metadata["autoreset_mode"] is AutoresetMode.SAME_STEP


def test_the_vector_shell_is_what_make_vec_gives_by_default():
    assert isinstance(gym.make_vec("dsa/Planted-v0", num_envs=2).unwrapped, PathwaySelectionVectorEnv)


@each_number_of_rounds
def test_the_sb3_shell_equals_single_environments_seeded_one_after_the_other(env_id, rounds):
    vec = make_sb3(env_id, SLOTS, rounds=rounds, **miniature(env_id))
    alone = [single(env_id, rounds=rounds) for _ in range(SLOTS)]
    vec.seed(SEED)
    observations = vec.reset()
    expected = [env.reset(seed=SEED + i) for i, env in enumerate(alone)]
    for slot, (observation, info) in enumerate(expected):
        assert vec.reset_infos[slot] == info
        assert_equal({k: v[slot] for k, v in observations.items()}, observation, ATOL)
    for actions in actions_for(vec.action_space, vec.core.steps + 7):
        observations, rewards, dones, infos = vec.step(actions)
        for slot, env in enumerate(alone):
            final, reward, terminated, _, info = env.step(actions[slot])
            assert rewards[slot] == pytest.approx(reward, abs=ATOL)
            assert dones[slot] == terminated
            assert_equal(info, {key: infos[slot][key] for key in info}, ATOL)
            now, started = env.reset() if terminated else (final, None)
            assert_equal({k: v[slot] for k, v in observations.items()}, now, ATOL)
            if terminated:
                assert_equal(infos[slot]["terminal_observation"], final, ATOL)
                assert infos[slot]["TimeLimit.truncated"] is False
                assert vec.reset_infos[slot] == started
            else:
                assert "terminal_observation" not in infos[slot]


@each_id
def test_the_terminal_observation_shows_the_user_who_ended_not_the_next(env_id):
    vec = make_sb3(env_id, SLOTS, **miniature(env_id))
    vec.seed(SEED)
    before = vec.reset()
    users = [info["user"] for info in vec.reset_infos]
    for actions in actions_for(vec.action_space, vec.core.steps):
        after, _, dones, infos = vec.step(actions)
    assert dones.all()
    for slot, info in enumerate(infos):
        assert info["user"] == users[slot] != vec.reset_infos[slot]["user"]
        np.testing.assert_array_equal(info["terminal_observation"]["user"], before["user"][slot])
        assert (info["terminal_observation"]["user"] != after["user"][slot]).any()


@pytest.mark.parametrize("rounds", [1, 3])
def test_what_sb3_writes_into_returned_arrays_does_not_reach_the_environment(rounds):
    touched, left = (make_sb3("dsa/Planted-v0", SLOTS, rounds=rounds) for _ in range(2))
    for vec in (touched, left):
        vec.seed(SEED)
    spoil(touched.reset())
    left.reset()
    for actions in actions_for(left.action_space, 6):
        observations, rewards, dones, infos = touched.step(actions.copy())
        expected = left.step(actions)
        assert_equal([observations, rewards, dones, infos], list(expected))
        spoil(observations)
        rewards += 100
        dones[:] = ~dones
        for info in infos:
            info["mask"][:] = 7
            spoil(info.get("terminal_observation", {}))


def spoil(observation):
    for part in observation.values():
        part[...] = -99


def test_the_sb3_shell_returns_what_sb3_expects():
    vec = make_sb3("dsa/Planted-v0", SLOTS)
    vec.reset()
    observations, rewards, dones, infos = vec.step(actions_for(vec.action_space, 1)[0])
    assert observations["user"].dtype == observations["pathways"].dtype == np.float32
    assert rewards.dtype == np.float32
    assert rewards.shape == (SLOTS,)
    assert dones.dtype == bool
    assert isinstance(infos, list)
    assert all(type(info) is dict for info in infos)
    assert vec.env_is_wrapped(VecMonitor) == [False] * SLOTS
    assert vec.get_attr("num_envs", indices=[0, 2]) == [SLOTS, SLOTS]
    assert len(vec.get_images()) == SLOTS


def test_the_sb3_shell_works_under_vecmonitor():
    vec = VecMonitor(make_sb3("dsa/Planted-v0", SLOTS, rounds=2, cost_weight=0.5))
    vec.seed(SEED)
    vec.reset()
    first, second = actions_for(vec.action_space, 2)
    vec.step(first)
    infos = vec.step(second)[3]
    for info in infos:
        assert info["episode"]["l"] == 2
        assert info["episode"]["r"] == pytest.approx(info["accuracy"] - 0.5 * info["cost"], abs=ATOL)


def test_the_sb3_shell_begins_with_the_users_asked_for():
    vec = make_sb3("dsa/Planted-v0", SLOTS)
    vec.set_options([{"user": "user-7"}, {}, {"user": 3}])
    vec.reset()
    users = [info["user"] for info in vec.reset_infos]
    assert users[0] == "user-7"
    assert users[2] == "user-3"
    vec.set_options({"user": "user-5"})
    vec.reset()
    assert [info["user"] for info in vec.reset_infos] == ["user-5"] * SLOTS


def test_a_pickled_sb3_shell_gives_equal_steps():
    vec = make_sb3("dsa/Planted-v0", SLOTS, cost_weight=0.3, users=64)
    copy = pickle.loads(pickle.dumps(vec))
    for env in (vec, copy):
        env.seed(SEED)
    assert_equal(vec.reset(), copy.reset())
    for actions in actions_for(vec.action_space, 3):
        assert_equal(list(vec.step(actions)), list(copy.step(actions)))


@pytest.mark.parametrize("shell", SHELLS)
def test_a_batched_shell_asks_the_oracle_once_per_step(shell):
    scenario, oracle = counted_planted()
    env = shell(scenario, num_envs=5)
    env.reset()
    for actions in actions_for(scenario_space(env), 4, slots=5):
        env.step(actions)
    assert oracle.calls == [5, 5, 5, 5]


@pytest.mark.parametrize("shell", SHELLS)
def test_slots_in_step_ask_the_oracle_once_per_round(shell):
    scenario, oracle = counted_planted()
    env = shell(scenario, num_envs=5, rounds=3)
    env.reset()
    for actions in actions_for(scenario_space(env), 6, slots=5):
        env.step(actions)
    assert oracle.calls == [5] * 6


def scenario_space(env):
    return env.core.action_space


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("given", [1, 2, 4])
def test_another_number_of_masks_than_of_slots_is_refused(shell, given):
    env = shell("planted", num_envs=SLOTS)
    env.reset()
    with pytest.raises(ValueError, match="mask"):
        env.step(np.zeros((given, 8), dtype=np.int8))


@pytest.mark.parametrize("num_envs", [1, 2, 7])
def test_what_a_slot_sees_does_not_depend_on_the_number_of_slots(num_envs):
    vec = make_sb3("dsa/Planted-v0", num_envs)
    vec.seed(SEED)
    vec.reset()
    users = [vec.reset_infos[0]["user"]]
    for _ in range(5):
        vec.step(np.zeros((num_envs, 8), dtype=np.int8))
        users.append(vec.reset_infos[0]["user"])
    env = single("dsa/Planted-v0")
    assert users == [env.reset(seed=SEED)[1]["user"], *(env.reset()[1]["user"] for _ in range(5))]


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_vector_shell_renders_a_frame_per_slot_of_the_mask_decided_last_and_whose_it_was(rounds):
    env = batched("dsa/Planted-v0", render_mode="ansi", rounds=rounds)
    _, infos = env.reset(seed=SEED)
    env.step(np.eye(SLOTS, 8, dtype=np.int8))
    frames = env.render()
    assert isinstance(frames, tuple) and len(frames) == SLOTS
    for frame, user in zip(frames, infos["user"], strict=True):
        assert user in frame and len(frame.splitlines()) == 2 and frame.count("■") == 1
    images = batched("dsa/Planted-v0", render_mode="rgb_array")
    images.reset(seed=SEED)
    before = images.render()
    images.step(np.ones((SLOTS, 8), dtype=np.int8))
    assert all(image.dtype == np.uint8 and image.ndim == 3 for image in before)
    assert all((one != other).any() for one, other in zip(before, images.render(), strict=True))
    with pytest.warns(UserWarning, match="render_mode"):
        assert batched("dsa/Planted-v0").unwrapped.render() is None


def test_the_images_of_the_sb3_shell_show_what_was_decided_although_the_next_episode_has_begun():
    vec = make_sb3("dsa/Planted-v0", SLOTS)
    vec.reset()
    before = vec.get_images()
    vec.step(np.ones((SLOTS, 8), dtype=np.int8))
    assert all((one != other).any() for one, other in zip(before, vec.get_images(), strict=True))


@pytest.mark.parametrize("shell", SHELLS)
def test_no_user_is_played_before_the_first_reset(shell):
    env = shell("planted", num_envs=SLOTS, split="train")
    with pytest.raises(RuntimeError, match=r"no episode is under way.*call reset\(\)"):
        env.step(np.zeros((SLOTS, 8), dtype=np.int8))


def test_a_vector_shell_refuses_masks_of_slots_and_seeds_that_are_none():
    env = batched("dsa/Planted-v0")
    half = np.arange(SLOTS) < 1
    with pytest.raises(RuntimeError, match=r"slot 1 has no user yet; the first reset\(\) must be of every slot"):
        env.reset(options={"reset_mask": half})
    for wrong in (half.astype(int), half[:-1], np.zeros(SLOTS, dtype=bool)):
        with pytest.raises(ValueError, match=f"one bool per sub-environment, {SLOTS} in all"):
            env.reset(options={"reset_mask": wrong})
    with pytest.raises(ValueError, match="one seed per sub-environment"):
        env.reset(seed=(1,))
    seeds = range(SEED, SEED + SLOTS)
    users = [
        env.reset(seed=given)[1]["user"].tolist() for given in (SEED, np.int64(SEED), [*seeds], tuple(seeds), np.array(seeds))
    ]
    assert all(each == users[0] for each in users)


def test_make_sb3_suggests_an_id_for_an_unknown_one():
    with pytest.raises(ValueError, match=r"unknown environment 'dsa/Plantd-v0'\. Did you mean 'dsa/Planted-v0'"):
        make_sb3("dsa/Plantd-v0", 2)


def test_make_sb3_refuses_environments_that_are_not_ours():
    with pytest.raises(ValueError, match="unknown environment 'CartPole-v1'"):
        make_sb3("CartPole-v1", 2)


def test_setting_an_attribute_of_some_slots_is_refused_with_a_cure():
    with pytest.raises(AttributeError, match="build another"):
        make_sb3("dsa/Planted-v0", 2).set_attr("cost_weight", 0.5, indices=[0])

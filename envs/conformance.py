"""What every environment must satisfy, as a class to subclass in the tests of whoever registers one. Needs pytest."""

import json
import pickle
from collections.abc import Mapping

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from numpy.typing import NDArray
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from envs.statistics import NAMES
from users.embedding import WIDTH

pytest.register_assert_rewrite("envs.page_conformance")

from envs.page_conformance import PageConformance  # noqa: E402

STEP_KEYS = {"user", "accuracy", "loss", "cost", "active_fraction", "mask", "reward_accuracy", "reward_cost"}


class EnvConformance(PageConformance):
    """The conformance suite, which a subclass whose name begins with ``Test`` runs on one id.

    ::

        class TestMine(EnvConformance):
            env_id = "me/Mine-v0"

    Attributes:
        env_id: registered with :func:`envs.register`; ``"package:me/Mine-v0"`` imports the package first.
        kwargs: arguments that make the environment small; None for the ``miniature`` of the id.

    What the environments learn is kept in ``$DSA_CACHE``, or in a temporary folder where that is not set.
    """

    @pytest.mark.filterwarnings("error")
    def test_gymnasium_checker_has_no_complaint(self):
        """Most of what Gymnasium's checker finds it only warns of."""
        gymnasium_check_env(self.make().unwrapped)

    # `pathways` is a matrix on purpose, one row per pathway; the gating policy reads it as such.
    @pytest.mark.filterwarnings("error", "ignore:Your observation pathways has an unconventional shape:UserWarning")
    def test_sb3_checker_has_no_complaint(self):
        """Nor does that of Stable-Baselines3."""
        sb3_check_env(self.make().unwrapped)

    def test_equal_seeds_give_equal_episodes(self):
        """Everything that resets and steps give follows from seed and actions."""
        env = self.make()
        actions = actions_for(env, 50)
        assert_same(episodes(env, actions, seed=3), episodes(self.make(), actions, seed=3))

    def test_seeding_again_starts_the_same_sequence_of_users_again(self):
        """The order of users follows from the seed."""
        env = self.make()
        assert user_order(env, 8, seed=5) == user_order(env, 8, seed=5)

    def test_different_seeds_give_different_user_orders(self):
        """Seeds matter."""
        env = self.make()
        assert user_order(env, 8, seed=0) != user_order(env, 8, seed=1)

    def test_unseeded_environments_draw_their_own_order(self):
        """Without a seed nothing is fixed."""
        assert user_order(self.make(), 10, seed=None) != user_order(self.make(), 10, seed=None)

    @pytest.mark.parametrize("split", ["train", "val", "test"])
    def test_every_user_of_the_split_is_seen_once_before_anyone_twice(self, split):
        """Laps through the split, each in an order of its own."""
        env = self.make(split=split)
        scenario = env.unwrapped.core.scenario
        everyone = sorted(scenario.user_ids[u] for u in scenario.users(split))
        seen = user_order(env, 2 * len(everyone), seed=1)
        assert sorted(seen[: len(everyone)]) == everyone
        assert sorted(seen[len(everyone) :]) == everyone
        assert seen[: len(everyone)] != seen[len(everyone) :]

    def test_splits_share_no_user(self):
        """Every user is in exactly one split, under a name of their own."""
        scenario = self.make().unwrapped.core.scenario
        users = np.concatenate([scenario.users(split) for split in ("train", "val", "test")])
        assert len(np.unique(users)) == len(users) == len(scenario.user_ids) == len(set(scenario.user_ids))

    def test_a_pickled_environment_goes_on_with_equal_steps(self):
        """Worker processes get the environment that was made."""
        env = self.make(cost_weight="uniform:0:0.3", rounds=self.two_rounds())
        copy = pickle.loads(pickle.dumps(env))
        actions = actions_for(env, 12)
        assert_same(episodes(env, actions, seed=4), episodes(copy, actions, seed=4))

    def test_the_spec_survives_json(self):
        """A run's ``config.json`` is enough to make the environment again."""
        env = self.make(cost_weight="uniform:0:0.25")
        spec = EnvSpec.from_json(env.spec.to_json())
        assert spec == env.spec
        actions = actions_for(env, 3)
        assert_same(episodes(gym.make(spec), actions, seed=2), episodes(env, actions, seed=2))

    @pytest.mark.parametrize(("rounds", "cost_weight"), [(1, 0.3), (2, 0.3), (1, "uniform:0:0.3")])
    def test_the_vector_environment_does_what_single_ones_do(self, rounds, cost_weight):
        """Slot n seeded with ``seed + n`` sees and earns what a single environment with that seed does."""
        rules = {"rounds": min(rounds, self.two_rounds()), "cost_weight": cost_weight}
        vector, singles = self.make_vector(**rules), [self.make(**rules) for _ in range(3)]
        seen, _ = vector.reset(seed=7)
        now = [env.reset(seed=7 + n)[0] for n, env in enumerate(singles)]
        steps_of_an_episode = singles[0].unwrapped.core.steps
        for actions in actions_for(singles[0], 3 * (steps_of_an_episode + 3)).reshape(-1, 3, *singles[0].action_space.shape):
            for n in range(3):
                assert_close({name: part[n] for name, part in seen.items()}, now[n])
            seen, rewards, terminated, truncated, _ = vector.step(actions)
            steps = [env.step(action) for env, action in zip(singles, actions, strict=True)]
            assert rewards.tolist() == pytest.approx([step[1] for step in steps], abs=1e-6)
            assert terminated.tolist() == [step[2] for step in steps]
            assert not truncated.any()
            now = [env.reset()[0] if step[2] else step[0] for env, step in zip(singles, steps, strict=True)]

    def test_render_ansi_names_pathways_and_users(self):
        """The text tells who has what on."""
        env = self.make(render_mode="ansi")
        user = env.reset(seed=0)[1]["user"]
        env.step(actions_for(env, 1)[0])
        text = env.render()
        assert isinstance(text, str)
        assert user in text
        assert all(name in text for name in env.unwrapped.core.scenario.pathways)

    def test_render_ansi_distinguishes_on_from_off(self):
        """All on looks different from all off."""
        texts = []
        for bit in (0, 1):
            env = self.make(render_mode="ansi")
            env.reset(seed=0)
            env.step(np.full(env.action_space.n, bit, dtype=np.int8))
            texts.append(env.render())
        assert texts[0] != texts[1]

    def test_render_rgb_array_is_an_image_that_changes_with_the_mask(self):
        """``[H, W, 3]`` uint8."""
        env = self.make(render_mode="rgb_array")
        env.reset(seed=0)
        before = env.render()
        env.step(np.ones(env.action_space.n, dtype=np.int8))
        after = env.render()
        for image in (before, after):
            assert image.dtype == np.uint8
            assert image.ndim == 3
            assert image.shape[2] == 3
        assert (before != after).any()

    def test_render_without_a_mode_warns(self):
        """It could not know what is wanted."""
        env = self.make().unwrapped
        env.reset(seed=0)
        with pytest.warns(UserWarning, match="render_mode"):
            assert env.render() is None

    def test_closing_twice_is_harmless(self):
        """As Gymnasium has it."""
        env = self.make()
        env.reset(seed=0)
        env.close()
        env.close()

    def test_episodes_end_terminated_and_never_truncated(self):
        """Plain Python types, as Gymnasium's wrappers expect them."""
        env = self.make()
        env.reset(seed=0)
        *before, last = play(env, masks_for(env, 1)[0])
        assert not any(step[2] or step[3] for step in before)
        assert type(last[1]) is float
        assert last[2] is True
        assert last[3] is False

    def test_several_rounds_are_played_or_refused_at_once(self):
        """Where ``several_rounds`` of the page is False, making the environment says what to do instead."""
        if self.two_rounds() == 1:
            with pytest.raises(ValueError, match="rounds"):
                self.make(rounds=2)
        else:
            assert self.make(rounds=2).unwrapped.core.rounds == 2

    def test_three_rounds_end_after_three_and_their_rewards_sum_to_the_value_of_the_last_mask(self):
        """The reward of a round is the gain over the round before."""
        if self.two_rounds() == 1:
            pytest.skip("the page refuses several rounds")
        env = self.make(rounds=3, cost_weight=0.2)
        for episode in range(3):
            env.reset(seed=episode)
            masks = masks_for(env, 3, seed=episode)
            steps = [step for mask in masks for step in play(env, mask)]
            assert [step[2] for step in steps] == [False] * (len(steps) - 1) + [True]
            assert not any(step[3] for step in steps)
            last = steps[-1][4]
            value = last["accuracy"] - 0.2 * last["cost"]
            assert sum(step[1] for step in steps) == pytest.approx(value, abs=1e-12)
            assert last["mask"].tolist() == masks[-1].tolist()

    def test_several_rounds_show_the_gates_that_were_chosen(self):
        """The last statistic is the present gate."""
        if self.two_rounds() == 1:
            pytest.skip("the page refuses several rounds")
        env = self.make(rounds=2, layerwise=False)
        env.reset(seed=0)
        mask = masks_for(env, 1)[0]
        observation = play(env, mask)[-1][0]
        np.testing.assert_array_equal(observation["pathways"][:, -1], mask)

    def test_layerwise_steps_decide_one_pathway_each_and_the_last_one_is_paid(self):
        """Nothing is rewarded before the mask is whole; the gate column and ``info`` show what is decided so far."""
        env, at_once = self.make(layerwise=True, cost_weight=0.7), self.make(layerwise=False, cost_weight=0.7)
        assert env.action_space.n == 1
        mask = masks_for(env, 1)[0]
        observation, info = env.reset(seed=0)
        at_once.reset(seed=0, options={"user": info["user"]})
        whole = play(at_once, mask)[-1]
        for p, bit in enumerate(mask):
            so_far = np.where(np.arange(len(mask)) < p, mask, 0)
            assert observation["turn"].tolist() == np.eye(len(mask))[p].tolist()
            assert observation["pathways"][:, -1].tolist() == so_far.tolist()
            observation, reward, terminated, truncated, info = env.step(np.array([bit], dtype=np.int8))
            so_far[p] = bit
            assert info["mask"].tolist() == so_far.tolist()
            assert info["active_fraction"] == pytest.approx(so_far.mean())
            assert not truncated
            if p < len(mask) - 1:
                assert (reward, terminated) == (0.0, False)
                assert not {"accuracy", "loss", "cost", "reward_accuracy", "reward_cost"} & {*info}
        assert terminated
        assert reward == pytest.approx(whole[1], abs=1e-6) == pytest.approx(info["accuracy"] - 0.7 * info["cost"], abs=1e-6)
        assert (info["accuracy"], info["cost"]) == pytest.approx((whole[4]["accuracy"], whole[4]["cost"]), abs=1e-6)

    @pytest.mark.parametrize("cost_weight", [0.7, "uniform:0:0.3"])
    def test_the_reward_is_accuracy_minus_weighted_cost(self, cost_weight):
        """And ``info`` has both parts, and the weight where it varies."""
        env = self.make(cost_weight=cost_weight)
        for mask in masks_for(env, 10):
            env.reset()
            _, reward, _, _, info = play(env, mask)[-1]
            weight = info.get("cost_weight", cost_weight)
            assert reward == pytest.approx(info["accuracy"] - weight * info["cost"], abs=1e-12)
            assert reward == pytest.approx(info["reward_accuracy"] + info["reward_cost"], abs=1e-12)
            assert info["active_fraction"] == pytest.approx(info["mask"].mean())
            assert not mask.any() or (info["mask"] == mask).all()  # nothing on may be executed as the model's own readout
            assert 0 <= info["accuracy"] <= 1

    def test_a_cost_weight_that_varies_is_drawn_per_episode_and_observed(self):
        """One policy for every budget must know which it has."""
        env = self.make(cost_weight="uniform:0:0.3")
        space = env.observation_space["cost_weight"]
        shown: list[float] = []
        assert (space.low.tolist(), space.high.tolist()) == ([0.0], pytest.approx([0.3]))
        for mask in masks_for(env, 20):
            observation, info = env.reset(seed=None if shown else 0)
            assert space.contains(observation["cost_weight"])
            assert observation["cost_weight"].tolist() == [np.float32(info["cost_weight"])]
            assert play(env, mask)[0][4]["cost_weight"] == info["cost_weight"]
            shown.append(info["cost_weight"])
        assert len(set(shown)) == 20
        assert min(shown) < 0.1 < 0.2 < max(shown)

    def test_a_certain_cost_weight_of_the_range_can_be_asked_for(self):
        """One outside of the range is refused; without a range there is no such observation."""
        env = self.make(cost_weight="uniform:0:0.3")
        observation, info = env.reset(seed=0, options={"cost_weight": 0.2})
        assert (observation["cost_weight"].tolist(), info["cost_weight"]) == ([np.float32(0.2)], 0.2)
        last = play(env, masks_for(env, 1)[0])[-1]
        assert last[1] == pytest.approx(last[4]["accuracy"] - 0.2 * last[4]["cost"], abs=1e-12)
        with pytest.raises(ValueError, match="outside"):
            env.reset(options={"cost_weight": 0.31})

    def test_info_has_its_keys_and_is_jsonable(self):
        """``info`` of a step repeats what the reset told of the user."""
        env = self.make()
        _, before = env.reset(seed=0)
        mask = masks_for(env, 1)[0]
        after = play(env, mask)[-1][4]
        assert "user" in before
        assert {*after} >= STEP_KEYS | {*before}, f"info lacks {sorted((STEP_KEYS | {*before}) - {*after})}."
        assert {key: after[key] for key in before} == before
        listed = {**after, "mask": after["mask"].tolist()}
        assert json.loads(json.dumps(listed)) == listed
        assert listed["mask"] == mask.tolist()

    def test_observations_lie_within_their_space(self):
        """Finite, and within the bounds that the space tells."""
        env = self.make(rounds=self.two_rounds(), cost_weight="uniform:0:0.3")
        for step in episodes(env, actions_for(env, 20), seed=0):
            assert env.observation_space.contains(step[0])
            assert all(np.isfinite(part).all() for part in step[0].values())

    @pytest.mark.parametrize("layerwise", [False, True])
    def test_the_observation_is_user_and_pathways_and_nothing_else(self, layerwise):
        """Policies are made for this shape: ``[32]`` and one row of statistics per pathway; ``turn`` where there are turns."""
        env = self.make(layerwise=layerwise)
        pathways = len(env.unwrapped.core.scenario.pathways)
        shapes = {"user": (WIDTH,), "pathways": (pathways, len(NAMES))} | ({"turn": (pathways,)} if layerwise else {})
        observation, _ = env.reset(seed=0)
        assert {name: part.shape for name, part in observation.items()} == shapes
        assert {name: space.shape for name, space in env.observation_space.items()} == shapes
        assert env.action_space.n == (1 if layerwise else pathways)

    def test_returned_observations_and_infos_are_the_callers_own(self):
        """Writing into them changes nothing inside."""
        env = self.make()
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


def masks_for(env: gym.Env, count: int, seed: int = 0) -> NDArray[np.int8]:
    """Random masks ``[count, P]``."""
    pathways = len(env.unwrapped.core.scenario.pathways)  # type: ignore[attr-defined]
    return np.random.default_rng(seed).integers(0, 2, (count, pathways)).astype(np.int8)


def play(env: gym.Env, mask: NDArray[np.int8]) -> list[tuple]:
    """The steps that decide a mask ``[P]``: one, or layerwise one per pathway."""
    return [env.step(action) for action in mask.reshape(-1, env.action_space.n)]  # type: ignore[attr-defined]


def actions_for(env: gym.Env, count: int, seed: int = 0) -> NDArray[np.int8]:
    """Random actions ``[count, bits]``."""
    bits: int = env.action_space.n  # type: ignore[attr-defined]
    return np.random.default_rng(seed).integers(0, 2, (count, bits)).astype(np.int8)


def episodes(env: gym.Env, actions: NDArray[np.int8], seed: int | None = None) -> list[tuple]:
    """Everything that resets and steps give, as comparable tuples."""
    seen: list[tuple] = [env.reset(seed=seed)]
    for action in actions:
        seen.append(env.step(action))
        if seen[-1][2]:
            seen.append(env.reset())
    return seen


def user_order(env: gym.Env, count: int, seed: int | None) -> list[str]:
    """The users of the first ``count`` episodes."""
    users = [env.reset(seed=seed)[1]["user"]]
    return users + [env.reset()[1]["user"] for _ in range(count - 1)]


def assert_same(first: list[tuple], second: list[tuple]) -> None:
    """Equal to the bit."""
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_equal(one, other)


def assert_close(first: Mapping[str, NDArray], second: Mapping[str, NDArray]) -> None:
    """Equal up to rounding: how many users share a batch moves standardised float32 statistics by up to 1e-4."""
    assert {*first} == {*second}
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=0, atol=1e-3, err_msg=name)

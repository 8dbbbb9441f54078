"""What every environment must satisfy, as a class to subclass in the tests of whoever registers one. Needs pytest."""

import importlib
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from numpy.typing import NDArray
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from envs.registration import MINIATURES, known_spec
from envs.scenario import builder_of
from envs.single import PathwaySelectionEnv
from envs.statistics import NAMES
from users.embedding import WIDTH

STEP_KEYS = {"user", "accuracy", "loss", "cost", "active_fraction", "mask", "reward_accuracy", "reward_cost"}
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
REFERENCE = re.compile(r":(?:class|func):`~?([\w.]+)\.(\w+)`")


class EnvConformance:
    """The conformance suite, which a subclass whose name begins with ``Test`` runs on one id.

    ::

        class TestMine(EnvConformance):
            env_id = "me/Mine-v0"

    Attributes:
        env_id: registered with :func:`envs.register`; ``"package:me/Mine-v0"`` imports the package first.
        kwargs: arguments that make the environment small; None for the ``miniature`` of the id.

    What the environments learn is kept in ``$DSA_CACHE``, or in a temporary folder where that is not set.
    """

    env_id: str
    kwargs: ClassVar[Mapping[str, Any] | None] = None

    @pytest.fixture(autouse=True)
    def _users_cache_stays_as_it_is(self, monkeypatch, tmp_path_factory):
        if "DSA_CACHE" not in os.environ:
            monkeypatch.setenv("DSA_CACHE", str(tmp_path_factory.getbasetemp() / "dsa-cache"))

    def small(self) -> dict[str, Any]:
        """Arguments that make the environment small."""
        return dict(MINIATURES[known_spec(self.env_id).id] if self.kwargs is None else self.kwargs)

    def make(self, **kwargs: Any) -> Any:
        """The environment, in small."""
        return gym.make(self.env_id, **{**self.small(), **kwargs})

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
        env = self.make(cost_weight=0.3, rounds=2)
        copy = pickle.loads(pickle.dumps(env))
        actions = actions_for(env, 12)
        assert_same(episodes(env, actions, seed=4), episodes(copy, actions, seed=4))

    def test_the_spec_survives_json(self):
        """A run's ``config.json`` is enough to make the environment again."""
        env = self.make(cost_weight=0.25)
        spec = EnvSpec.from_json(env.spec.to_json())
        assert spec == env.spec
        actions = actions_for(env, 3)
        assert_same(episodes(gym.make(spec), actions, seed=2), episodes(env, actions, seed=2))

    @pytest.mark.parametrize("rounds", [1, 2])
    def test_the_vector_environment_does_what_single_ones_do(self, rounds):
        """Slot n seeded with ``seed + n`` sees and earns what a single environment with that seed does."""
        kwargs = {**self.small(), "rounds": rounds, "cost_weight": 0.3}
        vector = gym.make_vec(self.env_id, num_envs=3, vectorization_mode="vector_entry_point", **kwargs)
        singles = [self.make(rounds=rounds, cost_weight=0.3) for _ in range(3)]
        seen, _ = vector.reset(seed=7)
        now = [env.reset(seed=7 + n)[0] for n, env in enumerate(singles)]
        for actions in actions_for(singles[0], 12).reshape(4, 3, -1):
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

    def test_one_step_episodes_end_terminated_and_never_truncated(self):
        """Plain Python types, as Gymnasium's wrappers expect them."""
        env = self.make()
        env.reset(seed=0)
        _, reward, terminated, truncated, _ = env.step(actions_for(env, 1)[0])
        assert type(reward) is float
        assert terminated is True
        assert truncated is False

    def test_three_rounds_end_after_three_and_their_rewards_sum_to_the_value_of_the_last_mask(self):
        """The reward of a round is the gain over the round before."""
        env = self.make(rounds=3, cost_weight=0.2)
        for episode in range(3):
            env.reset(seed=episode)
            steps = [env.step(action) for action in actions_for(env, 3, seed=episode)]
            assert [step[2] for step in steps] == [False, False, True]
            assert not any(step[3] for step in steps)
            last = steps[-1][4]
            value = last["accuracy"] - 0.2 * last["cost"]
            assert sum(step[1] for step in steps) == pytest.approx(value, abs=1e-12)
            assert last["mask"].tolist() == actions_for(env, 3, seed=episode)[-1].tolist()

    def test_several_rounds_show_the_gates_that_were_chosen(self):
        """The last statistic is the present gate."""
        env = self.make(rounds=2)
        env.reset(seed=0)
        action = actions_for(env, 1)[0]
        observation = env.step(action)[0]
        np.testing.assert_array_equal(observation["pathways"][:, -1], action)

    def test_the_reward_is_accuracy_minus_weighted_cost(self):
        """And ``info`` has both parts."""
        env = self.make(cost_weight=0.7)
        for action in actions_for(env, 10):
            env.reset()
            _, reward, _, _, info = env.step(action)
            assert reward == pytest.approx(info["accuracy"] - 0.7 * info["cost"], abs=1e-12)
            assert reward == pytest.approx(info["reward_accuracy"] + info["reward_cost"], abs=1e-12)
            assert info["active_fraction"] == pytest.approx(action.mean())
            assert 0 <= info["accuracy"] <= 1

    def test_info_has_its_keys_and_is_jsonable(self):
        """``info`` of a step repeats what the reset told of the user."""
        env = self.make()
        _, before = env.reset(seed=0)
        action = actions_for(env, 1)[0]
        _, _, _, _, after = env.step(action)
        assert "user" in before
        assert {*after} >= STEP_KEYS | {*before}, f"info lacks {sorted((STEP_KEYS | {*before}) - {*after})}."
        assert {key: after[key] for key in before} == before
        listed = {**after, "mask": after["mask"].tolist()}
        assert json.loads(json.dumps(listed)) == listed
        assert listed["mask"] == action.tolist()

    def test_observations_lie_within_their_space(self):
        """Finite, and within the bounds that the space tells."""
        env = self.make(rounds=2)
        for step in episodes(env, actions_for(env, 20), seed=0):
            assert env.observation_space.contains(step[0])
            assert all(np.isfinite(part).all() for part in step[0].values())

    def test_the_observation_is_user_and_pathways_and_nothing_else(self):
        """Policies are made for this shape: ``[32]`` and one row of statistics per bit of the action."""
        env = self.make()
        observation, _ = env.reset(seed=0)
        assert {*observation} == {*env.observation_space.spaces} == {"user", "pathways"}
        assert observation["user"].shape == (WIDTH,)
        assert observation["pathways"].shape == (env.action_space.n, len(NAMES))

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

    def test_the_docstring_has_the_fixed_headings_in_order(self):
        """Pages are read side by side."""
        lines = [line.strip() for line in self._page().splitlines()]
        assert [line for line in lines if line.startswith("## ")] == HEADINGS

    def test_the_docstring_mentions_every_constructor_argument(self):
        """By name, or by a reference under Arguments to a class or function that documents it."""
        listed = self._page().split("## Arguments")[1].split("## ")[0]
        told = listed + "".join(_documentation(*names) for names in REFERENCE.findall(listed))
        missing = sorted(name for name in self._arguments() if f"``{name}``" not in told)
        assert not missing, f"{type(self.make().unwrapped).__name__}'s docstring lacks ``{'``, ``'.join(missing)}``."

    def test_the_docstring_mentions_every_key_of_info(self):
        """A page for any population cannot know the facts about its users."""
        env = self.make()
        _, before = env.reset(seed=0)
        facts = {*before} - {"user"} if self._is_for_any_population() else set()
        info = env.step(actions_for(env, 1)[0])[4]
        missing = [key for key in info if f"``{key}``" not in self._page() and key not in facts]
        assert not missing, f"{type(env.unwrapped).__name__}'s docstring lacks ``{'``, ``'.join(missing)}``."

    def test_importing_envs_registers_the_id_without_importing_torch(self):
        """Listing ids is instant; a distribution's own are registered by its entry point of the group ``dsa.envs``."""
        code = f"import sys, envs; envs.known_spec({self.env_id!r}); assert 'torch' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def _page(self) -> str:
        return inspect.getdoc(type(self.make().unwrapped)) or ""

    def _is_for_any_population(self) -> bool:
        """Whether the page offers the choice of population and backbone, whose own arguments and facts vary."""
        return "``backbone``" in self._page()

    def _arguments(self) -> set[str]:
        """What ``gym.make(env_id, ...)`` takes: arguments of the shell, of the scenario's builder, of what that calls."""
        spec = known_spec(self.env_id)
        builder = builder_of(spec.kwargs["scenario"])
        names = {*inspect.signature(PathwaySelectionEnv.__init__).parameters, *inspect.signature(builder).parameters}
        if hasattr(builder, "further_arguments") and not self._is_for_any_population():
            names |= builder.further_arguments({**spec.kwargs, **self.small()})
        return names - {"self", "scenario", "scenario_kwargs", "more"}


def actions_for(env: gym.Env, count: int, seed: int = 0) -> NDArray[np.int8]:
    """Random masks ``[count, P]``."""
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
    """Equal up to rounding, which depends on how many users share a batch."""
    assert {*first} == {*second}
    for name in first:
        np.testing.assert_allclose(first[name], second[name], atol=1e-5, err_msg=name)


def _documentation(module: str, name: str) -> str:
    """A class's page, or a function's docstring with its arguments in the pages' form."""
    thing = getattr(importlib.import_module(module), name)
    if inspect.isclass(thing):
        return inspect.getdoc(thing) or ""
    return " ".join(f"``{argument}``" for argument in inspect.signature(thing).parameters)

"""Our ways of stepping: all pairs new, all pairs seen before, no cache at all."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from envs import known_spec
from envs.oracles import CachedOracle, LiveOracle, Oracle, Plans
from envs.sb3 import PathwaySelectionVecEnv
from envs.scenario import Scenario, load_scenario
from eval.bench.clock import Masks, Way


def scenario_of(env_id: str, env_kwargs: dict[str, Any]) -> Scenario:
    """The scenario of a registered id, its artefacts made or loaded."""
    kwargs = {**known_spec(env_id).kwargs, **env_kwargs}
    return load_scenario(kwargs.pop("scenario"), **kwargs)


def some_train_users(scenario: Scenario, users: int) -> Scenario:
    """The scenario with (at most) so many train users, which all ways then step."""
    return replace(scenario, splits={**scenario.splits, "train": scenario.users("train")[:users]})


def live_of(scenario: Scenario) -> LiveOracle:
    """The scenario's oracle that adapts, without the cache around it. Raises ``TypeError`` if there is none."""
    cached = scenario.oracle
    if not (isinstance(cached, CachedOracle) and isinstance(cached.live, LiveOracle)):
        raise TypeError(f"scenario {scenario.name!r} adapts no model: choose an environment with a backbone.")
    return cached.live


def empty_cache(live: Oracle, users: int) -> CachedOracle:
    """A cache that knows nothing yet and is not kept, around an oracle over so many users."""
    return CachedOracle(live, np.zeros(users, dtype=bool))


def begun(scenario: Scenario, oracle: Oracle, num_envs: int) -> PathwaySelectionVecEnv:
    """An environment around another oracle, reset; the same users in the same order every time."""
    env = PathwaySelectionVecEnv(replace(scenario, oracle=oracle), num_envs)
    env.seed(0)
    env.reset()
    return env


def new_masks(env: PathwaySelectionVecEnv, repeat: int) -> Masks:
    """Random masks, every bit on with probability one half; no user gets a mask twice."""
    rng, seen = np.random.default_rng(repeat), set[tuple[int, bytes]]()
    shape = env.num_envs, len(env.core.scenario.pathways)

    def draw() -> NDArray[np.int8]:
        masks = rng.integers(0, 2, shape, dtype=np.int8)
        for row, user in enumerate(env.core.users.tolist()):
            while (user, masks[row].tobytes()) in seen:
                masks[row] = rng.integers(0, 2, shape[1], dtype=np.int8)
            seen.add((user, masks[row].tobytes()))
        return masks

    return draw


def random_masks(env: VecEnv, pathways: int, repeat: int, pool: Plans | None = None) -> Masks:
    """Random masks ``[N, P]``, some of which may come again: every bit on with probability one half, or rows of ``pool``."""
    rng = np.random.default_rng(repeat)

    def draw() -> NDArray[np.int8]:
        if pool is None:
            return rng.integers(0, 2, (env.num_envs, pathways), dtype=np.int8)
        return pool[rng.integers(0, len(pool), env.num_envs)].astype(np.int8)

    return draw


def all_new(scenario: Scenario, oracle: Oracle, num_envs: int, steps: int) -> Way:
    """Every pair of user and mask is new: each step adapts every user."""

    def begin(repeat: int) -> tuple[VecEnv, Masks]:
        env = begun(scenario, empty_cache(oracle, len(scenario.user_ids)), num_envs)
        return env, new_masks(env, repeat)

    return Way(begin, steps)


def all_seen(scenario: Scenario, oracle: Oracle, num_envs: int, steps: int) -> Way:
    """The same pairs in every repeat, which were asked once before: each step looks them up."""
    cache = empty_cache(oracle, len(scenario.user_ids))

    def begin(_: int) -> tuple[VecEnv, Masks]:
        env = begun(scenario, cache, num_envs)
        return env, random_masks(env, len(scenario.pathways), repeat=0)

    env, masks = begin(0)
    for _ in range(steps):
        env.step(masks())
    return Way(begin, steps)


def uncached(scenario: Scenario, oracle: Oracle, num_envs: int, steps: int, pool: Plans | None = None) -> Way:
    """Whatever the oracle does, it does in every step; masks as :func:`random_masks` has them."""

    def begin(repeat: int) -> tuple[VecEnv, Masks]:
        env = begun(scenario, oracle, num_envs)
        return env, random_masks(env, len(scenario.pathways), repeat, pool)

    return Way(begin, steps)

"""The Stable-Baselines3 shell: a VecEnv that steps all its users in one batched call."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.utils import EzPickle
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from envs.core import PathwaySelection
from envs.cost_weights import CostWeight
from envs.rendering import gates_as_image
from envs.scenario import Scenario, load_scenario


class PathwaySelectionVecEnv(VecEnv, EzPickle):
    """Many users at a time for Stable-Baselines3.

    Args:
        scenario: a registered name, or a :class:`Scenario`.
        num_envs: users at a time.
        split, cost_weight, rounds, layerwise, scenario_kwargs: as for the single environment.

    Rewards are measured on validation examples; ``infos`` carry both reward parts.
    """

    def __init__(
        self,
        scenario: str | Scenario,
        num_envs: int,
        split: str = "train",
        cost_weight: float | str | CostWeight = 0.1,
        rounds: int = 1,
        layerwise: bool = False,
        **scenario_kwargs: Any,
    ) -> None:
        EzPickle.__init__(self, scenario, num_envs, split, cost_weight, rounds, layerwise, **scenario_kwargs)
        built = load_scenario(scenario, **scenario_kwargs) if isinstance(scenario, str) else scenario
        self.core = PathwaySelection(built, split, cost_weight, rounds, num_envs, layerwise)
        self.render_mode = "rgb_array"  # VecEnv's constructor reads it
        super().__init__(num_envs, self.core.observation_space, self.core.action_space)
        self._slots = np.arange(num_envs)
        self._actions: NDArray[np.int8] | None = None
        self._seeded = False

    def reset(self) -> dict[str, NDArray[np.float32]]:
        """Begin an episode in every slot."""
        for slot, seed in enumerate(self._seeds):
            if seed is not None or not self._seeded:
                self.core.seed(slot, int(np.random.default_rng(seed).integers(2**31)))
        self._seeded = True
        self.reset_infos = self.core.reset(self._slots, self._options)
        self._reset_seeds()
        self._reset_options()
        return self.core.observe(self._slots)

    def step_async(self, actions: NDArray[np.int8]) -> None:
        """Take note of one mask per slot."""
        self._actions = actions

    def step_wait(self) -> tuple[dict[str, NDArray], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Execute the masks; slots whose episode ended begin the next one at once."""
        assert self._actions is not None
        transition = self.core.step(self._slots, self._actions)
        ended = np.flatnonzero(transition.terminated)
        final = self.core.observe(ended)
        for row, (slot, info) in enumerate(zip(ended, self.core.reset(ended), strict=True)):
            last = {name: value[row] for name, value in final.items()}
            transition.infos[slot] |= {"terminal_observation": last, "TimeLimit.truncated": False}
            self.reset_infos[slot] = info
        rewards = transition.rewards.astype(np.float32)
        return self.core.observe(self._slots), rewards, transition.terminated, transition.infos

    def close(self) -> None:
        """Nothing is held open."""

    def get_images(self) -> Sequence[NDArray[np.uint8] | None]:
        """One heat-map row per slot: the mask decided last."""
        return [gates_as_image(self.core.scenario.pathways, [mask], height=1) for _, mask in self.core.latest()]

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The attribute, once per slot asked for."""
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refused: the slots share one object."""
        raise AttributeError(f"{attr_name!r} cannot be set for some slots; build another VecEnv with the value instead.")

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call the method once and return its result per slot asked for."""
        result = getattr(self, method_name)(*method_args, **method_kwargs)
        return [result for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """No slot is wrapped."""
        return [False for _ in self._get_indices(indices)]


def make_sb3(env_id: str, num_envs: int, **kwargs: Any) -> PathwaySelectionVecEnv:
    """The Stable-Baselines3 shell of a registered id. Keyword arguments override the id's own.

    Raises:
        ValueError: for an unknown id, with a suggestion.
    """
    from envs.registration import known_spec

    return PathwaySelectionVecEnv(num_envs=num_envs, **{**known_spec(env_id).kwargs, **kwargs})

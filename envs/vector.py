"""The Gymnasium vector shell: many users, one batched call to the oracle per step."""

from typing import Any

import numpy as np
from gymnasium.utils import EzPickle
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from envs.core import Observation, PathwaySelection
from envs.scenario import Scenario, load_scenario
from envs.single import check_render_mode, render_gates


class PathwaySelectionVectorEnv(VectorEnv, EzPickle):
    """What ``num_envs`` single environments would do, in SAME_STEP autoreset mode.

    Args:
        scenario: a registered name, or a :class:`Scenario`.
        num_envs: users at a time.
        split, cost_weight, rounds, layerwise, scenario_kwargs: as for the single environment.
        render_mode: None, ``"ansi"`` or ``"rgb_array"``.
    """

    metadata = {  # noqa: RUF012 - as Gymnasium has it
        "render_modes": ["ansi", "rgb_array"],
        "render_fps": 4,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        scenario: str | Scenario,
        num_envs: int = 1,
        split: str = "train",
        cost_weight: float | str = 0.1,
        rounds: int = 1,
        render_mode: str | None = None,
        layerwise: bool = False,
        **scenario_kwargs: Any,
    ) -> None:
        EzPickle.__init__(self, scenario, num_envs, split, cost_weight, rounds, render_mode, layerwise, **scenario_kwargs)
        check_render_mode(render_mode, self.metadata["render_modes"])
        built = load_scenario(scenario, **scenario_kwargs) if isinstance(scenario, str) else scenario
        self.core = PathwaySelection(built, split, cost_weight, rounds, num_envs, layerwise)
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.single_observation_space = self.core.observation_space
        self.single_action_space = self.core.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._slots = np.arange(num_envs)
        self._seeded = np.zeros(num_envs, dtype=bool)

    def reset(  # type: ignore[override]
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin episodes, in all slots or where ``options["reset_mask"]`` says; slot i is seeded with ``seed + i``.

        Raises:
            ValueError: for another number of seeds than of slots, and a mask that is not one bool per slot or selects none.
        """
        if seed is None or isinstance(seed, int | np.integer):
            super().reset(seed=None if seed is None else int(seed))
            seeds = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"one seed per sub-environment is needed, {self.num_envs} in all; got {len(seeds)}.")
        mask = np.asarray((options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool)))
        if mask.dtype != bool or mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(
                f"reset_mask holds one bool per sub-environment, {self.num_envs} in all, of which some are True; got {mask!r}."
            )
        slots = self._slots[mask]
        for slot in slots.tolist():
            if seeds[slot] is not None or not self._seeded[slot]:
                self.core.seed(slot, int(np.random.default_rng(seeds[slot]).integers(2**31)))
                self._seeded[slot] = True
        chosen = {name: value for name, value in (options or {}).items() if name != "reset_mask"}
        infos: dict[str, Any] = {}
        for slot, info in zip(slots.tolist(), self.core.reset(slots, [chosen] * len(slots)), strict=True):
            infos = self._add_info(infos, info, slot)
        return self.core.observe(self._slots), infos

    def step(  # type: ignore[override]
        self, actions: NDArray[np.int8]
    ) -> tuple[Observation, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Execute one mask per slot, ``[num_envs, P]``; slots whose episode ended begin the next one at once."""
        transition = self.core.step(self._slots, actions)
        ended = np.flatnonzero(transition.terminated)
        final = self.core.observe(ended)
        infos: dict[str, Any] = {}
        for slot in np.flatnonzero(~transition.terminated).tolist():
            infos = self._add_info(infos, transition.infos[slot], slot)
        for row, (slot, started) in enumerate(zip(ended.tolist(), self.core.reset(ended), strict=True)):
            last = {name: value[row] for name, value in final.items()}
            infos = self._add_info(infos, {"final_obs": last, "final_info": transition.infos[slot]}, slot)
            infos = self._add_info(infos, started, slot)
        truncated = np.zeros(self.num_envs, dtype=bool)
        return self.core.observe(self._slots), transition.rewards, transition.terminated, truncated, infos

    def render(self) -> tuple[Any, ...] | None:
        """A frame per slot: the mask decided last, as text or as an image of one row."""
        if self.render_mode is None:
            return render_gates(None, (), [])
        return tuple(render_gates(self.render_mode, self.core.scenario.pathways, [row], 1) for row in self.core.latest())

"""The plain Gymnasium shell: one user per episode."""

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.utils import EzPickle
from numpy.typing import NDArray

from envs.core import Observation, PathwaySelection
from envs.rendering import gates_as_image, gates_as_text
from envs.scenario import Scenario, load_scenario

ALONE = np.zeros(1, dtype=np.int64)


class PathwaySelectionEnv(gym.Env[Observation, NDArray[np.int8]], EzPickle):
    """Choose which pathways of a frozen model are on for one user.

    Args:
        scenario: a registered name, or a :class:`Scenario`.
        split: whose users are drawn: ``train`` (default), ``val`` or ``test``.
        cost_weight: lambda in ``reward = validation accuracy - lambda * cost``; ``"uniform:LOW:HIGH"`` draws it anew for every
            episode and shows it in the observation ``cost_weight`` ``[1]`` and in ``info``.
        rounds: masks per episode.
        layerwise: decide one pathway per step, in their order: an action is one bit, the observation ``turn`` ``[P]`` is 1 for
            the pathway to decide, the statistic ``gate`` is what was decided so far, and the reward comes with the last.
        render_mode: None, ``"ansi"`` or ``"rgb_array"``.
        scenario_kwargs: passed on to the scenario's builder.

    ``reset(options={"user": id_or_position, "cost_weight": 0.2})`` begins with a certain user, or at a certain cost weight of
    the range.

    Attributes:
        several_rounds: whether ``rounds`` may be above 1; a subclass that refuses them sets it to False.
    """

    several_rounds: ClassVar[bool] = True
    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}  # noqa: RUF012 - as Gymnasium has it

    def __init__(
        self,
        scenario: str | Scenario,
        split: str = "train",
        cost_weight: float | str = 0.1,
        rounds: int = 1,
        render_mode: str | None = None,
        layerwise: bool = False,
        **scenario_kwargs: Any,
    ) -> None:
        EzPickle.__init__(self, scenario, split, cost_weight, rounds, render_mode, layerwise, **scenario_kwargs)
        check_render_mode(render_mode, self.metadata["render_modes"])
        built = load_scenario(scenario, **scenario_kwargs) if isinstance(scenario, str) else scenario
        self.core = PathwaySelection(built, split, cost_weight, rounds, 1, layerwise)
        self.observation_space = self.core.observation_space  # type: ignore[assignment]
        self.action_space = self.core.action_space
        self.render_mode = render_mode
        self._seeded = False
        self._history: list[tuple[str, NDArray[np.int8]]] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode with the next user of a random order that follows from ``seed``."""
        super().reset(seed=seed)
        if seed is not None or not self._seeded:
            self.core.seed(0, int(self.np_random.integers(2**31)))
            self._seeded = True
        infos = self.core.reset(ALONE, [options or {}])
        return self._observation(), infos[0]

    def step(self, action: NDArray[np.int8]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Execute a mask ``[P]``; the episode terminates after ``rounds`` of them."""
        transition = self.core.step(ALONE, np.asarray(action)[None])
        info = transition.infos[0]
        self._history = [*self._history[-23:], (info["user"], info["mask"].copy())]
        return self._observation(), float(transition.rewards[0]), bool(transition.terminated[0]), False, info

    def render(self) -> Any:
        """The last 24 executed masks, newest at the bottom, as text or as a heat-map ``[H, W, 3]`` uint8."""
        return render_gates(self.render_mode, self.core.scenario.pathways, self._history)

    def _observation(self) -> Observation:
        return {name: value[0] for name, value in self.core.observe(ALONE).items()}


def check_render_mode(mode: str | None, known: list[str]) -> None:
    """Raise ``ValueError`` for a render mode that does not exist."""
    if mode is not None and mode not in known:
        raise ValueError(f"unknown render_mode {mode!r}; choose from {', '.join(known)}, or None.")


def render_gates(
    mode: str | None, pathways: tuple[str, ...], rows: list[tuple[str, NDArray[np.int8]]], height: int = 24
) -> Any:
    """What ``render()`` returns in each mode; ``height`` is an image's, in rows of cells."""
    if mode == "ansi":
        return gates_as_text(pathways, rows)
    if mode == "rgb_array":
        return gates_as_image(pathways, [mask for _, mask in rows], height)
    gym.logger.warn("render() does nothing without a render_mode; make the env with 'ansi' or 'rgb_array'.")
    return None

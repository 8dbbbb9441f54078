"""The one core of pathway selection: slots that hold a user each, stepped together. The shells only translate."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from envs.oracles import Outcome
from envs.scenario import Scenario

BOUND = 10.0
"""Observations lie within +-BOUND."""
Observation = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Transition:
    """What one step of some slots gave, ``[B]`` each: rewards, whether the episode ended, one info dict per slot."""

    rewards: NDArray[np.float64]
    terminated: NDArray[np.bool_]
    infos: list[dict[str, Any]]


def check_rounds(rounds: int) -> None:
    """Raise ``ValueError`` for an impossible number of decisions."""
    if int(rounds) != rounds or rounds < 1:
        raise ValueError(f"rounds must be a whole number of at least 1, got {rounds}.")


class PathwaySelection:
    """Slots, each with a user and the masks decided so far.

    Args:
        scenario: what is played.
        split: whose users are drawn: ``train``, ``val`` or ``test``.
        cost_weight: lambda, at least 0.
        rounds: decisions per episode.
        slots: number of users at a time.

    A slot's users come in the order of random permutations of the split (every user once before anyone twice), drawn
    from a stream seed of the slot's own, so that what a slot sees does not depend on the other slots.
    """

    def __init__(self, scenario: Scenario, split: str, cost_weight: float, rounds: int, slots: int) -> None:
        if not 0 <= cost_weight < np.inf:
            raise ValueError(f"cost_weight must be finite and at least 0, got {cost_weight}; a negative one pays for waste.")
        check_rounds(rounds)
        if slots < 1:
            raise ValueError(f"at least one user at a time is needed, got {slots}.")
        self.scenario, self.split, self.cost_weight, self.rounds = scenario, split, float(cost_weight), int(rounds)
        self.pool = scenario.users(split)
        self.streams = np.zeros(slots, dtype=np.int64)
        self.episodes = np.full(slots, -1)
        self.users = np.full(slots, -1)
        self.plans = np.zeros((slots, self.rounds, len(scenario.pathways)), dtype=bool)
        self.done = np.zeros(slots, dtype=np.int64)
        self.earned = np.zeros(slots)
        self._order: dict[int, tuple[tuple[int, int], NDArray[np.int64]]] = {}

    @property
    def observation_space(self) -> spaces.Dict:
        """``user`` ``[E]`` and ``pathways`` ``[P, S]``, float32."""
        shapes = {"user": self.scenario.embeddings.shape[1:], "pathways": self.scenario.statistics.shape[1:]}
        return spaces.Dict({name: spaces.Box(-BOUND, BOUND, shape, np.float32) for name, shape in shapes.items()})

    @property
    def action_space(self) -> spaces.MultiBinary:
        """One bit per pathway."""
        return spaces.MultiBinary(len(self.scenario.pathways))

    def seed(self, slot: int, stream: int) -> None:
        """Start a slot's sequence of users anew."""
        self.streams[slot], self.episodes[slot] = stream, -1

    def reset(self, slots: NDArray[np.int64], users: list[str | int | None] | None = None) -> list[dict[str, Any]]:
        """Begin an episode in some slots, with the next user of each slot's sequence or with the users named.

        Args:
            slots: ``[B]``.
            users: user ids or positions; None for the next one of the sequence.

        Returns:
            One info dict per slot.
        """
        for slot, user in zip(slots, users or [None] * len(slots), strict=True):
            self.episodes[slot] += user is None
            self.users[slot] = self._next_user(slot) if user is None else self._named(user)
            self.plans[slot], self.done[slot], self.earned[slot] = False, 0, 0.0
        return [self._user_info(slot) for slot in slots]

    def step(self, slots: NDArray[np.int64], actions: NDArray) -> Transition:
        """Execute one mask ``[B, P]`` in each of some slots: a single call to the oracle."""
        masks = self._checked(actions, len(slots))
        played = self.done[slots]
        if (played >= self.rounds).any():
            raise RuntimeError("the episode is over; call reset() before the next step().")
        self.plans[slots, played] = masks
        outcome = self._evaluate(slots)
        value = outcome.reward(self.cost_weight)
        rewards = value - self.earned[slots]
        self.earned[slots] = value
        self.done[slots] += 1
        infos = [self._step_info(slot, masks[i], outcome, i) for i, slot in enumerate(slots)]
        return Transition(rewards, self.done[slots] >= self.rounds, infos)

    def observe(self, slots: NDArray[np.int64]) -> Observation:
        """Fresh observations of some slots, ``[B, ...]``."""
        users = self.users[slots]
        pathways = self.scenario.statistics[users].copy()
        for played in set(self.done[slots].tolist()) - {0, self.rounds}:
            rows = np.flatnonzero(self.done[slots] == played)
            pathways[rows] = self.scenario.observe(users[rows], self.plans[slots[rows], :played])
        return {"user": self.scenario.embeddings[users], "pathways": pathways}

    def state(self) -> dict[str, list]:
        """JSON-able state, from which :meth:`restore` goes on exactly."""
        names = ("streams", "episodes", "users", "plans", "done", "earned")
        return {name: getattr(self, name).tolist() for name in names}

    def restore(self, state: dict[str, list]) -> None:
        """Take over a :meth:`state`."""
        for name, value in state.items():
            getattr(self, name)[...] = np.asarray(value)

    def _next_user(self, slot: int) -> int:
        lap, place = divmod(int(self.episodes[slot]), len(self.pool))
        key = (int(self.streams[slot]), lap)
        if slot not in self._order or self._order[slot][0] != key:
            self._order[slot] = (key, np.random.default_rng(key).permutation(self.pool))
        return int(self._order[slot][1][place])

    def _named(self, user: str | int) -> int:
        if isinstance(user, str):
            if user not in self.scenario.user_ids:
                raise ValueError(f"no user {user!r}; the first of this split is {self.scenario.user_ids[self.pool[0]]!r}.")
            user = self.scenario.user_ids.index(user)
        elif not 0 <= user < len(self.scenario.user_ids):
            raise ValueError(f"no user at position {user}; there are {len(self.scenario.user_ids)}.")
        if user not in self.pool:
            raise ValueError(
                f"user {self.scenario.user_ids[user]!r} is not in the split {self.split!r}; make the environment with the "
                "split that the user belongs to."
            )
        return int(user)

    def _checked(self, actions: NDArray, count: int) -> NDArray[np.bool_]:
        actions = np.asarray(actions)
        pathways = len(self.scenario.pathways)
        if actions.ndim != 2 or actions.shape[1] != pathways:
            raise ValueError(f"a mask has {pathways} bits, one per pathway; got an action of shape {actions.shape[1:]}.")
        if len(actions) != count:
            raise ValueError(f"one mask per user is needed, {count} in all; got {len(actions)} masks.")
        bits = np.isin(actions, (0, 1))
        if not bits.all():
            raise ValueError(f"a mask holds only 0 and 1; got {actions.dtype} values such as {actions[~bits][0]!r}.")
        return actions.astype(bool)

    def _evaluate(self, slots: NDArray[np.int64]) -> Outcome:
        """One oracle call per number of rounds played: a single one as long as slots are in step."""
        parts = np.zeros((3, len(slots)))
        for played in set(self.done[slots].tolist()):
            rows = np.flatnonzero(self.done[slots] == played)
            plans = self.plans[slots[rows], : played + 1]
            outcome = self.scenario.oracle.evaluate(self.users[slots[rows]], plans)
            parts[:, rows] = outcome.accuracy, outcome.loss, outcome.cost
        bad = slots[~np.isfinite(parts).all(0)]
        if len(bad):
            raise FloatingPointError(
                f"user {self.scenario.user_ids[self.users[bad[0]]]!r} got a NaN or infinite accuracy, loss or cost; "
                "mend the oracle, or leave the user out."
            )
        return Outcome(*parts)

    def _user_info(self, slot: int) -> dict[str, Any]:
        user = int(self.users[slot])
        return {"user": self.scenario.user_ids[user], **self.scenario.user_info[user]}

    def _step_info(self, slot: int, mask: NDArray[np.bool_], outcome: Outcome, i: int) -> dict[str, Any]:
        return {
            **self._user_info(slot),
            "accuracy": float(outcome.accuracy[i]),
            "loss": float(outcome.loss[i]),
            "cost": float(outcome.cost[i]),
            "active_fraction": float(mask.mean()),
            "mask": mask.astype(np.int8),
            "reward_accuracy": float(outcome.accuracy[i]),
            "reward_cost": float(-self.cost_weight * outcome.cost[i]),
        }

"""The one core of pathway selection: slots that hold a user each, stepped together. The shells only translate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from envs.cost_weights import CostWeight
from envs.oracles import Outcome, Plans
from envs.scenario import Scenario
from envs.statistics import NAMES

BOUND = 10.0
"""Observations lie within +-BOUND."""
GATE = NAMES.index("gate")
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
        cost_weight: lambda, at least 0; or ``"uniform:LOW:HIGH"``, drawn for each episode and then observed.
        rounds: masks per episode.
        slots: number of users at a time.
        layerwise: a step decides one pathway instead of all; a mask then takes P steps, of which the last is rewarded.

    A slot's users come in the order of random permutations of the split (every user once before anyone twice), drawn
    from a stream seed of the slot's own, so that what a slot sees does not depend on the other slots.
    """

    def __init__(
        self,
        scenario: Scenario,
        split: str,
        cost_weight: float | str | CostWeight,
        rounds: int,
        slots: int,
        layerwise: bool = False,
    ) -> None:
        self.cost_weight = CostWeight.parse(cost_weight)
        check_rounds(rounds)
        if slots < 1:
            raise ValueError(f"at least one user at a time is needed, got {slots}.")
        if rounds > 1 and scenario.sent is not None:
            raise ValueError("what a device sends of its user is sent once: play with rounds=1, or without local_epsilon.")
        self.scenario, self.split, self.rounds, self.layerwise = scenario, split, int(rounds), layerwise
        self.pool = scenario.users(split)
        self.turns = len(scenario.pathways) if layerwise else 1
        self.streams = np.zeros(slots, dtype=np.int64)
        self.episodes = np.full(slots, -1)
        self.users = np.full(slots, -1)
        self.weights = np.full(slots, self.cost_weight.low)
        self.plans = np.zeros((slots, self.rounds, len(scenario.pathways)), dtype=bool)
        self.done = np.full(slots, self.steps)  # no episode is under way
        self.earned = np.zeros(slots)
        self.chosen = np.zeros(slots, dtype=np.int64)
        self.last, self.whose = np.zeros((slots, len(scenario.pathways)), dtype=bool), np.full(slots, -1)
        self._laps = np.full((slots, 2), -1)
        self._order = np.zeros((slots, len(self.pool)), dtype=np.int32)
        self._drawn = np.zeros((slots, len(self.pool) if self.cost_weight.varies else 0), dtype=np.float32)

    @property
    def steps(self) -> int:
        """Steps of an episode."""
        return self.rounds * self.turns

    @property
    def observation_space(self) -> spaces.Dict:
        """``user`` ``[E]`` and ``pathways`` ``[P, S]``, float32.

        Where the cost weight varies ``cost_weight`` ``[1]`` as well; layerwise ``turn`` ``[P]``, 1 for the pathway to decide.
        """
        shapes = {"user": self.scenario.embeddings.shape[1:], "pathways": self.scenario.statistics.shape[1:]}
        found: dict[str, spaces.Space[Any]] = {
            name: spaces.Box(-BOUND, BOUND, shape, np.float32) for name, shape in shapes.items()
        }
        if self.cost_weight.varies:
            found["cost_weight"] = spaces.Box(self.cost_weight.low, self.cost_weight.high, (1,), np.float32)
        if self.layerwise:
            found["turn"] = spaces.Box(0, 1, (len(self.scenario.pathways),), np.float32)
        return spaces.Dict(found)

    @property
    def action_space(self) -> spaces.MultiBinary:
        """One bit per pathway; layerwise the one bit of the pathway whose turn it is."""
        return spaces.MultiBinary(1 if self.layerwise else len(self.scenario.pathways))

    def seed(self, slot: int, stream: int) -> None:
        """Start a slot's sequence of users anew."""
        self.streams[slot], self.episodes[slot], self.chosen[slot] = stream, -1, 0

    def reset(self, slots: NDArray[np.int64], options: Sequence[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        """Begin an episode in some slots, with the next user of each slot's sequence or with the users named.

        Args:
            slots: ``[B]``.
            options: per slot; ``user`` (an id or a position) and ``cost_weight`` instead of what the sequence holds.

        Returns:
            One info dict per slot.
        """
        if options is None or not any(options):
            self._begin_next(slots)
        else:
            for slot, chosen in zip(slots, options, strict=True):
                self._begin_chosen(slot, chosen)
        return [self._user_info(slot) for slot in slots.tolist()]

    def place(self, users: NDArray[np.int64], weight: float | None = None) -> None:
        """Begin an episode with one given user per slot, of whatever split, all at one cost weight."""
        self._start(np.arange(len(self.users)), users)
        self.weights[:] = self.cost_weight.low if weight is None else self._allowed(weight)

    def step(self, slots: NDArray[np.int64], actions: NDArray) -> Transition:
        """Execute one action per slot, ``[B, P]`` masks or ``[B, 1]`` bits: a single call to the oracle."""
        done = self.decide(slots, actions)
        masks = self.plans[slots, (done - 1) // self.turns]
        self.last[slots], self.whose[slots] = masks, self.users[slots]
        rated = np.flatnonzero(done % self.turns == 0)
        rewards = np.zeros(len(slots))
        outcome = Outcome(*np.zeros((3, 0)))
        if len(rated):
            outcome = self._evaluate(slots[rated])
            value = outcome.accuracy - self.weights[slots[rated]] * outcome.cost
            rewards[rated] = value - self.earned[slots[rated]]
            self.earned[slots[rated]] = value
        return Transition(rewards, done >= self.steps, self._step_infos(slots, masks, rated, outcome))

    def decide(self, slots: NDArray[np.int64], actions: NDArray) -> NDArray[np.int64]:
        """Take note of one action per slot, without asking what it is worth; returns the steps done, ``[B]``."""
        bits = self._checked(actions, len(slots))
        done = self.done[slots]
        if (done >= self.steps).any():
            raise RuntimeError("no episode is under way, or the episode is over; call reset() before the next step().")
        if self.layerwise:
            self.plans[slots, done // self.turns, done % self.turns] = bits[:, 0]
        else:
            self.plans[slots, done] = bits
        done = done + 1
        self.done[slots] = done
        whole, last = slots[done % self.turns == 0], done[done % self.turns == 0] // self.turns - 1
        self.plans[whole, last] = self.scenario.executed(self.plans[whole, last])
        return done

    def observe(self, slots: NDArray[np.int64]) -> Observation:
        """Fresh observations of some slots, ``[B, ...]``. Raises ``RuntimeError`` for one that never had a user."""
        users, done = self.users[slots], self.done[slots]
        if (users < 0).any():
            raise RuntimeError(f"slot {slots[users < 0][0]} has no user yet; the first reset() must be of every slot.")
        pathways = np.array(self.scenario.statistics[users])
        played = np.where(done < self.steps, done, 0) // self.turns  # masks finished; the last observation is the first again
        if played.any():
            for rounds in set(played.tolist()) - {0}:
                rows = np.flatnonzero(played == rounds)
                pathways[rows] = self.scenario.observe(users[rows], self.plans[slots[rows], :rounds])
        found = {"user": np.asarray(self.scenario.embeddings[users]), "pathways": pathways}
        if self.cost_weight.varies:
            found["cost_weight"] = self.weights[slots, None].astype(np.float32)
        if self.layerwise:
            turn = done % self.turns
            found["turn"] = np.eye(self.turns, dtype=np.float32)[turn]
            decided = np.arange(self.turns) < turn[:, None]
            pathways[..., GATE] = self.plans[slots, np.minimum(done // self.turns, self.rounds - 1)] & decided
        return found

    def latest(self) -> list[tuple[str, NDArray[np.int8]]]:
        """Of every slot the mask ``[P]`` decided last (or being decided) and whose it is, of an episode that is over as well.

        Zeros before the first.
        """
        ids, whose = self.scenario.user_ids, np.where(self.whose < 0, self.users, self.whose)
        return [(ids[user], mask) for user, mask in zip(whose.tolist(), self.last.astype(np.int8), strict=True)]

    def state(self) -> dict[str, list]:
        """JSON-able state, from which :meth:`restore` goes on exactly."""
        names = ("streams", "episodes", "chosen", "users", "weights", "plans", "done", "earned")
        return {name: getattr(self, name).tolist() for name in names}

    def restore(self, state: dict[str, list]) -> None:
        """Take over a :meth:`state`."""
        for name, value in state.items():
            getattr(self, name)[...] = np.asarray(value)

    def _begin_next(self, slots: NDArray[np.int64]) -> None:
        self.episodes[slots] += 1
        laps, places = np.divmod(self.episodes[slots], len(self.pool))
        keys = np.stack([self.streams[slots], laps], 1)
        for row in np.flatnonzero((self._laps[slots] != keys).any(1)):
            rng, slot = np.random.default_rng(keys[row].tolist()), slots[row]
            self._laps[slot], self._order[slot] = keys[row], rng.permutation(self.pool)
            self._drawn[slot] = rng.uniform(self.cost_weight.low, self.cost_weight.high, self._drawn.shape[1])
        self._start(slots, self._order[slots, places])
        self.weights[slots] = self._drawn[slots, places] if self.cost_weight.varies else self.cost_weight.low

    def _begin_chosen(self, slot: int, options: dict[str, Any]) -> None:
        alone = np.array([slot])
        if "user" in options:
            self._start(alone, np.array([self._named(options["user"])]))
            if self.cost_weight.varies:  # of the slot's own stream, but not of its sequence of users
                key = (self.streams[slot], self.episodes[slot] + 1, 1 + self.chosen[slot])
                draw = np.random.default_rng([int(part) for part in key])
                self.chosen[slot] += 1
                self.weights[slot] = draw.uniform(self.cost_weight.low, self.cost_weight.high)
        else:
            self._begin_next(alone)
        if "cost_weight" in options:
            self.weights[slot] = self._allowed(options["cost_weight"])

    def _start(self, slots: NDArray[np.int64], users: NDArray[np.integer]) -> None:
        self.users[slots] = users
        self.plans[slots], self.done[slots], self.earned[slots] = False, 0, 0.0

    def _allowed(self, weight: float) -> float:
        if not self.cost_weight.low <= weight <= self.cost_weight.high:
            raise ValueError(
                f"cost weight {weight:g} is outside {self.cost_weight.given()}; make the environment (or train the policy) "
                "with a range that holds it."
            )
        return float(weight)

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

    def _checked(self, actions: NDArray, count: int) -> Plans:
        actions = np.asarray(actions)
        width = 1 if self.layerwise else len(self.scenario.pathways)
        if actions.ndim != 2 or actions.shape[1] != width:
            what = "an action is one bit" if self.layerwise else f"a mask has {width} bits, one per pathway"
            raise ValueError(f"{what}; got an action of shape {actions.shape[1:]}.")
        if len(actions) != count:
            raise ValueError(f"one mask per user is needed, {count} in all; got {len(actions)} masks.")
        bits = (actions == 0) | (actions == 1)
        if not bits.all():
            raise ValueError(f"a mask holds only 0 and 1; got {actions.dtype} values such as {actions[~bits][0]!r}.")
        return actions.astype(bool)

    def _evaluate(self, slots: NDArray[np.int64]) -> Outcome:
        """One oracle call per number of masks played: a single one as long as slots are in step."""
        parts = np.zeros((3, len(slots)))
        played = self.done[slots] // self.turns
        for rounds in set(played.tolist()):
            rows = np.flatnonzero(played == rounds)
            outcome = self.scenario.oracle.evaluate(self.users[slots[rows]], self.plans[slots[rows], :rounds])
            parts[:, rows] = outcome.accuracy, outcome.loss, outcome.cost
        bad = slots[~np.isfinite(parts).all(0)]
        if len(bad):
            raise FloatingPointError(
                f"user {self.scenario.user_ids[self.users[bad[0]]]!r} got a NaN or infinite accuracy, loss or cost; "
                "mend the oracle, or leave the user out."
            )
        return Outcome(*parts)

    def _user_info(self, slot: int) -> dict[str, Any]:
        user = self.users[slot]
        info = {"user": self.scenario.user_ids[user], **self.scenario.user_info[user]}
        return info | {"cost_weight": float(self.weights[slot])} if self.cost_weight.varies else info

    def _step_infos(self, slots: NDArray[np.int64], masks: Plans, rated: NDArray, outcome: Outcome) -> list[dict[str, Any]]:
        infos = [self._user_info(slot) for slot in slots.tolist()]
        for info, mask, share in zip(infos, masks.astype(np.int8), masks.mean(1).tolist(), strict=True):
            info["active_fraction"], info["mask"] = share, mask
        paid = (-self.weights[slots[rated]] * outcome.cost).tolist()
        values = zip(rated.tolist(), outcome.accuracy.tolist(), outcome.loss.tolist(), outcome.cost.tolist(), paid, strict=True)
        for row, accuracy, loss, cost, price in values:
            infos[row] |= {"accuracy": accuracy, "loss": loss, "cost": cost, "reward_accuracy": accuracy, "reward_cost": price}
        return infos

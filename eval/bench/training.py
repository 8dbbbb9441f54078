"""How long it takes to a trained policy, and how much of that is spent on answers of the oracle."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from agents.learning import learn
from agents.train_ppo import parse, read_settings
from envs.oracles import Oracle, Plans, Users
from envs.scenario import Scenario


class TimedOracle(Oracle):
    """Counts the seconds that another oracle takes, and remembers for what rewards it was asked.

    Attributes:
        seconds: so far. masks: of every call for validation examples, ``[B, P]``.
    """

    def __init__(self, oracle: Oracle) -> None:
        self.oracle, self.costs = oracle, oracle.costs
        self.seconds = 0.0
        self.masks: list[Plans] = []

    def measure(self, users: Users, plans: Plans, roles: tuple[str, ...]) -> NDArray[np.float64]:
        """See :meth:`Oracle.measure`."""
        start = time.perf_counter()
        found = self.oracle.measure(users, plans, roles)
        self.seconds += time.perf_counter() - start
        if "validation" in roles:
            self.masks.append(plans[:, -1])
        return found


@dataclass(frozen=True)
class Trained:
    """What one training run took.

    Attributes:
        seconds: in all. oracle: of these, those in which the oracle was at work.
        masks: ``[steps, P]``, those that were rewarded, in that order.
    """

    seconds: float
    oracle: float
    masks: Plans

    @property
    def rest(self) -> float:
        """Seconds of PPO itself: networks, rollouts, files."""
        return self.seconds - self.oracle


def trained(env_id: str, scenario: Scenario, oracle: Oracle, steps: int) -> Trained:
    """Train a policy as ``python -m agents.train_ppo`` does, its looks at val users included; nothing of it is kept.

    Args:
        env_id: whose settings in ``agents/hyperparameters/ppo.yml`` are taken.
        scenario: what is played.
        oracle: takes the place of the scenario's own.
        steps: of the environment.
    """
    timed = TimedOracle(oracle)
    config = read_settings(parse(["--env", env_id, "--total-timesteps", str(steps)]))
    played = replace(scenario, oracle=timed, save=lambda: None)
    start = time.perf_counter()
    with TemporaryDirectory() as folder:
        learn(config, played, Path(folder))
    # The last ones are PPO's own: what a warm start tries comes before them.
    return Trained(time.perf_counter() - start, timed.seconds, np.concatenate(timed.masks)[-steps:])

"""A problem in which the best mask depends on the user and on the cost weight, and is known for both."""

from dataclasses import replace

import numpy as np

from envs.oracles import FormulaOracle
from envs.planted import PATHWAYS, planted
from envs.scenario import Scenario
from envs.statistics import NAMES

GAINS = np.arange(1, PATHWAYS + 1) / 144
"""What the pathways add to the accuracy, in an order of each user's own: a quarter in all. Each costs an eighth."""


def graded() -> Scenario:
    """The planted problem with :data:`GAINS` for needs; the statistic ``gradient_norm`` is a pathway's rank plus noise.

    A pathway is worth its cost below a cost weight of eight times its gain: all are below .05, six at .15, three at .3, none
    above .45. No static mask earns anything from a weight of a quarter on.
    """
    scenario, rng = planted(), np.random.default_rng(0)
    ranks = rng.permuted(np.tile(np.arange(PATHWAYS), (len(scenario.user_ids), 1)), axis=1)
    gains = GAINS[ranks]
    statistics = scenario.statistics.copy()
    statistics[..., NAMES.index("gradient_norm")] = ranks / 3.5 - 1 + rng.normal(0, 0.02, ranks.shape)
    return replace(
        scenario,
        name="graded",
        statistics=statistics,
        oracle=FormulaOracle(scenario.oracle.costs, lambda users, masks: (masks * gains[users]).sum(1)),
        fingerprint="graded",
    )


def optimum(weight: float) -> float:
    """The greatest reward at a cost weight, the same for every user."""
    return float(np.maximum(GAINS - weight / PATHWAYS, 0).sum())


def best_share(weight: float) -> float:
    """The share of pathways that are worth it at a cost weight."""
    return float((GAINS - weight / PATHWAYS > 0).mean())

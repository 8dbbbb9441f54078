"""Where every method stands in accuracy and cost: masks chosen on train and val users, points measured on test users.

Shapes: K points of a method, U users, P pathways. Points are ``[K, U, 2]``, cost and query accuracy (:mod:`eval.pareto`).
"""

from collections.abc import Sequence

import numpy as np

from agents.rivals import SAMPLE, candidate_masks, outcome_table
from envs.oracles import Outcome, Plans, Users
from envs.scenario import Scenario
from eval.pareto import Points

WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3)
"""Cost weights at which every method that takes one is measured; hypervolumes are compared over these."""
FINE_WEIGHTS = tuple(np.linspace(0, 0.5, 51).tolist())
"""The static front's own, which cost it nothing: it may pick a mask for every price."""
PROBABILITIES = tuple(np.linspace(0, 1, 11).tolist())
RANDOM_DRAWS = 10


def static_masks(scenario: Scenario, seed: int) -> Plans:
    """One mask for everybody at every price and of every size, chosen by validation examples of train users.

    By the highest mean reward at each of :data:`FINE_WEIGHTS`, then by the highest mean accuracy among the masks of 0, 1, ...
    P pathways, ``[len(FINE_WEIGHTS) + P + 1, P]``. Test users have no part in it.

    Args:
        scenario: whose train users. Which masks are tried, :func:`agents.rivals.candidate_masks` says.
        seed: of the sample of users and masks.
    """
    rng, pathways = np.random.default_rng(seed), len(scenario.pathways)
    masks = candidate_masks(pathways, rng)
    users = rng.permutation(scenario.users("train"))[:SAMPLE]
    table = outcome_table(scenario, users, masks, "validation", "static masks of every price and size")
    mean = Outcome(*(field.mean(0) for field in (table.accuracy, table.loss, table.cost)))
    by_price = [mean.reward(weight).argmax() for weight in FINE_WEIGHTS]
    sizes = masks.sum(1)
    by_size = [np.where(sizes == size, mean.accuracy, -np.inf).argmax() for size in range(pathways + 1) if size in sizes]
    return masks[by_price + by_size]


def measured(scenario: Scenario, users: Users, masks: Sequence[Plans]) -> Points:
    """Points ``[K, U, 2]`` of K choices of masks ``[U, P]`` on the users' query examples."""
    outcomes = [scenario.oracle.evaluate(users, plans, "query") for plans in masks]
    return np.stack([np.stack([one.cost, one.accuracy], -1) for one in outcomes])


def for_everybody(masks: Plans, users: Users) -> list[Plans]:
    """Static masks ``[K, P]`` as K choices ``[U, P]``."""
    return [np.repeat(mask[None], len(users), axis=0) for mask in masks]


def random_points(scenario: Scenario, users: Users, seed: int) -> Points:
    """Independent bits at each of :data:`PROBABILITIES`, every user's mean over :data:`RANDOM_DRAWS` draws."""
    rng, shape = np.random.default_rng([seed, 78]), (len(users), len(scenario.pathways))
    draws = [measured(scenario, users, [rng.random(shape) < p for p in PROBABILITIES]) for _ in range(RANDOM_DRAWS)]
    return np.mean(draws, axis=0)

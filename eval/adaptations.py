"""What choosing a mask costs a *new* user: query reward against adaptations spent, for the policy and for searches.

Every search sees the user's own *validation* reward after each adaptation, keeps the best mask seen so far, and is reported
by the *query* reward of that mask. The policy sees no validation labels at all: it chooses from the support alone, so the
comparison leaves its rivals that many labels ahead. Shapes: U users, P pathways, M candidate masks, N adaptations at most.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from envs.oracles import Plans, Users
from envs.scenario import Scenario
from eval.mask_searches import Ask, Prior, bayesian_optimisation, candidates_of, greedy_forward, random_search

BUDGET = 128
POLICY_ADAPTATIONS = 2
"""What the policy spends on a new user: one adaptation under the mask it chose, and its observation's statistics, one forward
and one backward pass over the support with all gates on. An adaptation is several such passes, so counting the statistics
as one more is to the policy's disadvantage."""
ORDERS = 10
"""Random orders over which random search is averaged."""
LENGTHS, NOISES = (0.7, 1.2, 2.0, 3.5), (0.1, 0.3, 1.0)
"""From which the Gaussian process' length scale (in square roots of bits) and noise (in its prior deviations) are chosen."""
PRIOR_USERS, PRIOR_MASKS = 48, 16


def asking(scenario: Scenario, cost_weight: float) -> Ask:
    """Validation rewards at a cost weight."""
    return lambda users, masks: scenario.oracle.evaluate(users, masks, "validation").reward(cost_weight)


def query_rewards(scenario: Scenario, users: Users, incumbents: Plans, cost_weight: float) -> NDArray[np.float64]:
    """What the incumbents ``[N + 1, U, P]`` earn on query examples, ``[N + 1, U]``."""
    return np.stack([scenario.oracle.evaluate(users, masks, "query").reward(cost_weight) for masks in incumbents])


def fitted_prior(scenario: Scenario, candidates: Plans, cost_weight: float, budget: int, seed: int) -> Prior:
    """The process' hyperparameters from val users, before any test user is seen.

    Mean and deviation: of the gain over ``all_off`` of random masks. Length scale and noise: those with which the incumbents'
    mean query reward over the whole budget is highest.
    """
    rng = np.random.default_rng([seed, 79])
    users, ask = rng.permutation(scenario.users("val"))[:PRIOR_USERS], asking(scenario, cost_weight)
    masks = rng.permutation(candidates)[:PRIOR_MASKS]
    off = ask(users, np.zeros((len(users), candidates.shape[1]), dtype=bool))
    gains = np.stack([ask(users, np.repeat(mask[None], len(users), axis=0)) - off for mask in masks])
    priors = [Prior(float(gains.mean()), float(gains.std()) or 1.0, length, noise) for length in LENGTHS for noise in NOISES]

    def worth(prior: Prior) -> float:
        found = bayesian_optimisation(users, candidates, ask, budget, prior)
        return float(query_rewards(scenario, users, found, cost_weight).mean())

    return max(priors, key=worth)


@dataclass(frozen=True)
class Spending:
    """Query rewards of one seed's users at one cost weight.

    Attributes:
        policy: ``[U]``, after :data:`POLICY_ADAPTATIONS`. searches: by name ``[N + 1, U]``, after 0, 1, ... N adaptations.
    """

    policy: NDArray[np.float64]
    searches: Mapping[str, NDArray[np.float64]]


def spending(
    scenario: Scenario, choose: Callable[[Users], Plans], cost_weight: float, seed: int, budget: int = BUDGET
) -> Spending:
    """Measure the policy and every search on test users.

    Args:
        scenario: whose users.
        choose: the gating policy, ``users [U] -> masks [U, P]``.
        cost_weight: lambda.
        seed: of the searches' orders.
        budget: N, adaptations per user.
    """
    users, ask, pathways = scenario.users("test"), asking(scenario, cost_weight), len(scenario.pathways)
    rng = np.random.default_rng([seed, 80])
    candidates = candidates_of(pathways, rng)

    def rewards(incumbents: Plans) -> NDArray[np.float64]:
        return query_rewards(scenario, users, incumbents, cost_weight)

    drawn = [rewards(random_search(users, candidates, ask, budget, rng)) for _ in range(ORDERS)]
    prior = fitted_prior(scenario, candidates, cost_weight, budget, seed)
    found = {
        "random search": np.mean(drawn, axis=0),
        "greedy forward selection": rewards(greedy_forward(users, pathways, ask, budget, rng)),
        "Bayesian optimisation": rewards(bayesian_optimisation(users, candidates, ask, budget, prior)),
    }
    scenario.save()
    return Spending(rewards(choose(users)[None])[0], found)


def needed(curve: NDArray[np.float64], goal: float) -> int | None:
    """The least number of adaptations after which a search's mean reward ``[N + 1]`` is at least a goal; None if never."""
    reached = np.flatnonzero(curve >= goal - 1e-12)
    return int(reached[0]) if len(reached) else None


def paid_back(training: int, rival: int | None, budget: int = BUDGET) -> str:
    """After how many users the policy's training has paid for itself, as a clause.

    Training spends adaptations once; every new user then saves what the cheapest search with the same mean reward needs
    beyond the policy's own :data:`POLICY_ADAPTATIONS`.

    Args:
        training: adaptations that training spent.
        rival: adaptations per user of that search; None where none gets there within the budget.
        budget: N.
    """
    if rival is not None and rival <= POLICY_ADAPTATIONS:
        return f"a search reaches its reward with {rival} adaptations per user: training never pays for itself"
    users = -(-training // ((rival or budget) - POLICY_ADAPTATIONS))
    if rival is None:
        return (
            f"no search reaches its reward by {budget} adaptations per user; against {budget}, {users:,} users pay for training"
        )
    return f"the cheapest search that reaches its reward needs {rival} adaptations per user: {users:,} users pay for training"

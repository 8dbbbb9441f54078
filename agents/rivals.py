"""Other ways to choose masks, which the learned policy is always shown beside.

Every function returns masks ``[B, P]`` bool for users given by position ``[B]``. Choices for a population are made on
train users (``best_static``) or val users (thresholds), never on those they are reported for.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from backbones.costs import CostModel
from envs.oracles import Outcome, Plans, Users, all_masks
from envs.scenario import Scenario

EXHAUSTIVE = 8
"""Up to this many pathways every mask is tried."""
SAMPLED = 256
SAMPLE = 600
"""Of more train users than this, so many are drawn for what is said about all of them."""
THRESHOLDS = 32
ROUNDING = 1e-4
"""How far, relative to it, a threshold lies below the score that it is to let through."""


def some_train_users(scenario: Scenario, rng: np.random.Generator) -> Users:
    """The train users in a random order, :data:`SAMPLE` of them at most."""
    return rng.permutation(scenario.users("train"))[:SAMPLE]


def suffixes(pathways: int) -> Plans:
    """Masks ``[P + 1, P]`` of the last 0, 1, ... P pathways."""
    return np.arange(pathways) >= pathways - np.arange(pathways + 1)[:, None]


def masks_of_every_density(pathways: int, count: int, rng: np.random.Generator) -> Plans:
    """So many different masks in random order, each drawn with a probability of its own; fewer where there are not as many."""
    drawn = rng.random((8 * count, pathways)) < rng.random((8 * count, 1))
    first = np.unique(drawn, axis=0, return_index=True)[1]  # of equal ones; the order of the draws keeps few and many alike
    return drawn[np.sort(first)[:count]]


def candidate_masks(pathways: int, rng: np.random.Generator, always: Plans | None = None) -> Plans:
    """Masks that searches try: every one if P <= 8, else the simple ones, 256 of every density, and ``always``.

    Simple are all-off, all-on, every single pathway, and the last 1, 2, ... of them.
    """
    if pathways <= EXHAUSTIVE:
        return all_masks(pathways)
    named = [np.eye(pathways, dtype=bool), suffixes(pathways), masks_of_every_density(pathways, SAMPLED, rng)]
    return np.unique(np.concatenate([*named, *([] if always is None else [np.atleast_2d(always)])]), axis=0)


def outcome_table(scenario: Scenario, users: Users, masks: Plans, role: str, label: str) -> Outcome:
    """Every mask for every user, each field ``[B, M]``, with a progress bar.

    Masks are asked in the order of their first active pathway, so that batches start as deep as they can.
    """
    first = np.where(masks.any(1), masks.argmax(1), masks.shape[1])
    fields = np.empty((3, len(users), len(masks)))
    for m in tqdm(np.argsort(first, kind="stable"), desc=label, unit="mask"):
        plans = np.repeat(masks[m][None], len(users), axis=0)
        outcome = scenario.oracle.evaluate(users, plans, role)
        fields[:, :, m] = outcome.accuracy, outcome.loss, outcome.cost
    scenario.save()
    return Outcome(*fields)


def best_static(scenario: Scenario, cost_weight: float, seed: int = 0) -> NDArray[np.bool_]:
    """The mask ``[P]`` with the highest mean validation reward over train users (or :data:`SAMPLE` of them).

    Where not every mask is a candidate, a local search goes on from the best one: one or two pathways are switched at a time
    for as long as that is better for these users.
    """
    rng = np.random.default_rng(seed)
    users = some_train_users(scenario, rng)
    best, most = _halved(scenario, users, candidate_masks(len(scenario.pathways), rng), cost_weight)
    while len(best) > EXHAUSTIVE:
        found, reward = _halved(scenario, users, neighbours(best), cost_weight)
        if reward <= most:
            break
        best, most = found, reward
    return best


def neighbours(mask: NDArray[np.bool_]) -> Plans:
    """A mask and all that differ from it in one or two pathways, ``[1 + P (P + 1) / 2, P]``."""
    one = np.eye(len(mask), dtype=bool)
    two = one[:, None] ^ one  # none on the diagonal
    return mask ^ np.unique(np.concatenate([one, two.reshape(-1, len(mask))]), axis=0)


def _halved(scenario: Scenario, users: Users, masks: Plans, cost_weight: float) -> tuple[NDArray[np.bool_], float]:
    """Of masks ``[M, P]`` the best one for everybody, and its mean validation reward.

    Found by successive halving (Karnin et al. 2013): all on a few users; the better quarter, and whatever is within two paired
    standard errors of the best, on three times as many; the last ones on every user.
    """
    shown = max(1, min(40, len(users)))
    while len(masks) > 4 and shown < len(users):
        table = outcome_table(scenario, users[:shown], masks, "validation", f"best static mask: {len(masks)} left")
        rewards = table.reward(cost_weight)
        order = np.argsort(-rewards.mean(0), kind="stable")
        behind = rewards[:, order[:1]] - rewards
        close = behind.mean(0) <= 2 * behind.std(0) / shown**0.5
        close[order[: max(4, len(masks) // 4)]] = True
        masks, shown = masks[close], min(3 * shown, len(users))
    table = outcome_table(scenario, users, masks, "validation", "best static mask: final")
    rewards = table.reward(cost_weight).mean(0)
    return masks[rewards.argmax()], float(rewards.max())


def searched(scenario: Scenario, users: Users, cost_weight: float, role: str, always: Plans, label: str) -> Plans:
    """Each user's own best mask among the candidates by reward on ``role``; ties go to the cheapest."""
    masks = candidate_masks(len(scenario.pathways), np.random.default_rng(0), always)
    rewards = outcome_table(scenario, users, masks, role, label).reward(cost_weight)
    return masks[(rewards - 1e-9 * scenario.oracle.costs.of(masks)).argmax(1)]


def thresholded(scenario: Scenario, users: Users, cost_weight: float, score: str) -> Plans:
    """Pathways whose score is at least a threshold, the one of 33 with the highest query reward on val users.

    Args:
        scenario: whose scores and val users.
        users: positions ``[B]``.
        cost_weight: lambda.
        score: ``gradient_norm``, or ``relative_gradient`` (gradient norm over weight norm, after Lee et al. 2022,
            "Surgical fine-tuning").
    """
    scores = scenario.scores[score]
    known = scores[scenario.users("val")]
    return scores[users] >= best_threshold(known, val_reward(scenario, cost_weight), f"threshold on {score}")


def best_threshold(scores: NDArray[np.float64], worth: Callable[[Plans], float], label: str) -> float:
    """The threshold at which the masks ``scores >= threshold`` are worth most; of equal ones the lowest.

    Tried are 32 quantiles of the scores, from all on to the highest alone, and infinity. Each lies a little below its quantile:
    in whose company a user's scores are computed may change their last bits, and must not change a mask.

    Args:
        scores: ``[V, P]``, of the users on whom the threshold is chosen.
        worth: what masks ``[V, P]`` are worth to them.
        label: of the progress bar.
    """
    quantiles = np.quantile(scores, np.linspace(0, 1, THRESHOLDS))
    thresholds = [*(quantiles - ROUNDING * np.abs(quantiles)), np.inf]
    found = [worth(scores >= t) for t in tqdm(thresholds, desc=label, unit="threshold")]
    return float(thresholds[int(np.argmax(found))])


def val_reward(scenario: Scenario, cost_weight: float) -> Callable[[Plans], float]:
    """What masks of the val users ``[V, P]`` are worth: their mean reward on query examples."""
    val = scenario.users("val")
    return lambda masks: float(scenario.oracle.evaluate(val, masks, "query").reward(cost_weight).mean())


def random_masks(masks: Plans, costs: CostModel, rng: np.random.Generator) -> Plans:
    """Independent bits, all with the one probability at which the mean cost is that of ``masks``."""
    return rng.random(masks.shape) < costs.probability(costs.of(masks).mean())


def shuffled_masks(masks: Plans, rng: np.random.Generator) -> Plans:
    """The same masks dealt to other users: nobody keeps their own place."""
    if len(masks) < 2:
        raise ValueError("masks can be shuffled only between two users or more.")
    order = rng.permutation(len(masks))
    dealt = np.empty_like(masks)
    dealt[order] = masks[np.roll(order, 1)]
    return dealt

"""``dsa/Planted-v0``: a pathway-selection problem whose best masks are known, for tests and tutorials."""

import numpy as np
from numpy.typing import NDArray

from envs.oracles import FormulaOracle
from envs.scenario import Scenario
from envs.single import PathwaySelectionEnv
from envs.statistics import NAMES
from users.embedding import WIDTH

PATHWAYS = 8
TRAITS = 4


class PlantedEnv(PathwaySelectionEnv):
    """A toy with a known best mask for every user; it runs in microseconds.

    ## Description

    Every user has four hidden traits. A fixed random linear map of the traits says for each of eight pathways whether
    the user needs it. Accuracy is the share of pathways whose gate is right. Users come in pairs of opposite needs, so
    no static mask gets more than half of the gates right: the best static mask earns at most 60 % of the optimum.

    ## Observation space

    A ``Dict`` of ``user`` ``[32]``, the traits padded with zeros, and ``pathways`` ``[8, 8]``, of which the statistic
    ``gradient_norm`` is the pathway's need plus noise, ``depth``, ``cost`` and ``gate`` are as everywhere, and the
    others are noise.

    ## Action space

    ``MultiBinary(8)``, one bit per pathway.

    ## Rewards

    ``share of right gates - cost_weight * share of active pathways``. The optimum is ``1 - cost_weight / 2`` on
    average.

    ## Starting state

    The next user of a random order.

    ## Episode end

    ``terminated`` after ``rounds`` decisions (default 1), never ``truncated``. With several rounds the reward of each is
    the gain over the round before, so that the return is the value of the last mask.

    ## Arguments

    * ``split`` (``"train"``), ``cost_weight`` (0.1), ``rounds`` (1), ``layerwise`` (False), ``render_mode``: see
      :class:`envs.single.PathwaySelectionEnv`, also for what a range of cost weights and ``layerwise`` add to observations;
    * ``seed`` (0): of the traits and the map; ``users`` (400): in all, half of them train users.

    ``info`` holds ``user``, ``best_mask``, and after a step ``accuracy``, ``loss``, ``cost``, ``active_fraction``,
    ``mask``, ``reward_accuracy``, ``reward_cost``.

    ## Versions

    * v0: first version.
    """


def planted(seed: int = 0, users: int = 400) -> Scenario:
    """The scenario of :class:`PlantedEnv`. ``users`` must be a multiple of 8."""
    if users < 8 or users % 8:
        raise ValueError(f"users must be a positive multiple of 8 (pairs in each split), got {users}.")
    rng = np.random.default_rng(seed)
    half = rng.normal(size=(users // 2, TRAITS))
    traits = np.stack([half, -half], 1).reshape(users, TRAITS)
    need = traits @ rng.normal(size=(TRAITS, PATHWAYS))
    best = need > 0
    embeddings = np.zeros((users, WIDTH), dtype=np.float32)
    embeddings[:, :TRAITS] = traits
    statistics = rng.normal(size=(users, PATHWAYS, len(NAMES))).astype(np.float32)
    statistics[..., NAMES.index("gradient_norm")] = need + 0.1 * statistics[..., NAMES.index("gradient_norm")]
    statistics[..., NAMES.index("depth")] = np.linspace(0, 1, PATHWAYS)
    statistics[..., NAMES.index("cost")] = 1 / PATHWAYS
    statistics[..., NAMES.index("gate")] = 1
    statistics = statistics.clip(-5, 5)

    def accuracy(who: NDArray[np.int64], masks: NDArray[np.bool_]) -> NDArray[np.float64]:
        return (masks == best[who]).mean(1)

    def observe(who: NDArray[np.int64], plans: NDArray[np.bool_]) -> NDArray[np.float32]:
        now = statistics[who].copy()
        now[..., NAMES.index("gate")] = plans[:, -1]
        return now

    cuts = np.split(np.arange(users), [users // 2, 3 * users // 4])
    return Scenario(
        name="planted",
        pathways=tuple(f"pathway{p}" for p in range(PATHWAYS)),
        splits=dict(zip(("train", "val", "test"), cuts, strict=True)),
        user_ids=tuple(f"user-{u}" for u in range(users)),
        user_info=tuple({"best_mask": "".join(str(int(bit)) for bit in row)} for row in best),
        embeddings=embeddings,
        statistics=statistics,
        oracle=FormulaOracle(np.full(PATHWAYS, 1 / PATHWAYS), accuracy),
        observe=observe,
        groups=("all",) * users,
        label_counts={role: np.zeros(users, dtype=np.int64) for role in ("support", "validation")},
        fingerprint=f"planted-{seed}-{users}",
        scores={name: np.abs(need) for name in ("gradient_norm", "relative_gradient")},
    )

"""From a population, a model with pathways and a meta-initialisation to a scenario. The same for every backbone."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from envs.oracles import CachedOracle, LiveOracle, Plans, Users
from envs.scenario import Scenario
from envs.statistics import PathwayStatistics, Raw
from users.base import SPLITS
from users.embedding import UserEmbedder


def modelled_scenario(
    name: str, live: LiveOracle, fingerprint: str, folder: Path | None, seconds: Mapping[str, float]
) -> Scenario:
    """A scenario over a real model.

    Args:
        name: for reports.
        live: oracle over the population; it holds the pathways and the meta-initialisation.
        fingerprint: a hash of users, model and initialisation: of all that determines observations and answers.
        folder: where the oracle's answers are kept on disk; None keeps them in memory.
        seconds: what its parts took to make.
    """
    population, pathways = live.population, live.pathways
    supports = [live.batch(split, "support") for split in SPLITS]
    embedder = UserEmbedder.fit(pathways.model, supports[0])
    statistics = PathwayStatistics.fit(pathways, live.init, supports[0])
    raw = Raw.cat([statistics.raw(support) for support in supports])
    splits = {split: np.array(population.indices(split)) for split in SPLITS}
    query_of = ~np.isin(np.arange(len(population.users)), splits["train"])
    cached = CachedOracle(live, query_of, folder and folder / f"answers-{fingerprint}")

    def observe(users: Users, plans: Plans) -> NDArray[np.float32]:
        return live.statistics(statistics, users, plans).numpy()

    return Scenario(
        name=name,
        pathways=pathways.names,
        splits=splits,
        user_ids=tuple(user.user_id for user in population.users),
        user_info=tuple({k: v for k, v in user.info.items() if k != "group"} for user in population.users),
        embeddings=torch.cat([embedder.embed(support) for support in supports]).numpy(),
        statistics=statistics.observe(raw).numpy(),
        oracle=cached,
        observe=observe,
        groups=tuple(str(user.info.get("group", "all")) for user in population.users),
        label_counts={
            role: np.array([len(getattr(user, role)) for user in population.users]) for role in ("support", "validation")
        },
        scores={
            "gradient_norm": raw.gradient_norm.double().numpy(),
            "relative_gradient": raw.relative_gradient.double().numpy(),
        },
        fingerprint=fingerprint,
        seconds=seconds,
        save=cached.save,
    )

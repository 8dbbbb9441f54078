"""Any population and any backbone as a pathway-selection environment: ``dsa/Personal-v0``, and what the others are made of."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backbones.artefacts import cache_key
from backbones.base import hash_tensors
from backbones.pathways import Weights
from envs.oracles import CachedOracle, LiveOracle, Plans, Users
from envs.scenario import Choose, Scenario
from envs.single import PathwaySelectionEnv
from envs.statistics import PathwayStatistics, Raw
from meta.inner import adapt
from meta.prepare import folder_of, further_arguments, prepared
from meta.trainer import MetaConfig, meta_initialisation
from users.base import SPLITS
from users.batch import fresh_support
from users.embedding import DEFAULT, UserEmbedder, check_parts


class PersonalEnv(PathwaySelectionEnv):
    """Personalise any registered backbone for any registered population, your own table among them.

    ## Description

    The population's users have labelled examples; a classifier is fitted on the backbone's features (with examples that
    nobody is rewarded on) and frozen with it. Every block of the backbone has a pathway and every user a head; they start
    from a meta-learned initialisation. The agent sees what a user's support set tells and decides which pathways are on;
    these are then adapted on it by a few gradient steps.

    ## Observation space

    A ``Dict``, all float32 within +-10, all from the support set alone:

    * ``user`` ``[32]``: the embedding of :class:`users.embedding.UserEmbedder`;
    * ``pathways`` ``[P, 8]``: see :data:`envs.statistics.NAMES`.

    ## Action space

    ``MultiBinary(P)``: one bit per block in order of depth, then the head. All zero is `all_off`, the model as it was.

    ## Rewards

    ``accuracy on the validation examples - cost_weight * cost``, where ``cost`` is the share of the personal parameters
    that are switched on.

    ## Starting state

    The next user of a random order of the split.

    ## Episode end

    ``terminated`` after ``rounds`` decisions (default 1), never ``truncated``; see :class:`envs.digits.DigitsResNetEnv`.

    ## Arguments

    * ``users`` (``"digits"``): a name from :data:`users.POPULATIONS`; ``backbone`` (``"resnet-small"``): one from
      :data:`backbones.BACKBONES`. Arguments of their factories (``data_root``, ``data``, ``shots``, ``max_users``,
      ``source``, ``weights``, ...) are given beside them;
    * ``split`` (``"train"``), ``cost_weight`` (0.1), ``rounds`` (1), ``render_mode`` (``"ansi"``, ``"rgb_array"``);
    * ``seed`` (0): of users, backbone and meta-initialisation, as far as these are ours to draw;
    * ``placement`` (``"side"``), ``rank`` (16);
    * ``algorithm`` (``"fomaml"``), ``meta_steps`` (2000), ``meta_users`` (16), ``inner_steps`` (3), ``inner_rate`` (0.1),
      ``head_rate`` (None), ``outer_rate`` (0.001), ``rate_of_rates`` (0.01), ``all_on`` (0.2), ``resample`` (True),
      ``neutral`` (False), ``keep`` (``"best"``): see :class:`meta.trainer.MetaConfig`;
    * ``embedding``: parts of the user embedding, see :data:`users.embedding.PARTS`.

    What the first ``make`` builds is kept in ``$DSA_CACHE`` or ``~/.cache/dynamic-sparse-adapters``. ``info`` holds
    ``user`` and the population's facts about them, and after a step ``accuracy``, ``loss``, ``cost``,
    ``active_fraction``, ``mask``, ``reward_accuracy``, ``reward_cost``.

    ## Versions

    * v0: first version.
    """


def modelled(
    users: str,
    backbone: str,
    placement: str = "side",
    rank: int = 16,
    seed: int = 0,
    algorithm: str = "fomaml",
    meta_steps: int = 2000,
    meta_users: int = 16,
    inner_steps: int = 3,
    inner_rate: float = 0.1,
    head_rate: float | None = None,
    outer_rate: float = 1e-3,
    rate_of_rates: float = 1e-2,
    all_on: float = 0.2,
    resample: bool = True,
    neutral: bool = False,
    keep: str = "best",
    embedding: Sequence[str] = DEFAULT,
    **more: Any,
) -> Scenario:
    """The scenario of :class:`PersonalEnv`, its artefacts made or loaded; ``more`` goes to population and backbone.

    An argument that both know (``data_root``) goes to both.
    """
    check_parts(embedding)
    folder = folder_of(users, backbone)
    start = time.perf_counter()
    data = prepared(users, backbone, placement, rank, seed, folder, more)
    pretrained = time.perf_counter()
    config = MetaConfig(
        algorithm,
        meta_steps,
        meta_users,
        inner_steps,
        inner_rate,
        head_rate,
        outer_rate,
        rate_of_rates,
        all_on,
        resample=resample,
        neutral=neutral,
        keep=keep,
        seed=seed,
    )
    init = meta_initialisation(data, config, folder)
    seconds = {"pretrain": pretrained - start, "meta": time.perf_counter() - pretrained}
    model, who = data.pathways.model.fingerprint(), data.population.fingerprint()
    key = cache_key(init=hash_tensors(init.tensors()), users=who, model=model, placement=placement)
    return modelled_scenario(
        f"{users}-{backbone}",
        LiveOracle(data, init, chunk=512 if data.pathways.pooled else 64),
        key,
        folder,
        seconds,
        embedding,
    )


modelled.further_arguments = further_arguments  # type: ignore[attr-defined]


def modelled_scenario(
    name: str,
    live: LiveOracle,
    fingerprint: str,
    folder: Path | None,
    seconds: Mapping[str, float],
    embedding: Sequence[str] = DEFAULT,
) -> Scenario:
    """A scenario over a real model.

    Args:
        name: for reports.
        live: oracle over the population; it holds the pathways and the meta-initialisation.
        fingerprint: a hash of users, model and initialisation: of all that determines observations and answers.
        folder: where the oracle's answers are kept on disk; None keeps them in memory.
        seconds: what its parts took to make.
        embedding: parts of the user embedding, names from :data:`users.embedding.PARTS`.
    """
    population, pathways = live.population, live.pathways
    supports = [live.batch(split, "support") for split in SPLITS]
    embedder = UserEmbedder.fit(pathways.model, supports[0], embedding)
    statistics = PathwayStatistics.fit(pathways, live.init, supports[0])
    raw = Raw.cat([statistics.raw(support) for support in supports])
    splits = {split: np.array(population.indices(split)) for split in SPLITS}
    query_of = ~np.isin(np.arange(len(population.users)), splits["train"])
    cached = CachedOracle(live, query_of, folder and folder / f"answers-{fingerprint}")

    def personalise(user: int, choose: Choose) -> Weights:
        one = fresh_support(pathways, population, population.users[user])
        observation = {"user": embedder.embed(one).numpy(), "pathways": statistics.observe(statistics.raw(one)).numpy()}
        return adapt(pathways, live.init, one, torch.from_numpy(choose(observation)).bool())

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
        fingerprint=fingerprint if tuple(embedding) == DEFAULT else f"{fingerprint}-{'-'.join(embedding)}",
        seconds=seconds,
        save=cached.save,
        data=live.data,
        personalise=personalise,
        notes=(*population.notes, *live.data.remarks),
    )

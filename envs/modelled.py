"""Any population and any backbone as a pathway-selection environment: ``dsa/Personal-v0``, and what the others are made of."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from backbones.artefacts import cache_key
from backbones.base import hash_tensors
from backbones.pathways import Weights
from backbones.registry import did_you_mean
from envs.by_user import SCORES, Observed
from envs.local_release import DIRECTIONS, released
from envs.oracles import CachedOracle, LiveOracle, Plans, Users, check_precision
from envs.scenario import Choose, Scenario
from envs.single import PathwaySelectionEnv
from envs.statistics import PathwayStatistics
from meta.inner import MetaInit, adapt
from meta.learned import meta_initialisation
from meta.prepare import check_further, folder_of, further_arguments, prepared
from meta.store import init_facts, load_init
from meta.trainer import MetaConfig
from users.base import SPLITS, Population
from users.batch import Prepared, fresh_support
from users.embedding import DEFAULT, UserEmbedder, check_parts
from users.kept import MEMORY
from users.lazy import OnDemand

T = TypeVar("T")
SAMPLE = 2_000
"""Train users on whom observations are standardised where users are drawn on demand: the first of them."""
OBSERVED, OBSERVED_ON = "observed on", ("train", "val")
ANSWERS = 200_000
"""Answers that are remembered where users are drawn on demand, about 60 MB."""


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
    * ``split`` (``"train"``), ``cost_weight`` (0.1), ``rounds`` (1), ``layerwise`` (False), ``render_mode``: see
      :class:`envs.single.PathwaySelectionEnv`, also for what a range of cost weights and ``layerwise`` add to observations;
    * ``seed`` (0): of users, backbone and meta-initialisation, as far as these are ours to draw;
    * ``placement`` (``"side"``), ``rank`` (16);
    * ``algorithm`` (``"fomaml"``), ``meta_steps`` (2000), ``meta_users`` (16), ``inner_steps`` (3), ``inner_rate`` (0.1; in the
      placement ``lora`` a tenth of it), ``head_rate`` (None), ``outer_rate`` (0.001), ``rate_of_rates`` (0.01), ``all_on``
      (0.2), ``resample`` (True), ``neutral`` (False), ``start_steps`` (0), ``start_copies`` (0), ``start_augment``
      (``"shift"``), ``keep`` (``"best"``), ``shrink`` (True): see :class:`meta.trainer.MetaConfig`;
    * ``gates`` (``"adapters"``): what a mask may switch; ``"exit"`` makes the model's own readout a pathway, without which
      inference may end early (``placement="side"``), see :class:`envs.unipen.UnipenResNetExitEnv`; ``"skip"`` gives a gate to
      every block of one shape in and out, the identity being run in its place (not with ``placement="lora"``); or
      ``"exit+skip"``;
    * ``cost`` (``"parameters"``): what cost counts; ``"flops"`` or ``"latency"`` (measured by ``python -m envs.latency``): all
      that runs, the backbone included;
    * ``embedding``: parts of the user embedding, see :data:`users.embedding.PARTS`;
    * ``observed_on`` (``"train"``): on whose support sets embeddings and statistics are fitted and standardised; ``"val"``
      where train users are promised privacy and val users are not;
    * ``init`` (None): a saved meta-initialisation to start from (its path without suffix, see :func:`meta.store.save_init`)
      instead of learning one; the arguments of meta-training then count for nothing;
    * ``local_epsilon`` (None): policies see what a device would send of its user under local differential privacy, see
      :mod:`envs.local_release` (extra ``privacy``; needs ``observed_on="val"``); ``local_directions`` (4): of the observation,
      that are sent;
    * ``memory`` (4.0): GB of frozen states that are kept of users who own their examples; results do not depend on it;
    * ``precision`` (``"float32"``): ``"bfloat16"`` adapts and measures in lower precision.

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
    start_steps: int = 0,
    start_copies: int = 0,
    start_augment: str = "shift",
    keep: str = "best",
    shrink: bool = True,
    embedding: Sequence[str] | str = DEFAULT,
    observed_on: str = "train",
    init: str | None = None,
    memory: float = MEMORY,
    precision: str = "float32",
    gates: str = "adapters",
    cost: str = "parameters",
    local_epsilon: float | None = None,
    local_directions: int = DIRECTIONS,
    **more: Any,
) -> Scenario:
    """The scenario of :class:`PersonalEnv`, its artefacts made or loaded; ``more`` goes to population and backbone.

    An argument that both know (``data_root``) goes to both.

    Raises:
        ArtefactError: if ``init`` was made for another model, other train users, another rank or another placement.
        ValueError: for unknown names, with a suggestion, and whatever is wrong with the data.
    """
    config = meta_settings(locals())
    embedding = (embedding,) if isinstance(embedding, str) else embedding
    check_parts(embedding)
    check_precision(precision)
    if observed_on not in OBSERVED_ON:
        raise ValueError(
            f"observed_on is the split that observations are standardised on, not {observed_on!r}. "
            f"{did_you_mean(observed_on, OBSERVED_ON)}"
        )
    if local_epsilon is not None and observed_on != "val":
        raise ValueError(
            "with local_epsilon nothing of train users may be in the scales of observations: give observed_on='val'."
        )
    folder = folder_of(users, backbone)
    start = time.perf_counter()
    data = prepared(users, backbone, placement, rank, seed, folder, more, memory, gates, cost)
    pretrained = time.perf_counter()
    start_of = load_init(Path(init).expanduser(), init_facts(data)) if init else meta_initialisation(data, config, folder)
    seconds = {"pretrain": pretrained - start, "meta": time.perf_counter() - pretrained}
    name, settings = f"{users}-{backbone}", (precision, embedding, observed_on, cost)
    found = scenario_from(data, start_of, name, placement, folder, seconds, *settings)
    return found if local_epsilon is None else released(found, local_epsilon, directions=local_directions, seed=seed)


modelled.further_arguments = further_arguments  # type: ignore[attr-defined]
modelled.check_further = check_further  # type: ignore[attr-defined]


def meta_settings(arguments: Mapping[str, Any]) -> MetaConfig:
    """How :func:`modelled` meta-trains, given (at least) those of its arguments that are not left at their defaults."""
    defaults = {name: parameter.default for name, parameter in signature(modelled).parameters.items()}
    known = {**defaults, **arguments}
    same = {field.name: known[field.name] for field in fields(MetaConfig) if field.name in known and field.name != "users"}
    return MetaConfig(steps=known["meta_steps"], users=known["meta_users"], **same)


def scenario_from(
    data: Prepared,
    init: MetaInit,
    name: str,
    placement: str,
    folder: Path | None,
    seconds: Mapping[str, float] | None = None,
    precision: str = "float32",
    embedding: Sequence[str] = DEFAULT,
    observed_on: str = "train",
    cost: str = "parameters",
) -> Scenario:
    """The scenario of a population that is seen through a model already; arguments as in :func:`modelled`.

    Args:
        data: the population, the model and the pathways.
        init: where adapters start.
        name: for reports.
        placement: of the pathways.
        folder: see :func:`modelled_scenario`.
        seconds: what data and start took to make.
        precision: that users are adapted and measured in.
        embedding: parts of the user embedding.
        observed_on: the split that observations are standardised on.
        cost: what cost counts, as in the pathways.
    """
    made_of = {
        "users": data.population.fingerprint(),
        "backbone": data.pathways.model.fingerprint(),
        "meta-initialisation": hash_tensors(init.tensors()),
        "placement": placement,
    }
    if data.pathways.gates != "adapters":
        made_of["gates"] = data.pathways.gates
    if observed_on != "train":  # said in files of private policies: a fingerprint would hold everybody's items
        made_of[OBSERVED] = f"{observed_on} {data.population.contents(observed_on)}"
    if cost != "parameters":
        made_of["cost"] = f"{cost} {hash_tensors(data.pathways.costs.tensors())}"
    if precision != "float32":
        made_of["precision"] = precision
    live = _live(data, init, precision)
    return modelled_scenario(name, live, _key(made_of), folder, seconds or {}, embedding, made_of)


def started_at(scenario: Scenario, init: MetaInit, folder: Path | None) -> Scenario:
    """The users and splits of a modelled scenario, seen through the same model, their adapters started elsewhere.

    Nobody beyond those splits is looked at, and nothing that the frozen model made of examples is made again.

    Args:
        scenario: of a population without test users, say.
        init: where adapters start instead, for the same pathways.
        folder: see :func:`modelled_scenario`.
    """
    assert scenario.look is not None
    made_of = {**scenario.made_of, "meta-initialisation": hash_tensors(init.tensors())}
    live = _live(scenario.data, init, made_of.get("precision", "float32"))
    parts, splits = scenario.look.embedder.parts, tuple(scenario.splits)
    return modelled_scenario(scenario.name, live, _key(made_of), folder, scenario.seconds, parts, made_of, splits)


def _live(data: Prepared, init: MetaInit, precision: str) -> LiveOracle:
    return LiveOracle(data, init, 512 if data.pathways.pooled else 64, precision)


def _key(made_of: Mapping[str, str]) -> str:
    """A hash of all that determines observations and answers in full precision."""
    names = {"init": "meta-initialisation", "users": "users", "model": "backbone", "placement": "placement"}
    further = {name: made_of[name] for name in ("gates", "cost", OBSERVED) if name in made_of}
    return cache_key(**{name: made_of[what] for name, what in names.items()}, **further)


def modelled_scenario(
    name: str,
    live: LiveOracle,
    fingerprint: str,
    folder: Path | None,
    seconds: Mapping[str, float],
    embedding: Sequence[str] = DEFAULT,
    made_of: Mapping[str, str] | None = None,
    splits: Sequence[str] = SPLITS,
) -> Scenario:
    """A scenario over a real model.

    Args:
        name: for reports.
        live: oracle over the population; it holds the pathways and the meta-initialisation.
        fingerprint: a hash of users, model and initialisation: of all that determines observations and answers.
        folder: where the oracle's answers are kept on disk (apart for each precision); None keeps them in memory. Where users
            are drawn on demand, the latest are kept in memory alone: hardly a question comes twice.
        seconds: what its parts took to make.
        embedding: parts of the user embedding, names from :data:`users.embedding.PARTS`.
        made_of: see :class:`envs.scenario.Scenario`.
        splits: that the scenario has. If some are left out, users are observed on demand, and those left out by nobody.
    """
    population, pathways = live.population, live.pathways
    shown, whose = SAMPLE if population.lazy else None, (made_of or {}).get(OBSERVED, "train").split()[0]
    embedder = UserEmbedder.fit(pathways.model, live.data.readouts(whose, "support", shown), embedding)
    statistics = PathwayStatistics.fit(pathways, live.init, live.data.part(whose, "support", shown))
    look = Observed(live.data, embedder, statistics, lazy={*splits} < {*SPLITS})
    observed = look.arrays
    query_of = ~np.isin(np.arange(len(population.users)), np.array(population.indices("train")))
    answers = _key({name: what for name, what in made_of.items() if name not in ("cost", OBSERVED)}) if made_of else fingerprint
    cached = _cached(live, query_of, answers, folder)

    def personalise(user: int, choose: Choose) -> Weights:
        one = fresh_support(pathways, population, population.users[user])
        observation = {"user": embedder.embed(one).numpy(), "pathways": statistics.observe(statistics.raw(one)).numpy()}
        return adapt(pathways, live.init, one, torch.from_numpy(choose(observation)).bool())

    def observe(users: Users, plans: Plans) -> NDArray[np.float32]:
        return live.statistics(statistics, users, plans).numpy()

    return Scenario(
        name=name,
        pathways=pathways.names,
        splits={split: np.array(population.indices(split)) for split in splits},
        user_ids=population.ids,
        user_info=_each(population, lambda info: {k: v for k, v in info.items() if k != "group"}),
        embeddings=observed["embeddings"],
        statistics=observed["statistics"],
        oracle=cached,
        observe=observe,
        groups=_each(population, lambda info: str(info.get("group", "all"))),
        label_counts={role: population.sizes(role) for role in ("support", "validation")},
        scores={name: observed[name] for name in SCORES},
        fingerprint=fingerprint if tuple(embedding) == DEFAULT else f"{fingerprint}-{'-'.join(embedding)}",
        seconds=seconds,
        save=cached.save,
        data=live.data,
        look=look,
        personalise=personalise,
        notes=(*population.notes, *live.data.remarks),
        made_of=made_of or {},
    )


def _cached(live: LiveOracle, query_of: NDArray[np.bool_], fingerprint: str, folder: Path | None) -> CachedOracle:
    """The live oracle with a memory, on disk where users are few enough to be asked about again."""
    if live.population.lazy:
        return CachedOracle(live, query_of, limit=ANSWERS)
    name = f"answers-{fingerprint}" + ("" if live.precision == "float32" else f"-{live.precision}")
    return CachedOracle(live, query_of, folder and folder / name)


def _each(population: Population, function: Callable[[Mapping[str, Any]], T]) -> Sequence[T]:
    """``function`` of what is known of every user."""
    infos = population.infos
    if population.lazy:
        return OnDemand(len(infos), lambda place: function(infos[place]))
    return tuple(map(function, infos))

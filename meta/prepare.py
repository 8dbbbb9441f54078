"""From names to a population seen through a model with pathways: where every experiment begins."""

import logging
from collections.abc import Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from backbones.artefacts import cache_root
from backbones.pathways import make_pathways
from backbones.prices import costs_of
from backbones.typed import check_types
from meta.model import check_backbone, population_model
from meta.model import further_arguments as of_backbone
from users import population_factory
from users.batch import Prepared
from users.describe import describe
from users.kept import MEMORY

LOG = logging.getLogger("dsa")


def folder_of(users: str, backbone: str) -> Path:
    """Where the artefacts of a population and a backbone are kept."""
    return cache_root() / f"{users}-{backbone}"


def prepared(
    users: str,
    backbone: str,
    placement: str,
    rank: int,
    seed: int,
    folder: Path,
    more: Mapping[str, Any],
    memory: float = MEMORY,
    gates: str = "adapters",
    cost: str = "parameters",
) -> Prepared:
    """Load the population, make or load the population model, and put pathways along it.

    Args:
        users: name of a population.
        backbone: name of a backbone.
        placement: name of a placement.
        rank: of the adapters.
        seed: of users and model, as far as these are ours to draw.
        folder: where what is learned is kept.
        more: further arguments; the population's factory and the backbone's each take those they know.
        memory: GB of frozen states that are kept, see :class:`users.batch.Prepared`.
        gates: what a mask may switch, one of :data:`backbones.pathways.GATES`.
        cost: what masks cost, one of :data:`backbones.costs.COSTS`.

    Raises:
        ValueError: for unknown names, with a suggestion, and whatever is wrong with the data.
        ArtefactError: for models that cannot be loaded.
    """
    factory = population_factory(users)
    open_ended = (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)
    for name, parameter in signature(factory).parameters.items():
        if parameter.default is parameter.empty and name not in {*more, "seed"} and parameter.kind not in open_ended:
            raise ValueError(f"population {users!r} needs `{name}`; pass --{name.replace('_', '-')} ({name}=...).")
    of_users, of_model = {*signature(factory).parameters}, of_backbone(backbone)
    told = {k: v for k, v in more.items() if k in of_users}
    check_types(factory, told, f"population {users!r}")
    population = factory(seed=seed, **told)
    LOG.info("%s", describe(population))
    model = population_model(backbone, population, folder, seed, **{k: v for k, v in more.items() if k in of_model})
    pathways = make_pathways(placement, model, rank, gates)
    pathways.costs = costs_of(pathways, cost, folder)
    return Prepared(pathways, population, folder, memory)


def further_arguments(arguments: Mapping[str, Any]) -> set[str]:
    """Names of what :func:`prepared` takes as ``more``, for the ``users`` and ``backbone`` among the arguments."""
    return ({*signature(population_factory(arguments["users"])).parameters} | of_backbone(arguments["backbone"])) - {"seed"}


def check_further(arguments: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for one of :func:`further_arguments` that is of another type than population or backbone take."""
    factory, backbone = population_factory(arguments["users"]), arguments["backbone"]
    check_types(factory, arguments, f"population {arguments['users']!r}")
    check_backbone(backbone, {name: value for name, value in arguments.items() if name in of_backbone(backbone)})

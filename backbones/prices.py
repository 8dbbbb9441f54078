"""Cost models of everything that runs, the backbone included: counted operations, or milliseconds measured on this machine."""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from backbones.artefacts import ArtefactError, cache_key, exists, load_artefact
from backbones.base import Hidden
from backbones.costs import COSTS, CostModel
from backbones.pathways import Pathways, Work
from backbones.registry import did_you_mean

KIND = "latency table"


@torch.no_grad()
def parts(pathways: Pathways, examples: int = 1) -> dict[str, Work]:
    """What a pass through the model is made of, at reference inputs: ``stem``, blocks, ``readout``, pathways as ``+name``."""
    backbone, weights = pathways.model.backbone, {k: w[None] for k, w in pathways.start(0).items()}
    inputs = backbone.reference_inputs().expand(examples, *backbone.reference_shape)
    hidden = backbone.stem(inputs)
    found: dict[str, Work] = {"stem": partial(backbone.stem, inputs)}
    for index, name in enumerate(backbone.block_names):
        found[name] = partial(backbone.block, index, hidden)
        found[f"+{name}"] = pathways.work(index, hidden, weights)
        hidden = backbone.block(index, hidden)
    features = backbone.readout(hidden)
    found["readout"] = partial(backbone.readout, hidden)
    found["+readout"] = partial(torch.nn.functional.linear, features, pathways.model.weight, pathways.model.bias)
    found["+head"] = pathways.work(pathways.num_pathways - 1, Hidden(features), weights)
    return found


def flops(pathways: Pathways) -> dict[str, float]:
    """Operations of every part on one reference input: products, convolutions and attention, 2 per multiply-add."""

    def count(work: Work) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            work()
        return counter.get_total_flops()

    return {name: count(work) for name, work in parts(pathways).items()}


def latency(pathways: Pathways, examples: int = 64, turns: int = 30) -> dict[str, float]:
    """Milliseconds of every part for one user's examples: medians over turns in which every part has its turn."""
    works = parts(pathways, examples)
    taken: dict[str, list[float]] = {name: [] for name in works}
    with torch.no_grad():
        for _ in tqdm(range(turns), desc=f"milliseconds for {examples} examples", unit="turn"):
            for name, work in works.items():
                start = time.perf_counter()
                work()
                taken[name].append(time.perf_counter() - start)
    return {name: 1000 * median(each[turns // 5 :]) for name, each in taken.items()}  # the first turns warm up


def latency_path(pathways: Pathways, folder: Path) -> Path:
    """Where what this machine takes is kept, without suffix."""
    facts = {"placement": type(pathways).__name__, "rank": pathways.rank, "gates": pathways.gates, "widths": pathways.widths}
    facts["classes"] = pathways.model.num_classes
    return folder / f"latency-{cache_key(model=pathways.model.backbone_fingerprint(), **facts)}"


def costs_of(pathways: Pathways, cost: str, folder: Path) -> CostModel:
    """The cost model of that name.

    Args:
        pathways: whose masks.
        cost: one of :data:`backbones.costs.COSTS`.
        folder: where measured milliseconds are kept.

    Raises:
        ValueError: for an unknown name.
        ArtefactError: for ``latency`` where nothing was measured yet.
    """
    if cost == "parameters":
        return CostModel.of_pathways(pathways.sizes.double() / pathways.sizes.sum())
    if cost == "flops":
        return cost_model(pathways, flops(pathways))
    if cost != "latency":
        raise ValueError(f"unknown cost {cost!r}. {did_you_mean(cost, COSTS)}")
    path = latency_path(pathways, folder)
    if not exists(path):
        raise ArtefactError(
            f"cost='latency' needs milliseconds measured on this machine, and there are none in {folder}: measure them with "
            "python -m envs.latency --env ID, with the arguments of the environment."
        )
    return cost_model(pathways, load_artefact(path, KIND)[1]["milliseconds"])


def cost_model(pathways: Pathways, prices: Mapping[str, float]) -> CostModel:
    """The cost of masks, from what every part of a forward pass costs; names as :func:`parts` gives them.

    What stands in for a block that is left out counts nothing.
    """
    runs, names = {*pathways.runs.values()}, pathways.names
    own = torch.tensor([0.0 if p in runs else prices[f"+{name}"] for p, name in enumerate(names)], dtype=torch.float64)
    blocks = [prices[name] for name in (*pathways.model.backbone.block_names, "readout")]
    last = 0.0 if pathways.exits else prices["+readout"]
    if not (pathways.exits or runs):
        return CostModel(own, torch.zeros(0), torch.zeros(len(own)), prices["stem"] + sum(blocks) + last).scaled()
    stretches = torch.tensor(blocks, dtype=torch.float64)
    switch = torch.tensor([pathways.runs.get(d, -1) for d in range(len(blocks))]) if runs else None
    empty = sum(blocks) + prices["+readout"] - last
    return CostModel(own, stretches, pathways.reach, prices["stem"] + last, empty, switch).scaled()

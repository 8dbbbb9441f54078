"""Measure what this machine takes for every part of a model: ``python -m envs.latency --env dsa/UnipenResNetExit-v0``.

Environments made with ``cost="latency"`` then count milliseconds. Every part (stem, block, readout, pathway) has its turn,
again and again; medians for one user's examples at the reference input are kept beside the model's other artefacts.
"""

import argparse
import sys
from inspect import signature
from typing import Any

import torch

from backbones.artefacts import ArtefactError, save_artefact
from backbones.prices import KIND, latency, latency_path
from envs.modelled import modelled
from envs.registration import known_spec
from envs.scenario import check_arguments
from meta.arguments import at_least_one, parse_pairs, show_log
from meta.prepare import folder_of, prepared
from users.batch import Prepared

WHERE = ("users", "backbone", "placement", "rank", "seed", "gates")


def measured_model(env: str, arguments: dict[str, Any]) -> Prepared:
    """The model of an environment, its cost model apart. Raises ``ValueError`` for an environment without one."""
    given = {**known_spec(env).kwargs, **arguments}
    if given.pop("scenario") != "modelled":
        raise ValueError(f"{env} has no model whose parts could be timed; take one with a backbone.")
    given.pop("layerwise", None)
    check_arguments("modelled", given)
    names = {name: parameter.default for name, parameter in signature(modelled).parameters.items()}
    users, backbone, placement, rank, seed, gates = ({**names, **given}[name] for name in WHERE)
    more = {name: value for name, value in given.items() if name not in names}
    return prepared(users, backbone, placement, rank, seed, folder_of(users, backbone), more, gates=gates)


def main(arguments: list[str] | None = None) -> None:
    """Measure, keep, print."""
    parser = argparse.ArgumentParser(prog="python -m envs.latency", description=__doc__)
    parser.add_argument("--env", required=True, help="environment id")
    parser.add_argument("--env-kwargs", nargs="+", action="extend", default=[], metavar="NAME:VALUE", help="its arguments")
    parser.add_argument("--batch", type=int, default=64, help="examples that are run together (default: %(default)s)")
    parser.add_argument("--num-threads", type=at_least_one, default=1, help="torch threads (default: %(default)s)")
    args = parser.parse_args(arguments)
    show_log()
    torch.set_num_threads(args.num_threads)
    try:
        if args.batch < 1:
            raise ValueError(f"--batch must be at least 1, got {args.batch}.")
        data = measured_model(args.env, parse_pairs(args.env_kwargs, "--env-kwargs"))
    except (ValueError, ImportError, OSError, ArtefactError) as error:
        sys.exit(f"error: {error}")
    found, folder = latency(data.pathways, args.batch), data.folder
    assert folder is not None
    path = latency_path(data.pathways, folder)
    facts = {"milliseconds": found, "examples": args.batch, "threads": args.num_threads}
    save_artefact(path, KIND, {}, facts)
    print(f"| part (+: a pathway) | ms for {args.batch} examples |\n| --- | --- |")
    print("\n".join(f"| {name} | {value:.3f} |" for name, value in found.items()))
    print(f"\nkept as {path}.json; environments with cost='latency' count by it")


if __name__ == "__main__":
    main()

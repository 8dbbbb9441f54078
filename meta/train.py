"""Learn a meta-initialisation for the digits: ``python -m meta.train --algorithm maml``.

Curves go to TensorBoard, checkpoints to the output folder; started again with the same settings, it goes on where it was
stopped. Ends with the accuracy of val users, adapted with every pathway on and under random masks. With
``--random-start`` the inner rates alone are learned: the same budget for adapters that nobody meta-trained.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from backbones.artefacts import ArtefactError, cache_key, cache_root
from backbones.pathways import PLACEMENTS, make_pathways
from backbones.threads import usable_cores
from meta.digits import digits_model
from meta.masks import sample_masks
from meta.outer import ALGORITHMS
from meta.trainer import MetaConfig, adapted_accuracy, meta_initialisation
from users.base import stack
from users.digits import GROUPS, digits_population


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    defaults = MetaConfig()
    parser = argparse.ArgumentParser(prog="python -m meta.train", description=__doc__)
    parser.add_argument("--algorithm", default=defaults.algorithm, help=f"one of {', '.join(ALGORITHMS)}")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="outer steps (default: %(default)s)")
    parser.add_argument("--users", type=int, default=defaults.users, help="users per outer step (default: %(default)s)")
    parser.add_argument("--inner-steps", type=int, default=defaults.inner_steps, help="gradient steps of a user")
    parser.add_argument("--inner-rate", type=float, default=defaults.inner_rate, help="where the inner rates start")
    parser.add_argument("--outer-rate", type=float, default=defaults.outer_rate, help="Adam's learning rate")
    parser.add_argument("--all-on", type=float, default=defaults.all_on, help="share of users trained with everything on")
    parser.add_argument("--random-start", action="store_true", help="learn the inner rates alone")
    parser.add_argument("--placement", default="inline", help=f"one of {', '.join(PLACEMENTS)}")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of users, backbone and initialisation (default: 0)")
    parser.add_argument("--out", type=Path, default=None, help="artefacts and curves (default: the cache folder)")
    parser.add_argument("--train-users", type=int, default=600, help="(default: %(default)s)")
    parser.add_argument("--val-users", type=int, default=120, help="(default: %(default)s)")
    parser.add_argument("--num-threads", type=int, default=usable_cores(), help="torch threads (default: the cores, at most 4)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train and report."""
    args = parse(arguments)
    torch.set_num_threads(args.num_threads)
    folder = args.out or cache_root() / "digits-resnet"
    names = ("algorithm", "steps", "users", "inner_steps", "inner_rate", "outer_rate", "all_on", "random_start", "seed")
    try:
        config = MetaConfig(**{name: getattr(args, name) for name in names})
        population = digits_population(args.seed, args.train_users, args.val_users, test_users=1)
        pathways = make_pathways(args.placement, digits_model(args.seed, folder=folder), args.rank)
        events = folder / "tensorboard" / f"{config.algorithm}-{cache_key(**asdict(config))}"
        with SummaryWriter(str(events)) as writer:
            init = meta_initialisation(pathways, population, config, folder, writer.add_scalar)
    except (ValueError, FloatingPointError, ArtefactError) as error:
        sys.exit(f"error: {error}")
    support, query = (stack(pathways, population.val, role) for role in ("support", "query"))
    shape = (len(population.val), pathways.num_pathways)
    single = torch.tensor([user.info["group"] == GROUPS[0] for user in population.val])
    masks = sample_masks(*shape, torch.Generator().manual_seed(0), all_on=0.0)
    print(f"accuracy of {shape[0]} val users ({int(single.sum())} with at most one shift)")
    for name, gates in (("all_off", torch.zeros(shape)), ("all_on", torch.ones(shape)), ("random masks", masks)):
        accuracy = adapted_accuracy(pathways, init, support, query, gates.bool())
        print(f"  {name:<13} {accuracy.mean():.3f}   at most one shift: {accuracy[single].mean():.3f}")
    print(f"Curves: tensorboard --logdir {folder / 'tensorboard'}")


if __name__ == "__main__":
    main()

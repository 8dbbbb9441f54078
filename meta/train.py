"""Learn a meta-initialisation: ``python -m meta.train --users unipen --backbone resnet-small --algorithm maml``.

Without ``--users`` for the digits. Curves go to TensorBoard, checkpoints to the output folder; started again with the same
settings, it goes on where it was stopped. Ends with the accuracy of val users, adapted with every pathway on and under
random masks. With ``--random-start`` the inner rates alone are learned: the same budget for adapters that nobody
meta-trained. Further arguments of the population and the backbone are given as ``-K name:value``.

With ``--private`` the result is differentially private for users (extra ``privacy``): chance draws train users, their updates
are clipped and noised, and what that spends is printed. Val users count as public: they choose, and they are reported.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from backbones.artefacts import ArtefactError, cache_key, load_artefact
from backbones.pretrain import AUGMENTATIONS
from backbones.registry import did_you_mean
from meta.accountant import Accountant, BudgetError, check_installed
from meta.arguments import add_flags, add_num_threads, given, parse_pairs, show_log
from meta.curves import room_for_curves
from meta.inner import MetaInit, adapted_accuracy
from meta.learned import learned_init
from meta.masks import masks_for
from meta.outer import ALGORITHMS
from meta.prepare import folder_of, further_arguments, prepared
from meta.private import UPDATES, Privacy
from meta.store import KIND
from meta.trainer import KEEP, MetaConfig
from users.batch import Prepared

SETTINGS = (
    "algorithm",
    "steps",
    "inner_steps",
    "inner_rate",
    "head_rate",
    "outer_rate",
    "rate_of_rates",
    "all_on",
    "random_start",
    "resample",
    "neutral",
    "start_steps",
    "start_copies",
    "start_augment",
    "public_steps",
    "keep",
    "shrink",
    "seed",
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    defaults = MetaConfig()
    parser = argparse.ArgumentParser(
        prog="python -m meta.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser)
    parser.add_argument("-K", "--argument", action="append", default=[], metavar="NAME:VALUE", help="of population or backbone")
    parser.add_argument("--algorithm", default=defaults.algorithm, help=f"one of {', '.join(ALGORITHMS)}")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="outer steps (default: %(default)s)")
    parser.add_argument("--users-per-step", type=int, default=defaults.users, help="(default: %(default)s)")
    parser.add_argument("--inner-steps", type=int, default=defaults.inner_steps, help="gradient steps of a user")
    parser.add_argument("--inner-rate", type=float, default=defaults.inner_rate, help="where the inner rates start")
    parser.add_argument("--head-rate", type=float, help="where the head's inner rate starts (default: as the others)")
    parser.add_argument("--rate-of-rates", type=float, default=defaults.rate_of_rates, help="Adam's rate for the inner rates")
    parser.add_argument("--outer-rate", type=float, default=defaults.outer_rate, help="Adam's learning rate")
    parser.add_argument("--all-on", type=float, default=defaults.all_on, help="share of users trained with everything on")
    parser.add_argument("--random-start", action="store_true", help="learn the inner rates alone")
    parser.add_argument("--resample", action="store_true", help="deal support and query examples anew in every step")
    parser.add_argument("--neutral", action="store_true", help="keep the start's outputs at zero: for few train users")
    parser.add_argument("--start-steps", type=int, default=0, help="fit pathways to the population model's examples beforehand")
    parser.add_argument("--start-copies", type=int, default=0, help="changed copies of each of those, where they are images")
    parser.add_argument("--start-augment", default=defaults.start_augment, help=f"how: {', '.join(AUGMENTATIONS)}")
    parser.add_argument("--public-steps", type=int, default=0, help="meta-train on val users, who are public, beforehand")
    parser.add_argument("--keep", default=defaults.keep, choices=KEEP, help="last state, or best by val users")
    parser.add_argument("--shrink", action="store_true", help="let val users say how far few examples may move a user")
    parser.add_argument("--private", action="store_true", help=f"private for users; algorithms: {', '.join(UPDATES)}")
    add_privacy_flags(parser)
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of users, backbone and initialisation (default: 0)")
    parser.add_argument("--out", type=Path, default=None, help="artefacts and curves (default: the cache folder)")
    add_num_threads(parser)
    return parser.parse_args(arguments)


def add_privacy_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of everything that can be trained in private."""
    defaults, group = Privacy(), parser.add_argument_group("differential privacy")
    group.add_argument("--epsilon", type=float, default=defaults.epsilon, help="the budget (default: %(default)s)")
    group.add_argument("--delta", type=float, help="its delta (default: the number of train users to the power of -1.1)")
    group.add_argument("--clip", type=float, default=defaults.clip, help="norm of a user's update (default: %(default)s)")
    group.add_argument("--noise", type=float, help="times the clipping norm (default: the least that the budget bears)")
    group.add_argument("--noise-seed", type=int, help="repeatable noise, for experiments: who knows it is promised nothing")
    group.add_argument("--public-model", action="store_true", help="the population model's fitting examples are public")


PRIVACY_FLAGS = ("epsilon", "delta", "clip", "noise", "noise_seed", "public_model")


def promised(args: argparse.Namespace) -> Privacy:
    """What the flags promise. Raises ``ValueError`` for values out of range, ``ImportError`` without the accountant."""
    check_installed()
    return Privacy(**{name: getattr(args, name) for name in PRIVACY_FLAGS})


def check_private(args: argparse.Namespace) -> None:
    """Raise ``ValueError`` for a flag of privacy without ``--private``: what is learned would be promised nothing."""
    usual = parse([])
    idle = [name for name in PRIVACY_FLAGS if not args.private and getattr(args, name) != getattr(usual, name)]
    if idle:
        flag = f"--{idle[0].replace('_', '-')}"
        raise ValueError(f"without --private nothing is private, and {flag} does nothing: add --private, or leave out {flag}.")


def main(arguments: list[str] | None = None) -> None:
    """Train and report."""
    args = parse(arguments)
    torch.set_num_threads(args.num_threads)
    show_log()
    try:
        check_private(args)
        privacy = promised(args) if args.private else None
        config = MetaConfig(users=args.users_per_step, **{name: getattr(args, name) for name in SETTINGS})
        where = {"users": "digits", "backbone": "resnet-small", "placement": "inline", **given(args)}
        gates = where.pop("gates", "adapters")
        more = {k: v for k, v in where.items() if k not in ("users", "backbone", "placement")}
        more |= parse_pairs(args.argument, "--argument")
        check(where, more)
        names = where["users"], where["backbone"], where["placement"]
        folder = args.out or folder_of(*names[:2])
        data = prepared(*names, args.rank, args.seed, folder, more, gates=gates)
        settings = asdict(config) | ({"privacy": asdict(privacy)} if privacy else {})
        events = folder / "tensorboard" / f"{config.algorithm}-{cache_key(**settings)}"
        with room_for_curves(events), SummaryWriter(str(events)) as writer:
            path = learned_init(data, config, folder, writer.add_scalar, privacy)
            tensors, said = load_artefact(path, KIND)
    except (ValueError, ImportError, OSError, FloatingPointError, ArtefactError, BudgetError) as error:
        sys.exit(f"error: {error}")
    report(data, MetaInit.from_tensors(tensors))
    print("\n".join((*data.population.notes, *data.remarks)))
    if privacy:
        print("\n".join(Accountant.of(said["accountant"]).card()))
    print(f"Meta-initialisation: {path}")
    print(f"Curves: tensorboard --logdir {folder / 'tensorboard'}")


def check(where: dict[str, Any], more: dict[str, Any]) -> None:
    """Raise ``ValueError`` for an argument that neither population nor backbone takes."""
    known = further_arguments(where)
    for name in more:
        if name not in known:
            raise ValueError(
                f"neither {where['users']!r} nor {where['backbone']!r} takes {name!r}. {did_you_mean(name, known)}"
            )


def report(data: Prepared, init: MetaInit) -> None:
    """Print the accuracy of val users under three kinds of masks, by group of users."""
    support, query = data.part("val", "support"), data.part("val", "query")
    users, shape = data.population.val, (len(data.population.val), data.pathways.num_pathways)
    groups = [str(user.info.get("group", "all")) for user in users]
    masks = masks_for(data.pathways, shape[0], torch.Generator().manual_seed(0), all_on=0.0)
    print(f"accuracy of {shape[0]} val users")
    for name, gates in (("all_off", torch.zeros(shape)), ("all_on", torch.ones(shape)), ("random masks", masks)):
        accuracy = adapted_accuracy(data.pathways, init, support, query, gates.bool())
        by_group = {group: accuracy[torch.tensor([g == group for g in groups])].mean() for group in sorted(set(groups))}
        details = "".join(f"   {group}: {value:.3f}" for group, value in by_group.items()) if len(by_group) > 1 else ""
        print(f"  {name:<13} {accuracy.mean():.3f}{details}")


if __name__ == "__main__":
    main()

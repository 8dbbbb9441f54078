"""Learn a gating policy under user-level differential privacy: ``python -m agents.train_private --init PATH --epsilon 3``.

``PATH`` is a meta-initialisation that ``python -m meta.train --private`` named. What that has spent counts: the budget is of
both together. Reads top to bottom: settings, scenario, policy gradients on train users, then the table
on test users. With ``--on val`` the policy is learned from val users instead, who are public, and costs train users nothing.

The run's folder is one of ``agents.train_ppo``'s; ``privacy.json`` in it says what was spent, on what.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from agents.checkpoint import save_policy
from agents.evaluate import evaluate_run, write_seconds
from agents.private import PART, PrivateSettings, check_rules, learn_private
from agents.run import RunConfig, numbered_folder
from backbones.artefacts import ArtefactError, load_artefact, write_atomically
from envs.scenario import Scenario
from meta.accountant import Accountant, BudgetError
from meta.arguments import add_flags, add_num_threads, given, parse_pairs, show_log, whole_paths
from meta.curves import room_for_curves
from meta.private import Privacy, PrivateRounds, account_of, check_covered
from meta.store import KIND, plain
from meta.train import add_privacy_flags, promised

LEARN_FROM = ("train", "val")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    defaults = PrivateSettings()
    parser = argparse.ArgumentParser(
        prog="python -m agents.train_private", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--init", type=Path, required=True, help="a private meta-initialisation")
    parser.add_argument("--env", default="dsa/DigitsResNet-v0", help="environment id (default: %(default)s)")
    parser.add_argument(
        "--on", default="train", choices=LEARN_FROM, help="whose rewards are learned from (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of users, backbone, and of the policy (default: 0)")
    parser.add_argument(
        "--cost-weight", type=float, default=0.1, help="lambda in reward = accuracy - lambda * cost (default: 0.1)"
    )
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="(default: %(default)s)")
    parser.add_argument("--users-per-round", type=int, default=defaults.users, help="in the mean (default: %(default)s)")
    parser.add_argument("--masks", type=int, default=defaults.masks, help="drawn per user and round (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=defaults.hidden, help="width of the network (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=defaults.rate, help="Adam's learning rate (default: %(default)s)")
    parser.add_argument("--public-rounds", type=int, default=0, help="beforehand, on val users, who are public (default: 0)")
    parser.add_argument("--entropy", type=float, default=defaults.entropy, help="weight of entropy (default: %(default)s)")
    parser.add_argument("-f", "--log-dir", type=Path, help="the run's folder (default: a new logs/<env>_<n>)")
    parser.add_argument(
        "--env-kwargs", action="extend", nargs="+", default=[], metavar="NAME:VALUE", help="argument of the environment"
    )
    parser.add_argument("--no-search", action="store_true", help="leave out rivals that try hundreds of masks per test user")
    add_num_threads(parser)
    add_privacy_flags(parser)
    add_flags(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train, then evaluate on test users."""
    args = parse(arguments)
    torch.set_num_threads(args.num_threads)
    show_log()
    folder = args.log_dir
    try:
        folder = folder or numbered_folder(Path("logs"), args.env)
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} holds files already; choose another --log-dir.")
        spent = spent_before(args.init)
        settings, config = read_settings(args), read_config(args)
        if args.on == "val" and settings.public_rounds:
            raise ValueError("with --on val all rounds are on val users: give --rounds, and leave out --public-rounds.")
        check_rules(config.rules)
        train(args, settings, config, folder, spent)
        evaluate_run(folder)
    except (ValueError, ImportError, OSError, FloatingPointError, ArtefactError, BudgetError) as error:
        sys.exit(f"error: {error}")
    finally:
        if folder and folder != args.log_dir and not any(folder.iterdir()):
            folder.rmdir()  # its number is free again
    print("\n" + "\n".join(json.loads((folder / "privacy.json").read_text())["card"]))
    print(f"\nCurves: tensorboard --logdir {config.events(folder)}\nRun folder: {folder}")


def train(args: argparse.Namespace, settings: PrivateSettings, config: RunConfig, folder: Path, spent: Accountant) -> None:
    """Learn the policy, then write the run's folder, what was spent first. A kill during learning spends nothing."""
    scenario = config.scenario()
    privacy = promised(args)
    check_covered(scenario.data.population, privacy, "fomaml")
    private = None
    if args.on == "train":
        private = guarantee(privacy, scenario, settings, spent)
    start, events = time.perf_counter(), config.events(folder)
    curves: list[tuple[str, float, int]] = []
    policy = learn_private(scenario, config.rules, settings, args.seed, private, args.on, lambda *point: curves.append(point))
    account = private.accountant if private else spent
    meta: dict[str, Any] = {"policy": config.policy, "policy_kwargs": config.policy_kwargs, "pathways": list(scenario.pathways)}
    meta |= {"scenario": scenario.without_users, "rules": config.rules.to_json(), "cost_weight": config.cost_weight}
    card = [
        *account.card(),
        f"  the policy was learned from {args.on} users' rewards" + ("" if private else ", who are public"),
    ]
    said = {"accountant": account.state(), "card": card, "on": args.on, "settings": asdict(settings)}
    write_atomically(folder / "privacy.json", json.dumps(said, indent=1).encode())
    config.save(folder)
    save_policy(folder / "policy", policy, {**meta, "accountant": account.state()})
    with room_for_curves(events), SummaryWriter(str(events)) as writer:
        for point in curves:
            writer.add_scalar(*point)
    write_seconds(folder, {**scenario.seconds, "ppo": time.perf_counter() - start})


def guarantee(privacy: Privacy, scenario: Scenario, settings: PrivateSettings, spent: Accountant) -> PrivateRounds:
    """The rounds of a policy after what its initialisation has spent.

    Raises:
        ValueError: if both are not accounted for at one delta.
        BudgetError: if they do not fit into the budget.
    """
    private = PrivateRounds(privacy, len(scenario.users("train")), settings.users, settings.rounds, PART, spent.rounds)
    private.accountant.repeatable |= spent.repeatable
    if private.accountant.delta != spent.delta:
        raise ValueError(
            f"the initialisation is accounted for at delta {spent.delta:.3g}, the policy at {private.accountant.delta:.3g}: "
            f"give --delta {spent.delta!r}, and both the same train users."
        )
    return private


def spent_before(init: Path) -> Accountant:
    """What a meta-initialisation has spent. Raises ``ArtefactError`` if it is missing, or was not learned in private."""
    _, said = load_artefact(plain(init), KIND)
    if "accountant" not in said:
        raise ArtefactError(f"{init} was learned without privacy: give one that python -m meta.train --private made.")
    return account_of(said, str(init))


def read_settings(args: argparse.Namespace) -> PrivateSettings:
    """The flags that say how to learn."""
    same = {field.name: getattr(args, field.name) for field in fields(PrivateSettings) if hasattr(args, field.name)}
    return PrivateSettings(**same | {"users": args.users_per_round})


def read_config(args: argparse.Namespace) -> RunConfig:
    """The run as ``agents.evaluate`` reads it."""
    kwargs: dict[str, Any] = whole_paths({**given(args), **parse_pairs(args.env_kwargs, "--env-kwargs")})
    kwargs |= {"init": str(plain(args.init).resolve()), "observed_on": "val"}
    decisions = args.rounds * args.users_per_round * args.masks
    return RunConfig(
        env=args.env,
        seed=args.seed,
        cost_weight=args.cost_weight,
        total_timesteps=decisions,
        eval_freq=decisions,
        n_envs=args.users_per_round,
        average=PrivateSettings().average,
        policy="GatingPolicy",
        policy_kwargs={"hidden": args.hidden},
        search=not args.no_search,
        env_kwargs=kwargs,
    )


if __name__ == "__main__":
    main()

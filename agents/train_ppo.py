"""Learn a gating policy with PPO: ``python -m agents.train_ppo --env dsa/DigitsResNet-v0``.

Reads top to bottom: settings, scenario (backbone and meta-initialisation, made or loaded), PPO on train users, then the
table on test users. ``python -m agents.train_ppo --help`` lists the flags, the README explains every curve.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from agents.callbacks import BestOnVal
from agents.cotrain import cotrain, discard_turns
from agents.evaluate import evaluate_run, read_seconds, write_seconds
from agents.learning import learn
from agents.run import PPO_SETTINGS, RunConfig, check_device, hyperparameters, numbered_folder
from backbones.artefacts import ArtefactError, DiskFullError
from backbones.costs import COSTS
from backbones.registry import did_you_mean
from envs.cost_weights import CostWeight
from meta.arguments import add_flags, add_num_threads, given, parse_pairs, show_log, whole_paths


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m agents.train_ppo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", help="environment id (default: dsa/DigitsResNet-v0; with --users dsa/Personal-v0)")
    parser.add_argument("-n", "--total-timesteps", type=int, help="adaptations to learn from (default: per env, in YAML)")
    parser.add_argument("--seed", type=int, default=0, help="of users, backbone, initialisation and PPO (default: 0)")
    parser.add_argument(
        "--cost-weight",
        default="0.1",
        help="lambda in reward = accuracy - lambda * cost; uniform:0:0.3 trains one policy for every budget (default: 0.1)",
    )
    parser.add_argument("--target-active", type=float, help="move the cost weight until so large a share of pathways is on")
    parser.add_argument("--max-active", type=int, help="never more than so many pathways on: the best-scored ones")
    parser.add_argument(
        "--cotrain", type=int, default=0, metavar="N", help="turns of meta-training under the policy's own masks (default: 0)"
    )
    parser.add_argument("-f", "--log-dir", type=Path, help="the run's folder (default: a new logs/<env>_<n>)")
    parser.add_argument(
        "-tb", "--tensorboard-log", type=Path, help="event files, in a folder named like the run (default: <run>/tensorboard)"
    )
    parser.add_argument("--eval-freq", type=int, help="timesteps between evaluations on val users (default: in YAML)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this folder from its checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="allow --log-dir to be a folder with files in it")
    parser.add_argument("--device", default="cpu", help="for the policy network (default: cpu, which is faster)")
    add_num_threads(parser)
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True, help="progress bar of PPO")
    parser.add_argument("-P", "--hyperparameter", action="append", default=[], metavar="NAME:VALUE", help="override a setting")
    parser.add_argument(
        "--env-kwargs", action="extend", nargs="+", default=[], metavar="NAME:VALUE", help="argument of the environment"
    )
    parser.add_argument("--cost", choices=COSTS, help="what cost counts: personal parameters, or all that runs")
    add_flags(parser)
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        parser.error(f"unrecognized arguments: {' '.join(unknown)}. {did_you_mean(unknown[0].split('=')[0], flags)}")
    free = {"resume", "overwrite", "device", "num_threads", "progress"}
    changed = [name for name, value in vars(args).items() if name not in free and value != parser.get_default(name)]
    if args.resume and changed:
        parser.error(f"--resume goes on with the run's own settings; leave out {', '.join(changed)}.")
    args.env = args.env or ("dsa/Personal-v0" if args.users else "dsa/DigitsResNet-v0")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Train, then evaluate on test users."""
    args = parse(arguments)
    torch.set_num_threads(args.num_threads)
    show_log()
    folder = args.resume
    try:
        check_device(args.device)
        if args.resume:
            folder, config = args.resume, RunConfig.load(args.resume)
        else:
            config = read_settings(args)
            claimed = claim_folder(args, config)
            config.save(claimed)
            folder = claimed
        train(config, folder, args)
        evaluate_run(folder)
    except DiskFullError as error:
        sys.exit(f"error: {error}" + (f" Go on with --resume {folder}" if folder else ""))
    except (ValueError, ImportError, OSError, FloatingPointError, ArtefactError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        if folder is None:
            sys.exit("\ninterrupted")
        sys.exit(f"\ninterrupted; everything up to the last checkpoint is in {folder}. Go on with --resume {folder}")
    print(f"\nCurves and gates: tensorboard --logdir {config.events(folder)}\nRun folder: {folder}")


def read_settings(args: argparse.Namespace) -> RunConfig:
    """YAML, then flags, then -P."""
    settings = hyperparameters(args.env, args.hyperparameter)
    if args.total_timesteps is not None:
        settings["total_timesteps"] = args.total_timesteps
    if args.eval_freq is not None:
        settings["eval_freq"] = args.eval_freq
    if args.max_active is not None:
        settings["policy_kwargs"] = {**settings["policy_kwargs"], "max_active": args.max_active}
    ppo = {name: settings.pop(name) for name in PPO_SETTINGS & settings.keys()}
    cost = {"cost": args.cost} if args.cost else {}
    return RunConfig(
        env=args.env,
        seed=args.seed,
        cost_weight=CostWeight.parse(args.cost_weight).given(),
        target_active=args.target_active,
        cotrain=args.cotrain,
        ppo=ppo,
        env_kwargs=whole_paths({**given(args), **cost, **parse_pairs(args.env_kwargs, "--env-kwargs")}),
        tensorboard_log=None if args.tensorboard_log is None else os.path.abspath(args.tensorboard_log),
        **settings,
    )


OF_A_RUN = (
    *("checkpoint.json", "policy.json", "privacy.json", "seconds.json", "summary.json", "table.md"),
    *("users.csv", "users_at_*.csv"),
)
"""Files of a folder that would say of another run what was this one's."""


def claim_folder(args: argparse.Namespace, config: RunConfig) -> Path:
    """The run's folder, which must be new or empty unless overwriting was asked for."""
    folder = args.log_dir or numbered_folder(Path("logs"), args.env)
    if folder.exists() and any(folder.iterdir()) and not args.overwrite:
        raise FileExistsError(f"{folder} holds files already; choose another --log-dir, or --overwrite, or --resume it.")
    for pattern in OF_A_RUN:
        for left in folder.glob(pattern):
            left.unlink()
    if args.overwrite:
        discard_turns(folder)
        for events in config.events(folder).glob("events.out.tfevents.*"):
            events.unlink()  # or the old run's curves would be drawn together with the new ones
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def train(config: RunConfig, folder: Path, args: argparse.Namespace) -> BestOnVal:
    """PPO on train users, best policy by val users; goes on from the folder's checkpoint if there is one."""
    cotrain(config, folder, args.device, args.progress)
    scenario = config.scenario(folder)
    start = time.perf_counter()
    best = learn(config, scenario, folder, events=config.events(folder), device=args.device, progress=args.progress)
    before = read_seconds(folder)  # what was spent before a resume counts too
    made = {stage: max(spent, before[stage]) for stage, spent in scenario.seconds.items()}
    write_seconds(folder, {**made, "ppo": before["ppo"] + time.perf_counter() - start})
    return best


if __name__ == "__main__":
    main()

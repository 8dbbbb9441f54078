"""Tune PPO's settings on val users: ``python -m agents.tune --env dsa/DigitsResNet-v0 --trials 40 --out digits.yml``.

The first trial is what the YAML file holds now, the others are proposed by Optuna (extra ``tune``). A trial trains as
``agents.train_ppo`` does, in quarters; after each it is given up if it is below the median of the earlier trials there. What
counts is the query reward of val users, averaged over the *later half* of a run's evaluations: the maximum, by which training
keeps a policy, would reward many looks at few users with luck. Test users are never asked for anything.

Trials are remembered beside ``--out``: after a stop the same command goes on, with more ``--trials`` it adds some.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import yaml

from agents.run import hyperparameters
from agents.train_ppo import parse as parse_training
from agents.train_ppo import read_settings, train
from backbones.artefacts import ArtefactError, room_for, write_atomically
from meta.arguments import add_num_threads, show_log

STAGES = 4
"""Parts of a run; after each a trial may be given up."""
LEFT_OUT = {"warm_start": False, "clip_range": 0.2}
"""What holds where the YAML file says nothing: our default and Stable-Baselines3's. :data:`POLICY` likewise."""
POLICY = {"hidden": 128, "initial_logit": 0.0}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m agents.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", required=True, help="environment id")
    parser.add_argument("--trials", type=int, default=40, help="how many in all, with those of earlier calls (default: 40)")
    parser.add_argument("--cost-weight", default="0.1", help="lambda, or uniform:LOW:HIGH (default: %(default)s)")
    parser.add_argument("-n", "--total-timesteps", type=int, help="adaptations a run learns from (default: per env, in YAML)")
    parser.add_argument("--eval-freq", type=int, help="timesteps between evaluations on val users (default: in YAML)")
    parser.add_argument("--seeds", type=int, default=1, help="runs per trial, with the seeds 0, 1, ... (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the proposals (default: 0)")
    parser.add_argument("--env-kwargs", action="extend", nargs="+", default=[], metavar="NAME:VALUE", help="its arguments")
    parser.add_argument("--out", type=Path, help="YAML file for the best settings (default: logs/tuned_<env>.yml)")
    add_num_threads(parser)
    args = parser.parse_args(arguments)
    for name in ("trials", "seeds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be 0 to {2**32 - 1}, got {args.seed}.")
    if args.out is not None and args.out.is_dir():
        parser.error(f"--out {args.out} is a folder; give a file.")
    args.out = args.out or Path("logs") / f"tuned_{args.env.split('/')[-1]}.yml"
    return args


def main(arguments: list[str] | None = None) -> None:
    """Search, print the best settings and write them."""
    args = parse(arguments)
    torch.set_num_threads(args.num_threads)
    show_log()
    try:
        print(tune(args))
    except (ValueError, ImportError, OSError, FloatingPointError, ArtefactError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the finished trials are kept, the same command goes on")
    print(f"written to {args.out}")


def tune(args: argparse.Namespace) -> str:
    """Run the trials that are missing; the text of ``--out``.

    Raises:
        ValueError: for an unknown environment or impossible arguments of it, or if trials with other settings lie beside
            ``--out``.
        ImportError: without Optuna.
    """
    settings = starting_settings(args)
    read_settings(parse_training(training_flags(settings, args, 0)))  # what is wrong is said before anything is written
    try:
        from agents.search import finished, open_study, run_trials, suggest
    except ModuleNotFoundError as error:
        raise ImportError("tuning needs Optuna: pip install -e '.[tune]'") from error
    wanted = {name: getattr(args, name) for name in ("env", "cost_weight", "seeds", "seed", "env_kwargs")}
    path = args.out.with_suffix(".trials")
    with room_for(path):
        study = open_study(path, wanted | {"settings": settings})
        run_trials(study, settings, lambda tried, report: value_of(tried, args, report), args.trials, args.seed)
    best, first = study.best_trial, next(trial for trial in finished(study) if trial.value is not None)
    lines = [
        f"# Written by `{command_of(args)}`, from val users only.",
        f"# The best of {len(finished(study))} trials: reward {best.value:.4f}; the settings before it had {first.value:.4f}.",
        "# These are means of the later half of a run's evaluations on val users' query examples.",
        yaml.safe_dump({args.env: suggest(best, settings)}, sort_keys=False),
    ]
    text = "\n".join(lines)
    write_atomically(args.out, text.encode())
    return text


def starting_settings(args: argparse.Namespace) -> dict:
    """The YAML file's entry, complete. Raises ``ValueError`` for an unknown id, or a policy that is not ours."""
    settings = LEFT_OUT | hyperparameters(args.env, [])
    if settings["policy"] != "GatingPolicy":
        raise ValueError(f"only GatingPolicy can be tuned; the entry of {args.env} has {settings['policy']!r}.")
    for name in ("total_timesteps", "eval_freq"):
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    return settings | {"policy_kwargs": POLICY | settings["policy_kwargs"]}


def value_of(settings: dict, args: argparse.Namespace, report: Callable[[float, int], None]) -> float:
    """Query reward of val users, the mean over seeds of :func:`later_half`; reported after every stage of a run."""
    values = []
    for seed in range(args.seeds):
        training = parse_training(training_flags(settings, args, seed))
        config = read_settings(training)
        history: dict[int, float] = {}
        with TemporaryDirectory() as folder:
            for stage in range(1, STAGES + 1):  # goes on from the checkpoint of the stage before
                part = replace(config, total_timesteps=-(-config.total_timesteps * stage // STAGES))
                history |= dict(train(part, Path(folder), training).history)
                report(later_half(history), seed * STAGES + stage)
        values.append(later_half(history))
    return float(np.mean(values))


def later_half(history: dict[int, float]) -> float:
    """Mean of the later half of a run's evaluations, given by timesteps."""
    values = [history[at] for at in sorted(history)]
    return float(np.mean(values[len(values) // 2 :]))


def training_flags(settings: dict, args: argparse.Namespace, seed: int) -> list[str]:
    """One run as a command line of ``agents.train_ppo``."""
    overrides = [f"-P{name}:{json.dumps(value)}" for name, value in settings.items()]
    given = [f"--env-kwargs={pair}" for pair in args.env_kwargs]
    return [f"--env={args.env}", f"--seed={seed}", f"--cost-weight={args.cost_weight}", "--no-progress", *overrides, *given]


def command_of(args: argparse.Namespace) -> str:
    """What makes the file again, without anybody's folders."""
    words = ["python", "-m", "agents.tune", "--env", args.env, "--trials", str(args.trials)]
    for name in ("cost_weight", "total_timesteps", "eval_freq", "seeds", "seed"):
        if getattr(args, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    for pair in args.env_kwargs:
        name, _, value = pair.partition(":")
        words += ["--env-kwargs", f"{name}:{name.upper()}" if Path(value).is_absolute() else pair]
    return shlex.join([*words, "--out", args.out.name])


if __name__ == "__main__":
    main()

"""A policy trained elsewhere: ``python -m eval.transfer --from RUN --env dsa/UnipenResNet-v0 --write docs/transfer.md``.

Puts the gating policy of a run to work on another backbone or population, whatever its number of pathways: as it is, and
after short fine-tuning on the train users there (PPO from its weights, the best policy by val users kept); each with the user
embedding, and with it zeroed in fine-tuning and in use. Beside it: a policy trained there from scratch for as many steps (with
``--full-steps`` a longer training as well), the best static mask there (by its train users), everything on and everything
off. All on query examples of test users there. Runs that are finished are not repeated.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.policies import BasePolicy

from agents.bootstrap import paired_difference
from agents.checkpoint import choose_plans, load_policy
from agents.learning import learn
from agents.people import unit_of
from agents.rivals import best_static
from agents.run import RunConfig
from agents.transfer import trained_rules, transferred_policy
from backbones.artefacts import ArtefactError, cache_key
from backbones.base import hash_tensors
from envs.oracles import Plans
from envs.rules import Rules
from envs.scenario import Scenario
from eval.headline import text_of
from eval.pages import write_between_markers
from meta.arguments import add_num_threads, parse_pairs, show_log

BEGIN, END = "<!-- transfer: begin -->", "<!-- transfer: end -->"
LOOKS = 8
"""Evaluations on val users during fine-tuning."""
AS_IS, TUNED, SCRATCH, ZEROED = "as it is", "fine-tuned", "from scratch", ", embedding zeroed"
PAIRS = ((AS_IS, AS_IS + ZEROED), (TUNED, TUNED + ZEROED), (TUNED, AS_IS), (TUNED, SCRATCH))
"""What is compared besides with the best static mask."""


@dataclass(frozen=True)
class Figures:
    """One method on the U test users of a seed, at one cost weight: ``[U]`` each, and how many masks it used."""

    reward: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    on: NDArray[np.float64]
    masks: int


ByWeight = dict[float, dict[str, Figures]]
"""Figures by cost weight and method."""
People = list[tuple[str, ...]] | None
"""By seed the names of its test users, where they are real people, who are the same in every seed."""
Trained = Mapping[str, tuple[BasePolicy, Scenario]]
"""Policies by title, each with the scenario as it sees it."""


def blind(scenario: Scenario) -> Scenario:
    """The scenario with every user's embedding zeroed: what is left are the pathways' statistics."""
    return replace(scenario, embeddings=np.zeros_like(scenario.embeddings))


def trained(config: RunConfig, scenario: Scenario, rules: Rules, folder: Path, start: BasePolicy | None = None) -> BasePolicy:
    """The best policy by val users after PPO on the scenario, see :func:`agents.learning.learn`."""
    learn(config, scenario, folder, rules=rules, start=start)
    return load_policy(folder / "policy", scenario)[0]


def policies(path: Path, config: RunConfig, scenario: Scenario, rules: Rules, folder: Path, full_steps: int | None) -> Trained:
    """Every policy that is compared, those trained here among them.

    Args:
        path: of the policy from elsewhere.
        config: how to train here; ``total_timesteps`` is the short training.
        scenario: here.
        rules: of the policy from elsewhere.
        folder: for the runs.
        full_steps: timesteps of the long training from scratch; None for none.
    """
    zeroed, arrived = blind(scenario), transferred_policy(path, scenario)
    steps = config.total_timesteps
    # An average over rollouts, as long runs keep, would hardly leave its start in so few.
    short = replace(config, average=0.0, eval_freq=max(1, steps // LOOKS))
    found: dict[str, tuple[BasePolicy, Scenario]] = {AS_IS: (arrived, scenario), AS_IS + ZEROED: (arrived, zeroed)}
    for title, seen, start, name in (
        (TUNED, scenario, arrived, "fine-tuned"),
        (TUNED + ZEROED, zeroed, arrived, "fine-tuned-zeroed"),
        (SCRATCH, scenario, None, "scratch"),
    ):
        found[title] = (trained(short, seen, rules, folder / f"{name}-{steps}", start), seen)
    if full_steps is not None:
        full = replace(config, total_timesteps=full_steps)
        found[f"{SCRATCH}, {full_steps:,} steps"] = (
            trained(full, scenario, rules, folder / f"scratch-full-{full_steps}"),
            scenario,
        )
    return found


def measured(scenario: Scenario, rules: Rules, trained: Trained, seed: int) -> ByWeight:
    """Every policy and the masks that are the same for everybody, at each of the rules' reported cost weights."""
    users = scenario.users("test")
    shape = (len(users), 1, len(scenario.pathways))
    found: ByWeight = {}
    for weight in rules.weight.reported():
        plans = {title: choose_plans(policy, seen, users, rules, weight) for title, (policy, seen) in trained.items()}
        plans["best_static"] = np.broadcast_to(best_static(scenario, weight, seed), shape)
        plans |= {"all_on": np.ones(shape, dtype=bool), "all_off": np.zeros(shape, dtype=bool)}
        found[weight] = {title: figures(scenario, masks, weight) for title, masks in plans.items()}
    scenario.save()
    return found


def figures(scenario: Scenario, plans: Plans, weight: float) -> Figures:
    """Plans ``[U, R, P]`` on test users' query examples."""
    outcome, masks = scenario.oracle.evaluate(scenario.users("test"), plans, "query"), plans[:, -1]
    return Figures(outcome.reward(weight), outcome.accuracy, masks.mean(1), len(np.unique(masks, axis=0)))


@dataclass(frozen=True)
class Seed:
    """What a seed found: from what to what, in words; figures; who the test users are, see :data:`People`."""

    words: str
    found: ByWeight
    people: tuple[str, ...] | None


def transferred(run: Path, env: str, env_kwargs: dict, seed: int, args: argparse.Namespace) -> Seed:
    """Train what is to be trained and measure everything for one seed."""
    there = RunConfig.load(run)
    config = replace(
        there,
        env=env,
        env_kwargs=env_kwargs,
        seed=seed,
        total_timesteps=args.fine_tune_steps,
        target_active=None,
        cotrain=0,
        warm_start=False,
        tensorboard_log=None,
    )
    path, scenario = run / "policy", config.scenario()
    arrived, rules = transferred_policy(path, scenario), trained_rules(path)
    settings = {**asdict(config), "total_timesteps": None, "rules": rules.to_json()}
    key = cache_key(policy=hash_tensors(arrived.state_dict()), here=scenario.fingerprint, settings=settings)
    trained = policies(path, config, scenario, rules, args.runs / f"{env.split('/')[-1]}-{key}", args.full_steps)
    size = f"{len(scenario.pathways)} pathways, {len(scenario.users('test'))} test users"
    words = f"from {described(there)} to {described(config)} ({size}), fine-tuned for {config.total_timesteps:,} steps"
    return Seed(words, measured(scenario, rules, trained, seed), scenario.people("test"))


def described(config: RunConfig) -> str:
    """A run's environment with its arguments, but nobody's folders."""
    kwargs = [f"{name}:{value}" for name, value in config.env_kwargs.items() if not Path(str(value)).is_absolute()]
    return f"`{' '.join([config.env, *kwargs])}`"


def table(weight: float, seeds: list[ByWeight], people: People) -> list[str]:
    """Every method at one cost weight, means over users and seeds, with the paired difference to the best static mask."""
    lines = [
        f"| at cost weight {weight:g} | reward | accuracy | on | masks | reward - best_static | |",
        "| --- " * 7 + "|",
    ]
    static = [found[weight]["best_static"].reward for found in seeds]
    for title in seeds[0][weight]:
        each = [found[weight][title] for found in seeds]
        reward, accuracy, on = (np.mean([getattr(f, name).mean() for f in each]) for name in ("reward", "accuracy", "on"))
        masks = np.mean([f.masks for f in each])
        apart = paired_difference([f.reward for f in each], static, people=people)
        verdict = "better" if apart.low > 0 else "worse" if apart.high < 0 else "no difference shown"
        against = "| | |" if title == "best_static" else f"| {text_of(apart)} | {verdict} |"
        lines.append(f"| {title} | {reward:.3f} | {accuracy:.3f} | {on:.0%} | {masks:.0f} {against}")
    lines.append("")
    for one, other in PAIRS:
        first, second = ([found[weight][title].reward for found in seeds] for title in (one, other))
        lines.append(f"- {one} less {other}: {text_of(paired_difference(first, second, people=people))}")
    return lines


def report(seeds: list[Seed], command: str) -> str:
    """The whole text between the markers."""
    found, people = [seed.found for seed in seeds], [seed.people for seed in seeds if seed.people is not None] or None
    lead = (
        f"A policy {seeds[0].words}; {len(seeds)} seed{'s' * (len(seeds) > 1)}. Query examples of test users; 95 % paired "
        f"bootstrap intervals, {unit_of(people is None)}. `on`: share of pathways; `masks`: distinct ones. Nothing was chosen "
        f"by test users. Written by `{command}`."
    )
    return "\n\n".join([lead, *("\n".join(table(weight, found, people)) for weight in found[0])])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.transfer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="sources", type=Path, nargs="+", required=True, help="runs: one, or one per seed")
    parser.add_argument("--env", required=True, help="id of the environment to go to")
    parser.add_argument("--env-kwargs", action="extend", nargs="+", default=[], metavar="NAME:VALUE", help="its arguments")
    parser.add_argument("--seeds", type=int, nargs="+", help="of what is redrawn there (default: 0, 1, ..., one per run)")
    parser.add_argument("--fine-tune-steps", type=int, default=5000, help="timesteps (default: %(default)s)")
    parser.add_argument("--full-steps", type=int, help="timesteps of a long training from scratch (default: none)")
    parser.add_argument("--runs", type=Path, default=Path("logs/transfer"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--write", type=Path, help="page with markers to write the tables into (default: print only)")
    add_num_threads(parser)
    args = parser.parse_args(arguments)
    args.seeds = args.seeds or list(range(len(args.sources)))
    if len(args.sources) == 1:
        args.sources = args.sources * len(args.seeds)
    if len(args.sources) != len(args.seeds):
        parser.error(f"{len(args.sources)} runs for {len(args.seeds)} seeds; give one run, or one per seed.")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Transfer, fine-tune, measure, print and write."""
    args = parse(arguments)
    torch.set_num_threads(args.num_threads)
    show_log()
    given = sys.argv[1:] if arguments is None else arguments
    # The page gets the command, but nobody's folders.
    shown = [Path(word).name if Path(word).is_absolute() else word for word in given]
    try:
        kwargs = parse_pairs(args.env_kwargs, "--env-kwargs")
        done = [transferred(run, args.env, kwargs, seed, args) for run, seed in zip(args.sources, args.seeds, strict=True)]
        text = report(done, shlex.join(["python", "-m", "eval.transfer", *shown]))
        print(text)
        if args.write:
            write_between_markers(args.write, text, BEGIN, END)
    except (ValueError, ImportError, OSError, FloatingPointError, ArtefactError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; what was trained is kept, the same command goes on")


if __name__ == "__main__":
    main()

"""Adapt, look, decide again: ``python -m eval.rounds --rounds 2 3 --write docs/rounds.md``.

With R rounds a policy decides a mask, the user's adapters take K gradient steps under it, the policy looks at the statistics at
the new weights, decides again, and so on: R * K gradient steps per user. Its rival decides once and holds that mask for as many
steps: the same environment with one round, on a meta-initialisation whose inner rates are repeated R times. Both are trained on
equally many episodes, in rollouts of equally many, and chosen by equally many looks at val users. Beside them one round of
K steps, and the best static mask (by train users) held for R * K steps. All on query examples of test users. Runs that are
finished are not repeated.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from agents.bootstrap import Interval, paired_difference
from agents.checkpoint import choose_plans, load_policy
from agents.learning import learn
from agents.people import unit_of
from agents.rivals import best_static
from agents.run import RunConfig
from agents.train_ppo import parse as training_flags
from agents.train_ppo import read_settings
from backbones.artefacts import ArtefactError, cache_key, exists
from envs.oracles import CachedOracle, LiveOracle, Plans
from envs.scenario import Scenario
from eval.headline import text_of
from eval.pages import write_between_markers
from meta.arguments import add_num_threads, parse_pairs, show_log
from meta.inner import MetaInit
from meta.store import init_facts, save_init

BEGIN, END = "<!-- rounds: begin -->", "<!-- rounds: end -->"
ONCE = "one round"


@dataclass(frozen=True)
class Figures:
    """One way to decide on the U test users of a seed, ``[U]`` each.

    Attributes:
        reward, accuracy: on query examples. cost: of the last mask.
        changed: 1 where the mask changed between rounds, else 0.
        steps: gradient steps taken; a round with nothing on takes none.
    """

    reward: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    cost: NDArray[np.float64]
    changed: NDArray[np.float64]
    steps: NDArray[np.float64]


Seed = dict[str, Figures]
"""Figures by title."""
People = Sequence[tuple[str, ...]] | None
"""By seed the names of its test users, where they are real people, who are the same in every seed."""


def titles(rounds: int) -> tuple[str, str, str]:
    """Of what is compared at so many rounds: re-gated, held, best static mask."""
    return f"{rounds} rounds, re-gated", f"{rounds} rounds, held", f"{rounds} rounds, best_static"


def tiled(init: MetaInit, rounds: int) -> MetaInit:
    """The initialisation whose R * K steps are its K steps R times over: one mask held as long as R rounds last.

    Raises:
        ValueError: if ``rounds`` is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")
    return replace(init, rates=init.rates.repeat(rounds, 1))


def live_oracle(scenario: Scenario) -> LiveOracle:
    """The oracle that adapts. Raises ``ValueError`` if the scenario has none."""
    live = scenario.oracle.live if isinstance(scenario.oracle, CachedOracle) else scenario.oracle
    if not isinstance(live, LiveOracle):
        raise ValueError(f"rounds need a model whose adapters go on learning; {scenario.name} has none: choose another --env.")
    return live


def regating(config: RunConfig, rounds: int) -> RunConfig:
    """The same training with several rounds: a step is a decision, so everything that counts steps is multiplied."""
    return replace(
        config,
        env_kwargs={**config.env_kwargs, "rounds": rounds},
        total_timesteps=config.total_timesteps * rounds,
        eval_freq=config.eval_freq * rounds,
        ppo={**config.ppo, "n_steps": config.ppo["n_steps"] * rounds},
    )


def holding(config: RunConfig, rounds: int, folder: Path) -> RunConfig:
    """The same training with one decision that is held for as many gradient steps; its initialisation goes to ``folder``."""
    path = folder.resolve() / f"init-{rounds}"
    if not exists(path):
        live = live_oracle(config.scenario())
        save_init(path, tiled(live.init, rounds), init_facts(live.data))
    return replace(config, env_kwargs={**config.env_kwargs, "init": str(path)})


def learned(config: RunConfig, folder: Path) -> Figures:
    """The policy of a run, trained first as far as it is not yet."""
    scenario = config.scenario()
    learn(config, scenario, folder)
    policy, _ = load_policy(folder / "policy", scenario)
    return figures(scenario, choose_plans(policy, scenario, scenario.users("test"), config.rules), float(config.cost_weight))


def static(config: RunConfig) -> Figures:
    """The best static mask by train users."""
    scenario, weight = config.scenario(), float(config.cost_weight)
    mask = best_static(scenario, weight, config.seed)
    return figures(scenario, np.tile(mask, (len(scenario.users("test")), 1, 1)), weight)


def figures(scenario: Scenario, plans: Plans, weight: float) -> Figures:
    """Plans ``[U, R, P]`` on test users' query examples."""
    outcome, init = scenario.oracle.evaluate(scenario.users("test"), plans, "query"), live_oracle(scenario).init
    scenario.save()
    changed = (plans[:, 1:] != plans[:, :-1]).any((1, 2))
    moved = (plans & init.adapted.numpy()).any(2).sum(1)
    return Figures(
        outcome.reward(weight), outcome.accuracy, outcome.cost, changed.astype(float), (moved * init.steps).astype(float)
    )


def settings(args: argparse.Namespace, seed: int) -> RunConfig:
    """How a seed's policies are trained: one round, K gradient steps.

    Raises:
        ValueError: for settings that do not exist, or rounds among the environment's arguments.
    """
    if "rounds" in parse_pairs(args.env_kwargs, "--env-kwargs"):
        raise ValueError("--env-kwargs must not hold rounds: --rounds says how many are compared.")
    flags = [f"--env={args.env}", f"--seed={seed}", f"--cost-weight={args.cost_weight}"]
    flags += [] if args.total_timesteps is None else [f"--total-timesteps={args.total_timesteps}"]
    flags += [f"--env-kwargs={pair}" for pair in args.env_kwargs] + [f"-P={pair}" for pair in args.hyperparameter]
    config = read_settings(training_flags(flags))
    return replace(config, env_kwargs={**config.env_kwargs, "rounds": 1})


def measured(config: RunConfig, rounds: Sequence[int], runs: Path) -> Seed:
    """Train what is missing and measure everything for one seed, in the order of the table."""
    scenario = config.scenario()
    live_oracle(scenario)  # refuse before anything is trained
    folder = runs / f"{config.env.split('/')[-1]}-{cache_key(here=scenario.fingerprint, settings=asdict(config))}"
    found = {ONCE: learned(config, folder / "once")}
    for count in rounds:
        again, held, fixed = titles(count)
        longer = holding(config, count, folder)
        found[again] = learned(regating(config, count), folder / f"regated-{count}")
        found[held] = learned(longer, folder / f"held-{count}")
        found[fixed] = static(longer)
    return found


def difference(seeds: Sequence[Seed], first: str, second: str, field: str = "reward", people: People = None) -> Interval:
    """Paired over users within seeds, or over real people."""
    one, other = ([getattr(seed[title], field) for seed in seeds] for title in (first, second))
    return paired_difference(one, other, people=people)


def table(seeds: Sequence[Seed]) -> list[str]:
    """Means over users and seeds."""
    lines = ["| | reward | accuracy | cost | mask changed | gradient steps |", "| --- " * 6 + "|"]
    for title in seeds[0]:
        reward, accuracy, cost, changed, steps = (
            np.mean([getattr(seed[title], name).mean() for seed in seeds])
            for name in ("reward", "accuracy", "cost", "changed", "steps")
        )
        lines.append(f"| {title} | {reward:.3f} | {accuracy:.3f} | {cost:.3f} | {changed:.0%} | {steps:.1f} |")
    return lines


def differences(seeds: Sequence[Seed], rounds: Sequence[int], people: People) -> list[str]:
    """What deciding again brings, and what further gradient steps bring."""
    heads = "reward, re-gated - held | accuracy, re-gated - held | cost, re-gated - held | reward, re-gated - best_static "
    lines = [f"| rounds | {heads}| reward, held - {ONCE} |", "| --- " * 6 + "|"]
    for count in rounds:
        again, held, fixed = titles(count)
        cells = [text_of(difference(seeds, again, held, field, people)) for field in ("reward", "accuracy", "cost")]
        cells += [text_of(difference(seeds, *pair, people=people)) for pair in ((again, fixed), (held, ONCE))]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return lines


def verdict(seeds: Sequence[Seed], rounds: Sequence[int], people: People) -> str:
    """One sentence, from the intervals of the rewards."""
    parts = []
    for count in rounds:
        again, held, _ = titles(count)
        apart = difference(seeds, again, held, people=people)
        words = "better" if apart.low > 0 else "worse" if apart.high < 0 else "no difference shown"
        parts.append(f"re-gating in {count} rounds: {words}")
    return f"Against one decision held for as many gradient steps, by reward, {'; '.join(parts)}."


def report(configs: Sequence[RunConfig], seeds: Sequence[Seed], rounds: Sequence[int], command: str) -> str:
    """The whole text between the markers; ``configs`` by seed."""
    config, scenario = configs[0], configs[0].scenario()
    people = None if scenario.simulated else [each.scenario().people("test") or () for each in configs]
    episodes = config.total_timesteps // config.rules.core(scenario, slots=1).steps
    steps, users, several = live_oracle(scenario).init.steps, len(seeds[0][ONCE].reward), "s" * (len(seeds) > 1)
    lead = (
        f"`{config.env}`, cost weight {config.cost_weight:g}; {len(seeds)} seed{several}, {users} test users each, query "
        f"examples. A round allows {steps} gradient steps; every policy was trained on about {episodes:,} episodes. 95 % "
        f"paired bootstrap intervals, {unit_of(scenario.simulated)}: they cover other users, not another training. `cost`: of "
        "the last mask; `mask changed`: share of users whose mask changed between rounds; `gradient steps`: those taken per "
        f"user (a round with nothing on takes none). Nothing was chosen by test users. Written by `{command}`."
    )
    blocks = [lead, "\n".join(table(seeds)), "\n".join(differences(seeds, rounds, people)), verdict(seeds, rounds, people)]
    return "\n\n".join(blocks)


def shown(word: str) -> str:
    """A word of the command line without anybody's folders."""
    name, colon, value = word.rpartition(":")
    return f"{name}{colon}{Path(value).name if Path(value).is_absolute() else value}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line. Raises ``ValueError`` for numbers of rounds or seeds that compare nothing."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.rounds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", default="dsa/DigitsResNet-v0", help="environment id (default: %(default)s)")
    parser.add_argument("--rounds", type=int, nargs="+", default=[2, 3], help="decisions per user (default: 2 3)")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, from 0 (default: %(default)s)")
    parser.add_argument("-n", "--total-timesteps", type=int, help="episodes to learn from (default: per env, in YAML)")
    parser.add_argument("--cost-weight", type=float, default=0.1, help="lambda (default: %(default)s)")
    parser.add_argument("--env-kwargs", action="extend", nargs="+", default=[], metavar="NAME:VALUE", help="its arguments")
    parser.add_argument("-P", "--hyperparameter", action="append", default=[], metavar="NAME:VALUE", help="override a setting")
    parser.add_argument("--runs", type=Path, default=Path("logs/rounds"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--write", type=Path, help="page with markers to write the tables into (default: print only)")
    add_num_threads(parser)
    args = parser.parse_args(arguments)
    args.rounds = sorted(set(args.rounds))
    if args.rounds[0] < 2:
        raise ValueError(f"--rounds takes numbers of at least 2, got {args.rounds[0]}; one round is measured in any case.")
    if args.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {args.seeds}.")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Train, measure, print and write."""
    show_log()
    words = sys.argv[1:] if arguments is None else arguments
    try:
        args = parse(arguments)
        torch.set_num_threads(args.num_threads)
        configs = [settings(args, seed) for seed in range(args.seeds)]
        seeds = [measured(config, args.rounds, args.runs) for config in configs]
        command = shlex.join(["python", "-m", "eval.rounds", *map(shown, words)])
        text = report(configs, seeds, args.rounds, command)
        print(text)
        if args.write:
            write_between_markers(args.write, text, BEGIN, END)
    except (ValueError, ImportError, OSError, FloatingPointError, ArtefactError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; what was trained is kept, the same command goes on")


if __name__ == "__main__":
    main()

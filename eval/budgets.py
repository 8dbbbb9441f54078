"""One policy for every budget: ``python -m eval.budgets --write README.md --figure docs/pareto.png``.

Per seed trains one policy that is shown the cost weight, and a separate policy for each of several weights (on the adapters
that the one policy was co-trained with, if it was); draws their Pareto fronts beside those of their rivals, and what a search
per new user would have to spend for the same reward. Runs that are finished are not repeated (those of ``eval.headline`` in
the same folder are shared), so the command can be stopped and called again.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from agents.checkpoint import choose_masks, load_policy
from agents.comparison import Result, compare
from agents.rivals import best_static, searched, thresholded
from agents.run import RunConfig
from backbones.artefacts import ArtefactError
from envs.cost_weights import REPORTED, CostWeight
from envs.oracles import Plans, Users
from envs.registration import known_spec
from envs.rules import Rules
from envs.scenario import Scenario
from eval.adaptations import spending
from eval.budget_pictures import draw_front, draw_spending
from eval.budget_report import RANGE, SPENDING_WEIGHT, Measured, by_person, report, search_curves
from eval.fronts import WEIGHTS, for_everybody, measured, random_points, static_masks
from eval.headline import FURTHER, finished
from eval.pages import write_between_markers
from eval.pareto import Band, Points, mean_points, simultaneous_band
from meta.arguments import add_num_threads

BEGIN, END = "<!-- budgets: begin -->", "<!-- budgets: end -->"
Choose = Callable[[Users, float], Plans]
"""Users ``[B]`` and a cost weight to masks ``[B, P]``."""


def chooser(folder: Path) -> Choose:
    """The policy of a finished run, as a function of users and cost weight.

    Raises:
        FileNotFoundError: if the folder is no run.
        ArtefactError: if its policy is missing or damaged.
    """
    config = RunConfig.load(folder)
    scenario = config.scenario(folder)
    policy, meta = load_policy(folder / "policy", scenario)
    rules = Rules.from_json(meta["rules"])
    trained = rules.weight

    def choose(users: Users, cost_weight: float) -> Plans:
        if not trained.low <= cost_weight <= trained.high:
            raise ValueError(f"the policy in {folder} was trained for cost weight {trained.given()}, not {cost_weight:g}.")
        return choose_masks(policy, scenario, users, cost_weight if trained.varies else None, rules)

    return choose


def measure_seed(root: Path, env: str, seed: int, extra: Sequence[str]) -> Measured:
    """Train what is missing of a seed, and measure everything on its test users.

    Raises:
        ValueError: where cost is not of parameters: fronts begin at a mask that costs nothing.
    """
    counts = known_spec(env).kwargs.get("cost", "parameters")
    if counts != "parameters" or {"--cost", "--gates"} & {*extra}:
        raise ValueError(f"{env} counts {counts}: budgets are of personal parameters, choose an environment that counts these.")
    conditioned = finished(root / f"seed{seed}-conditioned", env, seed, RANGE, extra)
    one, config = chooser(conditioned), RunConfig.load(conditioned)
    shared = on_its_adapters(conditioned, config, extra)
    single = {w: chooser(finished(root / f"seed{seed}-cost{w:g}", env, seed, w, shared)) for w in WEIGHTS}
    scenario = config.scenario(conditioned)

    def separate(users: Users, cost_weight: float) -> Plans:
        return single[cost_weight](users, cost_weight)

    users = scenario.users("test")
    found = {w: _compared(scenario, one, separate, w, seed, config.search) for w in REPORTED}
    points = {
        "one policy": measured(scenario, users, [one(users, w) for w in WEIGHTS]),
        "separate policies": measured(scenario, users, [separate(users, w) for w in WEIGHTS]),
        **_rival_points(scenario, seed, config.search),
    }
    static = measured(scenario, users, for_everybody(static_masks(scenario, seed), users))
    spent = spending(scenario, lambda u: one(u, SPENDING_WEIGHT), SPENDING_WEIGHT, seed)
    return Measured(found, points, static, spent, training_adaptations(config, scenario), scenario.people("test"))


def on_its_adapters(folder: Path, config: RunConfig, extra: Sequence[str]) -> list[str]:
    """Flags of the separate policies: where the one policy's adapters were co-trained, they start from the same."""
    if not config.cotrain:
        return list(extra)
    place = list(extra).index("--cotrain")
    flags = [*extra[:place], *extra[place + 2 :]]
    return [*flags, "--env-kwargs", f"init:{config.init_of(folder, config.cotrain)}"]


def training_adaptations(config: RunConfig, scenario: Scenario) -> int:
    """Adaptations that the run's training asked for: its timesteps, its looks at val users, everybody's statistics.

    Meta-training is not among them: searches start from the same initialisation.
    """
    users = {split: len(scenario.users(split)) for split in ("train", "val")}
    looks = 2 + config.total_timesteps // config.eval_freq  # one before and one after training
    each = len(CostWeight.parse(config.cost_weight).reported())
    return config.total_timesteps + looks * users["val"] * each + users["train"] + users["val"]


def _compared(scenario: Scenario, one: Choose, separate: Choose, weight: float, seed: int, search: bool) -> dict[str, Result]:
    found = compare(scenario, lambda users: one(users, weight), weight, seed, search=search)
    users = scenario.users("test")
    masks = separate(users, weight)
    outcome = scenario.oracle.evaluate(users, masks, "query")
    labels = found["ppo"].labels_used
    return found | {"separate": Result(outcome.accuracy, outcome.cost, masks.mean(1), masks, labels)}


def _rival_points(scenario: Scenario, seed: int, search: bool) -> dict[str, Points]:
    """Points by method of the rivals that the pictures and hypervolumes show; those with a cost weight at all of them."""
    users = scenario.users("test")
    static = np.stack([best_static(scenario, w, seed) for w in WEIGHTS])
    gates = [thresholded(scenario, users, w, "gradient_norm") for w in WEIGHTS]
    named = np.array([[True], [False]]).repeat(len(scenario.pathways), 1)
    found = {
        "best_static": measured(scenario, users, for_everybody(static, users)),
        "random": random_points(scenario, users, seed),
        "gradient_norm": measured(scenario, users, gates),
        "all_on": measured(scenario, users, for_everybody(named[:1], users)),
        "all_off": measured(scenario, users, for_everybody(named[1:], users)),
    }
    if search:
        each = [
            searched(scenario, users, w, "validation", mask[None], f"search on validation labels at cost weight {w:g}")
            for w, mask in zip(WEIGHTS, static, strict=True)
        ]
        found["validation_search"] = measured(scenario, users, each)
    return found


def band_of(seeds: Sequence[Measured]) -> Band:
    """The one policy's front less that of static masks."""
    return simultaneous_band([seed.points["one policy"] for seed in seeds], [seed.static for seed in seeds])


def draw(seeds: Sequence[Measured], env: str, out: Path) -> Path:
    """Both pictures, the second named like the first with ``-adaptations``; returns its path."""
    points = {name: mean_points([seed.points[name] for seed in seeds]) for name in seeds[0].points if name != "best_static"}
    who = f"{len(seeds)} seeds, {env}"
    title = f"Accuracy against cost on users never seen ({who}).\nNumbers: cost weights that the one policy was shown."
    draw_front(points, mean_points([seed.static for seed in seeds]), WEIGHTS, title, out)
    second = out.with_name(f"{out.stem}-adaptations{out.suffix}")
    policy = float(np.mean([seed.spent.policy.mean() for seed in seeds]))
    title = f"What searches spend on every new user for the policy's reward\n({who})"
    draw_spending(policy, search_curves(seeds), SPENDING_WEIGHT, title, second)
    return second


def _command(args: argparse.Namespace, extra: Sequence[str]) -> str:
    """What the page says made it, without anybody's folders."""
    flags = ["--env", args.env, "--seeds", str(args.seeds)]
    for name in ("write", "figure"):
        path = getattr(args, name)
        flags += [f"--{name}", path.name if path.is_absolute() else path.as_posix()] if path else []
    return shlex.join(["python", "-m", "eval.budgets", *flags, *extra])


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.budgets", description=__doc__, epilog=FURTHER)
    parser.add_argument("--env", default="dsa/DigitsResNet-v0", help="environment id (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("logs/headline"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--write", type=Path, help="page with markers to write the tables into (default: print only)")
    parser.add_argument("--figure", type=Path, help="PNG of the fronts; that of adaptations goes beside it (default: none)")
    add_num_threads(parser)
    args, extra = parser.parse_known_args(arguments)
    torch.set_num_threads(args.num_threads)
    training = ["--num-threads", str(args.num_threads), *extra]
    try:
        seeds = [measure_seed(args.runs, args.env, seed, training) for seed in range(args.seeds)]
        counted = by_person(seeds)
        text = report(counted, band_of(counted), len(seeds), _command(args, extra))
        print(text)
        if args.figure:
            print(f"wrote {args.figure} and {draw(seeds, args.env, args.figure)}")
        if args.write:
            write_between_markers(args.write, text, BEGIN, END)
    except (ValueError, OSError, FloatingPointError, ArtefactError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

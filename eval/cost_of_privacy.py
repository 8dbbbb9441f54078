"""What privacy costs: ``python -m eval.cost_of_privacy --out runs/privacy --write docs/privacy.md``.

Learns a meta-initialisation and a gating policy from 10,000 simulated users, without privacy and under user-level budgets
that both share, with the same rounds, users and rates, and measures them on test users nobody was chosen by; and beside these
what val users alone teach, who are public and begin all the other rows' starts. Rows are kept in ``--out`` and starts in
``$DSA_CACHE``: what was measured is not measured again.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from agents.bootstrap import Interval, paired_difference
from agents.checkpoint import choose_masks
from agents.private import PART, PrivateSettings, learn_private
from backbones.artefacts import ArtefactError, cache_key, load_artefact, write_atomically
from envs.modelled import scenario_from
from envs.rules import Rules
from envs.scenario import Scenario
from eval.headline import text_of
from eval.pages import write_between_markers
from meta.accountant import Accountant, BudgetError, Round, noise_for, usual_delta
from meta.arguments import add_num_threads, show_log
from meta.inner import MetaInit
from meta.learned import learned_init, public_start
from meta.prepare import folder_of, prepared
from meta.private import Privacy, PrivateRounds
from meta.store import KIND
from meta.trainer import MetaConfig
from users.batch import Prepared

BEGIN, END = "<!-- cost of privacy -->", "<!-- end of the cost of privacy -->"
NAMES = ("all_off", "all_on", "policy")
WHERE = "digits", "resnet-small"
OPEN, PUBLIC = math.inf, 0.0
"""The epsilons of training without privacy, and of learning from val users alone, who are public."""


@dataclass(frozen=True)
class Design:
    """What is the same in all rows.

    Attributes:
        users: train users, simulated.
        placement, rank: of the adapters. Beside the model, what it makes of an image never changes and is kept, so that there
            can be many users in many rounds; and what is learned is smaller.
        test_users: whom it is measured on.
        cost_weight: of the policy.
        init: how the initialisation is learned.
        init_clip: norm of a user's update of it.
        policy: how the policy is learned.
        policy_clip: norm of a user's update of that.
        more: further arguments of population and backbone.
    """

    users: int = 10_000
    test_users: int = 480
    placement: str = "side"
    rank: int = 16
    cost_weight: float = 0.1
    init: MetaConfig = field(
        default_factory=lambda: MetaConfig(steps=200, users=1000, outer_rate=2e-2, rate_of_rates=0.03, public_steps=1500)
    )
    init_clip: float = 0.25
    policy: PrivateSettings = field(
        default_factory=lambda: PrivateSettings(rounds=60, users=400, masks=8, rate=5e-3, public_rounds=150)
    )
    policy_clip: float = 0.1
    more: dict[str, Any] = field(default_factory=dict)

    def population(self) -> dict[str, Any]:
        """Arguments of the population."""
        return {"train_users": self.users, "test_users": self.test_users, **self.more}

    def noise(self, epsilon: float) -> float:
        """For both parts, so that together they spend the budget."""
        planned = [
            (part.users / self.users, rounds)
            for part, rounds in ((self.init, self.init.steps), (self.policy, self.policy.rounds))
        ]
        return noise_for(epsilon, usual_delta(self.users), planned)

    def promise(self, epsilon: float, clip: float, seed: int) -> Privacy | None:
        """Of one part of a row; None without privacy."""
        return None if epsilon in (OPEN, PUBLIC) else Privacy(epsilon, None, clip, self.noise(epsilon), seed)


def people(design: Design, seed: int) -> Prepared:
    """The users of a seed; what the frozen model makes of them is the same in all rows, and is made once."""
    return prepared(*WHERE, design.placement, design.rank, seed, folder_of(*WHERE), design.population())


def row(design: Design, data: Prepared, epsilon: float, seed: int) -> dict[str, Any]:
    """One row for one seed: both parts learned, test users measured.

    Returns:
        Per name in :data:`NAMES` accuracy and reward of every test user; the policy's mean cost and number of masks; the
        account, None where nothing was spent.
    """
    init, before = start(design, data, epsilon, seed)
    scenario = scenario_from(data, init, "-".join(WHERE), design.placement, None, observed_on="val")
    rules, private = Rules(design.cost_weight), None
    if promise := design.promise(epsilon, design.policy_clip, seed):
        private = PrivateRounds(promise, design.users, design.policy.users, design.policy.rounds, PART, before)
    settings, on = (design.policy.in_public(), "val") if epsilon == PUBLIC else (design.policy, "train")
    policy = learn_private(scenario, rules, settings, seed, private, on)
    masks = scenario.executed(choose_masks(policy, scenario, scenario.users("test"), rules=rules))
    chosen = {"all_off": np.zeros_like(masks), "all_on": np.ones_like(masks), "policy": masks}
    found: dict[str, Any] = {name: measured(scenario, each, design.cost_weight) for name, each in chosen.items()}
    found |= {"masks": len(np.unique(masks, axis=0)), "account": private.accountant.state() if private else None}
    return found


def start(design: Design, data: Prepared, epsilon: float, seed: int) -> tuple[MetaInit, Mapping[Round, int]]:
    """Where adapters start in a row, and what that has spent."""
    learn = replace(design.init, seed=seed)
    if epsilon == PUBLIC:
        return public_start(data, learn, learn.public_steps, folder_of(*WHERE)), {}
    path = learned_init(data, learn, folder_of(*WHERE), privacy=design.promise(epsilon, design.init_clip, seed))
    tensors, said = load_artefact(path, KIND)
    return MetaInit.from_tensors(tensors), Accountant.of(said["accountant"]).rounds if epsilon != OPEN else {}


def measured(scenario: Scenario, masks: np.ndarray, weight: float) -> dict[str, Any]:
    """Masks ``[U, P]`` on test users' query examples."""
    outcome = scenario.oracle.evaluate(scenario.users("test"), masks, "query")
    return {
        "accuracy": outcome.accuracy.tolist(),
        "reward": outcome.reward(weight).tolist(),
        "cost": float(outcome.cost.mean()),
    }


def rows(
    design: Design, epsilons: Sequence[float], seeds: Sequence[int], folder: Path, make: bool = True
) -> dict[float, list[dict[str, Any]]]:
    """Per epsilon one result per seed, read from ``folder`` or made and kept there; or without those that are not there."""
    found: dict[float, list[dict[str, Any]]] = {epsilon: [] for epsilon in epsilons}
    every = [(seed, epsilon) for seed in seeds for epsilon in epsilons]
    data: tuple[int, Prepared] | None = None
    for seed, epsilon in tqdm(every, desc="rows", unit="row"):
        path = folder / f"{cache_key(epsilon=str(epsilon), seed=seed, **asdict(design))}.json"
        if not path.exists():
            if not make:
                continue
            if data is None or data[0] != seed:
                data = seed, people(design, seed)
            made = row(design, data[1], epsilon, seed)
            write_atomically(path, json.dumps({"epsilon": epsilon, "seed": seed, **made}).encode())
        found[epsilon].append(json.loads(path.read_text()))
    return found


def table(found: dict[float, list[dict[str, Any]]]) -> str:
    """Means over test users and seeds; differences to training without privacy are paired, with 95 % intervals."""
    lines = [
        "| epsilon | noise | seeds | bare model | all on | to no privacy | policy's reward | to no privacy | cost | masks |"
    ]
    lines.append("| " + " | ".join(["---"] * 10) + " |")
    for epsilon, each in found.items():
        if not each:
            continue
        cells = [*_account(epsilon, each), str(len(each)), f"{_mean(each, 'all_off', 'accuracy'):.3f}"]
        for name, what in (("all_on", "accuracy"), ("policy", "reward")):
            cells.append(f"{_mean(each, name, what):.3f}")
            cells.append("-" if epsilon == OPEN or OPEN not in found else text_of(_to(each, found[OPEN], name, what)))
        cells.append(f"{np.mean([one['policy']['cost'] for one in each]):.2f}")
        cells.append(" ".join(str(one["masks"]) for one in each))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _account(epsilon: float, each: list[dict[str, Any]]) -> tuple[str, str]:
    """What was spent, and the noise."""
    if epsilon in (OPEN, PUBLIC):
        return "no privacy" if epsilon == OPEN else "0: public users alone", "-"
    return f"{Accountant.of(each[0]['account']).spent():.2f}", f"{each[0]['account']['rounds'][0]['noise']:.3f}"


def _mean(each: list[dict[str, Any]], name: str, what: str) -> float:
    return float(np.mean([np.mean(one[name][what]) for one in each]))


def _to(each: list[dict[str, Any]], others: list[dict[str, Any]], name: str, what: str) -> Interval:
    """Over the seeds that both have."""
    plain = {one["seed"]: one for one in others}
    pairs = [(one, plain[one["seed"]]) for one in each if one["seed"] in plain]
    first, second = ([np.array(pair[place][name][what]) for pair in pairs] for place in (0, 1))
    return paired_difference(first, second)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.cost_of_privacy", description=__doc__)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[8.0, 3.0, 1.0], help="budgets (default: 8 3 1)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--users", type=int, default=Design().users, help="train users (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="where results are kept")
    parser.add_argument("--report", action="store_true", help="of what is in --out alone: measure nothing")
    parser.add_argument("--write", type=Path, help="page with this table's markers to write it into")
    add_num_threads(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    args = parse(arguments)
    torch.set_num_threads(args.num_threads)
    show_log()
    design = Design(users=args.users)
    try:
        if args.seeds < 1 or len({*args.epsilon}) < len(args.epsilon) or not all(0 < e < OPEN for e in args.epsilon):
            raise ValueError("give at least one seed, and epsilons above 0, each once; rows without one are there anyway.")
        found = rows(design, [OPEN, *args.epsilon, PUBLIC], range(args.seeds), args.out, make=not args.report)
        if not found[OPEN]:
            raise ValueError(f"{args.out} has no training without privacy to compare with yet; leave out --report.")
        text = table(found)
        print(text)
        if args.write:
            write_between_markers(args.write, text, BEGIN, END)
    except (ValueError, ImportError, OSError, ArtefactError, BudgetError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

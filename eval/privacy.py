"""Attack a private run: ``python -m eval.privacy RUN`` writes ``attacks.md``, ``attacks.json`` and ``attacks.png`` into it.

* Was this *user* in meta-training? RMIA on the meta-initialisation and on the policy, with reference trainings on other people;
  beside it the same attack on the same training without privacy, and on one overfitted to 100 users: an attack that never
  bites proves nothing. Policies are compared at the run's initialisation, which is public.
* Was this *example* in a user's support? LiRA on the adapter, with shadow adapters.
* An audit of the private rounds in one run, held against what the run claims: drawing, clipping, noise and averaging, with
  canaries instead of users; how users' updates come about is no part of it.

For populations whose generator gives any number of further users (the simulated digits). Trainings are kept in the cache.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.checkpoint import load_policy
from agents.policies import GatingPolicy
from agents.private import PrivateSettings, learn_private, new_policy
from agents.run import RunConfig
from backbones.artefacts import ArtefactError, cache_key, load_artefact, load_or_make, write_atomically
from backbones.base import hash_tensors
from envs.modelled import scenario_from
from envs.scenario import Scenario
from eval.attacks import Success
from eval.audit import Audit, audit
from eval.membership import example_membership, user_membership
from eval.pages import write_between_markers
from eval.policy_membership import policy_membership
from meta.accountant import BudgetError
from meta.arguments import add_num_threads, show_log
from meta.inner import MetaInit
from meta.learned import begun, meta_initialisation
from meta.prepare import folder_of, further_arguments, prepared
from meta.private import PART, Privacy, PrivateRounds, account_of
from meta.store import KIND, init_facts
from meta.trainer import MetaConfig, MetaTrainer
from users.batch import Part

ASKED, JUDGED, FEW, AUDITED = 1000, 500, 100, 2500
"""Members and non-members asked about, further users by whom RMIA judges, users of the overfitted run, canaries."""
OVERFITTED, BY_HEART = 1200, 150
"""Outer steps of the overfitted initialisation, of 20 users each; and rounds of the overfitted policy, of all its users."""


UNUSUAL = ("cost", "precision", "embedding", "local_epsilon")
"""Arguments of an environment that attacks know nothing of."""
BEGIN, END = "<!-- attacks -->", "<!-- end of attacks -->"


class Attacked:
    """A run's initialisation, and the people around it.

    Args:
        run: folder of a run of ``agents.train_private``.
        references: how many reference trainings.

    Raises:
        ValueError: if there are no further people of the same kind, or the initialisation was not learned in private.
    """

    def __init__(self, run: Path, references: int) -> None:
        config = RunConfig.load(run)
        _, kwargs = config.scenario_arguments()
        tensors, said = load_artefact(Path(kwargs["init"]), KIND) if kwargs.get("init") else ({}, {})
        if "privacy" not in said:
            raise ValueError(f"the initialisation of {run} was not learned in private; attack a run of agents.train_private.")
        unusual = [name for name in UNUSUAL if name in kwargs]
        if unusual:
            raise ValueError(
                f"runs with {' and '.join(unusual)} are not attacked: policies are asked as they usually see and pay."
            )
        self.rules, self.run = config.rules, run
        self.privacy, self.account = Privacy(**said["privacy"]), account_of(said, str(run))
        self.said = json.loads((run / "privacy.json").read_text())
        if "settings" not in self.said:
            raise ValueError(f"{run / 'privacy.json'} does not say how the policy was learned: run agents.train_private again.")
        self.config = MetaConfig(**{f.name: said[f.name] for f in fields(MetaConfig) if f.name in said})
        self.init, self.references = MetaInit.from_tensors(tensors), references
        known = further_arguments(kwargs)
        if "train_users" not in known:
            raise ValueError(f"population {kwargs['users']!r} has no further people to compare its train users with.")
        more = {name: value for name, value in kwargs.items() if name in known}
        where = kwargs["users"], kwargs["backbone"], kwargs.get("placement", "side"), kwargs.get("rank", 16), config.seed
        self.folder = folder_of(kwargs["users"], kwargs["backbone"])
        gates = kwargs.get("gates", "adapters")
        self.trained_on = prepared(*where, self.folder, more, gates=gates)
        self.users = len(self.trained_on.population.train)
        others = ASKED + JUDGED + references * max(self.users, FEW)
        self.data = prepared(*where, self.folder, {**more, "train_users": self.users + others}, gates=gates)
        self.placement = where[2]

    def trained(self, config: MetaConfig, users: range) -> MetaInit:
        """An initialisation learned without privacy from some train users, made or loaded."""
        data, facts = self.data, {"users": [users.start, users.stop], **asdict(config)}
        path = self.folder / f"attack-{cache_key(**init_facts(data), gates_of=data.pathways.gates, **facts)}"

        def train() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
            support, query = (Part(data, "train", role, torch.tensor(users)) for role in ("support", "query"))
            start, weights = begun(data, config, self.folder)
            return MetaTrainer(data.pathways, support, query, config, start=start, weights=weights).run().tensors(), facts

        return MetaInit.from_tensors(load_or_make(path, "attacked initialisation", train)[0])

    def user_attacks(self) -> dict[str, Success]:
        """RMIA on the run's initialisation, on the same without privacy, and on an overfitted one: last states, unshrunk."""
        plain = replace(self.config, keep="last", shrink=False)
        few = replace(plain, steps=OVERFITTED, users=20)
        references = [self.trained(replace(plain, seed=1 + i), users) for i, users in enumerate(self.apart(self.users))]
        targets = {"this run": self.init, "without privacy": meta_initialisation(self.trained_on, plain, self.folder)}
        found = {name: self._asked(init, references, min(self.users, ASKED)) for name, init in targets.items()}
        references = [self.trained(replace(few, seed=1 + i), users) for i, users in enumerate(self.apart(FEW))]
        found[f"overfitted to {FEW} users"] = self._asked(self.trained(few, range(FEW)), references, FEW)
        return found

    def apart(self, size: int) -> list[range]:
        """As many chunks of further people as there are references."""
        start = self.users + ASKED + JUDGED
        return [range(start + i * size, start + (i + 1) * size) for i in range(self.references)]

    def _asked(self, init: MetaInit, references: list[MetaInit], members: int) -> Success:
        others = range(self.users, self.users + ASKED)
        population = range(others.stop, others.stop + JUDGED)
        return user_membership(self.data, init, references, range(members), others, population)

    def policy_attacks(self) -> dict[str, Success]:
        """The same on the policy, which was learned from train users' rewards.

        Raises:
            ArtefactError: if the policy is missing or damaged.
        """
        plain = PrivateSettings(**self.said["settings"])
        few = replace(plain, rounds=BY_HEART, users=FEW, hidden=128, entropy=0.0, public_rounds=0)
        target = load_policy(self.run / "policy", self.people)[0]
        assert isinstance(target, GatingPolicy)
        references = [self.policy(plain, users, 1 + i) for i, users in enumerate(self.apart(self.users))]
        targets = {"this run": target, "without privacy": self.policy(plain, range(self.users), 0)}
        found = {name: self._taught(each, references, min(self.users, ASKED)) for name, each in targets.items()}
        references = [self.policy(few, users, 1 + i) for i, users in enumerate(self.apart(FEW))]
        found[f"overfitted to {FEW} users"] = self._taught(self.policy(few, range(FEW), 0), references, FEW)
        return found

    @property
    def taught_by_train_users(self) -> bool:
        """Whether the policy's rewards were train users'."""
        return self.said["on"] == "train"

    @cached_property
    def people(self) -> Scenario:
        """Everybody, at the run's initialisation."""
        return scenario_from(self.data, self.init, str(self.run), self.placement, None, observed_on="val")

    def policy(self, settings: PrivateSettings, users: range, seed: int) -> GatingPolicy:
        """A policy learned without privacy from some train users, made or loaded."""
        facts = {"users": [users.start, users.stop], "seed": seed, "rules": self.rules.to_json(), **asdict(settings)}
        start, people = hash_tensors(self.init.tensors()), self.people
        some = replace(people, splits={**people.splits, "train": np.arange(users.start, users.stop)})

        def learn() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
            return learn_private(some, self.rules, settings, seed, None).state_dict(), facts

        path = self.folder / f"attack-policy-{cache_key(people=people.fingerprint, start=start, **facts)}"
        found = new_policy(some, self.rules, settings, seed)
        found.load_state_dict(load_or_make(path, "attacked policy", learn)[0])
        return found

    def _taught(self, policy: GatingPolicy, references: list[GatingPolicy], members: int) -> Success:
        ends = np.cumsum([self.users, ASKED, JUDGED])
        others, judged = (np.arange(start, stop) for start, stop in pairwise(ends))
        return policy_membership(policy, references, self.people, self.rules, np.arange(members), others, judged)

    def example_attack(self, users: int, shadows: int) -> Success:
        """LiRA on test users' adapters."""
        return example_membership(self.data, self.init, "test", min(users, len(self.data.population.test)), shadows)

    def audit(self) -> Audit:
        """The initialisation's rounds, played with canaries at its sampling probability and noise."""
        kind = next(kind for kind in self.account.rounds if kind.part == PART)
        rounds, expected = self.account.rounds[kind], max(1, round(kind.sampling * AUDITED))
        privacy = replace(self.privacy, epsilon=1000.0, noise=kind.noise)  # the budget is not what is audited
        return audit(PrivateRounds(privacy, round(expected / kind.sampling), expected, rounds))


def table(
    users: Mapping[str, Success],
    policies: Mapping[str, Success],
    examples: Success,
    shadows: int,
    references: int,
    audited: Audit,
) -> str:
    """The findings as Markdown."""
    lines = ["| attack | on | members | others | AUC | found at 1 % false positives |", "| --- | --- | --- | --- | --- | --- |"]
    named = {f"user in meta-training (RMIA, {references} references) | {name}": one for name, one in users.items()}
    named |= {f"user among the policy's (RMIA, {references} references) | {name}": one for name, one in policies.items()}
    named[f"example in a support (LiRA, {shadows} shadow adapters) | users' adapters"] = examples
    for name, one in named.items():
        auc, tpr = (f"[{low:.3f}, {high:.3f}]" for low, high in (one.auc_ci95, one.tpr_ci95))
        lines.append(f"| {name} | {one.members:,} | {one.others:,} | {one.auc:.3f} {auc} | {one.tpr:.3f} {tpr} |")
    said = "holds" if audited.passed else "**does not hold**"
    lines.append(
        f"\nAudit of the initialisation's rounds: {audited.right} of {audited.guesses} guesses about {audited.canaries:,} "
        f"canaries are right, so that epsilon is at least {audited.epsilon:.2f} at delta {audited.delta:g}; claimed is "
        f"{audited.claimed:.2f}, which {said}."
    )
    return "\n".join(lines)


def draw(users: Mapping[str, Success], path: Path) -> None:
    """What every attack finds at 1 % false positives, with intervals. Needs matplotlib (extra ``plot``)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 0.6 + 0.5 * len(users)), layout="constrained")
    axes = figure.subplots()
    for place, (_, one) in enumerate(users.items()):
        axes.plot(one.tpr_ci95, (place, place), color="0.5", linewidth=2)
        axes.plot(one.tpr, place, "o", color="#2e8659")
    axes.axvline(0.01, color="0.2", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(users)), list(users))
    axes.set_xlabel("share of members found\nat 1 % false positives (dotted: guessing)")
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.privacy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run of agents.train_private")
    parser.add_argument("--write", type=Path, help="page with this table's markers to write it into as well")
    parser.add_argument("--references", type=int, default=4, help="reference trainings (default: 4)")
    parser.add_argument("--shadows", type=int, default=64, help="shadow adapters per user (default: 64)")
    parser.add_argument("--users", type=int, default=60, help="whose adapters are attacked (default: 60)")
    add_num_threads(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Attack, print, write."""
    args = parse(arguments)
    torch.set_num_threads(args.num_threads)
    show_log()
    try:
        if args.references < 1 or args.shadows < 4 or args.users < 1:
            raise ValueError("attacks take at least 1 reference training, 4 shadow adapters and 1 user.")
        attacked = Attacked(args.run, args.references)
        audited, examples = attacked.audit(), attacked.example_attack(args.users, args.shadows)
        users, policies = attacked.user_attacks(), attacked.policy_attacks() if attacked.taught_by_train_users else {}
        text = table(users, policies, examples, args.shadows, args.references, audited)
        print(text)
        facts: dict[str, Any] = {"examples": asdict(examples), "audit": asdict(audited)}
        for what, found in (("users", users), ("policy", policies)):
            facts[what] = {name: asdict(one) for name, one in found.items()}
        write_atomically(args.run / "attacks.json", json.dumps(facts, indent=1).encode())
        write_atomically(args.run / "attacks.md", (text + "\n").encode())
        if args.write:
            write_between_markers(args.write, text, BEGIN, END)
        drawn = {f"users, {name}": one for name, one in users.items()} | {f"policy, {n}": one for n, one in policies.items()}
        draw({**drawn, "examples, in adapters": examples}, args.run / "attacks.png")
    except (ValueError, ImportError, OSError, ArtefactError, BudgetError) as error:
        sys.exit(f"error: {error}")
    print(f"Drawn: {args.run / 'attacks.png'}")


if __name__ == "__main__":
    main()

"""What unlearning leaves behind: ``python -m eval.unlearning --out runs/unlearning --write docs/privacy.md``.

A meta-initialisation is overfitted to a few simulated users, so that the attack on who took part bites. Some of them leave:
by a patch (:mod:`meta.unlearning`), and by learning anew without them, which forgets for certain, from a random start or from
what val users teach. Beside these stands what val users alone teach, beforehand, from which the first patch begins too.
Measured are the accuracy of those who stay (on validation examples) and of new people, with everything on, whether the attack
still finds those who left, and the seconds.

Settings of the patch were chosen on a seed that is not measured here. Seeds are kept in ``--out``: what was measured is not
measured again.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from agents.bootstrap import paired_difference
from backbones.artefacts import ArtefactError, cache_key, write_atomically
from eval.attacks import Success, Values, rmia, success
from eval.headline import text_of
from eval.membership import log_likelihoods
from eval.pages import write_between_markers
from meta.arguments import add_num_threads, show_log
from meta.inner import MetaInit, adapted_accuracy
from meta.learned import public_start
from meta.prepare import folder_of, prepared
from meta.trainer import MetaConfig, MetaTrainer
from meta.unlearning import Unlearning, unlearned
from users.batch import Part, Prepared

BEGIN, END = "<!-- unlearning -->", "<!-- end of unlearning -->"
PATCHES = {
    "patched": Unlearning(),
    "patched, from a random start": Unlearning(public_steps=0, fresh=0.6, rate=5e-2),
    "patched, sparse": Unlearning(share=0.5, density=0.5, fresh=0.0, rate=5e-2),
}
BEFORE, ANEW, PUBLIC, BOTH = "nobody left", "learned anew", "public users alone", "learned anew, from public users"
WAYS = (BEFORE, ANEW, BOTH, PUBLIC, *PATCHES)
FIRST_SEED = 300
"""Seeds below were used in choosing settings."""


@dataclass(frozen=True)
class Design:
    """What is the same for all seeds.

    Attributes:
        users: that the start is overfitted to; leave: how many of them leave at once; groups: that leave, each on its own.
        others, judged, new: further people: who are asked about, by whom the attack judges, whose accuracy is measured.
        references: trainings on as many further people, for the attack.
        placement, rank: of the adapters.
        learn: the start.
        more: further arguments of population and backbone.
    """

    users: int = 100
    leave: int = 20
    groups: int = 4
    others: int = 1000
    judged: int = 300
    new: int = 240
    references: int = 4
    placement: str = "side"
    rank: int = 16
    learn: MetaConfig = field(default_factory=lambda: MetaConfig(steps=1200, users=20))
    more: dict[str, Any] = field(default_factory=dict)


class World:
    """One seed's people, and the start that is overfitted to the first of them."""

    def __init__(self, design: Design, seed: int) -> None:
        self.design, self.seed = design, seed
        self.others = range(design.users, design.users + design.others)
        self.judged = range(self.others.stop, self.others.stop + design.judged)
        apart = self.judged.stop
        more = {**design.more, "train_users": apart + design.references * design.users, "test_users": design.new}
        where = "digits", "resnet-small"
        self.data: Prepared = prepared(*where, design.placement, design.rank, seed, folder_of(*where), more)
        chunks = [range(apart + i * design.users, apart + (i + 1) * design.users) for i in range(design.references)]
        self.references = [self.learned(chunk, 1 + i) for i, chunk in enumerate(chunks)]
        start = time.perf_counter()
        self.public = self.taught_by_val_users()
        self.public_seconds = time.perf_counter() - start
        self.judged_by, self.others_by = (self.by_references(some) for some in (self.judged, self.others))

    def parts(self, users: Sequence[int], split: str = "train", role: str = "query") -> tuple[Part, Part]:
        """Support examples of some users, and theirs in another role."""
        places = torch.tensor([*users])
        return Part(self.data, split, "support", places), Part(self.data, split, role, places)

    def learned(self, users: Sequence[int], number: int = 0, start: MetaInit | None = None) -> MetaInit:
        """A start overfitted to some train users."""
        config = replace(self.design.learn, seed=self.seed * 1000 + number)
        return MetaTrainer(self.data.pathways, *self.parts(users), config, start=start).run()

    def taught_by_val_users(self) -> MetaInit:
        """Where patches begin; made here, so that it can be timed."""
        learn, steps = replace(self.design.learn, seed=self.seed * 1000), PATCHES["patched"].public_steps
        with TemporaryDirectory() as folder:
            return public_start(self.data, learn, steps, Path(folder))

    def patched(self, init: MetaInit, stay: Sequence[int], how: Unlearning) -> MetaInit:
        """The start without those who do not stay, by a patch."""
        patch, towards = replace(how, seed=self.seed), self.public.weights if how.public_steps else None
        return unlearned(self.data.pathways, init, *self.parts(stay), self.design.learn, patch, towards).added_to(init)

    def start(self, way: str, knowing: MetaInit, stay: Sequence[int]) -> MetaInit:
        """The start that there is for those who stay, of one that knows everybody."""
        if way in PATCHES:
            return self.patched(knowing, stay, PATCHES[way])
        if way in (ANEW, BOTH):
            return self.learned(stay, start=self.public if way == BOTH else None)
        return {BEFORE: knowing, PUBLIC: self.public}[way]

    def under(self, init: MetaInit, users: Sequence[int]) -> Values:
        """Log likelihoods of train users, ``[U]``."""
        return log_likelihoods(self.data.pathways, init, *self.parts(users))

    def by_references(self, users: Sequence[int]) -> Values:
        """Log likelihoods of train users under those starts that have seen none of them, ``[R, U]``."""
        return np.stack([self.under(each, users) for each in self.references])

    def scores(self, init: MetaInit, leave: Sequence[int]) -> tuple[list[float], list[float]]:
        """Of those who leave and of others, by the attack: higher where somebody seems to have taken part."""
        judged = self.under(init, self.judged)
        asked = ((leave, self.by_references(leave)), (self.others, self.others_by))
        left, others = (rmia(self.under(init, users), known, judged, self.judged_by).tolist() for users, known in asked)
        return left, others

    def accuracy(self, init: MetaInit, users: Sequence[int], split: str = "train") -> list[float]:
        """Of each user, everything on; of train users on validation examples: the start has learned their query ones."""
        support, query = self.parts(users, split, "validation" if split == "train" else "query")
        on = torch.ones(len(support), self.data.pathways.num_pathways, dtype=torch.bool)
        return adapted_accuracy(self.data.pathways, init, support, query, on).tolist()


def one_seed(design: Design, seed: int) -> dict[str, Any]:
    """Per way of leaving: scores, accuracies and seconds of every group."""
    world, everybody = World(design, seed), range(design.users)
    found: dict[str, Any] = {way: [] for way in WAYS}
    knowing = world.learned(everybody)
    for group in tqdm(range(design.groups), desc="groups that leave", unit="group"):
        leave = range(group * design.leave, (group + 1) * design.leave)
        stay = [user for user in everybody if user not in leave]
        for way in WAYS:
            start = time.perf_counter()
            init = world.start(way, knowing, stay)
            seconds = world.public_seconds if way == PUBLIC else time.perf_counter() - start
            left, others = world.scores(init, leave)
            asked = {"left": left, "others": others, "seconds": seconds}
            stayed = np.full(design.users, np.nan)
            stayed[stay] = world.accuracy(init, stay)
            of = {"stay": stayed.tolist(), "new": world.accuracy(init, range(design.new), "test")}
            found[way].append({**asked, **of})
    return found


def seeds(design: Design, count: int, folder: Path) -> list[dict[str, Any]]:
    """A result per seed, read from ``folder`` or made and kept there."""
    found = []
    for seed in tqdm(range(FIRST_SEED, FIRST_SEED + count), desc="seeds", unit="seed"):
        patches = {name: asdict(how) for name, how in PATCHES.items()}
        path = folder / f"{cache_key(seed=seed, patches=patches, **asdict(design))}.json"
        if not path.exists():
            write_atomically(path, json.dumps({"seed": seed, **one_seed(design, seed)}).encode())
        found.append(json.loads(path.read_text()))
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Means over seeds and groups; accuracies against learning anew with 95 % paired intervals."""
    lines = ["| start | accuracy of those who stay | to learning anew | of new people | to learning anew | attack: AUC |"]
    lines[0] += " found at 1 % false positives | seconds (of learning anew) |"
    lines.append("| " + " | ".join(["---"] * 8) + " |")
    for way in WAYS:
        cells = [way]
        for who in ("stay", "new"):
            cells.append(f"{np.mean([users.mean() for users in _by_user(found, way, who)]):.3f}")
            difference = paired_difference(_by_user(found, way, who), _by_user(found, ANEW, who))
            cells.append("" if way == ANEW else text_of(difference))
        attack = attacked(found, way)
        cells.append(f"{attack.auc:.3f} [{attack.auc_ci95[0]:.3f}, {attack.auc_ci95[1]:.3f}]")
        cells.append(f"{attack.tpr:.3f} [{attack.tpr_ci95[0]:.3f}, {attack.tpr_ci95[1]:.3f}]")
        cells.append("" if way == BEFORE else _time(found, way))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def attacked(found: list[dict[str, Any]], way: str) -> Success:
    """Of all who left, each under the start that they left."""
    return success(np.array(_flat(found, way, "left")), np.array(_flat(found, way, "others")))


def _time(found: list[dict[str, Any]], way: str) -> str:
    mine, anew = (np.mean([one["seconds"] for each in found for one in each[name]]) for name in (way, ANEW))
    return f"{mine:.1f}" + (f" ({mine / anew:.2f})" if way in PATCHES else "")


def _flat(found: list[dict[str, Any]], way: str, who: str) -> list[float]:
    return [value for each in found for one in each[way] for value in one[who]]


def _by_user(found: list[dict[str, Any]], way: str, who: str) -> list[Values]:
    """Per seed each user's mean over the groups, those apart in which they left: so nobody counts twice."""
    rows = [np.array([one[who] for one in each[way]]) for each in found]
    return [np.nanmean(some[:, ~np.isnan(some).all(0)], 0) for some in rows]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.unlearning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--out", type=Path, required=True, help="where results are kept")
    parser.add_argument("--write", type=Path, help="page with this table's markers to write it into")
    add_num_threads(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    args = parse(arguments)
    torch.set_num_threads(args.num_threads)
    show_log()
    try:
        if args.seeds < 1:
            raise ValueError("give at least one seed.")
        text = table(seeds(Design(), args.seeds, args.out))
        print(text)
        if args.write:
            write_between_markers(args.write, text, BEGIN, END)
    except (ValueError, OSError, FloatingPointError, ArtefactError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

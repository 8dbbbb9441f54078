"""Whether a way of personalising holds where a user asks for something new: ``python -m eval.unlike results/unipen``.

Every test user's query examples are ranked by their likeness to the support: the mean cosine between the frozen model's readout
features, train users' mean taken away. Accuracy is given on the likest half and on the least like half. A personal model may
gain on the one what it loses on the other; ``feddpa`` was made against that.

The folder is one of ``eval.run``: its methods are fitted as there (what was kept is found again; if it comes out otherwise,
that is an error) and predict once more.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from agents.bootstrap import mean_interval, units
from backbones.artefacts import ArtefactError, write_atomically
from envs.scenario import forget_scenarios
from eval.headline import text_of
from eval.methods import split_names
from eval.methods.feddpa import Likeness
from eval.methods.readout import Scale, train_readouts
from eval.pages import write_between_markers
from eval.plan import BASE, Job, Place, Plan
from eval.replay import plan_of
from eval.results import rows_of
from eval.rows import Measuring, draws, single_thread
from eval.run_facts import ResultsError
from meta.arguments import add_data_root, show_log, use_data_root

METHODS = "joint,all_on,feddpa,ppo"
HALVES = ("likest half", "least like half")
Halves = dict[str, NDArray[np.float64]]
"""By user, accuracy on the two halves, ``[2]``."""
MadeOf = dict[tuple[str, str], str]
"""By place and method, a hash of what rows were made with."""


def halves(likeness: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of a user's likest and least like query examples, given how like the support they are ``[N]``."""
    order = likeness.argsort(descending=True, stable=True)
    return order[: len(order) // 2], order[(len(order) + 1) // 2 :]


def likeness_of(measuring: Measuring) -> torch.Tensor:
    """Of every test user's query examples to their support, ``[U, N]``."""
    centre = Scale.of(train_readouts(measuring.world)[0]).centre
    return Likeness.of(measuring.support.batch, centre).to(measuring.query.batch.frozen.sites[-1])


def accuracies(measuring: Measuring, name: str, likeness: torch.Tensor) -> Halves:
    """A method's accuracy on the halves, averaged over its draws; users with one query example have none."""
    plan, method = measuring.plan, measuring.plan.method(name)
    fitted = measuring.fitted(name, plan.cost_weight if method.trades else None)
    shown, users, found = measuring.shown(method, None), measuring.users(method, None), {}
    for start in range(0, len(users), method.together):
        some = users[start : start + method.together]
        asked, seen = measuring.query.rows(some), shown.rows(some)
        each = [drawn.personalise(measuring.world, fitted, seen, plan.cost_weight).logits(asked) for drawn in draws(method)]
        hits = torch.stack([logits.argmax(-1) == asked.batch.labels for logits in each]).double().mean(0)
        for row, (user, count) in enumerate(zip(some, asked.counts, strict=True)):
            if count > 1:
                found[asked.ids[row]] = np.array([float(hits[row, half].mean()) for half in halves(likeness[user, :count])])
    return found


def table(plan: Plan, found: dict[str, list[Halves]], simulated: bool) -> list[str]:
    """Accuracy on both halves and the difference from ``base``, as Markdown."""
    heads = " | ".join(f"{half} | less base" for half in HALVES)
    lines = [f"| method | users | {heads} |", "| --- " * 6 + "|"]
    for name in found:
        apart = units(found[name], found[BASE], simulated)
        level = units(found[name], [{user: np.zeros(2) for user in seed} for seed in found[name]], simulated)
        cells = [f"`{name}`", str(sum(map(len, level)))]
        for half in range(2):
            gain = text_of(mean_interval([part[:, half] for part in apart])) if name != BASE else "-"
            cells += [f"{np.mean([part[:, half].mean() for part in level]):.3f}", gain]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = {name: sum(map(bool, by_seed)) for name, by_seed in found.items()}
    fewer = "".join(f" ({name}: the first {count})" for name, count in seeds.items() if count < plan.seeds)
    weight = f", cost weight {plan.cost_weight:g}" if any(plan.method(name).trades for name in found) else ""
    said = (
        f"`{plan.env}`, seeds 0 to {plan.seeds - 1}{fewer}{weight}; 95 % bootstrap intervals over users, those that both have. "
        "Likest half: of a user's query examples, those whose frozen features have the greater mean cosine to the support's."
    )
    return [*lines, "", said]


def measured(folder: Path, names: Sequence[str]) -> list[str]:
    """The table of a folder's methods.

    Raises:
        ValueError: for a method that the folder does not have, or if none of its methods can be run.
    """
    plan = plan_of(folder)
    for name in names:
        if name not in plan.methods:
            raise ValueError(f"{folder} has no {name!r}, only {', '.join(plan.methods)}; run eval.run with it first.")
    seeds: dict[str, dict[int, Halves]] = {}
    simulated, made_of = False, artefacts_of(folder, plan)
    for place in tqdm(plan.places, desc="likeness to the support", unit="place"):
        simulated = _place(plan, place, names, seeds, made_of)
    found = {name: [by_seed.get(seed, {}) for seed in range(plan.seeds)] for name, by_seed in seeds.items()}
    return table(plan, found, simulated)


def artefacts_of(folder: Path, plan: Plan) -> MadeOf:
    """What the rows of the folder's tables were made with. Raises :class:`ResultsError` if there are no such rows."""
    path = folder / "results.csv"
    found = {
        (str(Place(int(row["seed"]), int(row["fold"]) if row["fold"] else None)), row["method"]): row["artefacts"]
        for _, row in rows_of(path)
        if not row["shown"] and row["artefacts"] and row["cost_weight"] in ("", repr(plan.cost_weight))
    }
    if not found:
        raise ResultsError(f"{path} has no rows yet; python -m eval.run measures them.")
    return found


def _place(plan: Plan, place: Place, names: Sequence[str], seeds: dict[str, dict[int, Halves]], made_of: MadeOf) -> bool:
    """Add one place's users to ``seeds``; whether they are simulated. Raises ``ValueError`` if its rows are of another fit."""
    measuring = Measuring(plan, place, plan.scenario(place))
    likeness = likeness_of(measuring)
    for name in dict.fromkeys([BASE, *names]):
        if reason := plan.method(name).refuses(measuring.world):
            raise ValueError(f"{name} has no rows here: {reason}")
        artefacts = measuring.artefacts(Job(name, plan.cost_weight if plan.method(name).trades else None, None))
        if (known := made_of.get((str(place), name))) not in (None, artefacts):
            raise ValueError(
                f"the folder's rows of {name} ({place}) were made with another model or fit ({known}, now {artefacts}): make "
                "them again with eval.run."
            )
        seeds.setdefault(name, {}).setdefault(place.seed, {}).update(accuracies(measuring, name, likeness))
    forget_scenarios()
    return measuring.scenario.simulated


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.unlike", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="results folder of python -m eval.run")
    parser.add_argument("--methods", default=METHODS, help="of the folder's, joined by commas (default: %(default)s)")
    add_data_root(parser)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="page to write the table into, between its markers")
    parser.add_argument("--section", metavar="NAME", help="which: <!-- unlike NAME: begin --> and <!-- unlike NAME: end -->")
    args = parser.parse_args(arguments)
    if (args.write is None) != (args.section is None):
        parser.error("--write and --section go together: the page, and which of its sections.")
    single_thread()
    show_log()
    use_data_root(args)
    try:
        lines = measured(args.folder, split_names(args.methods))
        write_atomically(args.folder / "unlike.md", ("\n".join(lines) + "\n").encode())
        if args.write:
            begin, end = (f"<!-- unlike {args.section}: {side} -->" for side in ("begin", "end"))
            write_between_markers(args.write, "\n".join(lines), begin, end)
    except (ValueError, ImportError, OSError, FloatingPointError, ArtefactError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""Two results folders, paired: ``python -m eval.compare A/ B/``.

For every method, cost weight and number of examples shown that both have: B less A over the users, seeds and folds that both
have, with 95 % bootstrap intervals; verdicts corrected for all comparisons of a column (:mod:`eval.statistics`).
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agents.bootstrap import mean_interval
from eval.panel import Panel, Rows
from eval.report.tables import Line, Table, code, figure_text
from eval.results import NONE, Results, ResultsError, read_results
from eval.statistics import Comparison, Difference, corrected, sign_flip

MEASURES = ("accuracy", "log_likelihood", "reward")
MANY = 8
"""So many names are listed, of more their number."""
Who = tuple[int, int, str]
"""Seed, fold, user."""
What = tuple[str, float | None, int]
"""Method, cost weight, number of examples shown."""


@dataclass(frozen=True)
class Pairs:
    """Rows of both folders, by what they are of: ``[N]`` each, of the same users in the same order.

    Attributes:
        panel: of the first folder. first: its rows. second: positions in the other's columns.
    """

    panel: Panel
    first: dict[What, Rows]
    second: dict[What, list[int]]


def positions(results: Results) -> dict[What, dict[Who, int]]:
    """Where the rows stand that did not fail."""
    found: dict[What, dict[Who, int]] = {}
    for at in np.flatnonzero(results.ok).tolist():
        weight = results["cost_weight"][at]
        what = (results["method"][at], None if np.isnan(weight) else float(weight), int(results["shown"][at]))
        who = (int(results["seed"][at]), int(results["fold"][at]), results["user"][at])
        found.setdefault(what, {})[who] = at
    return found


def check_same_people(first: Results, second: Results) -> None:
    """Raise :class:`ResultsError` unless both folders are about the same people, as far as can be seen."""
    for name in ("population", "classes", "simulated", "folds"):
        one, other = getattr(first.run, name), getattr(second.run, name)
        if one != other:
            raise ResultsError(
                f"{first.folder} and {second.folder} are of different populations and cannot be paired: {name} {one!r} and "
                f"{other!r}. Compare runs on the same users."
            )
    known = {
        (seed, user): group for seed, user, group in zip(first["seed"].tolist(), first["user"], first["group"], strict=True)
    }
    for seed, user, group in zip(second["seed"].tolist(), second["user"], second["group"], strict=True):
        if known.get((seed, user), group) != group:
            raise ResultsError(
                f"{first.folder} and {second.folder} are of different users under the same names and cannot be paired: user "
                f"{user} of seed {seed} is in group {known[seed, user]!r} and in {group!r}."
            )


def paired(first: Results, second: Results) -> Pairs:
    """Rows that both folders have. Raises :class:`ResultsError` if there are none."""
    other, pairs = positions(second), Pairs(Panel(first), {}, {})
    for what, mine in positions(first).items():
        theirs = other.get(what, {})
        partner = {at: theirs[who] for who, at in mine.items() if who in theirs}
        rows = pairs.panel.rows(*what)
        kept = np.isin(rows.at, list(partner))
        if kept.any():
            pairs.first[what] = Rows(rows.at[kept], rows.who[kept])
            pairs.second[what] = [partner[at] for at in rows.at[kept].tolist()]
    if not pairs.first:
        raise ResultsError(
            f"{first.folder} and {second.folder} have no row in common: no user was measured by the same method in the same "
            "seed and fold, at the same cost weight. Run both with the same seeds and methods."
        )
    return pairs


def alike_in_cost(first: Results, second: Results) -> bool:
    """Whether costs are of the same kind in both folders, as far as they say."""
    return len({run.counts for run in (first.run, second.run)} - {None}) < 2


def differences(first: Results, second: Results, pairs: Pairs, measure: str) -> dict[What, Comparison]:
    """``second - first`` in a measure; rewards are left out where the folders' cost weights differ, or what costs count."""
    family: dict[What, Difference | None] = {}
    for what, rows in pairs.first.items():
        if measure == "reward" and not alike_in_cost(first, second):
            continue
        if measure == "reward" and what[1] is None and first.run.cost_weight != second.run.cost_weight:
            continue
        each = pairs.panel.units(rows, second[measure][pairs.second[what]] - first[measure][rows.at])
        family[what] = Difference(mean_interval(each), sign_flip(each), *pairs.panel.counts(rows))
    return corrected(family)


def table(first: Results, second: Results, pairs: Pairs) -> Table:
    """A line per method, cost weight and number of examples shown."""
    found = {measure: differences(first, second, pairs, measure) for measure in MEASURES}
    heads = ["method", "cost weight", "examples", "users", "seeds", *MEASURES, "cost"]
    lines = []
    for what in sorted(pairs.first, key=lambda what: (what[2] != NONE, list(first.run.methods).index(what[0]), what[1] or 0)):
        method, weight, shown = what
        one = found["accuracy"][what]
        row = [method, figure_text(weight, "g"), "all" if shown == NONE else str(shown), str(one.users), str(one.seeds)]
        row += [_said(found[measure].get(what)) for measure in MEASURES]
        costs = second["cost"][pairs.second[what]] - first["cost"][pairs.first[what].at]
        cost = np.mean([part.mean() for part in pairs.panel.units(pairs.first[what], costs)])
        lines.append(Line([*row, f"{cost:+.3f}" if alike_in_cost(first, second) else "-"]))
    note = (
        f"{second.folder} less {first.folder}, paired over the users, seeds and folds that both have; 95 % bootstrap "
        "intervals; verdicts corrected for all comparisons of a column (Holm)."
        + f" Costs count {first.run.counts} in one and {second.run.counts} in the other: they and rewards are not compared."
        * (not alike_in_cost(first, second))
    )
    return Table("Two results folders", heads, lines, note)


def _said(found: Comparison | None) -> str:
    return "-" if found is None else f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}] {found.verdict}"


def only_in_one(first: Results, second: Results) -> list[str]:
    """Sentences on what one folder has and the other has not."""
    out = []
    for here, there in ((first, second), (second, first)):
        mine, others = positions(here), positions(there)
        lacking = {
            "methods": {what[0] for what in mine} - {what[0] for what in others},
            "seeds": set(here["seed"].tolist()) - set(there["seed"].tolist()),
            "cost weights": {what[1] for what in mine if what[1] is not None} - {what[1] for what in others},
            "numbers of examples": {what[2] for what in mine} - {what[2] for what in others},
            "users": set(here["user"]) - set(there["user"]),
        }
        said = [f"{name}: {_listed(values)}" for name, values in lacking.items() if values]
        rows = sum(len(set(found) - set(others.get(what, {}))) for what, found in mine.items())
        if rows:
            out.append(f"Only in {code(str(here.folder))}: {rows} rows" + (f" ({'; '.join(said)})." if said else "."))
    return out


def _listed(values: Iterable[object]) -> str:
    names = ["all" if value == NONE else str(value) for value in sorted(values, key=lambda value: (str(type(value)), value))]  # type: ignore[type-var]
    return ", ".join(names) if len(names) <= MANY else f"{len(names)} of them"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", type=Path, metavar="A", help="results folder of python -m eval.run")
    parser.add_argument("second", type=Path, metavar="B", help="another one of the same population")
    args = parser.parse_args(arguments)
    try:
        first, second = read_results(args.first), read_results(args.second)
        check_same_people(first, second)
        said = [table(first, second, paired(first, second)).to_markdown(), *only_in_one(first, second)]
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print("\n\n".join(said))


if __name__ == "__main__":
    main()

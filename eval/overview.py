"""The README's tables of populations: ``python -m eval.overview results/unipen results/jester --write README.md``.

A line per folder of ``python -m eval.run``, named after the folder: what the methods that matter most reach on query examples
of test users, and what the policy's lead over them is. All figures are those of the folders' own reports. Populations that a
page shows and no folder is given of stay as they are; to leave one out, empty what stands between the markers.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.pages import page_with_markers, write_between_markers
from eval.report.contents import Summary, flipped, interval_text, measured
from eval.report.tables import NONE, Line, Table, figure_text, read_markdown
from eval.run_facts import FORMAT, ResultsError, read_json

BEGIN, END = "<!-- overview: begin -->", "<!-- overview: end -->"
SUBJECT = "ppo"
REACHED = ("base", "intercept", "item_covariance", "head", "best_static", "all_on", SUBJECT)
"""Methods whose accuracy is shown: those that every test user is measured with."""
DENSE = ("intercept", "item_covariance", "all_on", "lora", "full_finetune")
"""Methods that the policy's accuracy is compared with."""
CHOOSING = ("best_static", "shuffled", "gradient_norm")
"""Methods that the policy's reward is compared with, at the main cost weight."""
ROW = ["users", "seeds", *REACHED]
COLUMN = ["cost weight", "cost", "masks", *(f"accuracy, less {name}" for name in DENSE)]
COLUMN += [f"reward, less {name}" for name in CHOOSING]


def read_summary(folder: Path) -> Summary:
    """What ``eval.run`` or ``eval.report`` wrote.

    Raises:
        ResultsError: if it is not there, spoiled, of another version, or without the policy.
    """
    path = folder / "summary.json"
    if not path.is_file():
        raise ResultsError(f"{folder} has no summary.json: make it with python -m eval.run --out {folder}.")
    summary: Summary = read_json(path, f"python -m eval.report {folder} makes it again.")
    if summary.get("format") != FORMAT:
        raise ResultsError(
            f"{path} is of format {summary.get('format')}, this version reads {FORMAT}: python -m eval.report {folder}."
        )
    if SUBJECT not in measured(summary):
        raise ResultsError(
            f"{folder} was run without {SUBJECT}: add it with python -m eval.run --methods {SUBJECT} --out {folder}."
        )
    return summary


@dataclass(frozen=True)
class Figures:
    """One population's cells: under :data:`ROW`, and under :data:`COLUMN`."""

    row: Sequence[str]
    column: Sequence[str]


def figures_of(summary: Summary) -> Figures:
    """Accuracy per method; what the policy switches on, and how far it is ahead of others."""
    methods, weight = measured(summary), f"{summary['cost_weight']:g}"
    mine = methods[SUBJECT]
    reached = [figure_text(methods[name]["means"]["accuracy"]) if name in methods else NONE for name in REACHED]
    against = [methods[name]["against"].get(SUBJECT, {}).get("accuracy") if name in methods else None for name in DENSE]
    less = [methods[name]["subject_less"].get(weight) if name in methods else None for name in CHOOSING]
    facts = [weight, figure_text(mine["means"]["cost"], ".2f"), figure_text(mine["distinct_masks"], ".3g")]
    return Figures(
        [str(mine["users"]), str(mine["seeds"]), *reached],
        [*facts, *(interval_text(flipped(one)) for one in against), *map(interval_text, less)],
    )


def figures_on(page: Path) -> dict[str, Figures]:
    """By population, what the tables of a page say.

    Raises:
        ValueError: for a page without markers, or with tables that are not those of :func:`overview`.
        OSError: if there is none.
    """
    text = page_with_markers(page, BEGIN, END).split(BEGIN)[1].split(END)[0]
    if "|" not in text:  # there are none yet
        return {}
    tables = read_markdown(text)
    if len(tables) == 2 and len({len(line) for line in tables[0]}) == len({len(line) for line in tables[1]}) == 1:
        (_, *heads), *rows = tables[0]
        (_, *marks), *columns = zip(*tables[1], strict=True)
        names = [row[0] for row in rows]
        if heads == ROW and marks == COLUMN and names == [column[0] for column in columns] and len({*names}) == len(names):
            return {row[0]: Figures(row[1:], column[1:]) for row, column in zip(rows, columns, strict=True)}
    raise ValueError(
        f"the tables of {page} were edited, or are of another version: empty what stands between {BEGIN} and {END}, and "
        "give the folders of all populations."
    )


def overview(found: Mapping[str, Figures], command: str) -> str:
    """The text between the markers."""
    lead = (
        "Accuracy on query examples of test users. Differences are paired over the users whom both methods have (methods that "
        "train through a text encoder have fewer), with 95 % bootstrap intervals and the verdicts of the "
        f"[results](docs/results.md), which are corrected for the number of comparisons. Written by `{command}`."
    )
    accuracies = Table("Accuracy", ["population", *ROW], [Line([name, *each.row]) for name, each in found.items()])
    columns = zip(COLUMN, *(each.column for each in found.values()), strict=True)
    leads = Table(f"What {SUBJECT} takes and gains", [SUBJECT, *found], [Line(cells) for cells in columns])
    return "\n\n".join([lead, accuracies.to_markdown(), leads.to_markdown()])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.overview", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="results folders of python -m eval.run")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="page with markers to write the tables into")
    args = parser.parse_args(arguments)
    try:
        given = {folder.resolve().name: figures_of(read_summary(folder)) for folder in args.folders}
        if len(given) < len(args.folders):
            raise ResultsError("two folders have the same name, by which the tables call them: rename one.")
        if spaced := [name for name in given if name != " ".join(name.split())]:
            raise ResultsError(f"the tables call populations by their folders, and cannot write {spaced[0]!r}: rename it.")
        found = (figures_on(args.write) if args.write else {}) | given
        command = ["python", "-m", "eval.overview", *(f"results/{name}" for name in found)]
        text = overview(found, shlex.join([*command, *(["--write", args.write.name] if args.write else [])]))
        print(text)
        if args.write:
            write_between_markers(args.write, text, BEGIN, END)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

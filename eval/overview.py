"""The README's tables of populations: ``python -m eval.overview results/unipen results/jester --write README.md``.

A line per folder of ``python -m eval.run``, named after the folder: what the methods that matter most reach on query examples
of test users, and what the policy's lead over them is. All figures are those of the folders' own reports.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.headline import write_between_markers
from eval.report.contents import Summary, flipped, interval_text, measured
from eval.report.tables import NONE, Line, Table, figure_text
from eval.run_facts import FORMAT, ResultsError, read_json

BEGIN, END = "<!-- overview: begin -->", "<!-- overview: end -->"
SUBJECT = "ppo"
REACHED = ("base", "intercept", "item_covariance", "head", "best_static", "all_on", SUBJECT)
"""Methods whose accuracy is shown: those that every test user is measured with."""
DENSE = ("intercept", "item_covariance", "all_on", "lora", "full_finetune")
"""Methods that the policy's accuracy is compared with."""
CHOOSING = ("best_static", "shuffled", "gradient_norm")
"""Methods that the policy's reward is compared with, at the main cost weight."""


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


def accuracies(summaries: dict[str, Summary]) -> Table:
    """Accuracy per population and method."""
    lines = []
    for title, summary in summaries.items():
        methods = measured(summary)
        mine = methods[SUBJECT]
        cells = [figure_text(methods[name]["means"]["accuracy"]) if name in methods else NONE for name in REACHED]
        lines.append(Line([title, str(mine["users"]), str(mine["seeds"]), *cells]))
    return Table("Accuracy", ["population", "users", "seeds", *REACHED], lines)


def leads(summaries: dict[str, Summary]) -> Table:
    """What the policy switches on, and how far it is ahead of others, a column per population."""
    columns = []
    for summary in summaries.values():
        methods, weight = measured(summary), f"{summary['cost_weight']:g}"
        mine = methods[SUBJECT]
        against = [methods[name]["against"].get(SUBJECT, {}).get("accuracy") if name in methods else None for name in DENSE]
        less = [methods[name]["subject_less"].get(weight) if name in methods else None for name in CHOOSING]
        facts = [weight, figure_text(mine["means"]["cost"], ".2f"), figure_text(mine["distinct_masks"], ".0f")]
        columns.append([*facts, *(interval_text(flipped(one)) for one in against), *map(interval_text, less)])
    heads = ["cost weight", "cost", "masks", *(f"accuracy, less {name}" for name in DENSE)]
    heads += [f"reward, less {name}" for name in CHOOSING]
    lines = [Line([head, *cells]) for head, *cells in zip(heads, *columns, strict=True)]
    return Table(f"What {SUBJECT} takes and gains", [SUBJECT, *summaries], lines)


def overview(summaries: dict[str, Summary], command: str) -> str:
    """The text between the markers."""
    lead = (
        "Accuracy on query examples of test users. Differences are paired over the users whom both methods have (methods that "
        "train through a text encoder have fewer), with 95 % bootstrap intervals and the verdicts of the "
        f"[results](docs/results.md), which are corrected for the number of comparisons. Written by `{command}`."
    )
    return "\n\n".join([lead, *(table.to_markdown() for table in (accuracies(summaries), leads(summaries)))])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.overview", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="results folders of python -m eval.run")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="page with markers to write the tables into")
    args = parser.parse_args(arguments)
    command = ["python", "-m", "eval.overview", *(f"results/{folder.resolve().name}" for folder in args.folders)]
    command += ["--write", args.write.name] if args.write else []
    try:
        summaries = {folder.resolve().name: read_summary(folder) for folder in args.folders}
        if len(summaries) < len(args.folders):
            raise ResultsError("two folders have the same name, by which the tables call them: rename one.")
        text = overview(summaries, shlex.join(command))
        print(text)
        if args.write:
            write_between_markers(args.write, text, BEGIN, END)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

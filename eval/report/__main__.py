"""The report of a results folder again, from its rows: ``python -m eval.report DIR``."""

import argparse
import sys
from pathlib import Path

from backbones.artefacts import ArtefactError
from eval.pages import write_between_markers
from eval.report.sentences import markdown
from eval.report.write import write_report
from eval.results import read_results


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.report",
        description="Computes summary.json, report.html, results.md and tensorboard/ of a results folder from its rows.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="results folder of python -m eval.run")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="page to write the tables into, between its markers")
    parser.add_argument(
        "--section",
        metavar="NAME",
        help="which markers of the page: <!-- results NAME: begin --> and <!-- results NAME: end -->",
    )
    args = parser.parse_args(arguments)
    if (args.write is None) != (args.section is None):
        parser.error("--write and --section go together: the page, and which of its sections.")
    try:
        summary = write_report(read_results(args.folder), args.folder)
        if args.write:
            begin, end = (f"<!-- results {args.section}: {side} -->" for side in ("begin", "end"))
            write_between_markers(args.write, markdown(summary), begin, end)
    except (ValueError, OSError, ArtefactError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {args.folder / 'report.html'}, with summary.json, results.md and tensorboard/ beside it")


if __name__ == "__main__":
    main()

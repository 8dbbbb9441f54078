"""Everything that is made from a results folder's rows, put beside them: summary, page, Markdown, TensorBoard."""

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from backbones.artefacts import room_for, write_atomically
from eval.report.contents import Summary, measured, tables
from eval.report.page import page, pictures
from eval.report.raster import to_pixels
from eval.report.sentences import markdown
from eval.results import Results
from eval.summary import summarise

SHOWN = ("accuracy", "log_likelihood", "ece", "reward", "cost", "active_fraction", "labels", "stored")
"""Means that TensorBoard gets, beside gains."""


def write_report(results: Results, folder: Path) -> dict[str, Any]:
    """Write ``summary.json``, ``report.html``, ``results.md`` and ``tensorboard/`` into a folder; the summary.

    Raises:
        ResultsError: if no row could be used. backbones.artefacts.DiskFullError: without room.
    """
    summary = summarise(results)
    write_atomically(folder / "summary.json", (json.dumps(summary, indent=1, allow_nan=False) + "\n").encode())
    write_atomically(folder / "report.html", page(summary).encode())
    write_atomically(folder / "results.md", (markdown(summary) + "\n").encode())
    to_tensorboard(summary, folder / "tensorboard")
    return summary


def to_tensorboard(summary: Summary, folder: Path) -> None:
    """Scalars ``test/<measure>/<method>``, the tables as text and the figures, in place of what this wrote there before."""
    with room_for(folder):
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        with SummaryWriter(str(folder)) as writer:
            for name, method in measured(summary).items():
                for measure, value in _scalars(method).items():
                    writer.add_scalar(f"test/{measure}/{name}", value, 0)
            for table in tables(summary):
                writer.add_text(table.title, table.to_markdown(), 0)
            for name, picture in pictures(summary).items():
                writer.add_image(f"figures/{name}", to_pixels(picture), 0, dataformats="HWC")


def _scalars(method: dict[str, Any]) -> dict[str, float]:
    found = {measure: method["means"][measure] for measure in SHOWN}
    found["gain"] = method["against"].get("base", {}).get("accuracy", {}).get("mean")
    found |= {f"gain_{key}": value for key, value in (method["gain"] or {}).items()}
    return {measure: value for measure, value in found.items() if value is not None}

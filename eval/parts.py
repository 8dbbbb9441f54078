"""The rows of a run as they come: one file per place, appended to, so that a run which was stopped goes on where it was."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from backbones.artefacts import room_for, write_atomically
from eval.plan import Place
from eval.results import COLUMNS, format_row
from eval.rows import Key

FOLDER = "parts"


class Part:
    """The rows of one place.

    Args:
        folder: of the results.
        place: whose.

    A last line that a kill left half written is dropped when the file is opened.
    """

    def __init__(self, folder: Path, place: Place) -> None:
        self.path = folder / FOLDER / f"{place}.csv"
        if not self.path.exists():
            write_atomically(self.path, (",".join(COLUMNS) + "\n").encode())
        self._drop_torn_line()
        self.known = {self._key(row) for row in self.rows()}

    def _drop_torn_line(self) -> None:
        data = self.path.read_bytes()
        if not data.endswith(b"\n"):
            write_atomically(self.path, data[: data.rfind(b"\n") + 1])

    def rows(self) -> Iterator[dict[str, str]]:
        """What is there."""
        with self.path.open(newline="") as file:
            yield from csv.DictReader(file)

    def add(self, values: Mapping[str, Any]) -> None:
        """Append one row. Raises :class:`backbones.artefacts.DiskFullError` without room."""
        row = format_row({**dict.fromkeys(COLUMNS[:-1]), **values})
        with room_for(self.path), self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
        self.known.add(self._key(row))

    def done(self, key: Key) -> bool:
        """Whether a row is there, be it a failure."""
        return key in self.known

    @staticmethod
    def _key(row: Mapping[str, str]) -> Key:
        return row["method"], row["cost_weight"], row["shown"], row["user"]


def count_rows(folder: Path) -> int:
    """Rows in all parts so far."""
    return sum(max(0, path.read_bytes().count(b"\n") - 1) for path in (folder / FOLDER).glob("*.csv"))


def put_together(folder: Path) -> int:
    """Write ``results.csv``, all parts in order; how many rows failed."""
    lines, failed = [",".join(COLUMNS)], 0
    for path in sorted((folder / FOLDER).glob("*.csv"), key=lambda path: (len(path.name), path.name)):
        text = path.read_text().splitlines()[1:]
        lines += text
        with path.open(newline="") as file:
            failed += sum(row["status"].startswith("failed") for row in csv.DictReader(file))
    write_atomically(folder / "results.csv", ("\n".join(lines) + "\n").encode())
    return failed

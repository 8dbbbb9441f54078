"""The rows of a run as they come: one file per place, appended to, so that a run which was stopped goes on where it was."""

import csv
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from backbones.artefacts import room_for, write_atomically
from eval.plan import Place
from eval.results import COLUMNS, format_row, row_check
from eval.rows import Key
from eval.run_facts import ResultsError

FOLDER = "parts"
METHOD = COLUMNS.index("method")
EVERY = 10.0
"""Seconds after which the time spent is written down again."""


class Part:
    """The rows of one place.

    Args:
        folder: of the results.
        place: whose.

    A last line that a kill left half written is dropped when the file is opened. Rows that failed, or were edited by hand, are
    not known: they are measured again, after :meth:`tidy`.
    """

    def __init__(self, folder: Path, place: Place) -> None:
        self.path = folder / FOLDER / f"{place}.csv"
        if not self.path.exists():
            write_atomically(self.path, (",".join(COLUMNS) + "\n").encode())
        self._drop_torn_line()
        found = [row for row in self.rows() if is_done(row)]
        self.known = {self._key(row) for row in found}
        self._artefacts = {self._key(row)[:3]: row["artefacts"] for row in found}
        self._clock = self.path.with_suffix(".seconds")
        self._earlier, self._begun = _read_seconds(self._clock), time.process_time()
        self._written = time.perf_counter()

    def _drop_torn_line(self) -> None:
        data = self.path.read_bytes()
        if not data.endswith(b"\n"):
            write_atomically(self.path, data[: data.rfind(b"\n") + 1])

    def tidy(self) -> None:
        """Make the file one of whole rows that did not fail, each once: two processes may have written at the same time."""
        found = [*self.rows()]
        whole = [*{self._key(row): row for row in found if is_done(row)}.values()]
        if len(whole) < len(found):
            _write(self.path, [COLUMNS, *([row[column] for column in COLUMNS] for row in whole)])

    def rows(self) -> Iterator[dict[str, str]]:
        """What is there."""
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != tuple(COLUMNS):
                raise ResultsError(
                    f"{self.path} does not begin with the columns {', '.join(COLUMNS)}. Restore its first line, or remove the "
                    "file: its rows are then measured again."
                )
            yield from reader

    def add(self, values: Mapping[str, Any]) -> None:
        """Append one row.

        Raises:
            ValueError: if the file has rows of the same job that were made with another model or fit.
            DiskFullError: without room.
        """
        row = format_row({**dict.fromkeys(COLUMNS[:-1]), **values})
        self.check(row["method"], row["cost_weight"], row["shown"], row["artefacts"])
        with room_for(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
        self.known.add(self._key(row))
        if row["artefacts"]:
            self._artefacts[self._key(row)[:3]] = row["artefacts"]
        if time.perf_counter() > self._written + EVERY:
            self.tell_time()

    def tell_time(self) -> None:
        """Write down how much of a core's time this place has taken, in all calls: waiting and being stopped do not count."""
        self._written = time.perf_counter()
        write_atomically(self._clock, f"{self._earlier + time.process_time() - self._begun:.1f}\n".encode())

    def check(self, method: str, cost_weight: str, shown: str, artefacts: str) -> None:
        """Raise ``ValueError`` if rows of a job are there that were made with other artefacts."""
        known = self._artefacts.get((method, cost_weight, shown))
        if known and artefacts and known != artefacts:
            raise ValueError(
                f"{self.path} has rows of {method} that were made with another model, other data, or another fit ({known}, now "
                f"{artefacts}): the environment, the data, the code that fits, or the method's "
                "file have changed since. Choose another --out."
            )

    def done(self, key: Key) -> bool:
        """Whether a row is there."""
        return key in self.known

    @staticmethod
    def _key(row: Mapping[str, str]) -> Key:
        return row["method"], row["cost_weight"], row["shown"], row["user"]


def forget(folder: Path, methods: Collection[str]) -> None:
    """Throw away the rows of some methods, at every place."""
    for path in (folder / FOLDER).glob("*.csv") if methods else ():
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            kept = [row for row in reader if not {*row[METHOD : METHOD + 1]} & {*methods}]
        _write(path, kept)


def _write(path: Path, rows: Iterable[Iterable[str]]) -> None:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomically(path, text.getvalue().encode())


def is_done(row: Mapping[str, Any]) -> bool:
    """Whether a row of a part is as it was written and did not fail; one that was cut or edited is made again."""
    whole = None not in (*row, *row.values())
    return whole and row_check(row) == row["check"] and not row["status"].startswith("failed")


def _read_seconds(path: Path) -> float:
    try:
        return float(path.read_text())
    except (FileNotFoundError, ValueError):  # a note for people, which no row depends on
        return 0.0


def seconds_spent(folder: Path) -> float:
    """Seconds of one core that all places have taken so far, what was begun and killed included."""
    return sum(map(_read_seconds, (folder / FOLDER).glob("*.seconds")))


def count_rows(folder: Path) -> int:
    """Rows in all parts so far."""
    return sum(max(0, path.read_bytes().count(b"\n") - 1) for path in (folder / FOLDER).glob("*.csv"))


def put_together(folder: Path) -> int:
    """Write ``results.csv``, all parts in order; how many rows failed."""
    whole, failed = f"{','.join(COLUMNS)}\n".encode(), 0
    for path in sorted((folder / FOLDER).glob("*.csv"), key=lambda path: (len(path.name), path.name)):
        whole += path.read_bytes().partition(b"\n")[2]  # an id may hold what splitlines() takes for the end of a line
        with path.open(newline="", encoding="utf-8") as file:
            failed += sum(row["status"].startswith("failed") for row in csv.DictReader(file))
    write_atomically(folder / "results.csv", whole)
    return failed

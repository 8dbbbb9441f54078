"""The results folder of ``python -m eval.run``: its format, reading it, and the checksum that tells rows edited by hand.

``run.json`` says what was run, ``results.csv`` has one row per seed, fold, method, cost weight, number of examples shown
and user, ``timing.json`` (if there) the seconds. Shapes: R rows, P pathways.
"""

import csv
import hashlib
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backbones.typed import fits
from eval.run_facts import FORMAT, TIMING, ResultsError, RunFacts, read_json, read_run

KEY = ("seed", "fold", "method", "cost_weight", "shown", "user")
"""What tells one row from another."""
NUMBERS = (
    *("accuracy", "log_likelihood", "examples", "reward", "cost", "active_fraction", "labels", "adaptations"),
    *("trainable", "active", "stored"),
)
"""Columns of numbers, NaN in rows that failed, and ``active_fraction`` where there is no mask."""
COLUMNS = (
    *KEY,
    *("group", "status", "mask", "accuracy", "log_likelihood", "examples", "calibration", "reward", "cost"),
    *("active_fraction", "labels", "adaptations", "trainable", "active", "stored", "artefacts", "check"),
)
HEADER = ",".join(COLUMNS)
NONE = -1
"""In the columns ``fold`` and ``shown``: an empty cell, that is, no folds, or the whole support."""
BINS = 10
"""Of confidence, equally wide."""
_BIN = r"\d+:[-+.\deE]+:\d+"
_CALIBRATION = re.compile(rf"{_BIN}(;{_BIN}){{{BINS - 1}}}")

Column = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Results:
    """A folder's contents.

    Attributes:
        folder: read from. run: what was run. timing: ``timing.json``, None where there is none.
        columns: by name ``[R]``, all of :data:`COLUMNS` but ``check``: numbers as float64 (``cost_weight`` NaN where empty),
            ``seed``, ``fold``, ``shown`` as int64 (:data:`NONE` where empty), the rest text.
        lines: ``[R]``, where each row stands in ``results.csv``.
    """

    folder: Path
    run: RunFacts
    timing: dict[str, Any] | None
    columns: Mapping[str, Column]
    lines: NDArray[np.int64]

    def __getitem__(self, column: str) -> Column:
        return self.columns[column]

    @cached_property
    def ok(self) -> NDArray[np.bool_]:
        """``[R]``, rows of methods that did not fail."""
        return self["status"] == "ok"


def row_check(cells: Mapping[str, str]) -> str:
    """8 hexadecimal digits of the SHA-256 of a row's other cells, joined by commas in the order of :data:`COLUMNS`."""
    text = ",".join(cells[name] for name in COLUMNS[:-1])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def format_row(values: Mapping[str, Any]) -> dict[str, str]:
    """A row's cells, ``check`` among them. Floats are written so that reading gives the same float; None is empty.

    Raises:
        ValueError: if a column is missing or unknown.
    """
    wrong = set(COLUMNS[:-1]).symmetric_difference(values)
    if wrong:
        raise ValueError(f"a row of results has the columns {', '.join(COLUMNS[:-1])}; missing or unknown: {sorted(wrong)}.")
    cells = {name: format_cell(values[name]) for name in COLUMNS[:-1]}
    return {**cells, "check": row_check(cells)}


def format_cell(value: Any) -> str:
    """A value as it is written, see :func:`format_row`."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Integral):
        return str(int(value))
    if isinstance(value, Real):
        return repr(float(value))
    raise TypeError(f"a cell is text, a number or None; got {type(value).__name__}.")


def rows_of(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and cells of ``results.csv``, one row at a time, unparsed.

    Raises:
        ResultsError: for a file that is missing, lacks columns, or has a row of another length.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            names = next(reader, [])
            _check_header(path, names)
            for cells in reader:
                if len(cells) != len(names):
                    problem = f"it has {len(cells)} cells instead of {len(names)}"
                    raise _malformed(path, reader.line_num, problem, dict(zip(names, cells, strict=False)))
                yield reader.line_num, dict(zip(names, cells, strict=True))
    except FileNotFoundError as error:
        raise ResultsError(f"{path} is missing; python -m eval.run writes it.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ResultsError(f"{path} is not a table of text separated by commas: {error}.") from error


def altered(rows: Iterable[tuple[int, Mapping[str, str]]]) -> list[int]:
    """Line numbers of rows (of :func:`rows_of`) that were changed after they were written: ``check`` does not fit."""
    return [line for line, cells in rows if row_check(cells) != cells["check"]]


def read_results(folder: Path) -> Results:
    """Read a results folder. Rows that failed stay in, see :attr:`Results.ok`.

    Raises:
        ResultsError: if the folder holds no results, or those of another version, or a row is malformed or there twice.
    """
    run = read_run(folder)
    path = folder / "results.csv"
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS[:-1]}
    lines: list[int] = []
    seen: dict[tuple[Any, ...], int] = {}
    for line, cells in rows_of(path):
        try:
            row = _parsed(cells, run)
        except ValueError as error:
            raise _malformed(path, line, str(error), cells) from error
        key = tuple(cells[name] for name in KEY)
        if key in seen:
            said = ", ".join(f"{name} {cell}" for name, cell in zip(KEY, key, strict=True) if cell)
            raise ResultsError(
                f"{path}, line {line}: the same row as line {seen[key]} ({said}). Remove one of them from {_part_of(cells)}; "
                "python -m eval.run puts the rows together again."
            )
        seen[key] = line
        lines.append(line)
        for name, value in row.items():
            columns[name].append(value)
    return Results(
        folder,
        run,
        _read_timing(folder / TIMING),
        {n: _column(n, v) for n, v in columns.items()},
        np.array(lines, np.int64),
    )


def _read_timing(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    cure = "Remove it: python -m eval.run --timing measures again."
    found = read_json(path, cure)
    kinds = {"methods": Mapping[str, Mapping[str, Any]], "later": list[Mapping[str, Any]]}
    if "methods" not in found or not all(fits(found.get(name, []), kind) for name, kind in kinds.items()):
        raise ResultsError(f"{path} does not hold what python -m eval.run wrote; was it edited? {cure}")
    return found


def _column(name: str, values: list[Any]) -> Column:
    if name in NUMBERS or name == "cost_weight":
        return np.array(values, np.float64)
    return np.array(values, np.int64 if name in ("seed", "fold", "shown") else object)


def _parsed(cells: Mapping[str, str], run: RunFacts) -> dict[str, Any]:
    """A row's values by column. Raises ``ValueError`` that says what is wrong."""
    ok = cells["status"] == "ok"
    if not ok and not cells["status"].startswith("failed"):
        raise ValueError(f"status is {cells['status']!r}, neither 'ok' nor 'failed: <reason>'")
    row: dict[str, Any] = {name: sys.intern(cells[name]) for name in ("method", "user", "group", "status", "mask", "artefacts")}
    row["seed"] = _number(cells, "seed", int)
    row["fold"], row["shown"] = (_number(cells, name, int) if cells[name] else NONE for name in ("fold", "shown"))
    row["cost_weight"] = _number(cells, "cost_weight", float) if cells["cost_weight"] else math.nan
    empty = {"active_fraction"} if not cells["mask"] else set()
    row |= {name: _number(cells, name, float) if ok and name not in empty else math.nan for name in NUMBERS}
    row["calibration"] = cells["calibration"]
    if ok and not _CALIBRATION.fullmatch(row["calibration"]):
        raise ValueError(
            f"calibration is {row['calibration']!r}, not {BINS} bins 'count:sum of confidences:hits' joined by ';'"
        )
    if row["mask"] and (len(row["mask"]) != len(run.pathways) or set(row["mask"]) - {"0", "1"}):
        raise ValueError(f"mask is {row['mask']!r}, not {len(run.pathways)} bits")
    if row["method"] not in run.methods:
        raise ValueError(f"run.json knows no method {row['method']!r}")
    return row


def _number(cells: Mapping[str, str], name: str, kind: Callable[[str], float]) -> float:
    try:
        value = kind(cells[name])
    except ValueError as error:
        raise ValueError(f"{name} is {cells[name]!r}, not a number") from error
    if not math.isfinite(value):
        raise ValueError(f"{name} is {cells[name]}, not a finite number")
    return value


def _check_header(path: Path, names: list[str]) -> None:
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise ResultsError(f"{path} lacks the columns {', '.join(missing)}; it was not written by this version ({FORMAT}).")


def _malformed(path: Path, line: int, problem: str, cells: Mapping[str, str]) -> ResultsError:
    return ResultsError(
        f"{path}, line {line}: {problem}. The same python -m eval.run puts the file together again; if the line is in "
        f"{_part_of(cells)} as well, remove it there first."
    )


def _part_of(cells: Mapping[str, str]) -> str:
    """The file that a row was read from before all were put together, as far as its cells tell (:mod:`eval.parts`)."""
    seed, fold = (cells.get(name, "") for name in ("seed", "fold"))
    if not re.fullmatch(r"\d+,\d*", f"{seed},{fold}"):
        return "its file in parts/ (seedN.csv, or seedN-foldK.csv)"
    return f"parts/seed{seed}-fold{fold}.csv" if fold else f"parts/seed{seed}.csv"

"""Finding and reading the data sets' files below a data root."""

import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from users.streaming import CsvSource


def data_root(given: str | Path | None) -> Path:
    """The folder of data sets: as given, else ``$DSA_DATA_ROOT``. Raises ``ValueError`` if neither names one."""
    found = given or os.environ.get("DSA_DATA_ROOT")
    if not found:
        raise ValueError("this population is read from files: pass --data-root (data_root=...), or set DSA_DATA_ROOT.")
    return Path(found)


def find(given: str | Path | None, folder: str, names: tuple[str, ...], instead: Collection[Path] = ()) -> list[Path]:
    """The files of one data set, in ``<root>/<folder>`` or in the root itself.

    Args:
        given: the data root, see :func:`data_root`.
        folder: below it.
        names: of the files.
        instead: files that any one of would have done too and that the caller has looked for; for the error.

    Raises:
        FileNotFoundError: lists every file that was looked for and is missing.
    """
    root = data_root(given)
    homes = [root / folder, root]
    for home in homes:
        paths = [home / name for name in names]
        if all(path.is_file() for path in paths):
            return paths
    missing = [str(path) for path in (homes[0] / name for name in names) if not path.is_file()]
    others = f" Nor is there, in their stead, any of {', '.join(map(str, instead))}." if instead else ""
    raise FileNotFoundError(
        f"the data root {root} does not hold {folder}; missing: {', '.join(missing)} (the folder {root} itself was searched "
        f"as well).{others} Give the folder that contains them as --data-root, or in DSA_DATA_ROOT."
    )


class Row(dict[str, str]):
    """A table's row, by column. ``where`` it is, for errors: file and line."""

    def __init__(self, cells: dict[str, str], where: str) -> None:
        super().__init__(cells)
        self.where = where

    def number(self, column: str) -> float:
        """A finite number. Raises ``ValueError`` that names file and line for anything else."""
        try:
            number = float(self[column])
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{self.where}: {column} {self[column]!r} is no number; mend the row or restore the file.")
        return number

    def integer(self, column: str) -> int:
        """A whole number. Raises ``ValueError`` that names file and line for anything else."""
        try:
            return int(self[column])
        except ValueError:
            raise ValueError(
                f"{self.where}: {column} {self[column]!r} is no whole number; mend the row or restore the file."
            ) from None


def rows_of(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    """Some columns of a CSV file, gzipped or plain, row by row as they are read.

    Raises:
        ValueError: for whatever is wrong with the file, see :class:`users.streaming.CsvSource`; names file, line and cure.
    """
    source = CsvSource(path)
    for column in columns:
        source.require(column)
    for line, cells in source.rows(columns):
        yield Row(dict(zip(columns, cells, strict=True)), f"{path}, {source.place} {line}")


def arrays_of(path: Path, names: tuple[str, ...]) -> dict[str, NDArray]:
    """Arrays of an ``.npz`` file (never a pickle). Raises ``ValueError`` for a missing array or a damaged file."""
    # Not np.load: what it raises for damage is of many types, mostly without the path, and it may leave the file open.
    try:
        with zipfile.ZipFile(path) as archive:
            held = [name.removesuffix(".npy") for name in archive.namelist()]
            found = {name: _array(archive.read(f"{name}.npy")) for name in names if name in held}
    # RuntimeError: a flipped bit may look like encryption or an unknown compression. ValueError: no array inside.
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it.") from error
    if missing := [name for name in names if name not in held]:
        raise ValueError(f"{path} has no array {missing[0]!r}; it has {', '.join(held)}.")
    return found


def _array(data: bytes) -> NDArray:
    """Read whole before, so that the checksum is compared before anything in it is believed."""
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def json_of(path: Path) -> Any:
    """What a JSON file holds. Raises ``ValueError`` that names a damaged file."""
    try:
        return json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error.msg} in line {error.lineno}, column {error.colno}; restore it.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start + 1}); restore it.") from error

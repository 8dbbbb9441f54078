"""Tables of any length, read row by row: CSV (also gzipped) and Parquet. People's own, and those of the data sets."""

import csv
import gzip
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

from backbones.registry import did_you_mean

BATCH = 4096
"""Rows of a Parquet file that are in memory together."""
LONGEST = 2**24
"""Characters that a cell may have; Python's own limit is 131,072."""
csv.field_size_limit(LONGEST)


class Source(ABC):
    """A file of rows.

    Attributes:
        path: the file. columns: their names. length: rows, where the file tells. place: what rows are counted in.
    """

    path: Path
    columns: Sequence[str]
    length: int | None = None
    place: str

    @abstractmethod
    def rows(self, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        """The place of each row in the file, from 1, and its cells in ``columns``; cells without a value are empty."""

    def require(self, column: str) -> None:
        """Raises ``ValueError`` that names what was probably meant if there is not one such column."""
        if (count := list(self.columns).count(column)) == 1:
            return
        if count:
            raise ValueError(f"{self.path} has {count} columns {column!r}; rename or remove all but one.")
        separator = next((s for s in (";", "\t", "|") if len(self.columns) == 1 and s in self.columns[0]), None)
        if separator:
            raise ValueError(f"the columns of {self.path} are separated by {separator!r}; save it with commas.")
        raise ValueError(f"{self.path} has no column {column!r}. {did_you_mean(column, self.columns)}")


def open_table(path: Path) -> Source:
    """The rows of ``.csv``, ``.csv.gz`` or ``.parquet``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for another type of file, or one that is empty or damaged.
        ImportError: for Parquet without pyarrow; says what to install.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no table {path}; give a .csv, .csv.gz or .parquet file as --data.")
    name = path.name.lower()
    if name.endswith((".csv", ".csv.gz")):
        return CsvSource(path)
    if name.endswith(".parquet"):
        return ParquetSource(path)
    raise ValueError(f"{path} is of an unknown type; save it as .csv, .csv.gz or .parquet.")


class CsvSource(Source):
    """Comma-separated UTF-8 with a header; lines are counted as an editor counts them."""

    place = "line"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns = next((cells for _, cells in self._records()), [])
        if not self.columns:
            raise ValueError(f"{path} is empty; its first line should name the columns.")

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        """See :meth:`Source.rows`. Raises ``ValueError`` that names the line of a broken row."""
        places, width = [self.columns.index(name) for name in columns], len(self.columns)
        records = self._records()
        next(records)  # the header
        for line, cells in records:
            if len(cells) != width:
                cure = "mend or remove it" if len(cells) < width else "put texts that contain commas in double quotes"
                raise ValueError(f"{self.path}, line {line}: {len(cells)} fields where the header has {width}; {cure}.")
            yield line, [cells[p] for p in places]

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """The first line of each record, and its cells; blank lines are skipped."""
        with self._opened() as file:
            reader, line = csv.reader(self._lines(file), strict=True), 1
            try:
                for cells in reader:
                    if cells:
                        yield line, cells
                    line = reader.line_num + 1
            except csv.Error as error:
                if "field limit" in str(error):
                    raise ValueError(
                        f"{self.path}, line {line}: a cell of more than {LONGEST:,} characters; shorten it, or look for a "
                        "double quote that is not closed."
                    ) from error
                raise ValueError(f"{self.path}, line {line}: {error}; look for a double quote that is not closed.") from error
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{self.path} is damaged after line {line - 1} ({error}); restore it.") from error

    def _opened(self) -> BinaryIO:
        return cast(BinaryIO, gzip.open(self.path)) if self.path.suffix.lower() == ".gz" else self.path.open("rb")

    def _lines(self, file: BinaryIO) -> Iterator[str]:
        """Decoded line by line, slower than all at once, so that an error can name its line."""
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.path} is not UTF-8 (line {number}, byte {error.start + 1}: 0x{line[error.start]:02x}); convert it: "
                    f"save it as UTF-8, or run iconv -f WINDOWS-1252 -t UTF-8 if it came from Windows."
                ) from error


class ParquetSource(Source):
    """Parquet, by batches; rows are counted from 1."""

    place = "row"

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._opened() as file:
            self._schema, self.length = file.schema_arrow, file.metadata.num_rows
        self.columns = self._schema.names

    @cached_property
    def _pyarrow(self) -> Any:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            cure = "pip install -e '.[parquet]', or save the table as .csv"
            raise ImportError(f"{self.path} is Parquet, which takes pyarrow to read: {cure}.") from error
        return pyarrow

    def _opened(self) -> Any:
        # Without memory mapping and buffering ahead, a file of one large row group would be in memory whole.
        try:
            return self._pyarrow.parquet.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False)
        except (self._pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{self.path} cannot be read as Parquet ({error}); restore it or write it anew.") from error

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        """See :meth:`Source.rows`. Raises ``ValueError`` for columns that do not hold words or numbers."""
        types = self._pyarrow.types
        for name in columns:
            kind = self._schema.field(name).type
            if types.is_nested(kind) or "binary" in str(kind):  # of fixed size, in a view, of a dictionary
                raise ValueError(
                    f"{self.path}: column {name!r} holds {kind}; it should hold strings or numbers (paths of images)."
                )
        row = 0
        with self._opened() as file:
            try:
                for batch in file.iter_batches(BATCH, columns=list(columns)):
                    for cells in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                        row += 1
                        yield row, [_text(cell) for cell in cells]
            except (self._pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                raise ValueError(f"{self.path} is damaged after row {row} ({error}); restore it.") from error


def _text(cell: Any) -> str:
    if cell is None or cell != cell:  # not every writer of Parquet makes NaN null
        return ""
    whole = isinstance(cell, float) and cell.is_integer()  # pandas makes whole numbers floats where one is missing
    return str(int(cell) if whole else cell)

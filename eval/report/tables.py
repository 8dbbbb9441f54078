"""A table that can be written as Markdown and as HTML. Texts come from outside (names, reasons), so both escape them."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

NONE = "-"
"""For what does not apply or could not be measured."""


@dataclass(frozen=True)
class Line:
    """A row: cells as plain text; ``strong`` rows stand out. A line of one cell is a heading over the lines below it."""

    cells: Sequence[str]
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A title, column heads, lines, and a note on how to read it."""

    title: str
    heads: Sequence[str]
    lines: Sequence[Line]
    note: str = ""

    def to_markdown(self) -> str:
        """The title in bold, the note, the table."""
        rows = [_markdown_row([*map(markdown_text, self.heads)]), "| --- " * len(self.heads) + "|"]
        for line in self.lines:
            cells = [markdown_text(cell) for cell in line.cells] + [""] * (len(self.heads) - len(line.cells))
            if line.strong or len(line.cells) == 1:
                cells[0] = f"**{cells[0]}**"
            rows.append(_markdown_row(cells))
        blocks = [f"**{markdown_text(self.title)}**" + (f"  \n{markdown_text(self.note)}" if self.note else "")]
        return "\n\n".join([*blocks, "\n".join(rows)])

    def to_html(self) -> str:
        """The same in a box of its own that scrolls sideways."""
        heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in self.heads)
        rows = "\n".join(self._html_row(line) for line in self.lines)
        note = f'<p class="note">{inline_html(self.note)}</p>' if self.note else ""
        label = escape(self.title, quote=True)
        return (
            f'<section><h2>{escape(self.title)}</h2>{note}<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
            f"<table><thead><tr>{heads}</tr></thead><tbody>\n{rows}\n</tbody></table></div></section>"
        )

    def _html_row(self, line: Line) -> str:
        if len(line.cells) == 1:
            return f'<tr class="group"><th colspan="{len(self.heads)}" scope="colgroup">{escape(line.cells[0])}</th></tr>'
        first, *others = line.cells
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        opening = '<tr class="strong">' if line.strong else "<tr>"
        return f'{opening}<th scope="row">{escape(first)}</th>{cells}</tr>'


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


_SIGNS = (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("](", "]\\("))


def markdown_text(text: str) -> str:
    """Text that neither ends a cell, nor opens a tag, nor makes a link."""
    for sign, instead in _SIGNS:
        text = text.replace(sign, instead)
    return " ".join(text.split())


def read_markdown(text: str) -> list[list[list[str]]]:
    """The tables of a text, as :meth:`Table.to_markdown` writes them: of each the rows of cells, heads first."""
    tables: list[list[list[str]]] = []
    for line, before in zip(lines := text.splitlines(), ["", *lines], strict=False):
        if line.startswith("| ") and not line.startswith("| --- "):
            if not before.startswith("| "):
                tables.append([])
            tables[-1].append([_plain_text(cell) for cell in line.removeprefix("| ").removesuffix(" |").split(" | ")])
    return tables


def _plain_text(text: str) -> str:
    for sign, instead in reversed(_SIGNS):
        text = text.replace(instead, sign)
    return text


def code(text: str) -> str:
    """Text between backticks, of which it may not hold any itself."""
    return f"`{text.replace('`', chr(39))}`"


def inline_html(text: str) -> str:
    """Text with parts between backticks, as HTML."""
    parts = [escape(part) for part in text.split("`")]
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))


def figure_text(value: float | None, form: str = ".3f") -> str:
    """A number, or :data:`NONE`."""
    return NONE if value is None else format(value, form)


def short(value: float | None, unit: str = "") -> str:
    """A number of any size with a thousands' prefix: ``1.2 k``, ``40 M``."""
    if value is None:
        return NONE
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()

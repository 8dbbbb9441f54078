"""Pages whose tables stand between two markers, so that commands can write them again."""

from pathlib import Path

from backbones.artefacts import write_atomically


def page_with_markers(path: Path, begin: str, end: str) -> str:
    """What the page says. Raises ``ValueError`` if it lacks the markers, ``OSError`` if there is none."""
    page = path.read_text()
    if end not in page.partition(begin)[2]:
        raise ValueError(f"{path} has no lines {begin} and, after it, {end} to write the table between.")
    return page


def write_between_markers(path: Path, text: str, begin: str, end: str) -> None:
    """Replace what stands between the markers. Raises as :func:`page_with_markers`."""
    head, _, rest = page_with_markers(path, begin, end).partition(begin)
    tail = rest.partition(end)[2]
    write_atomically(path, f"{head}{begin}\n{text}\n{end}{tail}".encode())

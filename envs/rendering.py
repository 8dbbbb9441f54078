"""Masks as text and as pixels."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ON, OFF, GAP = (46, 134, 89), (226, 229, 233), (255, 255, 255)
CELL = 16


def gates_as_text(pathways: Sequence[str], rows: Sequence[tuple[str, NDArray[np.int8]]]) -> str:
    """One line per (user, mask), under a line that names the pathways."""
    lines = [f"{'user':<12} " + " ".join(pathways)]
    for user, mask in rows:
        cells = (("■" if bit else "·").center(len(name)) for name, bit in zip(pathways, mask, strict=True))
        lines.append(f"{user:<12} " + " ".join(cells))
    return "\n".join(lines)


def gates_as_image(pathways: int, masks: Sequence[NDArray[np.int8]], height: int = 24) -> NDArray[np.uint8]:
    """A heat-map with one row of cells per mask (newest last, empty rows above), ``[H, W, 3]`` uint8."""
    cells = np.empty((height, pathways, 3), dtype=np.uint8)
    cells[:] = GAP
    for row, mask in zip(range(height - len(masks), height), masks, strict=True):
        cells[row] = np.where(np.asarray(mask, dtype=bool)[:, None], ON, OFF)
    image = cells.repeat(CELL, 0).repeat(CELL, 1)
    image[::CELL], image[:, ::CELL] = GAP, GAP
    return image

"""Masks as text and as pixels."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from backbones.pathways import READOUT, RUN

ON, OFF, UNRUN, GAP = (46, 134, 89), (226, 229, 233), (88, 94, 104), (255, 255, 255)
CELL = 16


def unrun(pathways: Sequence[str], mask: NDArray[np.int8]) -> NDArray[np.bool_]:
    """``[P]``: behind the exit, where inference ends before what a pathway would read, or what it would let run."""
    blocks = [name for name in pathways if not name.endswith(RUN) and name not in (READOUT, "head")]
    depth = {name: place for place, name in enumerate(blocks)}
    places = np.array([depth.get(name.removesuffix(RUN), len(blocks)) for name in pathways])
    speaks = places[[bool(on) and not name.endswith(RUN) for name, on in zip(pathways, mask, strict=True)]]
    if READOUT not in pathways or not len(speaks):
        return np.zeros(len(pathways), dtype=bool)
    return places > speaks.max()


def gates_as_text(pathways: Sequence[str], rows: Sequence[tuple[str, NDArray[np.int8]]]) -> str:
    """One line per (user, mask), under a line that names the pathways; blank where inference has ended."""
    lines = [f"{'user':<12} " + " ".join(pathways)]
    for user, mask in rows:
        signs = np.where(mask, "■", np.where(unrun(pathways, mask), " ", "·"))
        cells = (sign.center(len(name)) for name, sign in zip(pathways, signs, strict=True))
        lines.append((f"{user:<12} " + " ".join(cells)).rstrip())
    return "\n".join(lines)


def gates_as_image(pathways: Sequence[str], masks: Sequence[NDArray[np.int8]], height: int = 24) -> NDArray[np.uint8]:
    """A heat-map with one row of cells per mask (newest last, empty rows above), ``[H, W, 3]`` uint8; dark: not run."""
    cells = np.empty((height, len(pathways), 3), dtype=np.uint8)
    cells[:] = GAP
    for row, mask in zip(range(height - len(masks), height), masks, strict=True):
        off = np.where(unrun(pathways, mask)[:, None], UNRUN, OFF)
        cells[row] = np.where(np.asarray(mask, dtype=bool)[:, None], ON, off)
    image = cells.repeat(CELL, 0).repeat(CELL, 1)
    image[::CELL], image[:, ::CELL] = GAP, GAP
    return image

"""Curves on a disk that fills up: TensorBoard's writer is a thread of its own, whose error would be told twice and unnamed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backbones.artefacts import NO_ROOM, room_for


@contextmanager
def room_for_curves(folder: Path) -> Iterator[None]:
    """Within: event files in ``folder`` that find no room raise :class:`backbones.artefacts.DiskFullError`, and print nothing.

    The writing thread passes its error on to whoever writes next or flushes; that it ends of that error is no further news.
    """
    before = threading.excepthook

    def heard(ended: threading.ExceptHookArgs) -> None:
        if not (isinstance(ended.exc_value, OSError) and ended.exc_value.errno in NO_ROOM):
            before(ended)

    threading.excepthook = heard
    try:
        with room_for(folder):
            yield
    finally:
        threading.excepthook = before

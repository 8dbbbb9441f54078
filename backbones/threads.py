"""How many threads torch is given where nobody says, and what a worker process begins with."""

import os
from multiprocessing import parent_process
from threading import Thread

import torch


def usable_cores() -> int:
    """Cores that this process may use, at most 4: small tensors gain nothing from more, and too many threads thrash."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores)


def begin_worker() -> None:
    """First thing in a worker process: one torch thread, and a watch that ends it should its parent be killed."""
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the parent's end, then leave at once: nobody is there to be told, and the next call may do the same work."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

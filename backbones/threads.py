"""How many threads torch is given where nobody says."""

import os


def usable_cores() -> int:
    """Cores that this process may use, at most 4: small tensors gain nothing from more, and too many threads thrash."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores)

"""Libraries that seed the global random numbers (Stable-Baselines3), used without anybody else's draws being changed."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within: Python's, NumPy's and torch's global random numbers may be seeded and drawn; afterwards they are as before."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)

"""Runs on the same real people, each of whom counts once. Shapes: per run U users, who need not be the same in every run."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def unit_of(simulated: bool) -> str:
    """Over what intervals are, in words."""
    return "users within seeds" if simulated else "real people, averaged over seeds"


class People:
    """Everybody in any of some runs.

    Attributes:
        names: sorted.
    """

    def __init__(self, runs: Sequence[Sequence[str]]) -> None:
        self.names = sorted({name for names in runs for name in names})
        place = {name: number for number, name in enumerate(self.names)}
        self._places = [np.array([place[name] for name in names]) for names in runs]

    def mean(self, values: Sequence[NDArray[np.float64]], axis: int = 0) -> NDArray[np.float64]:
        """Everybody's mean over the runs in which they are.

        Args:
            values: per run, with its users along ``axis``.
            axis: of the users.

        Returns:
            As the values, with all people along the axis.
        """
        rows = [np.moveaxis(run, axis, 0) for run in values]
        total, times = np.zeros((len(self.names), *rows[0].shape[1:])), np.zeros(len(self.names))
        for at, run in zip(self._places, rows, strict=True):
            total[at] += run  # nobody is twice in a run
            times[at] += 1
        return np.moveaxis(total / times.reshape(-1, *[1] * (total.ndim - 1)), 0, axis)

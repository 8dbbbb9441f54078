"""A results folder seen as a panel: each method's rows by who they are of, so that methods can be laid side by side.

A *unit* is what users are counted by. Simulated users are drawn anew by every seed: a unit is a user within a seed, resampled
within seeds. Real people are the same in every seed: a unit is a person, averaged over seeds (and found in one fold each).
Shapes: N rows, U units of a seed.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.bootstrap import Values
from eval.results import NONE, Results, ResultsError


@dataclass(frozen=True)
class Rows:
    """Rows of one method.

    Attributes:
        at: ``[N]``, positions in the results' columns. who: ``[N]`` increasing, a number for each pair of seed and user.
    """

    at: NDArray[np.int64]
    who: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.at)


class Panel:
    """Results by method, with who is who.

    Raises:
        ResultsError: if a user was measured in two folds of a seed.
    """

    def __init__(self, results: Results) -> None:
        self.results, self.run = results, results.run
        names, user = np.unique(results["user"].astype(str), return_inverse=True)
        seed = np.unique(results["seed"], return_inverse=True)[1]
        self._people = max(1, len(names))
        who = seed * self._people + user
        found: dict[tuple[str, float | None, int], list[int]] = defaultdict(list)
        for position in np.flatnonzero(results.ok).tolist():
            weight = results["cost_weight"][position]
            key = (results["method"][position], None if np.isnan(weight) else weight, int(results["shown"][position]))
            found[key].append(position)
        self._nobody = Rows(np.array([], np.int64), np.array([], np.int64))
        self._rows = {key: _ordered(np.array(at), who, results) for key, at in found.items()}

    def rows(self, method: str, weight: float | None = None, shown: int = NONE) -> Rows:
        """A method's rows, without those that failed.

        Args:
            method: its name.
            weight: cost weight, None for the run's; of no account for methods without a trade-off.
            shown: number of support examples; :data:`NONE` for all.
        """
        if method not in self.run.methods:
            return self._nobody
        asked = (self.run.cost_weight if weight is None else weight) if self.run.methods[method].trades else None
        return self._rows.get((method, asked, shown), self._nobody)

    def align(self, *rows: Rows) -> list[Rows]:
        """The same methods' rows of the users and seeds that all have, in one order."""
        common = rows[0].who
        for other in rows[1:]:
            common = np.intersect1d(common, other.who, assume_unique=True)
        return [Rows(each.at[np.searchsorted(each.who, common)], common) for each in rows]

    def values(self, rows: Rows, measure: str, weight: float | None = None) -> Values:
        """``[N]``: a column of numbers; ``reward`` at the cost weight (None: the run's), whatever the rows were made for."""
        if measure != "reward":
            return self.results[measure][rows.at]
        weight = self.run.cost_weight if weight is None else weight
        return self.results["accuracy"][rows.at] - weight * self.results["cost"][rows.at]

    def units(self, rows: Rows, values: NDArray[np.float64]) -> list[Values]:
        """Values ``[N, ...]`` as ``[U, ...]`` per seed; of real people, one array of their means over seeds."""
        seed, user = np.divmod(rows.who, self._people)
        if self.run.simulated:
            return [values[seed == one] for one in np.unique(seed)]
        people, place = np.unique(user, return_inverse=True)
        total = np.zeros((len(people), *values.shape[1:]))
        np.add.at(total, place, values)
        return [total / np.bincount(place).reshape(-1, *[1] * (values.ndim - 1))]

    def mean(self, rows: Rows, measure: str, weight: float | None = None) -> float | None:
        """Over users, then seeds (of real people: over seeds, then people); None without rows or where cells are empty."""
        values = self.values(rows, measure, weight)
        if not len(rows) or np.isnan(values).any():
            return None
        return float(np.mean([each.mean() for each in self.units(rows, values)]))

    def counts(self, rows: Rows) -> tuple[int, int]:
        """How many users (of all seeds together where seeds redraw them) and how many seeds."""
        seed, user = np.divmod(rows.who, self._people)
        return (len(rows) if self.run.simulated else len(np.unique(user))), len(np.unique(seed))

    def by_seed(self, rows: Rows) -> list[NDArray[np.int64]]:
        """Positions of each seed's rows."""
        seed = rows.who // self._people
        return [rows.at[seed == one] for one in np.unique(seed)]

    def by_fit(self, rows: Rows) -> list[NDArray[np.int64]]:
        """Positions of the rows of each seed and fold, within which a method was fitted once."""
        seeds, folds = self.results["seed"][rows.at], self.results["fold"][rows.at]
        fit = np.unique(np.stack([seeds, folds]), axis=1, return_inverse=True)[1].ravel()
        return [rows.at[fit == one] for one in np.unique(fit)]


def _ordered(at: NDArray[np.int64], who: NDArray[np.int64], results: Results) -> Rows:
    at = at[np.argsort(who[at], kind="stable")]
    twice = np.flatnonzero(np.diff(who[at]) == 0)
    if len(twice):
        one = at[twice[0]]
        raise ResultsError(
            f"{results.folder}: user {results['user'][one]} was measured twice by {results['method'][one]} in seed "
            f"{results['seed'][one]}, in different folds; a user belongs to one fold."
        )
    return Rows(at, who[at])

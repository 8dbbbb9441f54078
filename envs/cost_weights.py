"""The cost weight lambda of ``reward = accuracy - lambda * cost``: one number, or a range from which each episode draws."""

from dataclasses import dataclass

import numpy as np

REPORTED = (0.05, 0.1, 0.2)
"""At which weights one policy for every budget is chosen and reported, as far as its range holds them."""


@dataclass(frozen=True)
class CostWeight:
    """A range of cost weights, of one value where nothing varies.

    Preference-conditioned policies are those of multi-objective reinforcement learning: Abels et al. 2019, "Dynamic Weights
    in Multi-Objective Deep Reinforcement Learning".

    Attributes:
        low, high: least and greatest weight.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (0 <= self.low <= self.high < np.inf):
            raise ValueError(
                f"cost_weight must be finite and at least 0 (a negative one pays for waste), a range from low to high; "
                f"got {self.low} to {self.high}."
            )

    @staticmethod
    def parse(given: "float | str | CostWeight") -> "CostWeight":
        """From a number, a number as text, or ``"uniform:LOW:HIGH"``.

        Raises:
            ValueError: for anything else, and for weights that are negative or not finite.
        """
        if isinstance(given, CostWeight):
            return given
        try:
            if isinstance(given, str) and given.startswith("uniform:"):
                low, high = (float(part) for part in given.split(":")[1:])
                return CostWeight(low, high)
            single = float(given)
        except (TypeError, ValueError) as error:
            if "cost_weight must" in str(error):
                raise
            raise ValueError(f"cost_weight must be a number such as 0.1, or uniform:0:0.3; got {given!r}.") from None
        return CostWeight(single, single)

    @property
    def varies(self) -> bool:
        """Whether episodes differ in it; the observation then shows it."""
        return self.high > self.low

    def given(self) -> float | str:
        """What :meth:`parse` turns into this."""
        if not self.varies:
            return self.low
        return ":".join(("uniform", *(repr(end).removesuffix(".0") for end in (self.low, self.high))))

    def reported(self) -> tuple[float, ...]:
        """The weights to choose and report by: the one, or those of :data:`REPORTED` in the range, or its ends and middle."""
        if not self.varies:
            return (self.low,)
        inside = tuple(weight for weight in REPORTED if self.low <= weight <= self.high)
        return inside or (self.low, (self.low + self.high) / 2, self.high)

    def spread(self) -> tuple[float, ...]:
        """The one, or some from the whole range, denser where it is low: a little weight already changes the best mask."""
        if not self.varies:
            return (self.low,)
        return tuple(self.low + (self.high - self.low) * share for share in (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1))

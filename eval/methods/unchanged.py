"""``base``: the population model as it is, ``all_off`` in the design's words."""

from dataclasses import dataclass

from eval.group import Group
from eval.methods.base import Fitted, Method, Predictor, Unchanged
from eval.world import World


@dataclass(frozen=True)
class Base(Method):
    """Nothing is personal: the rival that costs nothing."""

    scope = "nobody"

    def adapt(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Predictor:
        """See :meth:`Method.adapt`."""
        return Unchanged(world, len(shown))

"""What an episode consists of, apart from who plays it."""

from dataclasses import asdict, dataclass
from typing import Any

from backbones.typed import check_types
from envs.core import PathwaySelection, check_rounds
from envs.cost_weights import CostWeight
from envs.scenario import Scenario


@dataclass(frozen=True)
class Rules:
    """The rules that a policy is trained by and used under.

    Attributes:
        cost_weight: lambda, or ``"uniform:LOW:HIGH"``.
        rounds: masks per episode.
        layerwise: whether a step decides one pathway.
    """

    cost_weight: float | str = 0.1
    rounds: int = 1
    layerwise: bool = False

    def __post_init__(self) -> None:
        check_types(Rules, vars(self), "rules of an episode")
        CostWeight.parse(self.cost_weight)
        check_rounds(self.rounds)

    @property
    def weight(self) -> CostWeight:
        """The cost weight as a range."""
        return CostWeight.parse(self.cost_weight)

    def core(self, scenario: Scenario, slots: int, split: str = "train") -> PathwaySelection:
        """A core that plays by them."""
        return PathwaySelection(scenario, split, self.weight, self.rounds, slots, self.layerwise)

    def to_json(self) -> dict[str, Any]:
        """For a policy's meta."""
        return asdict(self)

    @staticmethod
    def from_json(given: dict[str, Any]) -> "Rules":
        """The inverse of :meth:`to_json`."""
        return Rules(**given)

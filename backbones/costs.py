"""What a mask costs, as a share of what it costs to have everything on. Shapes: P pathways, D stretches of the network."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

COSTS = ("parameters", "flops", "latency")
"""Cost models by name: personal parameters switched on; or all that runs, in operations (two per multiply-add) or in ms."""


@dataclass(frozen=True)
class CostModel:
    """C(m) / C(all_on): what pathways cost themselves, and the stretches of the network that are run for their sake.

    Attributes:
        own: ``[P]``, of each pathway that is on.
        stretches: ``[D]``, of the parts of the network that a mask may leave out, in order of depth.
        depth: ``[P]``, how many of these stretches a pathway needs; 0 for what only lets others run.
        fixed: of what always runs.
        empty: what is added where nothing is on that needs a stretch: then the whole bare model runs.
        switch: ``[D]``, the gate without which a stretch is not run even where it is needed, -1 for none; None: none at all.
    """

    own: Tensor
    stretches: Tensor
    depth: Tensor
    fixed: float = 0.0
    empty: float = 0.0
    switch: Tensor | None = None

    @staticmethod
    def of_pathways(own: Tensor | NDArray[np.float64]) -> "CostModel":
        """Pathways that cost what they cost themselves and no more, ``[P]``."""
        own = torch.as_tensor(own).double()
        return CostModel(own, torch.zeros(0, dtype=torch.float64), torch.zeros(len(own), dtype=torch.int64))

    def __call__(self, gates: Tensor) -> Tensor:
        """Cost ``[...]`` of masks ``[..., P]``; of probabilities, the mean over masks of independent bits."""
        on = gates.double()
        cost = self.fixed + on @ self.own
        switch = [-1] * len(self.stretches) if self.switch is None else self.switch.tolist()
        for d, (price, gate) in enumerate(zip(self.stretches, switch, strict=True)):  # run unless all that needs it is off
            needed = 1 - (1 - on[..., self.depth > d]).prod(-1)
            cost = cost + price * (needed if gate < 0 else needed * on[..., gate])
        return cost + self.empty * (1 - on[..., self.depth > 0]).prod(-1) if self.empty else cost

    def of(self, masks: NDArray[np.bool_]) -> NDArray[np.float64]:
        """The same for arrays."""
        return self(torch.from_numpy(np.ascontiguousarray(masks))).numpy()

    @property
    def alone(self) -> Tensor:
        """What it costs to have one pathway on and no other, ``[P]``."""
        return self(torch.eye(len(self.own)))

    def probability(self, cost: float) -> float:
        """With which independent bits, each on with that probability, cost so much in the mean; 0..1.

        The larger one of two, where rare bits cost more again because the whole bare model stands in for masks without any. If
        no probability is as cheap, the cheapest.
        """
        grid = torch.linspace(0, 1, 1001, dtype=torch.float64)
        low, high = float(grid[self(grid[:, None].expand(-1, len(self.own))).argmin()]), 1.0
        for _ in range(60):
            middle = (low + high) / 2
            if float(self(torch.full((len(self.own),), middle, dtype=torch.float64))) < cost:
                low = middle
            else:
                high = middle
        return (low + high) / 2

    def scaled(self) -> "CostModel":
        """The same in shares of having everything on."""
        whole = float(self(torch.ones(len(self.own))))
        own, stretches = self.own / whole, self.stretches / whole
        return CostModel(own, stretches, self.depth, self.fixed / whole, self.empty / whole, self.switch)

    def tensors(self) -> dict[str, Tensor]:
        """Everything as one flat dict, for saving and hashing."""
        scalars = {"fixed": torch.tensor(self.fixed).double(), "empty": torch.tensor(self.empty).double()}
        switch = {} if self.switch is None else {"switch": self.switch}
        return {"own": self.own, "stretches": self.stretches, "depth": self.depth, **scalars, **switch}

    @staticmethod
    def from_tensors(found: dict[str, Tensor]) -> "CostModel":
        """The inverse of :meth:`tensors`."""
        scalars = float(found["fixed"]), float(found["empty"])
        return CostModel(found["own"], found["stretches"], found["depth"], *scalars, found.get("switch"))

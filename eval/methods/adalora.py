"""``adalora``: low-rank updates between which a budget of ranks is divided while they are trained."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from backbones.base import Backbone
from eval.methods.base import Sizes
from eval.methods.finetune import State, Tunable
from eval.methods.injected import ADAPTER, Ranked

AXES = {"lora_E": 0, "lora_A": 0, "lora_B": 1}
"""Along which axis of which part the directions of a low-rank update lie."""


@dataclass(frozen=True)
class AdaLoRA(Ranked):
    """AdaLoRA by PEFT.

    Zhang et al. 2023, "AdaLoRA: Adaptive budget allocation for parameter-efficient fine-tuning".

    Kept: B diag(E) A, importance of every direction by smoothed sensitivity and uncertainty after every step, the budget that
    falls along a cubic to its end from 1.5 times that (in whole ranks: from twice, where it ends with one per module), the
    orthogonality penalty. The schedule is scaled to our few steps: a tenth at the full budget, then falling, the last half at
    the final one. Not kept: dropout and learning rate warm-up.

    Attributes:
        rank: mean rank per module in the end; modules may end with more or none.
        where: see :class:`eval.methods.injected.Ranked`.
        orthogonality: weight of the penalty.
    """

    rate: float = 1e-2
    rank: int = 2
    orthogonality: float = 0.1

    space: ClassVar = {
        "rank": (1, 2, 4),
        "rate": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        "steps": (5, 10, 20, 40),
        "head": ("nothing", "bias", "all"),
    }

    @property
    def first_rank(self) -> int:
        """Rank of every module at the start."""
        return self.rank + -(-self.rank // 2)

    def inject(self, backbone: Backbone, targets: list[str]) -> Any:
        """See :meth:`Injected.inject`."""
        from peft import AdaLoraConfig, AdaLoraModel

        # The final budget is enforced at step number total - tfinal (from 0), which therefore must lie before the last.
        total = max(self.steps, 2)
        config = AdaLoraConfig(
            init_r=self.first_rank,
            target_r=self.rank,
            lora_alpha=self.first_rank,  # PEFT divides by the first rank, whatever is left of it
            tinit=total // 10,
            tfinal=max(1, total // 2),
            deltaT=max(1, total // 20),
            total_step=total,
            target_modules=targets,
        )
        return AdaLoraModel(backbone, config, ADAPTER)

    def penalty(self, model: Tunable) -> Tensor | float:
        """See :meth:`FineTuned.penalty`: mean of ``||A A^T - I||`` and ``||B^T B - I||`` over modules."""
        found = []
        for name, value in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                gram = value @ value.T if ".lora_A." in name else value.T @ value
                found.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram))))
        return self.orthogonality * torch.stack(found).mean()

    def stepped(self, model: Tunable, step: int) -> None:
        """See :meth:`FineTuned.stepped`: importance, then the budget of this step."""
        tuner: Any = model.backbone
        tuner.update_and_allocate(step)
        if self.steps == 1:  # the only step is the one that judges and the one after which is divided
            tuner.update_and_allocate(1)

    def own(self, model: Tunable) -> State:
        """See :meth:`FineTuned.own`: directions with a factor E of zero do nothing, and are not kept."""
        state = super().own(model)
        for name in [name for name in state if ".lora_E." in name]:
            live = state[name][:, 0].nonzero()[:, 0]
            for part, axis in AXES.items():
                key = name.replace("lora_E", part)
                state[key] = state[key].index_select(axis, live)
        return state

    def put(self, model: Tunable, state: State) -> None:
        """See :meth:`FineTuned.put`: the directions kept come first, the others are zero."""
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name in state:
                    value.zero_()[tuple(map(slice, state[name].shape))] = state[name]

    def size(self, state: State) -> Sizes:
        """See :meth:`FineTuned.size`: what has survived, and a byte per module that tells its rank."""
        count = sum(value.numel() for value in state.values())
        return Sizes(count, count, 4 * count + sum(".lora_E." in name for name in state))

"""``lora``: a low-rank update of some weights, one per user."""

from dataclasses import dataclass
from typing import Any, ClassVar

from backbones.base import Backbone
from eval.methods.injected import ADAPTER, Ranked


@dataclass(frozen=True)
class LoRA(Ranked):
    """LoRA by PEFT, one per user as in OPPU.

    Hu et al. 2022, "LoRA: Low-rank adaptation of large language models"; Tan et al. 2024, "Democratizing large language models
    via personalized parameter-efficient fine-tuning".

    Kept: W + B A with B = 0 at the start, on query and value; every user starts afresh and sees that user's examples alone
    (in OPPU's published code user i also trains on those of the users before). Convolutions as PEFT does them: A has the
    kernel's size, B is 1x1. Not kept: dropout, weight decay, warm-up and clipping, which twenty steps do not need; alpha,
    whose part the tuned rate plays (here alpha = rank, so that the update is B A itself); of OPPU the LoRA that is first
    trained on other users and merged, the retrieval and the profiles.

    Attributes:
        rank: of A and B. where: see :class:`eval.methods.injected.Ranked`.
    """

    rate: float = 3e-3
    rank: int = 4

    space: ClassVar = {
        "rank": (1, 2, 4, 8),
        "rate": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        "steps": (5, 10, 20, 40),
        "head": ("nothing", "bias", "all"),
    }

    def inject(self, backbone: Backbone, targets: list[str]) -> Any:
        """See :meth:`Injected.inject`."""
        from peft import LoraConfig, LoraModel

        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=targets)
        return LoraModel(backbone, config, ADAPTER)

"""Which masks meta-training sees: adapters trained all-on alone are worthless in part."""

import torch
from torch import Tensor


def sample_masks(users: int, pathways: int, generator: torch.Generator, all_on: float = 0.2) -> Tensor:
    """Random masks, ``[users, pathways]`` bool, each with at least one pathway on.

    Args:
        users: U.
        pathways: P.
        generator: the source of randomness.
        all_on: probability of the mask with everything on; otherwise a density is drawn uniformly from (0, 1) and
            every pathway is on with that probability.
    """
    density = torch.rand(users, 1, generator=generator)
    masks = torch.rand(users, pathways, generator=generator) < density
    masks |= torch.rand(users, 1, generator=generator) < all_on
    empty = ~masks.any(1)
    masks[empty, torch.randint(pathways, (int(empty.sum()),), generator=generator)] = True
    return masks

"""Which masks meta-training sees: adapters trained all-on alone are worthless in part."""

import torch
from torch import Tensor

from backbones.pathways import Pathways

SHORT = 0.5
"""Share of the masks that end early, where they may."""
LEFT_OUT = 0.5
"""The highest probability of a block to be left out, where it may."""


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


def masks_for(pathways: Pathways, users: int, generator: torch.Generator, all_on: float = 0.2) -> Tensor:
    """Random masks, ``[users, P]``, of which each has a pathway with weights on.

    As :func:`sample_masks`. Where inference may end early, half of those masks that have not everything on have nothing on
    beyond a depth that is drawn uniformly: independent bits would hardly ever leave the last blocks out. Where blocks may be
    left out, each of them is with a probability that is drawn uniformly below a half.
    """
    masks = sample_masks(users, pathways.num_pathways, generator, all_on)
    if not (pathways.exits or pathways.runs):
        return masks
    whole, depth, limit = masks.all(1, keepdim=True), torch.tensor(pathways.site_of), torch.tensor([[pathways.site_of[-1]]])
    if pathways.exits:
        limit = torch.randint(int(depth.max()) + 1, (users, 1), generator=generator)
        short = (torch.rand(users, 1, generator=generator) < SHORT) & ~whole
        masks &= ~(short & (depth > limit))
    if runs := [*pathways.runs.values()]:
        left_out = LEFT_OUT * torch.rand(users, 1, generator=generator)
        masks[:, runs] = (torch.rand(users, len(runs), generator=generator) >= left_out) | whole
    silent = ~(masks & (pathways.sizes > 0)).any(1)
    masks[silent, (torch.rand(users, generator=generator) * (limit[:, 0].clamp_max(depth[-1] - 1) + 1)).long()[silent]] = True
    return masks

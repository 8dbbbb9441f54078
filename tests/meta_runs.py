"""What tests of meta-training share: the algorithms, a start at which everything learns, and a kill."""

import torch

from meta.inner import MetaInit

FOUR = ("maml", "fomaml", "anil", "reptile")


def lively_init(pathways, steps=2, rate=0.1):
    """A start at which every weight has a gradient."""
    torch.manual_seed(5)
    weights = {k: w + 0.2 * torch.randn_like(w) for k, w in pathways.start(0).items()}
    count = pathways.num_pathways
    return MetaInit(weights, torch.full((steps, count), rate), torch.ones(count, dtype=torch.bool))


def everything_on(users, pathways):
    return torch.ones(users, pathways.num_pathways, dtype=torch.bool)


class Killed(Exception):
    """Stands for a kill in the middle of a run."""

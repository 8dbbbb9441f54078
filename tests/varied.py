"""Random masks, and populations in which one thing differs: other examples in a role, or fewer."""

from dataclasses import replace

import numpy as np

from users.base import Examples, Population

WIDTH = 8
"""Pathways of the planted problem."""
SLOTS = np.arange(3)


def random_masks(count, pathways=WIDTH, seed=0):
    return np.random.default_rng(seed).integers(0, 2, (count, pathways)).astype(bool)


def changed(population, role, **how):
    """The population with other examples in one role."""

    def other(user):
        examples = getattr(user, role)
        inputs = examples.inputs.flip(0) * how.get("scale", 1.0)
        return replace(user, **{role: Examples(inputs, (examples.labels + 3) % population.num_classes)})

    return replace(population, **{split: tuple(map(other, getattr(population, split))) for split in ("val", "test")})


def ragged(population, sizes):
    """Test users cut to the given support sizes; nobody else."""
    cut = [
        replace(user, support=Examples(user.support.inputs[:n], user.support.labels[:n]))
        for user, n in zip(population.test, sizes, strict=False)
    ]
    return Population("ragged", population.num_classes, population.train[:2], population.val[:1], tuple(cut))

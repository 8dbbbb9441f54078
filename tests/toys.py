"""A population of six who share items, and random weights and masks for them, and sites that remember what is read."""

import torch

from users.base import Examples, Population, User
from users.items import TensorItems

COUNT = 40
"""Items of the toy populations."""


def strong_weights(pathways, users):
    return {k: torch.randn(users, *w.shape) * 0.3 for k, w in pathways.start(0).items()}


def of_one(weights, user):
    return {k: w[user : user + 1] for k, w in weights.items()}


def some_masks(pathways, users):
    """Different masks; user 0 has everything off, user 1 everything on."""
    gates = torch.rand(users, pathways.num_pathways) < 0.5
    gates[0], gates[1] = False, True
    return gates


def toy(items=None, folds=None):
    """Six users who share items, of different sizes; a fourth of the items is nobody's."""
    draw = torch.Generator().manual_seed(1)

    def examples(count):
        return Examples(torch.randperm(30, generator=draw)[:count], torch.randint(10, (count,), generator=draw))

    users = [User(f"u{n}", examples(4 + n), examples(2 + n % 3), examples(7 - n)) for n in range(6)]
    if items is None:
        images = torch.randint(256, (COUNT, 1, 8, 8), dtype=torch.uint8, generator=draw)
        items = TensorItems(images)
    return Population("toy", 10, tuple(users[:3]), tuple(users[3:4]), tuple(users[4:]), items=items, folds=folds)


class Spied(tuple):
    """Sites that remember which were asked for."""

    def __new__(cls, *args):
        made = super().__new__(cls, *args)
        made.asked = []
        return made

    def __getitem__(self, p):
        self.asked.append(p)
        return super().__getitem__(p)

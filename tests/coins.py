"""Users whose labels are coins: there is nothing to learn of them but by heart, which attacks find and forgetting undoes."""

import torch

from backbones.pathways import make_pathways
from backbones.resnet import small_resnet
from meta.inner import MetaInit
from meta.trainer import MetaConfig, MetaTrainer
from users.base import Examples, Population, User
from users.batch import Part, Prepared

CONFIG = MetaConfig(steps=150, users=8, inner_rate=0.3, outer_rate=3e-2, all_on=1.0)


def coins() -> Prepared:
    """420 train users with images of their own, which no other user has."""
    draw = torch.Generator().manual_seed(0)

    def person(name):
        def some(count):
            coarse = torch.randn(count, 1, 2, 2, generator=draw)  # a network sees no difference between fine noises
            images = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
            return Examples(images, torch.randint(2, (count,), generator=draw))

        return User(name, some(6), some(2), some(8))

    people = {
        split: [person(f"{split}{n}") for n in range(count)] for split, count in (("train", 420), ("val", 2), ("test", 2))
    }
    torch.manual_seed(0)
    model = small_resnet(2, widths=(32,), depth=2, image_size=8)
    return Prepared(make_pathways("side", model, 16), Population("coins", 2, **people))


def part_of(data, users):
    """Support and query examples of train users."""
    return [Part(data, "train", role, torch.tensor(users)) for role in ("support", "query")]


def learned(data, users, seed) -> MetaInit:
    """A start that knows these users by heart."""
    config = MetaConfig(**{**vars(CONFIG), "seed": seed})
    return MetaTrainer(data.pathways, *part_of(data, users), config).run()

"""Supervised pre-training of a small network on tensors, for backbones whose weights nobody publishes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from backbones.registry import Registry

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
AUGMENTATIONS: Registry[Augmentation] = Registry("augmentation")
"""By name: images ``[N, channels, H, W]`` and a source of randomness to images of the same shape."""


@dataclass(frozen=True)
class Labelled:
    """Images ``[N, channels, H, W]``, float or uint8 (then scaled to 0..1), and int64 labels ``[N]``."""

    images: Tensor
    labels: Tensor

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Float images and labels of some rows."""
        images = self.images[rows]
        return (images.float() / 255 if images.dtype == torch.uint8 else images), self.labels[rows]


def pretrain(
    network: nn.Module,
    data: Labelled,
    *,
    epochs: int,
    seed: int,
    augment: str = "shift",
    along: Labelled | None = None,
    batch_size: int = 64,
    rate: float = 3e-3,
) -> nn.Module:
    """Train ``network`` in place with AdamW and a one-cycle schedule; returns it.

    Args:
        network: images ``[N, ...]`` to logits ``[N, C]``; with ``along``, it must have ``features`` and ``fc``.
        data: what it is for.
        epochs: passes over the images.
        seed: of the order and the augmentation.
        augment: a name from :data:`AUGMENTATIONS`.
        along: a second task, of which as many images come with every batch; its classifier is thrown away, what its
            features learned stays.
        batch_size: images per step (of 28x28 pixels and more 4 times as many).
        rate: peak learning rate.
    """
    draw = torch.Generator().manual_seed(seed)
    large = data.images.shape[-1] >= 28
    batch_size = 4 * batch_size if large else batch_size
    steps = epochs * -(-len(data.images) // batch_size)
    second = _second_head(network, along, seed)
    optimiser = torch.optim.AdamW([*network.parameters(), *second.parameters()], lr=rate, weight_decay=0.05 if large else 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    change = AUGMENTATIONS.get(augment)
    if large:
        network.to(memory_format=torch.channels_last)
    network.train()
    with tqdm(total=steps, desc="pre-train the backbone", unit="step") as bar:
        for _ in range(epochs):
            for rows in torch.randperm(len(data.images), generator=draw).split(batch_size):
                images, labels = data.batch(rows)
                with torch.autocast("cpu", torch.bfloat16, enabled=large):  # several times faster than float32 here
                    loss = _loss(network, second, change(images, draw), labels, along, change, draw)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return network.eval().to(memory_format=torch.contiguous_format)


def _second_head(network: nn.Module, along: Labelled | None, seed: int) -> nn.Module:
    if along is None:
        return nn.Identity()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        return nn.Linear(network.fc.in_features, int(along.labels.max()) + 1)  # type: ignore[union-attr, arg-type]


def _loss(
    network: nn.Module,
    second: nn.Module,
    images: Tensor,
    labels: Tensor,
    along: Labelled | None,
    change: Augmentation,
    draw: torch.Generator,
) -> Tensor:
    if along is None:
        return functional.cross_entropy(network(images).float(), labels)
    more, characters = along.batch(torch.randint(len(along.images), (len(images),), generator=draw))
    features = network.features(torch.cat([images, change(more, draw)]))  # type: ignore[operator]
    mine, other = features.split(len(images))
    loss = functional.cross_entropy(network.fc(mine).float(), labels)  # type: ignore[operator]
    return loss + functional.cross_entropy(second(other).float(), characters) / 2


@AUGMENTATIONS.decorate("shift")
def shift(images: Tensor, draw: torch.Generator) -> Tensor:
    """Shift the whole batch by at most one pixel each way, padding with zeros."""
    top, left = torch.randint(0, 3, (2,), generator=draw).tolist()
    height, width = images.shape[-2:]
    return functional.pad(images, (1, 1, 1, 1))[..., top : top + height, left : left + width]


@AUGMENTATIONS.decorate("handwriting")
def handwriting(images: Tensor, draw: torch.Generator) -> Tensor:
    """Another hand for every image: slant, rotation by up to 10 degrees, proportions, place, and a smooth warp."""

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=draw) - 1

    count = len(images)
    angle, slant, wide, high = (amount * uniform(count) for amount in (0.175, 0.3, 0.15, 0.15))
    rows = [
        [angle.cos() * (1 + wide), -angle.sin() * (1 + high) + slant, 0.125 * uniform(count)],
        [angle.sin() * (1 + wide), angle.cos() * (1 + high), 0.125 * uniform(count)],
    ]
    affine = torch.stack([torch.stack(row, 1) for row in rows], 1)
    grid = functional.affine_grid(affine, list(images.shape), align_corners=False)
    warp = 0.06 * torch.randn(count, 2, 4, 4, generator=draw)
    grid = grid + functional.interpolate(warp, size=images.shape[-2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    return functional.grid_sample(images, grid, align_corners=False)

"""Supervised pre-training of a small network on tensors, for backbones whose weights nobody publishes."""

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm


def pretrain(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    seed: int,
    batch_size: int = 64,
    rate: float = 3e-3,
) -> nn.Module:
    """Train ``network`` in place with AdamW, a one-cycle schedule and random shifts of one pixel; returns it.

    Args:
        network: images ``[N, ...]`` to logits ``[N, C]``.
        images: ``[N, channels, H, W]``.
        labels: ``[N]``.
        epochs: passes over the images.
        seed: of the order and the augmentation.
        batch_size: images per step.
        rate: peak learning rate.
    """
    draw = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(images) // batch_size)
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    network.train()
    with tqdm(total=steps, desc="pre-train the backbone", unit="step") as bar:
        for _ in range(epochs):
            for rows in torch.randperm(len(images), generator=draw).split(batch_size):
                loss = nn.functional.cross_entropy(network(_jitter(images[rows], draw)), labels[rows])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return network.eval()


def _jitter(images: Tensor, draw: torch.Generator) -> Tensor:
    """Shift the whole batch by at most one pixel each way, padding with zeros."""
    top, left = torch.randint(0, 3, (2,), generator=draw).tolist()
    height, width = images.shape[-2:]
    return nn.functional.pad(images, (1, 1, 1, 1))[..., top : top + height, left : left + width]

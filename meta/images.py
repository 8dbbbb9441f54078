"""A small ResNet as population model, pre-trained on the images that a population sets aside for it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.artefacts import cache_key, load_or_make
from backbones.base import PopulationModel, hash_tensors
from backbones.pretrain import AUGMENTATIONS, Labelled, pretrain
from backbones.registry import Registry
from backbones.resnet import SmallResNet, small_resnet
from users.base import Examples, Population
from users.omniglot import omniglot

AUXILIARIES: Registry[Callable[..., Examples]] = Registry("auxiliary corpus")
"""Labelled images without users, ``(data_root) -> Examples``, on which a backbone may be trained along."""
AUXILIARIES.register("omniglot", omniglot)


def pretrained_resnet(
    population: Population,
    folder: Path,
    seed: int,
    pretrain_epochs: int = 60,
    widths: Sequence[int] = (24, 32, 48),
    stride: int = 1,
    augment: str = "shift",
    auxiliary: str | None = None,
    data_root: str | Path | None = None,
    pretrain_seed: int | None = None,
) -> PopulationModel:
    """The small ResNet, pre-trained on ``population.fitting`` or loaded from ``folder``.

    The file's name carries a hash of the images and of the random start, so that other images make another backbone.

    Args:
        population: with ``fitting`` images ``[N, channels, H, W]``, or positions of such among its items.
        folder: where the weights are kept.
        seed: of the random start, the order of images and their augmentation.
        pretrain_epochs: passes over the fitting images.
        widths: channels per stage, see :class:`backbones.resnet.SmallResNet`.
        stride: of the stem, likewise.
        augment: a name from :data:`backbones.pretrain.AUGMENTATIONS`.
        auxiliary: a name from :data:`AUXILIARIES`, trained along through a classifier of its own that is then dropped;
            None for none.
        data_root: where the auxiliary corpus is.
        pretrain_seed: takes the place of ``seed``, so that one backbone serves all seeds; None: each has its own.

    Raises:
        ValueError: if the population sets no images aside, or for unknown names.
    """
    if population.fitting is None or not len(population.fitting):
        raise ValueError(f"population {population.name!r} has no `fitting` images to pre-train resnet-small on.")
    if pretrain_epochs < 1:
        raise ValueError(f"pretrain_epochs must be at least 1, got {pretrain_epochs}.")
    AUGMENTATIONS.get(augment)
    seed = seed if pretrain_seed is None else pretrain_seed
    main = Labelled(_images(population, population.fitting), population.fitting.labels)
    along = None
    if auxiliary is not None:
        more = AUXILIARIES.get(auxiliary)(data_root)
        along = Labelled(more.inputs, more.labels)
    channels, size = main.images.shape[1:3]
    shape: dict[str, Any] = {"in_channels": channels, "widths": tuple(widths), "stride": stride}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallResNet(population.num_classes, **shape)
    tensors = {"images": main.images, "labels": main.labels, **network.state_dict()}
    if along is not None:
        tensors |= {"auxiliary/images": along.images, "auxiliary/labels": along.labels}
    start = {"start": hash_tensors(tensors), "stride": stride}
    key = cache_key(**start, epochs=pretrain_epochs, augment=augment)

    def train() -> tuple[dict[str, Tensor], dict]:
        trained = pretrain(network, main, epochs=pretrain_epochs, seed=seed, augment=augment, along=along)
        return trained.state_dict(), {"epochs": pretrain_epochs, "seed": seed}

    state = load_or_make(folder / f"backbone-{key}", "backbone", train)[0]
    return small_resnet(population.num_classes, state, size, **shape)


def _images(population: Population, examples: Examples) -> Tensor:
    images = examples.inputs if population.items is None else population.items.take(examples.inputs.tolist())
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise ValueError(
            f"resnet-small learns from images of one size in memory; population {population.name!r} has others. For texts "
            "choose --backbone minilm or bert, for image files resnet18, resnet34 or resnet50."
        )
    return images

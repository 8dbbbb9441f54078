"""Raw images, of a tensor or of files, to what an image backbone reads."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
"""Of ImageNet's colours, by which torchvision's official weights expect images to be normalised."""


def as_images(raw: Any, channels: int, size: Sequence[int]) -> Tensor:
    """Float images ``[N, channels, H, W]`` in 0..1.

    Args:
        raw: a tensor ``[N, 1 or channels, H, W]``, uint8 or float in 0..1, whose size is kept; or a list of PIL images, which
            are brought to ``size``.
        channels: 1 or 3; grey images are repeated.
        size: ``(H, W)``.

    Raises:
        ValueError: for anything else (texts, say).
    """
    if isinstance(raw, Tensor) and raw.ndim == 4:
        images = raw.float() / 255 if raw.dtype == torch.uint8 else raw
        return images.expand(-1, channels, -1, -1) if images.shape[1] == 1 else images
    if not isinstance(raw, list) or not all(isinstance(image, Image.Image) for image in raw):
        kind = type(raw[0]).__name__ if isinstance(raw, list) and raw else type(raw).__name__
        raise ValueError(f"this backbone reads images, not {kind}: for texts choose --backbone minilm or bert.")
    height, width = size
    mode = "L" if channels == 1 else "RGB"
    arrays = [np.asarray(image.convert(mode).resize((width, height), Image.Resampling.BILINEAR)) for image in raw]
    found = torch.from_numpy(np.stack(arrays)).float() / 255
    return found[:, None] if channels == 1 else found.permute(0, 3, 1, 2)


def normalised(images: Tensor, size: Sequence[int]) -> Tensor:
    """RGB images ``[N, 3, H, W]`` as torchvision's official weights expect them: of ``size``, ImageNet's colours at zero."""
    if images.shape[-2:] != tuple(size):
        images = functional.interpolate(images, tuple(size), mode="bilinear", antialias=True)
    return (images - MEAN) / STD

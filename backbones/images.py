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
        ValueError: for anything else (texts, say), and for images whose numbers have no known largest value.
    """
    if isinstance(raw, Tensor) and raw.ndim == 4:
        if raw.shape[1] not in (1, channels) or not (raw.dtype == torch.uint8 or raw.is_floating_point()):
            wanted = " or ".join(map(str, sorted({1, channels})))
            raise ValueError(
                f"this backbone reads images [N, {wanted}, H, W] of uint8 or float in 0..1, not {[*raw.shape]} of {raw.dtype}: "
                "bring them to these channels (without transparency), and to bytes."
            )
        images = raw.float() / 255 if raw.dtype == torch.uint8 else raw
        return images.expand(-1, channels, -1, -1) if images.shape[1] == 1 else images
    if not isinstance(raw, list) or not all(isinstance(image, Image.Image) for image in raw):
        kind = type(raw[0]).__name__ if isinstance(raw, list) and raw else type(raw).__name__
        cure = "for texts choose --backbone minilm or bert"
        if kind in ("ndarray", "Tensor"):
            cure = "give them as one tensor [N, channels, H, W], or as PIL images"
        raise ValueError(f"this backbone reads images, not {kind}: {cure}.")
    height, width = size
    mode = "L" if channels == 1 else "RGB"
    found = torch.from_numpy(np.stack([_bytes(image, mode, (width, height)) for image in raw])).float() / 255
    return found[:, None] if channels == 1 else found.permute(0, 3, 1, 2)


def _bytes(image: Image.Image, mode: str, size: tuple[int, int]) -> np.ndarray:
    """One image in 0..255, ``[H, W]`` or ``[H, W, 3]``: bytes, or (of 16 bits per channel) float numbers.

    Pillow itself would cut off what is above 255.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # older Pillows' name of 16 bits
        grey = Image.fromarray(np.asarray(image).astype(np.float32) * (255 / 65535))
        found = np.asarray(grey.resize(size, Image.Resampling.BILINEAR))
        return found if mode == "L" else np.repeat(found[..., None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"the image {getattr(image, 'filename', '') or 'without a file'} holds numbers of 32 bits (Pillow's mode "
            f"{image.mode}), of which white could be any: save it with 8 or 16 bits per channel."
        )
    return np.asarray(image.convert(mode).resize(size, Image.Resampling.BILINEAR))


def normalised(images: Tensor, size: Sequence[int]) -> Tensor:
    """RGB images ``[N, 3, H, W]`` as torchvision's official weights expect them: of ``size``, ImageNet's colours at zero."""
    if images.shape[-2:] != tuple(size):
        images = functional.interpolate(images, tuple(size), mode="bilinear", antialias=True)
    return (images - MEAN) / STD

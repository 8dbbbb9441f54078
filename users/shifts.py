"""Ways in which one simulated user's images and labels differ from everybody's; a registry, open to more.

A shift is a function ``(images [N, 1, H, W], labels [N], rng) -> (images, labels)``, called once per user on
all of that user's images, so that what it draws (an angle, a strength, a permutation) is the user's own.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from backbones.registry import Registry

Arrays = tuple[NDArray[np.float32], NDArray[np.int64]]
Shift = Callable[[NDArray[np.float32], NDArray[np.int64], np.random.Generator], Arrays]
SHIFTS: Registry[Shift] = Registry("shift")


def register_shift(name: str, fn: Shift) -> None:
    """Add a shift. Populations use it where it is named: ``digits_population(shifts=[..., name])``."""
    SHIFTS.register(name, fn)


@SHIFTS.decorate("none")
def none(images, labels, rng):
    """Leave everything as it is."""
    return images, labels


@SHIFTS.decorate("inverted")
def inverted(images, labels, rng):
    """White on black becomes black on white."""
    return 1 - images, labels


@SHIFTS.decorate("rotated")
def rotated(images, labels, rng):
    """One, two or three quarter turns."""
    return np.rot90(images, rng.integers(1, 4), axes=(-2, -1)).copy(), labels


@SHIFTS.decorate("noisy")
def noisy(images, labels, rng):
    """Gaussian noise of standard deviation 0.3 to 0.5, fresh for every image."""
    strength = rng.uniform(0.3, 0.5)
    return images + rng.normal(0, strength, images.shape).astype(np.float32), labels


@SHIFTS.decorate("faint")
def faint(images, labels, rng):
    """Contrast lowered to 35 to 55 %."""
    return images * np.float32(rng.uniform(0.35, 0.55)), labels


@SHIFTS.decorate("moved_and_blurred")
def moved_and_blurred(images, labels, rng):
    """Blurred by the 1-2-1 binomial kernel and moved by one pixel along each axis; what leaves is lost."""
    down, right = rng.choice([-1, 1], size=2)
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)))
    height, width = images.shape[-2:]
    out = np.zeros_like(images)
    for y, row_weight in zip((1, 2, 3), (0.25, 0.5, 0.25), strict=True):
        for x, weight in zip((1, 2, 3), (0.25, 0.5, 0.25), strict=True):
            window = padded[..., y - down : y - down + height, x - right : x - right + width]
            out += np.float32(row_weight * weight) * window
    return out, labels


@SHIFTS.decorate("swapped_labels")
def swapped_labels(images, labels, rng):
    """Three random pairs of classes trade their meaning."""
    classes = int(labels.max()) + 1
    meaning = np.arange(classes)
    pairs = rng.permutation(classes)[: 2 * min(3, classes // 2)].reshape(-1, 2)
    meaning[pairs[:, 0]], meaning[pairs[:, 1]] = pairs[:, 1], pairs[:, 0]
    return images, meaning[labels]

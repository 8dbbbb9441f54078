"""What users have labelled, kept once however many users share it: texts, images in memory, image files."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from backbones.base import hash_tensors


class Items(ABC):
    """A list of things to label; users' ``inputs`` are then positions in it."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, positions: Sequence[int]) -> Any:
        """Raw items, as :meth:`backbones.base.Backbone.prepare` reads them."""

    @abstractmethod
    def part(self, positions: Sequence[int]) -> "Items":
        """Some of them, in that order."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the contents."""

    def order(self) -> list[int]:
        """Positions in an order in which neighbours are of about the same size."""
        return list(range(len(self)))


@dataclass(frozen=True)
class TensorItems(Items):
    """Items of one shape, ``[M, ...]``; ``uint8`` images stay bytes until the backbone reads them."""

    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def take(self, positions: Sequence[int]) -> Tensor:
        """``[n, ...]``."""
        return self.values[torch.as_tensor(positions)]

    def part(self, positions: Sequence[int]) -> "TensorItems":
        """See :meth:`Items.part`."""
        return TensorItems(self.take(positions))

    def fingerprint(self) -> str:
        """See :meth:`Items.fingerprint`."""
        return hash_tensors({"items": self.values})


@dataclass(frozen=True)
class TextItems(Items):
    """Texts."""

    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, positions: Sequence[int]) -> list[str]:
        """A list of strings."""
        return [self.texts[i] for i in positions]

    def part(self, positions: Sequence[int]) -> "TextItems":
        """See :meth:`Items.part`."""
        return TextItems(tuple(self.take(positions)))

    def fingerprint(self) -> str:
        """See :meth:`Items.fingerprint`."""
        return _hash(text.encode() for text in self.texts)

    def order(self) -> list[int]:
        """Shortest first, so that little is padded."""
        return sorted(range(len(self)), key=lambda i: len(self.texts[i]))


@dataclass(frozen=True)
class ImageFiles(Items):
    """Image files, opened when they are needed."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, positions: Sequence[int]) -> list[Image.Image]:
        """A list of PIL images. Raises ``ValueError`` that names a file which cannot be read."""
        return [_open(self.paths[i]) for i in positions]

    def part(self, positions: Sequence[int]) -> "ImageFiles":
        """See :meth:`Items.part`."""
        return ImageFiles(tuple(self.paths[i] for i in positions))

    def fingerprint(self) -> str:
        """See :meth:`Items.fingerprint`. Every file is read once."""
        return _hash(path.read_bytes() for path in self.paths)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        cure = "mend the file or take its row out of the table"
        raise ValueError(f"the image {path} cannot be read ({error}); {cure}.") from error


def _hash(parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]

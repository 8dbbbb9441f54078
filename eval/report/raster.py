"""Pictures as pixels, for TensorBoard, which shows no SVG."""

from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from eval.report.picture import COLOURS, Box, Item, Mark, Path, Picture, Place, Text

FINER = 2
"""Times as fine as asked for, then shrunk: smooth edges."""


def to_pixels(picture: Picture, scale: float = 1.5) -> NDArray[np.uint8]:
    """``[height, width, 3]`` on white, ``scale`` pixels per unit of the picture."""
    size = round(picture.width * scale), round(picture.height * scale)
    image = Image.new("RGB", (size[0] * FINER, size[1] * FINER), COLOURS["paper"][0])
    pen = _Pen(ImageDraw.Draw(image), scale * FINER)
    for item in picture.items:
        pen.draw(item)
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))


@cache
def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


class _Pen:
    """Draws shapes at a scale."""

    def __init__(self, on: ImageDraw.ImageDraw, scale: float) -> None:
        self.on, self.scale = on, scale

    def draw(self, item: Item) -> None:
        if isinstance(item, Path):
            self._path(item)
        elif isinstance(item, Box):
            (x, y), (right, low) = self._at((item.x, item.y)), self._at((item.x + item.width, item.y + item.height))
            self.on.rectangle((x, y, max(x, right), max(y, low)), fill=_colour(item))
        elif isinstance(item, Mark):
            self._mark(item)
        else:
            self._text(item)

    def _at(self, place: Place) -> Place:
        return place[0] * self.scale, place[1] * self.scale

    def _path(self, item: Path) -> None:
        places, width = [self._at(place) for place in item.points], max(1, round(item.width * self.scale))
        if not item.dashed:
            self.on.line(places, fill=_colour(item), width=width, joint="curve")
            return
        for (x, y), (u, v) in pairwise(places):
            dashes = max(1, round(np.hypot(u - x, v - y) / (7 * self.scale)))
            for begin in np.arange(dashes) / dashes:
                ends = [(x + (u - x) * share, y + (v - y) * share) for share in (begin, begin + 0.57 / dashes)]
                self.on.line(ends, fill=_colour(item), width=width)

    def _mark(self, item: Mark) -> None:
        if item.shape == "circle":
            corners = self._at((item.x - item.size, item.y - item.size)), self._at((item.x + item.size, item.y + item.size))
            self.on.ellipse((*corners[0], *corners[1]), fill=_colour(item))
        else:
            self.on.polygon([self._at(place) for place in item.corners()], fill=_colour(item))

    def _text(self, item: Text) -> None:
        anchor = {"start": "ls", "middle": "ms", "end": "rs"}[item.anchor]
        font = _font(item.size * self.scale)
        stroke = 0.3 * self.scale if item.bold else 0
        self.on.text(self._at((item.x, item.y)), item.text, _colour(item), font, anchor, stroke_width=stroke)


def _colour(item: Item) -> tuple[int, ...]:
    """On white, opacity mixed in."""
    opacity = getattr(item, "opacity", 1.0)
    return tuple(round(255 + opacity * (part - 255)) for part in ImageColor.getrgb(COLOURS[item.colour][0]))

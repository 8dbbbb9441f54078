"""A picture as a list of shapes, drawn as SVG for pages and with Pillow for TensorBoard.

Units are those of the picture's own width and height, from the upper left corner. Colours are names: a page gives them values
for bright and for dark surroundings, see :data:`COLOURS`. Bright ones are after Okabe & Ito (2008) and Tol (2021), which
colour-blind readers can tell apart; what is coloured differs in shape or words too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

COLOURS = {
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#5b6470", "#a3adb8"),
    "grid": ("#dfe3e8", "#363d46"),
    "paper": ("#ffffff", "#15181c"),
    "subject": ("#c44e00", "#ff9248"),
    "masks": ("#0068a8", "#6db8f2"),
    "meta": ("#00795a", "#4fd0a7"),
    "user": ("#8a3f8f", "#d79be0"),
    "nobody": ("#6b6b6b", "#b5b5b5"),
    "worse": ("#a81c2c", "#ff7b85"),
    "heat": ("#5aa9e0", "#1f5f94"),
}
"""By name: the colour on a bright page, and on a dark one."""
Shape = Literal["circle", "square", "triangle", "diamond"]
Anchor = Literal["start", "middle", "end"]
Place = tuple[float, float]


@dataclass(frozen=True)
class Path:
    """A line through points."""

    points: Sequence[Place]
    colour: str
    width: float = 1.5
    opacity: float = 1.0
    dashed: bool = False
    title: str = ""


@dataclass(frozen=True)
class Box:
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    opacity: float = 1.0
    title: str = ""


@dataclass(frozen=True)
class Mark:
    """A filled sign around a point, ``size`` from its middle to its rim."""

    x: float
    y: float
    shape: Shape
    colour: str
    size: float = 4.0
    title: str = ""

    def corners(self) -> list[Place]:
        """Of signs other than the circle."""
        r = self.size
        steps = {
            "square": ((-r, -r), (r, -r), (r, r), (-r, r)),
            "triangle": ((0.0, -1.2 * r), (1.1 * r, 0.9 * r), (-1.1 * r, 0.9 * r)),
            "diamond": ((0.0, -1.3 * r), (1.3 * r, 0.0), (0.0, 1.3 * r), (-1.3 * r, 0.0)),
        }[self.shape]
        return [(self.x + dx, self.y + dy) for dx, dy in steps]


@dataclass(frozen=True)
class Text:
    """One line of text, its baseline at ``y``."""

    x: float
    y: float
    text: str
    colour: str = "ink"
    size: float = 12.0
    anchor: Anchor = "start"
    bold: bool = False

    @property
    def width(self) -> float:
        """About how wide it will be."""
        return 0.56 * self.size * len(self.text)


Item = Path | Box | Mark | Text


@dataclass(frozen=True)
class Picture:
    """Shapes in the order in which they are drawn.

    Attributes:
        title: what is seen. description: the same for those who do not see it, with the main figures. items: the shapes.
    """

    title: str
    description: str
    width: float
    height: float
    items: list[Item] = field(default_factory=list)

    def add(self, *items: Item) -> None:
        """Draw further shapes over those there are."""
        self.items.extend(items)

    def to_svg(self, name: str) -> str:
        """An inline ``<svg>`` that takes the width it is given. ``name`` tells its title from others on the page."""
        body = "\n".join(map(_svg, self.items))
        return (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" aria-labelledby="{name}-title {name}-text">'
            f'<title id="{name}-title">{escape(self.title)}</title><desc id="{name}-text">{escape(self.description)}</desc>\n'
            f"{body}\n</svg>"
        )


def _paint(kind: str, item: Path | Box | Mark) -> str:
    opacity = getattr(item, "opacity", 1.0)
    return f'style="{kind}:var(--{item.colour})"' + (f' opacity="{opacity:.2f}"' if opacity < 1 else "")


def _closed(tag: str, attributes: str, title: str) -> str:
    inner = f"<title>{escape(title)}</title>" if title else ""
    return f"<{tag} {attributes}>{inner}</{tag}>"


def _points(places: Sequence[Place]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _path(item: Path) -> str:
    dashes = ' stroke-dasharray="4 3"' if item.dashed else ""
    shape = f'points="{_points(item.points)}" fill="none" stroke-width="{item.width:g}" stroke-linejoin="round"{dashes}'
    return _closed("polyline", f"{shape} {_paint('stroke', item)}", item.title)


def _box(item: Box) -> str:
    shape = f'x="{item.x:.1f}" y="{item.y:.1f}" width="{item.width:.1f}" height="{item.height:.1f}"'
    return _closed("rect", f"{shape} {_paint('fill', item)}", item.title)


def _mark(item: Mark) -> str:
    if item.shape == "circle":
        return _closed("circle", f'cx="{item.x:.1f}" cy="{item.y:.1f}" r="{item.size:g}" {_paint("fill", item)}', item.title)
    return _closed("polygon", f'points="{_points(item.corners())}" {_paint("fill", item)}', item.title)


def _text(item: Text) -> str:
    weight = ' font-weight="600"' if item.bold else ""
    place = f'x="{item.x:.1f}" y="{item.y:.1f}" font-size="{item.size:g}" text-anchor="{item.anchor}"{weight}'
    return f'<text {place} style="fill:var(--{item.colour})">{escape(item.text)}</text>'


def _svg(item: Item) -> str:
    if isinstance(item, Path):
        return _path(item)
    if isinstance(item, Box):
        return _box(item)
    return _mark(item) if isinstance(item, Mark) else _text(item)

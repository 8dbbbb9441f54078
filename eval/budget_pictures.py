"""The pictures of ``eval.budgets``: accuracy against cost, and reward against adaptations. Need matplotlib.

Colours are those of Okabe & Ito (2008), which colour-blind readers can tell apart; methods differ in markers and lines too.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backbones.artefacts import write_atomically
from eval.adaptations import POLICY_ADAPTATIONS
from eval.pareto import Points, concave_front

STYLES: dict[str, dict[str, Any]] = {
    "one policy": {"color": "#D55E00", "marker": "o", "linestyle": "-", "linewidth": 2.2, "zorder": 5},
    "separate policies": {
        "color": "#0072B2",
        "marker": "s",
        "markerfacecolor": "none",
        "markersize": 8,
        "linestyle": "--",
        "zorder": 6,
    },
    "validation_search": {"color": "#000000", "marker": "^", "linestyle": ":"},
    "gradient_norm": {"color": "#CC79A7", "marker": "D", "linestyle": "-."},
    "random": {"color": "#999999", "marker": ".", "linestyle": ":"},
    "best_static": {"color": "#009E73", "marker": "v", "markersize": 4, "linestyle": "none"},
    "all_on": {"color": "#E69F00", "marker": "*", "linestyle": "none", "markersize": 13},
    "all_off": {"color": "#56B4E9", "marker": "X", "linestyle": "none", "markersize": 9},
    "random search": {"color": "#999999", "marker": ".", "linestyle": ":"},
    "greedy forward selection": {"color": "#0072B2", "marker": "s", "linestyle": "--"},
    "Bayesian optimisation": {"color": "#CC79A7", "marker": "D", "linestyle": "-."},
}
"""By method."""


def draw_front(points: Mapping[str, Points], static: Points, weights: Sequence[float], title: str, out: Path) -> None:
    """Save accuracy against cost.

    Args:
        points: by method ``[K, 2]``, mean cost and accuracy; those of ``one policy`` in the order of ``weights``.
        static: static masks ``[L, 2]``, whose concave front is drawn.
        weights: cost weights, written beside the policy's points.
        title: what is seen.
        out: a PNG file.
    """
    figure, axes = _figure()
    front = concave_front(static)
    colour = STYLES["best_static"]["color"]
    axes.plot(front[:, 0], front[:, 1], color=colour, linewidth=1.5, label="static masks: front", zorder=2)
    axes.plot(static[:, 0], static[:, 1], **STYLES["best_static"], label="static masks of every size and price")
    for name, values in points.items():
        ordered = values[np.argsort(values[:, 0], kind="stable")]
        axes.plot(ordered[:, 0], ordered[:, 1], **STYLES[name], label=name)
    for end, shift in ((0, (2, 9)), (-1, (-14, 9))):  # the points between lie close together
        label, colour = f"{weights[end]:g}", STYLES["one policy"]["color"]
        axes.annotate(label, points["one policy"][end], xytext=shift, textcoords="offset points", size=8, color=colour)
    axes.set_xlabel("mean cost (everything on: 1)")
    axes.set_ylabel("accuracy on query examples of test users")
    _save(figure, axes, title, out)


def draw_spending(policy: float, curves: Mapping[str, NDArray[np.float64]], cost_weight: float, title: str, out: Path) -> None:
    """Save reward against adaptations per new user, of the policy one point and of every search a curve ``[N + 1]``."""
    figure, axes = _figure()
    for name, curve in curves.items():
        counts = _doubling(len(curve) - 1)
        axes.plot(counts, curve[counts], **STYLES[name], label=name)
    axes.axhline(policy, color=STYLES["one policy"]["color"], linewidth=1, alpha=0.5)
    axes.plot([POLICY_ADAPTATIONS], [policy], **STYLES["one policy"] | {"linestyle": "none"}, label="one policy")
    axes.set_xscale("log", base=2)
    ticks = _doubling(max(len(curve) for curve in curves.values()) - 1)
    axes.set_xticks(ticks, [str(count) for count in ticks])
    axes.set_xlabel("adaptations spent per new user")
    axes.set_ylabel(f"reward on query examples at cost weight {cost_weight:g}")
    _save(figure, axes, title, out)


def _doubling(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length())]


def _figure() -> tuple[Any, Any]:
    """A figure and its axes. Raises ``ValueError`` with the cure where matplotlib is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ValueError("the pictures need matplotlib: pip install -e '.[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=(7.2, 4.6), layout="constrained")


def _save(figure: Any, axes: Any, title: str, out: Path) -> None:
    from matplotlib import pyplot as plt

    axes.set_title(title, size=10, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    picture = BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    write_atomically(out, picture.getvalue())
    plt.close(figure)

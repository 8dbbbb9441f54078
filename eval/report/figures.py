"""The report's figures, from a summary (:mod:`eval.summary`). All are :data:`WIDE` units wide and as high as they need be."""

from typing import Any

from eval.report.axes import Frame, apart, even_ticks, linear
from eval.report.contents import EXAMPLES, Summary, measured
from eval.report.picture import Box, Mark, Path, Picture, Shape, Text
from eval.summary import KINDS

WIDE = 480.0
NAMES = 132.0
"""How much of it method names take where they stand on the left."""
LOOKS: dict[str, tuple[Shape, str]] = {
    KINDS[0]: ("diamond", "nobody"),
    KINDS[1]: ("square", "user"),
    KINDS[2]: ("triangle", "meta"),
    KINDS[3]: ("circle", "masks"),
}
"""Sign and colour by kind of method."""
SHOWN_OF_KIND = {KINDS[0]: 1, KINDS[1]: 3, KINDS[2]: 2, KINDS[3]: 4}
"""How many methods of a kind have their gains drawn, the most accurate ones."""
GROUPS = 15
"""Of users, drawn; smaller ones are put together."""


def look(name: str, summary: Summary) -> tuple[Shape, str]:
    """A method's sign and colour."""
    shape, colour = LOOKS[summary["methods"][name]["kind"]]
    return (shape, "subject") if name == summary["subject"] else (shape, colour)


def clipped(text: str, most: int = 21) -> str:
    """A text that fits its place."""
    return text if len(text) <= most else text[: most - 1] + "…"


def gains(summary: Summary) -> Picture | None:
    """How gains over base are spread over users, for the most accurate methods of each kind."""
    names = _main_methods(summary)
    if not names:
        return None
    step, top, edges = 34.0, 30.0, summary["gain_edges"]
    bottom = top + step * len(names)
    said = "; ".join(f"{name}: {summary['methods'][name]['gain']['worse']:.0%} made worse" for name in names)
    title = "Gains per user over base"
    picture = Picture(title, f"Histograms of the users' gains in accuracy, one per method. {said}.", WIDE, bottom + 42)
    scale = linear(edges[0], edges[-1], NAMES, WIDE - 62)
    Frame(picture, NAMES, top, WIDE - 62, bottom).across(
        scale, [(tick, f"{tick:+g}" if tick else "0") for tick in even_ticks(edges[0], edges[-1], 4)], "gain in accuracy"
    )
    picture.add(Text(WIDE - 4, top - 8, "made worse", "muted", 11, "end"))
    for row, name in enumerate(names):
        _gain_row(picture, summary, name, scale, top + step * (row + 1) - 2, step - 8)
    picture.add(Path([(scale(0), top - 4), (scale(0), bottom)], "muted", 1.2))
    return picture


def _gain_row(picture: Picture, summary: Summary, name: str, scale: Any, floor: float, height: float) -> None:
    """One method's histogram, standing on ``floor``."""
    method, edges = summary["methods"][name], summary["gain_edges"]
    most, colour = max(method["gain_counts"]), look(name, summary)[1]
    picture.add(Text(NAMES - 6, floor - 6, clipped(name), "ink", 12, "end", name == summary["subject"]))
    for low, high, count in zip(edges, edges[1:], method["gain_counts"], strict=False):
        if count:
            tall, said = height * count / most, f"{name}: {count} users with a gain from {low:+g} to {high:+g}"
            left, wide = scale(low), scale(high) - scale(low) - 0.5
            picture.add(Box(left, floor - tall, wide, tall, "worse" if high <= 0 else colour, title=said))
    picture.add(Text(WIDE - 4, floor - 6, f"{method['gain']['worse']:.0%}", "ink", 12, "end"))


def _main_methods(summary: Summary) -> list[str]:
    """The subject, and the most accurate of each kind but base, from the highest gain to the lowest."""
    known = {name: one for name, one in measured(summary).items() if one["gain"] and name != "base"}
    gain = {name: one["against"]["base"]["accuracy"]["mean"] for name, one in known.items()}
    chosen = {name for name in (summary["subject"], "best_static", "all_on") if name in known}
    for kind, count in SHOWN_OF_KIND.items():
        ranked = sorted((name for name in known if known[name]["kind"] == kind), key=lambda name: -gain[name])
        chosen |= set(ranked[:count])
    return sorted(chosen, key=lambda name: -gain[name])


def support_curve(summary: Summary) -> Picture | None:
    """Gain over base against number of labelled examples."""
    curves = {name: one for name, one in measured(summary).items() if one["curve"] and name != "base"}
    if not curves:
        return None
    sizes, top, right = [str(size) for size in summary["shown"]], 34.0, WIDE - 140
    bottom = top + max(220.0, 13.5 * len(curves))
    heights = [point["mean"] for one in curves.values() for point in one["curve"].values()]
    strokes = curves.get(summary["subject"], {"curve": {}})["curve"].values()
    heights += [point[end] for point in strokes for end in ("low", "high")]
    low, high = min([0.0, *heights]), max([0.01, *heights])
    across = linear(0, len(sizes) - 1, 46, right - 8)
    upright = linear(low, high, bottom - 6, top + 6)
    best = max(curves, key=lambda name: list(curves[name]["curve"].values())[-1]["mean"])
    described = f"One line per method, from {sizes[0]} to {sizes[-1]} examples. Highest at its end: {best}."
    picture = Picture("Gain by number of labelled examples", described, WIDE, bottom + 57)
    frame = Frame(picture, 46, top, right, bottom)
    frame.across(across, [(place, size) for place, size in enumerate(sizes)], EXAMPLES[0])
    picture.add(Text((46 + right) / 2, bottom + 48, EXAMPLES[1], "ink", 12, "middle"))
    ticks = [(tick, f"{tick:+g}" if tick else "0") for tick in even_ticks(low, high)]
    frame.upright(upright, ticks, "gain in accuracy over base")
    ends = {}
    for name in sorted(curves, key=lambda name: name == summary["subject"]):
        ends[name] = _curve_line(picture, summary, name, across, upright)
    labels = apart([ends[name][1] for name in ends], 13, top + 4, bottom)
    for (name, (x, y)), place in zip(ends.items(), labels, strict=True):
        shape, colour = look(name, summary)
        picture.add(Path([(x + 4, y), (right + 8, place)], colour, 0.6, 0.5), Mark(right + 13, place, shape, colour, 3.5))
        picture.add(Text(right + 20, place + 4, clipped(name), "ink", 11, bold=name == summary["subject"]))
    return picture


def _curve_line(picture: Picture, summary: Summary, name: str, across: Any, upright: Any) -> tuple[float, float]:
    """A method's line with its signs; where it ends."""
    shape, colour = look(name, summary)
    curve, mine = summary["methods"][name]["curve"], name == summary["subject"]
    places = [(across(i), upright(curve[str(size)]["mean"])) for i, size in enumerate(summary["shown"]) if str(size) in curve]
    picture.add(Path(places, colour, 2.8 if mine else 1.3, 1.0 if mine else 0.75, title=name))
    for (size, point), (x, y) in zip(curve.items(), places, strict=True):
        said = (
            f"{name}, {size} examples, {point['users']} users: {point['mean']:+.3f} [{point['low']:+.3f}, {point['high']:+.3f}]"
        )
        if mine:
            picture.add(Path([(x, upright(point["low"])), (x, upright(point["high"]))], colour, 1.2))
        picture.add(Mark(x, y, shape, colour, 4 if mine else 2.6, said))
    return places[-1]


def gate_rates(summary: Summary) -> Picture | None:
    """Which groups of users have which pathways on, under the subject."""
    subject = summary["subject"]
    rates = subject and summary["methods"][subject]["gate_rates"]
    if not rates:
        return None
    rows, names = _largest(rates), summary["pathways"]
    step, top = 26.0, 88.0
    wide = (WIDE - NAMES - 6) / len(names)
    picture = Picture(f"Which pathways {subject} switches on", _rates_said(rows, names), WIDE, top + step * len(rows) + 26)
    picture.add(Text(4, 14, "group of users (rows), by pathway", "ink", 12))
    for column, name in enumerate(names):
        x = NAMES + wide * (column + 0.5)
        height = 74 - 14 * (column % 3 if wide < 7 * max(map(len, names)) else 0)
        picture.add(Path([(x, height + 4), (x, top - 2)], "grid", 1), Text(x, height, clipped(name, 14), "muted", 11, "middle"))
    for row, (group, one) in enumerate(rows.items()):
        y = top + step * row
        counted = f" ({one['rows']})"
        picture.add(Text(NAMES - 6, y + 17, clipped(group, 20 - len(counted)) + counted, "ink", 11.5, "end"))
        for column, rate in enumerate(one["on"]):
            x, said = NAMES + wide * column, f"{group}, {names[column]}: on for {rate:.0%}"
            picture.add(Box(x, y, wide - 1, step - 1, "grid", 0.5), Box(x, y, wide - 1, step - 1, "heat", rate, said))
            if wide >= 20:
                picture.add(Text(x + wide / 2, y + 17, f"{100 * rate:.0f}", "ink", 11, "middle"))
    picture.add(Text(WIDE - 6, top + step * len(rows) + 17, "share of users with the pathway on, %", "ink", 12, "end"))
    return picture


def _largest(rates: dict[str, Any]) -> dict[str, Any]:
    """The largest groups, the others put together, sorted by how much is on."""
    ranked = sorted(rates, key=lambda group: -rates[group]["rows"])
    kept, rest = ranked[:GROUPS], ranked[GROUPS:]
    rows = {group: rates[group] for group in sorted(kept, key=lambda group: sum(rates[group]["on"]))}
    if rest:
        count = sum(rates[group]["rows"] for group in rest)
        pathways = zip(*([rates[group]["rows"] * on for on in rates[group]["on"]] for group in rest), strict=True)
        rows["all others"] = {"rows": count, "on": [sum(each) / count for each in pathways]}
    return rows


def _rates_said(rows: dict[str, Any], names: list[str]) -> str:
    """For each group the pathway most often on."""
    most = {group: max(range(len(names)), key=lambda column: one["on"][column]) for group, one in rows.items()}
    said = "; ".join(f"{group}: {names[most[group]]} ({one['on'][most[group]]:.0%})" for group, one in rows.items())
    return f"Heat map of shares of users. Most often on: {said}."

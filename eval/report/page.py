"""``report.html``: one file that needs no other, no script and no network, for wide and narrow, bright and dark screens."""

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from eval.report import figures, fronts, timing
from eval.report.contents import Summary, tables
from eval.report.picture import COLOURS, Picture
from eval.report.sentences import lead, sentences
from eval.report.tables import inline_html

READ = {
    "fronts": "Lines: a method's Pareto front over the cost weights; large signs: at the cost weight of the tables. Numbers "
    "rank by accuracy; a method of fewer users stands as far from the subject as on the users of both. Behind the break costs "
    "stand by ratios.",
    "gains": "Each row a histogram of users, scaled by itself; the most accurate methods of each kind.",
    "curve": "Steps between numbers of examples are even. Users with fewer examples drop out, so that points are of different "
    "users; how many is said where the pointer rests. The vertical strokes are 95 % intervals.",
    "gates": "The darker, the more users of the group have the pathway on. In brackets: rows.",
    "personalising": "Bars and strokes: median (quartiles).",
    "predicting": "Signs and strokes: median (quartiles).",
}
"""How to read each figure."""
_STYLE = """
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:76rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0}
h2{font-size:1.15rem;margin:2rem 0 .4rem}
p,li{max-width:72ch}
code{font-size:.9em;background:var(--shade);border-radius:3px;padding:0 .25em}
.note,figcaption{color:var(--muted);font-size:.9rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));gap:1.5rem;align-items:start}
figure{margin:0;min-width:0}
figure h3{font-size:1rem;margin:0 0 .3rem}
svg{display:block;width:100%;height:auto;font-family:inherit}
.scroll{overflow-x:auto;border:1px solid var(--grid);border-radius:6px}
.scroll:focus-visible{outline:2px solid var(--masks)}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:.3rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}
th{font-weight:500;text-align:left}
thead th{color:var(--muted);text-align:right;vertical-align:bottom}
thead th:first-child{text-align:left}
tbody th[scope=row]{position:sticky;left:0;background:var(--paper)}
.group th{background:var(--shade);font-weight:600}
.strong th,.strong td{font-weight:700}
details{margin:2rem 0}
@media(max-width:40rem){th[scope=row]{white-space:normal;min-width:6rem;max-width:9rem}}
@media print{.scroll{overflow:visible}}
"""


def style() -> str:
    """The page's style: the named colours, bright and dark, and the layout."""
    bright, dark = ("".join(f"--{name}:{each[side]};" for name, each in COLOURS.items()) for side in (0, 1))
    dark_rule = f"@media(prefers-color-scheme:dark){{:root{{{dark}--shade:#22272e}}}}"
    return f":root{{color-scheme:light dark;{bright}--shade:#f2f4f7}}{dark_rule}{_STYLE}"


def pictures(summary: Summary) -> dict[str, Picture]:
    """The figures that there are rows for, by short names."""
    every = {
        "fronts": fronts.accuracy_against_cost(summary),
        "gains": figures.gains(summary),
        "curve": figures.support_curve(summary),
        "gates": figures.gate_rates(summary),
        "personalising": timing.personalising(summary),
        "predicting": timing.predicting(summary),
    }
    return {name: picture for name, picture in every.items() if picture is not None}


def page(summary: Summary) -> str:
    """The whole HTML file."""
    title = escape(f"Ways to personalise: {summary['env']}")
    points = "\n".join(f"<li>{inline_html(sentence)}</li>" for sentence in sentences(summary))
    drawn = "\n".join(_figure(name, picture) for name, picture in pictures(summary).items())
    written = "\n".join(table.to_html() for table in tables(summary))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style()}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>{inline_html(lead(summary))}</p>
<h2>In short</h2>
<ul>
{points}
</ul>
<h2>Figures</h2>
<div class="figures">
{drawn}
</div>
{written}
{_settings(summary["methods"])}
</main>
</body>
</html>
"""


def _figure(name: str, picture: Picture) -> str:
    heading = f"<h3>{escape(picture.title)}</h3>"
    return f"<figure>{heading}{picture.to_svg(name)}<figcaption>{escape(READ[name])}</figcaption></figure>"


def _settings(methods: Mapping[str, Any]) -> str:
    """Every method's hyperparameters, folded away."""
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(json.dumps(method["settings"]))}</td></tr>'
        for name, method in methods.items()
    )
    return (
        '<details><summary>Hyperparameters</summary><div class="scroll" tabindex="0" role="region" '
        f'aria-label="Hyperparameters"><table><tbody>\n{rows}\n</tbody></table></div></details>'
    )

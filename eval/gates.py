"""A picture of which users get which pathways: ``python -m eval.gates RUN --out gates.png``.

Reads the ``users.csv`` of evaluated runs; needs matplotlib (extra ``plot``).
"""

import argparse
import csv
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agents.run import RunConfig
from backbones.artefacts import ArtefactError, write_atomically


def gate_rates(folders: list[Path], fact: str) -> dict[str, tuple[int, NDArray[np.float64]]]:
    """By value of a column: number of users, and the share of them that have each pathway on ``[P]``.

    Users with several values at once ("inverted+noisy") are put together as "several".

    Raises:
        FileNotFoundError: if a run was not evaluated yet. ValueError: if the column does not exist.
    """
    masks: dict[str, list[list[int]]] = {}
    for folder in folders:
        if not (folder / "users.csv").exists():
            raise FileNotFoundError(f"{folder} has no users.csv; run python -m agents.evaluate {folder} first.")
        with (folder / "users.csv").open() as file:
            for row in csv.DictReader(file):
                if fact not in row:
                    raise ValueError(f"users.csv has no column {fact!r}; choose from {', '.join(list(row)[:6])}, ...")
                value = "several" if "+" in row[fact] else row[fact]
                masks.setdefault(value, []).append([int(bit) for bit in row["ppo_mask"]])
    order = sorted(masks, key=lambda value: (value == "several", np.mean(masks[value])))
    return {value: (len(masks[value]), np.mean(masks[value], axis=0)) for value in order}


def draw(rates: dict[str, tuple[int, NDArray[np.float64]]], pathways: list[str], title: str, out: Path) -> None:
    """Save a heat-map, groups of users by pathways, as PNG."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ValueError("the picture needs matplotlib: pip install -e '.[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    values = np.stack([rate for _, rate in rates.values()])
    figure, axes = plt.subplots(figsize=(7.2, 0.42 * len(rates) + 1.4), layout="constrained")
    axes.imshow(values, cmap="Greens", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        axes.text(column, row, f"{value:.0%}", ha="center", va="center", color="white" if value > 0.6 else "black", size=8)
    axes.set_xticks(range(len(pathways)), pathways)
    axes.set_yticks(range(len(rates)), [f"{name.replace('_', ' ')} ({count})" for name, (count, _) in rates.items()])
    axes.set_title(title, size=10, loc="left")
    axes.set_frame_on(False)
    axes.tick_params(length=0)
    picture = BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    write_atomically(out, picture.getvalue())
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.gates", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of evaluated runs, put together")
    parser.add_argument("--by", default="shifts", help="column of users.csv that groups users (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("gates.png"), help="(default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        config = RunConfig.load(args.runs[0])
        rates = gate_rates(args.runs, args.by)
        pathways = list(config.scenario(args.runs[0]).pathways)
        draw(rates, pathways, f"share of test users with each pathway on, {config.env}", args.out)
    except (ValueError, OSError, ArtefactError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()

"""What a step of the environments costs: ``python -m eval.bench env``, ``masks`` or ``scale``.

``env``: steps per second and time to a trained policy, against PEFT the usual way and against our own way one user at a
time (needs the extra ``bench``). ``masks``: operations of a batched adaptation against what is on. ``scale``: cost per step
and memory from 100 to 100,000 users. Each prints its tables; ``--write`` puts them into a page.
"""

import argparse
import json
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from backbones.artefacts import ArtefactError, write_atomically
from backbones.threads import usable_cores
from eval.bench.clock import machine
from eval.bench.masks import masks_table, measure_masks
from eval.bench.scale import measure_scale, scale_table
from eval.headline import write_between_markers

SECTIONS = ("env", "masks", "scale")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("section", choices=SECTIONS, help="what is measured")
    parser.add_argument("--data-root", type=Path, help="env: folder of the data sets, for popquorn (default: $DSA_DATA_ROOT)")
    parser.add_argument("--num-threads", type=int, default=usable_cores(), help="torch threads (default: the cores, at most 4)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--write", type=Path, help="page with the section's markers to write the tables into")
    return parser.parse_args(arguments)


def measured(section: str, data_root: Path | None = None) -> tuple[Any, str]:
    """One section's figures, JSON-able, and its text.

    Raises:
        ImportError: without PEFT, which the usual way needs.
    """
    if section == "masks":
        by_placement = measure_masks()
        return by_placement, f"{machine()}.\n\n{masks_table(by_placement)}"
    if section == "scale":
        rows = measure_scale()
        return rows, f"{machine()}.\n\n{scale_table(rows)}"
    if find_spec("peft") is None:
        raise ImportError("the usual way needs PEFT: pip install 'dynamic-sparse-adapters[bench]'.")
    from eval.bench.env import measure_envs
    from eval.bench.env_table import env_table

    found = measure_envs({"dsa/PopquornBert-v0": {"data_root": str(data_root)}} if data_root else None)
    return found, env_table(found)


def markers(section: str) -> tuple[str, str]:
    """The lines of a page between which a section's tables go."""
    return f"<!-- bench {section}: begin -->", f"<!-- bench {section}: end -->"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    args = parse(arguments)
    torch.set_num_threads(args.num_threads)
    try:
        found, text = measured(args.section, args.data_root)
        text = f"{text}\n\nWritten by `{shlex.join(['python', '-m', 'eval.bench', args.section])}`."
        print(text)
        if args.json:
            write_atomically(args.json, json.dumps(found, indent=1).encode())
        if args.write:
            write_between_markers(args.write, text, *markers(args.section))
    except (ValueError, ImportError, OSError, FloatingPointError, ArtefactError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

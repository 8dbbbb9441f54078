"""What steps, serving and privacy cost: ``python -m eval.bench env``, ``masks``, ``scale``, ``serving`` or ``private``.

``env``: steps per second and time to a trained policy, against PEFT the usual way and against our own way one user at a
time (needs the extra ``bench``). ``masks``: operations of a batched adaptation against what is on. ``scale``: cost per step
and memory from 100 to 100,000 users. ``serving``: trained runs that may end inference early against the bare model
(``--runs``), users on disk and in memory (``--stored``), users who change (``--changed``), many users' low-rank updates in
one batch against PEFT (needs the extras ``bench`` and ``offline-text``). ``private``: a private round of meta-training against
a plain one, and its memory (needs the extra ``privacy``). Each prints its tables; ``--write`` puts them into
a page.
"""

import argparse
import json
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from agents.run import RunConfig
from backbones.artefacts import ArtefactError, write_atomically
from eval.bench.clock import machine
from eval.bench.masks import masks_table, measure_masks
from eval.bench.private import measure_private, private_table
from eval.bench.scale import measure_scale, scale_table
from eval.pages import page_with_markers, write_between_markers
from meta.arguments import add_num_threads

SECTIONS = ("env", "masks", "scale", "serving", "private")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("section", choices=SECTIONS, help="what is measured")
    parser.add_argument("--data-root", type=Path, help="env: folder of the data sets, for popquorn (default: $DSA_DATA_ROOT)")
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="serving: runs whose gates may exit")
    parser.add_argument(
        "--repeats", type=int, default=15, help="serving: of a timed batch of --runs, at least (default: %(default)s)"
    )
    parser.add_argument("--stored", type=Path, help="serving: a run whose users are stored")
    parser.add_argument("--changed", type=Path, help="serving: a run whose users' shifts change")
    parser.add_argument("--users", type=int, default=1_000_000, help="serving: in the largest store (default: %(default)s)")
    add_num_threads(parser)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--write", type=Path, help="page with the section's markers to write the tables into")
    return parser.parse_args(arguments)


def measured_serving(args: argparse.Namespace) -> tuple[Any, str]:
    """The section ``serving``: those of its parts for which runs are given, and the one that needs none.

    The file of ``--json`` holds what was measured so far after each part, whatever becomes of the others.

    Raises:
        ImportError: without PEFT or MiniLM's package. FileNotFoundError: for a folder that is no run. ValueError: for runs that
            cannot be measured, and numbers below 1.
    """
    for name in ("repeats", "users"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if find_spec("peft") is None:
        raise ImportError("its rivals need PEFT: pip install -e '.[bench]'.")
    from eval.bench.changed import changed_table, measure_changed
    from eval.bench.exits import exits_table, measure_exits
    from eval.bench.exits_pooled import pooled, pooled_table
    from eval.bench.many_loras import loras_table, measure_loras
    from eval.bench.residents import measure_residents, residents_table
    from eval.bench.stored import measure_stored, stored_table

    for folder in filter(None, (args.stored, args.changed)):  # known to be wrong now, not in an hour
        RunConfig.load(folder)
    found: dict[str, Any] = {}
    parts = {"": f"{machine()}."}
    if args.runs:
        found["exits"] = measure_exits(args.runs, args.repeats)
        found["pooled"] = pooled(found["exits"])
        parts["Masks that end early"] = exits_table(found["exits"])
        if found["pooled"]:
            parts["The same, runs together"] = pooled_table(found["pooled"])
        _keep(args, found)
    found["loras"] = measure_loras()
    parts["Many users in one batch"] = loras_table(found["loras"])
    _keep(args, found)
    if args.stored:
        found["stored"] = measure_stored(args.stored, (min(1_000, args.users), args.users))
        found["residents"] = measure_residents(args.stored)
        parts["Users on disk and in memory"] = f"{stored_table(found['stored'])}\n\n{residents_table(found['residents'])}"
        _keep(args, found)
    if args.changed:
        found["changed"] = measure_changed(args.changed)
        parts["Users who change"] = changed_table(found["changed"])
    return found, "\n\n".join(f"### {title}\n\n{text}" if title else text for title, text in parts.items())


def _keep(args: argparse.Namespace, found: Any) -> None:
    if args.json:
        write_atomically(args.json, json.dumps(found, indent=1).encode())


def measured(args: argparse.Namespace) -> tuple[Any, str]:
    """One section's figures, JSON-able, and its text.

    Raises:
        ImportError: without PEFT, which the usual way needs.
    """
    section, data_root = args.section, args.data_root
    if section == "serving":
        return measured_serving(args)
    if section == "private":
        rounds = measure_private()
        return rounds, f"{machine()}.\n\n{private_table(rounds)}"
    if section == "masks":
        by_placement = measure_masks()
        return by_placement, f"{machine()}.\n\n{masks_table(by_placement)}"
    if section == "scale":
        rows = measure_scale()
        return rows, f"{machine()}.\n\n{scale_table(rows)}"
    if find_spec("peft") is None:
        raise ImportError("the usual way needs PEFT: pip install -e '.[bench]'.")
    from eval.bench.env import measure_envs
    from eval.bench.env_table import env_table

    found = measure_envs({"dsa/PopquornBert-v0": {"data_root": str(data_root)}} if data_root else None)
    return found, env_table(found)


def _told(args: argparse.Namespace) -> list[str]:
    """The arguments that the figures depend on."""
    runs = ["--runs", *map(_shown, args.runs), "--repeats", str(args.repeats)] if args.runs else []
    for name in ("stored", "changed"):
        runs += [f"--{name}", _shown(getattr(args, name))] if getattr(args, name) else []
    if args.stored:
        runs += ["--users", str(args.users)]
    return [args.section, *runs]


def _shown(folder: Path) -> str:
    """A folder as pages name it: where it lies on this machine is nobody's business."""
    return folder.name if folder.is_absolute() else str(folder)


def markers(section: str) -> tuple[str, str]:
    """The lines of a page between which a section's tables go."""
    return f"<!-- bench {section}: begin -->", f"<!-- bench {section}: end -->"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    args = parse(arguments)
    torch.set_num_threads(args.num_threads)
    try:
        if args.write:
            page_with_markers(args.write, *markers(args.section))
        found, text = measured(args)
        text = f"{text}\n\nWritten by `{shlex.join(['python', '-m', 'eval.bench', *_told(args)])}`."
        print(text)
        _keep(args, found)
        if args.write:
            write_between_markers(args.write, text, *markers(args.section))
    except (ValueError, ImportError, OSError, FloatingPointError, ArtefactError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

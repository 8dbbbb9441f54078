"""What each part of the user embedding adds: ``python -m eval.ablation --write docs/embedding.md``.

Trains the gating policy with every part left out in turn, with each alone, and with all of them; reports the query reward of
val users at the policy that was kept. Runs that are finished are not repeated.
"""

import argparse
import shlex
import sys
from pathlib import Path

import numpy as np

from agents.checkpoint import POLICY
from backbones.artefacts import load_artefact
from eval.headline import FURTHER, finished
from eval.pages import write_between_markers
from users.embedding import DEFAULT, PARTS

BEGIN, END = "<!-- ablation: begin -->", "<!-- ablation: end -->"


def variants() -> dict[str, tuple[str, ...]]:
    """By title: the parts."""
    found = {"default (all but prototypes)": DEFAULT, "all parts": PARTS}
    found |= {f"default without {part}": tuple(p for p in DEFAULT if p != part) for part in DEFAULT}
    return found | {f"{part} alone": (part,) for part in PARTS}


def kept_reward(folder: Path) -> float:
    """Query reward of val users at the policy that the run kept."""
    return float(load_artefact(folder / "policy", POLICY)[1]["val_reward"])


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.ablation", description=__doc__, epilog=FURTHER)
    parser.add_argument("--env", default="dsa/DigitsResNet-v0", help="environment id (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (default: %(default)s)")
    parser.add_argument("--cost-weight", type=float, default=0.1, help="(default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("logs/ablation"), help="folder of the runs (default: %(default)s)")
    parser.add_argument("--write", type=Path, help="page with markers to write the table into (default: print only)")
    args, extra = parser.parse_known_args(arguments)
    lines = ["| parts of the embedding | reward of val users, mean of the seeds | each seed |", "| --- | --- | --- |"]
    for title, parts in variants().items():
        rewards = []
        for seed in range(args.seeds):
            flags = ["--env-kwargs", f"embedding:[{', '.join(parts)}]", *extra]
            folder = finished(args.runs / f"{'-'.join(parts)}-seed{seed}", args.env, seed, args.cost_weight, flags)
            rewards.append(kept_reward(folder))
        lines.append(f"| {title} | {np.mean(rewards):.4f} | {', '.join(f'{reward:.4f}' for reward in rewards)} |")
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "eval.ablation", *given])
    text = "\n".join([f"`{args.env}`, cost weight {args.cost_weight:g}. Written by `{command}`.", "", *lines])
    print(text)
    if args.write:
        write_between_markers(args.write, text, BEGIN, END)


if __name__ == "__main__":
    main()

"""What batching brings: ``python -m eval.bench``.

Adaptations per second of the digits environment's own inner loop, for 64 users in one tensor program and for the same
users one at a time, in alternating order in one run; medians of several repeats with their range.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from backbones import make_backbone
from backbones.pathways import make_pathways
from backbones.threads import usable_cores
from envs.oracles import LiveOracle
from meta.inner import MetaInit
from users.batch import Prepared
from users.digits import digits_population

MASKS = {"all_on": "1111111", "last three": "0000111", "head alone": "0000001"}


def seconds(function: Callable[[], None]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_mask(batched: LiveOracle, single: LiveOracle, mask: str, users: int, repeats: int) -> dict[str, float]:
    """Adaptations per second of both ways (median, least, most) and the median ratio."""
    who = np.arange(users)
    plans = np.repeat(np.array([[[bit == "1" for bit in mask]]]), users, axis=0)

    def run(oracle: LiveOracle) -> None:
        oracle.measure(who, plans, ("validation",))

    for way in (batched, single):  # warm up, and compute the frozen part
        run(way)
    pairs = []
    for repeat in tqdm(range(repeats), desc=f"mask {mask}", unit="pair"):
        ways = [batched, single] if repeat % 2 else [single, batched]
        times = {id(way): seconds(partial(run, way)) for way in ways}
        pairs.append((users / times[id(batched)], users / times[id(single)]))
    rates = np.array(pairs)
    middle, low, high = np.median(rates, 0), rates.min(0), rates.max(0)
    return {
        "batched": middle[0],
        "batched_low": low[0],
        "batched_high": high[0],
        "one_at_a_time": middle[1],
        "one_low": low[1],
        "one_high": high[1],
        "ratio": float(np.median(rates[:, 0] / rates[:, 1])),
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.bench", description=__doc__)
    parser.add_argument("--users", type=int, default=64, help="users (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of runs (default: %(default)s)")
    parser.add_argument("--num-threads", type=int, default=usable_cores(), help="torch threads (default: the cores, at most 4)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.num_threads)
    population = digits_population(train_users=args.users, val_users=1, test_users=1)
    pathways = make_pathways("inline", make_backbone("resnet-small", num_classes=10))
    init = MetaInit(pathways.start(0), torch.full((3, 7), 0.1), torch.ones(7, dtype=torch.bool))
    batched, single = (LiveOracle(Prepared(pathways, population), init, chunk) for chunk in (args.users, 1))
    found = {name: measure_mask(batched, single, mask, args.users, args.repeats) for name, mask in MASKS.items()}
    print(f"adaptations per second, {args.users} users, {args.num_threads} threads; median (least - most)\n")
    print("| pathways on | batched | one user at a time | ratio |\n| --- | --- | --- | --- |")
    for name, row in found.items():
        fast = f"{row['batched']:.0f} ({row['batched_low']:.0f} - {row['batched_high']:.0f})"
        slow = f"{row['one_at_a_time']:.0f} ({row['one_low']:.0f} - {row['one_high']:.0f})"
        print(f"| {name} | {fast} | {slow} | {row['ratio']:.1f} |")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

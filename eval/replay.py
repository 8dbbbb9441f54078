"""Whether the rows of a results folder reproduce: ``python -m eval.replay results/results.csv``.

First every row's own check is looked at, which names rows that were edited by hand, and rows that are there twice are named.
Then a sample of the rows (or all) is measured again, from the same commands and settings, and compared, and what is missing at
the places (seeds and folds) of these rows is named. Exit code 1 if anything differs.

Rows reproduce on the same kind of processor. On another one, where torch adds in another order, those of a backbone that was
trained here (digits, unipen) differ: training multiplies rounding. Pretrained ones are not trained.
"""

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from backbones.artefacts import ArtefactError
from envs.scenario import forget_scenarios
from eval.plan import Job, Place, Plan
from eval.results import BINS, COLUMNS, KEY, altered, format_cell, format_row, rows_of
from eval.rows import Measuring
from meta.arguments import add_data_root, add_num_threads, show_log, use_data_root

Key = tuple[str, ...]
NAMED = 5
"""Users, of those without a row."""
EXACT = ("status", "mask", "examples", "labels", "adaptations", "trainable", "active", "stored", "group")
CLOSE = {"cost": 1e-9, "active_fraction": 1e-9, "log_likelihood": 1e-3}
"""How far a figure may be off: sizes by rounding, log-likelihoods by rounding in another order of users."""
FLIPS = 1
"""Query examples whose two best classes may change places by rounding: the accuracy may be off by their share (and
the reward with it), the hits that calibration counts by their number."""
CONFIDENCE = 1e-3
"""By what share a sum of confidences may be off."""


def plan_of(folder: Path) -> Plan:
    """The plan that a results folder was made by. Raises ``ValueError`` if there is none that this version reads."""
    path = folder / "plan.json"
    if not path.exists():
        raise ValueError(f"{folder} has no plan.json; give the results.csv of a folder that eval.run wrote.")
    return Plan.stored(folder)[0]


def differences(row: Mapping[str, str], again: Mapping[str, str]) -> list[str]:
    """What differs between a row and the same row measured again, in words; empty: it reproduces."""
    found = [f"{name} {row[name] or '-'} is now {again[name] or '-'}" for name in EXACT if row[name] != again[name]]
    if row["status"] != "ok" or again["status"] != "ok":
        return found
    if wrong := [name for name in ("accuracy", "reward", *CLOSE) if not _is_number(row[name]) and again[name]]:
        return [*found, f"{wrong[0]} is {row[wrong[0]] or '-'}, which is no number"]
    flipped = FLIPS / max(1.0, float(again["examples"]))
    for name, room in {"accuracy": flipped, **CLOSE}.items():
        if _apart(row[name], again[name], room):
            found.append(f"{name} {row[name] or '-'} is now {again[name] or '-'}")
    due = float(row["accuracy"]) + float(again["reward"]) - float(again["accuracy"])
    if abs(float(row["reward"]) - due) > CLOSE["cost"]:  # a flip moves it exactly as far as the accuracy
        found.append(f"reward {row['reward']} is now {due}, by the row's accuracy")
    if not calibrated_alike(row["calibration"], again["calibration"]):
        found.append(f"calibration {row['calibration']} is now {again['calibration']}")
    return found


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def _apart(one: str, other: str, room: float) -> bool:
    """Whether two cells of numbers differ by more than rounding makes them; an empty one differs from all others."""
    return one != other and ("" in (one, other) or abs(float(one) - float(other)) > room + 1e-12)


def calibrated_alike(one: str, other: str) -> bool:
    """Whether two cells of calibration (:func:`eval.measure.calibration`) differ by no more than rounding makes them.

    An example at the edge of a bin may change bins, so that only totals are alike; and what the expected calibration error
    adds up, how far each bin's hits are from its confidences, may move by two for that example and by one for each flip.
    """
    try:
        counts, sums, hits = zip(*(_bins(cell) for cell in (one, other)), strict=True)
    except ValueError:  # what it should be instead is said by the caller
        return False
    gaps = [np.abs(hit - total).sum() for hit, total in zip(hits, sums, strict=True)]
    return bool(
        counts[0].sum() == counts[1].sum()
        and abs(hits[0].sum() - hits[1].sum()) <= FLIPS
        and abs(sums[0].sum() - sums[1].sum()) <= CONFIDENCE * sums[1].sum() + 1e-12
        and abs(gaps[0] - gaps[1]) <= 2 + FLIPS + CONFIDENCE * sums[1].sum()
    )


def _bins(cell: str) -> NDArray[np.float64]:
    """Counts, sums of confidences and hits ``[3, BINS]``. Raises ``ValueError`` for a cell that holds something else."""
    return np.array(cell.replace(":", ";").split(";"), np.float64).reshape(BINS, 3).T


def replayed(
    plan: Plan, rows: Sequence[Mapping[str, str]], there: Collection[Key]
) -> tuple[dict[int, list[str]], dict[str, int]]:
    """By position among the rows, what differs when they are measured again; only rows that do differ.

    Also returned: at their places, jobs of the plan of which rows are not ``there``, in words, and how many.
    """
    missing: dict[str, int] = {}
    by_place: dict[tuple[str, str], list[int]] = defaultdict(list)
    wrong: dict[int, list[str]] = {}
    places = {(str(place.seed), "" if place.fold is None else str(place.fold)) for place in plan.places}
    jobs = {tuple(format_cell(part) for part in (job.method, job.cost_weight, job.shown)) for job in plan.jobs()}
    for number, row in enumerate(rows):
        if (row["seed"], row["fold"]) in places and (row["method"], row["cost_weight"], row["shown"]) in jobs:
            by_place[row["seed"], row["fold"]].append(number)
        else:
            wrong[number] = ["the plan has no such place, method, cost weight or size of support"]
    for (seed, fold), numbers in tqdm(by_place.items(), desc="measuring again", unit="place"):
        place = Place(int(seed), int(fold) if fold else None)
        measuring = Measuring(plan, place, plan.scenario(place))
        again = _again(measuring, [rows[n] for n in numbers])
        for number in numbers:
            key = _key(rows[number])
            found = differences(rows[number], again[key]) if key in again else ["it is not measured any more"]
            if found:
                wrong[number] = found
        missing |= absent(measuring, there)
        forget_scenarios()
    return wrong, missing


def absent(measuring: Measuring, there: Collection[Key]) -> dict[str, int]:
    """Jobs of a plan that have users without a row at a place, in words, and how many these are."""
    found, place = {}, measuring.place
    for job in measuring.plan.jobs():
        method = measuring.plan.method(job.method)
        if method.refuses(measuring.world):
            continue
        ids = measuring.shown(method, job.shown).ids
        key = [format_cell(part) for part in (place.seed, place.fold, job.method, job.cost_weight, job.shown)]
        lost = [ids[user] for user in measuring.users(method, job.shown) if (*key, ids[user]) not in there]
        if lost:
            names = ", ".join(lost[:NAMED]) + ", ..." * (len(lost) > NAMED)
            found[f"{_named(dict(zip(KEY, key, strict=False)))}: no row of {len(lost)} users ({names})"] = len(lost)
    return found


def _again(measuring: Measuring, rows: Sequence[Mapping[str, str]]) -> dict[Key, dict[str, str]]:
    wanted = {_key(row) for row in rows}
    jobs = {(row["method"], row["cost_weight"], row["shown"]) for row in rows}
    found = {}
    for method, weight, shown in sorted(jobs):
        job = Job(method, float(weight) if weight else None, int(shown) if shown else None)
        for values in measuring.rows(job, lambda key: key not in wanted):
            row = format_row({**dict.fromkeys(COLUMNS[:-1]), **values})
            found[_key(row)] = row
    return found


def _key(row: Mapping[str, str]) -> Key:
    return row["method"], row["cost_weight"], row["shown"], row["user"]


def _named(row: Mapping[str, str]) -> str:
    return " ".join(f"{name}={row[name]}" for name in KEY if row.get(name))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="results.csv of a results folder")
    parser.add_argument("--sample", type=int, default=50, help="rows to measure again; 0: all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    add_num_threads(parser)
    add_data_root(parser)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.num_threads)
    show_log()
    use_data_root(args)
    try:
        bad = check(args.results, args.sample, args.seed)
    except (ValueError, ImportError, OSError, FloatingPointError, ArtefactError) as error:
        sys.exit(f"error: {error}")
    if bad:
        sys.exit(f"{bad} rows do not hold, or are missing.")


def check(path: Path, sample: int, seed: int) -> int:
    """Look at every row's check and measure a sample again; prints what is wrong or missing and returns how many rows are."""
    path = path / "results.csv" if path.is_dir() else path
    plan, numbered = plan_of(path.parent), list(rows_of(path))
    edited = altered(numbered)
    for line in edited:
        print(f"line {line}: edited by hand, its check does not match")
    first: dict[Key, int] = {}
    twice = [line for line, row in numbered if first.setdefault(tuple(row[name] for name in KEY), line) != line]
    for line in twice:
        print(f"line {line}: the row is there twice")
    if sample < 0:
        raise ValueError(f"--sample must be a number of rows, or 0 for all, got {sample}.")
    if 0 < sample < len(numbered):
        drawn = np.random.default_rng(seed).choice(len(numbered), sample, replace=False)
        numbered_again = [numbered[n] for n in np.sort(drawn)]
    else:
        numbered_again = numbered
    wrong, missing = replayed(plan, [row for _, row in numbered_again], first.keys())
    for place, found in wrong.items():
        line, row = numbered_again[place]
        print(f"line {line}: {_named(row)} does not reproduce: {'; '.join(found)}")
    for said in missing:
        print(said)
    print(f"{len(numbered)} rows, {len(edited)} edited; {len(numbered_again)} measured again, {len(wrong)} do not reproduce")
    return len({*edited, *twice, *(numbered_again[place][0] for place in wrong)}) + sum(missing.values())


if __name__ == "__main__":
    main()

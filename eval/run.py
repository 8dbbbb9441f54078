"""Every way of personalising, measured by the same code: ``python -m eval.run --env dsa/DigitsResNet-v0 --out results``.

Fits every method on train users (choices on val users), personalises every test user by it, and writes ``results.csv`` (a row
per method, seed and user), ``summary.json``, ``report.html``, the tables as ``results.md`` and TensorBoard's event files. The
same command goes on where it was stopped; with further methods or seeds it adds them, and a method that was tuned or mended
since is measured anew with ``--again``. Exit code 1: some rows failed, the report says which.
"""

import argparse
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from backbones.artefacts import ArtefactError, write_atomically
from backbones.registry import did_you_mean
from backbones.threads import begin_worker, usable_cores
from dynamic_sparse_adapters import __version__
from envs.scenario import forget_scenarios
from eval.choosers import choosers_of
from eval.methods import METHODS, make_method, method_class, split_names
from eval.parts import Part, count_rows, forget, put_together, seconds_spent
from eval.plan import BASE, Job, Place, Plan
from eval.report import write_report
from eval.results import FORMAT, read_results
from eval.rows import Measuring, out_of_memory, single_thread
from eval.run_facts import TIMING, ResultsError, read_run
from eval.timing import forget_times, time_methods
from eval.tuned import borrowed, name_alone, settings_for, timed_entry, tuning
from eval.world import PLACES, code_hash
from meta.arguments import add_data_root, at_least_one, parse_pairs, show_log, use_data_root

LOG = logging.getLogger("dsa")
SHOWN = (0, 1, 2, 5, 10, 20, 50, 100, 200)
CURVE = (
    "intercept",
    "head",
    "prototypes",
    "item_covariance",
    "lora",
    "all_on",
    "best_static",
    "gradient_norm",
    "per_pcs",
    "shuffled",
    "ppo",
)
"""Methods that are shown supports of other sizes unless it is said which: one or two of every kind."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", default="dsa/DigitsResNet-v0", help="environment id (default: %(default)s)")
    parser.add_argument(
        "--env-kwargs", action="extend", nargs="+", default=[], metavar="NAME:VALUE", help="argument of the environment"
    )
    parser.add_argument("--methods", help="names, joined by commas (default: all that apply)")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 (default: %(default)s)")
    parser.add_argument("--folds", type=int, default=0, help="how many folds the environment has (default: none)")
    parser.add_argument("--cost-weight", type=float, default=0.1, help="the one that tables are about (default: %(default)s)")
    parser.add_argument("--cost-weights", type=float, nargs="+", default=list(Plan.cost_weights), help="for the Pareto fronts")
    parser.add_argument(
        "--shown", type=int, nargs="*", default=list(SHOWN), help="sizes of support on the curve; none: no curve"
    )
    parser.add_argument("--curve", help="methods on the curve, joined by commas (default: some of every kind)")
    parser.add_argument(
        "--slow-users", type=int, default=60, help="test users, of every fold, where training goes through a text backbone (60)"
    )
    parser.add_argument("--slow-seeds", type=int, default=2, help="seeds where training goes through a text backbone (2)")
    parser.add_argument(
        "--few-shown", type=int, nargs="+", default=list(Plan.few_shown), help="sizes of support there (default: 0 2 10)"
    )
    add_data_root(parser)
    parser.add_argument(
        "--workers", type=at_least_one, default=usable_cores(), help="processes of one thread each (default: the cores)"
    )
    parser.add_argument("--timing", action=argparse.BooleanOptionalAction, default=True, help="measure seconds and memory too")
    parser.add_argument("--again", help="methods whose rows in --out are thrown away first, and those that lean on them")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; an unfinished run there goes on")
    return parser.parse_args(arguments)


def read_plan(args: argparse.Namespace) -> Plan:
    """What the command line asks for. Raises ``ValueError`` with a suggestion for unknown names."""
    names = split_names(args.methods) if args.methods else list(METHODS)
    names = [BASE, *(name for name in names if name != BASE)]
    kwargs = parse_pairs(args.env_kwargs, "--env-kwargs")
    if others := borrowed(args.env, kwargs, names):
        LOG.info(
            "hyperparameters found in %s without these arguments: %s (%s finds others)",
            args.env,
            ", ".join(others),
            tuning(args.env, kwargs),
        )
    usual = [name for name in CURVE if name in names] if args.shown else []
    settled = {other: None for name in names for other in (name, *method_class(name).leans_on)}
    return Plan(
        env=args.env,
        env_kwargs=kwargs,
        methods=tuple(names),
        seeds=args.seeds,
        folds=args.folds,
        cost_weight=args.cost_weight,
        cost_weights=tuple(args.cost_weights),
        shown=tuple(args.shown),
        curve=tuple(split_names(args.curve) if args.curve else usual),
        slow_users=args.slow_users,
        slow_seeds=args.slow_seeds,
        few_shown=tuple(args.few_shown),
        settings={name: make_method(name, **settings_for(args.env, kwargs, name)).settings() for name in settled},
        choosers=choosers_of(args.env, kwargs),
    )


def asked_again(text: str | None, plan: Plan) -> frozenset[str]:
    """The methods of ``--again``, and those of a plan that lean on them.

    Raises:
        ValueError: for a name that is not among the plan's, and for what everything is compared with.
    """
    names = {*split_names(text or "")}
    if BASE in names:
        raise ValueError(f"everything is compared with {BASE!r}: to measure it again, choose another --out.")
    if unknown := sorted(names - {*plan.methods, *plan.settings}):
        raise ValueError(f"--again {unknown[0]}: it is not among the methods. {did_you_mean(unknown[0], plan.methods)}")
    return frozenset(names | {name for name in plan.methods if names & {*plan.method(name).leans_on}})


def claim(folder: Path, plan: Plan, again: Collection[str] = ()) -> Plan:
    """Begin a results folder, or go on with one, to which methods, seeds and sizes may be added; what is to be measured.

    Args:
        folder: of the results.
        plan: what is asked for.
        again: methods of which nothing in the folder stays: no rows, no settings, no times.

    Raises:
        ValueError: if the folder holds results of another environment or version, or of methods with other settings.
    """
    path = folder / "plan.json"
    codes: list[str] = []
    if path.exists():
        before, codes = Plan.stored(folder)
        if count_rows(folder) or (folder / "results.csv").exists():  # or it came to nothing
            try:
                plan = before.without(again).extended(plan)
            except ValueError as error:
                raise ValueError(f"{folder} holds results of another run: {error}") from error
            if again:
                check_model(folder, plan)
            forget(folder, again)
            forget_times(folder / TIMING, again)
        if codes and code_hash() not in codes:
            LOG.warning("%s was begun with other code: its rows stay, further ones are of today's.", folder)
    elif any(found.name != ".lock" for found in folder.iterdir()):
        raise ValueError(f"{folder} holds files and no plan.json: it is none of this command's folders. Choose another --out.")
    codes = [*dict.fromkeys([*codes, code_hash()])]  # of every call, in order
    write_atomically(path, json.dumps({"format": FORMAT, "code": codes, "plan": plan.to_json()}, indent=1).encode())
    return plan


def check_model(folder: Path, plan: Plan) -> None:
    """Raise ``ValueError`` if rows of the first place were made with another model than today's, before any is thrown away."""
    place = plan.places[0]
    today = Measuring(plan, place, plan.scenario(place)).artefacts(Job(BASE, None, None))
    forget_scenarios()
    Part(folder, place).check(BASE, "", "", today)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within: no other call measures into the folder. Raises ``ValueError`` if one does."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; results are a folder: choose another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another call is measuring into {folder}; wait for it, or choose another --out.") from None
    try:
        yield
    finally:
        lock.release()


def measure_place(plan: Plan, place: Place, folder: Path, tell: Callable[[], Any] = lambda: None) -> dict[str, Any]:
    """Write the missing rows of one place; often in a process of its own. Tells after each, returns facts for ``run.json``."""
    single_thread()
    part, measuring = Part(folder, place), Measuring(plan, place, plan.scenario(place))
    part.check(BASE, "", "", measuring.artefacts(Job(BASE, None, None)))  # before anything dear is made, or changed
    part.tidy()
    refused = {}
    try:
        for job in plan.jobs():
            if reason := plan.method(job.method).refuses(measuring.world):
                refused[job.method] = reason
                continue
            for row in measuring.rows(job, part.done):
                part.add(row)
                tell()
    finally:
        part.tell_time()
    measuring.scenario.save()
    pathways = measuring.world.pathways
    forget_scenarios()
    return {
        "population": measuring.scenario.data.population.name,
        "simulated": measuring.scenario.simulated,
        "classes": measuring.scenario.data.population.num_classes,
        "pathways": list(pathways.names),
        "costs": pathways.costs.alone.tolist(),
        "counts": measuring.scenario.counts,
        "refused": refused,
        "smaller": measuring.smaller,
        "notes": list(measuring.scenario.notes),
    }


def measure_all(plan: Plan, folder: Path, workers: int, total: int) -> dict[str, Any]:
    """Every place, ``workers`` at a time, with a bar over ``total`` rows or so; facts for ``run.json``."""
    with tqdm(desc=f"rows of {plan.env}", unit="row", initial=count_rows(folder), total=total) as bar:
        if workers == 1:
            return joined(measure_place(plan, place, folder, bar.update) for place in plan.places)
        with ProcessPoolExecutor(workers, get_context("spawn"), initializer=begin_worker) as pool:
            left: set[Future] = {pool.submit(measure_place, plan, place, folder) for place in plan.places}
            facts = []
            try:
                while left:
                    done, left = wait(left, timeout=2, return_when=FIRST_COMPLETED)
                    bar.update(count_rows(folder) - bar.n)
                    for future in done:
                        facts.append(future.result())  # raises what the process raised
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)  # places that have not begun do not begin any more
                raise
            return joined(facts)


def joined(places: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Facts of a run from those of its places: what differs between them is how small batches had to be."""
    found = [*places]
    smaller: dict[str, int] = {}
    for place in found:
        for name, users in place["smaller"].items():
            smaller[name] = min(users, smaller.get(name, users))
    return {**found[0], "smaller": smaller}


def say_expected(plan: Plan, done: int) -> int:
    """Say what the run will take on one core, as far as tuning has timed its methods; how many rows it makes, or so.

    Users are counted at the first seed's last fold. ``done``: rows that are there already.
    """
    LOG.info("expected: %d places; the model of each is made first, where it is not kept from before", len(plan.places))
    place = plan.places[max(0, plan.folds - 1)]  # the last fold: if there is none of that number, it is said before the work
    measuring = Measuring(plan, place, plan.scenario(place))
    seconds, unknown, total = 0.0, [], 0
    for name in plan.methods:
        entry, method = timed_entry(plan.env, plan.env_kwargs, name), plan.method(name)
        if method.refuses(measuring.world):
            continue
        jobs = [job for job in plan.jobs() if job.method == name]
        users = sum(len(measuring.users(method, job.shown)) for job in jobs)
        seeds = min(plan.seeds, plan.slow_seeds) if measuring.slow(method) else plan.seeds
        places = seeds * max(1, plan.folds)
        total += places * users
        if entry is None:
            unknown.append(name)
            continue
        # A policy for a range of cost weights is learned once.
        fits = 1 if method.highest_weight < 1 else len({job.cost_weight for job in jobs})
        seconds += places * (fits * entry["fit_seconds"] + users * entry["seconds_per_user"])
    forget_scenarios()
    LOG.info("expected: some %d rows, of which %d are there; %s", total, done, expected_time(seconds, unknown))
    return total


def expected_time(seconds: float, unknown: Sequence[str]) -> str:
    """What methods that tuning has timed will take, in words, and which others will add to it."""
    about = f"in all about {seconds / 60:.0f} minutes of one core"
    rest = f"what {', '.join(unknown)} take, nobody has timed: the bar will tell"
    if not unknown:
        return about
    return f"{about}, not counting these: {rest}" if seconds else rest


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    args = parse(arguments)
    show_log()
    single_thread()
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of processes that are started here
    use_data_root(args)
    try:
        plan = read_plan(args)
        with alone(args.out):
            failed = run(claim(args.out, plan, asked_again(args.again, plan)), args.out, args.workers, args.timing)
    except (ValueError, ImportError, OSError, FloatingPointError, ArtefactError) as error:
        sys.exit(f"error: {error}")
    except (BrokenProcessPool, MemoryError, RuntimeError) as error:
        if not isinstance(error, BrokenProcessPool) and not out_of_memory(error):
            raise
        sys.exit(
            "error: a process was ended from outside, or found no memory. The rows so far are kept: give the same command "
            "again, with fewer --workers where there are several."
        )
    except KeyboardInterrupt:
        same = "The same command without --again" if args.again else "The same command"
        sys.exit(f"\ninterrupted; the rows so far are in {args.out}. {same} goes on.")
    print(f"\n{args.out / 'report.html'}\ntensorboard --logdir {args.out / 'tensorboard'}")
    if failed:
        sys.exit(f"{failed} rows failed; the report and results.csv (column status) say which and why.")


def command_of(plan: Plan, timed: bool = True) -> str:
    """The one command that makes what a plan measures, however it has grown; of folders and files the names alone."""
    usual = parse(["--out", "results"])
    words = ["--env", plan.env]
    for name, value in sorted(plan.env_kwargs.items()):
        words += ["--env-kwargs", f"{name}:{name_alone(value)}"] if name not in PLACES else []
    if set(plan.methods) != set(METHODS):
        words += ["--methods", ",".join(plan.methods)]
    for name in ("seeds", "folds", "cost_weight", "slow_users", "slow_seeds"):
        if (value := getattr(plan, name)) != getattr(usual, name):
            words += [f"--{name.replace('_', '-')}", f"{value:g}"]
    for name in ("cost_weights", "shown", "few_shown"):
        if (values := getattr(plan, name)) != tuple(getattr(usual, name)):
            words += [f"--{name.replace('_', '-')}", *(f"{value:g}" for value in values)]
    if plan.curve and set(plan.curve) != {*CURVE} & {*plan.methods}:
        words += ["--curve", ",".join(plan.curve)]
    words += [] if timed else ["--no-timing"]
    return shlex.join(["python", "-m", "eval.run", *words, "--out", "results"])


def run(plan: Plan, folder: Path, workers: int, timing: bool) -> int:
    """Measure what is missing, put the rows together and write the reports; how many rows failed."""
    facts = measure_all(plan, folder, workers, say_expected(plan, count_rows(folder)))
    earlier, now = smaller_before(folder), facts["smaller"]
    facts["smaller"] = {name: min(earlier.get(name, n), now.get(name, n)) for name, n in {**earlier, **now}.items()}
    failed = put_together(folder)
    body = {
        "format": FORMAT,
        "version": __version__,
        **plan.to_json(),
        "folds": plan.folds or None,
        "seeds": list(range(plan.seeds)),
        "methods": {name: _about(plan, name) for name in plan.methods},
        **facts,
        "command": command_of(plan, timing or (folder / TIMING).exists()),
        "seconds": seconds_spent(folder),
    }
    write_atomically(folder / "run.json", json.dumps(body, indent=1).encode())
    write_report(read_results(folder), folder)
    if timing:
        write_timing(plan, folder)
        write_report(read_results(folder), folder)
    return failed


def smaller_before(folder: Path) -> Mapping[str, int]:
    """What earlier calls, whose rows are kept, measured in smaller batches."""
    try:
        return read_run(folder).smaller
    except ResultsError:  # there is none yet, or a spoiled one, in whose place this call puts another
        return {}


def write_timing(plan: Plan, folder: Path) -> None:
    """Time the methods that ``timing.json`` does not have yet."""
    path = folder / TIMING
    known = json.loads(path.read_text()) if path.exists() else None
    write_atomically(path, json.dumps(time_methods(plan, known), indent=1).encode())


def _about(plan: Plan, name: str) -> dict[str, Any]:
    method = plan.method(name)
    facts = {field: getattr(method, field) for field in ("scope", "labels", "trades", "through_backbone", "draws")}
    return {"settings": method.settings(), **facts}


if __name__ == "__main__":
    main()

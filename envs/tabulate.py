"""Measure every mask for every user, once: ``python -m envs.tabulate --env dsa/DigitsResNet-v0 --out digits``.

Writes a pathway table: FILE.json, and the tensors beside it. It holds everybody's accuracy and loss on validation and on
query examples; those of test users also after adaptation on half of the support and on all labels, which comparisons ask for.
With up to 10 pathways every mask is measured, else a sample of them (--masks).

What is done is kept in FILE-unfinished: the same command goes on after a kill, and ends with the same bytes whatever was
killed and however many processes ran. Play the table with gymnasium.make("dsa/Tabular-v0", table=FILE).
"""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from pathlib import Path
from shutil import rmtree

import torch
from tqdm.auto import tqdm

from backbones.artefacts import ArtefactError, DiskFullError, exists, load_artefact, save_artefact
from backbones.threads import begin_worker, usable_cores
from envs.oracles import Plans
from envs.scenario import Scenario
from envs.shards import Shard, ShardError, Source, assembled, cut, table_masks, work
from envs.tables import PathwayTable, differences, identity, ingredients, without_suffix
from meta.arguments import parse_pairs, show_log

UNFINISHED = "unfinished pathway table"
CURE = "choose another --out, or discard it with --overwrite."


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m envs.tabulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", required=True, help="environment id")
    parser.add_argument("--out", required=True, type=without_suffix, metavar="FILE", help="the table, with or without .json")
    parser.add_argument("--seed", type=int, help="of users, backbone and initialisation (default: the environment's own)")
    parser.add_argument("--env-kwargs", nargs="+", action="extend", default=[], metavar="NAME:VALUE", help="its arguments")
    parser.add_argument("--masks", type=int, metavar="N", help="a sample of N masks (default: all if P <= 10, else 1024)")
    parser.add_argument("--processes", type=int, default=usable_cores(), help="(default: the cores, at most 4)")
    parser.add_argument("--overwrite", action="store_true", help="replace a table, or unfinished work, of other content")
    args = parser.parse_args(arguments)
    if args.processes < 1:
        parser.error(f"--processes must be at least 1, got {args.processes}.")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Tabulate, or go on."""
    args = parse(arguments)
    show_log()
    try:
        source = Source.of(args.env, args.seed, parse_pairs(args.env_kwargs, "--env-kwargs"))
        tabulate(source, args.out, args.masks, args.processes, args.overwrite)
    except DiskFullError as error:
        sys.exit(f"error: {error} What is finished is kept: then give the same command again.")
    except (ValueError, ImportError, OSError, FloatingPointError, ArtefactError, ShardError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        again = shlex.join(sys.argv[1:] if arguments is None else arguments)
        sys.exit(f"\ninterrupted; what is finished is kept. Go on with: python -m envs.tabulate {again}")


def tabulate(source: Source, out: Path, count: int | None = None, processes: int = 1, overwrite: bool = False) -> None:
    """Write the table of an environment, going on from unfinished work of the same content.

    Args:
        source: the environment.
        out: where the table goes, without suffix; unfinished work is kept beside it.
        count: of masks, see :func:`envs.shards.table_masks`.
        processes: that measure. With 1 it is this one.
        overwrite: replace a table or unfinished work of other content.

    Raises:
        ValueError: if ``out`` or the unfinished work is of other content; it names what differs.
        ShardError: if some users could not be measured.
    """
    print(f"{source.environment}: loading users and model, or making them", flush=True)
    scenario = with_one_thread(source)
    masks = table_masks(scenario.pathways, count)
    wanted = identity(source.environment, ingredients(scenario), scenario.fingerprint, masks)
    folder = out.with_name(f"{out.name}-unfinished")
    if exists(out) and not overwrite:
        refuse_other(PathwayTable.load(out).identity(), wanted, f"{out}.json is a table")
        print(f"{out}.json is complete and of this content: nothing to do")
    else:
        claim(folder, wanted, overwrite)
        shards = cut(scenario, masks)
        measure_all(source, shards, masks, folder, processes)
        table = PathwayTable.of(source.environment, scenario, masks, *assembled(scenario, masks, shards, folder))
        table.save(out)
        print(f"{out}.json is complete: gymnasium.make('dsa/Tabular-v0', table={str(out)!r})")
    if is_of(folder / "content", wanted):
        discard(folder)


def with_one_thread(source: Source) -> Scenario:
    """The scenario, computed with one torch thread (whose number decides last bits) from artefacts made with all of them."""
    threads = min(usable_cores(), torch.get_num_threads())
    if threads > 1:
        torch.set_num_threads(threads)
        source.prepare()
    torch.set_num_threads(1)
    return source.scenario()


def refuse_other(found: Mapping[str, str], wanted: Mapping[str, str], what: str) -> None:
    """Raise ``ValueError`` unless the content is the wanted one."""
    differ = [f"{name} ({found.get(name)}, not {wanted.get(name)})" for name in differences(found, wanted)]
    if differ:
        raise ValueError(f"{what} of other content: {', '.join(differ)}; {CURE}")


def claim(folder: Path, wanted: Mapping[str, str], overwrite: bool) -> None:
    """Make the folder of unfinished work that of this content, or raise ``ValueError`` if it is not."""
    content = folder / "content"
    if exists(content) and not overwrite:
        refuse_other(load_artefact(content, UNFINISHED)[1], wanted, f"{folder} holds unfinished work")
    elif exists(content) and not is_of(content, wanted):
        discard(folder)
    elif not exists(content) and folder.exists():
        strange = sorted(file.name for file in folder.iterdir() if not file.name.lstrip(".").startswith("content"))
        if strange and not overwrite:
            raise ValueError(f"{folder} does not tell of what its files ({strange[0]}, ...) are; {CURE}")
        rmtree(folder)
    if not exists(content):
        save_artefact(content, UNFINISHED, {}, wanted)


def discard(folder: Path) -> None:
    """Remove unfinished work; what tells of its content goes last, so that a kill meanwhile leaves nothing unexplained."""
    for file in folder.iterdir():
        if not file.name.startswith("content"):
            file.unlink(missing_ok=True)
    rmtree(folder)


def is_of(content: Path, wanted: Mapping[str, str]) -> bool:
    """Whether there is unfinished work, whole and of the wanted content."""
    try:
        return not differences(load_artefact(content, UNFINISHED)[1], wanted)
    except ArtefactError:  # who is not about to discard it loads it, and is told
        return False


def measure_all(source: Source, shards: list[Shard], masks: Plans, folder: Path, processes: int) -> None:
    """Measure the shards that ``folder`` lacks, with a progress bar in adaptations."""
    todo = [shard for shard in shards if not exists(folder / shard.name)]
    total, left = (sum(shard.adaptations for shard in some) for some in (shards, todo))
    processes = min(processes, max(1, len(todo)))
    users = sum(len(shard.users) for shard in shards if shard.columns[0] == shards[0].columns[0])
    print(
        f"{users:,} users under {len(masks):,} of {2 ** masks.shape[1]:,} masks: {total:,} adaptations, {left:,} of them left"
    )
    print(f"{len(todo):,} shards for {processes} process(es); what is finished is kept in {folder}", flush=True)
    parts = (todo, masks, folder)
    found = measured_here(source, *parts) if processes == 1 else measured_by(processes, source, *parts)
    with tqdm(total=total, initial=total - left, unit="adaptation", unit_scale=True) as bar:
        for shard in found:
            bar.update(shard.adaptations)


def measured_here(source: Source, todo: list[Shard], masks: Plans, folder: Path) -> Iterator[Shard]:
    """Measure shards in this process; gives each when it is done."""
    for shard in todo:
        work(source, shard, masks, folder)
        yield shard


def measured_by(processes: int, source: Source, todo: list[Shard], masks: Plans, folder: Path) -> Iterator[Shard]:
    """Measure shards in worker processes; gives each when it is done. Whatever ends this ends the workers."""
    before = set(active_children())
    with for_children():
        pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=begin_worker)
        futures = {pool.submit(work, source, shard, masks, folder): shard for shard in todo}
    try:
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    except BaseException as error:
        for worker in set(active_children()) - before:
            worker.terminate()
        if isinstance(error, BrokenProcessPool):
            raise ShardError(
                "a worker process was ended from outside (most often because memory ran out). Finished shards are kept: give "
                "the same command again, with fewer --processes."
            ) from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def for_children() -> Iterator[None]:
    """What processes started meanwhile inherit: one OpenMP thread, and deafness to Ctrl-C, of which this process takes care."""
    threads, handler = os.environ.get("OMP_NUM_THREADS"), signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads


if __name__ == "__main__":
    main()

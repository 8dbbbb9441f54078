"""Tune the harness's methods on val users: ``python -m eval.tune_methods --env dsa/DigitsResNet-v0 --trials 12``.

Every method with a ``space`` gets the same number of trials: its defaults first, then points of its space that Optuna (extra
``tune``) proposes. A trial fits the method on train users and personalises val users from what they show; it is worth their
mean query accuracy, less cost weight times cost for methods that trade. One that is below the median of the earlier ones
after a fifth of its training ends there. Test users are never asked for anything.

A finished method is written to ``--out`` at once and skipped by later calls with the same trials, space and budget.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from backbones.artefacts import ArtefactError, cache_key
from backbones.registry import did_you_mean
from envs import known_spec
from eval.choosers import asked, note_asked, population_of, split_key
from eval.methods import METHODS, method_class, split_names
from eval.methods.base import Method
from eval.plan import Place, Plan
from eval.tuned import PACKAGED, env_key, read_tuned, write_tuned
from eval.val_users import ValUsers
from eval.world import World
from meta.arguments import add_data_root, at_least_one, parse_pairs, show_log, use_data_root
from meta.prepare import folder_of

if TYPE_CHECKING:
    from eval.tuning import Tuned


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.tune_methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", required=True, help="environment id")
    parser.add_argument("--env-kwargs", action="extend", nargs="+", default=[], metavar="NAME:VALUE", help="its arguments")
    parser.add_argument("--methods", help="names, separated by commas (default: all that have something to tune)")
    parser.add_argument("--trials", type=at_least_one, default=12, help="of every method, the defaults included (default: 12)")
    parser.add_argument(
        "--val-users", type=at_least_one, metavar="N", help="only so many for methods that train the backbone (default: all)"
    )
    parser.add_argument(
        "--space", action="extend", nargs="+", default=[], metavar="NAME:[VALUES]", help="values to try instead of the method's"
    )
    parser.add_argument("--seed", type=int, default=0, help="of users, model and proposals (default: 0)")
    parser.add_argument("--cost-weight", type=float, default=0.1, help="lambda (default: 0.1)")
    parser.add_argument("--num-threads", type=at_least_one, default=1, help="torch threads (default: 1)")
    parser.add_argument(
        "--adopt", metavar="ENV", help="no trials: take over what was found on another environment's val users (for folds)"
    )
    add_data_root(parser)
    parser.add_argument("--out", type=Path, default=PACKAGED, help="YAML file to add to (default: the harness's own)")
    parser.add_argument("--again", action="store_true", help="also methods that are finished")
    args = parser.parse_args(arguments)
    if not 0 <= args.cost_weight <= 1:
        parser.error(f"--cost-weight must be between 0 and 1, got {args.cost_weight:g}.")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Tune, write and print a table."""
    args = parse(arguments)
    torch.set_num_threads(args.num_threads)
    show_log()
    use_data_root(args)
    try:
        if args.adopt is not None:
            print(f"taken over from {args.adopt} into {args.out}: {', '.join(adopt(args))}")
            return
        table, failed = tune(args)
    except (ValueError, ImportError, OSError, FloatingPointError, ArtefactError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the finished methods are kept, the same command goes on")
    print("\n".join(table))
    print(f"\nwritten to {args.out}")
    if failed:
        sys.exit(f"error: nothing was found for {', '.join(failed)}; every trial failed, see above.")


def tune(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Tune every method that is not finished; the lines of the table, and the methods of which every trial failed.

    Raises:
        ValueError: for an unknown environment or method, with a suggestion; for an environment without a model, and if no
            method is left.
        ImportError: without Optuna, or what a method needs that was asked for by name.
    """
    if find_spec("optuna") is None:
        raise ImportError("tuning needs Optuna: pip install -e '.[tune]'")
    kwargs = parse_pairs(args.env_kwargs, "--env-kwargs")
    kinds = wanted(args.methods)
    key, table, failed = env_key(args.env, kwargs), [], []
    args.instead = other_values(args.space, kinds)
    users = ValUsers(world_of(args.env, kwargs, args.seed), args.cost_weight, args.val_users)
    check_fold(users.world)
    note_asked(key, (user.user_id for user in users.world.data.population.val), args.out)
    for name, kind in kinds.items():
        search = search_key(kind, args, users.world)
        entry = read_tuned(args.out).get(key, {}).get(name)
        if entry is not None and entry.get("search") == search and not args.again:
            print(f"{name}: finished before, skipped (--again tunes it anew).")
        elif reason := kind().refuses(users.world):
            print(f"{name}: left out: {reason}")
            continue
        else:
            found = tuned(name, kind, users, args)
            if not any(trial.whole for trial in found.trials):
                failed.append(name)
                continue
            weight = {"cost_weight": args.cost_weight} if kind.trades else {}
            before = sum((entry or {}).get(spent, 0) for spent in ("trials", "earlier_trials"))
            earlier = {"earlier_trials": before} if before else {}
            entry = {**found.entry(), **earlier, **weight, "search": search}
            write_tuned(args.out, key, name, entry)
        table.append(row(name, entry, at_an_end(kind, entry["settings"], args.instead)))
    return [*HEAD, *table], failed


def adopt(args: argparse.Namespace) -> list[str]:
    """Enter another environment's settings for this one; which methods' they are.

    Where val users of one fold are test users of another, nobody in the data set may choose for all folds: people of another
    data set can. Settings of the same people under another protocol may be taken over as well: the harness then leaves out
    such test users as chose them (:mod:`eval.choosers`).

    Raises:
        ValueError: for an unknown environment, if nothing was found there that is not known here, and if it is of the same
            people and nobody knows which of them chose.
    """
    for env in (args.env, (args.adopt.split() or [""])[0]):
        known_spec(env)
    found, kinds = read_tuned(args.out), wanted(args.methods)
    key = env_key(args.env, parse_pairs(args.env_kwargs, "--env-kwargs"))
    known, there = found.get(args.adopt, {}), found.get(key, {})
    found_there = [name for name in kinds if "search" in known.get(name, {})]  # what it adopted itself is somebody else's
    names = [name for name in found_there if "search" not in there.get(name, {}) or args.again]
    if not names:
        raise ValueError(
            f"{args.out} has nothing of {args.adopt} for {', '.join(kinds)} that {key} has not found for itself; tune them "
            "there first, or give --again to put the others' in the place of its own."
        )
    if population_of(*split_key(args.adopt)) == population_of(args.env, parse_pairs(args.env_kwargs, "--env-kwargs")):
        asked([args.adopt], args.out)  # raises: without it, their people could not be left out here
    for name in names:
        weight = {field: known[name][field] for field in ("cost_weight",) if field in known[name]}
        write_tuned(args.out, key, name, {"settings": known[name]["settings"], **weight, "adopted": args.adopt})
    return names


def tuned(name: str, kind: type[Method], users: ValUsers, args: argparse.Namespace) -> "Tuned":
    """Run a method's trials, and say meanwhile how long they take."""
    from eval.tuning import Trial, Tuned, trials_in, trials_of  # needs Optuna

    count = trials_in(kind, args.trials, args.instead)
    done: list[Trial] = []
    with tqdm(total=count, desc=name, unit="trial") as bar:
        for trial in trials_of(kind, users, args.trials, args.seed, args.instead):
            if not done:
                bar.write(
                    f"{name}: the first of {count} trials took {trial.seconds:.1f} s, all take up to about "
                    f"{count * trial.seconds:.0f} s on {len(users.places(kind))} val users."
                )
            if trial.failure:
                bar.write(f"{name}: {trial}")
            done.append(trial)
            bar.update()
    return Tuned(kind, done)


def wanted(names: str | None) -> dict[str, type[Method]]:
    """The methods to tune, by name."""
    kinds = {}
    for name in split_names(names) if names else METHODS:
        try:
            kinds[name] = method_class(name)
        except ModuleNotFoundError as error:
            if names:
                raise
            print(f"{name}: left out: {error}")
    with_space = {name: kind for name, kind in kinds.items() if kind.space}
    if not with_space:
        raise ValueError(f"nothing to tune: {', '.join(kinds)} have no space; name other methods, or leave out --methods.")
    return with_space


def other_values(pairs: list[str], kinds: Mapping[str, type[Method]]) -> dict[str, list[Any]]:
    """What ``--space`` says: values by hyperparameter, for the methods that have it.

    Raises:
        ValueError: for a hyperparameter that none of the methods has, and for what is no list of values.
    """
    given = parse_pairs(pairs, "--space")
    known = {name for kind in kinds.values() for name in kind().settings()}
    for name, values in given.items():
        if name not in known:
            raise ValueError(
                f"--space {name}: none of {', '.join(kinds)} has such a hyperparameter. {did_you_mean(name, known)}"
            )
        if not isinstance(values, list) or not values:
            raise ValueError(f"--space {name}: give a list of values, as in '{name}:[1, 2]'; got {values!r}.")
    return given


def check_fold(world: World) -> None:
    """Raise ``ValueError`` where what one fold's val users say would be used for all: they are other folds' test users."""
    if world.data.population.folds is not None and "fold" not in world.kwargs:
        raise ValueError(
            f"the val users of one fold of {world.env} are test users of another: tune one fold for itself (--env-kwargs "
            "fold:0), or leave the defaults."
        )


def world_of(env: str, kwargs: dict[str, Any], seed: int) -> World:
    """An environment's users and model, without test users."""
    plan, place = Plan(env, kwargs), Place(seed)
    arguments = plan.scenario_arguments(place)[1]
    folder = folder_of(*(str(arguments.get(name)) for name in ("users", "backbone"))) / "methods"
    return World.of(plan.scenario(place), env, kwargs, seed, folder)


def search_key(kind: type[Method], args: argparse.Namespace, world: World) -> str:
    """A hash of what makes a search of a method what it is; defaults are part of it, entries hold differences from them.

    When hopeless trials stop is not: a search that let them go on has found no less.
    Methods that put in adapters of their own know nothing of the environment's meta-initialisation.
    """
    made_of = world.scenario.made_of
    known = [made_of["users"], made_of["backbone"]] if kind.through_backbone else world.scenario.fingerprint
    facts = {"trials": args.trials, "seed": args.seed, "space": {k: list(v) for k, v in kind.space.items()}}
    if own := {name: values for name, values in args.instead.items() if name in kind().settings()}:
        facts["instead"] = own
    facts |= {"defaults": kind().settings(), "cost_weight": args.cost_weight if kind.trades else None}
    return cache_key(**facts, world=known, val_users=args.val_users if kind.through_backbone else None)


HEAD = (
    "| method | defaults | tuned | trials | stopped early | failed | settings | at an end of the values |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
)


def at_an_end(kind: type[Method], settings: Mapping[str, Any], instead: Mapping[str, list[Any]]) -> list[str]:
    """Hyperparameters whose best value is the least or the greatest that was tried: further ones might be better still."""
    chosen = {**kind().settings(), **settings}
    tried = {name: instead.get(name, values) for name, values in kind.space.items()}
    numbers = {n: v for n, v in tried.items() if len(v) > 1 and all(type(value) in (int, float) for value in v)}
    return [name for name, values in numbers.items() if chosen[name] in (min(values), max(values))]


def row(name: str, entry: dict[str, Any], ends: Sequence[str]) -> str:
    """A line of the table."""
    settings = ", ".join(f"{field} {value}" for field, value in entry["settings"].items()) or "defaults"
    default = "-" if entry["default_value"] is None else f"{entry['default_value']:.4f}"
    cells = [
        default,
        f"{entry['value']:.4f}",
        entry["trials"],
        entry["stopped_early"],
        entry["failed"],
        settings,
        ", ".join(ends) or "-",
    ]
    return f"| {name} | {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()

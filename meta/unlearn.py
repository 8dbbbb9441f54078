"""Let users out of a meta-initialisation: ``python -m meta.unlearn --init PATH --forget ann bob``.

``PATH`` is an initialisation that train users, those who leave among them, were learned from; flags of the population and the
backbone are those that it was learned with. Writes a patch (:mod:`meta.unlearning`) and the start with it beside one another;
to undo, go back to ``PATH``. Delete the rows of those who left, then train the policy and enrol users anew on the start with
the patch: a policy that learned from their rewards remembers what it learned. It says how val users fare before and after.
They are public, and teach the weights that the patch begins with (once, kept beside ``PATH``): they cannot be taken out, and
the latter figure flatters. With ``--public-steps 0`` (and ``--fresh 0.6 --rate 0.05``) it begins with random ones instead.

It is no guarantee of anything; learning with ``--private`` is one, and training anew without them forgets for certain.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from backbones.artefacts import ArtefactError, cache_key, load_artefact, save_artefact
from backbones.base import hash_tensors
from meta.arguments import add_flags, add_num_threads, given, parse_pairs, show_log
from meta.inner import MetaInit
from meta.learned import public_start
from meta.prepare import folder_of, prepared
from meta.store import KIND as INIT
from meta.store import TAKEN_OUT, init_facts, load_init, plain, save_init
from meta.train import check, report
from meta.trainer import MetaConfig
from meta.unlearning import KIND, Unlearning, plainly, unlearned
from users.batch import Part, Prepared
from users.duplicates import contents

FORGOTTEN, TAUGHT_BY = "forgotten", "taught_by_val_users"
"""The facts by which a patched start says how many it was patched for (who they were is in no file), and which val users
taught it."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    defaults = Unlearning()
    parser = argparse.ArgumentParser(
        prog="python -m meta.unlearn", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--init", type=Path, required=True, help="the meta-initialisation (its path without suffix)")
    parser.add_argument("--forget", nargs="+", required=True, metavar="ID", help="train users who leave")
    add_flags(parser)
    parser.add_argument("-K", "--argument", action="append", default=[], metavar="NAME:VALUE", help="of population or backbone")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of users, backbone and patch (default: 0)")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="outer steps (default: %(default)s)")
    parser.add_argument("--users-per-step", type=int, default=defaults.users, help="(default: %(default)s)")
    parser.add_argument("--rate", type=float, default=defaults.rate, help="Adam's learning rate (default: %(default)s)")
    parser.add_argument("--share", type=float, default=defaults.share, help="of pathways patched (default: %(default)s)")
    parser.add_argument("--density", type=float, default=defaults.density, help="of their weights (default: %(default)s)")
    parser.add_argument(
        "--public-steps",
        type=int,
        default=defaults.public_steps,
        help="in which val users, who are public, teach where the patch begins; 0: at random (default: %(default)s)",
    )
    parser.add_argument("--fresh", type=float, default=defaults.fresh, help="of the way there (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for patch and start (default: beside the initialisation)")
    add_num_threads(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Patch, write, report."""
    args = parse(arguments)
    torch.set_num_threads(args.num_threads)
    show_log()
    try:
        how = Unlearning(
            args.share, args.density, args.public_steps, args.fresh, args.steps, args.users_per_step, args.rate, args.seed
        )
        where = {"users": "digits", "backbone": "resnet-small", "placement": "inline", **given(args)}
        gates = where.pop("gates", "adapters")
        more = {k: v for k, v in where.items() if k not in ("users", "backbone", "placement")}
        more |= parse_pairs(args.argument, "--argument")
        check(where, more)
        names = where["users"], where["backbone"], where["placement"]
        before = plain(args.init)
        data = prepared(*names, args.rank, args.seed, before.parent, more, gates=gates)  # its model is kept there
        init, said = load_init(before, init_facts(data)), load_artefact(before, INIT)[1]
        after, path = forgotten(data, init, said, args.forget, how, before.parent, args.out)
    except (ValueError, ImportError, OSError, FloatingPointError, ArtefactError) as error:
        sys.exit(f"error: {error}")
    for when, start in (("before", init), ("after", after)):
        print(f"{when}: ", end="")
        report(data, start)
    if how.public_steps and how.fresh:
        print(f"{len(data.population.val)} val users, who are public, taught the weights that the patch begins with.")
    print(f"Meta-initialisation without {len({*args.forget})} users: {path}\nTo undo: {before}")
    print(f"What was computed of their examples is kept in {before.parent} and in {folder_of(*names[:2])}: delete `features-*`")
    print("and `answers-*` there with their rows.")


def forgotten(
    data: Prepared,
    init: MetaInit,
    said: dict[str, Any],
    ids: Sequence[str],
    how: Unlearning,
    beside: Path,
    out: Path | None = None,
) -> tuple[MetaInit, Path]:
    """A start without some train users, and where it was written.

    Args:
        data: the population with those who leave.
        init: learned from them too.
        said: what it says of how it was learned.
        ids: who leaves.
        how: the patch.
        beside: the start's folder, where what val users teach is kept.
        out: for the patch and the patched start; None: the same.

    Raises:
        ValueError: if somebody is no train user or a val user as well, or hardly anybody stays.
        ArtefactError: for a start that is private: it needs no patch, and rounds without noise would end the guarantee; or
            one whose weights were never learned.
    """
    if "accountant" in said:
        raise ArtefactError(
            "this initialisation was learned in private: that somebody took part hardly shows in it, and a patch learned "
            "without noise would end that guarantee. Go on with it as it is, or learn anew without those who leave."
        )
    if said.get("neutral") or said.get("random_start"):
        raise ArtefactError(
            "this initialisation's weights, or their outputs, were never learned: there is nothing in them to patch."
        )
    stay = staying(data, ids)
    config = MetaConfig(**{f.name: said[f.name] for f in fields(MetaConfig) if f.name in said})
    support, query = (Part(data, "train", role, torch.tensor(stay)) for role in ("support", "query"))
    towards, folder = None, out or beside
    facts = {**said, **TAKEN_OUT, FORGOTTEN: said.get(FORGOTTEN, 0) + len({*ids})}
    if how.public_steps and how.fresh:
        check_apart(data, ids)
        towards = public_start(data, plainly(config), how.public_steps, beside).weights
        facts[TAUGHT_BY] = data.population.contents("val")
    patch = unlearned(data.pathways, init, support, query, config, how, towards)
    after = patch.added_to(init)
    key = cache_key(start=hash_tensors(init.tensors()), patch=hash_tensors(patch.tensors()))
    save_artefact(folder / f"patch-{key}", KIND, patch.tensors(), {"start": hash_tensors(init.tensors()), **asdict(how)})
    save_init(folder / f"unlearned-{key}", after, facts)
    return after, folder / f"unlearned-{key}"


def staying(data: Prepared, ids: Sequence[str]) -> list[int]:
    """Places of the train users who stay. Raises ``ValueError`` if somebody is no train user, or fewer than two stay."""
    if data.population.lazy:
        raise ValueError(f"users of {data.population.name!r} are simulated when they are asked for: nobody of them can leave.")
    train = data.population.ids[: len(data.population.train)]
    for name in ids:
        if name not in train:
            close = get_close_matches(name, train, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "a patch takes out train users alone."
            raise ValueError(f"{name!r} is no train user of {data.population.name!r}; {hint}")
    gone = {*ids}
    stay = [place for place, name in enumerate(train) if name not in gone]
    if len(stay) < 2:
        raise ValueError(f"{len(stay)} of {len(train)} train users would stay; a patch is learned on two at least.")
    return stay


def check_apart(data: Prepared, ids: Sequence[str]) -> None:
    """Raise ``ValueError`` if a val user, who would teach the patch, has exactly the examples of somebody who leaves."""
    leave = {*ids}
    content = contents(data.population.items)
    gone = {content(user): user.user_id for user in data.population.train if user.user_id in leave}
    for user in data.population.val:
        if twin := gone.get(content(user)):
            raise ValueError(
                f"val user {user.user_id!r} has exactly the examples of {twin!r}, who leaves, and would "
                "teach the patch: delete that user's rows too, or begin at random (--public-steps 0 --fresh 0.6 --rate 0.05)."
            )


if __name__ == "__main__":
    main()

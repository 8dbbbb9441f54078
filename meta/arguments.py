"""Command-line flags that every program with users and a backbone understands."""

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from backbones.pathways import GATES, PLACEMENTS
from backbones.threads import usable_cores

FLAGS = ("users", "backbone", "placement", "gates", "data", "data_root", "source", "shots", "max_users")
"""Flags that are arguments of the environment under the same names."""
FILES = ("data", "data_root", "init", "source", "table", "weights")
"""Arguments of environments that may be files or folders."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags; what is not given on the command line stays None."""
    group = parser.add_argument_group("users and model")
    group.add_argument("--users", help="a population: digits, unipen, popquorn, jester, lamp, table, or a registered one")
    group.add_argument("--backbone", help="resnet-small, resnet18, resnet34, resnet50, minilm, bert, or a registered one")
    group.add_argument("--placement", help=f"of the pathways: {' or '.join(PLACEMENTS)}")
    group.add_argument(
        "--gates", choices=GATES, help="what a mask may switch; exit: inference may end early; skip: blocks may be left out"
    )
    group.add_argument("--data", type=Path, help="--users table: CSV or Parquet with user_id, label and text or image")
    add_data_root(group)
    group.add_argument("--source", help="--backbone bert: hub name or local folder of a BERT, RoBERTa or DistilBERT")
    group.add_argument("--shots", type=int, help="--users unipen: support images per class")
    group.add_argument("--max-users", type=int, help="read at most so many users")


def add_data_root(parser: argparse._ActionsContainer) -> None:
    """Add the one flag that says where data lie."""
    parser.add_argument("--data-root", type=Path, help="folder of the data sets (default: $DSA_DATA_ROOT)")


def use_data_root(args: argparse.Namespace) -> None:
    """For this process and those that it starts, where the folder is no argument of the environment."""
    if args.data_root:
        os.environ["DSA_DATA_ROOT"] = str(args.data_root)


def at_least_one(text: str) -> int:
    """A flag's whole number from 1. Raises ``argparse.ArgumentTypeError``, which the parser reports, for anything else."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def add_num_threads(parser: argparse._ActionsContainer) -> None:
    """Add the flag that says how many threads torch may use."""
    parser.add_argument(
        "--num-threads", type=at_least_one, default=usable_cores(), help="torch threads (default: the cores, at most 4)"
    )


def given(args: argparse.Namespace) -> dict[str, Any]:
    """What was given, as arguments of an environment."""
    found = {name: getattr(args, name) for name in FLAGS}
    return {name: str(value) if isinstance(value, Path) else value for name, value in found.items() if value is not None}


def whole_paths(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments of an environment, files and folders that are there by their whole paths.

    Then they mean the same to whoever reads them in another working folder. What is no file (a model's name on a hub) stays.
    """

    def whole(value: str) -> str:
        path = Path(value).expanduser()
        there = path.exists() or path.with_name(f"{path.name}.json").exists()  # artefacts are named without their suffix
        return os.path.abspath(path) if path.name and there else value  # unlike resolve(), it keeps the names of links

    return {name: whole(value) if name in FILES and isinstance(value, str) else value for name, value in arguments.items()}


def show_log() -> None:
    """Print what the library has to say: who is in a population, what its features will take."""
    log = logging.getLogger("dsa")
    if not log.handlers:
        log.addHandler(logging.StreamHandler(sys.stdout))
    log.setLevel(logging.INFO)


def parse_pairs(pairs: list[str], flag: str) -> dict[str, Any]:
    """``name:value`` pairs, values as YAML. Raises ``ValueError`` for a pair without a colon."""
    split = [pair.partition(":") for pair in pairs]
    if any(not colon for _, colon, _ in split):
        raise ValueError(f"{flag} takes name:value, got {pairs}.")
    try:
        return {name: parse_value(value) for name, _, value in split}
    except ValueError as error:
        raise ValueError(f"{flag} {pairs}: {error}") from error


def parse_value(text: str) -> Any:
    """A value as YAML, and 1e-3 (which YAML 1.1 takes for a word) as a number."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"the value {text!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() else number

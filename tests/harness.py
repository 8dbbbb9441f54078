"""``python -m eval.run`` on miniatures."""

import csv

from envs import MINIATURES
from eval.run import main

ENV = "dsa/DigitsResNet-v0"
SMALL = [f"{name}:{value}" for name, value in (MINIATURES[ENV] | {"pretrain_epochs": 3}).items()]


def arguments(out, *more: str) -> list[str]:
    kwargs = [word for pair in SMALL for word in ("--env-kwargs", pair)]
    return ["--env", ENV, *kwargs, "--seeds", "1", "--workers", "1", "--out", str(out), *more]


def run(out, methods: str = "base,all_on", *more: str) -> None:
    shown = [] if "--shown" in more else ["--shown"]
    main(arguments(out, "--methods", methods, "--no-timing", *shown, *more))


def rows(out) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))

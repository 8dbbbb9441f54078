"""Serving, to watch: ``python -m serving.demo logs/DigitsResNet-v0_1``.

Enrols a run's test users, answers batches that mix them for some seconds, and shows who runs which pathways, how many answers
there are per second, and what personalising brought.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from agents.run import RunConfig
from backbones.artefacts import ArtefactError
from envs.rendering import gates_as_text
from meta.arguments import add_num_threads
from serving.personaliser import Enrolled, Personaliser
from users.base import Examples, Population

SHOWN = 12
"""Users in the picture."""
STRANGER = "somebody who is not enrolled"


@dataclass
class Tally:
    """What was answered so far."""

    answers: int = 0
    right: int = 0
    right_bare: int = 0
    seconds: float = 0.0

    def line(self) -> str:
        """For the reader."""
        share, bare = (100 * right / max(1, self.answers) for right in (self.right, self.right_bare))
        rate = self.answers / max(self.seconds, 1e-9)
        return f"{self.answers} answers, {rate:,.0f} per second; right: {share:.1f} %, by the bare model {bare:.1f} %"


@dataclass(frozen=True)
class Person:
    """Raw examples of a test user: what they show, and what they ask."""

    shown: Any
    shown_labels: Tensor
    asked: Any
    asked_labels: Tensor


def crowd(population: Population, most: int) -> dict[str, Person]:
    """At most so many test users, by id."""

    def raw(examples: Examples) -> Any:
        return examples.inputs if population.items is None else population.items.take(examples.inputs.tolist())

    return {
        user.user_id: Person(raw(user.support), user.support.labels, raw(user.query), user.query.labels)
        for user in population.test[:most]
    }


def batches(people: dict[str, Person], size: int, draw: np.random.Generator) -> Iterator[tuple[list[str], Any, Tensor]]:
    """For ever: users, inputs and labels of a batch, everybody as likely as anybody."""
    names = [*people]
    while True:
        users = [names[place] for place in draw.integers(len(names), size=size)]
        places = [int(draw.integers(len(people[user].asked_labels))) for user in users]
        inputs = [people[user].asked[place] for user, place in zip(users, places, strict=True)]
        labels = torch.stack([people[user].asked_labels[place] for user, place in zip(users, places, strict=True)])
        yield users, torch.stack(inputs) if isinstance(inputs[0], Tensor) else inputs, labels


def picture(service: Personaliser, given: dict[str, Enrolled]) -> str:
    """The gates of the first users."""
    names = service.pathways.names
    rows = [
        (user[:12], np.array([name in one.pathways for name in names], dtype=np.int8)) for user, one in [*given.items()][:SHOWN]
    ]
    active = np.mean([one.cost for one in given.values()])
    size = np.mean([one.bytes for one in given.values()])
    return f"{gates_as_text(names, rows)}\n{len(given)} users, mean cost {active:.2f}, {size:,.0f} bytes each on disk"


def run_demo(service: Personaliser, people: dict[str, Person], weight: float, seconds: float, batch: int) -> Tally:
    """Enrol everybody at a cost weight, then answer batches for some seconds; what is computed for comparison is not timed."""
    given: dict[str, Enrolled] = {}
    for user, person in tqdm(people.items(), desc="enrolling", unit="user"):
        given[user] = service.enroll(user, person.shown, person.shown_labels, weight)
    print(f"\n{picture(service, given)}\n")
    tally, endless = Tally(), batches(people, batch, np.random.default_rng(0))
    with tqdm(total=round(seconds), desc="serving", unit="s", bar_format="{desc}: {postfix}") as bar:
        while tally.seconds < seconds:
            users, inputs, labels = next(endless)
            start = time.perf_counter()
            logits = service.predict(users, inputs)
            tally.seconds += time.perf_counter() - start
            bare = service.predict([STRANGER] * len(users), inputs, unknown="bare")
            tally.answers += len(users)
            tally.right += int((logits.argmax(1) == labels).sum())
            tally.right_bare += int((bare.argmax(1) == labels).sum())
            bar.set_postfix_str(tally.line())
    print(tally.line())
    return tally


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m serving.demo", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("--users", type=int, default=64, help="test users who are enrolled (default: 64)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of answering (default: 5)")
    parser.add_argument("--batch", type=int, default=64, help="inputs per batch (default: 64)")
    parser.add_argument("--slots", type=int, default=1024, help="users in memory at once (default: 1024)")
    add_num_threads(parser)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.num_threads)
    try:
        config = RunConfig.load(args.run)
        scenario, prices = config.scenario(args.run), config.rules.weight.reported()
        with (
            tempfile.TemporaryDirectory() as folder,
            Personaliser.from_run(args.run, Path(folder) / "users.db", slots=args.slots) as service,
        ):
            if scenario.data.population.folds is not None:
                print("The population model is cross-fitted: what it says of items that it was fitted on is not corrected.")
            people = crowd(scenario.data.population, args.users)
            run_demo(service, people, prices[len(prices) // 2], args.seconds, args.batch)
    except (ValueError, OSError, ArtefactError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

"""Private rounds of meta-training against plain ones, and their memory against the number of users."""

from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from typing import Any

from tqdm.auto import tqdm

from eval.bench.clock import alternating_calls, peak_memory
from eval.bench.masks import untrained_oracle
from meta.private import Privacy, PrivateRounds
from meta.trainer import MetaConfig, MetaTrainer
from users.batch import Prepared
from users.digits import digits_population
from users.kept import MEMORY as KEPT

EXPECTED = {"inline": 200, "side": 1000}
"""Users per round, by placement."""
SIZES = (1_000, 10_000, 100_000)
MEMORY = 0.1
"""GB of frozen states that are kept where memory is measured: what a round needs."""


def data_of(placement: str, users: int, memory: float = KEPT) -> Prepared:
    """Simulated users of digits, the model's weights random: arithmetic does not depend on them."""
    people = digits_population(train_users=users, val_users=1, test_users=1)
    return Prepared(untrained_oracle(placement, 1).pathways, people, memory=memory)


def trainer_of(data: Prepared, private: bool, expected: int) -> MetaTrainer:
    """Rounds of so many of the train users, in the mean where they are private."""
    config = MetaConfig(steps=1000, users=expected)
    promise = Privacy(epsilon=1e4, noise=1.0, noise_seed=0)
    rounds = PrivateRounds(promise, len(data.population.train), expected, config.steps) if private else None
    return MetaTrainer(data.pathways, data.part("train", "support"), data.part("train", "query"), config, private=rounds)


def peak_of(placement: str, users: int, expected: int) -> int:
    """The most memory of a process that plays three private rounds."""
    trainer = trainer_of(data_of(placement, users, MEMORY), private=True, expected=min(users, expected))
    for _ in range(3):
        trainer._outer_step()
    return peak_memory()


def measure_private(repeats: int = 9, sizes: tuple[int, ...] = SIZES, expected: Mapping[str, int] = EXPECTED) -> dict[str, Any]:
    """Milliseconds of a round, plain and private in turns; and bytes by number of train users, each in a process of its own."""
    spread, bytes_of = {}, {}
    for placement, users in expected.items():
        data = data_of(placement, max(sizes[0], 2 * users))  # private rounds draw half of them at most
        trainers = {name: trainer_of(data, name == "private", users) for name in ("plain", "private")}
        for role in ("support", "query"):
            data.batch("train", role)  # what the frozen model makes of examples is kept, and no part of what is compared
        found = alternating_calls({name: trainer._outer_step for name, trainer in trainers.items()}, repeats)
        spread[placement] = {name: vars(each) for name, each in found.items()}
    for placement, users in tqdm([*product(expected, sizes)], desc="memory", unit="size"):
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            bytes_of[f"{placement}, {users:,}"] = alone.submit(peak_of, placement, users, expected[placement]).result()
    return {"expected": dict(expected), "milliseconds": spread, "bytes": bytes_of}


def private_table(found: dict[str, Any]) -> str:
    """Both as Markdown."""
    lines = ["| one round | users | ms, median (least - most) | against plain |", "| --- | --- | --- | --- |"]
    for placement, times in found["milliseconds"].items():
        for name, one in times.items():
            ratio = one["median"] / times["plain"]["median"]
            cells = f"{one['median']:,.0f} ({one['least']:,.0f} - {one['most']:,.0f}) | {ratio:.2f}"
            lines.append(f"| {placement}, {name} | {found['expected'][placement]:,} | {cells} |")
    lines += ["", "| train users | peak memory of three private rounds, MB |", "| --- | --- |"]
    lines += [f"| {users} | {size / 1e6:,.0f} |" for users, size in found["bytes"].items()]
    text = "\n".join(lines)
    said = (
        "Users per round are a mean where it is private; digits, adapters of rank 16. What the frozen model makes of examples"
    )
    return f"{said}\nwas made before the rounds that are timed.\n\n{text}"

"""Private rounds of meta-training against plain ones, and their memory against the number of users."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from tqdm.auto import tqdm

from eval.bench.clock import alternating_calls, peak_memory
from eval.bench.masks import untrained_oracle
from meta.private import Privacy, PrivateRounds
from meta.trainer import MetaConfig, MetaTrainer
from users.batch import Prepared
from users.digits import digits_population

EXPECTED = 200
SIZES = (1_000, 10_000, 100_000)
MEMORY = 0.1
"""GB of frozen states that are kept: what is measured is what a round needs."""


def trainer_of(users: int, private: bool, expected: int = EXPECTED) -> MetaTrainer:
    """Rounds over simulated users of digits, the model's weights random: arithmetic does not depend on them."""
    pathways = untrained_oracle("inline", 1).pathways
    data = Prepared(pathways, digits_population(train_users=users, val_users=1, test_users=1), memory=MEMORY)
    config = MetaConfig(steps=1000, users=expected)
    promise = Privacy(epsilon=1e4, noise=1.0, noise_seed=0)
    rounds = PrivateRounds(promise, users, expected, config.steps) if private else None
    return MetaTrainer(pathways, data.part("train", "support"), data.part("train", "query"), config, private=rounds)


def peak_of(users: int) -> int:
    """The most memory of a process that plays three private rounds."""
    trainer = trainer_of(users, private=True, expected=min(users, EXPECTED))
    for _ in range(3):
        trainer._outer_step()
    return peak_memory()


def measure_private(repeats: int = 9, sizes: tuple[int, ...] = SIZES, expected: int = EXPECTED) -> dict[str, Any]:
    """Milliseconds of a round, plain and private in turns; and bytes by number of train users, each in a process of its own."""
    trainers = {name: trainer_of(sizes[0], name == "private", expected) for name in ("plain", "private")}
    spread = alternating_calls({name: trainer._outer_step for name, trainer in trainers.items()}, repeats)
    bytes_of = {}
    for users in tqdm(sizes, desc="memory", unit="size"):
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            bytes_of[users] = alone.submit(peak_of, users).result()
    return {"expected": expected, "milliseconds": {n: vars(s) for n, s in spread.items()}, "bytes": bytes_of}


def private_table(found: dict[str, Any]) -> str:
    """Both as Markdown."""
    times = found["milliseconds"]
    lines = ["| one round | ms, median (least - most) | against plain |", "| --- | --- | --- |"]
    for name, one in times.items():
        ratio = one["median"] / times["plain"]["median"]
        lines.append(f"| {name} | {one['median']:,.0f} ({one['least']:,.0f} - {one['most']:,.0f}) | {ratio:.2f} |")
    lines += ["", "| train users | peak memory of three private rounds, MB |", "| --- | --- |"]
    lines += [f"| {users:,} | {size / 1e6:,.0f} |" for users, size in found["bytes"].items()]
    text = "\n".join(lines)
    return (
        f"{found['expected']} users per round (in the mean where it is private), digits, inline adapters of rank 16.\n\n{text}"
    )

"""Users who change: somebody's images come through another shift from one day to the next, and ten of them are labelled."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from agents.bootstrap import Interval, paired_difference
from agents.run import RunConfig
from eval.headline import text_of
from serving.personaliser import Personaliser
from users.base import Examples, User

NEW, KEPT, USUAL = 10, 20, 400
"""New examples of a user, the latest that are kept in all, and examples without any shift that everybody is asked about."""
RIVALS = ("afresh", "kept", "bare")
CASES = {"changed": "changed", "same": "did not change", "unshifted": "changed, without any shift"}
"""What figures are of, with their heads in the table."""


def measure_changed(folder: Path) -> dict[str, Any]:
    """Accuracy of test users who change, and of the same ones if they do not, by what was done about it. JSON-able.

    Every test user is enrolled on their own support and then becomes the next test user of other shifts, or stays who they are:
    *kept* leaves their adapter alone, *update* is given ten of the other's support (or own validation) examples, *afresh* is
    somebody new who shows the same ten. All are asked the other's (own) query examples; the changed ones without any shift too.

    Raises:
        FileNotFoundError: for a folder that is no run. ValueError: for a population without shifts.
    """
    config = RunConfig.load(folder)
    scenario = config.scenario(folder)
    population, weights = scenario.data.population, config.rules.weight.reported()
    users, price = population.test, weights[len(weights) // 2]
    if "shifts" not in users[0].info:
        raise ValueError(f"{folder} is a run on {config.env}, whose users have no shifts: give one on dsa/DigitsResNet-v0.")
    others = [_next_of_other_shifts(users, place) for place in range(len(users))]
    usual, model = _without_shift(users), scenario.data.pathways.model
    news = {"changed": [_raw(o.support, NEW) for o in others], "same": [_raw(user.validation, NEW) for user in users]}
    asked = {"changed": [o.query for o in others], "same": [user.query for user in users]}
    found, clean = {}, {}
    with (
        TemporaryDirectory(prefix="dsa-bench-") as scratch,
        Personaliser.from_run(folder, Path(scratch) / "users.db", slots=3 * len(users), keep=KEPT) as served,
    ):
        for case, given in news.items():
            names = {way: [f"{way}-{case}-{user.user_id}" for user in users] for way in ("kept", "update", "afresh")}
            for way in ("kept", "update"):
                served.enroll_many({n: _raw(u.support) for n, u in zip(names[way], users, strict=True)}, price)
            for name, new in zip(tqdm(names["update"], desc=f"users, {case}", unit="user"), given, strict=True):
                served.update(name, *new)
            served.enroll_many(dict(zip(names["afresh"], given, strict=True)), price)
            found[case] = {way: _accuracies(served, names[way], asked[case]) for way in names}
            found[case]["bare"] = np.array([_accuracy(_logits(model, each), each.labels) for each in asked[case]])
            if case == "changed":
                clean = {way: _accuracies(served, names[way], [usual] * len(users)) for way in names}
                clean["bare"] = np.full(len(users), _accuracy(_logits(model, usual), usual.labels))
    found["unshifted"] = clean
    return {
        "env": config.env,
        "users": len(users),
        **{case: {way: float(values.mean()) for way, values in ways.items()} for case, ways in found.items()},
        "update_less": {case: {rival: _less(ways, rival) for rival in RIVALS} for case, ways in found.items()},
    }


def _less(ways: dict[str, NDArray[np.float64]], rival: str) -> list[float]:
    """What `update` has more than a rival: mean, and both ends of the interval."""
    found = paired_difference([ways["update"]], [ways[rival]])
    return [found.mean, found.low, found.high]


def _next_of_other_shifts(users: Sequence[User], place: int) -> User:
    for step in range(1, len(users)):
        other = users[(place + step) % len(users)]
        if other.info["shifts"] != users[place].info["shifts"]:
            return other
    raise ValueError("all users have the same shifts: nobody can change.")


def _without_shift(users: Sequence[User]) -> Examples:
    """Query examples of users who see images as they are."""
    plain = [user.query for user in users if user.info["shifts"] == "none"]
    if not plain:
        raise ValueError("no test user sees images without a shift: make the population larger.")
    inputs, labels = torch.cat([each.inputs for each in plain]), torch.cat([each.labels for each in plain])
    return Examples(inputs[:USUAL], labels[:USUAL])


def _raw(examples: Examples, first: int | None = None) -> tuple[Tensor, Tensor]:
    return examples.inputs[:first], examples.labels[:first]


def _accuracies(served: Personaliser, names: Sequence[str], asked: Sequence[Examples]) -> NDArray[np.float64]:
    """Each user's accuracy on the examples beside their name."""
    return np.array(
        [
            _accuracy(served.predict([name] * len(each), each.inputs), each.labels)
            for name, each in zip(names, asked, strict=True)
        ]
    )


@torch.no_grad()
def _logits(model: torch.nn.Module, examples: Examples) -> Tensor:
    return model(model.backbone.prepare(examples.inputs))  # type: ignore[operator,union-attr]


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def changed_table(found: dict[str, Any]) -> str:
    """What :func:`measure_changed` found, as Markdown."""
    lines = [
        f"{found['users']} test users of `{found['env'].removeprefix('dsa/')}` whose shift becomes another one, or does not, "
        f"and who then label {NEW} new examples. The latest {KEPT} are kept for `update`, so that {KEPT - NEW} earlier ones "
        "may join them. Accuracy; in brackets what `update` has more, with paired intervals.",
        "",
        f"| | {' | '.join(CASES.values())} |",
        "| --- " * (1 + len(CASES)) + "|",
    ]
    for way in found["changed"]:
        less = {case: found["update_less"][case].get(way) for case in CASES}
        cells = [f"{found[case][way]:.3f}" + (f" ({text_of(Interval(*less[case]))})" if less[case] else "") for case in CASES]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)

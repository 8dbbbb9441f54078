"""What personalising and predicting take: every method of a plan side by side in one process, in turns.

Seconds are medians with quartiles; memory is the most that torch held at once beyond what it held before.
"""

import json
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from backbones.artefacts import write_atomically
from backbones.bert import TextBackbone
from backbones.pathways import Frozen
from eval.group import Group
from eval.methods.base import CannotServe, Fitted, Method, Predictor
from eval.plan import BASE, Plan
from eval.rows import ENDING, Measuring, reason_of
from users.batch import Batch

T = TypeVar("T")
LOG = logging.getLogger("dsa")
REPEATS = 9
USERS = 64
"""Different users in a batch."""
LOADED = 8
"""Of methods that load one user's weights after the other, so many are personalised and take turns in that batch."""


class Fresh:
    """The frozen model's part in somebody's examples, computed when it is first asked for; looks like a ``Frozen``."""

    offset = None

    def __init__(self, compute: Callable[[], Frozen]) -> None:
        self._compute = compute

    @cached_property
    def _found(self) -> Frozen:
        return self._compute()

    @property
    def sites(self) -> Sequence[Tensor]:
        """See :class:`backbones.pathways.Frozen`."""
        return self._found.sites

    @property
    def context(self) -> Any:
        """See :class:`backbones.pathways.Frozen`."""
        return self._found.context


def fresh(group: Group, user: int) -> Group:
    """One user's examples, of which nothing has been computed."""
    one = group.rows([user])
    parts = one.parts and (fresh(group.parts[0], user), fresh(group.parts[1], user)) if group.parts else None
    labels = one.labels(0)[None]
    table = cast(Frozen, Fresh(lambda: group.data.pathways.frozen(one.inputs(0))))
    weights = torch.full(labels.shape, 1 / max(1, labels.shape[1]))
    return replace(one, batch=Batch(table, torch.arange(labels.shape[1])[None], labels, weights), parts=parts)


@dataclass(frozen=True)
class Timed:
    """A method that is ready to be timed.

    Attributes:
        fit_seconds: what fitting took when it was done, however long ago.
        one, many: predictors of one user, and of :data:`USERS` users (or :data:`LOADED`, in turns).
    """

    method: Method
    fitted: Fitted
    fit_seconds: float
    shown: Group
    one: Predictor
    many: Predictor
    count: int


def ready(measuring: Measuring, name: str) -> Timed:
    """Fit a method and personalise the users whose predictions are timed."""
    plan, method = measuring.plan, measuring.plan.method(name)
    weight = plan.cost_weight if method.trades else None
    fitted, seconds = measuring.fitted(name, weight), measuring.fit_seconds(name, weight)
    shown, count = measuring.shown(method, None), LOADED if method.through_backbone else USERS
    order = [i % len(shown) for i in range(count)]

    def of(users: list[int]) -> Predictor:
        return method.personalise(measuring.world, fitted, shown.rows(users), plan.cost_weight)

    return Timed(method, fitted, seconds, shown, of(order[:1]), of(order), count)


def time_methods(plan: Plan, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``timing.json``: every method of a plan at its first place.

    Args:
        plan: whose methods.
        known: what an earlier call returned. Its figures stay, and only methods that it lacks are timed, with ``base`` beside
            them: ``later`` lists these methods and what ``base`` took in the same turns, so that a machine which was slower or
            faster then can be told. Figures of other repeats, users, threads or lengths of texts are not kept.
    """
    how = {"threads": torch.get_num_threads(), "repeats": REPEATS, "users": USERS, "loaded": LOADED}
    if known is None or any(known.get(name) != value for name, value in how.items()):
        known = {**how, "methods": {}}
    if known["methods"].keys() >= {*plan.methods}:
        return dict(known)
    place = plan.places[0]
    measuring = Measuring(plan, place, plan.scenario(place))
    if known.get("tokens") != tokens(measuring):
        known = {**how, "tokens": tokens(measuring), "methods": {}}
    there = known["methods"]
    missing = [name for name in plan.methods if name not in there and not plan.method(name).refuses(measuring.world)]
    if not missing:
        return dict(known)
    found = _in_turns(measuring, [BASE, *missing] if BASE in there else missing)
    if BASE not in there:
        return {**known, "methods": {**there, **found}}
    if BASE not in found:
        LOG.warning("nothing was added to the figures: base, beside which they would stand, failed.")
        return dict(known)
    added = {name: one for name, one in found.items() if name != BASE}
    later = [{"methods": [*added], "base": found[BASE]}] if added else []
    return {**known, "methods": {**there, **added}, "later": [*known.get("later", []), *later]}


def forget_times(path: Path, methods: Collection[str]) -> None:
    """Take the figures of some methods out of a ``timing.json``, if there is one."""
    if not methods or not path.exists():
        return
    known = json.loads(path.read_text())
    known["methods"] = {name: found for name, found in known["methods"].items() if name not in methods}
    later = [{**some, "methods": [name for name in some["methods"] if name not in methods]} for some in known.get("later", [])]
    known["later"] = [some for some in later if some["methods"]]
    write_atomically(path, json.dumps(known, indent=1).encode())


def _in_turns(measuring: Measuring, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Figures by method, of those that did not fail."""
    failed: set[str] = set()

    def tried(name: str, work: Callable[[], T]) -> T | None:
        try:
            return None if name in failed else work()
        except ENDING:
            raise
        except Exception as error:  # the others go on
            LOG.warning("%s is not timed, it failed: %s", name, reason_of(error))
            failed.add(name)
            return None

    preparing = tqdm(names, desc="ready to be timed", unit="method")
    methods = {name: timed for name in preparing if (timed := tried(name, partial(ready, measuring, name)))}
    inputs = _inputs(measuring)
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in methods}
    for turn in tqdm(range(REPEATS + 1), desc="timing, in turns", unit="turn"):
        for name, timed in methods.items():
            for what, seconds in (tried(name, partial(_turn, measuring, timed, inputs, turn)) or {}).items():
                if turn:  # the first one warms up
                    taken[name].setdefault(what, []).append(seconds)
    found = {n: tried(n, partial(_summary, measuring, timed, taken[n], inputs)) for n, timed in methods.items()}
    return {name: summary for name, summary in found.items() if summary}


def _inputs(measuring: Measuring) -> dict[str, Tensor]:
    """Raw inputs ``[U, N, ...]`` by what is measured; users and examples are repeated where there are too few.

    Texts all have as many tokens as the backbone's reference input: nobody computes padding, or gains by leaving it out.
    """
    query, users, width = measuring.query, len(measuring.query), tokens(measuring)
    mine = _to_width(query.inputs(0), width)
    many = torch.stack([_to_width(query.inputs(i % users)[:1], width)[0] for i in range(USERS)])[:, None]
    return {
        "one user, 1 example": mine[None, :1],
        "one user, 64 examples": mine[torch.arange(64) % len(mine)][None],
        "64 users, 1 example each": many,
    }


def tokens(measuring: Measuring) -> int | None:
    """How many tokens the texts have that predictions are timed on; None for images."""
    backbone = measuring.world.model.backbone
    return backbone.reference_shape[0] if isinstance(backbone, TextBackbone) else None


def _to_width(inputs: Tensor, width: int | None) -> Tensor:
    """Token ids ``[N, L]`` as ``[N, width]`` real ones, cut off or said over and over; images as they are."""
    if width is None:
        return inputs
    real = [text[text >= 0] if (text >= 0).any() else text.new_zeros(1) for text in inputs]
    return torch.stack([text.repeat(width)[:width] for text in real])


def _turn(measuring: Measuring, timed: Timed, inputs: dict[str, Tensor], turn: int) -> dict[str, float]:
    user = turn % len(timed.shown)
    raw = fresh(timed.shown, user)
    found = {"personalise_seconds": _seconds(lambda: _personalised(measuring, timed, raw))}
    try:
        for what, values in inputs.items():
            found[what] = 1e3 * _seconds(partial(_served, timed, values))
    except CannotServe:
        return found
    return found


def _personalised(measuring: Measuring, timed: Timed, raw: Group) -> None:
    timed.method.personalise(measuring.world, timed.fitted, raw, measuring.plan.cost_weight)


def _served(timed: Timed, inputs: Tensor) -> None:
    if len(inputs) == 1:
        timed.one.serve(inputs)
    else:
        for some in inputs.split(timed.count):
            timed.many.serve(some)


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _summary(measuring: Measuring, timed: Timed, taken: dict[str, list[float]], inputs: dict[str, Tensor]) -> dict[str, Any]:
    raw = fresh(timed.shown, (REPEATS + 1) % len(timed.shown))  # somebody new: nothing is remembered of them
    peak = peak_bytes(lambda: _personalised(measuring, timed, raw))
    served = {what: _spread(values) for what, values in taken.items() if what in inputs}
    out: dict[str, Any] = {
        "fit_seconds": timed.fit_seconds,
        "personalise_seconds": _spread(taken["personalise_seconds"]),
        "personalise_peak_bytes": peak,
        "inference_ms": served,
    }
    if served:
        with FlopCounterMode(display=False) as counter:
            timed.one.serve(inputs["one user, 1 example"])
        out["flops_per_example"] = counter.get_total_flops()
    return out


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": float(median), "low": float(low), "high": float(high)}


def peak_bytes(work: Callable[[], None]) -> int:
    """The most bytes of tensors that ``work`` held at once on the CPU, beyond those that were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most

"""The rows of one place: every job of a plan on every test user of one seed and fold.

A row is written as soon as it is known; a run that goes on skips what is there.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from inspect import getsource
from sys import modules
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbones.artefacts import ArtefactError, cache_key
from backbones.bert import TextBackbone
from envs.scenario import Scenario
from eval.choosers import asked, digest
from eval.group import Group
from eval.measure import measures, support_order
from eval.methods.base import Fitted, Method, Predictor
from eval.plan import Job, Place, Plan
from eval.world import World
from meta.prepare import folder_of

LOG = logging.getLogger("dsa")
Key = tuple[str, str, str, str]
"""Method, cost weight, shown and user of a row, as they stand in the file."""
ENDING = (ArtefactError, ImportError, OSError)
"""What ends the run when a method raises it: files that are missing or damaged, a full disk. Anything else that it raises for
a user is said in that user's row, and the rest goes on."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice (torch has no class of its own for that on a CPU)."""
    said = ("not enough memory", "out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


def reason_of(error: BaseException) -> str:
    """What an error says, on one line."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}" if isinstance(error, LookupError) and said else said or type(error).__name__


@dataclass(frozen=True)
class Measuring:
    """One place of a plan.

    Attributes:
        plan: what is measured. place: the seed and fold. scenario: built for it, with its test users.
        smaller: methods that found too little memory, and how many users they were measured on at once in the end.
    """

    plan: Plan
    place: Place
    scenario: Scenario
    smaller: dict[str, int] = field(default_factory=dict)

    @cached_property
    def world(self) -> World:
        """What methods are fitted on."""
        facts = {"fold": self.place.fold} if self.place.fold is not None else {}
        kwargs = {**self.plan.env_kwargs, **facts}
        arguments = self.plan.scenario_arguments(self.place)[1]
        folder = folder_of(*(str(arguments.get(name)) for name in ("users", "backbone"))) / "methods"
        return World.of(self.scenario, self.plan.env, kwargs, self.place.seed, folder)

    def test(self, role: str) -> Group:
        """All test users' examples in a role."""
        return Group.of(self.scenario.data, "test", role)

    @cached_property
    def query(self) -> Group:
        """What predictions are measured on."""
        return self.test("query")

    @cached_property
    def support(self) -> Group:
        """What methods are shown."""
        return self.test("support")

    @cached_property
    def every_label(self) -> Group:
        """Support and validation examples, for methods that may see both, and for the long end of the curve."""
        return Group.joined(self.support, self.test("validation"))

    @cached_property
    def ordered(self) -> Group:
        """The same in the order of the curve: the support, then what goes beyond it."""
        pool = self.every_label
        draws = [self.world.generator(name, "shown") for name in pool.ids]
        counts = zip(self.support.counts, pool.counts, draws, strict=True)
        return pool.pick([support_order(first, count, draw) for first, count, draw in counts])

    def shown(self, method: Method, shown: int | None) -> Group:
        """What a method is shown of every test user."""
        if shown is not None:
            return self.ordered.first(shown)
        return self.support if method.labels == "support" else self.every_label

    @cached_property
    def choosers(self) -> frozenset[str]:
        """Digests of who helped to choose hyperparameters."""
        return asked(self.plan.choosers)

    def users(self, method: Method, shown: int | None) -> list[int]:
        """Positions among the test users of those whom a method is measured on, the same at every seed.

        Who helped to choose hyperparameters (:attr:`Plan.choosers`) is not among them.
        """
        slow, ids = self.slow(method), self.support.ids
        if shown is not None and shown not in self.plan.sizes(slow):
            return []
        counts = self.ordered.counts if shown is not None else self.support.counts
        free = [i for i in range(len(ids)) if digest(ids[i]) not in self.choosers]
        able = [i for i in free if counts[i] >= (shown or 0)]
        if not slow:
            return able
        if self.place.seed >= self.plan.slow_seeds:
            return []
        ranked = sorted(free, key=lambda i: hashlib.sha256(ids[i].encode()).digest())
        return sorted({*ranked[: self.plan.slow_users]} & {*able})

    def slow(self, method: Method) -> bool:
        """Whether a method is measured on few users: it differentiates through a text backbone."""
        return method.through_backbone and isinstance(self.world.model.backbone, TextBackbone)

    def fitted(self, name: str, cost_weight: float | None) -> Fitted:
        """A method's fit, kept on disk under a hash of its settings, the code and all that it is fitted on."""
        return self._fit(name, cost_weight)[0]

    def fit_seconds(self, name: str, cost_weight: float | None) -> float:
        """What fitting a method took when it was done."""
        return self._fit(name, cost_weight)[1]

    def _fit(self, name: str, cost_weight: float | None) -> tuple[Fitted, float]:
        method, weight = self.plan.method(name), self.plan.cost_weight if cost_weight is None else cost_weight

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            start = time.perf_counter()
            found = method.fit(self.world, weight)
            return found.tensors, {"facts": found.facts, "seconds": time.perf_counter() - start}

        facts = {"settings": method.settings(), "weight": cost_weight, "source": source_hash(type(method))}
        if method.leans_on:
            facts["leans_on"] = {other: self.plan.method(other).settings() for other in method.leans_on}
        tensors, kept = self.world.kept(f"fit-{name}", facts, make)
        return Fitted(tensors, kept["facts"]), kept["seconds"]

    def artefacts(self, job: Job) -> str:
        """A hash of what a job's rows follow from: model, examples, fit, settings, and the method's own files."""
        fitted, method = self.fitted(job.method, job.cost_weight), self.plan.method(job.method)
        facts = {"settings": method.settings(), "source": source_hash(type(method))}
        return cache_key(world=self.world.scenario.fingerprint, fitted=fitted.fingerprint(), **facts)

    def rows(self, job: Job, done: Callable[[Key], bool]) -> Iterator[dict[str, Any]]:
        """The rows of a job that are not done yet. If the method cannot be fitted, they say so."""
        method = self.plan.method(job.method)
        shown = self.shown(method, job.shown)
        missing = [i for i in self.users(method, job.shown) if not done(self._key(job, shown.ids[i]))]
        if not missing or method.refuses(self.world):
            return
        try:
            fitted, artefacts = self.fitted(job.method, job.cost_weight), self.artefacts(job)
        except ENDING:
            raise
        except Exception as error:
            LOG.warning("%s could not be fitted: %s", job.method, reason_of(error))
            for user in missing:
                failed = {**self._who(shown, user), "status": f"failed: when it was fitted: {reason_of(error)}"}
                yield {**self._facts(job, ""), **failed}
            return
        for start in range(0, len(missing), method.together):
            for figures in self._measured(method, fitted, shown, missing[start : start + method.together], job):
                yield {**self._facts(job, artefacts), **figures}

    def _facts(self, job: Job, artefacts: str) -> dict[str, Any]:
        return {
            "seed": self.place.seed,
            "fold": self.place.fold,
            "method": job.method,
            "cost_weight": job.cost_weight,
            "shown": job.shown,
            "artefacts": artefacts,
        }

    @staticmethod
    def _key(job: Job, user: str) -> Key:
        weight, shown = ("" if value is None else repr(value) for value in (job.cost_weight, job.shown))
        return job.method, weight, shown, user

    def _measured(self, method: Method, fitted: Fitted, shown: Group, users: Sequence[int], job: Job) -> list[dict[str, Any]]:
        """Figures of some users at once; where that fails, of each half, down to the user who is the cause."""
        weight = self.plan.cost_weight if job.cost_weight is None else job.cost_weight
        try:
            return self._predicted(method, fitted, shown, users, weight)
        except ENDING:
            raise
        except Exception as error:
            if len(users) > 1:
                if out_of_memory(error):
                    self.smaller[job.method] = min(len(users) // 2, self.smaller.get(job.method, len(users)))
                    LOG.warning(
                        "%s: %d users at once need too much memory; going on with half as many.", job.method, len(users)
                    )
                half = len(users) // 2
                parts = (users[:half], users[half:])
                return [row for some in parts for row in self._measured(method, fitted, shown, some, job)]
            LOG.warning("%s failed for user %r: %s", job.method, shown.ids[users[0]], reason_of(error))
            return [{**self._who(shown, users[0]), "status": f"failed: {reason_of(error)}"}]

    def _predicted(
        self, method: Method, fitted: Fitted, shown: Group, users: Sequence[int], weight: float
    ) -> list[dict[str, Any]]:
        seen, asked = shown.rows(users), self.query.rows(users)
        found: list[dict[str, Any]] = []
        predictors = [drawn.personalise(self.world, fitted, seen, weight) for drawn in draws(method)]
        logits = [predictor.logits(asked) for predictor in predictors]
        for row, user in enumerate(users):
            labels = asked.labels(row)
            each = [measures(values[row, : len(labels)], labels) for values in logits]
            paid = [self._paid(predictor, row) for predictor in predictors]
            labels_used = 0 if method.scope == "nobody" else seen.counts[row]
            figures = {**self._who(shown, user), "status": "ok", "labels": labels_used, **_averaged(each), **_averaged(paid)}
            figures["reward"] = figures["accuracy"] - weight * figures["cost"]
            found.append(figures)
        return found

    def _paid(self, predictor: Predictor, row: int) -> dict[str, Any]:
        """What one user's predictions take."""
        size, masks = predictor.sizes[row], predictor.masks
        mask = None if masks is None else masks[row]
        return {
            "mask": None if mask is None else "".join(str(int(bit)) for bit in mask),
            "active_fraction": None if mask is None else float(mask.double().mean()),
            "cost": self.world.costs_of([size.charged], None if masks is None else masks[row : row + 1])[0],
            "adaptations": predictor.adaptations,
            "trainable": size.trainable,
            "active": size.active,
            "stored": size.stored,
        }

    def _who(self, shown: Group, user: int) -> dict[str, Any]:
        place = int(self.scenario.users("test")[user])
        return {"user": shown.ids[user], "group": self.scenario.groups[place]}


def draws(method: Method) -> list[Method]:
    """A method, or what it is in each of its draws, over which figures are averaged."""
    return [replace(method, draw=k) for k in range(method.draws)] if method.draws > 1 else [method]  # type: ignore[type-var]


def _averaged(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over draws; of masks and counts of calibration the first draw's."""
    first = {name: each[0][name] for name in ("mask", "calibration") if name in each[0]}
    return first | {
        name: float(np.mean([one[name] for one in each])) if any(one[name] != value for one in each) else value
        for name, value in each[0].items()
        if name not in ("mask", "calibration")
    }


def source_hash(kind: type) -> str:
    """Of the files that a method and what it inherits from are written in: a plug-in's too is fitted anew when they change."""
    names = sorted({base.__module__ for base in kind.__mro__ if issubclass(base, Method)})
    return hashlib.sha256("".join(getsource(modules[name]) for name in names).encode()).hexdigest()[:12]


def single_thread() -> None:
    """One torch thread in this process: two processes with two each thrash."""
    torch.set_num_threads(1)

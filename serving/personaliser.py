"""Personalisation as a service: who is enrolled gets a mask and an adapter, and answers of their own in any batch.

Shapes: U users, M inputs, C classes, P pathways.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor

from agents.checkpoint import choose_plans, load_policy
from agents.run import RunConfig
from agents.transfer import trained_rules
from backbones.base import hash_tensors
from backbones.pathways import Pathways, Weights
from backbones.typed import check_types
from envs.rules import Rules
from envs.scenario import Scenario
from meta.inner import MetaInit, adapt
from serving.changes import has_changed
from serving.examples import Shelf, batch_of, labelled, ready
from serving.export import export_peft
from serving.records import LEVELS, Adapter, Codec
from serving.slots import Slots
from serving.store import UnknownUserError, UserStore, check_id
from users.base import Examples
from users.batch import CHUNK

UNKNOWN = ("error", "bare")
COUNTERS = ("predictions", "bare_predictions", "slot_hits", "slot_misses", "evictions")
"""Of the statistics, those that only rise."""
TOGETHER = 64
"""Users who are adapted in one program."""


@dataclass(frozen=True)
class Enrolled:
    """What a user was given.

    Attributes:
        pathways: names of those that are on; none, or the model's own readout alone: they are served the bare model.
        cost: of the mask, as a share of everything on: of the personal parameters, or of what else the run counts.
        cost_weight: the price at which the policy chose. labels: examples adapted on. bytes: of the record.
    """

    pathways: tuple[str, ...]
    cost: float
    cost_weight: float
    labels: int
    bytes: int


class Personaliser:
    """Enrols users, keeps them on disk, and predicts for batches that mix them. Safe for threads.

    Several processes may share a store: what one of them enrols, changes or forgets counts for the others' next call (until
    then they may still have it in memory). Users are new people: where the population model is cross-fitted, what it says of
    items that it was fitted on is not corrected, as it is for the population's own users.

    Args:
        scenario: whose population model, pathways, meta-initialisation and observations.
        policy: chooses masks. rules: that it was trained by.
        store: path of the database.
        slots: users whose adapters are in memory at once; the store may hold any number more.
        precision: of weights in the store, see :class:`serving.records.Codec`.
        keep: latest examples of a user that are kept for :meth:`update`; none by default, they are the user's.
        megabytes: that the store may take up.

    Raises:
        ForeignStoreError: if the store's users belong to another model, meta-initialisation or settings.
        ValueError: for a policy that decides in several rounds, and settings that make no sense.
    """

    def __init__(
        self,
        scenario: Scenario,
        policy: BasePolicy,
        rules: Rules,
        store: str | Path,
        *,
        slots: int = 1024,
        precision: str = "float16",
        keep: int = 0,
        megabytes: float | None = None,
    ) -> None:
        if scenario.data is None or scenario.look is None:
            raise ValueError(f"{scenario.name} has no model to serve; take a run on real examples, dsa/DigitsResNet-v0 say.")
        if rules.rounds > 1:
            raise ValueError(f"a policy that decides in {rules.rounds} rounds is not served; train one with rounds=1.")
        check_types(Personaliser.__init__, {"slots": slots, "keep": keep, "megabytes": megabytes}, "the personaliser")
        if keep < 0:
            raise ValueError(f"keep must be 0 or more examples, got {keep}.")
        self._scenario, self._policy, self._rules = scenario, policy, rules
        self.pathways: Pathways = scenario.data.pathways
        self.init: MetaInit = scenario.look.of.init
        self._codec, self._shelf = Codec(self.pathways, self.init, precision), Shelf(keep)
        self._slots = Slots(self.pathways, self.init, slots)
        self._store = UserStore(store, self.identity, megabytes)
        self._lock, self._choosing = threading.RLock(), threading.Lock()
        self._counts = dict.fromkeys(COUNTERS[:-1], 0)

    @staticmethod
    def from_run(run: str | Path, store: str | Path, **settings: Any) -> "Personaliser":
        """The policy and the adapters of a training run; ``settings`` as in :class:`Personaliser`.

        Raises:
            FileNotFoundError: if the folder is no run. ArtefactError: if its policy is missing or damaged.
        """
        folder = Path(run)
        config = RunConfig.load(folder)
        scenario = config.scenario(folder)
        policy = folder / "policy"
        return Personaliser(scenario, load_policy(policy, scenario)[0], trained_rules(policy), store, **settings)

    @property
    def identity(self) -> dict[str, str]:
        """What a store's users have in common: facts by name, see :class:`serving.store.UserStore`."""
        return {
            "model": self.pathways.model.fingerprint(),
            "meta-initialisation": hash_tensors(self.init.tensors()),
            "placement": type(self.pathways).__name__,
            "pathways": " ".join(self.pathways.names),
            "rank": str(self.pathways.rank),
            "precision": self._codec.precision,
            **({"of": "changes"} if self._codec.precision in LEVELS else {}),  # once they were of the weights themselves
        }

    def enroll(self, user: str, inputs: Any, labels: Sequence[int] | Tensor, cost_weight: float | None = None) -> Enrolled:
        """Choose a user's mask, adapt, store. Who is enrolled already is enrolled anew.

        Args:
            user: any string.
            inputs: the labelled examples, as the backbone reads them: images ``[N, ...]`` (a tensor or an array), a list of
                texts.
            labels: ``[N]`` class indices.
            cost_weight: the price of parameters; None: the one that the policy was trained for.

        Raises:
            ValueError: for examples, ids or weights that make no sense.
            StoreFullError: if there is no room. FloatingPointError: if adapting diverges.
        """
        return self.enroll_many({user: (inputs, labels)}, cost_weight)[user]

    @torch.inference_mode(False)  # adapters are made by gradients, wherever the caller may be
    def enroll_many(
        self, users: Mapping[str, tuple[Any, Sequence[int] | Tensor]], cost_weight: float | None = None
    ) -> dict[str, Enrolled]:
        """As :meth:`enroll`, for several users in one program (those with images of one size): all of them or none."""
        backbone, classes = self.pathways.model.backbone, self.pathways.model.num_classes
        shown = {}
        for user, (inputs, labels) in users.items():
            try:
                shown[check_id(user)] = labelled(backbone, inputs, labels, classes)
            except ValueError as error:
                raise ValueError(f"user {user!r}: {error}") from error
        return self._enrolled(shown, self._price(cost_weight)) if shown else {}

    def _price(self, cost_weight: float | None) -> float:
        check_types({"cost_weight": float | None}, {"cost_weight": cost_weight}, "the price")
        trained = self._rules.weight
        if cost_weight is None and trained.varies:
            raise ValueError(f"the policy serves cost weights {trained.given()}; say which one this user is to have.")
        weight = trained.low if cost_weight is None else cost_weight
        if not trained.low <= weight <= trained.high:
            raise ValueError(f"the policy was trained for cost weights of {trained.given()}, not {weight:g}.")
        return weight

    def _enrolled(self, shown: Mapping[str, Examples], price: float) -> dict[str, Enrolled]:
        made: dict[str, tuple[bytes, Enrolled]] = {}
        for alike in _by_size(shown):
            for start in range(0, len(alike), TOGETHER):
                made |= self._made({user: shown[user] for user in alike[start : start + TOGETHER]}, price)
        self._store.put({user: made[user][0] for user in shown})
        self._drop(shown)
        return {user: made[user][1] for user in shown}

    def _made(self, shown: Mapping[str, Examples], price: float) -> dict[str, tuple[bytes, Enrolled]]:
        """Users' records, not yet stored, and what is in them."""
        batch = batch_of(self.pathways, [*shown.values()])
        look = self._scenario.look
        assert look is not None
        embeddings, statistics = look.embedder.embed(batch).numpy(), look.of.observe(look.of.raw(batch)).numpy()
        lost = ~(np.isfinite(embeddings).all(1) & np.isfinite(statistics).all((1, 2)))
        if lost.any():
            user = [*shown][int(lost.argmax())]
            raise ValueError(
                f"what the model makes of the examples of user {user!r} is not finite; scale the inputs as in training."
            )
        if sent := self._scenario.sent:  # the policy sees no more of them than if they were elsewhere
            embeddings, statistics = sent.read(sent.send(embeddings, statistics, np.random.default_rng()), statistics)
        seen = replace(self._scenario, embeddings=embeddings, statistics=statistics)
        weight = price if self._rules.weight.varies else None
        with self._choosing:
            masks = choose_plans(self._policy, seen, np.arange(len(shown)), self._rules, weight)[:, -1]
        gates = torch.from_numpy(masks)
        weights = adapt(self.pathways, self.init, batch, gates)
        made = {}
        for row, (user, examples) in enumerate(shown.items()):
            adapter = Adapter(gates[row], {key: value[row] for key, value in weights.items()}, price, len(examples))
            record = self._record(user, adapter, examples)
            made[user] = record, self._described(adapter, len(record))
        return made

    def _record(self, user: str, adapter: Adapter, examples: Examples) -> bytes:
        try:
            packed = self._codec.pack(adapter)
        except FloatingPointError as error:
            raise FloatingPointError(f"user {user!r}: {error}") from error
        return framed(packed, self._shelf.pack(examples))

    def _drop(self, users: Iterable[str]) -> None:
        """Whose record has changed is read anew. After the store: whoever loads a user meanwhile holds the lock for it."""
        with self._lock:
            for user in users:
                self._slots.drop(user)

    def predict(self, users: Sequence[str], inputs: Any, unknown: str = "error") -> Tensor:
        """Logits ``[M, C]`` of M inputs, each for the user named beside it.

        Args:
            users: M ids, in any order, with repetitions.
            inputs: M of them.
            unknown: what to do for somebody who is not enrolled: ``"error"``, or serve them the ``"bare"`` model.

        Raises:
            UnknownUserError: names them. DamagedRecordError: if somebody's record has changed on disk.
            ValueError: for inputs that make no sense, or another number of users than of inputs.
        """
        if unknown not in UNKNOWN:
            raise ValueError(f"unknown={unknown!r}; choose from {', '.join(UNKNOWN)}.")
        if isinstance(users, str):
            raise ValueError(f"users must be a list of ids, one per input; give [{users!r}].")
        found = ready(self.pathways.model.backbone, inputs)
        if len(users) != len(found):
            raise ValueError(f"{len(users)} users but {len(found)} inputs; name one user per input.")
        logits = found.new_empty(len(found), self.pathways.model.num_classes, dtype=torch.float32)
        rows: dict[str, list[int]] = {}
        for row, user in enumerate(users):
            rows.setdefault(user, []).append(row)
        everybody = [*rows]
        for start in range(0, len(everybody), self._slots.count):
            some = everybody[start : start + self._slots.count]
            weights, gates = self._resident({user: len(rows[user]) for user in some}, unknown == "bare")
            self._answer(logits, found, [rows[user] for user in some], weights, gates)
        return logits

    def _resident(self, asked: Mapping[str, int], bare: bool) -> tuple[Weights, Tensor]:
        """Copies of weights ``[U, ...]`` and gates ``[U, P]`` of users and how much they ask; read from disk if in no slot."""
        users = [*asked]
        with self._lock:
            if self._store.changed():
                self._slots.clear()
            missing = self._load(users)
            if missing and not bare:
                raise UnknownUserError(_not_enrolled(missing))
            self._counts["predictions"] += sum(asked.values())
            self._counts["bare_predictions"] += sum(asked[user] for user in missing)
            known = [user for user in users if user not in missing]
            weights, gates = self._slots.take(known)
        if not missing:
            return weights, gates
        places = torch.tensor([place for place, user in enumerate(users) if user not in missing], dtype=torch.int64)
        wide = {key: value.new_zeros(len(users), *value.shape[1:]) for key, value in weights.items()}
        on = gates.new_zeros(len(users), gates.shape[1])
        on[places] = gates
        return {key: wide[key].index_copy_(0, places, value) for key, value in weights.items()}, on

    def _load(self, users: Sequence[str]) -> dict[str, None]:
        """Bring users into slots; those who are not enrolled, as an ordered set."""
        missing: dict[str, None] = {}
        present = [user for user in users if user in self._slots]
        for user in present:  # so that none of them gives way to the others
            self._slots.touch(user)
        self._counts["slot_hits"] += len(present)
        for user in users:
            if user in self._slots:
                continue
            try:
                self._slots.load(user, self._adapter(user))
                self._counts["slot_misses"] += 1
            except UnknownUserError:
                missing[user] = None
        return missing

    def _adapter(self, user: str) -> Adapter:
        return self._codec.unpack(_parts(self._store.get(user))[0])

    def _answer(self, logits: Tensor, inputs: Tensor, rows: list[list[int]], weights: Weights, gates: Tensor) -> None:
        """Fill in the rows of U users. Those with about as many are computed together, about ``CHUNK`` inputs at a time."""
        pieces = [(place, own[start : start + CHUNK]) for place, own in enumerate(rows) for start in range(0, len(own), CHUNK)]
        by_size: dict[int, list[tuple[int, list[int]]]] = {}
        for place, own in pieces:
            by_size.setdefault((len(own) - 1).bit_length(), []).append((place, own))
        for alike in by_size.values():
            width = max(len(own) for _, own in alike)
            for start in range(0, len(alike), max(1, CHUNK // width)):
                some = alike[start : start + max(1, CHUNK // width)]
                index = torch.tensor([own + own[:1] * (width - len(own)) for _, own in some])
                chosen = torch.tensor([place for place, _ in some])
                mine = {key: value[chosen] for key, value in weights.items()}
                with torch.no_grad():
                    logits[index] = self._forward(inputs[index], mine, gates[chosen])

    def _forward(self, inputs: Tensor, weights: Weights, gates: Tensor) -> Tensor:
        flat = self.pathways.model.backbone.trimmed(inputs.flatten(0, 1))
        return self.pathways.forward(flat.unflatten(0, inputs.shape[:2]), weights, gates).float()

    @torch.inference_mode(False)
    def update(self, user: str, inputs: Any, labels: Sequence[int] | Tensor, cost_weight: float | None = None) -> Enrolled:
        """New examples of an enrolled user: the mask is chosen and the adapter made anew, from new and earlier ones.

        Earlier examples are there as far as ``keep`` allows. They are left out where the user has changed, see
        :func:`serving.changes.has_changed`.

        Args:
            user: somebody who is enrolled.
            inputs: new ones, as in :meth:`enroll`.
            labels: theirs.
            cost_weight: None: the one that the user was enrolled at.

        Raises:
            UnknownUserError: for somebody who is not enrolled. Others as :meth:`enroll`.
        """
        model = self.pathways.model
        new = labelled(model.backbone, inputs, labels, model.num_classes)
        while True:
            before = self._store.get(user)
            packed, kept = _parts(before)
            adapter, earlier = self._codec.unpack(packed), self._shelf.unpack(kept)
            earlier = self._shelf.beside(earlier, new)
            changed = earlier is None or has_changed(self.pathways, self.init, adapter, earlier, new)
            price = self._price(adapter.cost_weight if cost_weight is None and self._rules.weight.varies else cost_weight)
            shown = self._shelf.latest(None if changed else earlier, new)
            record, given = self._made({user: shown}, price)[user]
            if self._store.replace(user, before, record):  # else somebody was faster, and theirs is what there is to update
                self._drop([user])
                return given

    def export(self, user: str, folder: str | Path) -> None:
        """Write an enrolled user's adapter as a PEFT checkpoint, see :func:`serving.export.export_peft`.

        Raises:
            UnknownUserError: for somebody who is not enrolled. ValueError: for a placement that PEFT does not know.
            FileExistsError: if the folder holds something already.
        """
        adapter = self._adapter(user)  # it lacks what is not the user's own (ANIL)
        export_peft(self.pathways, replace(adapter, weights=self.init.weights | adapter.weights), folder)

    def forget(self, *users: str) -> int:
        """Erase users from disk and memory. Returns how many of them were enrolled; others are no error."""
        try:
            return self._store.forget(users)
        finally:
            self._drop(users)

    def describe(self, user: str) -> Enrolled:
        """What an enrolled user was given. Raises :class:`UnknownUserError`."""
        record = self._store.get(user)
        return self._described(self._codec.unpack(_parts(record)[0]), len(record))

    def _described(self, adapter: Adapter, size: int) -> Enrolled:
        names = tuple(name for name, on in zip(self.pathways.names, adapter.gates.tolist(), strict=True) if on)
        cost = float(self.pathways.costs(adapter.gates))
        return Enrolled(names, cost, adapter.cost_weight, adapter.labels, size)

    def stats(self) -> dict[str, float]:
        """Users enrolled and resident, bytes on disk and in memory, and what was asked for so far."""
        with self._lock:
            enrolled = len(self._store)
            return {
                "enrolled": enrolled,
                "resident": len(self._slots),
                "slots": self._slots.count,
                "disk_bytes": self._store.bytes(),
                "slot_bytes": self._slots.bytes(),
                "evictions": self._slots.evictions,
                **self._counts,
            }

    def close(self) -> None:
        """Let go of the store."""
        self._store.close()

    def __enter__(self) -> "Personaliser":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _by_size(shown: Mapping[str, Examples]) -> list[list[str]]:
    """Users whose images are of one size, and can be computed together; texts all can."""
    found: dict[tuple[int, ...], list[str]] = {}
    for user, examples in shown.items():
        found.setdefault(tuple(examples.inputs.shape[1:]) if examples.inputs.is_floating_point() else (), []).append(user)
    return [*found.values()]


def framed(adapter: bytes, examples: bytes = b"") -> bytes:
    """A record as it is stored: an adapter and kept examples, each packed."""
    return len(adapter).to_bytes(4, "little") + adapter + examples


def _parts(record: bytes) -> tuple[bytes, bytes]:
    """The inverse of :func:`framed`."""
    end = 4 + int.from_bytes(record[:4], "little")
    return record[4:end], record[end:]


def _not_enrolled(users: Mapping[str, None]) -> str:
    named = ", ".join(map(repr, [*users][:3])) + (f" and {len(users) - 3} more" if len(users) > 3 else "")
    return f"not enrolled: {named}. Enrol them first, or ask for the bare model with unknown='bare'."

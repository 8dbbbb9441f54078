"""Pathway tables: what every mask is worth for every user, measured once, so that a step costs next to nothing.

``python -m envs.tabulate`` makes them, ``dsa/Tabular-v0`` plays them. One table serves every cost weight. Shapes: U users, of
which T are test users; M masks; P pathways; B pairs of user (by position) and mask.

In memory as on disk accuracy is fixed-point (uint16, in steps of 1/65535: off by at most 8e-6) and loss float16 (off by at
most one part in 2,048, clipped to +-65,504). What policies see is float32, to the bit what the live environment shows. So 960
users and 128 masks stay under 2 MB.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from backbones.artefacts import ArtefactError, exists, load_artefact, save_artefact
from backbones.costs import CostModel
from backbones.registry import did_you_mean
from envs.oracles import ROLES, Oracle, Plans, Users
from envs.scenario import Scenario

KIND = "pathway table"
VERSION = 1
"""Of the format, and of the way work is cut into batches (:mod:`envs.shards`), which decides the last bits of answers."""
FOR_EVERYBODY, FOR_TEST = ROLES[:2], ROLES[2:]
"""Roles that are tabulated for all users, and those that only comparisons on test users ask for."""
SCALE = 65535
WIDEST = 62
"""Most pathways of a table: the bits of a mask are one int64."""
DENSE = 16
"""Up to so many pathways a mask is looked up among 2^P places, above it is searched for."""
TIE = 1e-9
"""Rewards so close are equal; the cheaper mask wins."""
_PACKAGED = Path(__file__).with_name("data") / "digits-table"


@dataclass(frozen=True)
class PathwayTable:
    """Everything that a :class:`envs.scenario.Scenario` needs to be played without a model, and all answers.

    Attributes:
        environment: id of the environment that was tabulated.
        made_of: hashes by name of what the answers depend on, see :class:`envs.scenario.Scenario`.
        masks: ``[M, P]``, in ascending order of :func:`mask_keys`.
        accuracy, loss: by role ``[U, M]``, or ``[T, M]`` for the roles :data:`FOR_TEST`; uint16 and float16.
        name, pathways, splits, user_ids, user_info, groups, embeddings, statistics, costs, scores, label_counts, notes,
            fingerprint: as in the scenario.
    """

    environment: str
    made_of: Mapping[str, str]
    masks: Plans
    accuracy: Mapping[str, NDArray[np.uint16]]
    loss: Mapping[str, NDArray[np.float16]]
    name: str
    pathways: tuple[str, ...]
    splits: Mapping[str, NDArray[np.int64]]
    user_ids: tuple[str, ...]
    user_info: tuple[Mapping[str, Any], ...]
    groups: tuple[str, ...]
    embeddings: NDArray[np.float32]
    statistics: NDArray[np.float32]
    costs: CostModel
    scores: Mapping[str, NDArray[np.float64]]
    label_counts: Mapping[str, NDArray[np.int64]]
    notes: tuple[str, ...]
    fingerprint: str

    @staticmethod
    def of(
        environment: str,
        scenario: Scenario,
        masks: Plans,
        accuracy: Mapping[str, NDArray[np.uint16]],
        loss: Mapping[str, NDArray[np.float16]],
    ) -> "PathwayTable":
        """The table of a scenario, from answers encoded by :func:`encoded`."""
        everybody = np.arange(len(scenario.user_ids))  # may be computed on access: index, do not convert
        return PathwayTable(
            environment=environment,
            made_of=ingredients(scenario),
            masks=masks,
            accuracy=accuracy,
            loss=loss,
            name=scenario.name,
            pathways=scenario.pathways,
            splits=scenario.splits,
            user_ids=tuple(scenario.user_ids),
            user_info=tuple(scenario.user_info),
            groups=tuple(scenario.groups),
            embeddings=scenario.embeddings[everybody],
            statistics=scenario.statistics[everybody],
            costs=scenario.oracle.costs,
            scores={name: scores[everybody] for name, scores in scenario.scores.items()},
            label_counts=scenario.label_counts,
            notes=scenario.notes,
            fingerprint=scenario.fingerprint,
        )

    def save(self, path: Path) -> None:
        """Write ``<path>.json`` and the tensors beside it; what was there is replaced."""
        arrays: dict[str, NDArray] = {"masks": self.masks}
        arrays |= {f"costs/{name}": value.numpy() for name, value in self.costs.tensors().items()}
        arrays |= {"embeddings": self.embeddings, "statistics": self.statistics}
        arrays |= {f"accuracy/{role}": values for role, values in self.accuracy.items()}
        arrays |= {f"loss/{role}": values for role, values in self.loss.items()}
        arrays |= {f"splits/{split}": users.astype(np.int32) for split, users in self.splits.items()}
        arrays |= {f"scores/{name}": values.astype(np.float32) for name, values in self.scores.items()}
        arrays |= {f"label_counts/{role}": counts.astype(np.int32) for role, counts in self.label_counts.items()}
        facts = ("environment", "name", "pathways", "user_ids", "user_info", "groups", "notes", "fingerprint", "made_of")
        meta = {"version": VERSION, **{fact: getattr(self, fact) for fact in facts}}
        save_artefact(path, KIND, {name: torch.from_numpy(array) for name, array in arrays.items()}, meta)

    @staticmethod
    def load(path: str | Path) -> "PathwayTable":
        """Read a table, given with or without ``.json``.

        Raises:
            ArtefactError: if it is missing, damaged, or of another format version.
        """
        path = without_suffix(path)
        if not exists(path):
            raise ArtefactError(f"no pathway table at {path}.json; make one: python -m envs.tabulate --env ID --out {path}")
        tensors, meta = load_artefact(path, KIND)
        if meta["version"] != VERSION:
            raise ArtefactError(
                f"{path}.json is a pathway table of format version {meta['version']}, this program reads version {VERSION}; "
                f"tabulate again: python -m envs.tabulate --env {meta.get('environment')} --out {path} --overwrite"
            )
        fields: dict[str, Any] = {fact: meta[fact] for fact in ("environment", "name", "fingerprint", "made_of")}
        fields |= {fact: tuple(meta[fact]) for fact in ("pathways", "user_ids", "user_info", "groups", "notes")}
        fields |= {name: tensors[name].numpy() for name in ("masks", "embeddings", "statistics")}
        return PathwayTable(
            **fields,
            costs=_costs(tensors),
            accuracy=_part(tensors, "accuracy"),
            loss=_part(tensors, "loss"),
            scores=_part(tensors, "scores", np.float64),
            splits=_part(tensors, "splits", np.int64),
            label_counts=_part(tensors, "label_counts", np.int64),
        )

    @staticmethod
    def packaged() -> "PathwayTable":
        """The table of ``dsa/DigitsResNet-v0`` that comes with the package. Raises ``ArtefactError`` where it does not."""
        if not exists(_PACKAGED):
            raise ArtefactError(
                "this installation has no packaged pathway table; reinstall the package, or make one (python -m envs.tabulate "
                "--env dsa/DigitsResNet-v0 --out FILE) and name it: table=FILE"
            )
        return PathwayTable.load(_PACKAGED)

    def scenario(self) -> Scenario:
        """What is played: the tabulated scenario, answered from the table."""
        return Scenario(
            name=self.name,
            pathways=self.pathways,
            splits=self.splits,
            user_ids=self.user_ids,
            user_info=self.user_info,
            embeddings=self.embeddings,
            statistics=self.statistics,
            oracle=TabularOracle(self),
            observe=self.refuse_rounds,
            groups=self.groups,
            label_counts=self.label_counts,
            scores=self.scores,
            fingerprint=self.fingerprint,
            notes=self.notes,
            made_of=self.made_of,
        )

    def refuse_rounds(self, users: Users, plans: Plans) -> NDArray[np.float32]:
        """In place of statistics after some rounds: raise ``ValueError``."""
        raise ValueError(
            "a pathway table holds what one mask is worth, not several in turn; play with rounds=1, or with rounds in the live "
            f"environment {self.environment}."
        )

    def identity(self) -> dict[str, str]:
        """See :func:`identity`."""
        return identity(self.environment, self.made_of, self.fingerprint, self.masks)

    def columns(self, masks: Plans) -> NDArray[np.int64]:
        """Places of masks ``[B, P]`` among the table's, ``[B]``. Raises ``ValueError`` for one that was not tabulated."""
        keys = masks.astype(bool) @ self._powers
        if len(self.pathways) <= DENSE:
            found = self._places[keys]
            missing = found < 0
        else:
            found = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
            missing = self._keys[found] != keys
        if missing.any():
            mask = "".join(str(int(bit)) for bit in masks[missing.argmax()])
            raise ValueError(
                f"the mask {mask} is not among the {len(self.masks):,} of 2^{len(self.pathways)} that were tabulated; tabulate "
                f"more of them (--masks), or play the live environment {self.environment}."
            )
        return found

    def rows(self, users: Users, role: str) -> NDArray[np.int64]:
        """Rows ``[B]`` of users in the answers of a role. Raises ``ValueError`` for answers that were not tabulated."""
        if role in FOR_EVERYBODY:
            return users
        if role not in self.accuracy:
            raise ValueError(f"the table has no role {role!r}. {did_you_mean(role, self.accuracy)}")
        rows = self._tests[users]
        if (rows < 0).any():
            raise ValueError(
                f"the role {role!r} is tabulated for test users only, and {self.user_ids[users[rows.argmin()]]!r} is not one; "
                f"ask the live environment {self.environment}."
            )
        return rows

    def rewards(self, split: str, cost_weight: float, role: str = "validation") -> NDArray[np.float64]:
        """``accuracy - cost_weight * cost`` of every user of a split under every mask, ``[users, M]``."""
        return self._rewards(self.splits[split], cost_weight, role)

    def optimum(self, users: Users, cost_weight: float, role: str = "validation") -> tuple[Plans, NDArray[np.float64]]:
        """Each user's best tabulated mask ``[B, P]`` (of equals the cheapest) and its reward ``[B]``."""
        rewards = self._rewards(users, cost_weight, role)
        return self.masks[self._best(rewards)], rewards.max(1)

    def regret(self, users: Users, masks: Plans, cost_weight: float, role: str = "validation") -> NDArray[np.float64]:
        """How much less masks ``[B, P]`` earn than the users' best ones, ``[B]``, at least 0."""
        rewards = self._rewards(users, cost_weight, role)
        return rewards.max(1) - rewards[np.arange(len(users)), self.columns(masks)]

    def best_static(self, cost_weight: float, split: str = "train", role: str = "validation") -> NDArray[np.bool_]:
        """The mask ``[P]`` with the highest mean reward over a split (of equals the cheapest)."""
        return self.masks[self._best(self.rewards(split, cost_weight, role).mean(0)[None])[0]]

    def _rewards(self, users: Users, cost_weight: float, role: str) -> NDArray[np.float64]:
        return self.accuracy[role][self.rows(users, role)] / SCALE - cost_weight * self._prices

    def _best(self, rewards: NDArray[np.float64]) -> NDArray[np.int64]:
        top = rewards >= rewards.max(1, keepdims=True) - TIE
        return np.where(top, self._prices, np.inf).argmin(1)

    @cached_property
    def _prices(self) -> NDArray[np.float64]:
        """Of the masks, ``[M]``."""
        return self.costs.of(self.masks)

    @cached_property
    def _powers(self) -> NDArray[np.int64]:
        return np.int64(1) << np.arange(len(self.pathways))

    @cached_property
    def _keys(self) -> NDArray[np.int64]:
        return mask_keys(self.masks)

    @cached_property
    def _places(self) -> NDArray[np.int64]:
        places = np.full(2 ** len(self.pathways), -1)
        places[self._keys] = np.arange(len(self.masks))
        return places

    @cached_property
    def _tests(self) -> NDArray[np.int64]:
        """Place of each user among the test users, -1 for others."""
        places = np.full(len(self.user_ids), -1)
        places[self.splits["test"]] = np.arange(len(self.splits["test"]))
        return places


class TabularOracle(Oracle):
    """Answers from a table by array lookup: microseconds for a batch."""

    def __init__(self, table: PathwayTable) -> None:
        self.table, self.costs = table, table.costs

    def measure(self, users: Users, plans: Plans, roles: tuple[str, ...]) -> NDArray[np.float64]:
        """See :meth:`Oracle.measure`. Raises ``ValueError`` for several rounds, and for masks and roles not tabulated."""
        if plans.shape[1] > 1:
            self.table.refuse_rounds(users, plans)
        columns = self.table.columns(plans[:, 0])
        out = np.empty((len(users), len(roles), 2))
        for r, role in enumerate(roles):
            rows = self.table.rows(users, role)
            out[:, r, 0] = self.table.accuracy[role][rows, columns] / SCALE
            out[:, r, 1] = self.table.loss[role][rows, columns]
        return out


def mask_keys(masks: Plans) -> NDArray[np.int64]:
    """The bits of masks ``[B, P]`` as one number each, ``[B]``; bit p is pathway p."""
    return masks @ (np.int64(1) << np.arange(masks.shape[1]))


def encoded(answers: NDArray[np.float64]) -> tuple[NDArray[np.uint16], NDArray[np.float16]]:
    """Accuracy and loss ``[..., 2]`` as they are tabulated. Raises ``FloatingPointError`` for what cannot be one."""
    accuracy, loss = answers[..., 0], answers[..., 1]
    if not (np.isfinite(answers).all() and (accuracy >= 0).all() and (accuracy <= 1).all()):
        raise FloatingPointError("the oracle gave a NaN or infinite answer or an accuracy outside 0..1; mend it first.")
    largest = np.finfo(np.float16).max
    return np.rint(accuracy * SCALE).astype(np.uint16), loss.clip(-largest, largest).astype(np.float16)


def ingredients(scenario: Scenario) -> dict[str, str]:
    """Hashes by name of what a scenario's answers depend on."""
    return dict(scenario.made_of) or {"scenario": scenario.fingerprint}


def identity(environment: str, made_of: Mapping[str, str], fingerprint: str, masks: Plans) -> dict[str, str]:
    """What two tables must have in common to hold the same, by name."""
    digest = sha256(np.packbits(masks, axis=1).tobytes()).hexdigest()[:16]
    which = f"{len(masks)} of 2^{masks.shape[1]} ({digest})"
    return {"environment": environment, **made_of, "observations": fingerprint, "masks": which, "format version": str(VERSION)}


def differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Names in which two identities differ; observations, which follow from the rest, only where nothing else explains them."""
    names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    causes = set(names) - {"environment", "masks", "format version", "observations"}
    return [name for name in names if name != "observations" or not causes]


def without_suffix(path: str | Path) -> Path:
    """The name of an artefact, given with or without ``.json``."""
    return Path(str(path).removesuffix(".json"))


def _costs(tensors: Mapping[str, Tensor]) -> CostModel:
    """The cost model; tables from before there was another than the parameters' hold what every pathway costs."""
    if "costs" in tensors:
        return CostModel.of_pathways(tensors["costs"])
    return CostModel.from_tensors(
        {key.removeprefix("costs/"): value for key, value in tensors.items() if key.startswith("costs/")}
    )


def _part(tensors: Mapping[str, Tensor], part: str, as_type: DTypeLike | None = None) -> dict[str, NDArray[Any]]:
    """The arrays ``<part>/<name>`` by name, as another type where one is given."""
    found = {key.partition("/")[2]: tensor.numpy() for key, tensor in tensors.items() if key.startswith(f"{part}/")}
    return found if as_type is None else {name: array.astype(as_type) for name, array in found.items()}

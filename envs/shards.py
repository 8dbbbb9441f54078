"""The work of tabulating an environment, cut into shards that any process can do at any time with the same result.

A shard is a block of users of one split under a block of masks. It alone decides which users are adapted together, so that
the bits of an answer depend neither on the number of processes nor on what was done before a kill.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backbones.artefacts import DiskFullError, load_artefact, save_artefact
from backbones.pathways import READOUT, RUN, executed
from envs.oracles import ROLES, CachedOracle, Oracle, Plans, all_masks
from envs.registration import known_spec
from envs.scenario import Scenario, builder_of, check_arguments, load_scenario
from envs.single import PathwaySelectionEnv
from envs.tables import FOR_EVERYBODY, FOR_TEST, WIDEST, encoded, mask_keys
from users.base import SPLITS

KIND = "pathway table shard"
USERS, MASKS = 64, 16
"""Of a shard. Other numbers give answers with other last bits: raise :data:`envs.tables.VERSION` with them."""
EXHAUSTIVE = 10
"""Up to so many pathways every mask is tabulated."""
SAMPLED = 1024
"""Masks beyond that, where nobody says how many."""
OF_THE_SHELL = frozenset(signature(PathwaySelectionEnv.__init__).parameters) - {"scenario"}
"""Arguments by which an id may be registered that change no answer."""
ADAPTATIONS = {"validation": 0, "query": 1, "support_halves": 2, "query_all_labels": 1}
"""Per pair of user and mask; validation is measured in the same adaptation as query."""


class ShardError(RuntimeError):
    """A shard could not be measured; the message names it, the cause and the cure."""


@dataclass(frozen=True)
class Source:
    """An environment to tabulate, as a worker process is told of it.

    Attributes:
        environment: id, with its package before a colon if it is a plug-in's.
        arguments: of the scenario's builder, by name.
    """

    environment: str
    arguments: Mapping[str, Any]

    @staticmethod
    def of(environment: str, seed: int | None, more: Mapping[str, Any]) -> "Source":
        """The environment as registered, changed by a seed (None: its own) and further arguments.

        Raises:
            ValueError: for an unknown id or argument, with a suggestion.
        """
        own = {name: value for name, value in known_spec(environment).kwargs.items() if name not in OF_THE_SHELL}
        source = Source(environment, {**own, **({} if seed is None else {"seed": seed}), **more})
        check_arguments(*source._builder())
        return source

    def prepare(self) -> None:
        """Make the artefacts (backbone, meta-initialisation) that are not in the cache yet, and forget the scenario."""
        name, arguments = self._builder()
        builder_of(name)(**arguments)

    def scenario(self) -> Scenario:
        """The scenario, built once per process."""
        name, arguments = self._builder()
        return load_scenario(name, **arguments)

    def _builder(self) -> tuple[str, dict[str, Any]]:
        known_spec(self.environment)  # imports a plug-in, which registers its scenario
        rest: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in self.arguments.items()
        }
        return rest.pop("scenario"), rest


@dataclass(frozen=True, eq=False)
class Shard:
    """Some users of a split under some masks.

    Attributes:
        split: theirs. start: place of the first one within the split.
        users: positions. columns: places of the masks among the table's.
    """

    split: str
    start: int
    users: NDArray[np.int64]
    columns: NDArray[np.int64]

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.split}-{self.start}-{self.columns[0]}"

    @property
    def roles(self) -> tuple[str, ...]:
        """What is asked."""
        return ROLES if self.split == "test" else FOR_EVERYBODY

    @property
    def adaptations(self) -> int:
        """How often a user is adapted."""
        return len(self.users) * len(self.columns) * sum(ADAPTATIONS[role] for role in self.roles)


def table_masks(names: Sequence[str], count: int | None = None) -> Plans:
    """The masks of a table ``[M, P]``, in ascending order of their keys.

    Args:
        names: of the P pathways.
        count: None for every mask if P <= 10, else for 1,024 of them. A number, if it is below 2^P, for a sample: all_on,
            all_off, every pathway on its own, and masks of random density drawn from a fixed seed, all of them as they are
            executed (:func:`backbones.pathways.executed`); there may be fewer of these than the number.

    Raises:
        ValueError: for too many pathways, or too few masks for those that are always in the sample.
    """
    pathways, silent = len(names), 2 ** sum(name.endswith(RUN) for name in names)
    if pathways > WIDEST:
        raise ValueError(f"a table has at most {WIDEST} pathways, got {pathways}; use the live environment.")
    count = (2**pathways if pathways <= EXHAUSTIVE else SAMPLED) if count is None else count
    if count >= 2**pathways:
        return all_masks(pathways)
    always = executed(names, np.concatenate([np.zeros((1, pathways)), np.ones((1, pathways)), np.eye(pathways)]).astype(bool))
    masks = {int(key): mask for key, mask in zip(mask_keys(always), always, strict=True)}
    if count < len(masks):
        raise ValueError(
            f"--masks must be at least {len(masks)} (all_on, all_off and {pathways} single pathways), got {count}."
        )
    rng = np.random.default_rng(0)
    while len(masks) < min(count, 2**pathways - silent + (READOUT not in names)):  # those that say nothing are all one
        mask = executed(names, rng.random((1, pathways)) < rng.random())
        masks[int(mask_keys(mask)[0])] = mask[0]
    return np.stack([masks[key] for key in sorted(masks)])


def cut(scenario: Scenario, masks: Plans) -> list[Shard]:
    """All shards. Masks of one block have their first active pathway in common, as far as possible: batches start deep."""
    first = np.where(masks.any(1), masks.argmax(1), masks.shape[1])
    order = np.argsort(first, kind="stable")
    return [
        Shard(split, start, scenario.users(split)[start : start + USERS], order[block : block + MASKS])
        for split in SPLITS
        for start in range(0, len(scenario.users(split)), USERS)
        for block in range(0, len(masks), MASKS)
    ]


def work(source: Source, shard: Shard, masks: Plans, folder: Path) -> None:
    """Measure a shard and write its answers to ``folder``.

    Raises:
        DiskFullError: without room for them.
        ShardError: for whatever else goes wrong.
    """
    try:
        answers = measured(live_oracle(source.scenario()), shard, masks)
        accuracy, loss = encoded(answers)
        tensors = {"accuracy": torch.from_numpy(accuracy), "loss": torch.from_numpy(loss)}
        save_artefact(folder / shard.name, KIND, tensors, {"roles": shard.roles})
    except DiskFullError:
        raise
    except Exception as error:  # of any kind: it comes from another process, and from oracles that are not ours
        last = shard.start + len(shard.users) - 1
        raise ShardError(
            f"{shard.split} users {shard.start} to {last} could not be measured: {type(error).__name__}: {error} Finished "
            "shards are kept: remove the cause and give the same command again."
        ) from error


def live_oracle(scenario: Scenario) -> Oracle:
    """The oracle behind the cache: an answer must not depend on the batch in which it was once computed."""
    return scenario.oracle.live if isinstance(scenario.oracle, CachedOracle) else scenario.oracle


def measured(oracle: Oracle, shard: Shard, masks: Plans) -> NDArray[np.float64]:
    """Accuracy and loss of a shard's users under its masks, ``[roles, users, masks, 2]``."""
    users, plans = shard.users, masks[shard.columns]
    pairs = np.tile(users, len(plans)), np.repeat(plans, len(users), axis=0)[:, None]
    found = oracle.measure(*pairs, shard.roles)
    return found.reshape(len(plans), len(users), len(shard.roles), 2).transpose(2, 1, 0, 3)


def assembled(
    scenario: Scenario, masks: Plans, shards: list[Shard], folder: Path
) -> tuple[dict[str, NDArray[np.uint16]], dict[str, NDArray[np.float16]]]:
    """Accuracy and loss by role, as :class:`envs.tables.PathwayTable` has them, from the files of all shards.

    Raises:
        ArtefactError: for a shard that is missing or damaged.
    """
    rows = dict.fromkeys(FOR_EVERYBODY, len(scenario.user_ids)) | dict.fromkeys(FOR_TEST, len(scenario.users("test")))
    accuracy = {role: np.zeros((count, len(masks)), np.uint16) for role, count in rows.items()}
    loss = {role: np.zeros((count, len(masks)), np.float16) for role, count in rows.items()}
    for shard in shards:
        tensors, _ = load_artefact(folder / shard.name, KIND)
        for r, role in enumerate(shard.roles):
            places = shard.users if role in FOR_EVERYBODY else shard.start + np.arange(len(shard.users))
            accuracy[role][np.ix_(places, shard.columns)] = tensors["accuracy"][r].numpy()
            loss[role][np.ix_(places, shard.columns)] = tensors["loss"][r].numpy()
    return accuracy, loss

"""What a method may learn from: a population without its test users, seen through a model with pathways.

Shapes: U users, P pathways, S statistics, E width of an embedding.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from backbones.artefacts import cache_key, load_or_make
from backbones.base import PopulationModel
from backbones.pathways import Pathways
from envs.by_user import Observed
from envs.scenario import Scenario
from envs.statistics import Raw
from eval.group import Group
from meta.inner import MetaInit
from users.batch import Batch, Prepared

PLACES = ("data_root",)
"""Arguments of environments that say where files are, and nothing about what is in them."""
PACKAGES = ("agents", "backbones", "envs", "eval.methods", "meta", "users")
MODULES = ("group.py", "mask_searches.py", "world.py")
"""Whose code is part of what a fit is known by: what :mod:`eval.methods` is made of."""


@dataclass(frozen=True)
class World:
    """One seed (and fold) of an environment's population, without test users.

    Attributes:
        env: id. kwargs: arguments of the environment that differ from the id's. seed: of the scenario and of all draws.
        scenario: whose splits are ``train`` and ``val`` alone.
        folder: where what methods learn is kept.
    """

    env: str
    kwargs: Mapping[str, Any]
    seed: int
    scenario: Scenario
    folder: Path

    @staticmethod
    def of(scenario: Scenario, env: str, kwargs: Mapping[str, Any], seed: int, folder: Path) -> "World":
        """A scenario's world. Raises ``ValueError`` for an environment without a model (a formula, a table)."""
        if scenario.data is None or scenario.look is None:
            raise ValueError(
                f"{env} has no model that could be personalised in other ways; choose an environment of real examples "
                "(dsa/DigitsResNet-v0, or dsa/Personal-v0 with --env-kwargs users:... backbone:...)."
            )
        if scenario.sent is not None:
            raise ValueError("methods see examples themselves, nothing that devices send: leave out local_epsilon.")
        splits = {split: users for split, users in scenario.splits.items() if split != "test"}
        kept_back = cast(Prepared, _WithoutTest(scenario.data))
        return World(env, kwargs, seed, replace(scenario, splits=splits, data=kept_back), folder)

    @property
    def data(self) -> Prepared:
        """The users' examples. Asked for those of test users, its methods raise ``PermissionError``."""
        return self.scenario.data

    @property
    def look(self) -> Observed:
        """How users are observed."""
        assert self.scenario.look is not None
        return self.scenario.look

    @property
    def pathways(self) -> Pathways:
        """Along the population model."""
        return self.data.pathways

    def costs_of(self, charged: Sequence[int], masks: Tensor | None) -> list[float]:
        """What U users' models cost, as shares of everything on.

        By the parameters on that are each user's own (:attr:`eval.methods.base.Sizes.charged`). Where all that runs is
        counted: their executed masks ``[U, P]``; of those without, the bare model, whatever they add to it.
        """
        if self.scenario.counts == "parameters":
            return [count / float(self.pathways.sizes.sum()) for count in charged]
        masks = torch.zeros(len(charged), self.pathways.num_pathways) if masks is None else masks
        return self.pathways.costs(masks).tolist()

    @property
    def model(self) -> PopulationModel:
        """The model before anyone is personal. Frozen and shared: copy it before you change anything in it."""
        return self.data.pathways.model

    @property
    def init(self) -> MetaInit:
        """The meta-initialisation."""
        return self.look.of.init

    def group(self, split: str, role: str, users: Tensor | None = None) -> Group:
        """Examples of ``train`` or ``val`` users (all, or those at positions ``[U]`` within the split) in a role."""
        return Group.of(self.data, split, role, users)

    def observe(self, support: Batch) -> tuple[Tensor, Tensor, Raw]:
        """What is observed of U users by their support: embeddings ``[U, E]``, statistics ``[U, P, S]``, and raw scores."""
        raw = self.look.of.raw(support)
        return self.look.embedder.embed(support), self.look.of.observe(raw), raw

    def generator(self, *facts: Any) -> torch.Generator:
        """Random numbers that follow from the seed and from ``facts`` (a user's id, say) alone."""
        text = ":".join(map(str, (self.seed, *facts)))
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))

    def kept(
        self, what: str, facts: Mapping[str, Any], make: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-able facts that ``make`` gives, made once for this world and ``facts``, and kept on disk."""
        return load_or_make(self.folder / f"{what}-{self.key(**facts)}", what, make)

    def key(self, **facts: Any) -> str:
        """A hash of this world, of the code and of ``facts``: of what is learned here, with them."""
        arguments = {name: str(value) for name, value in self.kwargs.items() if name not in PLACES}
        made_of = {"scenario": self.scenario.fingerprint, "precision": self.scenario.made_of.get("precision", "float32")}
        return cache_key(env=self.env, arguments=arguments, **made_of, seed=self.seed, code=code_hash(), **facts)


@lru_cache(maxsize=1)
def code_hash() -> str:
    """Of the sources and hyperparameters that anything fitted may depend on: what other code has fitted is fitted anew."""
    folders = [Path(str(files(package))) for package in PACKAGES]
    modules = [Path(str(files("eval").joinpath(name))) for name in MODULES]
    sources = modules + sorted(path for folder in folders for suffix in ("py", "yml") for path in folder.rglob(f"*.{suffix}"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


class _WithoutTest:
    """A population seen through a model, whose methods give away no test user's examples.

    The population itself is at hand: that nothing follows from its test users is what :mod:`eval.conformance` checks.
    """

    def __init__(self, data: Prepared) -> None:
        self._data = data

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._data, name)
        return self._guarded(found) if name in ("rows", "part", "readouts", "batch") else found

    @staticmethod
    def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        def ask(split: str, *arguments: Any) -> Any:
            if split == "test":
                raise PermissionError("a method must not see test users while it is fitted; use train and val users.")
            return method(split, *arguments)

        return ask

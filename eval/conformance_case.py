"""One method in one world under test: its calls, watched, and the worlds it is fitted in.

Shapes: U users, N examples per user, C classes.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from backbones.base import hash_tensors
from envs.by_user import Observed
from envs.oracles import Oracle, Plans, Users
from eval.group import Group
from eval.methods.base import Fitted, Method, Predictor
from eval.val_users import shown_to
from eval.world import World
from users.base import ROLES, Examples, User
from users.batch import Prepared

USERS, ASKED = 3, 24
"""How many val users stand for new ones, and query examples of each that predictions are compared on."""
SEEN = ("train", "val")
TRAIN_AND_VAL = "read train and val users alone: world.group, world.scenario.users; never population.test or population.users."


@dataclass(frozen=True)
class Case:
    """A method in a world, some of whose val users stand for new ones.

    Attributes:
        name: of the method. method: itself. world: where. weight: the cost weight.
    """

    name: str
    method: Method
    world: World
    weight: float = 0.1

    def fail(self, problem: str, cure: str) -> NoReturn:
        """Raise ``AssertionError`` with the method's name, what is wrong and what to do about it."""
        raise AssertionError(f"method {self.name!r} on {self.world.env}: {problem} Cure: {cure}")

    def require(self, fine: bool, problem: str, cure: str) -> None:
        """:meth:`fail` unless all is ``fine``."""
        if not fine:
            self.fail(problem, cure)

    @cached_property
    def fitted(self) -> Fitted:
        """What the method learns."""
        return self.fit(self.world)

    @property
    def learns(self) -> bool:
        """Whether it has a ``fit`` of its own."""
        return type(self.method).fit is not Method.fit

    def fit(self, world: World, weight: float | None = None) -> Fitted:
        """Fit without any artefact of an earlier fit; whoever asks the oracle about test users fails."""
        oracle = WithoutTest(world.scenario.oracle, world.data.population.indices("test"))
        with TemporaryDirectory() as folder, self.watched("fit"):
            afresh = replace(world, folder=Path(folder), scenario=replace(world.scenario, oracle=oracle))
            try:
                return self.method.fit(afresh, self.weight if weight is None else weight)
            except PermissionError as error:
                self.fail(f"fit asks for test users: {error}", TRAIN_AND_VAL)

    @cached_property
    def shown(self) -> Group:
        """What the users show."""
        return shown_to(self.method, self.world, self._users)

    @cached_property
    def asked(self) -> Group:
        """What is asked of them."""
        return self.world.group("val", "query", self._users).first(ASKED)

    @property
    def _users(self) -> Tensor:
        return torch.arange(min(USERS, len(self.world.data.population.val)))

    def few(self, places: Callable[[int, int], Tensor]) -> Group:
        """Fewer shown examples: per role those at ``places(user, examples)``."""
        parts = self.shown.parts
        if parts is None:
            return self.shown.pick([places(user, n) for user, n in enumerate(self.shown.counts)])
        return Group.joined(*(part.pick([places(user, n) for user, n in enumerate(part.counts)]) for part in parts))

    def predictor(self, shown: Group, fitted: Fitted | None = None, weight: float | None = None) -> Predictor:
        """Personalise."""
        with self.watched("personalise"):
            return self.method.personalise(
                self.world, self.fitted if fitted is None else fitted, shown, self.weight if weight is None else weight
            )

    def logits(self, predictor: Predictor, asked: Group) -> Tensor:
        """Predict ``[U, N, C]``, 0 where padded."""
        with self.watched("logits"):
            found = predictor.logits(asked)
        present = asked.batch.weights > 0
        shape = (*present.shape, self.world.model.num_classes)
        self.require(found.shape == shape, f"logits have shape {tuple(found.shape)}, not {shape}.", "return [U, N, C].")
        self.require(not found.requires_grad, "logits carry a graph.", "predict under torch.no_grad().")
        found = torch.where(present[..., None], found, 0.0)
        self.require(bool(found.isfinite().all()), "logits are NaN or infinite.", "learn more slowly, or guard the division.")
        return found

    @cached_property
    def together(self) -> Predictor:
        """The users, personalised together."""
        return self.predictor(self.shown)

    @cached_property
    def predicted(self) -> Tensor:
        """Their logits."""
        return self.logits(self.together, self.asked)

    @contextmanager
    def watched(self, call: str) -> Iterator[None]:
        """Within: neither global random numbers nor torch's switches may change."""
        before = _switches()
        yield
        changed = [what for what, value in _switches().items() if value != before[what]]
        self.require(
            not changed,
            f"{call} changes {', '.join(changed)}.",
            "draw from world.generator(...), or restore what was before (torch.random.fork_rng).",
        )


def _switches() -> dict[str, object]:
    """Global state that calls must leave alone."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch's global random numbers": torch.get_rng_state().numpy().tobytes(),
        "NumPy's global random numbers": (kind, np.asarray(keys).tobytes(), *rest),
        "Python's global random numbers": random.getstate(),
        "whether gradients are on": torch.is_grad_enabled(),
        "the number of threads": torch.get_num_threads(),
        "the default type": torch.get_default_dtype(),
    }


def shared_state(world: World) -> dict[str, object]:
    """All that methods share and must not change, by name, as hashes."""
    model, population = world.model, world.data.population
    parameters, modules = list(model.parameters()), list(model.modules())
    examples = [getattr(user, role) for split in SEEN for user in getattr(population, split) for role in ROLES]
    batches = [world.group(split, role).batch for split in SEEN for role in ("support", "query")]
    sites = {f"{n}-{p}": site for n, batch in enumerate(batches) for p, site in enumerate(batch.table.sites)}
    labels = [each.labels for each in examples] + [batch.labels for batch in batches]
    return {
        "the population model's weights": hash_tensors(model.state_dict()),
        "which of its parameters require gradients": [p.requires_grad for p in parameters],
        "gradients of its parameters": [p.grad is None for p in parameters],
        "training or evaluation mode of its modules": [module.training for module in modules],
        "its modules": [type(module) for module in modules],
        "hooks of its modules": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules],
        "the meta-initialisation": hash_tensors(world.init.tensors()),
        "users' examples": hash_tensors({str(n): each.inputs for n, each in enumerate(examples)}),
        "users' labels": hash_tensors({str(n): each for n, each in enumerate(labels)}),
        "frozen features": hash_tensors(sites),
    }


class WithoutTest(Oracle):
    """An oracle that may not be asked about test users.

    Args:
        oracle: who answers. test: positions of test users.
    """

    def __init__(self, oracle: Oracle, test: range) -> None:
        self.oracle, self.test, self.costs = oracle, test, oracle.costs

    def measure(self, users: Users, plans: Plans, roles: tuple[str, ...]) -> np.ndarray:
        """See :meth:`Oracle.measure`. Raises ``PermissionError``."""
        if any(user in self.test for user in users.tolist()):
            raise PermissionError("what a mask is worth for test users must not be asked.")
        return self.oracle.measure(users, plans, roles)


def with_other_test_users(world: World) -> World:
    """The same world, had its test users other labels and their examples in another order."""
    known, classes = world.data, world.model.num_classes
    population = replace(known.population, test=tuple(_stranger(user, classes) for user in known.population.test))
    data = Prepared(world.pathways, population, known.folder, known.kept.limit / 1e9)
    look = Observed(data, world.look.embedder, world.look.of, lazy=True)
    observed = {name: look.arrays[name] for name in ("embeddings", "statistics")}
    scores = {name: look.arrays[name] for name in world.scenario.scores}
    scenario = replace(world.scenario, data=data, look=look, scores=scores, **observed)
    return World.of(scenario, world.env, world.kwargs, world.seed, world.folder)


def _stranger(user: User, classes: int) -> User:
    """A user of the same name with other labels, of the same examples in another order."""

    def other(examples: Examples) -> Examples:
        return Examples(examples.inputs.flip(0), (examples.labels + 1) % classes)

    return replace(user, support=other(user.support), validation=other(user.validation), query=other(user.query))

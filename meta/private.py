"""Rounds of meta-training that reveal little about any one user: drawn by chance, clipped as a whole, noised once, averaged.

A round draws every train user independently with the same probability (Poisson sampling), adapts each on their own examples,
clips the whole update of each, adds Gaussian noise once to the sum, and divides by the *expected* number of users: whoever
knows everybody else learns little about whether someone took part.

Sources: McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models"; Li et al. 2020, "Differentially
Private Meta-Learning"; the denominator that does not depend on who was drawn is the former's.

Shapes: U users, P pathways, K inner steps.
"""

import hashlib
import math
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbones.artefacts import ArtefactError
from backbones.pathways import Pathways
from backbones.registry import Registry
from meta.accountant import Accountant, BudgetError, Round, noise_for, usual_delta
from meta.inner import MetaInit, adapt, stacked, user_loss
from users.base import Population
from users.batch import Batch
from users.duplicates import check_duplicates

CHUNK = 32
"""Users whose updates are made at a time."""
POOLED = 512
"""The same where pathways read one vector of an example instead of its hidden states."""
PART = "meta-initialisation"
MERSENNE = slice(24, 24 + 624 * 8)
"""Where in the state of torch's generator the words of its Mersenne twister are."""


def together(pathways: Pathways) -> int:
    """How many users' updates fit into memory and are worth a pass through the pathways."""
    return POOLED if pathways.pooled else CHUNK


@dataclass(frozen=True)
class Privacy:
    """What is guaranteed, and how.

    Attributes:
        epsilon: of the whole training, at ``delta``.
        delta: None: the number of train users to the power of -1.1.
        clip: the norm to which a user's whole update is clipped.
        noise: standard deviation of the noise in units of ``clip``; None: the least that the budget bears.
        noise_seed: makes cohorts and noise repeatable, for experiments: whoever knows it is promised nothing. None: they come
            from the operating system's source of secrets.
        public_model: whether the examples that the population model was fitted on count as public.

    Raises:
        ValueError: for values out of range.
    """

    epsilon: float = 3.0
    delta: float | None = None
    clip: float = 1.0
    noise: float | None = None
    noise_seed: int | None = None
    public_model: bool = False

    def __post_init__(self) -> None:
        Accountant(self.epsilon, 0.5 if self.delta is None else self.delta)  # raises for what is out of range
        if not (self.clip > 0 and math.isfinite(self.clip)):
            raise ValueError(f"clip must be a number above 0, got {self.clip}.")
        if self.noise is not None and not (self.noise > 0 and math.isfinite(self.noise)):
            raise ValueError(f"noise must be a number above 0, got {self.noise}; leave it out to have it worked out.")


def secret(seed: int | None, step: int, what: str) -> torch.Generator:
    """Random numbers for one purpose in one round: from the operating system's secrets, or repeatable by a seed."""
    if seed is None:
        return unguessable()
    digest = hashlib.sha256(f"{seed} {step} {what}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def unguessable() -> torch.Generator:
    """A source whose whole state comes from the operating system: a seed would be 32 bits, which can be tried out."""
    generator = torch.Generator()
    state = generator.get_state().numpy().copy()
    words = state[MERSENNE].view(np.uint64)  # the twister's 624 words of 32 bits, kept in 64 each
    words[:] = np.frombuffer(secrets.token_bytes(4 * len(words)), np.uint32)
    generator.set_state(torch.from_numpy(state))
    torch.rand(1, generator=generator)
    return generator


def poisson_cohort(users: int, sampling: float, source: torch.Generator) -> Tensor:
    """Who takes part, in ascending order: each of so many users independently. There may be nobody."""
    return (torch.rand(users, generator=source, dtype=torch.float64) < sampling).nonzero()[:, 0]


def clipped(updates: Mapping[str, Tensor], clip: float) -> dict[str, Tensor]:
    """Users' updates ``{key: [U, ...]}`` in double precision, each user's scaled down as a whole to a norm of at most ``clip``.

    An update that is not finite counts as zero: it can be neither clipped nor reported.
    """
    flat = torch.cat([update.flatten(1) for update in updates.values()], 1).double()
    finite = flat.isfinite().all(1)
    norm = torch.where(finite[:, None], flat, 0.0).norm(dim=1)
    scale = torch.where(finite, (clip / norm.clamp_min(1e-300)).clamp_max(1.0), 0.0)

    def scaled(update: Tensor) -> Tensor:
        shape = (-1, *[1] * (update.dim() - 1))
        return torch.where(finite.view(shape), update.double(), 0.0) * scale.view(shape)

    return {key: scaled(update) for key, update in updates.items()}


def noised_mean(
    totals: Mapping[str, Tensor], clip: float, noise: float, expected: float, source: torch.Generator
) -> dict[str, Tensor]:
    """A round's release: sums over clipped updates with noise of ``noise * clip``, over the number of users expected."""
    draws = {key: torch.randn(total.shape, generator=source, dtype=torch.float64) for key, total in totals.items()}
    return {key: (total + noise * clip * draws[key]) / expected for key, total in totals.items()}


Updates = dict[str, Tensor]
UPDATES: Registry[Callable[[Pathways, MetaInit, Batch, Batch, Tensor], Updates]] = Registry("private algorithm")
"""By algorithm, each user's own meta-gradient: ``(pathways, init, support, query, gates) -> {key: [U, ...]}``."""
RATES = "log_rates"


@UPDATES.decorate("fomaml")
def fomaml_updates(pathways: Pathways, init: MetaInit, support: Batch, query: Batch, gates: Tensor) -> Updates:
    """Each user's gradient of their query loss after adaptation, of the start and the logarithms of the rates."""
    start = {key: w.detach().clone().requires_grad_() for key, w in stacked(init, len(support)).items()}
    log_rates = init.rates.detach().log().expand(len(support), *init.rates.shape).clone().requires_grad_()
    weights = adapt(pathways, replace(init, rates=log_rates.exp()), support, gates, start, meta=True)
    losses = user_loss(pathways.logits(query.frozen, weights, gates), query)
    leaves = {**start, RATES: log_rates}
    found = torch.autograd.grad(losses.sum(), [*leaves.values()], allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


@UPDATES.decorate("reptile")
def reptile_updates(pathways: Pathways, init: MetaInit, support: Batch, query: Batch, gates: Tensor) -> Updates:
    """From where each user ends, having adapted on all their examples, to the start. Rates are not learned."""
    ends = adapt(pathways, init, Batch.joined(support, query), gates)
    return {key: init.weights[key].detach() - end for key, end in ends.items()}


class PrivateRounds:
    """The private rounds of one training: who takes part, what is released, what that costs.

    Args:
        privacy: what is promised.
        users: N, train users.
        expected: users per round in the mean.
        rounds: that are planned.
        part: what is learned, for the account.
        before: rounds that were spent on other parts of the same users' data.

    Attributes:
        accountant: what is spent.
        kind: of every round.

    Raises:
        ValueError: if more users are expected than there are.
        BudgetError: if the planned rounds do not fit into the budget.
    """

    def __init__(
        self,
        privacy: Privacy,
        users: int,
        expected: int,
        rounds: int,
        part: str = PART,
        before: Mapping[Round, int] | None = None,
    ) -> None:
        if not 1 <= expected <= users:
            raise ValueError(f"rounds of {expected} users in the mean cannot be drawn from {users}: expect 1 to {users}.")
        delta = usual_delta(users) if privacy.delta is None else privacy.delta
        self.privacy, self.users, self.expected, self.rounds = privacy, users, expected, rounds
        sampling, spent = expected / users, dict(before or {})
        noise = privacy.noise or noise_for(privacy.epsilon, delta, [(sampling, rounds)], spent)
        self.kind = Round(part, sampling, noise)
        self.accountant = Accountant(privacy.epsilon, delta, spent, privacy.noise_seed is not None)
        if privacy.noise and not self.accountant.affords(self.kind, rounds):
            least = noise_for(privacy.epsilon, delta, [(sampling, rounds)], spent)
            raise BudgetError(
                f"{rounds} rounds with noise {privacy.noise:g} spend more than epsilon {privacy.epsilon:g}: take noise "
                f"{least:.3f}, fewer rounds, or a larger budget."
            )
        self._noise: torch.Generator | None = None

    def cohort(self, step: int) -> Tensor:
        """Who takes part in a round. It is charged first.

        Raises:
            BudgetError: if it would exceed the budget.
        """
        self.accountant.charge(self.kind, max(1, self.rounds - step))
        self._noise = self.source(step, "noise")
        return poisson_cohort(self.users, self.kind.sampling, self.source(step, "users"))

    def source(self, step: int, what: str) -> torch.Generator:
        """Random numbers of a round that nobody outside may know.

        Whatever chance decides about the users of a cohort (masks, which examples are support) must come from here, drawn for
        each independently: then one user more leaves the others' updates what they are, and no public seed tells them.
        """
        return secret(self.privacy.noise_seed, step, f"{self.kind.part}: {what}")

    def release(self, shapes: Mapping[str, Tensor], updates: Iterable[Updates]) -> Updates:
        """The noised mean of a cohort's updates, piece by piece; of the shapes of ``shapes``. Once per :meth:`cohort`."""
        if self._noise is None:
            raise RuntimeError("cohort() comes first, once for every release: noise is never used twice.")
        totals = {key: torch.zeros(like.shape, dtype=torch.float64) for key, like in shapes.items()}
        for some in updates:
            for key, update in clipped({key: some[key] for key in totals}, self.privacy.clip).items():
                totals[key] += update.sum(0)
        source, self._noise = self._noise, None
        found = noised_mean(totals, self.privacy.clip, self.kind.noise, self.expected, source)
        return {key: value.to(shapes[key].dtype) for key, value in found.items()}

    def resumed(self, state: Mapping[str, Any] | None, step: int, where: str) -> None:
        """Go on with what an earlier process had spent by round ``step``.

        Raises:
            ArtefactError: if its account is missing, is of another budget or other rounds, or does not add up.
        """
        if state is None:
            raise ArtefactError(
                f"the checkpoint in {where} has no account of the privacy that it has spent, and is not gone on with. Restore "
                "it; a training begun anew elsewhere adds to whatever of this one was seen."
            )
        found = account_of({"accountant": state}, where)
        mine = self.accountant
        expected = {**mine.rounds, self.kind: step} if step else mine.rounds
        if (found.epsilon, found.delta, found.rounds) != (mine.epsilon, mine.delta, expected):
            raise ArtefactError(
                f"the account of spent privacy in {where} is not that of {step} rounds under this budget: it was altered, or "
                "the settings were. Restore them; a training begun anew elsewhere adds to whatever of this one was seen."
            )
        self.accountant = found


def account_of(said: Mapping[str, Any], where: str) -> Accountant:
    """The account among an artefact's facts. Raises ``ArtefactError`` if it cannot be read."""
    try:
        return Accountant.of(said["accountant"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(f"the account of spent privacy in {where} cannot be read ({error!r}).") from error


def check_covered(population: Population, privacy: Privacy, algorithm: str) -> None:
    """See that nothing shared is learned from people outside the guarantee.

    Raises:
        ValueError: names what is not covered, with the cure; or users who are the same person.
    """
    UPDATES.get(algorithm)
    if population.folds is not None:
        raise ValueError(
            f"the population model of {population.name!r} is cross-fitted on everybody's examples, test users' too, without "
            "noise: choose a protocol with examples set aside for it, and declare these public."
        )
    if population.fitting is not None and not (population.fitting_is_public or privacy.public_model):
        raise ValueError(
            f"the population model of {population.name!r} is fitted on examples of people without noise: it is not covered. "
            "If these examples are public, say so (--public-model); else choose a backbone that brings its own classifier."
        )
    check_duplicates(population, "train", "val")

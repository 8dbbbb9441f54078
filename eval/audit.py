"""An audit of private rounds in one run: canary users whose updates shout, and how many of them the releases give away.

Every canary is in or out by a coin. Its update is as large as clipping lets it be, in a direction of its own, so that no
audit of what is released could be sharper; what is guessed right bounds the epsilon of the rounds from below.

A claim is a whole curve of epsilons by delta. It is tested at a small delta, because guesses disprove little at a large one.

Sources: Steinke et al. 2023, "Privacy Auditing with One (1) Training Run"; Nasr et al. 2023, "Tight Auditing of
Differentially Private Machine Learning" (canaries in the space of gradients).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from eval.attacks import best_guesses
from meta.accountant import spent_by
from meta.private import CHUNK, PrivateRounds, Updates

LOUD = 1000.0
"""Norm of a canary's update in clipping norms, before it is clipped."""
DELTA = 1e-6


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        epsilon: at least so much is lost, with 95 % confidence.
        claimed: what the rounds' account says at the same delta.
        guesses, right: about canaries.
        canaries: how many there were.
        delta: of both epsilons.
    """

    epsilon: float
    claimed: float
    guesses: int
    right: int
    canaries: int
    delta: float

    @property
    def passed(self) -> bool:
        """Whether the claim holds as far as anybody can see."""
        return self.epsilon <= self.claimed


def audit(rounds: PrivateRounds, seed: int = 0, delta: float = DELTA) -> Audit:
    """Play all planned rounds with canaries as the only users.

    Args:
        rounds: new ones; as many users as there are to be canaries, 1,000 or more.
        seed: of the coins.
        delta: at which the claim is tested.
    """
    canaries = rounds.users
    inside = torch.rand(canaries, generator=torch.Generator().manual_seed(seed)) < 0.5
    heard = torch.zeros(canaries, dtype=torch.float64)
    for step in range(rounds.rounds):
        cohort = rounds.cohort(step)
        heard += rounds.release({"w": heard}, _updates(cohort[inside[cohort]], canaries, rounds.privacy.clip))["w"]
    epsilon, guesses, right = best_guesses(heard.numpy(), inside.numpy(), delta)
    return Audit(epsilon, spent_by(rounds.accountant.rounds, delta), guesses, right, canaries, delta)


def _updates(present: torch.Tensor, canaries: int, clip: float) -> Iterator[Updates]:
    for some in present.split(CHUNK):
        updates = torch.zeros(len(some), canaries)
        updates[torch.arange(len(some)), some] = LOUD * clip
        yield {"w": updates}

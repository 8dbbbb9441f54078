"""What a device sends in place of what it observed of its user: clipped, with Gaussian noise, once.

Every release counts: who enrols or is updated twice has sent twice, and epsilons of what is sent of the same examples add up.

A server that holds the policy needs an embedding and statistics of every user whose mask it is to choose. With a local release
it sees neither: few directions of the observation, which public users set, clipped to a norm, and noise on top of that. Whoever
sees what was sent learns little about which observation it was: local differential privacy, which trusts nobody.

Sources: Kasiviswanathan et al. 2011, "What Can We Learn Privately?" (the local model); Balle & Wang 2018, "Improving the
Gaussian Mechanism for Differential Privacy" (the noise, by ``dp-accounting``).

Shapes: U users, E width of an embedding, P pathways, S statistics of which the first are the user's own, D directions.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from envs.by_user import ByUser
from envs.oracles import Plans, Users
from envs.scenario import Scenario
from envs.statistics import CLIP, STANDARDISED

DELTA = 1e-5
"""Of a local release, unless said otherwise."""
DIRECTIONS = 4
"""D: every direction more lets in more of the user and more noise."""
KEPT_WHOLE = 0.9
"""Share of public users whose observations clipping leaves as they are."""
SENT = "sent"
"""The fact by which a scenario says what its observations have gone through."""
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class LocalRelease:
    """The mechanism; built by :meth:`fit` on public users alone.

    Attributes:
        epsilon, delta: what one release guarantees, of any two observations.
        mean: ``[E + P * 5]``. axes: ``[E + P * 5, D]``, orthonormal.
        clip: the norm to which the D numbers are clipped.
        noise: standard deviation of what is added to each of them.
        trust: ``[D]``, by how much what arrives is shrunk to the mean, which takes nothing from the guarantee.
    """

    epsilon: float
    delta: float
    mean: NDArray[np.float64]
    axes: NDArray[np.float64]
    clip: float
    noise: float
    trust: NDArray[np.float64]

    @staticmethod
    def fit(
        embeddings: Floats, statistics: Floats, epsilon: float, delta: float = DELTA, directions: int = DIRECTIONS
    ) -> "LocalRelease":
        """From public users' observations.

        Args:
            embeddings: ``[U, E]``.
            statistics: ``[U, P, S]``.
            epsilon: of one release, and ``delta``.
            delta: see there.
            directions: D.

        Raises:
            ValueError: for an epsilon, delta or number of directions out of range. ImportError: without ``dp-accounting``.
        """
        if not (epsilon > 0 and math.isfinite(epsilon)):
            raise ValueError(f"local_epsilon must be a number above 0, got {epsilon}.")
        if not 0 < delta < 1:
            raise ValueError(f"the delta of a local release must be between 0 and 1, got {delta}.")
        seen = _joined(embeddings, statistics)
        if not seen.std(0).any():
            raise ValueError("a local release needs public (val) users who differ; these are all the same.")
        if not 1 <= directions <= min(seen.shape):
            raise ValueError(f"local_directions must be 1 to {min(seen.shape)} here, got {directions}.")
        mean = seen.mean(0)
        axes = np.linalg.svd(seen - mean, full_matrices=False)[2][:directions].T
        numbers = (seen - mean) @ axes
        clip = float(np.quantile(np.linalg.norm(numbers, axis=1), KEPT_WHOLE))
        noise = 2 * clip * _noise(epsilon, delta)  # any two clipped vectors lie at most so far apart
        own = _clipped(numbers, clip).var(0)
        return LocalRelease(epsilon, delta, mean, axes, clip, noise, own / (own + noise**2))

    def send(self, embeddings: Floats, statistics: Floats, source: np.random.Generator) -> NDArray[np.float64]:
        """What leaves the devices of U users, ``[U, D]``. A ``source`` that others can repeat guarantees nothing."""
        numbers = _clipped((_joined(embeddings, statistics) - self.mean) @ self.axes, self.clip)
        return numbers + self.noise * source.standard_normal(numbers.shape)

    def read(self, sent: NDArray[np.float64], statistics: Floats) -> tuple[Floats, Floats]:
        """What a policy is shown of U users: ``[U, E]`` and ``[U, P, S]``, from what was sent alone.

        Args:
            sent: ``[U, D]``.
            statistics: ``[U, P, S]``, of which only what is the same for everybody is used (depth, cost, gate).
        """
        seen = np.clip(self.mean + (sent * self.trust) @ self.axes.T, -CLIP, CLIP).astype(np.float32)
        width = seen.shape[1] - statistics.shape[1] * STANDARDISED
        own = seen[:, width:].reshape(len(seen), -1, STANDARDISED)
        return seen[:, :width], np.concatenate([own, statistics[:, :, STANDARDISED:]], 2)

    def __str__(self) -> str:
        return f"{self.axes.shape[1]} numbers at epsilon {self.epsilon:g}, delta {self.delta:g}"


def released(scenario: Scenario, epsilon: float, delta: float = DELTA, directions: int = DIRECTIONS, seed: int = 0) -> Scenario:
    """A scenario whose policies see of every user what a device would send, once. Val users, who are public, set how.

    Noise follows from ``seed`` and the user's position, so that experiments can be repeated; a device draws it in secret.
    Scores for rivals (``Scenario.scores``) are not what policies see, and stay as they are.

    Args:
        scenario: whose users.
        epsilon: of one release.
        delta: of it.
        directions: D, of the observation, that are sent.
        seed: of the noise.

    Raises:
        ValueError: for settings out of range, or a scenario without real observations. ImportError: without ``dp-accounting``.
    """
    if scenario.statistics.shape[-1] <= STANDARDISED:
        raise ValueError(f"{scenario.name} has no statistics of real pathways, of which a device could send a part.")
    public = scenario.users("val")
    release = LocalRelease.fit(scenario.embeddings[public], scenario.statistics[public], epsilon, delta, directions)
    shown = {
        "embeddings": np.zeros(scenario.embeddings.shape, np.float32),
        "statistics": np.zeros(scenario.statistics.shape, np.float32),
    }
    known = np.zeros(len(shown["embeddings"]), dtype=bool)

    def fill(users: NDArray[np.int64]) -> None:
        for user in np.unique(users[~known[users]]):
            mine = scenario.embeddings[user][None], scenario.statistics[user][None]
            sent = release.send(*mine, np.random.default_rng((seed, int(user))))
            read = release.read(sent, mine[1])
            shown["embeddings"][user], shown["statistics"][user] = read[0][0], read[1][0]
            known[user] = True

    def once(users: Users, plans: Plans) -> NDArray[np.float32]:
        raise ValueError("what a device sends of its user is sent once: play with rounds=1, or without local_epsilon.")

    said = f"{release}, seed {seed}"
    return replace(
        scenario,
        embeddings=ByUser(shown["embeddings"], fill),
        statistics=ByUser(shown["statistics"], fill),
        observe=once,
        personalise=None,
        sent=release,
        fingerprint=f"{scenario.fingerprint}, sent: {said}",
        made_of={**scenario.made_of, SENT: said},
        notes=(*scenario.notes, f"policies see what devices send: {release}"),
    )


def _noise(epsilon: float, delta: float) -> float:
    try:
        from dp_accounting import get_sigma_gaussian
    except ImportError as error:
        raise ImportError("a local release needs dp-accounting: pip install -e '.[privacy]'.") from error
    return float(get_sigma_gaussian(epsilon, delta))


def _joined(embeddings: Floats, statistics: Floats) -> NDArray[np.float64]:
    own = statistics[:, :, :STANDARDISED]
    return np.concatenate([embeddings, own.reshape(len(own), -1)], 1).astype(np.float64)


def _clipped(numbers: NDArray[np.float64], clip: float) -> NDArray[np.float64]:
    norm = np.linalg.norm(numbers, axis=1, keepdims=True)
    return numbers * np.minimum(1.0, clip / np.maximum(norm, 1e-300))

"""How much of a privacy budget has been spent: user-level differential privacy of rounds that draw users by Poisson sampling.

The numbers are those of Google's library dp-accounting (extra ``privacy``): privacy loss distributions, or Renyi differential
privacy where that promises more; both are upper bounds, and the one is checked against the other. Two populations are
neighbours if one has one user more.

Sources: Abadi et al. 2016, "Deep Learning with Differential Privacy"; McMahan et al. 2018, "Learning Differentially Private
Recurrent Language Models" (users instead of examples); Koskela et al. 2020 (privacy loss distributions).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from math import isfinite, sqrt
from typing import Any

from scipy.optimize import brentq

TOLERANCE = 0.02
"""By what share the tighter account may exceed the looser one before something must be wrong: rounding up makes less of a
difference, where the grid is as fine as it should be."""


LEAST, MOST = 0.3, 1000.0
"""Between which noise is looked for; with less, a sampled sum promises next to nothing."""
COARSE, FINE = 1e-3, 1e-4
"""Grids to which privacy losses are rounded up. The one ten times as coarse as dp-accounting's own takes a tenth of the time;
of rounds whose losses are large beside it, it tells .0001 more epsilon."""
RESOLUTION = 0.1
"""The grid's step, as a share of a round's usual loss: much coarser ones tell more epsilon than Renyi divergences do."""
ORDERS = (*range(2, 33), 40, 48, 64, 96, 128, 256)
"""Of Renyi divergences: whole ones, whose formula is exact for sampled Gaussian noise."""


class BudgetError(RuntimeError):
    """A round would spend more than the budget allows."""


class ContradictionError(BudgetError):
    """Two ways to account for the same rounds do not agree."""


@dataclass(frozen=True)
class Round:
    """One release: a sum over users who were drawn independently, with Gaussian noise.

    Attributes:
        part: what is learned by it (``"meta-initialisation"``, ``"policy"``).
        sampling: probability with which every user is drawn, in (0, 1].
        noise: standard deviation of the noise in units of the clipping norm, above 0.
    """

    part: str
    sampling: float
    noise: float


@dataclass
class Accountant:
    """What has been spent of ``epsilon`` at ``delta``, by all rounds of all parts together.

    Attributes:
        epsilon, delta: the budget.
        rounds: how many rounds of each kind there were.
        repeatable: whether some of their noise follows from a seed: whoever knows that is promised nothing.

    Raises:
        ValueError: for a budget out of range.
    """

    epsilon: float
    delta: float
    rounds: dict[Round, int] = field(default_factory=dict)
    repeatable: bool = False
    _afforded: dict[tuple[Round, int], int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < float("inf"):
            raise ValueError(f"epsilon must be a number above 0, got {self.epsilon}; 1 to 8 are usual.")
        if not 0 < self.delta < 1:
            raise ValueError(
                f"delta must lie between 0 and 1, got {self.delta}; one over the number of users, or less, is usual."
            )

    def spent(self) -> float:
        """The epsilon of all rounds so far at the budget's delta; 0 before the first.

        Raises:
            ContradictionError: if the two ways to account for them contradict each other.
        """
        return spent_by(self.rounds, self.delta)

    def affords(self, kind: Round, rounds: int = 1) -> bool:
        """Whether so many further rounds of a kind stay within the budget."""
        return spent_by({**self.rounds, kind: self.rounds.get(kind, 0) + rounds}, self.delta) <= self.epsilon

    def charge(self, kind: Round, planned: int = 1) -> None:
        """Take one round down, before it is released.

        Args:
            kind: of the round.
            planned: how many are to come, this one among them: whether they all fit is worked out once.

        Raises:
            BudgetError: if it would exceed the budget; nothing is taken down then.
        """
        others = sum(count for other, count in self.rounds.items() if other != kind)
        done = self.rounds.get(kind, 0)
        if self._afforded.get((kind, others), 0) <= done:
            rounds = planned if planned > 1 and self.affords(kind, planned) else 1
            if rounds == 1 and not self.affords(kind):
                raise BudgetError(
                    f"a further round would spend epsilon {spent_by({**self.rounds, kind: done + 1}, self.delta):.3f}, more "
                    f"than the budget of {self.epsilon:g} at delta {self.delta:.2g}: allow more, or more noise from the start."
                )
            self._afforded[kind, others] = done + rounds
        self.rounds[kind] = done + 1

    def state(self) -> dict[str, Any]:
        """Everything as JSON-able facts."""
        counted = [{**asdict(kind), "rounds": count} for kind, count in self.rounds.items()]
        return {"epsilon": self.epsilon, "delta": self.delta, "rounds": counted, "repeatable": self.repeatable}

    @staticmethod
    def of(state: Mapping[str, Any]) -> "Accountant":
        """The inverse of :meth:`state`. Raises ``KeyError`` or ``TypeError`` for what is none."""
        counted = {Round(**{k: v for k, v in each.items() if k != "rounds"}): each["rounds"] for each in state["rounds"]}
        return Accountant(state["epsilon"], state["delta"], counted, state["repeatable"])

    def card(self) -> list[str]:
        """Lines for readers: the budget, what of it is spent, and by what."""
        lines = [
            f"user-level epsilon {self.spent():.3f} of {self.epsilon:g} spent at delta {self.delta:.3g} (a user more or less)"
        ]
        for kind, count in self.rounds.items():
            alone = spent_by({kind: count}, self.delta)
            lines.append(
                f"  {kind.part}: {count} rounds, each user in with probability {kind.sampling:.4g}, noise {kind.noise:.3f} "
                f"times the clipping norm; alone epsilon {alone:.3f}"
            )
        lines.append(
            "  that of this training alone: whatever else is learned from the same users, a repetition too, adds to it"
        )
        if self.repeatable:
            lines.append("  **the noise follows from --noise-seed: whoever knows it is promised nothing**")
        return lines


def spent_by(rounds: Mapping[Round, int], delta: float) -> float:
    """The epsilon of rounds at a delta.

    Raises:
        ImportError: without dp-accounting.
        ContradictionError: if the two accounts contradict each other.
    """
    check_installed()
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import PLDAccountant

    if not any(rounds.values()):
        return 0.0
    wanted = RESOLUTION * _usual_loss(rounds)
    grid = min(COARSE, max(FINE, wanted))  # a coarser one than is wanted, or a delta below what is cut off, tells too much
    tight = _composed(PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, grid), rounds, delta)
    loose = _by_divergences(rounds, delta)
    if grid <= wanted and isfinite(tight) and tight > loose * (1 + TOLERANCE) + TOLERANCE:
        raise ContradictionError(
            f"by privacy loss distributions epsilon is {tight}, by Renyi divergences {loose}: one must be wrong."
        )
    return min(tight, loose)


def _usual_loss(rounds: Mapping[Round, int]) -> float:
    """About the standard deviation of one round's privacy loss, over all rounds."""
    squares = sum(count * (kind.sampling / kind.noise) ** 2 for kind, count in rounds.items())
    return sqrt(squares / sum(rounds.values()))


def _by_divergences(rounds: Mapping[Round, int], delta: float) -> float:
    from dp_accounting.rdp import RdpAccountant

    return _composed(RdpAccountant(ORDERS), rounds, delta)


def _composed(account: Any, rounds: Mapping[Round, int], delta: float) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

    for kind, count in rounds.items():
        if count:
            account.compose(PoissonSampledDpEvent(kind.sampling, GaussianDpEvent(kind.noise)), count)
    return float(account.get_epsilon(delta))


def check_installed() -> None:
    """Raise ``ImportError`` with the cure unless dp-accounting is there."""
    if find_spec("dp_accounting") is None:
        raise ImportError("private training needs dp-accounting: pip install -e '.[privacy]'.")


def noise_for(
    epsilon: float, delta: float, planned: Sequence[tuple[float, int]], spent: Mapping[Round, int] | None = None
) -> float:
    """The least noise (in clipping norms, to a thousandth of it) with which planned rounds stay within a budget.

    Args:
        epsilon: the budget.
        delta: of the budget.
        planned: pairs of a sampling probability and a number of rounds; all get the same noise.
        spent: rounds that were made before.

    Raises:
        BudgetError: if what was spent before leaves nothing.
    """
    before = dict(spent or {})
    if before and (used := spent_by(before, delta)) >= epsilon:
        raise BudgetError(f"epsilon {used:.3f} is spent already, of a budget of {epsilon:g}: allow more, or spend less before.")

    def excess(noise: float, account: Callable[[Mapping[Round, int], float], float]) -> float:
        kinds = {Round(f"planned {number}", sampling, noise): count for number, (sampling, count) in enumerate(planned)}
        return account({**before, **kinds}, delta) - epsilon

    if excess(LEAST, _by_divergences) <= 0:
        return LEAST
    high = MOST
    if excess(MOST, _by_divergences) <= 0:
        high = float(brentq(excess, LEAST, MOST, args=(_by_divergences,), xtol=1e-4))  # the looser account is quick
    elif excess(MOST, spent_by) > 0:
        raise BudgetError(f"no noise below {MOST:g} keeps these rounds within epsilon {epsilon:g}: plan fewer, or allow more.")
    while excess(high, spent_by) > 0:  # the quick account's root is found up to rounding only
        high *= 1.0005
    low = high / 2
    while excess(low, spent_by) <= 0:
        low, high = low / 2, low
    found = float(brentq(excess, low, high, args=(spent_by,), rtol=5e-4))
    while excess(found, spent_by) > 0:
        found *= 1.0005
    return found


def usual_delta(users: int) -> float:
    """``N ** -1.1``: less than one over the number of users."""
    return float(users) ** -1.1

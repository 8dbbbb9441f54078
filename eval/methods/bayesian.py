"""``bayesian``: every user's mask by sequential model-based optimisation, a library's."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from eval.methods.searches import MaskSearch, Trials

if TYPE_CHECKING:
    import optuna

REPEATS = 4
"""Proposals of masks that are known already, after which a random one is tried instead."""


@dataclass(frozen=True)
class BayesianSearch(MaskSearch):
    """Optuna's tree-structured Parzen estimator over P bits, every user with a study of their own.

    Source: Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization"; Watanabe 2023, "Tree-Structured Parzen
    Estimator: Understanding Its Algorithm Components and Their Roles for Better Empirical Performance". Kept: the estimator as
    Optuna has it. Not kept: its ten random trials at the beginning, more than the whole budget. Optuna's Gaussian process
    (``GPSampler``) takes 15 ms per trial and user with 5 pathways and 40 to 55 ms with 13 on one core, the estimator 1 ms.

    Attributes:
        startup: random masks before the estimator is asked; ``all_off`` is known to it besides.
    """

    startup: int = 2

    space: ClassVar = {"startup": (1, 2, 3)}
    needs: ClassVar[tuple[str, ...]] = ("optuna",)

    def search(self, trials: Trials) -> None:
        """See :meth:`MaskSearch.search`."""
        with _quiet():
            users = np.arange(len(trials.draws))
            studies = [_Study(trials, user, self.startup) for user in users.tolist()]
            for _ in range(trials.count):
                masks = np.stack([study.propose() for study in studies])
                for study, reward in zip(studies, trials(users, masks).tolist(), strict=True):
                    study.tell(reward)


class _Study:
    """One user's study, asked and told in turn.

    Args:
        trials: what was tried. user: position. startup: see :class:`BayesianSearch`.
    """

    def __init__(self, trials: Trials, user: int, startup: int) -> None:
        from optuna import create_study
        from optuna.distributions import BaseDistribution, CategoricalDistribution
        from optuna.samplers import TPESampler

        self._trials, self._user = trials, user
        bit = CategoricalDistribution((False, True))
        self._bits: dict[str, BaseDistribution] = {f"{p}": bit for p in range(trials.world.pathways.num_pathways)}
        seed = int(trials.draws[user].integers(2**31))
        self._study = create_study(direction="maximize", sampler=TPESampler(n_startup_trials=startup + 1, seed=seed))
        (off,) = trials.known[user].values()
        self._asked = self._named(np.zeros(len(self._bits), dtype=bool))
        self.tell(off)

    def propose(self) -> NDArray[np.bool_]:
        """A mask ``[P]`` that was not tried yet."""
        from optuna.trial import TrialState

        for _ in range(REPEATS):
            self._asked = self._study.ask(self._bits)
            mask = np.array([self._asked.params[name] for name in self._bits])
            if mask.tobytes() not in self._trials.known[self._user]:
                return mask
            self._study.tell(self._asked, state=TrialState.FAIL)  # forgotten: it would teach nothing
        mask = self._trials.untried(self._user)
        self._asked = self._named(mask)
        return mask

    def tell(self, reward: float) -> None:
        """What the mask proposed last is worth."""
        self._study.tell(self._asked, reward)

    def _named(self, mask: NDArray[np.bool_]) -> "optuna.Trial":
        """A trial of a given mask."""
        params: dict[str, Any] = dict(zip(self._bits, mask.tolist(), strict=True))
        self._study.enqueue_trial(params)
        return self._study.ask(self._bits)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within: Optuna does not announce every user's study."""
    from optuna.logging import WARNING, get_verbosity, set_verbosity

    before = get_verbosity()
    set_verbosity(max(before, WARNING))
    try:
        yield
    finally:
        set_verbosity(before)

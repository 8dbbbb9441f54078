"""``dsa/Tabular-v0``: any tabulated environment, at a cost per step of next to nothing."""

from typing import Any

from envs.local_release import DIRECTIONS, SENT, released
from envs.modelled import OBSERVED
from envs.scenario import Scenario
from envs.single import PathwaySelectionEnv
from envs.tables import PathwayTable


class TabularEnv(PathwaySelectionEnv):
    """Personalisation from a table of what every mask is worth for every user: no model, microseconds a step.

    ## Description

    Real adaptations, done beforehand: for every user and every mask ``python -m envs.tabulate`` adapted the pathways that the
    mask switches on and measured the result. The packaged table is that of ``dsa/DigitsResNet-v0`` with its default
    arguments: 960 users who see digits through a shift of their own, 128 masks. The agent sees and earns what it would
    there, up to the table's rounding (8e-6 in accuracy). Because every answer is known,
    :class:`envs.tables.PathwayTable` tells the exact optimum and the regret of any mask.

    ## Observation space

    That of the tabulated environment. For the packaged table a ``Dict``, all float32 within +-10, all from the support set
    alone: ``user`` ``[32]``, the embedding, and ``pathways`` ``[7, 8]``, see :class:`envs.digits.DigitsResNetEnv`.

    ## Action space

    ``MultiBinary(P)``; for the packaged table seven bits: six adapters in order of depth, then the head. All zero is
    `all_off`, the model as it was. In a table of a sample of masks the others raise ``ValueError``.

    ## Rewards

    ``accuracy on the validation examples - cost_weight * cost``, where ``cost`` is the share of the personal parameters
    that are switched on. One table serves every cost weight.

    ## Starting state

    The next user of a random order of the split.

    ## Episode end

    ``terminated`` after the first and only mask, never ``truncated``: a table does not know what a second mask would do
    to pathways adapted under a first. ``rounds`` above 1 raise ``ValueError``; the live environment takes them.

    ## Arguments

    * ``split`` (``"train"``): ``"train"``, ``"val"`` or ``"test"``;
    * ``cost_weight`` (0.1): lambda, or ``"uniform:LOW:HIGH"``, drawn for every episode and then observed as ``cost_weight``
      ``[1]``; ``rounds`` (1): nothing else; ``render_mode``: ``"ansi"`` or ``"rgb_array"``;
    * ``layerwise`` (False): decide one pathway per step, see :class:`envs.single.PathwaySelectionEnv`;
    * ``local_epsilon`` (None): policies see what a device would send of its user under local differential privacy, see
      :mod:`envs.local_release` (extra ``privacy``); ``local_directions`` (4): of the observation, that are sent; ``seed`` (0):
      of that noise;
    * ``table`` (None): a file that ``python -m envs.tabulate`` wrote, with or without ``.json``; None for the packaged one.

    ``info`` holds ``user`` and what the tabulated environment tells of them (``shifts``), and after a step ``accuracy``,
    ``loss``, ``cost``, ``active_fraction``, ``mask``, ``reward_accuracy``, ``reward_cost``.

    ## Versions

    * v0: first version.
    """

    several_rounds = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.core.rounds > 1:
            self.core.scenario.observe(self.core.users, self.core.plans)


def tabular(
    table: str | None = None, local_epsilon: float | None = None, local_directions: int = DIRECTIONS, seed: int = 0
) -> Scenario:
    """The scenario of :class:`TabularEnv`; a table knows no seed, the noise of a local release does.

    Raises:
        ArtefactError: if the file is missing, damaged, or of another format version, or the package has no table.
        ValueError: for settings of a local release that are out of range, and for a table of yours that cannot have one: it
            holds what devices sent already, or its scales tell of train users.
    """
    found = (PathwayTable.packaged() if table is None else PathwayTable.load(table)).scenario()
    if local_epsilon is None:
        return found
    if SENT in found.made_of:
        raise ValueError(f"{table} holds what devices sent already ({found.made_of[SENT]}): leave out local_epsilon.")
    if table is not None and not found.made_of.get(OBSERVED, "").startswith("val"):
        raise ValueError(
            f"with local_epsilon nothing of train users may be in the scales of observations, and those of {table} are theirs: "
            "tabulate with --env-kwargs observed_on:val."
        )
    return released(found, local_epsilon, directions=local_directions, seed=seed)

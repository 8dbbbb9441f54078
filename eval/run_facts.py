"""``run.json`` of a results folder: what was run, on whom, with which methods."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from backbones.costs import COSTS
from backbones.typed import misfits

FORMAT = 1
"""Of results folders. A change that readers must know of is a new number."""
TIMING = "timing.json"
"""Of a results folder: seconds and memory, where they were measured."""


class ResultsError(ValueError):
    """A folder holds no results, or not such as this version reads; the message names cause and cure."""


@dataclass(frozen=True)
class MethodFacts:
    """What a run says of a method, see :class:`eval.methods.base.Method`."""

    settings: Mapping[str, Any]
    scope: str
    labels: str
    trades: bool
    through_backbone: bool
    draws: int = 1


@dataclass(frozen=True)
class RunFacts:
    """What was run.

    Attributes:
        version: of the package. env, env_kwargs: the environment. seeds: run. folds: number of folds, None without.
        cost_weight: that the tables are about. cost_weights: at which methods with a trade-off were measured.
        simulated: whether every seed redraws the users; else they are the same people in every seed.
        population: its name. classes: C. pathways: names ``[P]``. costs: what
            each of them costs alone, as a share of ``C(all_on)``, ``[P]``. counts: what costs go by, one of
            :data:`backbones.costs.COSTS`; None where a run of before does not say.
        shown: sizes of the support-size curve. few_shown: those of methods that train through a text backbone.
        methods: by name. refused: methods that have no meaning here, and why. command: that made the rows. seconds: of one
            core. choosers: environments whose val users chose hyperparameters and are no test users here. smaller: methods that
            found too little memory, and how many users they were measured on at once instead.
    """

    version: str
    env: str
    env_kwargs: Mapping[str, Any]
    seeds: list[int]
    folds: int | None
    cost_weight: float
    cost_weights: list[float]
    simulated: bool
    population: str
    classes: int
    pathways: list[str]
    costs: list[float]
    shown: list[int]
    few_shown: list[int]
    methods: Mapping[str, MethodFacts]
    refused: Mapping[str, str]
    command: str
    seconds: float
    counts: str | None = None
    choosers: Sequence[str] = ()
    smaller: Mapping[str, int] = field(default_factory=dict)


AGAIN = "Run python -m eval.run again."


def read_json(path: Path, cure: str = AGAIN) -> dict[str, Any]:
    """A JSON object. Raises :class:`ResultsError`, which ends with the cure, if it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} is not JSON ({error}); was it cut short or edited? {cure}") from error
    if not isinstance(found, dict):
        raise ResultsError(f"{path} holds no JSON object. {cure}")
    return found


def read_run(folder: Path) -> RunFacts:
    """The facts of a results folder.

    Raises:
        ResultsError: if it is none, or of another version.
    """
    path = folder / "run.json"
    if not path.exists():
        raise ResultsError(
            f"{folder} is not a results folder: it has no run.json. python -m eval.run --out {folder} makes one."
        )
    found = read_json(path)
    if found.get("format") != FORMAT:
        raise ResultsError(
            f"{folder} is a results folder of another version: format {found.get('format')}, written by version "
            f"{found.get('version', 'unknown')} of the package; this one reads format {FORMAT}. Read it with that version, or "
            "run python -m eval.run into a new folder."
        )
    needed = [one.name for one in fields(RunFacts) if one.default is MISSING and one.default_factory is MISSING]
    missing = [name for name in needed if name not in found]
    if missing:
        raise ResultsError(f"{path} lacks {', '.join(missing)}; was it edited? {AGAIN}")
    facts = {one.name: found[one.name] for one in fields(RunFacts) if one.name in found}
    if facts.get("counts") not in (None, *COSTS):
        raise ResultsError(f"{path}: costs go by {', '.join(COSTS)}, not {facts['counts']!r}. {AGAIN}")
    names = [one.name for one in fields(MethodFacts) if one.default is MISSING]
    try:
        facts["methods"] = {
            name: MethodFacts(**{key: said[key] for key in names}, draws=said.get("draws", 1))
            for name, said in found["methods"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"{path}: every method needs {', '.join(names)} ({error!r}). {AGAIN}") from error
    wrong = misfits(RunFacts, facts) + [
        f"{fact} of {name}" for name, method in facts["methods"].items() for fact in misfits(MethodFacts, vars(method))
    ]
    if wrong:
        raise ResultsError(f"{path}: {', '.join(wrong)} cannot be what python -m eval.run wrote; was it edited? {AGAIN}")
    return RunFacts(**facts)

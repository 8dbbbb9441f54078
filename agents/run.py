"""A run's folder and its settings: what the command line, the YAML file and the defaults come to."""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from inspect import signature
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml

from agents.policies import POLICIES
from backbones.artefacts import write_atomically
from backbones.registry import did_you_mean
from backbones.typed import check_types
from envs import known_spec
from envs.rules import Rules
from envs.scenario import Scenario, builder_of, check_arguments, load_scenario
from meta.arguments import parse_value, whole_paths

PPO_TYPES: dict[str, Any] = {
    **dict.fromkeys(("n_steps", "batch_size", "n_epochs"), int),
    **dict.fromkeys(("learning_rate", "ent_coef", "vf_coef", "clip_range", "max_grad_norm", "gamma", "gae_lambda"), float),
    "target_kl": float | None,
    "normalize_advantage": bool,
}
"""Arguments of SB3's PPO that may be set, and their types."""
PPO_SETTINGS = frozenset(PPO_TYPES)
GATING_TYPES: dict[str, Any] = {
    "hidden": int,
    "initial_logit": float,
    "max_active": int | None,
    "optimizer_kwargs": dict[str, Any],
}
"""``policy_kwargs`` of :class:`agents.policies.GatingPolicy`, and their types; of SB3's others it would heed none."""
OTHER_SETTINGS = frozenset(
    {"average", "warm_start", "search", "n_envs", "total_timesteps", "eval_freq", "policy", "policy_kwargs"}
)


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run.

    Attributes:
        env: id. seed: of the scenario (where it takes one) and of PPO. cost_weight: lambda, or ``"uniform:LOW:HIGH"``.
        total_timesteps: adaptations to learn from. eval_freq: timesteps between evaluations on val users.
        n_envs: users at a time. policy: a name in :data:`agents.policies.POLICIES`. policy_kwargs: its arguments.
        average: decay per rollout of the average of the policy's weights that is evaluated and kept; 0 keeps the latest.
        warm_start: begin as the best static mask of train users (``GatingPolicy`` only), and keep what is better by more
            than one standard error on val users. With few train users much of the reward is noise to be learned by heart.
        search: measure the rivals that try hundreds of masks per test user as well; slow where test users are many.
        target_active: share of pathways that the policy is to switch on; the cost weight is moved until it does.
        cotrain: turns of meta-training under the policy's own masks before the policy's final training, see
            :mod:`agents.cotrain`.
        tensorboard_log: where the curves go, into a folder named like the run's; None for ``tensorboard`` in the run's.
        ppo: arguments of SB3's PPO. env_kwargs: further arguments of the environment.
    """

    env: str
    seed: int
    cost_weight: float | str
    total_timesteps: int
    eval_freq: int
    n_envs: int
    average: float
    policy: str
    policy_kwargs: dict[str, Any] = field(default_factory=dict)
    warm_start: bool = False
    search: bool = True
    target_active: float | None = None
    cotrain: int = 0
    tensorboard_log: str | None = None
    ppo: dict[str, Any] = field(default_factory=dict)
    env_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(RunConfig, vars(self), "settings")
        check_types(PPO_TYPES, self.ppo, "settings")
        if self.policy not in POLICIES:
            raise ValueError(f"unknown policy {self.policy!r}. {did_you_mean(self.policy, POLICIES)}")
        self._check_numbers()
        self._check_ppo()
        self._check_rules(self.rules)
        check_arguments(*self.scenario_arguments())

    def _check_numbers(self) -> None:
        counts = {name: getattr(self, name) for name in ("total_timesteps", "eval_freq", "n_envs")}
        counts |= {name: value for name, value in self.ppo.items() if PPO_TYPES.get(name) is int}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be 0 to {2**32 - 1}, got {self.seed}.")
        for name, value in self.ppo.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}.")
        if self.cotrain < 0:
            raise ValueError(f"cotrain must be at least 0 turns, got {self.cotrain}.")
        if not 0 <= self.average < 1:
            raise ValueError(f"average must be at least 0 and below 1, got {self.average}.")
        if self.target_active is not None and not 0 < self.target_active <= 1:
            raise ValueError(f"target_active is a share of the pathways, above 0 and at most 1; got {self.target_active}.")

    def _check_ppo(self) -> None:
        """What SB3 would refuse late or not at all."""
        for name in ("clip_range", "max_grad_norm"):
            if self.ppo.get(name, 1.0) <= 0:
                raise ValueError(f"{name} must be above 0, got {self.ppo[name]}: nothing would be learned.")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= self.ppo.get(name, 1.0) <= 1:
                raise ValueError(f"{name} must be 0 to 1, got {self.ppo[name]}.")
        few = min(self.ppo.get("batch_size", 64), self.n_envs * self.ppo.get("n_steps", 2048))
        if few < 2 and self.ppo.get("normalize_advantage", True):
            raise ValueError(
                "one step per batch has no spread to normalise advantages by: raise batch_size (or n_envs, n_steps) to 2 or "
                "more, or give normalize_advantage:false."
            )
        if self.policy == "GatingPolicy":
            check_types(GATING_TYPES, self.policy_kwargs, "policy_kwargs")
            for name in self.policy_kwargs:
                if name not in GATING_TYPES:
                    raise ValueError(f"GatingPolicy takes no {name!r}. {did_you_mean(name, GATING_TYPES)}")
            if self.policy_kwargs.get("hidden", 1) < 1:
                raise ValueError(f"hidden must be at least 1, got {self.policy_kwargs['hidden']}.")

    def _check_rules(self, rules: Rules) -> None:
        """What does not go with the policy, or with what an episode consists of."""
        limited = self.policy_kwargs.get("max_active") is not None
        for name, wanted in (("warm_start", self.warm_start), ("max_active", limited)):
            if wanted and self.policy != "GatingPolicy":
                raise ValueError(f"{name} needs the policy GatingPolicy, not {self.policy!r}.")
        if self.warm_start and rules.layerwise:
            raise ValueError("warm_start departs from a whole mask; pass -P warm_start:false where steps decide one pathway.")
        if limited and rules.layerwise:
            raise ValueError("max_active needs the scores of all pathways at once; leave it out where steps decide one.")
        if self.target_active is not None and rules.weight.varies:
            raise ValueError(
                "target_active moves the cost weight itself; give one number as cost_weight to start from, no range."
            )

    def events(self, folder: Path) -> Path:
        """Where the curves of the run in ``folder`` are."""
        return Path(self.tensorboard_log) / folder.resolve().name if self.tensorboard_log else folder / "tensorboard"

    @property
    def rules(self) -> Rules:
        """What an episode consists of."""
        given = {**known_spec(self.env).kwargs, **self.env_kwargs}
        return Rules(self.cost_weight, **{name: given[name] for name in ("rounds", "layerwise") if name in given})

    def scenario(self, folder: Path | None = None, turn: int | None = None) -> Scenario:
        """The environment's scenario, built with this run's seed.

        Args:
            folder: of the run; needed where adapters were co-trained, because it holds them.
            turn: of co-training after which; None: the last.
        """
        name, kwargs = self.scenario_arguments()
        turn = self.cotrain if turn is None else turn
        if turn:
            if folder is None:
                raise ValueError("a co-trained run keeps its initialisation in its folder; give the folder.")
            kwargs["init"] = str(self.init_of(folder, turn))
        return load_scenario(name, **kwargs)

    @staticmethod
    def init_of(folder: Path, turn: int) -> Path:
        """Where the initialisation is after a turn of co-training, without suffix."""
        return folder.resolve() / f"meta-{turn}"

    def scenario_arguments(self) -> tuple[str, dict[str, Any]]:
        """Name and arguments of the scenario's builder."""
        kwargs = {**known_spec(self.env).kwargs, **self.env_kwargs}
        name = kwargs.pop("scenario")
        for rule in ("rounds", "layerwise"):
            kwargs.pop(rule, None)
        return name, {"seed": self.seed, **kwargs} if "seed" in signature(builder_of(name)).parameters else kwargs

    def save(self, folder: Path) -> None:
        """Write ``config.json``."""
        write_atomically(folder / "config.json", json.dumps(asdict(self), indent=1).encode())

    @staticmethod
    def load(folder: Path) -> "RunConfig":
        """Read ``config.json``. Raises ``FileNotFoundError`` with the cure if the folder is no run."""
        path = folder / "config.json"
        if not path.exists():
            raise FileNotFoundError(f"{folder} is not a run: it has no config.json. Give the folder that training named.")
        try:
            found = RunConfig(**json.loads(path.read_text()))
            return replace(found, env_kwargs=whole_paths(found.env_kwargs))  # older runs may hold relative paths
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); restore it from a backup or train anew.") from error


def check_device(name: str) -> None:
    """Raise ``ValueError`` unless torch knows the device and can use it: SB3 would train on the CPU without a word."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; give cpu, cuda or cuda:0, say.") from error
    if device.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise ValueError(f"there is no {name} here: torch finds no CUDA device. Leave --device out, or mend torch's CUDA.")
    if (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"there is no {name} here: torch finds {count} CUDA devices, counted from cuda:0. Give one of these.")


def hyperparameters(env_id: str, overrides: list[str]) -> dict[str, Any]:
    """The YAML entry for an id (or ``default``), changed by ``name:value`` overrides.

    Raises:
        ValueError: for a name that is not a setting, with a suggestion, or an override without a colon.
    """
    known_spec(env_id)
    entries = yaml.safe_load(files("agents").joinpath("hyperparameters/ppo.yml").read_text())
    settings = {**entries["default"], **entries.get(env_id, {})}
    for override in overrides:
        name, colon, value = override.partition(":")
        if not colon:
            raise ValueError(f"-P takes name:value, got {override!r}.")
        if name not in PPO_SETTINGS | OTHER_SETTINGS:
            raise ValueError(f"unknown hyperparameter {name!r}. {did_you_mean(name, PPO_SETTINGS | OTHER_SETTINGS)}")
        settings[name] = parse_value(value)
    changed = {override.partition(":")[0] for override in overrides}
    if "policy" in changed and "policy_kwargs" not in changed:
        settings["policy_kwargs"] = {}  # the YAML's are for the YAML's policy
    return settings


def numbered_folder(root: Path, env_id: str) -> Path:
    """The first unused ``<root>/<env name>_<n>``, which is made, so that no other program takes it."""
    root.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        folder = root / f"{env_id.split('/')[-1]}_{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError  # numbers do not end

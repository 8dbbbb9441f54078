"""Tiny worlds to try methods in: few users, a backbone hardly trained, one for each placement and one of texts."""

from functools import cache
from pathlib import Path

from backbones.artefacts import cache_root
from envs import MINIATURES, known_spec
from envs.scenario import Scenario, load_scenario
from eval.world import World


def scenario(env_id: str = "dsa/DigitsResNet-v0", **more) -> Scenario:
    """The environment's scenario in its miniature form (``MINIATURES``); ``more`` changes its arguments."""
    kwargs = {**known_spec(env_id).kwargs, **MINIATURES[env_id], **more}
    for rule in ("rounds", "layerwise"):
        kwargs.pop(rule, None)
    return load_scenario(kwargs.pop("scenario"), seed=0, **kwargs)


def world(env_id: str = "dsa/DigitsResNet-v0", folder: Path | None = None, **more) -> World:
    """The same without test users."""
    return World.of(scenario(env_id, **more), env_id, {**MINIATURES[env_id], **more}, 0, folder or cache_root() / "methods")


@cache
def digits(placement: str = "inline") -> World:
    """Twelve train, four val users of the digits. ``"exit"``: beside the model, its own readout a pathway."""
    gates = {"placement": "side", "gates": "exit"} if placement == "exit" else {"placement": placement}
    return world(**gates, pretrain_epochs=6)

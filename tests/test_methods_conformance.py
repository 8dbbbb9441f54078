"""Every registered method in three tiny worlds."""

from typing import Any

import pytest

from eval.conformance import check_method
from eval.methods import METHODS, method_class

SHORT: dict[str, Any] = {"total_timesteps": 256}
TURN: dict[str, Any] = SHORT | {"meta_steps": 2}
QUICK: dict[str, dict[str, Any]] = {
    "ppo": SHORT,
    "cotrained": TURN,
    "cotrained_static": TURN,
    "cotrained_all_on": TURN,
    "self_critical": {"timesteps": 256},
    "hard_concrete": {"steps": 5},
    "joint": {"steps": 20},
    "feddpa": {"joint_steps": 20},
}
"""Hyperparameters that make a method quick here."""
SLOW_INLINE = ("cotrained_static", "validation_search")
"""Try every mask, which takes long where each needs the network: the other two worlds are enough."""


def cases():
    """World and method. Whoever trains the backbone has no pathways: their placement makes no difference there."""
    for name in METHODS:
        for world in ("digits_world", "side_world", "text_world"):
            if not ((world == "side_world" and trains_backbone(name)) or (world == "digits_world" and name in SLOW_INLINE)):
                yield world, name


def trains_backbone(name):
    try:
        return method_class(name).through_backbone
    except ModuleNotFoundError:
        return False


@pytest.fixture(autouse=True)
def quick_policies(monkeypatch):
    """Whoever deals the policy's masks trains a policy with tuned settings."""
    monkeypatch.setattr("eval.methods.dealt.settings_for", lambda *_: SHORT)


@pytest.mark.parametrize(("world", "name"), list(cases()))
def test_method(request, world, name):
    try:
        method_class(name)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    if reason := check_method(name, request.getfixturevalue(world), **QUICK.get(name, {})):
        pytest.skip(reason)

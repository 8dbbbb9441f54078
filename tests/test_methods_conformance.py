"""Every registered method in three tiny worlds."""

from typing import Any

import pytest
import worlds

from eval.conformance import check_method
from eval.methods import METHODS, make_method, method_class

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
    yield "readers_world", "item_covariance"  # the others refuse it


@pytest.fixture
def readers_world(real_data, monkeypatch):
    """Readers of the same jokes; they are few, so fewer labels per joke have to do."""
    monkeypatch.setattr("agents.simple.DENSE", 10)
    return worlds.world("dsa/JesterBert-v0")


def trains_backbone(name):
    try:
        return method_class(name).through_backbone
    except ModuleNotFoundError:
        return False


@pytest.fixture(autouse=True)
def quick_policies(monkeypatch):
    """Whoever deals the policy's masks trains a policy with tuned settings."""
    monkeypatch.setattr("eval.methods.dealt.settings_for", lambda *_: SHORT)


def test_no_method_is_refused_everywhere(digits_world, side_world, text_world, readers_world):
    """One that came to refuse all worlds would be skipped below."""
    every = (digits_world, side_world, text_world, readers_world)
    for name in METHODS:
        try:
            method = make_method(name)
        except ModuleNotFoundError:
            continue
        assert not all(method.refuses(world) for world in every), name


@pytest.mark.parametrize(("world", "name"), list(cases()))
def test_method(request, world, name):
    try:
        method_class(name)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    if reason := check_method(name, request.getfixturevalue(world), **QUICK.get(name, {})):
        pytest.skip(reason)

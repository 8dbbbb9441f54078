"""Every registered method in three tiny worlds."""

import pytest

from eval.conformance import check_method
from eval.methods import METHODS, method_class

QUICK: dict[str, dict] = {"ppo": {}}
"""Hyperparameters that make a method quick here."""
WORLDS = ("digits_world", "side_world", "text_world")


def cases():
    """Methods that train the backbone do without pathways: the placement makes no difference to them."""
    for world in WORLDS:
        for name in METHODS:
            if world != "side_world" or not method_class(name).through_backbone:
                yield world, name


@pytest.mark.parametrize(("world", "name"), list(cases()))
def test_method(request, world, name):
    if reason := check_method(name, request.getfixturevalue(world), **QUICK.get(name, {})):
        pytest.skip(reason)

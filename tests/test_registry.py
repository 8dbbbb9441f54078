from types import SimpleNamespace

import pytest

import backbones
from backbones import make_backbone, register_backbone, registry
from backbones.registry import Registry, did_you_mean
from envs.planted import planted
from envs.scenario import SCENARIOS, builder_of, load_scenario


class FakeEntryPoints(dict):
    """What `importlib.metadata.entry_points(group=...)` answers with, as far as it is used."""

    @property
    def names(self):
        return set(self)


@pytest.fixture
def colours():
    known = Registry("colour")
    known.register("crimson", 1)
    known.register("cyan", 2)
    return known


@pytest.fixture
def installed(monkeypatch):
    """Pretend that another distribution brings the colour "magenta"; counts how often it is loaded."""
    loads = []
    plugin = SimpleNamespace(load=lambda: loads.append(1) or 3)

    def entry_points(group):
        return FakeEntryPoints(magenta=plugin) if group == "dsa.colours" else FakeEntryPoints()

    monkeypatch.setattr(registry, "entry_points", entry_points)
    return loads


def test_the_closest_known_name_is_suggested_and_all_are_listed():
    assert did_you_mean("crimsn", ["cyan", "crimson"]) == "Did you mean 'crimson'? Known: crimson, cyan."


def test_nothing_is_suggested_when_nothing_is_close():
    assert did_you_mean("zzz", ["cyan", "crimson"]) == "Known: crimson, cyan."
    assert did_you_mean("zzz", []) == "Known: none."


def test_a_registered_thing_is_found_by_name(colours):
    assert (colours.get("crimson"), colours.get("cyan")) == (1, 2)
    assert list(colours) == ["crimson", "cyan"]


def test_a_taken_name_is_refused_and_keeps_its_thing(colours):
    with pytest.raises(ValueError, match="colour 'cyan' is registered already"):
        colours.register("cyan", 9)
    assert colours.get("cyan") == 2


def test_an_unknown_name_is_answered_with_a_suggestion(colours):
    with pytest.raises(ValueError, match=r"unknown colour 'cian'\. Did you mean 'cyan'\? Known: crimson, cyan\."):
        colours.get("cian")


def test_an_unregistered_name_is_gone_and_can_be_taken_again(colours):
    colours.unregister("cyan")
    assert list(colours) == ["crimson"]
    with pytest.raises(ValueError, match="unknown colour 'cyan'"):
        colours.get("cyan")
    colours.register("cyan", 9)
    assert colours.get("cyan") == 9


def test_unregistering_what_never_was_raises(colours):
    with pytest.raises(KeyError, match="mauve"):
        colours.unregister("mauve")


def test_the_decorator_registers_and_returns_the_function(colours):
    @colours.decorate("teal")
    def teal():
        return 5

    assert colours.get("teal") is teal
    assert teal() == 5


def test_entry_points_of_other_distributions_count_as_registered(colours, installed):
    assert list(colours) == ["crimson", "cyan", "magenta"]
    assert colours.get("magenta") == 3


def test_a_scenario_of_an_entry_point_is_built_by_what_it_loads(monkeypatch):
    def mine(seed: int = 0):
        return planted(seed)

    monkeypatch.setattr(registry, "entry_points", lambda group: FakeEntryPoints(mine=SimpleNamespace(load=lambda: mine)))
    try:
        assert builder_of("mine") is mine and load_scenario("mine", seed=1).name == "planted"
        with pytest.raises(ValueError, match=r"no argument 'sed'\. Did you mean 'seed'"):
            load_scenario("mine", sed=1)
    finally:
        SCENARIOS.unregister("mine")


def test_an_entry_point_is_loaded_once_and_only_when_asked_for(colours, installed):
    colours.get("cyan")
    assert installed == []
    colours.get("magenta")
    colours.get("magenta")
    assert installed == [1]


def test_entry_points_are_suggested_too(colours, installed):
    with pytest.raises(ValueError, match="Did you mean 'magenta'"):
        colours.get("magneta")


def test_what_is_registered_here_wins_over_an_entry_point(colours, installed):
    colours.register("magenta", 7)
    assert colours.get("magenta") == 7
    assert installed == []


def test_make_backbone_suggests_a_name():
    with pytest.raises(ValueError, match=r"unknown backbone 'resnet-smal'\. Did you mean 'resnet-small'"):
        make_backbone("resnet-smal")


def test_make_backbone_hands_its_arguments_to_the_factory():
    register_backbone("echo", lambda **kwargs: kwargs)
    try:
        assert make_backbone("echo", num_classes=3) == {"num_classes": 3}
    finally:
        backbones.BACKBONES.unregister("echo")
    assert "echo" not in list(backbones.BACKBONES)


def test_the_backbones_in_the_docs_are_registered():
    assert {"resnet-small", "resnet18", "resnet34", "resnet50"} <= set(backbones.BACKBONES)

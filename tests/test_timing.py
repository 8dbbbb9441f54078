"""Timing: what is measured side by side, and what is added to a folder later."""

import logging

import pytest
import torch

from backbones.artefacts import ArtefactError
from envs import MINIATURES
from eval import timing
from eval.methods.head import Head
from eval.methods.unchanged import Base
from eval.plan import Plan
from eval.timing import time_methods

ENV = "dsa/DigitsResNet-v0"
SMALL = {**MINIATURES[ENV], "pretrain_epochs": 6}


def plan(*methods: str) -> Plan:
    """A plan on a miniature."""
    return Plan(ENV, SMALL, ("base", *methods), seeds=1)


@pytest.fixture
def quick(monkeypatch):
    """One repeat, and few users."""
    monkeypatch.setattr(timing, "REPEATS", 1)
    monkeypatch.setattr(timing, "USERS", 4)


@pytest.fixture(scope="module")
def known():
    """Of base and all_on, by as many threads as every test has."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "REPEATS", 1)
        patch.setattr(timing, "USERS", 4)
        return time_methods(plan("all_on"))


@pytest.fixture
def asked(monkeypatch):
    """Names of methods that are timed, call by call."""
    calls, whole = [], timing._in_turns
    monkeypatch.setattr(timing, "_in_turns", lambda measuring, names: calls.append(list(names)) or whole(measuring, names))
    return calls


@pytest.mark.usefixtures("quick")
def test_methods_added_later_are_timed_beside_base_and_the_others_keep_their_figures(known, asked):
    found = time_methods(plan("all_on", "head"), known)
    assert asked == [["base", "head"]]
    assert {name: found["methods"][name] for name in known["methods"]} == known["methods"]
    assert set(found["methods"]) == {"base", "all_on", "head"} and found["methods"]["head"]["flops_per_example"] > 0
    assert known["loaded"] == timing.LOADED  # of images too
    (later,) = found["later"]
    assert later["methods"] == ["head"] and later["base"]["inference_ms"] != known["methods"]["base"]["inference_ms"]
    more = time_methods(plan("all_on", "head", "prototypes"), found)
    assert [one["methods"] for one in more["later"]] == [["head"], ["prototypes"]] and "later" not in known


def test_texts_are_brought_to_one_length_without_padding():
    texts = torch.tensor([[5, 6, 7, -1, -1], [1, 2, 3, 4, 8], [9, -1, -1, -1, -1], [-1] * 5])
    assert timing._to_width(texts, 4).tolist() == [[5, 6, 7, 5], [1, 2, 3, 4], [9] * 4, [0] * 4]
    assert timing._to_width(texts, None) is texts


@pytest.mark.usefixtures("quick")
def test_figures_of_texts_of_another_length_are_not_kept(known, asked, monkeypatch):
    assert known.get("tokens") is None
    found = time_methods(plan("all_on", "head"), {**known, "tokens": 32})
    assert asked == [["base", "all_on", "head"]] and "later" not in found and found["tokens"] is None


@pytest.mark.usefixtures("quick")
def test_when_all_is_known_nothing_is_timed_nor_loaded(known, asked, monkeypatch):
    monkeypatch.setattr(Plan, "scenario", lambda *_: pytest.fail("the scenario was loaded"))
    assert time_methods(plan("all_on"), known) == known and asked == []


@pytest.mark.usefixtures("quick")
def test_figures_of_other_repeats_are_not_mixed_with_new_ones(known, asked):
    found = time_methods(plan("head"), {**known, "repeats": 99})
    assert asked == [["base", "head"]] and set(found["methods"]) == {"base", "head"} and "later" not in found


@pytest.mark.usefixtures("quick")
def test_seconds_of_a_fit_are_those_it_took_when_it_was_made(monkeypatch):
    monkeypatch.setattr(timing.Measuring, "fit_seconds", lambda self, name, weight: 41.0 if weight is None else 42.0)
    found = time_methods(plan("all_on", "gradient_norm"))["methods"]
    assert (found["all_on"]["fit_seconds"], found["gradient_norm"]["fit_seconds"]) == (41.0, 42.0)


@pytest.mark.usefixtures("quick")
def test_without_base_beside_them_no_figures_are_added(known, monkeypatch, caplog):
    whole = timing._turn

    def failing(measuring, timed, *others):
        if isinstance(timed.method, Base):
            raise FloatingPointError("the loss is NaN")
        return whole(measuring, timed, *others)

    monkeypatch.setattr(timing, "_turn", failing)
    with caplog.at_level(logging.WARNING, "dsa"):
        assert time_methods(plan("all_on", "head"), known) == known
    assert "nothing was added" in caplog.text


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("where", ["ready", "_turn", "_summary"])
def test_a_method_that_fails_is_left_out_and_named(known, monkeypatch, caplog, where):
    whole = getattr(timing, where)

    def failing(measuring, which, *others):
        if which == "head" or isinstance(getattr(which, "method", None), Head):
            raise FloatingPointError("the loss is NaN")
        return whole(measuring, which, *others)

    monkeypatch.setattr(timing, where, failing)
    with caplog.at_level(logging.WARNING, "dsa"):
        found = time_methods(plan("all_on", "head"), known)
    assert found["methods"] == known["methods"] and not found["later"]
    assert caplog.text.count("head is not timed, it failed: the loss is NaN") == 1


@pytest.mark.usefixtures("quick")
def test_a_damaged_artefact_ends_the_timing(known, monkeypatch):
    def damaged(*given):
        raise ArtefactError("fit-head is damaged; remove it")

    monkeypatch.setattr(timing, "ready", damaged)
    with pytest.raises(ArtefactError, match="is damaged"):
        time_methods(plan("all_on", "head"), known)

"""A method that fails for one user or in its fit, too little memory."""

import json
import logging
from dataclasses import dataclass
from typing import ClassVar

import pytest
from harness import rows, run

from backbones.artefacts import ArtefactError
from eval.group import Group
from eval.methods import METHODS
from eval.methods.base import Fitted, Method, Predictor, Unchanged
from eval.world import World


@dataclass(frozen=True)
class Brittle(Method):
    """Cannot take one user, and no more than two at once."""

    calls: ClassVar[list[int]] = []
    error: ClassVar[type[Exception]] = FloatingPointError

    def adapt(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Predictor:
        self.calls.append(len(shown))
        if len(shown) > 2:
            raise RuntimeError("not enough memory: you tried to allocate 99 bytes")
        if "test-3" in shown.ids:
            raise self.error("the loss is NaN")
        return Unchanged(world, len(shown))


@pytest.fixture
def brittle():
    Brittle.calls.clear()
    METHODS.register("brittle", Brittle)
    yield
    METHODS.unregister("brittle")


class OfItsOwn(Exception):
    """As libraries have them."""


@pytest.mark.parametrize("error", [FloatingPointError, IndexError, AttributeError, AssertionError, TypeError, OfItsOwn])
def test_a_user_who_fails_is_recorded_and_the_rest_goes_on(brittle, error, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(Brittle, "error", error)
    with caplog.at_level(logging.WARNING, "dsa"), pytest.raises(SystemExit) as stopped:
        run(tmp_path, "base,brittle")
    assert "1 rows failed" in str(stopped.value.code)
    status = {row["user"]: row["status"] for row in rows(tmp_path) if row["method"] == "brittle"}
    said = "IndexError: the loss is NaN" if error is IndexError else "the loss is NaN"
    assert status.pop("test-3") == f"failed: {said}"
    assert len(status) == 5 and set(status.values()) == {"ok"}
    assert f"brittle failed for user 'test-3': {said}" in caplog.text


def test_a_damaged_artefact_ends_the_run(brittle, monkeypatch, tmp_path):
    monkeypatch.setattr(Brittle, "error", ArtefactError)
    with pytest.raises(SystemExit, match="error: the loss is NaN"):
        run(tmp_path, "base,brittle")
    assert not (tmp_path / "results.csv").exists()


def test_too_little_memory_for_the_model_itself_says_what_to_do(monkeypatch, tmp_path):
    def full(self, place):
        raise RuntimeError("[enforce fail] not enough memory: you tried to allocate 99 bytes")

    monkeypatch.setattr("eval.plan.Plan.scenario", full)
    with pytest.raises(SystemExit, match=r"found no memory\. The rows so far are kept"):
        run(tmp_path)


def test_too_little_memory_means_smaller_batches(brittle, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "dsa"), pytest.raises(SystemExit):
        run(tmp_path, "base,brittle")
    assert Brittle.calls[0] == 6 and max(Brittle.calls[1:]) == 3
    assert "6 users at once need too much memory; going on with half as many" in caplog.text
    said = "too little memory: measured as few as 1 at a time"
    assert said in (tmp_path / "results.md").read_text()
    with pytest.raises(SystemExit):
        run(tmp_path, "base,brittle")  # the one user who fails, alone: the others' rows stay, and so does how they were made
    assert said in (tmp_path / "results.md").read_text()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(SystemExit, match="1 rows failed"):  # as its error says, the same call mends it
        run(tmp_path, "base,brittle")
    assert json.loads((tmp_path / "run.json").read_text())["smaller"] == {}


@dataclass(frozen=True)
class Moody(Method):
    """Cannot be fitted, or not always."""

    well: ClassVar[bool] = False

    def fit(self, world: World, cost_weight: float) -> Fitted:
        if not self.well:
            raise FloatingPointError("everything\ndiverged")
        return Fitted()

    def adapt(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Predictor:
        return Unchanged(world, len(shown))


@pytest.fixture
def moody(monkeypatch):
    monkeypatch.setattr(Moody, "well", False)
    METHODS.register("moody", Moody)
    yield Moody
    METHODS.unregister("moody")


def test_a_method_that_cannot_be_fitted_is_recorded_and_tried_again_by_the_same_command(moody, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="6 rows failed"):
        run(tmp_path, "moody,all_on")
    found = rows(tmp_path)
    status = {row["method"]: row["status"] for row in found}
    assert status == {"base": "ok", "moody": "failed: when it was fitted: everything diverged", "all_on": "ok"}
    assert len(found) == 18
    monkeypatch.setattr(Moody, "well", True)
    run(tmp_path, "moody,all_on")
    found = rows(tmp_path)
    assert len(found) == 18 and {row["status"] for row in found} == {"ok"}

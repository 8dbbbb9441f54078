"""The harness as a command: rows, going on where it stopped, failures, replay."""

import csv
import json
import logging
import re
import time
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import ClassVar

import miniatures
import pytest
import torch
from tqdm.auto import tqdm

from backbones.artefacts import ArtefactError
from envs import MINIATURES
from eval import replay
from eval.group import Group
from eval.measure import support_order
from eval.methods import METHODS, make_method
from eval.methods.base import Fitted, Method, Predictor, Unchanged
from eval.parts import Part, put_together, seconds_spent
from eval.plan import Place, Plan
from eval.results import COLUMNS, row_check
from eval.run import alone, command_of, main, parse, read_plan
from eval.timing import peak_bytes
from eval.world import MODULES, World, code_hash

ENV = "dsa/DigitsResNet-v0"
SMALL = [f"{name}:{value}" for name, value in (MINIATURES[ENV] | {"pretrain_epochs": 3}).items()]


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


def arguments(out, *more: str) -> list[str]:
    kwargs = [word for pair in SMALL for word in ("--env-kwargs", pair)]
    return ["--env", ENV, *kwargs, "--seeds", "1", "--workers", "1", "--out", str(out), *more]


def run(out, methods: str = "base,all_on", *more: str) -> None:
    shown = [] if "--shown" in more else ["--shown"]
    main(arguments(out, "--methods", methods, "--no-timing", *shown, *more))


def rows(out) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run with a curve."""
    out = tmp_path_factory.mktemp("runs") / "done"
    run(out, "base,all_on", "--shown", "0", "1", "30")
    return out


def test_a_run_writes_rows_summary_report_and_curves(done):
    found = rows(done)
    whole = [row for row in found if not row["shown"]]
    assert {row["method"] for row in whole} == {"base", "all_on"}
    assert len(whole) == 2 * 6 and {row["status"] for row in found} == {"ok"}
    assert {row["labels"] for row in whole if row["method"] == "all_on"} == {"20"}
    assert {row["mask"] for row in whole if row["method"] == "all_on"} == {"1" * 7}
    for name in ("summary.json", "report.html", "results.md"):
        assert (done / name).stat().st_size > 500
    assert list((done / "tensorboard").iterdir())


def test_without_support_everybody_gets_the_base_model(done):
    base = {row["user"]: row["log_likelihood"] for row in rows(done) if row["method"] == "base"}
    none = {row["user"]: row["log_likelihood"] for row in rows(done) if row["shown"] == "0"}
    assert none == base


def test_the_curve_shows_as_many_examples_as_it_says(done):
    by_size = {row["shown"]: row["labels"] for row in rows(done) if row["method"] == "all_on" and row["shown"]}
    assert by_size == {"0": "0", "1": "1", "30": "30"}


def test_a_run_that_was_stopped_goes_on_to_the_same_rows(done, tmp_path, monkeypatch):
    out, whole_add = tmp_path / "stopped", Part.add

    def stop_soon(self, values):
        if len(self.known) == 8:
            raise KeyboardInterrupt
        whole_add(self, values)

    monkeypatch.setattr(Part, "add", stop_soon)
    with pytest.raises(SystemExit, match="The same command goes on"):
        run(out, "base,all_on", "--shown", "0", "1", "30")
    part = out / "parts" / "seed0.csv"
    assert len(part.read_text().splitlines()) == 1 + 8
    part.write_text(part.read_text()[:-20])  # as a kill in the middle of a line leaves it
    monkeypatch.setattr(Part, "add", whole_add)
    (out / "parts" / "seed0.seconds").write_text("1000.0\n")  # what it took until then
    run(out, "base,all_on", "--shown", "0", "1", "30")
    assert 1000 < json.loads((out / "run.json").read_text())["seconds"] < 1300
    assert (out / "results.csv").read_text() == (done / "results.csv").read_text()


def test_the_bar_knows_how_many_rows_there_will_be(tmp_path, monkeypatch):
    totals = []
    monkeypatch.setattr("eval.run.tqdm", lambda **said: totals.append(said["total"]) or tqdm(**said))
    run(tmp_path, "base,all_on", "--shown", "0", "1", "30")
    assert totals == [len(rows(tmp_path))]


def test_time_in_which_nothing_is_computed_does_not_count(tmp_path, monkeypatch):
    part = Part(tmp_path, Place(0))
    time.sleep(1.5)
    part.tell_time()
    assert seconds_spent(tmp_path) < 1


def test_a_finished_run_measures_nothing_again(done, monkeypatch):
    monkeypatch.setattr(Part, "add", lambda self, values: pytest.fail("a row was measured again"))
    run(done, "base,all_on", "--shown", "0", "1", "30")


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


class Varied(Method):
    """Everything on in one draw, nothing in the other."""

    draws: ClassVar[int] = 2

    def adapt(self, world: World, fitted: Fitted, shown: Group, cost_weight: float) -> Predictor:
        if not self.draw:
            return Unchanged(world, len(shown))
        method = make_method("all_on")
        return method.personalise(world, method.fit(world, cost_weight), shown, cost_weight)


def test_figures_of_draws_are_means_over_them(tmp_path):
    METHODS.register("varied", dataclass(frozen=True)(type("Drawn", (Varied,), {"__annotations__": {"draw": int}, "draw": 0})))
    try:
        run(tmp_path, "base,all_on,varied")
    finally:
        METHODS.unregister("varied")
    by = {(row["method"], row["user"]): row for row in rows(tmp_path) if row["cost_weight"] == ""}
    for user in {user for _, user in by}:
        base, other, drawn = (by[name, user] for name in ("base", "all_on", "varied"))
        for figure in ("accuracy", "log_likelihood", "cost"):
            assert float(drawn[figure]) == pytest.approx((float(base[figure]) + float(other[figure])) / 2)
        assert drawn["calibration"] == base["calibration"]
    assert any(by["base", user]["accuracy"] != by["all_on", user]["accuracy"] for _, user in by)
    assert "Of varied all is the mean over some draws" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("joint", "about 17 minutes of one core, not counting these: what base take"),
        ("all_on", "what base, all_on take, nobody has timed"),
    ],
)
def test_what_a_run_takes_is_said_as_far_as_it_is_known(method, words, tmp_path, monkeypatch, caplog):
    there, entry = "dsa/UnipenResNet-v0", {"settings": {}, "fit_seconds": 1000.0, "seconds_per_user": 1.0}
    adopted = {ENV: {"joint": {"settings": {}, "adopted": there}}, there: {"joint": entry}}
    monkeypatch.setattr("eval.tuned._parsed", lambda text: adopted)
    monkeypatch.setattr("eval.run.measure_all", lambda *args: pytest.fail("far enough"))
    with caplog.at_level(logging.INFO, "dsa"), pytest.raises(pytest.fail.Exception, match="far enough"):
        run(tmp_path, method)
    assert re.search(words, next(text for text in caplog.messages if "rows, of which" in text))


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


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "bottlenek"], "unknown method 'bottlenek'. Did you mean 'bottleneck'"),
        (["--methods", "base", "--env-kwargs", "train_user:3"], "Did you mean 'train_users'"),
        (["--methods", "base", "--seeds", "0"], "seeds must be at least 1"),
        (["--methods", "base", "--cost-weight", "2"], "a cost weight must be between 0 and 1"),
        (["--methods", "base, ppo", "--cost-weight", "0.5"], "ppo learns for cost weights up to 0.3, not 0.5"),
        (["--methods", "shuffled", "--cost-weights", "0.1", "0.4"], "shuffled learns for cost weights up to 0.3, not 0.4"),
        (["--methods", "base", "--curve", "all_on"], "the curve's methods must be among the methods"),
        (["--methods", "base,all_on", "--curve", "al_on"], "Did you mean 'all_on'"),
        (["--methods", "base,all_on", "--curve", "all_on", "--shown"], "there are no sizes"),
        (["--methods", "base", "--env-kwargs", "seed:7"], "seed:... would do nothing here: seeds are given by --seeds"),
        (["--methods", "base", "--env-kwargs", "rounds:2"], "rounds:... would do nothing here"),
        (["--methods", "base", "--shown", "-1"], "must be at least 0"),
        (["--methods", "base,validation_search", "--curve", "validation_search"], "leave it out of --curve"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_made(more, message, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        main(arguments(out, *more))
    assert message in str(stopped.value.code) and not out.exists()


@pytest.mark.parametrize("pair", ["train_users:many", "two_shifts:[1]", "rank:2.5", "pretrain_epochs:few"])
def test_values_of_another_type_are_refused(pair, tmp_path):
    with pytest.raises(SystemExit, match=f"{pair.partition(':')[0]} must be of type (int|float), got"):
        run(tmp_path, "base", "--env-kwargs", pair)


def test_a_fold_that_there_is_not_is_refused_before_any_work(tmp_path, monkeypatch):
    miniatures.popquorn(tmp_path / "data")
    monkeypatch.setenv("DSA_DATA_ROOT", str(tmp_path / "data"))
    few = ["--methods", "base", "--no-timing", "--shown", "--workers", "1", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"fold 0 to 4, got .* 8"):
        main(["--env", "dsa/PopquornBert-v0", "--folds", "9", *few])


def test_results_are_no_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SystemExit, match="is a file; results are a folder: choose another --out"):
        run(tmp_path / "out", "base")


def test_lines_that_were_cut_or_edited_are_made_again(tmp_path):
    run(tmp_path, "base,all_on", "--shown")
    whole, part = (tmp_path / "results.csv").read_text(), tmp_path / "parts" / "seed0.csv"
    lines = part.read_text().splitlines()
    lines[2], lines[5] = lines[2][:30], lines[5] + ",more"
    lines[4] = lines[4].replace(",ok,", ",OK,")
    part.write_text("\n".join(lines) + "\n")
    part.with_suffix(".seconds").write_text("")
    run(tmp_path, "base,all_on", "--shown")
    assert sorted((tmp_path / "results.csv").read_text().splitlines()) == sorted(whole.splitlines())
    part.write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(SystemExit, match=r"does not begin with the columns .* Restore its first line"):
        run(tmp_path, "base,all_on", "--shown")


def test_an_unknown_environment_is_refused_with_a_suggestion(tmp_path):
    with pytest.raises(SystemExit, match=r"Did you mean 'dsa/DigitsResNet-v0'"):
        main(["--env", "dsa/DigitResNet-v0", "--out", str(tmp_path / "out"), "--methods", "base"])


def test_a_method_is_added_to_a_finished_run(done, tmp_path):
    out = tmp_path / "grows"
    run(out, "base")
    before = (out / "results.csv").read_text()
    run(out, "base,all_on", "--shown", "0", "1", "30")
    assert (out / "results.csv").read_text() == (done / "results.csv").read_text()
    assert (out / "results.csv").read_text().startswith(before)


def test_another_run_does_not_write_into_a_results_folder(done, tmp_path):
    with pytest.raises(SystemExit, match=r"results of another run: env_kwargs was .* Choose another --out"):
        run(done, "base", "--env-kwargs", "rank:3")
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit, match="has no model that could be personalised"):
        main(["--env", "dsa/Planted-v0", "--out", str(tmp_path / "none"), "--methods", "base", "--workers", "1"])
    run(tmp_path / "none", "base")  # nothing was measured there, so it is nobody's
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"holds files and no plan\.json: it is none of this command"):
        run(tmp_path)


def test_rows_of_a_method_with_other_settings_are_not_mixed(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.run.settings_for", lambda *args: {})
    run(tmp_path, "base,full_finetune")
    monkeypatch.setattr("eval.run.settings_for", lambda *args: {"steps": 3} if args[-1] == "full_finetune" else {})
    with pytest.raises(SystemExit, match=r"the settings of full_finetune were others \(steps\)"):
        run(tmp_path, "base,full_finetune")


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


def test_rows_of_two_models_are_not_mixed(tmp_path, monkeypatch):
    run(tmp_path, "base")
    monkeypatch.setattr("eval.rows.Measuring.artefacts", lambda self, job: "of another model")
    with pytest.raises(
        SystemExit, match=r"seed0.csv has rows of base that were made with another model, .* Choose another --out"
    ):
        run(tmp_path, "base,all_on")


def test_what_other_code_has_fitted_is_fitted_anew(digits_world, monkeypatch):
    made = []
    for code in ("one", "one", "two"):
        monkeypatch.setattr("eval.world.code_hash", lambda code=code: code)
        digits_world.kept("test-of-code", {}, lambda: made.append(1) or ({}, {}))
    assert len(made) == 2
    monkeypatch.setattr("eval.world.code_hash", lambda: "one")
    names = {digits_world.key(), replace(digits_world, env="dsa/DigitsResNetLayerwise-v0").key(), digits_world.key(a=1)}
    assert len({*names, replace(digits_world, kwargs={**digits_world.kwargs, "rank": 3}).key()}) == 4
    elsewhere = replace(digits_world, kwargs={**digits_world.kwargs, "data_root": "elsewhere"})
    assert elsewhere.key() == digits_world.key()


def test_a_plan_is_in_order_and_its_main_cost_weight_is_among_the_others():
    plan = Plan(ENV, cost_weight=0.15, cost_weights=(0.3, 0.1), shown=(50, 0, 5))
    assert (plan.cost_weights, plan.shown) == ((0.1, 0.15, 0.3), (0, 5, 50))
    more = Plan(ENV, cost_weight=0.15, cost_weights=(0.2,), shown=(10,))
    assert plan.extended(more).shown == (0, 5, 10, 50)


def test_folds_are_all_measured_or_one(tmp_path):
    with pytest.raises(ValueError, match="leave out one of the two"):
        Plan("dsa/PopquornBert-v0", {"fold": 1}, folds=5)


def test_the_command_of_a_folder_makes_all_of_it_and_names_no_place():
    kwargs = {"meta_steps": 2, "data_root": "/home/somebody/data"}
    elsewhere = Plan("dsa/Personal-v0", {"users": "table", "data": "/home/somebody/notes.csv"})
    assert "--env-kwargs data:notes.csv" in command_of(elsewhere) and "somebody" not in command_of(elsewhere)
    plan = Plan(ENV, kwargs, methods=("base", "all_on"), seeds=2, shown=(0, 5), curve=("all_on",))
    command = command_of(plan)
    assert command == (
        f"python -m eval.run --env {ENV} --env-kwargs meta_steps:2 --methods base,all_on --seeds 2 --shown 0 5 --out results"
    )
    again = read_plan(parse(command.split()[3:]))
    assert replace(again, settings={}) == replace(plan, env_kwargs={"meta_steps": 2})


def test_the_curve_shows_the_support_before_anything_else():
    order = support_order(5, 12, torch.Generator().manual_seed(0))
    assert sorted(order[:5].tolist()) == [*range(5)] and sorted(order.tolist()) == [*range(12)]
    assert order.tolist() != [*range(12)]


def test_rows_that_two_processes_wrote_are_there_once(tmp_path):
    part = Part(tmp_path, Place(0, None))
    for user in "abab":
        part.add({"seed": 0, "method": "base", "user": user, "status": "ok"})
    part.tidy()
    assert [row["user"] for row in part.rows()] == ["a", "b"]


def test_ids_with_strange_ends_of_lines_stay_in_their_rows(tmp_path):
    strange = ["a\u2028b", "c\x85d", "e\x0bf", "g\nh"]
    (tmp_path / "parts").mkdir()
    with (tmp_path / "parts" / "seed0.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({"user": user, "status": "ok"} for user in strange)
    assert put_together(tmp_path) == 0
    assert [row["user"] for row in rows(tmp_path)] == strange


def test_two_calls_do_not_measure_into_one_folder(tmp_path):
    with alone(tmp_path), pytest.raises(SystemExit, match="another call is measuring into"):
        run(tmp_path)
    run(tmp_path, "base")


def test_other_code_is_told(tmp_path, monkeypatch, caplog):
    run(tmp_path, "base")
    monkeypatch.setattr("eval.run.code_hash", lambda: "of tomorrow")
    with caplog.at_level(logging.WARNING, "dsa"):
        run(tmp_path, "base")
    assert "was begun with other code: its rows stay" in caplog.text
    assert json.loads((tmp_path / "plan.json").read_text())["code"] == [code_hash(), "of tomorrow"]


def test_the_code_of_a_fit_is_all_that_methods_import():
    imported = {
        name
        for file in Path(str(files("eval.methods"))).glob("*.py")
        for name in re.findall(r"^from (eval\.[a-z_]+) import", file.read_text(), re.MULTILINE)
    }
    assert {f"{name.removeprefix('eval.')}.py" for name in imported - {"eval.methods", "eval.tuned"}} <= {*MODULES}


def test_results_of_another_version_are_refused(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"format": 0, "plan": {}}))
    with pytest.raises(SystemExit, match="results of format 0, this version has 1"):
        run(tmp_path)


def copied(done, tmp_path, change) -> list[str]:
    """Arguments of replay for a copy of a finished run with some rows changed."""
    found = rows(done)
    change(found)
    with (tmp_path / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, found[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    for name in ("plan.json", "run.json"):
        (tmp_path / name).write_text((done / name).read_text())
    return [str(tmp_path / "results.csv"), "--sample", "0", "--num-threads", "1"]


def test_replay_of_untouched_rows_finds_nothing(done, tmp_path, capsys):
    replay.main(copied(done, tmp_path, lambda found: None))
    assert "0 edited" in capsys.readouterr().out


def test_the_rows_in_the_repository_reproduce(capsys):
    """Made by another process, on another day: whoever changes what they are made by has to make them again.

    ``python -m eval.run --env dsa/DigitsResNet-v0 --seeds 1 --shown 0 2 --cost-weights 0 0.1 --no-timing --methods ...`` with
    the methods and arguments of ``plan.json`` there.
    """
    replay.main([str(Path(__file__).parent / "replayed"), "--sample", "0", "--num-threads", "1"])
    said = capsys.readouterr().out
    assert "0 edited" in said and "132" in said


def test_replay_names_a_row_edited_by_hand(done, tmp_path, capsys):
    def flatter(found):
        found[8]["accuracy"] = "0.99"

    with pytest.raises(SystemExit, match="1 rows do not hold"):
        replay.main(copied(done, tmp_path, flatter))
    said = capsys.readouterr().out
    assert "line 10: edited by hand" in said
    assert "line 10: seed=0 method=all_on user=test-2 does not reproduce: accuracy 0.99 is now" in said


def test_replay_names_a_row_that_was_forged_with_its_check(done, tmp_path, capsys):
    def forge(found):
        found[8]["accuracy"] = "0.99"
        found[8]["check"] = row_check(found[8])

    with pytest.raises(SystemExit, match="1 rows do not hold"):
        replay.main(copied(done, tmp_path, forge))
    said = capsys.readouterr().out
    assert "0 edited" in said and "line 10: seed=0 method=all_on user=test-2 does not reproduce" in said


def test_replay_names_rows_that_were_removed_or_are_there_twice(done, tmp_path, capsys):
    def drop_the_worst(found):
        del found[8], found[10]
        found.append(dict(found[3]))

    with pytest.raises(SystemExit, match="3 rows do not hold, or are missing"):
        replay.main(copied(done, tmp_path, drop_the_worst))
    said = capsys.readouterr().out
    assert "line 30: the row is there twice" in said and "0 edited" in said and "0 do not reproduce" in said
    assert "seed=0 method=all_on: no row of 2 users (test-2, test-5)" in said and said.count("no row of") == 1


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"format": 2, "plan": {"env": ENV}}, "results of format 2, this version has 1"),
        ({"format": 1}, "holds no plan"),
        ({"format": 1, "plan": []}, "holds no plan"),
        ({"format": 1, "plan": {"env": ENV, "settings": [1]}}, "holds no plan .settings of another type.* Restore it"),
        ({"format": 1, "plan": {"env": 5}}, "holds no plan .env of another type"),
        ({"format": 1, "plan": {"env": ENV, "invented": 1}}, "holds no plan"),
    ],
)
def test_a_plan_of_another_version_is_refused(tmp_path, plan, said):
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(SystemExit, match=said):
        run(tmp_path)
    with pytest.raises(SystemExit, match=said):
        replay.main([str(tmp_path / "results.csv"), "--num-threads", "1"])


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ({"accuracy": "abc"}, "accuracy is abc, which is no number"),
        ({"log_likelihood": "nan"}, "log_likelihood is nan, which is no number"),
        ({"reward": ""}, "reward is -, which is no number"),
        ({"examples": "many"}, "examples many is now"),
        ({"calibration": "1:2"}, "calibration 1:2 is now"),
        ({"seed": "x"}, "the plan has no such place"),
        ({"seed": "7"}, "the plan has no such place"),
        ({"method": "al_on"}, "the plan has no such place, method"),
        ({"shown": "few"}, "the plan has no such place"),
    ],
)
def test_replay_goes_on_past_a_row_that_says_nothing(done, tmp_path, capsys, cells, said):
    def forge(found):
        found[8].update(cells)
        found[8]["check"] = row_check(found[8])

    with pytest.raises(SystemExit, match="rows do not hold"):
        replay.main(copied(done, tmp_path, forge))
    told = capsys.readouterr().out
    assert ("no row of 1 users" in told) == bool({*cells} & {*replay.KEY})  # nobody else's is where it should be
    assert f"does not reproduce: {said}" in told or f"; {said}" in told
    assert "1 do not reproduce" in told


def test_replay_needs_a_results_folder(tmp_path):
    with pytest.raises(SystemExit, match=r"has no plan\.json"):
        replay.main([str(tmp_path / "results.csv")])


def test_timing_is_measured_side_by_side(tmp_path):
    main(arguments(tmp_path, "--methods", "base,all_on,full_finetune", "--shown"))
    timing = json.loads((tmp_path / "timing.json").read_text())
    assert list(timing["methods"]) == ["base", "all_on", "full_finetune"]
    for name, facts in timing["methods"].items():
        assert len(facts["inference_ms"]) == 3
        assert all(0 < s["low"] <= s["median"] <= s["high"] for s in facts["inference_ms"].values()), name
    base, dense = (timing["methods"][name] for name in ("base", "all_on"))
    assert dense["flops_per_example"] > base["flops_per_example"] > 0
    assert dense["personalise_peak_bytes"] > 10_000 > base["personalise_peak_bytes"]


def test_peak_memory_counts_what_is_held_at_once():
    def work():
        first = torch.zeros(1000, 1000)
        del first
        return torch.zeros(1000, 500) + torch.zeros(1000, 500)

    assert 5.9e6 < peak_bytes(work) < 6.2e6


def test_workers_of_their_own_measure_the_same(done, tmp_path):
    out = tmp_path / "two"
    main([*arguments(out, "--methods", "base,all_on", "--no-timing", "--shown", "0", "1", "30"), "--workers", "2"])
    assert (out / "results.csv").read_text() == (done / "results.csv").read_text()

"""A run goes on where it stopped, and into no other results."""

import csv
import json
import logging
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
from harness import rows, run

from eval.parts import Part, put_together
from eval.plan import Place, Plan
from eval.results import COLUMNS
from eval.run import alone, asked_again, main, parse, read_plan
from eval.run_facts import TIMING
from eval.world import MODULES, code_hash


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


def test_a_finished_run_measures_nothing_again(done, monkeypatch):
    monkeypatch.setattr(Part, "add", lambda self, values: pytest.fail("a row was measured again"))
    run(done, "base,all_on", "--shown", "0", "1", "30")


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
    with pytest.raises(SystemExit, match=r"the settings of full_finetune were others \(steps\)\. Measure it --again, or"):
        run(tmp_path, "base,full_finetune")


def test_a_method_that_was_tuned_anew_is_measured_again_and_no_other_one(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.run.settings_for", lambda *args: {"steps": 3} if args[-1] == "full_finetune" else {})
    run(tmp_path / "wanted", "base,all_on,full_finetune")
    monkeypatch.setattr("eval.run.settings_for", lambda *args: {})
    run(tmp_path / "grows", "base,all_on,full_finetune")
    (tmp_path / "grows" / TIMING).write_text(
        json.dumps({"methods": {"base": {}, "full_finetune": {}}, "later": [{"methods": ["full_finetune"], "base": {}}]})
    )
    monkeypatch.setattr("eval.run.settings_for", lambda *args: {"steps": 3} if args[-1] == "full_finetune" else {})
    added, add = [], Part.add
    monkeypatch.setattr(Part, "add", lambda self, values: (added.append(values["method"]), add(self, values)))
    monkeypatch.setattr("eval.run.write_report", lambda *args: None)  # the times above are no real ones
    run(tmp_path / "grows", "base,full_finetune", "--again", "full_finetune")
    assert {*added} == {"full_finetune"}
    assert json.loads((tmp_path / "grows" / TIMING).read_text()) == {"methods": {"base": {}}, "later": []}
    assert json.loads((tmp_path / "grows" / "run.json").read_text())["methods"]["full_finetune"]["settings"]["steps"] == 3
    found, wanted = ((tmp_path / name / "results.csv").read_text().splitlines() for name in ("grows", "wanted"))
    assert sorted(found) == sorted(wanted)


def test_nothing_is_thrown_away_where_the_model_is_another_one(tmp_path, monkeypatch):
    run(tmp_path, "base,all_on")
    before = (tmp_path / "parts" / "seed0.csv").read_text()
    monkeypatch.setattr("eval.rows.Measuring.artefacts", lambda self, job: "of another model")
    with pytest.raises(SystemExit, match=r"rows of base that were made with another model, .* Choose another --out"):
        run(tmp_path, "base,all_on", "--again", "all_on")
    assert (tmp_path / "parts" / "seed0.csv").read_text() == before


def test_what_is_measured_again_is_known_and_not_what_all_is_compared_with():
    plan = Plan("dsa/DigitsResNet-v0", methods=("base", "all_on", "ppo", "shuffled"))
    assert asked_again("ppo", plan) == {"ppo", "shuffled"}, "it deals out masks of the policy"
    assert asked_again("shuffled,all_on", plan) == {"shuffled", "all_on"} and not asked_again(None, plan)
    asked = read_plan(parse(["--methods", "base,feddpa", "--out", "."]))
    assert asked.settings["joint"] == asked.method("joint").settings() and asked_again("joint", asked) == {"joint", "feddpa"}
    before = replace(asked, settings={**asked.settings, "joint": {"steps": 7}})
    with pytest.raises(ValueError, match=r"the settings of joint were others \((rate, )?steps\)"):
        before.extended(asked)
    assert before.without({"joint", "feddpa"}).extended(asked).settings["joint"] == asked.settings["joint"]
    with pytest.raises(ValueError, match=r"--again al_on: it is not among the methods\. Did you mean 'all_on'"):
        asked_again("al_on", plan)
    with pytest.raises(ValueError, match=r"compared with 'base': to measure it again, choose another --out"):
        asked_again("base", plan)


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

"""The harness as a command: what it writes, what it refuses, what it says beforehand."""

import json
import logging
import re
import time
from dataclasses import dataclass, replace
from typing import ClassVar

import miniatures
import pytest
import torch
from harness import ENV, arguments, rows, run
from tqdm.auto import tqdm

from eval.group import Group
from eval.measure import support_order
from eval.methods import METHODS, make_method
from eval.methods.base import Fitted, Method, Predictor, Unchanged
from eval.parts import Part, seconds_spent
from eval.plan import Place, Plan
from eval.run import command_of, main, parse, read_plan
from eval.timing import peak_bytes
from eval.world import World


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
        ("cotrained", "about 17 minutes of one core"),  # one policy is for all of its cost weights
        ("all_on", "what base, all_on take, nobody has timed"),
    ],
)
def test_what_a_run_takes_is_said_as_far_as_it_is_known(method, words, tmp_path, monkeypatch, caplog):
    there, entry = "dsa/UnipenResNet-v0", {"settings": {}, "fit_seconds": 1000.0, "seconds_per_user": 1.0}
    timed = ("joint", "cotrained")
    adopted = {ENV: {name: {"settings": {}, "adopted": there} for name in timed}, there: {name: entry for name in timed}}
    monkeypatch.setattr("eval.tuned._parsed", lambda text: adopted)
    monkeypatch.setattr("eval.run.measure_all", lambda *args: pytest.fail("far enough"))
    with caplog.at_level(logging.INFO, "dsa"), pytest.raises(pytest.fail.Exception, match="far enough"):
        run(tmp_path, method)
    assert re.search(words, next(text for text in caplog.messages if "rows, of which" in text))


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


def test_an_unknown_environment_is_refused_with_a_suggestion(tmp_path):
    with pytest.raises(SystemExit, match=r"Did you mean 'dsa/DigitsResNet-v0'"):
        main(["--env", "dsa/DigitResNet-v0", "--out", str(tmp_path / "out"), "--methods", "base"])


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

"""Rows of a results folder are measured again."""

import csv
import json
import os
from pathlib import Path

import pytest
from harness import ENV, rows, run

from eval import replay
from eval.results import row_check


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


def test_the_rows_in_the_repository_reproduce(real_data, monkeypatch, capsys):
    """Made by another process, on another day: whoever changes what they are made by has to make them again.

    ``python -m eval.run --env dsa/JesterBert-v0 --seeds 1 --shown 0 20 --cost-weights 0 0.1 --no-timing --methods ...`` in the
    data root of :mod:`miniatures`, with the methods and arguments of ``plan.json`` there. A random encoder that nothing trains:
    the few steps in which the digits' backbone is trained end elsewhere on a processor that adds in another order.
    """
    monkeypatch.chdir(os.environ["DSA_DATA_ROOT"])  # the encoder's folder is said from there
    replay.main([str(Path(__file__).parent / "replayed"), "--sample", "0", "--num-threads", "1"])
    said = capsys.readouterr().out
    assert "100 rows, 0 edited; 100 measured again, 0 do not reproduce" in said


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

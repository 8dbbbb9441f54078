"""The format of results folders: what is written is read again, and what is wrong is named with its line."""

import csv
import hashlib
import json

import numpy as np
import pytest
from synthetic_results import SPECS, write_results

from eval.replay import differences
from eval.results import COLUMNS, HEADER, KEY, NONE, altered, format_row, read_results, row_check, rows_of
from eval.run_facts import ResultsError

FEW = {name: SPECS[name] for name in ("base", "head", "ppo")}


@pytest.fixture
def folder(tmp_path):
    return write_results(tmp_path / "made", FEW, users=3, seeds=2, failing={("head", "u001"): "out of memory"})


def edited(folder, change):
    """Lines of ``results.csv`` after a change to the list of them."""
    path = folder / "results.csv"
    lines = path.read_text().splitlines()
    change(lines)
    path.write_text("\n".join(lines) + "\n")


def test_rows_are_read_as_they_were_written(folder):
    results = read_results(folder)
    with (folder / "results.csv").open() as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(results.lines) == 2 * 3 * (4 + 4 + 9)
    for name in ("accuracy", "cost", "stored"):
        kept = [float(row[name]) for row in written if row["status"] == "ok"]
        np.testing.assert_array_equal(results[name][results.ok], kept)
    assert results["shown"][0] == NONE and results["fold"][0] == NONE and np.isnan(results["cost_weight"][0])
    assert results.run.methods["ppo"].trades and results.run.cost_weight == 0.1


def test_failed_rows_stay_without_numbers(folder):
    results = read_results(folder)
    failed = results["status"] != "ok"
    assert set(results["user"][failed]) == {"u001"} and set(results["method"][failed]) == {"head"}
    assert np.isnan(results["accuracy"][failed]).all() and (failed == ~results.ok).all()


def test_floats_survive_being_written_whatever_their_kind():
    cells = format_row({**dict.fromkeys(COLUMNS[:-1]), "accuracy": np.float32(0.1), "cost": 1 / 3, "seed": np.int64(3)})
    assert float(cells["accuracy"]) == np.float32(0.1) and float(cells["cost"]) == 1 / 3
    assert cells["seed"] == "3" and cells["fold"] == ""


def test_a_row_with_other_columns_is_refused():
    with pytest.raises(ValueError, match=r"missing or unknown: \['acuracy', 'accuracy'\]|\['accuracy', 'acuracy'\]"):
        format_row({**dict.fromkeys(set(COLUMNS[:-1]) - {"accuracy"}), "acuracy": 1.0})


def test_the_check_is_a_hash_of_the_cells_joined_by_commas():
    cells = dict.fromkeys(COLUMNS, "x")
    assert row_check(cells) == hashlib.sha256(b"x" + b",x" * 21).hexdigest()[:8]
    assert HEADER.startswith("seed,fold,method,cost_weight,shown,user,group,status,mask,accuracy")


def test_a_row_edited_by_hand_is_found_by_its_line(folder):
    path = folder / "results.csv"
    assert altered(rows_of(path)) == []
    with path.open() as file:
        row = list(csv.DictReader(file))[4]
    edited(folder, lambda lines: lines.__setitem__(5, lines[5].replace(row["accuracy"], "0.999")))
    assert altered(rows_of(path)) == [6]


def test_users_with_commas_and_quotes_in_their_names_are_read(tmp_path):
    names = ['a,"b"', "<script>", "c\nd"]
    results = read_results(write_results(tmp_path, FEW, names=names, seeds=1))
    assert set(results["user"]) == set(names)
    assert altered(rows_of(tmp_path / "results.csv")) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda lines: lines.__setitem__(3, lines[3].rpartition(",")[0]),
            r"line 4: it has 22 cells instead of 23\. The same .* if the line is in parts/seed0\.csv as well, remove it",
        ),
        (lambda lines: lines.__setitem__(3, lines[3].replace(",ok,", ",fine,")), "line 4: status is 'fine'"),
        (
            lambda lines: lines.__setitem__(3, "x" + lines[3][1:]),
            r"line 4: seed is 'x0?', not a number\. .* if the line is in its file in parts/ \(seedN",
        ),
        (lambda lines: lines.__setitem__(1, lines[1].replace("00000,", "00001002,")), "line 2: mask is '00001002', not 5 bits"),
        (lambda lines: lines.__setitem__(1, lines[1].replace("0:0.0:0;", "0:0;", 1)), "line 2: calibration is"),
        (lambda lines: lines.__setitem__(1, lines[1].replace("base", "bass")), "line 2: run.json knows no method 'bass'"),
        (
            lambda lines: lines.append(lines[7]),
            r"the same row as line 8 \(seed 0, method.*\)\. Remove one of them from parts/seed0\.csv",
        ),
        (lambda lines: lines.__setitem__(0, lines[0].replace("accuracy", "akkuratesse")), "lacks the columns accuracy"),
    ],
)
def test_malformed_rows_are_named_with_their_line_and_the_cure(folder, change, said):
    edited(folder, change)
    with pytest.raises(ResultsError, match=said):
        read_results(folder)


def test_infinite_numbers_are_refused(folder):
    with (folder / "results.csv").open() as file:
        accuracy = next(csv.DictReader(file))["accuracy"]
    edited(folder, lambda lines: lines.__setitem__(1, lines[1].replace(accuracy, "inf", 1)))
    with pytest.raises(ResultsError, match="line 2: accuracy is inf, not a finite number"):
        read_results(folder)


def test_what_is_no_results_folder_says_how_to_make_one(tmp_path):
    with pytest.raises(ResultsError, match=r"not a results folder: it has no run\.json\. python -m eval\.run"):
        read_results(tmp_path)


def test_a_folder_of_another_version_is_refused(folder):
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {"format": 7, "version": "9.1"}))
    with pytest.raises(ResultsError, match=r"another version: format 7, written by version 9\.1 .* reads format 1"):
        read_results(folder)


@pytest.mark.parametrize(
    ("text", "said"), [("{", "is not JSON"), ("[]", "no JSON object"), ('{"format": 1}', "lacks version, env")]
)
def test_a_spoiled_run_json_is_named(folder, text, said):
    (folder / "run.json").write_text(text)
    with pytest.raises(ResultsError, match=said):
        read_results(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("cost_weights", None), ("pathways", 3), ("shown", None), ("cost_weight", "a lot"), ("seeds", "two"), ("classes", True)],
)
def test_facts_of_another_type_are_named(folder, field, value):
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(run | {field: value}))
    with pytest.raises(ResultsError, match=f"run.json: {field} cannot be what python -m eval.run wrote.* Run python -m eval"):
        read_results(folder)
    run["methods"]["base"]["scope"] = 5
    (folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(ResultsError, match="scope of base cannot be"):
        read_results(folder)


@pytest.mark.parametrize("timing", [{"a": 1}, {"methods": 3}, {"methods": {"base": 3}}, {"methods": {}, "later": {}}, []])
def test_a_spoiled_timing_is_named(folder, timing):
    (folder / "timing.json").write_text(json.dumps(timing))
    with pytest.raises(ResultsError, match=r"timing\.json .* Remove it: python -m eval\.run --timing measures again"):
        read_results(folder)


def test_missing_rows_are_named(folder):
    (folder / "results.csv").unlink()
    with pytest.raises(ResultsError, match=r"results\.csv is missing; python -m eval\.run writes it"):
        read_results(folder)


def test_a_malformed_row_of_a_fold_is_in_the_part_of_the_fold(tmp_path):
    write_results(tmp_path, FEW, users=3, seeds=2, folds=3)
    edited(tmp_path, lambda lines: lines.__setitem__(-1, lines[-1].replace(",ok,", ",fine,")))
    with pytest.raises(ResultsError, match=r"status is 'fine'.* if the line is in parts/seed1-fold2\.csv"):
        read_results(tmp_path)


# Rows that are measured again.

QUERY = "10:6.5:7;20:15.0:14;10:9.0:9" + ";0:0.0:0" * 7
"""Calibration of 40 examples, of which 30 are hits."""


@pytest.fixture
def row(folder):
    """A row of ppo, with the calibration :data:`QUERY`."""
    found = next(cells for _, cells in rows_of(folder / "results.csv") if cells["method"] == "ppo" and "1" in cells["mask"])
    return changed(found, calibration=QUERY)


def changed(row, **cells):
    """A row with other cells, and with the check that belongs to them."""
    row = {**row, **{name: value if isinstance(value, str) else repr(value) for name, value in cells.items()}}
    return {**row, "check": row_check(row)}


def test_a_row_that_is_measured_the_same_again_does_not_differ(row):
    assert differences(row, row) == []


@pytest.mark.parametrize(
    ("name", "forge"),
    [
        ("reward", lambda row: {"reward": float(row["reward"]) + 0.001}),
        ("active_fraction", lambda row: {"active_fraction": 0.1}),
        ("active_fraction", lambda row: {"active_fraction": ""}),
        ("cost", lambda row: {"cost": float(row["cost"]) + 0.001}),
        ("accuracy", lambda row: {"accuracy": float(row["accuracy"]) + 0.06}),
        ("log_likelihood", lambda row: {"log_likelihood": float(row["log_likelihood"]) + 0.01}),
        ("calibration", lambda row: {"calibration": QUERY.replace("20:15.0:14", "19:15.0:14")}),  # an example less
        ("calibration", lambda row: {"calibration": QUERY.replace("20:15.0:14", "20:15.0:16")}),  # two hits more
        ("calibration", lambda row: {"calibration": QUERY.replace("20:15.0:14", "20:14.9:14")}),  # less sure
        ("calibration", lambda row: {"calibration": QUERY.replace(":7;20:15.0:14", ":3;20:15.0:18")}),  # hits moved
    ],
)
def test_a_row_that_was_forged_with_its_check_is_named(row, name, forge):
    forged = changed(row, **forge(row))
    assert row_check(forged) == forged["check"]
    assert [said.split()[0] for said in differences(forged, row) if said.startswith(name)] == [name]


def test_a_flip_and_an_example_that_changes_bins_by_rounding_are_no_difference(row):
    again = changed(
        row,
        accuracy=float(row["accuracy"]) + 1 / 40,
        reward=float(row["reward"]) + 1 / 40,
        log_likelihood=float(row["log_likelihood"]) + 1e-5,
        calibration=QUERY.replace("10:6.5:7;20:15.0:14", "9:5.8001:7;21:15.7001:15"),
    )
    assert differences(row, again) == [] == differences(again, row)


def test_rows_that_failed_are_compared_by_their_status(row):
    failed = changed({name: row[name] if name in KEY else "" for name in COLUMNS}, status="failed: no")
    assert differences(failed, failed) == []
    assert any(said.startswith("status ok is now failed: no") for said in differences(row, failed))

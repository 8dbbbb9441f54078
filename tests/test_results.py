"""The format of results folders: what is written is read again, and what is wrong is named with its line."""

import csv
import hashlib
import json

import numpy as np
import pytest
from synthetic_results import SPECS, write_results

from eval.results import COLUMNS, HEADER, NONE, altered, format_row, read_results, row_check, rows_of
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
        (lambda lines: lines.__setitem__(3, lines[3].rpartition(",")[0]), r"line 4: it has 22 cells instead of 23\. Remove"),
        (lambda lines: lines.__setitem__(3, lines[3].replace(",ok,", ",fine,")), "line 4: status is 'fine'"),
        (lambda lines: lines.__setitem__(3, "x" + lines[3][1:]), "line 4: seed is 'x0?', not a number"),
        (lambda lines: lines.__setitem__(1, lines[1].replace("00000,", "00001002,")), "line 2: mask is '00001002', not 5 bits"),
        (lambda lines: lines.__setitem__(1, lines[1].replace("0:0.0:0;", "0:0;", 1)), "line 2: calibration is"),
        (lambda lines: lines.__setitem__(1, lines[1].replace("base", "bass")), "line 2: run.json knows no method 'bass'"),
        (lambda lines: lines.append(lines[7]), r"the same row as line 8 \(seed 0, method"),
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


def test_missing_rows_are_named(folder):
    (folder / "results.csv").unlink()
    with pytest.raises(ResultsError, match=r"results\.csv is missing; python -m eval\.run writes it"):
        read_results(folder)

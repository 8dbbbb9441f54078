"""The table of what unlearning leaves behind."""

import json
from dataclasses import replace

import numpy as np
import pytest

from eval import unlearning
from eval.unlearning import BOTH, FIRST_SEED, PUBLIC, WAYS, Design, one_seed, seeds, table
from meta.trainer import MetaConfig
from meta.unlearning import Unlearning

SMALL = Design(
    users=6, leave=2, groups=2, others=100, judged=4, new=3, references=1, rank=2,
    learn=MetaConfig(steps=2, users=3), more={"pretrain_epochs": 1},
)  # fmt: skip


def group(left, stay, seconds):
    return {"left": left, "others": [*np.linspace(0, 0.5, 200)], "stay": stay, "new": [0.5, 0.7], "seconds": seconds}


def test_the_table_pairs_each_user_with_themselves_and_counts_nobody_twice():
    gone = float("nan")
    found = {way: [group([0.2], [gone, 0.5, 0.7], 9.0), group([0.4], [0.6, gone, 0.9], 11.0)] for way in WAYS}
    found["patched"] = [group([0.2], [gone, 0.4, 0.6], 1.0), group([0.4], [0.5, gone, 0.8], 1.0)]
    found["nobody left"] = [group([0.9], [gone, 0.5, 0.7], 0.0), group([0.9], [0.6, gone, 0.9], 0.0)]
    before, anew, _, public, patched, *_ = table([found]).splitlines()[2:]
    assert before.startswith("| nobody left | 0.633 | +0.000 [+0.000, +0.000] | 0.600 |") and before.endswith("1.000] |  |")
    assert "| 1.000 [" in before
    assert anew.startswith("| learned anew | 0.633 |  | 0.600 |  |") and anew.endswith("| 10.0 |")
    assert patched.startswith("| patched | 0.533 | -0.100 [-0.100, -0.100] | 0.600 | +0.000")
    assert patched.endswith("| 1.0 (0.10) |") and public.endswith("| 10.0 |")


def test_seeds_are_measured_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(unlearning, "one_seed", lambda design, seed: made.append(seed) or {"x": seed})
    assert seeds(Design(), 2, tmp_path) == seeds(Design(), 2, tmp_path) and len(made) == 2
    seeds(replace(Design(), leave=10), 1, tmp_path)
    assert made == [FIRST_SEED, FIRST_SEED + 1, FIRST_SEED]


def test_everybody_is_measured_under_the_start_that_they_left_or_stayed_in(monkeypatch):
    how = Unlearning(steps=1, users=2, rate=1e-9, public_steps=2)
    patches = {"patched": how, "patched, from a random start": replace(how, public_steps=0), "patched, sparse": how}
    monkeypatch.setattr(unlearning, "PATCHES", patches)
    found = one_seed(SMALL, 7)
    for way in WAYS:
        for number, one in enumerate(found[way]):
            stayed = np.array(one["stay"])
            assert np.flatnonzero(np.isnan(stayed)).tolist() == [2 * number, 2 * number + 1]
            assert len(one["left"]) == 2 and len(one["others"]) == 100 and len(one["new"]) == 3
    assert found["nobody left"][0]["new"] == found["nobody left"][1]["new"]
    assert found[PUBLIC][0]["new"] == found[PUBLIC][1]["new"] != found["nobody left"][0]["new"]
    assert found["patched"][0]["others"] == found["patched, sparse"][0]["others"] == pytest.approx(found[PUBLIC][0]["others"])
    for way in ("nobody left", "patched, from a random start"):
        assert found[way][0]["others"] != pytest.approx(found[PUBLIC][0]["others"]), "these begin elsewhere"
    assert len({str(found[way][0]["others"]) for way in ("learned anew", BOTH, PUBLIC)}) == 3
    assert json.loads(json.dumps(found))["patched"][0]["seconds"] > 0


def test_the_command_writes_its_table(tmp_path, monkeypatch, capsys):
    gone = float("nan")
    way = [group([0.2, 0.3], [gone, 0.5], 2.0)]
    monkeypatch.setattr(unlearning, "one_seed", lambda design, seed: dict.fromkeys(WAYS, way))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{unlearning.BEGIN}\n{unlearning.END}\nafter\n")
    unlearning.main(["--seeds", "2", "--out", str(tmp_path / "out"), "--write", str(page), "--num-threads", "1"])
    assert "| learned anew | 0.500" in page.read_text() and "| learned anew | 0.500" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no-such-page"):
        unlearning.main(
            ["--seeds", "1", "--out", str(tmp_path / "out"), "--write", str(tmp_path / "no-such-page"), "--num-threads", "1"]
        )
    with pytest.raises(SystemExit, match="at least one seed"):
        unlearning.main(["--seeds", "0", "--out", str(tmp_path / "out"), "--num-threads", "1"])

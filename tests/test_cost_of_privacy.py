"""The table of what privacy costs: rows made once, paired with training without privacy."""

import json

import numpy as np
import pytest

from agents.private import PrivateSettings
from eval import cost_of_privacy
from eval.cost_of_privacy import OPEN, PUBLIC, Design, people, row, rows, table
from meta.accountant import Accountant, Round
from meta.trainer import MetaConfig

ACCOUNT = Accountant(3.0, 1e-3, {Round("meta-initialisation", 0.02, 1.0): 5}).state()


def result(shift, account=ACCOUNT, seed=0):
    users = np.linspace(0, 0.5, 20)
    each = {
        name: {"accuracy": [*(users + shift)], "reward": [*(users + shift / 2)], "cost": 0.4} for name in cost_of_privacy.NAMES
    }
    return {**each, "masks": 7, "account": account, "seed": seed}


def test_the_table_compares_with_training_without_privacy():
    text = table({OPEN: [result(0.2, None), result(0.2, None, 1)], 3.0: [result(0.18), result(0.16, seed=1)]})
    plain, private = text.splitlines()[2:]
    assert plain.startswith("| no privacy | - | 2 | 0.450 | 0.450 | - | 0.350 | - | 0.40 | 7 7 |")
    assert "| 1.000 | 2 | 0.420 | 0.420 | -0.030 [-0.030, -0.030] | 0.335 | -0.015 [-0.015, -0.015] |" in private
    alone = table({OPEN: [result(0.2, None)], PUBLIC: [result(0.1, None)]}).splitlines()[3]
    assert alone.startswith("| 0: public users alone | - | 1 | 0.350 | 0.350 | -0.100 [-0.100, -0.100] |")
    assert table({3.0: [result(0.18)]}).splitlines()[2].count("| - |") == 2  # nothing to compare with


def test_rows_of_fewer_seeds_are_compared_seed_by_seed():
    found = {OPEN: [result(0.2, None), result(0.4, None, 1)], 3.0: [result(0.3, seed=1)], 1.0: []}
    last = table(found).splitlines()[-1]
    assert "| 1.000 | 1 | 0.550 | 0.550 | -0.100 [-0.100, -0.100] |" in last


def test_a_report_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cost_of_privacy, "row", None)
    assert rows(Design(), [OPEN, 3.0], range(2), tmp_path, make=False) == {OPEN: [], 3.0: []}
    with pytest.raises(SystemExit, match="no training without privacy to compare with yet"):
        cost_of_privacy.main(["--out", str(tmp_path), "--report", "--num-threads", "1"])


def test_rows_are_made_once_and_read_again(tmp_path, monkeypatch):
    made = []

    def make(design, data, epsilon, seed):
        assert data == seed
        made.append((epsilon, seed))
        return result(0.1, seed=seed)

    monkeypatch.setattr(cost_of_privacy, "row", make)
    monkeypatch.setattr(cost_of_privacy, "people", lambda design, seed: seed)
    first = rows(Design(), [OPEN, 3.0], range(2), tmp_path)
    assert rows(Design(), [OPEN, 3.0], range(2), tmp_path) == first and len(made) == 4
    rows(Design(users=50), [3.0], range(1), tmp_path)
    assert made[-1] == (3.0, 0) and len(made) == 5
    assert {json.loads(path.read_text())["seed"] for path in tmp_path.iterdir()} == {0, 1}


def test_both_parts_together_spend_the_budget_and_no_more():
    design = Design()
    noise = design.noise(3.0)
    q = design.init.users / design.users
    of_policy = Round("policy", design.policy.users / design.users, noise)
    kinds = {Round("meta-initialisation", q, noise): design.init.steps, of_policy: design.policy.rounds}
    account = Accountant(3.0, design.users**-1.1, kinds)
    assert 2.95 < account.spent() <= 3.0
    assert design.promise(OPEN, 1.0, 0) is None
    promise = design.promise(3.0, 0.5, 4)
    assert (promise.noise, promise.clip, promise.noise_seed) == (noise, 0.5, 4)


@pytest.mark.parametrize("epsilon", [OPEN, 8.0, PUBLIC])
def test_a_row_is_measured_on_test_users(epsilon):
    settings = {
        "init": MetaConfig(steps=2, users=6, inner_steps=1, public_steps=2),
        "policy": PrivateSettings(rounds=2, users=6, masks=2, public_rounds=2),
    }
    design = Design(users=12, test_users=5, rank=2, more={"pretrain_epochs": 1}, **settings)
    found = row(design, people(design, 0), epsilon, 0)
    assert {len(found[name]["reward"]) for name in cost_of_privacy.NAMES} == {5}
    assert found["all_on"]["cost"] == 1 and found["all_off"]["cost"] == 0
    assert (found["account"] is None) == (epsilon != 8.0)
    if found["account"]:
        parts = {kind.part: count for kind, count in Accountant.of(found["account"]).rounds.items()}
        assert parts == {"meta-initialisation": 2, "policy": 2}


@pytest.mark.parametrize("wrong", [["--seeds", "0"], ["--epsilon", "0"], ["--epsilon", "inf"], ["--epsilon", "3", "3"]])
def test_rows_that_make_no_sense_are_refused(wrong, tmp_path):
    with pytest.raises(SystemExit, match="at least one seed, and epsilons above 0"):
        cost_of_privacy.main([*wrong, "--out", str(tmp_path), "--num-threads", "1"])

"""Who chose hyperparameters under one protocol is no test user under another."""

from os.path import relpath
from pathlib import Path

import pytest
from harness import ENV as DIGITS
from harness import SMALL, arguments, rows

from eval import choosers, run, tuned
from eval.choosers import asked, choosers_of, digest, note_asked, split_key
from eval.plan import Place, Plan
from eval.rows import Measuring
from meta.arguments import parse_pairs

POPQUORN, OTHER = "dsa/PopquornBert-v0", "dsa/PopquornBert-v0 protocol:new_annotators"
ADOPTED = {"settings": {}, "adopted": OTHER}
KWARGS = parse_pairs(SMALL, "SMALL")


@pytest.fixture
def found(monkeypatch):
    """What tuning is made to have found, by environment."""
    entries = {}
    monkeypatch.setattr(choosers, "read_tuned", lambda: entries)
    return entries


def test_choosers_are_environments_of_the_same_people_that_settings_come_from(found):
    assert choosers_of(POPQUORN, {}) == ()
    found[POPQUORN] = {"joint": ADOPTED, "gumbel": ADOPTED, "feddpa": {"settings": {}, "search": "x"}}
    assert choosers_of(POPQUORN, {}) == choosers_of(POPQUORN, {"rank": 2}) == (OTHER,)
    found["dsa/JesterBert-v0"] = {"joint": ADOPTED}
    assert choosers_of("dsa/JesterBert-v0", {}) == (), "readers of jokes are other people"
    assert choosers_of("dsa/Planted-v0", {}) == ()


def test_a_key_is_taken_apart_as_it_was_put_together():
    assert split_key(OTHER) == (POPQUORN, {"protocol": "new_annotators"})
    hard = tuned.env_key("dsa/UnipenResNet-v0", {"auxiliary": None, "widths": [8, 16], "note": "two words", "lr": 0.1})
    assert split_key(hard) == ("dsa/UnipenResNet-v0", {"auxiliary": None, "widths": [8, 16], "note": "two words", "lr": 0.1})
    assert tuned.env_key(*split_key(OTHER)) == OTHER


def test_a_table_of_ones_own_is_known_by_more_than_its_name(found):
    key = "dsa/Personal-v0 backbone:minilm data:judgements.csv users:table"
    mine = {"users": "table", "backbone": "minilm", "data": "/elsewhere/judgements.csv"}
    found["dsa/Personal-v0"] = {"joint": {"settings": {}, "adopted": key}}
    assert choosers_of("dsa/Personal-v0", mine) == ()


def test_an_adopted_environment_that_is_gone_is_told_with_file_and_cure(found):
    found[POPQUORN] = {"joint": {"settings": {}, "adopted": "me/Gone-v0"}}
    with pytest.raises(
        ValueError,
        match=r"settings of joint .* from me/Gone-v0: .*Adopt them again from an environment that is known:",
    ):
        choosers_of(POPQUORN, {})


def test_whom_tuning_asks_is_kept_beside_the_settings_and_nobody_is_forgotten(tmp_path):
    settings = tmp_path / "mine.yml"
    with pytest.raises(ValueError, match=r"mine-val_users\.yml does not say who was asked in here; restore it, or tune"):
        asked(["here"], settings)
    note_asked("here", ["ann", "bob"], settings)
    note_asked("there", ["cleo"], settings)
    note_asked("here", ["dora"], settings)
    assert asked(["here"], settings) == {digest(name) for name in ("ann", "bob", "dora")}
    assert digest("cleo") in asked(["here", "there"], settings) and asked([], settings) == frozenset()
    assert "ann" not in (tmp_path / "mine-val_users.yml").read_text()
    (tmp_path / "mine-val_users.yml").write_text("here: [1")
    with pytest.raises(ValueError, match="is not a file of val users"):
        asked(["here"], settings)


def test_of_everything_that_was_adopted_from_the_same_people_it_is_known_who_was_asked():
    for key, methods in tuned.read_tuned().items():
        assert bool(choosers_of(*split_key(key))) == (key == POPQUORN), f"{key}: {sorted(methods)}"
    assert len(asked([OTHER])) > 20 and asked([OTHER], Path(relpath(tuned.PACKAGED))) == asked([OTHER])


@pytest.fixture
def one_left_out(monkeypatch):
    """``test-3`` of the simulated users is said to have chosen."""
    monkeypatch.setattr("eval.rows.asked", lambda keys: frozenset(map(digest, ("test-3", "nobody-here")) if keys else ()))
    monkeypatch.setattr(run, "choosers_of", lambda env, kwargs: ("somewhere",))


def test_who_chose_is_measured_by_no_method_and_the_report_says_so(one_left_out, tmp_path):
    run.main(arguments(tmp_path, "--methods", "base,all_on", "--no-timing", "--shown", "0", "1"))
    asked = {(row["method"], row["user"]) for row in rows(tmp_path)}
    assert {user for _, user in asked} == {f"test-{index}" for index in range(6)} - {"test-3"}
    assert (
        "Not among them: people who chose hyperparameters, as val users of `somewhere`."
        in (tmp_path / "results.md").read_text()
    )


def test_the_few_users_of_slow_methods_are_others_instead(one_left_out, monkeypatch):
    plan = Plan(
        DIGITS, KWARGS, choosers=("somewhere",), methods=("base", "all_on"), slow_users=5, shown=(0, 1), few_shown=(0, 2)
    )
    measuring = Measuring(plan, Place(0), plan.scenario(Place(0)))
    monkeypatch.setattr(Measuring, "slow", lambda self, method: True)
    method = plan.method("all_on")
    few = measuring.users(method, None)
    assert len(few) == 5 and "test-3" not in {measuring.support.ids[index] for index in few}
    assert measuring.users(method, 2) == few and measuring.users(method, 1) == []


def test_a_method_that_was_asked_for_the_few_sizes_alone_has_them_whatever_it_runs_through():
    plan = Plan(DIGITS, KWARGS, methods=("base", "bitfit"), curve=("bitfit",), few_shown=(0, 2))
    measuring, sizes = Measuring(plan, Place(0), plan.scenario(Place(0))), [job.shown for job in plan.jobs()][2:]
    assert not measuring.slow(plan.method("bitfit")) and sizes == [0, 2]
    assert all(measuring.users(plan.method("bitfit"), size) for size in sizes)

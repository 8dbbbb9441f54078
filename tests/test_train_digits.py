"""From pre-training to the table and to serving, on the digits in miniature."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from runs import train

import envs
from agents import evaluate
from agents.comparison import METHODS
from agents.run import RunConfig
from envs.scenario import _load
from serving import Personaliser, demo


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    pairs = {**envs.MINIATURES["dsa/DigitsResNet-v0"], "test_users": 2, "seed": 3}
    kwargs = [word for name, value in pairs.items() for word in ("--env-kwargs", f"{name}:{value}")]
    train(folder, "--env", "dsa/DigitsResNet-v0", "-n", "256", "-P", "n_envs:16", "-P", "batch_size:256", *kwargs)
    return folder


def test_the_digits_train_end_to_end(digits_run):
    summary = json.loads((digits_run / "summary.json").read_text())
    assert summary["test"]["n_users"] == 2
    assert {*summary["test"]["methods"]} >= {*METHODS}
    assert all(0 <= row["accuracy"] <= 1 for row in summary["test"]["methods"].values())
    assert summary["wall_seconds"]["pretrain"] > 0
    assert summary["wall_seconds"]["meta"] > 0
    assert (digits_run / "users.csv").read_text().count("\n") == 3


def test_a_digits_run_is_evaluated_again_from_the_answers_on_disk(digits_run, monkeypatch):
    before = json.loads((digits_run / "summary.json").read_text())
    monkeypatch.setattr("envs.oracles.adapt", lambda *args, **kwargs: pytest.fail("a user was adapted again"))
    _load.cache_clear()
    assert evaluate.evaluate_run(digits_run)["test"] == before["test"]


def test_a_run_is_served_with_the_masks_that_its_table_is_of(digits_run, tmp_path):
    scenario = RunConfig.load(digits_run).scenario(digits_run)
    with (digits_run / "users.csv").open() as file:
        rows = {row["user"]: row["ppo_mask"] for row in csv.DictReader(file)}
    with Personaliser.from_run(digits_run, tmp_path / "users.db") as personaliser:
        for user in scenario.data.population.test:
            given = personaliser.enroll(user.user_id, user.support.inputs, user.support.labels)
            on = "".join("1" if name in given.pathways else "0" for name in scenario.pathways)
            assert on == rows[user.user_id]
            assert len(personaliser.predict([user.user_id] * len(user.query), user.query.inputs)) == len(user.query)


def test_a_run_is_served_at_the_price_that_its_training_ended_at(digits_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(digits_run, run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "cost_weight": 0.3}))  # which dual ascent may begin at
    user = RunConfig.load(run).scenario(run).data.population.test[0]
    with Personaliser.from_run(run, tmp_path / "users.db") as personaliser:
        given = personaliser.enroll(user.user_id, user.support.inputs, user.support.labels)
    assert given.cost_weight == config["cost_weight"] == 0.1


def test_a_policy_for_one_weight_is_not_asked_about_another(digits_run):
    with pytest.raises(SystemExit, match=r"for the cost weight 0\.1 alone and would choose by that, not by 0\.3; train one"):
        evaluate.main([str(digits_run), "--cost-weight", "0.3", "--num-threads", "1"])


def test_the_readmes_example_of_serving_runs(digits_run, tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "README.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "serving" in block)
    first, second = RunConfig.load(digits_run).scenario(digits_run).data.population.test
    names = {"images": first.support.inputs, "labels": first.support.labels, "inputs": first.query.inputs[:3]}
    names |= {"more_images": second.support.inputs[:4], "more_labels": second.support.labels[:4]}
    monkeypatch.chdir(tmp_path)
    exec(re.sub(r'"logs/[^"]*"', repr(str(digits_run)), code), names)
    with Personaliser.from_run(digits_run, "users.db") as service:
        assert service.stats()["enrolled"] == 0


def test_the_demo_enrols_the_test_users_and_counts_right_answers(digits_run, capsys):
    demo.main([str(digits_run), "--seconds", "0.2", "--batch", "8", "--num-threads", "1"])
    out = capsys.readouterr().out
    assert re.search(r"2 users, mean cost [01]\.\d\d, [\d,]+ bytes each on disk", out)
    scenario = RunConfig.load(digits_run).scenario(digits_run)
    assert all(user.user_id[:12] in out for user in scenario.data.population.test)
    answers, right, bare = re.search(r"(\d+) answers, .* right: ([\d.]+) %, by the bare model ([\d.]+) %", out).groups()
    assert int(answers) >= 8 and int(answers) % 8 == 0 and 0 <= float(right) <= 100 and 0 < float(bare) < 100
    with pytest.raises(SystemExit, match="nowhere is not a run"):
        demo.main(["nowhere"])

"""The command line: learning, what a run leaves behind, what is refused, and several rounds."""

import csv
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import SHORT, TWO_ROUNDS, final, refused, resume, start, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import envs
from agents import evaluate, learning, train_ppo
from agents.checkpoint import choose_plans, load_policy
from agents.comparison import METHODS
from agents.run import PPO_SETTINGS, RunConfig, check_device, hyperparameters, numbered_folder
from backbones.artefacts import load_artefact
from envs.oracles import Oracle
from envs.planted import planted
from envs.rules import Rules
from envs.scenario import _load
from eval import headline
from meta.arguments import whole_paths

METHOD_KEYS = {"reward", "accuracy", "cost", "active_fraction", "distinct_masks", "labels_used"}
DIGITS = ["--env", "dsa/DigitsResNet-v0", "--env-kwargs", "train_users:4", "val_users:2", "test_users:2"]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run with the settings of the YAML file."""
    folder = tmp_path_factory.mktemp("runs") / "learned"
    train(folder, "--env", "dsa/Planted-v0")
    return folder


@pytest.fixture
def copy(learned, tmp_path):
    """A copy of the learned run that a test may damage."""
    return shutil.copytree(learned, tmp_path / "copy")


# Learning, and what a run leaves behind.


def test_ppo_learns_the_planted_masks(learned):
    summary = json.loads((learned / "summary.json").read_text())
    methods = summary["test"]["methods"]
    assert methods["ppo"]["reward"] >= 0.95 * (1 - 0.1 / 2)
    assert methods["ppo"]["distinct_masks"] > 10
    assert methods["best_static"]["reward"] < 0.6
    assert summary["test"]["ppo_minus_best_static"]["ci95"][0] > 0
    assert summary["test"]["ppo_minus_shuffled"]["ci95"][0] > 0
    assert 0.8 < summary["test"]["gap_closed"] <= 1


def test_the_summary_has_its_documented_keys(learned):
    summary = json.loads((learned / "summary.json").read_text())
    assert {*summary} >= {"env", "seed", "total_timesteps", "cost_weight", "wall_seconds", "test"}
    assert (summary["env"], summary["seed"], summary["cost_weight"]) == ("dsa/Planted-v0", 0, 0.1)
    assert summary["total_timesteps"] == hyperparameters("dsa/Planted-v0", [])["total_timesteps"]
    assert {*summary["wall_seconds"]} >= {"pretrain", "meta", "ppo", "evaluate"}
    assert summary["wall_seconds"]["ppo"] > 0
    assert summary["wall_seconds"]["evaluate"] > 0
    test = summary["test"]
    assert test["n_users"] == 100
    assert {*test["methods"]} >= {*METHODS}
    assert all({*row} >= METHOD_KEYS for row in test["methods"].values())
    for key in ("ppo_minus_best_static", "ppo_minus_shuffled"):
        assert test[key]["ci95"][0] <= test[key]["reward"] <= test[key]["ci95"][1]
    assert test["gap_closed_ci95"][0] <= test["gap_closed"] <= test["gap_closed_ci95"][1]


def test_with_one_test_user_whose_mask_nobody_else_can_have_a_run_ends_with_its_table(tmp_path, capsys, monkeypatch):
    some = planted(users=8)
    lone = replace(some, splits={**some.splits, "test": some.users("test")[:1]})
    monkeypatch.setattr(RunConfig, "scenario", lambda *_: lone)
    test = train(tmp_path / "run", *SHORT[:2], "-n", "64", "-P", "n_envs:8", "-P", "n_steps:8", "-P", "batch_size:64")["test"]
    assert test["n_users"] == 1 and "shuffled" not in test["methods"] and "all_on" in test["methods"]
    assert test["ppo_minus_shuffled"] is None and "two users" in test["ppo_minus_shuffled_reason"]
    assert "ppo - shuffled: not defined, masks can be dealt out" in capsys.readouterr().out
    run = headline.read_run(tmp_path / "run")[0]
    assert " |  | " in headline.conclusions({0.1: [run]})[2]


def test_the_thread_that_writes_curves_ends_with_the_training(tmp_path):
    few = ["--env", "dsa/Planted-v0", "--env-kwargs", "users:8", "-P", "n_envs:8", "-P", "n_steps:8", "-P", "batch_size:64"]
    config = train_ppo.read_settings(train_ppo.parse([*few, "-n", "64"]))
    before = threading.active_count()
    learning.learn(config, config.scenario(), tmp_path, progress=False)
    assert threading.active_count() == before
    assert [*(tmp_path / "tensorboard").glob("events.out.tfevents.*")]


def test_the_documented_methods_are_all_there():
    assert {*METHODS} == {
        "ppo", "all_on", "all_off", "best_static", "random", "shuffled", "gradient_norm", "relative_gradient",
        "validation_search", "all_on_all_labels",
    }  # fmt: skip


def test_users_csv_has_one_row_per_test_user_and_agrees_with_the_summary(learned):
    summary = json.loads((learned / "summary.json").read_text())
    with (learned / "users.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len({row["user"] for row in rows}) == 100
    assert {row["user"] for row in rows} == {f"user-{n}" for n in range(300, 400)}
    for method in METHODS:
        mean = np.mean([float(row[f"{method}_reward"]) for row in rows])
        assert mean == pytest.approx(summary["test"]["methods"][method]["reward"])
    right = [np.mean([a == b for a, b in zip(row["ppo_mask"], row["best_mask"], strict=True)]) for row in rows]
    assert [float(row["ppo_accuracy"]) for row in rows] == pytest.approx(right)


def test_a_run_on_a_file_of_its_working_folder_is_asked_about_from_another(tmp_path, monkeypatch):
    for file in (Path(envs.__file__).parent / "data").iterdir():
        shutil.copy(file, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    few = ["-n", "64", "-P", "n_envs:8", "-P", "n_steps:8", "-P", "batch_size:64", "-P", "search:false"]
    first = train(tmp_path / "run", "--env", "dsa/Tabular-v0", "--env-kwargs", "table:digits-table", *few)
    assert json.loads((tmp_path / "run/config.json").read_text())["env_kwargs"] == {"table": str(tmp_path / "digits-table")}
    monkeypatch.chdir("elsewhere")
    _load.cache_clear()
    assert evaluate.evaluate_run(tmp_path / "run")["test"] == first["test"]


def test_of_what_a_run_is_given_only_files_that_are_there_get_whole_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("reviews.csv").touch()
    Path("start.json").touch()
    Path("link").symlink_to("start.json")
    flags = ["--users", "table", "--data", "reviews.csv", "--backbone", "bert", "--source", "some/model"]
    args = train_ppo.parse([*flags, "--env-kwargs", "init:start"])
    found = train_ppo.read_settings(args).env_kwargs
    assert (found["data"], found["init"]) == (str(tmp_path / "reviews.csv"), str(tmp_path / "start"))
    assert (found["source"], found["users"]) == ("some/model", "table")
    assert whole_paths({"source": "link", "data": None}) == {"source": str(tmp_path / "link"), "data": None}


def test_the_event_file_holds_the_documented_tags(learned):
    events = EventAccumulator(str(learned / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    scalars = {*events.Tags()["scalars"]}
    wanted = {"rollout/ep_rew_mean", "train_users/accuracy", "val_users/reward", "val_users/distinct_masks"}
    assert scalars >= wanted | {f"gate_rate/pathway{p}" for p in range(8)}
    assert "gates" in events.Tags()["images"]
    rewards = [event.value for event in events.Scalars("val_users/reward")]
    assert rewards[-1] > 0.85 > rewards[0]
    assert events.Scalars("train_users/accuracy")[-1].value > 0.7
    assert all(0 <= e.value <= 1 for p in range(8) for e in events.Scalars(f"gate_rate/pathway{p}"))


def test_the_best_policy_by_val_users_is_kept(learned):
    events = EventAccumulator(str(learned / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    _, meta = load_artefact(learned / "policy", "gating policy")
    assert meta["val_reward"] == pytest.approx(max(e.value for e in events.Scalars("val_users/reward")), abs=1e-6)


def test_settings_come_from_yaml_then_flags_then_overrides(tmp_path):
    args = [*SHORT, "-P", "n_epochs:2", "-P", "policy:MultiInputPolicy", "--cost-weight", "0.3", "--seed", "4"]
    summary = train(tmp_path / "run", *args)
    config = RunConfig.load(tmp_path / "run")
    assert (config.total_timesteps, config.eval_freq, config.seed) == (2048, 1024, 4)
    assert (config.ppo["n_epochs"], config.policy, config.cost_weight) == (2, "MultiInputPolicy", 0.3)
    assert config.ppo["learning_rate"] == hyperparameters("dsa/Planted-v0", [])["learning_rate"]
    row = summary["test"]["methods"]["all_on"]
    assert row["reward"] == pytest.approx(row["accuracy"] - 0.3)


@pytest.mark.parametrize("written", ["1e-3", "0.001", "1.0e-3"])
def test_scientific_numbers_are_numbers(written):
    assert hyperparameters("dsa/Planted-v0", [f"learning_rate:{written}"])["learning_rate"] == 0.001


def test_another_policy_does_not_inherit_the_arguments_of_the_yamls_own():
    settings = hyperparameters("dsa/DigitsResNet-v0", ["policy:MultiInputPolicy"])
    assert settings["policy"] == "MultiInputPolicy" and settings["policy_kwargs"] == {}
    assert hyperparameters("dsa/DigitsResNet-v0", [])["policy_kwargs"]


def test_folders_are_numbered(tmp_path):
    (tmp_path / "logs" / "Planted-v0_2").mkdir(parents=True)
    made = [numbered_folder(tmp_path / "logs", "dsa/Planted-v0") for _ in range(3)]
    assert [path.name for path in made] == ["Planted-v0_1", "Planted-v0_3", "Planted-v0_4"]
    assert all(path.is_dir() for path in made)  # no other program that is started meanwhile takes them


def test_events_go_where_they_are_told(tmp_path):
    train(tmp_path / "run", *SHORT, "-n", "512", "-tb", str(tmp_path / "events"))
    assert any(path.name.startswith("events.out") for path in (tmp_path / "events" / "run").iterdir())
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_runs_that_share_a_folder_for_curves_keep_each_others(tmp_path):
    curves = tmp_path / "curves"
    for name in ("first", "second"):
        train(tmp_path / name, *SHORT, "-tb", str(curves))
    assert sorted(path.parent.name for path in curves.rglob("events.out.tfevents.*")) == ["first", "second"]
    train(tmp_path / "second", *SHORT, "-tb", str(curves), "--overwrite")
    assert sorted(path.parent.name for path in curves.rglob("events.out.tfevents.*")) == ["first", "second"]


def test_going_on_with_a_finished_run_changes_nothing(copy):
    before, summary = final(copy), json.loads((copy / "summary.json").read_text())
    assert resume(copy)["test"] == summary["test"]
    after = final(copy)
    assert before[1] == after[1]
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())


# What is refused.


def test_a_folder_with_files_is_refused_unless_overwriting_was_asked_for(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    message = refused(*SHORT, "-f", folder)
    assert str(folder) in message
    assert "--overwrite" in message
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    train(folder, *SHORT, "--overwrite")
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--env", "dsa/Plantd-v0"], ["unknown environment 'dsa/Plantd-v0'", "Did you mean 'dsa/Planted-v0'"]),
        (["--env", "CartPole-v1"], ["unknown environment 'CartPole-v1'", "dsa/Planted-v0"]),
        (["-P", "learning_rat:1"], ["unknown hyperparameter 'learning_rat'", "Did you mean 'learning_rate'"]),
        (["-P", "learning_rate=1"], ["name:value", "learning_rate=1"]),
        (["-P", "policy:GatingPolcy"], ["unknown policy 'GatingPolcy'", "Did you mean 'GatingPolicy'"]),
        (["-P", "n_envs:0"], ["n_envs must be at least 1"]),
        (["-n", "0"], ["total_timesteps must be at least 1"]),
        (["--seed", "-1"], ["seed must be 0 to 4294967295, got -1"]),
        (["--seed", str(2**32)], ["seed must be 0 to"]),
        (["-P", "learning_rate:nan"], ["learning_rate must be a finite number, got nan"]),
        (["--eval-freq", "-5"], ["eval_freq must be at least 1"]),
        (["--cost-weight", "-0.1"], ["at least 0"]),
        (["--cost-weight", "nan"], ["at least 0"]),
        (["--env-kwargs", "rounds=2"], ["name:value"]),
        (["--env-kwargs", "rounds:0"], ["rounds must be a whole number of at least 1"]),
        (["--env-kwargs", "usrs:80"], ["usrs", "users"]),
        (["-P", "n_envs:abc"], ["n_envs must be of type int, got 'abc'"]),
        (["-P", "n_envs:true"], ["n_envs must be of type int, got True"]),
        (["-P", "average:x"], ["average must be of type float, got 'x'"]),
        (["-P", "batch_size:abc"], ["batch_size must be of type int, got 'abc'"]),
        (["-P", "batch_size:0"], ["batch_size must be at least 1"]),
        (["-P", "learning_rate:fast"], ["learning_rate must be of type float, got 'fast'"]),
        (["-P", "search:maybe"], ["search must be of type bool, got 'maybe'"]),
        (["-P", "policy_kwargs:3"], ["policy_kwargs must be of type dict[str, typing.Any], got 3"]),
        (["-P", "policy_kwargs:{hiden: 64}"], ["GatingPolicy takes no 'hiden'. Did you mean 'hidden'"]),
        (["-P", "policy_kwargs:{net_arch: [256]}"], ["GatingPolicy takes no 'net_arch'"]),
        (["-P", "policy_kwargs:{hidden: 0}"], ["hidden must be at least 1, got 0"]),
        (["-P", "batch_size:1"], ["no spread to normalise", "normalize_advantage:false"]),
        (["-P", "n_envs:1", "-P", "n_steps:1"], ["no spread to normalise"]),
        (["-P", "clip_range:-0.2"], ["clip_range must be above 0, got -0.2"]),
        (["-P", "max_grad_norm:0.0"], ["max_grad_norm must be above 0"]),
        (["-P", "gamma:2.0"], ["gamma must be 0 to 1, got 2.0"]),
        (["--env-kwargs", "layerwise:maybe"], ["layerwise must be of type bool, got 'maybe'"]),
        (["--env-kwargs", "users:many"], ["users must be of type int, got 'many'"]),
        ([*DIGITS, "--env-kwargs", "meta_steps:abc"], ["meta_steps must be of type int, got 'abc'"]),
        ([*DIGITS, "--env-kwargs", "head_rate:fast"], ["head_rate must be of type float | None, got 'fast'"]),
        ([*DIGITS, "--env-kwargs", "widths:16"], ["widths must be of type collections.abc.Sequence[int], got 16"]),
        ([*DIGITS, "--env-kwargs", "shifts:7"], ["shifts must be of type collections.abc.Sequence[str] | str, got 7"]),
        ([*DIGITS, "--env-kwargs", "shifts:noisey"], ["unknown shift 'noisey'. Did you mean 'noisy'"]),
        ([*DIGITS, "--env-kwargs", "pretrain_epochs:0"], ["pretrain_epochs must be at least 1, got 0"]),
        (["--device", "gpu"], ["unknown device 'gpu'; give cpu, cuda"]),
        (["--device", "cuda"], ["there is no cuda here", "Leave --device out"]),
    ],
)
def test_mistakes_are_refused_with_a_suggestion_and_leave_no_run(arguments, words, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = tmp_path / "run"
    message = refused("--env", "dsa/Planted-v0", *arguments, "-f", folder)
    assert message.startswith("error: ")
    for word in words:
        assert word in message
    assert not (folder / "summary.json").exists()


def test_a_gpu_that_there_is_not_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cuda:1")
    message = refused("--env", "dsa/Planted-v0", "--device", "cuda:2", "-f", tmp_path / "run")
    assert "there is no cuda:2 here: torch finds 2 CUDA devices, counted from cuda:0" in message


def test_a_mistake_in_the_arguments_leaves_the_folder_free(tmp_path):
    refused("--env", "dsa/Planted-v0", "--env-kwargs", "rounds:0", "-f", tmp_path / "run")
    train(tmp_path / "run", *SHORT, "-n", "512")


def test_a_misspelt_flag_is_refused_with_a_suggestion(capsys):
    assert refused("--env", "dsa/Planted-v0", "--cost-wieght", "0.2") == "2"
    told = capsys.readouterr().err
    assert "--cost-wieght" in told
    assert "--cost-weight" in told.split("unrecognized")[-1]


def test_the_command_line_exits_with_a_code_that_is_not_zero(tmp_path):
    process = start(tmp_path / "run", "--env", "dsa/Plantd-v0")
    out, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Did you mean 'dsa/Planted-v0'" in told
    assert "Traceback" not in out + told


def test_going_on_with_a_folder_that_is_no_run_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        message = refused("--resume", folder)
        assert f"{folder} is not a run" in message
    assert [*tmp_path.iterdir()] == []


def test_a_damaged_config_is_refused_by_name(copy):
    path = copy / "config.json"
    path.write_text(path.read_text()[:20])
    assert "config.json" in refused("--resume", copy)


@pytest.mark.parametrize("what", ["checkpoint", "policy"])
def test_a_truncated_file_of_tensors_is_refused(copy, what):
    path = next(copy.glob(f"{what}-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-50])
    message = refused("--resume", copy)
    assert "truncated or altered" in message
    assert path.name in message


def evaluation_refused(folder):
    with pytest.raises(SystemExit) as exit_:
        evaluate.main([str(folder), "--num-threads", "1"])
    assert str(exit_.value.code).startswith("error: ")
    return str(exit_.value.code)


def test_a_truncated_policy_is_not_evaluated(copy):
    path = next(copy.glob("policy-*.safetensors"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert f"{path} is truncated or altered" in evaluation_refused(copy)


def test_an_altered_policy_is_not_evaluated(copy):
    path = copy / "policy.json"
    body = json.loads(path.read_text())
    body["meta"]["policy_kwargs"] = {"hidden": 3}
    path.write_text(json.dumps(body))
    assert f"{path} was altered" in evaluation_refused(copy)


def test_a_missing_policy_is_not_evaluated(copy):
    (copy / "policy.json").unlink()
    assert "no gating policy at" in evaluation_refused(copy)


def test_a_folder_that_is_no_run_is_not_evaluated(tmp_path):
    assert "is not a run" in evaluation_refused(tmp_path)


def test_a_policy_is_not_measured_on_users_or_a_model_it_was_not_trained_with(tmp_path):
    run = tmp_path / "run"
    train(run, *SHORT)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "seed": config["seed"] + 1}))
    with pytest.raises(SystemExit, match="trained on other observations"):
        evaluate.main([str(run)])
    with pytest.raises(SystemExit, match="trained on other observations"):
        train_ppo.main(["--resume", str(run), "--no-progress"])


def test_a_run_is_evaluated_from_the_command_line(copy, capsys):
    before = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").unlink()
    evaluate.main([str(copy), "--num-threads", "1"])
    assert json.loads((copy / "summary.json").read_text())["test"] == before["test"]
    assert "| best_static |" in capsys.readouterr().out


def test_the_seed_goes_to_scenarios_that_take_one(monkeypatch):
    settings = hyperparameters("dsa/Planted-v0", [])
    ppo = {name: settings.pop(name) for name in PPO_SETTINGS & settings.keys()}
    config = RunConfig(env="dsa/Planted-v0", seed=7, cost_weight=0.1, ppo=ppo, **settings)
    assert config.scenario_arguments()[1] == {"seed": 7}
    monkeypatch.setattr("agents.run.builder_of", lambda name: lambda users=32: planted(0, users))
    assert config.scenario_arguments()[1] == {}


# Several rounds.


class EveryRoundCounts(Oracle):
    """The planted problem, but for the accuracy: the share of right gates in all masks of the plan."""

    def __init__(self, scenario):
        self.costs = scenario.oracle.costs
        self.best = np.array([[int(bit) for bit in info["best_mask"]] for info in scenario.user_info], dtype=bool)

    def measure(self, users, plans, roles):
        right = (plans == self.best[users][:, None]).mean((1, 2))
        return np.repeat(np.stack([right, 1 - right], 1)[:, None], len(roles), 1)


@pytest.fixture
def every_round_counts(monkeypatch):
    scenario = planted()
    # What is seen after the first mask calls for another one.
    shown = replace(scenario, oracle=EveryRoundCounts(scenario), observe=lambda users, plans: -scenario.statistics[users])
    monkeypatch.setattr(RunConfig, "scenario", lambda *args: shown)
    return shown


def test_a_policy_of_two_rounds_is_judged_and_measured_by_both(every_round_counts, tmp_path):
    summary = train(tmp_path / "run", *TWO_ROUNDS)
    policy, meta = load_policy(tmp_path / "run" / "policy", every_round_counts)
    for split, reported in (("test", summary["test"]["methods"]["ppo"]["reward"]), ("val", meta["val_reward"])):
        users = every_round_counts.users(split)
        plans = choose_plans(policy, every_round_counts, users, RunConfig.load(tmp_path / "run").rules)
        assert plans.shape == (100, 2, 8)
        assert (plans[:, 0] != plans[:, 1]).any(1).mean() > 0.5
        both, last = (every_round_counts.oracle.evaluate(users, p, "query").reward(0.1).mean() for p in (plans, plans[:, -1]))
        assert reported == pytest.approx(both)
        assert both != pytest.approx(last, abs=1e-3)
    assert summary["test"]["methods"]["ppo"]["active_fraction"] == pytest.approx(
        choose_plans(policy, every_round_counts, every_round_counts.users("test"), Rules(rounds=2))[:, -1].mean()
    )

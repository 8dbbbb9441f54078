"""Tuning on the planted problem: what is tried, what counts, what is written, and going on after a stop."""

import sys
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from agents import tune
from agents.run import RunConfig
from agents.train_ppo import parse as parse_training
from agents.train_ppo import read_settings, train
from envs.oracles import FormulaOracle
from envs.planted import planted

optuna = pytest.importorskip("optuna", reason="needs the extra `tune`")
search = pytest.importorskip("agents.search")
ENTRIES = yaml.safe_load(files("agents").joinpath("hyperparameters/ppo.yml").read_text())
SMALL = ["--env", "dsa/Planted-v0", "-n", "256", "--eval-freq", "128", "--num-threads", "1"]


def run(out, trials, *more):
    tune.main([*SMALL, "--trials", str(trials), "--out", str(out), *more])
    return out.read_text()


def refused(*arguments):
    with pytest.raises(SystemExit) as exit_:
        tune.main([*map(str, arguments), "--num-threads", "1"])
    return str(exit_.value.code)


def trials(out):
    storage = search.JournalStorage(search.JournalFileBackend(str(out.with_suffix(".trials"))))
    return optuna.load_study(study_name="tune", storage=storage).trials


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Three trials, and which users the oracle was asked for meanwhile."""
    out, asked, measure = tmp_path_factory.mktemp("tune") / "best.yml", set(), FormulaOracle.measure

    def overheard(self, users, plans, roles):
        asked.update((int(user), role) for user in users for role in roles)
        return measure(self, users, plans, roles)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FormulaOracle, "measure", overheard)
        text = run(out, 3)
    return out, text, asked


def test_test_users_are_never_asked_and_val_users_for_query_examples_only(tuned):
    scenario = planted()
    by_split = {split: {role for user, role in tuned[2] if user in scenario.users(split)} for split in scenario.splits}
    assert by_split == {"train": {"validation"}, "val": {"query"}, "test": set()}


def test_the_first_trial_tries_the_settings_of_the_yaml_file(tuned):
    settings = tune.starting_settings(tune.parse(SMALL))
    assert search.suggest(trials(tuned[0])[0], settings) == settings
    assert settings["learning_rate"] == ENTRIES["dsa/Planted-v0"]["learning_rate"]


def test_the_best_settings_are_an_entry_that_training_takes(tuned):
    best = max(trials(tuned[0]), key=lambda trial: trial.value)
    (name, entry), *others = yaml.safe_load(tuned[1]).items()
    assert (name, others) == ("dsa/Planted-v0", [])
    assert entry == search.suggest(best, tune.starting_settings(tune.parse(SMALL)))
    config = read_settings(parse_training(tune.training_flags(entry, tune.parse(SMALL), 0)))
    assert (config.ppo["learning_rate"], config.policy_kwargs) == (entry["learning_rate"], entry["policy_kwargs"])
    assert config.n_envs * config.ppo["n_steps"] % config.ppo["batch_size"] == 0


def test_the_file_names_the_command_that_made_it_without_folders(tuned):
    first = tuned[1].splitlines()[0]
    assert "python -m agents.tune --env dsa/Planted-v0 --trials 3" in first and "--out best.yml" in first
    assert str(tuned[0].parent) not in tuned[1]


def test_going_on_adds_the_trials_that_an_uninterrupted_search_would_have_had(tuned, tmp_path):
    (tmp_path / "on.trials").write_bytes(tuned[0].with_suffix(".trials").read_bytes())
    run(tmp_path / "on.yml", 4)
    whole = tmp_path / "whole.yml"
    run(whole, 4)
    found = [[(trial.params, trial.value) for trial in trials(out)] for out in (tuned[0], tmp_path / "on.yml", whole)]
    assert (len(found[0]), len(found[1])) == (3, 4)
    assert found[1] == found[2]
    assert found[1][:3] == found[0]


def test_a_finished_search_only_writes_its_result_again(tuned, monkeypatch):
    monkeypatch.setattr(tune, "train", lambda *_: pytest.fail("trained again"))
    assert run(tuned[0], 3) == tuned[1]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [(["--seed", "-1"], "--seed must be 0 to"), (["--trials", "0"], "--trials must be"), (["--out", "."], "is a folder")],
)
def test_what_is_wrong_is_said_before_a_trial_is_made(wrong, said, capsys):
    with pytest.raises(SystemExit):
        tune.parse([*SMALL, *wrong])
    assert said in capsys.readouterr().err


def test_trials_made_with_other_settings_are_refused(tuned):
    said = refused(*SMALL, "--trials", 3, "--out", tuned[0], "--cost-weight", "0.3")
    assert "another cost_weight" in said and "--out" in said


def test_training_in_stages_is_training_at_once(tmp_path):
    args = tune.parse([*SMALL, "--cost-weight", "uniform:0:0.3"])
    settings = tune.starting_settings(args) | {"n_steps": 2, "n_epochs": 2, "total_timesteps": 512}
    reports = []
    value = tune.value_of(settings, args, lambda value, stage: reports.append((stage, value)))
    training = parse_training(tune.training_flags(settings, args, 0))
    at_once = train(read_settings(training), tmp_path, training)
    assert [stage for stage, _ in reports] == [1, 2, 3, 4]
    assert reports[-1][1] == value == tune.later_half(dict(at_once.history))


def test_values_are_means_over_seeds(monkeypatch):
    rewards = {0: 0.2, 1: 0.6}

    class Kept:
        def __init__(self, config: RunConfig) -> None:
            self.history = [(0, 0.0), (config.total_timesteps, rewards[config.seed])]

    monkeypatch.setattr(tune, "train", lambda config, folder, args: Kept(config))
    args = tune.parse([*SMALL, "--seeds", "2"])
    stages = []
    value = tune.value_of(tune.starting_settings(args), args, lambda _, stage: stages.append(stage))
    assert value == pytest.approx(0.4)
    assert stages == [*range(1, 9)]


def test_what_counts_is_the_later_half_not_the_luckiest_look():
    assert tune.later_half({0: 0.0, 100: 0.9, 200: 0.5, 300: 0.7}) == pytest.approx(0.6)
    assert tune.later_half({300: 0.7, 0: 0.0, 100: 0.9}) == pytest.approx(0.8)


@pytest.mark.parametrize("env", [name for name in ENTRIES if name != "default"])
def test_every_entry_of_the_yaml_file_lies_in_the_search_space(env):
    settings = tune.starting_settings(tune.parse(["--env", env]))
    assert search.suggest(optuna.trial.FixedTrial(search.proposal_of(settings)), settings) == settings


def test_a_trial_below_the_median_is_given_up(tmp_path):
    study = search.open_study(tmp_path / "x.trials", {})
    settings = tune.starting_settings(tune.parse(SMALL))
    values = [0.5] * search.STARTUP + [0.4, 0.6]
    stages = []

    def objective(_, report):
        value = values[len(study.trials) - 1]
        for stage in (1, 2, 3):
            stages.append((value, stage))
            report(value, stage)
        return value

    search.run_trials(study, settings, objective, len(values), seed=0)
    assert [trial.state.name for trial in study.trials][-2:] == ["PRUNED", "COMPLETE"]
    assert [stage for value, stage in stages if value == 0.4] == [1, 2]
    assert study.best_value == 0.6


def test_an_interrupted_trial_is_made_up_for_and_the_first_settings_are_not_forgotten(tmp_path):
    study = search.open_study(tmp_path / "x.trials", {})
    settings = tune.starting_settings(tune.parse(SMALL))
    tried = []

    def objective(found, report):
        tried.append(found)
        if len(tried) == 1:
            raise KeyboardInterrupt
        return 0.5

    with pytest.raises(KeyboardInterrupt):
        search.run_trials(study, settings, objective, 2, seed=0)
    search.run_trials(search.open_study(tmp_path / "x.trials", {}), settings, objective, 2, seed=0)
    assert [found == settings for found in tried] == [True, True, False]


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    out = ["--out", tmp_path / "x.yml"]
    assert "Did you mean 'dsa/Planted-v0'?" in refused("--env", "dsa/Plantd-v0", *out)
    assert "has no argument 'usrs'" in refused(*SMALL, "--env-kwargs", "usrs:8", *out)
    assert "cost_weight must be a number" in refused(*SMALL, "--cost-weight", "much", *out)
    with pytest.raises(SystemExit):
        tune.parse([*SMALL, "--trials", "0"])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "agents.search", None)
    assert "pip install" in refused(*SMALL, *out)


def test_folders_in_arguments_are_not_published():
    args = tune.parse([*SMALL, "--env-kwargs", "data_root:/home/somebody/data", "shots:3", "--out", "/home/somebody/x.yml"])
    assert "somebody" not in tune.command_of(args)
    assert "data_root:DATA_ROOT" in tune.command_of(args) and "shots:3" in tune.command_of(args)
    assert args.out == Path("/home/somebody/x.yml")

"""Tuning of the harness's methods: what is tried, what ends early, what wins, what is written."""

import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import yaml

from envs import MINIATURES
from eval import tune_methods
from eval.choosers import asked, digest
from eval.methods import METHODS
from eval.methods.base import Method, Predictor, Sizes
from eval.tuned import HEADER, PACKAGED, entry_for, env_key, read_tuned, settings_for, write_tuned
from eval.val_users import ValUsers, shown_to

pytest.importorskip("optuna", reason="needs the extra `tune`")
tuning = pytest.importorskip("eval.tuning")
proposals = pytest.importorskip("eval.proposals")
ENV = "dsa/DigitsResNet-v0"


class Right(Predictor):
    """Says the right class of the first so many of a hundred query examples, and a wrong one of the rest."""

    def __init__(self, share, users, active=0):
        self.share, self.users, self.active = share, users, active

    def logits(self, asked):
        labels, share = asked.batch.labels, self.share
        right = torch.arange(labels.shape[1]) < round(share * labels.shape[1])
        told = torch.where(right, labels, (labels + 1) % 10)
        return torch.nn.functional.one_hot(told, 10).float() * (float("nan") if share < 0 else 1)

    def serve(self, inputs):
        raise ValueError("nothing to serve")

    @property
    def sizes(self):
        return [Sizes(self.active, self.active, 0)] * self.users


@dataclass(frozen=True)
class Planted(Method):
    """Best by far at ``high`` 4, ``kind`` "b"; defaults in between."""

    high: int = 2
    kind: str = "a"
    steps: int = 20

    space: ClassVar = {"high": (0, 1, 2, 3, 4, 5), "kind": ("a", "b", "c")}
    length: ClassVar = "steps"
    trained: ClassVar = []

    def share(self):
        return 0.1 + 0.1 * (4 - abs(4 - self.high)) + {"a": 0, "b": 0.3, "c": -0.05}[self.kind]

    def adapt(self, world, fitted, shown, cost_weight):
        self.trained.append((self, len(shown)))
        return Right(self.share(), len(shown))


@dataclass(frozen=True)
class Failing(Planted):
    """The better half of its points, and the defaults, fail in different ways."""

    def adapt(self, world, fitted, shown, cost_weight):
        if self.kind == "b":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000000 bytes")
        if self.high > 3:
            raise ValueError("too high")
        return Right(-1 if self.high == 2 else self.share(), len(shown))


@dataclass(frozen=True)
class Hopeless(Planted):
    """Nothing else happens."""

    def adapt(self, world, fitted, shown, cost_weight):
        raise FloatingPointError("diverged")


@dataclass(frozen=True)
class Broken(Planted):
    """Has a defect that no setting heals."""

    def adapt(self, world, fitted, shown, cost_weight):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


@dataclass(frozen=True)
class Trading(Planted):
    """The more is active the better, but not by the cost weight of 0.5; trains the backbone."""

    space: ClassVar = {"high": (0, 1, 2, 3, 4)}
    length: ClassVar = None
    trades: ClassVar = True
    through_backbone: ClassVar = True

    def adapt(self, world, fitted, shown, cost_weight):
        self.trained.append((self, len(shown)))
        return Right(0.5 + 0.1 * self.high, len(shown), self.high * int(world.pathways.sizes.sum()) // 4)


@dataclass(frozen=True)
class Flat(Planted):
    """Every point is worth the same."""

    def share(self):
        return 0.5


KINDS = {kind.__name__.lower(): kind for kind in (Planted, Failing, Hopeless, Broken, Trading, Flat)}


@pytest.fixture(autouse=True)
def registered():
    for name, kind in KINDS.items():
        METHODS.register(name, kind)
    Planted.trained.clear()
    yield
    for name in KINDS:
        METHODS.unregister(name)


@pytest.fixture
def run(digits_world, tmp_path, monkeypatch, capsys):
    """The command on the tiny digits; gives what it printed."""
    monkeypatch.setattr(tune_methods, "world_of", lambda env, kwargs, seed: digits_world)

    def call(methods, *more):
        Planted.trained.clear()
        tune_methods.main(["--env", ENV, "--methods", methods, "--out", str(tmp_path / "methods.yml"), *map(str, more)])
        return capsys.readouterr().out

    return call


def refused(*arguments):
    with pytest.raises(SystemExit) as exit_:
        tune_methods.main([*map(str, arguments)])
    return str(exit_.value.code)


def tried(kind, world, trials, seed=0, **more):
    return tuning.Tuned(kind, list(tuning.trials_of(kind, ValUsers(world, 0.1, **more), trials, seed)))


def entries(tmp_path, env=ENV):
    return yaml.safe_load((tmp_path / "methods.yml").read_text())[env]


@pytest.mark.parametrize("seed", range(3))
def test_the_planted_best_point_is_found_among_the_better_half_of_the_grid(digits_world, seed):
    found = tried(Planted, digits_world, 12, seed)
    assert found.settings == {"high": 4, "kind": "b"}
    assert found.best.whole.value == pytest.approx(0.8, abs=0.02)


def test_the_first_trial_is_the_defaults_and_none_comes_twice(digits_world):
    found = tried(Planted, digits_world, 50)
    assert found.trials[0].settings == {"high": 2, "kind": "a"}
    points = {tuple(trial.settings.items()) for trial in found.trials}
    assert len(points) == len(found.trials) == 18, "the whole grid, and nothing twice"


def test_defaults_beside_the_grid_are_tried_first_and_the_whole_grid_after_them(digits_world, monkeypatch):
    monkeypatch.setattr(Planted, "space", {"high": (0, 4), "steps": (5, 10)})
    found = tried(Planted, digits_world, 50)
    assert found.trials[0].settings == {"high": 2, "steps": 20}
    assert len({tuple(trial.settings.items()) for trial in found.trials}) == 5


def test_other_values_stand_in_for_a_methods_own_and_the_first_of_them_for_a_default_that_is_none_of_them(run, tmp_path):
    run("planted,full_finetune", "--trials", "50", "--space", "high:[3, 5]", "steps:[20]", "--val-users", "1")
    found = entries(tmp_path)["planted"]
    assert (found["trials"], found["settings"]) == (6, {"high": 5, "kind": "b"})
    assert entries(tmp_path)["full_finetune"]["trials"] == 5  # of its space the five rates are left
    assert Planted.trained[0][0].high == 3


def test_whom_tuning_asked_is_kept_beside_what_it_found(run, tmp_path, digits_world):
    run("planted", "--trials", 2)
    val = digits_world.data.population.val
    assert asked([ENV], tmp_path / "methods.yml") == {digest(user.user_id) for user in val} and len(val)


def test_what_was_found_elsewhere_can_be_taken_over(run, tmp_path):
    run("planted,flat", "--trials", "12")
    found = entries(tmp_path)["planted"]
    flags = ["--env", "dsa/PopquornBert-v0", "--out", str(tmp_path / "methods.yml"), "--methods", "planted,failing", "--adopt"]
    tune_methods.main([*flags, ENV])
    taken = entries(tmp_path, "dsa/PopquornBert-v0")
    assert [*taken] == ["planted"]
    assert taken["planted"]["settings"] == found["settings"] and taken["planted"]["adopted"] == ENV
    assert settings_for("dsa/PopquornBert-v0", {"fold": 3}, "planted", tmp_path / "methods.yml") == found["settings"]
    assert "has nothing of dsa/Planted-v0 for planted, failing" in refused(*flags, "dsa/Planted-v0")
    assert "unknown environment" in refused(*flags, "dsa/Digits-v0")
    own = entries(tmp_path)["flat"]
    back = ["--env", ENV, "--out", str(tmp_path / "methods.yml"), "--methods", "planted,flat"]
    assert "that dsa/DigitsResNet-v0 has not found for itself" in refused(*back, "--adopt", "dsa/PopquornBert-v0")
    assert "has nothing of dsa/PopquornBert-v0" in refused(*back, "--adopt", "dsa/PopquornBert-v0", "--again"), (
        "it is not its own"
    )
    write_tuned(tmp_path / "methods.yml", "dsa/PopquornBert-v0", "planted", found)
    tune_methods.main([*back, "--adopt", "dsa/PopquornBert-v0", "--again"])
    assert "search" not in entries(tmp_path)["planted"] and entries(tmp_path)["flat"] == own


def test_tuning_in_another_world_is_another_search(digits_world):
    args = tune_methods.parse(["--env", ENV])
    args.instead = {}
    elsewhere = replace(digits_world, scenario=replace(digits_world.scenario, fingerprint="of another start"))
    for kind, same in ((Planted, False), (Trading, True)):  # one starts where adapters start, one puts in its own
        assert (tune_methods.search_key(kind, args, digits_world) == tune_methods.search_key(kind, args, elsewhere)) == same


def test_the_val_users_of_one_fold_choose_for_no_other(digits_world, run, monkeypatch):
    population = digits_world.data.population
    folded = SimpleNamespace(env=ENV, kwargs={}, data=SimpleNamespace(population=SimpleNamespace(folds=torch.zeros(3))))
    with pytest.raises(ValueError, match=r"val users of one fold of .* are test users of another"):
        tune_methods.check_fold(folded)
    tune_methods.check_fold(SimpleNamespace(**{**vars(folded), "kwargs": {"fold": 2}}))
    assert population.folds is None and tune_methods.check_fold(digits_world) is None


def test_a_search_with_other_values_is_another_search(run):
    assert "| planted |" in run("planted", "--trials", "2")
    assert "| planted |" in run("planted", "--trials", "2", "--space", "high:[1, 2]")
    assert "finished before" in run("planted", "--trials", "2", "--space", "high:[1, 2]")


def test_the_same_seed_gives_the_same_trials_and_another_seed_others(digits_world):
    def points(seed):
        return [trial.settings for trial in tried(Planted, digits_world, 8, seed).trials]

    assert points(0) == points(0) != points(1)


def test_a_hopeless_trial_ends_after_a_fifth_of_its_steps(digits_world):
    found = tried(Planted, digits_world, 18)
    given_up = [trial for trial in found.trials if trial.given_up]
    assert 4 <= len(given_up) <= 12
    for trial in found.trials:
        steps = [method.steps for method, _ in Planted.trained if trial.settings.items() <= method.settings().items()]
        assert steps == ([4] if trial.given_up else [4, 20])
    for number, trial in enumerate(found.trials):
        earlier = sorted(each.early for each in found.trials[:number])
        median = earlier and (earlier[(number - 1) // 2] + earlier[number // 2]) / 2
        assert trial.given_up == (number >= 4 and trial.early < median)


def test_a_trial_is_not_given_up_for_a_training_that_is_short(digits_world):
    long = [tuning.Trial({}, length=8, early=0.5)] * 4
    assert tuning.hopeless(tuning.Trial({}, length=8, early=0.4), long)
    assert not tuning.hopeless(tuning.Trial({}, length=1, early=0.4), long), "others had trained longer by then"
    assert tuning.hopeless(tuning.Trial({}, length=16, early=0.4), long)
    assert not tuning.hopeless(tuning.Trial({}, length=8, early=0.5), long), "as good as the median"


def test_a_training_of_one_step_is_not_run_twice(digits_world, monkeypatch):
    monkeypatch.setattr(Planted, "space", {"steps": (1, 2)})
    found = tried(Planted, digits_world, 3)
    assert [method.steps for method, _ in Planted.trained] == [4, 20] + [
        steps for trial in found.trials[1:] for steps in ([1] if trial.settings["steps"] == 1 else [1, 2])
    ]


def test_failing_trials_count_never_win_and_are_reported(digits_world, run, tmp_path):
    told = run("failing", "--trials", 18)
    assert "failing: high 2, kind a: failed: the logits of user" in told
    assert "failed: too high" in told
    assert "can't allocate memory" in told
    entry = entries(tmp_path)["failing"]
    assert (entry["settings"], entry["default_value"], entry["trials"]) == ({"high": 3}, None, 18)
    assert entry["failed"] == 6 + 2 * 2 + 2
    assert "| failing | - | 0.4" in told


def test_a_method_of_which_every_trial_fails_gets_no_entry_and_the_others_go_on(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        run("hopeless,planted", "--trials", 2)
    assert "nothing was found for hopeless" in str(exit_.value.code)
    assert "hopeless: high 2, kind a: failed: diverged" in capsys.readouterr().out
    assert list(entries(tmp_path)) == ["planted"]


def test_a_defect_of_the_program_is_no_failed_trial(run):
    with pytest.raises(RuntimeError, match="mat1"):
        run("broken")


def test_every_method_gets_the_same_number_of_trials_or_its_whole_grid(run, tmp_path):
    run("planted,flat,trading", "--trials", 7)
    assert {name: entry["trials"] for name, entry in entries(tmp_path).items()} == {"planted": 7, "flat": 7, "trading": 5}


def test_of_equal_trials_the_defaults_win(run, tmp_path):
    assert "| flat | 0.5000 | 0.5000 | 6 | 0 | 0 | defaults |" in run("flat", "--trials", 6)
    assert entries(tmp_path)["flat"]["settings"] == {}


def test_methods_that_trade_are_chosen_by_reward(digits_world):
    cheap, dear = (tuning.Tuned(Trading, [*tuning.trials_of(Trading, ValUsers(digits_world, w), 5, 0)]) for w in (0.9, 0.1))
    assert (cheap.best.settings, dear.best.settings) == ({"high": 0}, {"high": 4})
    assert dear.best.whole.value == pytest.approx(0.9 - 0.1, abs=0.02)


def test_few_val_users_are_for_methods_through_the_backbone_alone_and_always_the_same(digits_world):
    users = ValUsers(digits_world, 0.1, limit=2)
    assert len(users.places(Planted)) == 4
    assert len(users.places(Trading)) == 2
    assert set(users.places(Trading).tolist()) > set(ValUsers(digits_world, 0.1, 1).places(Trading).tolist())
    users.measure(Trading())
    assert Planted.trained[-1][1] == 2


def test_values_are_those_of_the_real_model(digits_world):
    method = tune_methods.method_class("all_on")()
    users = torch.arange(4)
    predictor = method.personalise(digits_world, method.fit(digits_world, 0), shown_to(method, digits_world, users), 0)
    query = digits_world.group("val", "query")
    logits = predictor.logits(query)
    each = [float((logits[u, :n].argmax(-1) == query.labels(u)).double().mean()) for u, n in enumerate(query.counts)]
    assert ValUsers(digits_world, 0.1).measure(method).value == pytest.approx(sum(each) / 4)


def test_a_winner_at_an_end_of_what_was_tried_is_pointed_out():
    tried = {"space": {"rate": (0.1, 0.3, 1.0), "steps": (5, 10), "head": ("all", "bias"), "low": (False, True)}}
    kind = type("Tried", (Planted,), tried)
    settings = {"rate": 1.0, "steps": 10, "head": "all", "low": True}
    assert tune_methods.at_an_end(kind, settings, {}) == ["rate", "steps"]
    assert tune_methods.at_an_end(kind, settings | {"rate": 0.3}, {"steps": [5, 10, 20]}) == []


def test_trials_of_searches_before_are_not_forgotten(run, tmp_path):
    run("planted", "--trials", 3)
    assert "earlier_trials" not in entries(tmp_path)["planted"]
    run("planted", "--trials", 2)
    run("planted", "--trials", 4)
    assert (entries(tmp_path)["planted"]["trials"], entries(tmp_path)["planted"]["earlier_trials"]) == (4, 5)


def test_finished_methods_are_skipped_until_something_changes_or_again(run, monkeypatch):
    run("planted", "--trials", 3)
    told = run("planted,flat", "--trials", 3)
    assert "planted: finished before, skipped" in told
    assert "| planted | 0.3000 |" in told, "the table shows it all the same"
    assert {type(method) for method, _ in Planted.trained} == {Flat}
    for changed in (("--again", "--trials", 3), ("--trials", 4)):
        run("planted", *changed)
        assert Planted.trained
    run("planted", "--trials", 4, "--cost-weight", 0.3, "--val-users", 2)
    assert not Planted.trained, "neither concerns this method"
    monkeypatch.setattr(Planted, "space", {"high": (0, 2)})
    run("planted", "--trials", 4)
    assert Planted.trained


def test_a_method_is_written_as_soon_as_it_is_finished(run, tmp_path):
    with pytest.raises(RuntimeError):
        run("planted,broken", "--trials", 2)
    assert list(entries(tmp_path)) == ["planted"]


def test_entries_of_other_environments_and_methods_are_kept(run, tmp_path):
    file, other = tmp_path / "methods.yml", {"settings": {"rates": (1, 2)}, "value": 0.5}
    write_tuned(file, "me/Other-v0", "lora", other)
    write_tuned(file, ENV, "lora", other)
    run("planted", "--trials", 2)
    run("planted", "--trials", 2, "--env-kwargs", "rank:4", f"data_root:{tmp_path}")
    found = read_tuned(file)
    assert found["me/Other-v0"] == {"lora": other}
    assert found[ENV]["lora"] == other
    assert set(found) == {"me/Other-v0", ENV, f"{ENV} rank:4"}
    text = file.read_text()
    assert text.startswith(HEADER)
    assert str(tmp_path) not in text


def test_settings_are_looked_up_with_the_arguments_then_without_then_defaults(tmp_path):
    file = tmp_path / "methods.yml"
    write_tuned(file, ENV, "planted", {"settings": {"high": 3}})
    write_tuned(file, env_key(ENV, {"rank": 4, "data": "/some/where/mine.csv"}), "planted", {"settings": {"high": 4}})
    assert settings_for(ENV, {}, "planted", file) == {"high": 3}
    assert settings_for(ENV, {"data": "/else/mine.csv", "rank": 4, "data_root": "/x"}, "planted", file) == {"high": 4}
    assert settings_for(ENV, {"rank": 5}, "planted", file) == {"high": 3}
    assert settings_for(ENV, {}, "flat", file) == settings_for("me/X-v0", {}, "planted", file) == {}
    assert entry_for(ENV, {}, "flat", file) is None


def test_a_stored_setting_that_the_method_has_no_longer_is_refused_with_the_command(tmp_path):
    write_tuned(tmp_path / "m.yml", ENV, "planted", {"settings": {"hihg": 3}})
    with pytest.raises(ValueError, match=r"Did you mean 'high'.*--methods planted --again"):
        settings_for(ENV, {}, "planted", tmp_path / "m.yml")


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "m.yml").write_text("[1, 2")
    with pytest.raises(ValueError, match=r"m\.yml is not a file of tuned methods"):
        read_tuned(tmp_path / "m.yml")


def test_the_packaged_entries_are_settings_that_their_methods_take():
    for env, methods in read_tuned(PACKAGED).items():
        assert set(methods) <= set(METHODS), env  # what has another name now would run with its defaults
        for name in methods:
            kwargs = dict(pair.split(":", 1) for pair in env.split()[1:])
            assert settings_for(env.split()[0], kwargs, name) == methods[name]["settings"]


def test_the_real_command_tunes_full_fine_tuning(tmp_path, capsys):
    small = MINIATURES[ENV] | {"pretrain_epochs": 6}
    more = ["--env-kwargs", *(f"{name}:{value}" for name, value in small.items()), "--val-users", "2"]
    tune_methods.main(["--env", ENV, "--methods", "full_finetune", "--trials", "2", "--out", str(tmp_path / "m.yml"), *more])
    (entry,) = read_tuned(tmp_path / "m.yml")[env_key(ENV, small)].values()
    assert entry["trials"] == 2
    assert 0 <= entry["default_value"] <= entry["value"] <= 1
    assert entry["seconds_per_user"] > 0
    told = capsys.readouterr().out
    assert "full_finetune: the first of 2 trials took" in told
    assert "on 2 val users" in told
    assert f"| full_finetune | {entry['default_value']:.4f} | {entry['value']:.4f} | 2 |" in told


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--methods", "full_finetun"], "Did you mean 'full_finetune'"),
        (["--methods", "base,all_on"], "nothing to tune: base, all_on have no space"),
        (["--env", "dsa/Planted-v0"], "no model"),
        (["--methods", "lora", "--space", "rnak:[1]"], "none of lora has such a hyperparameter. Did you mean 'rank'"),
        (["--methods", "lora", "--space", "rank:1"], "give a list of values"),
        (["--methods", "lora", "--space", "rank:[]"], "give a list of values"),
        (["--env", "dsa/DigitsResNt-v0"], "Did you mean 'dsa/DigitsResNet-v0'"),
    ],
)
def test_bad_input_is_refused_with_a_cure(more, reason):
    assert reason in refused("--env", ENV, *more)


@pytest.mark.parametrize("flag", ["--trials", "--val-users"])
def test_less_than_one_is_refused(flag, capsys):
    assert refused("--env", ENV, flag, 0) == "2"
    assert f"{flag}: must be a whole number from 1, got '0'" in capsys.readouterr().err


@pytest.mark.parametrize("weight", ["-3", "1.1", "nan"])
def test_a_cost_weight_that_is_no_price_is_refused(weight, capsys):
    assert refused("--env", ENV, "--cost-weight", weight) == "2"
    assert "--cost-weight must be between 0 and 1, got" in capsys.readouterr().err


def test_nothing_is_adopted_from_an_environment_without_a_name():
    assert "Known: dsa/" in refused("--env", ENV, "--adopt", "")


def test_without_optuna_the_cure_is_named(monkeypatch):
    monkeypatch.setattr(tune_methods, "find_spec", lambda name: None if name == "optuna" else find_spec(name))
    assert "pip install -e '.[tune]'" in refused("--env", ENV)
    assert "eval.tuning" in sys.modules


@pytest.mark.parametrize("space", [{"hihg": (1, 2)}, {"high": ()}, {"high": (1, 2, 1)}])
def test_a_space_that_makes_no_sense_is_refused(space):
    with pytest.raises(ValueError, match=r"space\['hi"):
        proposals.Proposals(space, {"high": 2}, 0)

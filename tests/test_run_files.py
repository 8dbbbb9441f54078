"""What a run keeps: files that nothing has to unpickle, and the policy that was best on val users."""

import json
import pickle

import numpy as np
import pytest
import torch

from agents import train_ppo
from agents.callbacks import BestOnVal
from agents.checkpoint import load_policy
from agents.evaluate import evaluate_run
from backbones.artefacts import ArtefactError
from envs.core import PathwaySelection
from envs.cost_weights import CostWeight
from envs.planted import planted
from envs.rules import Rules


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run's folder."""
    folder = tmp_path_factory.mktemp("runs") / "planted"
    train_ppo.main(f"--env dsa/Planted-v0 -n 512 --no-progress --num-threads 1 -f {folder}".split())
    return folder


def test_a_checkpoint_is_not_taken_for_a_policy(run):
    with pytest.raises(ArtefactError, match="not a gating policy"):
        load_policy(run / "checkpoint", planted())


def test_a_run_holds_no_file_that_would_be_unpickled(run):
    files = [path for path in run.rglob("*") if path.is_file()]
    others = [p.name for p in files if p.suffix not in {".json", ".safetensors", ".csv", ".md"}]
    assert len(others) == 1
    assert others[0].startswith("events.out.tfevents")
    for path in files:
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, KeyError, IndexError, AttributeError)):
            pickle.loads(path.read_bytes())


def test_evaluating_a_run_unpickles_nothing(run, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(np, "load", refuse)
    assert evaluate_run(run)["env"] == "dsa/Planted-v0"


def test_a_run_is_evaluated_to_the_same_summary_again(run, capsys):
    first, second = evaluate_run(run), evaluate_run(run)
    assert first["test"] == second["test"]
    assert "| ppo |" in capsys.readouterr().out


# The best policy on val users.


def judge(margin, best):
    """What keeps the best policy, by its reward of every val user."""
    core = PathwaySelection(planted(), "train", 0.1, 1, 1)
    found = BestOnVal(None, 0.0, core.scenario, core, Rules(), 1, None, {}, margin)
    found.best = best
    return found


def test_the_first_policy_is_kept_whatever_it_is_worth():
    for margin in (0.0, 1.0):
        assert judge(margin, None)._is_better(np.array([-1.0, -2.0]), 0.0)


def test_one_val_user_says_nothing_of_how_far_a_gain_is_chance():
    assert not judge(1.0, np.array([0.5]))._is_better(np.array([0.9]), 0.0)
    assert judge(0.0, np.array([0.5]))._is_better(np.array([0.9]), 0.0)


@pytest.mark.parametrize(("factor", "kept"), [(0.9, False), (0.999, False), (1.001, True)])
def test_a_margin_keeps_what_is_better_by_more_than_so_many_standard_errors_of_the_difference(factor, kept):
    best = np.array([0.1, 0.9, 0.4, 0.6])
    spread = np.array([-1.0, 1.0, -1.0, 1.0]) * 0.2
    for margin in (1.0, 2.0):
        gain = spread + factor * margin * 0.2 / 2  # the standard error of four such differences is a tenth
        assert judge(margin, best)._is_better(best + gain, 0.0) == kept
    assert judge(0.0, best)._is_better(best + spread + 0.001, 0.0)
    assert not judge(0.0, best)._is_better(best + spread - 0.001, 0.0)


def test_equally_good_is_not_better():
    rewards = np.array([0.3, 0.8])
    for margin in (0.0, 1.0):
        assert not judge(margin, rewards)._is_better(rewards.copy(), 0.0)


def test_the_margin_is_measured_on_the_same_users():
    best = np.linspace(0, 1, 50)  # users differ much more than policies do
    assert judge(1.0, best)._is_better(best + 0.01, 0.0)
    assert not judge(1.0, best)._is_better(best[::-1] + 0.01, 0.0)


def test_what_was_best_survives_a_checkpoint():
    first, second = judge(1.0, np.array([0.25, 0.1 + 0.2])), judge(1.0, None)
    first.next_at, first.averaged_at, first.best_distance, first.history = 7, 5, 0.1, [(0, 0.5), (4, 1 / 3)]
    first.core.cost_weight = CostWeight(0.3, 0.3)
    second.restore(json.loads(json.dumps(first.state())))
    assert np.array_equal(second.best, first.best)
    assert (second.next_at, second.averaged_at, second.best_distance, second.history) == (7, 5, 0.1, first.history)
    assert second.core.cost_weight == first.core.cost_weight
    assert second.state() == first.state()
    empty = judge(1.0, np.ones(2))
    empty.restore(judge(1.0, None).state())
    assert empty.best is None

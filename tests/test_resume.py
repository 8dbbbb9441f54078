"""Runs that end alike: with the same seed, overwritten, stopped or killed and gone on with, and after a warm start."""

import json
import os
import shutil
import signal
import time
from inspect import signature

import numpy as np
import pytest
import torch
from runs import QUIET, SHORT, TWO_ROUNDS, final, refused, resume, start, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents import evaluate, learning, train_ppo
from agents.callbacks import BestOnVal, Curves
from agents.checkpoint import load_policy
from agents.rivals import best_static
from agents.run import RunConfig
from backbones.artefacts import load_artefact


def assert_equal_ends(one, other):
    (tensors, meta), (others, theirs) = final(one), final(other)
    assert {*tensors} == {*others}
    different = [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])]
    assert different == []
    assert meta == theirs


def wait_for_timesteps(folder, least, process):
    """Until the checkpoint in a run's folder holds so many; False if the process ended before."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        path = folder / "checkpoint.json"
        if path.exists() and json.loads(path.read_text())["meta"]["num_timesteps"] >= least:
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.02)
    raise AssertionError("training did not get there in a minute")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Short runs to the end, by arguments."""
    made = {}

    def get(arguments):
        if tuple(arguments) not in made:
            made[tuple(arguments)] = tmp_path_factory.mktemp("runs") / "uninterrupted"
            train(made[tuple(arguments)], *arguments)
        return made[tuple(arguments)]

    return get


def test_the_same_seed_gives_the_same_run_and_another_seed_another(uninterrupted, tmp_path):
    folder = uninterrupted(SHORT)
    train(tmp_path / "again", *SHORT)
    assert_equal_ends(folder, tmp_path / "again")
    train(tmp_path / "other", *SHORT, "--seed", "1")
    name = "policy/value_net.weight"
    assert not torch.equal(final(folder)[0][name], final(tmp_path / "other")[0][name])


def test_overwriting_starts_anew(uninterrupted, tmp_path):
    fresh = uninterrupted(SHORT)
    folder = tmp_path / "run"
    train(folder, *SHORT, "--seed", "5")
    train(folder, *SHORT, "--overwrite")
    assert_equal_ends(fresh, folder)


# Stopping and going on.


def interrupt_at(monkeypatch, timesteps, how):
    """``how()`` when training has come so far, once."""
    step, asked = Curves._on_step, []

    def counted(self):
        if self.num_timesteps >= timesteps and not asked:
            asked.append(True)
            how()
        return step(self)

    monkeypatch.setattr(Curves, "_on_step", counted)


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def fall_over():
    raise KeyboardInterrupt


@pytest.mark.parametrize("arguments", [SHORT, TWO_ROUNDS], ids=["one round", "amid two rounds"])
@pytest.mark.parametrize("how", [press_ctrl_c, fall_over])
@pytest.mark.parametrize("at", [64, 700, 1200])
def test_a_run_that_was_stopped_goes_on_to_the_very_same_end(uninterrupted, tmp_path, monkeypatch, arguments, how, at):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, at, how)
        message = refused(*arguments, "-f", folder)
    assert f"--resume {folder}" in message
    assert not (folder / "summary.json").exists()
    assert final(folder)[1]["num_timesteps"] < 2048
    summary = resume(folder)
    assert_equal_ends(uninterrupted(arguments), folder)
    expected = json.loads((uninterrupted(arguments) / "summary.json").read_text())
    assert summary["test"] == expected["test"]


def test_ctrl_c_saves_what_was_learned_so_far(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it
    interrupt_at(monkeypatch, 600, press_ctrl_c)
    refused(*SHORT, "-f", tmp_path / "run")
    # The rollout under way is finished first; the last evaluation before was at step 0.
    assert final(tmp_path / "run")[1]["num_timesteps"] == 1024
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 600, lambda: (press_ctrl_c(), press_ctrl_c()))
    refused(*SHORT, "-f", tmp_path / "run")
    assert final(tmp_path / "run")[1]["num_timesteps"] == 0


def test_a_run_stopped_before_its_first_checkpoint_goes_on(uninterrupted, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RunConfig, "scenario", lambda *args: fall_over())
        refused(*SHORT, "-f", folder)
    resume(folder)
    assert_equal_ends(uninterrupted(SHORT), folder)


def test_a_run_stopped_twice_goes_on_to_the_very_same_end(uninterrupted, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 600, press_ctrl_c)
        refused(*SHORT, "-f", folder)
    assert final(folder)[1]["num_timesteps"] == 1024
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1100, press_ctrl_c)
        refused("--resume", folder)
    assert final(folder)[1]["num_timesteps"] == 1536
    resume(folder)
    assert_equal_ends(uninterrupted(SHORT), folder)


def test_settings_beside_resume_are_not_ignored_in_silence(uninterrupted, tmp_path, capsys):
    folder = shutil.copytree(uninterrupted(SHORT), tmp_path / "run")
    try:
        train_ppo.main(["--resume", str(folder), "-n", "4096", *QUIET])
    except SystemExit as refusal:
        assert "--resume" in str(refusal.code) + capsys.readouterr().err
    else:
        assert final(folder)[1]["num_timesteps"] == 4096


def test_ctrl_c_to_a_process_saves_and_says_how_to_go_on(tmp_path):
    folder = tmp_path / "run"
    process = start(folder, "--env", "dsa/Planted-v0", "-n", 10_000_000, "--eval-freq", 512, "-f", folder)
    assert wait_for_timesteps(folder, 512, process)
    process.send_signal(signal.SIGINT)
    out, told = process.communicate(timeout=60)
    assert process.returncode not in (0, -signal.SIGINT)
    assert f"--resume {folder}" in told
    assert "Traceback" not in out + told
    assert final(folder)[1]["num_timesteps"] >= 512


def kill_and_go_on(folder, kills, expected):
    """Kill a run at random moments, let it finish, and compare its end with an undisturbed one's."""
    rng = np.random.default_rng(0)
    arguments = [*LONG, "-f", folder]
    reached = 0
    for _ in range(kills):
        process = start(folder, *arguments)
        reached += wait_for_timesteps(folder, 1, process)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.communicate(timeout=60)
        arguments = ["--resume", folder]
    assert reached == kills
    resume(folder)
    assert_equal_ends(expected, folder)


LONG = ["--env", "dsa/Planted-v0", "-n", "6144", "--eval-freq", "512"]


def test_a_killed_run_goes_on_to_the_very_same_end(uninterrupted, tmp_path):
    kill_and_go_on(tmp_path / "run", 2, uninterrupted(LONG))


# Warm starts.


WARM = [*SHORT, "-P", "warm_start:true"]


def curves_of(folder):
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return lambda name: {e.step: e.value for e in events.Scalars(name)}


@pytest.fixture
def static(monkeypatch):
    """The mask that is taken for the best static one: on the planted problem that would be all off."""
    mask, asked = np.array([1, 0, 0, 1, 1, 0, 1, 0], dtype=bool), []

    def found(scenario, cost_weight, seed):
        asked.append((scenario.name, cost_weight, seed))
        return mask

    monkeypatch.setattr(learning, "best_static", found)
    yield mask.tolist()
    assert asked == [("planted", 0.2, 3)]


def first_gates(folder):
    curve = curves_of(folder)
    assert curve("val_users/distinct_masks")[0] == 1
    return [curve(f"gate_rate/pathway{p}")[0] for p in range(8)]


def test_a_warm_start_begins_with_the_best_static_mask_for_everybody(static, tmp_path):
    train(tmp_path / "run", *WARM, "--cost-weight", "0.2", "--seed", "3")
    assert first_gates(tmp_path / "run") == static
    assert max(curves_of(tmp_path / "run")("val_users/distinct_masks").values()) > 1  # and departs from it


def test_a_warm_start_is_what_it_says_beside_a_low_initial_logit(static, tmp_path):
    flags = ["-n", "512", "-P", "policy_kwargs:{initial_logit: -3.0}", "--cost-weight", "0.2", "--seed", "3"]
    train(tmp_path / "run", *WARM, *flags)
    assert first_gates(tmp_path / "run") == static


def test_the_best_static_mask_of_planted_users_is_what_a_warm_start_finds(uninterrupted):
    static = best_static(RunConfig.load(uninterrupted(WARM)).scenario(), 0.1, 0)
    assert first_gates(uninterrupted(WARM)) == static.tolist()


def test_the_policy_of_a_warm_start_loads_again(uninterrupted):
    folder = uninterrupted(WARM)
    config, scenario = RunConfig.load(folder), RunConfig.load(folder).scenario()
    policy, meta = load_policy(folder / "policy", scenario)
    static = best_static(scenario, 0.1, 0)
    assert [[logit > 0 for logit in row] for row in meta["policy_kwargs"]["start"]] == [static.tolist()]
    assert policy.mlp_extractor.departure.start.shape == (1, 8)
    assert config.warm_start and "start" not in config.policy_kwargs
    summary = json.loads((folder / "summary.json").read_text())
    evaluate.evaluate_run(folder)
    assert json.loads((folder / "summary.json").read_text())["test"] == summary["test"]


def test_the_policy_that_a_warm_start_kept_is_the_one_its_checkpoint_remembers(uninterrupted):
    folder = uninterrupted(WARM)
    rewards = curves_of(folder)("val_users/reward")
    _, meta = load_artefact(folder / "policy", "gating policy")
    assert meta["val_reward"] == pytest.approx(rewards[meta["at"]], abs=1e-6)
    best = final(folder)[1]["best"]
    assert np.mean(best) == pytest.approx(meta["val_reward"])


@pytest.mark.parametrize(("arguments", "margin"), [(WARM, 1.0), (SHORT, 0.0)], ids=["warm", "cold"])
def test_only_after_a_warm_start_a_policy_must_be_better_by_a_standard_error(tmp_path, monkeypatch, arguments, margin):
    def made(*args, **kwargs):
        raise ValueError(f"margin {signature(BestOnVal).bind(*args, **kwargs).arguments['margin']}")

    monkeypatch.setattr(learning, "BestOnVal", made)
    assert refused(*arguments, "-f", tmp_path / "run") == f"error: margin {margin}"


@pytest.mark.parametrize("at", [64, 1200])
def test_a_warm_start_that_was_stopped_goes_on_to_the_very_same_end(uninterrupted, tmp_path, monkeypatch, at):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, at, press_ctrl_c)
        refused(*WARM, "-f", folder)
    summary = resume(folder)
    assert_equal_ends(uninterrupted(WARM), folder)
    assert summary["test"] == json.loads((uninterrupted(WARM) / "summary.json").read_text())["test"]


def test_a_warm_start_needs_the_gating_policy(tmp_path):
    message = refused(*WARM, "-P", "policy:MultiInputPolicy", "-f", tmp_path / "run")
    assert "warm_start needs the policy GatingPolicy, not 'MultiInputPolicy'" in message
    assert not (tmp_path / "run").exists()

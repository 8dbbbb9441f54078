"""Training, killed at random moments: going on ends in the very bytes of a run that nobody disturbed.

Every run is a process of its own with a cache of its own, so that nothing but its folder and cache outlives a kill. The
processes are forked from one that has imported everything, which saves some seconds each.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from threading import RLock

import pytest
from tqdm import tqdm

from agents import train_ppo
from backbones.artefacts import exists, load_artefact

pytestmark = pytest.mark.stress
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["agents.train_ppo", "pytest"])

QUIET = ["--no-progress", "--num-threads", "1", "-P", "search:false"]
PLANTED = ["--env", "dsa/Planted-v0", "-n", "6144", "--eval-freq", "512"]
SIZES = {"train_users": 16, "val_users": 6, "test_users": 6, "pretrain_epochs": 1, "widths": "[8,16]"}
META = {"meta_steps": 400, "meta_users": 4}
"""Meta-training writes a checkpoint every 100 steps; co-training takes half as many."""
LEARNING = ["-n", "2048", "--eval-freq", "128", "-P", "n_envs:16", "-P", "batch_size:64", "-P", "warm_start:false"]
DIGITS = ["--env", "dsa/Personal-v0", *LEARNING, "-P", "average:0.0"]
DIGITS += [word for name, value in (SIZES | META).items() for word in ("--env-kwargs", f"{name}:{value}")]

PHASES = ("start", "policy of the turn", "between", "meta-training", "final policy", "end")


@dataclass(frozen=True)
class Case:
    """Arguments of a run, and the phases, in order, in which it is killed."""

    arguments: list[str]
    kills: list[str]


ONE_POLICY = ["start", *["final policy"] * 5, "end"]
AMID = ["-n", "1120", "--env-kwargs", "rounds:2", "-P", "n_steps:7", "-P", "batch_size:56"]
"""Rollouts of 7 steps end in the middle of episodes of 2."""
CASES = {
    "one cost weight": Case(PLANTED, ONE_POLICY),
    "amid two rounds of a model": Case([*DIGITS, *AMID], ONE_POLICY),
    "a range of cost weights": Case([*PLANTED, "--cost-weight", "uniform:0:0.3"], ONE_POLICY),
    "a target": Case([*PLANTED, "--target-active", "0.3"], ONE_POLICY),
    "co-training": Case(
        [*DIGITS, "--cost-weight", "uniform:0:0.3", "--cotrain", "1"],
        ["start", "start", *["policy of the turn"] * 2, "between", *["meta-training"] * 2, *["final policy"] * 2, "end"],
    ),
}


def trained(arguments, cache, log):
    """What a process does: the command line, with its own cache and its output in a file."""
    os.environ["DSA_CACHE"] = str(cache)
    tqdm.set_lock(RLock())  # instead of a semaphore, which would outlive the kill
    with log.open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    train_ppo.main([*arguments, *QUIET[:3]])


def started(folder, arguments):
    """The run in ``folder`` as a process: begun, or gone on with."""
    begun = ["--resume", str(folder)] if (folder / "config.json").exists() else [*arguments, *QUIET[3:], "-f", str(folder)]
    process = PROCESSES.Process(target=trained, args=(begun, folder.parent / "cache", folder.parent / "log"))
    process.start()
    return process


def finish(folder, arguments):
    process = started(folder, arguments)
    process.join(120)
    assert process.exitcode == 0, (folder.parent / "log").read_text()


def timesteps(checkpoint):
    return json.loads(checkpoint.read_text())["meta"]["num_timesteps"] if checkpoint.exists() else 0


def phase_of(folder):
    """How far the run in a folder has come."""
    if (folder / "checkpoint.json").exists():
        whole = json.loads((folder / "config.json").read_text())["total_timesteps"]
        return "end" if timesteps(folder / "checkpoint.json") >= whole else "final policy"
    turn = folder / "cotrain-1"
    if not exists(turn / "checkpoint") or exists(folder / "meta-1"):
        return "final policy" if exists(folder / "meta-1") else "start"
    if exists(turn / "meta-checkpoint"):
        return "meta-training"
    whole = json.loads((folder / "config.json").read_text())["total_timesteps"]
    return "between" if timesteps(turn / "checkpoint.json") >= whole / 2 else "policy of the turn"


def written(folder):
    """What of a run was committed, and when."""
    return {file: file.stat().st_mtime_ns for file in folder.parent.rglob("*.json")}


def killed(folder, arguments, phase, draw):
    """Kill a run a random while after it came to a phase, and did something on its way; whether it was killed there."""
    before, process = written(folder), started(folder, arguments)
    deadline = time.monotonic() + 120
    while process.is_alive() and (written(folder) == before or PHASES.index(phase_of(folder)) < PHASES.index(phase)):
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.1))
    process.kill()
    process.join(60)
    return process.exitcode == -signal.SIGKILL


def outcome(folder):
    """Names, which hold hashes of the content, and bytes of all tensors that a run ends with."""
    return {
        file.relative_to(folder): file.read_bytes()
        for name in ("policy", "checkpoint", "meta-1", "cotrain-1/policy", "cotrain-1/checkpoint")
        for file in [folder / f"{name}.json"]
        if file.exists()
        for file in [file, tensors_of(file)]
    }


def tensors_of(file):
    return file.with_name(f"{file.stem}-{json.loads(file.read_text())['tensors_sha256'][:12]}.safetensors")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_run_killed_in_every_phase_ends_in_the_bytes_of_one_that_was_not(case, tmp_path):
    whole, disturbed, draw = tmp_path / "whole" / "run", tmp_path / "disturbed" / "run", random.Random(0)
    for folder in (whole, disturbed):
        folder.parent.mkdir()
    finish(whole, case.arguments)
    phases = []
    for phase in case.kills:
        assert killed(disturbed, case.arguments, phase, draw), f"over before it came to {phase}: {phases}"
        phases.append(phase_of(disturbed))
    finish(disturbed, case.arguments)
    assert {*phases} >= {*case.kills}
    assert load_artefact(whole / "policy", "gating policy")[1]["at"] > 0  # it has learned
    assert outcome(disturbed) == outcome(whole)

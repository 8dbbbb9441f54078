"""Runs of the command line that trains: short ones, going on with one, one that is refused, one as a process."""

import json
import subprocess
import sys

import pytest

from agents import train_ppo
from backbones.artefacts import load_artefact

QUIET = ["--no-progress", "--num-threads", "1"]
SHORT = ["--env", "dsa/Planted-v0", "-n", "2048", "--eval-freq", "1024"]
TWO_ROUNDS = [*SHORT, "--env-kwargs", "rounds:2", "-P", "n_steps:7", "-P", "batch_size:64"]
"""Rollouts of 7 steps end in the middle of episodes of 2."""


def train(folder, *arguments):
    train_ppo.main([*arguments, "-f", str(folder), *QUIET])
    return json.loads((folder / "summary.json").read_text())


def resume(folder):
    train_ppo.main(["--resume", str(folder), *QUIET])
    return json.loads((folder / "summary.json").read_text())


def refused(*arguments):
    """The message with which the command line exits."""
    with pytest.raises(SystemExit) as exit_:
        train_ppo.main([*map(str, arguments), *QUIET])
    assert exit_.value.code not in (0, None)
    return str(exit_.value.code)


def final(folder):
    """Policy, optimiser and random states at the end."""
    return load_artefact(folder / "checkpoint", "training checkpoint")


def start(folder, *arguments):
    """The command line as a process of its own."""
    command = [sys.executable, "-m", "agents.train_ppo", *map(str, arguments), *QUIET]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder.parent)

"""The real command, killed and interrupted from outside: nothing is lost, nothing is left behind, no bit changes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import envs
from backbones.artefacts import exists

pytestmark = pytest.mark.stress
KILLS = 15
PAIRS = [f"{name}:{value}" for name, value in envs.MINIATURES["dsa/DigitsResNet-v0"].items()]
DIGITS = ["--env", "dsa/DigitsResNet-v0", "--env-kwargs", *PAIRS]
SLOW = """
import time
from dataclasses import replace
import envs
from envs.oracles import FormulaOracle
from envs.planted import planted
from envs.scenario import SCENARIOS

def slow():
    made = planted(users=64)
    def accuracy(users, masks):
        time.sleep(1)
        return made.oracle._accuracy(users, masks)
    return replace(made, oracle=FormulaOracle(made.oracle.costs, accuracy))

SCENARIOS.register("slow", "slow_plugin:slow")
envs.register("me/Slow-v0", entry_point="envs.planted:PlantedEnv", scenario="slow")
"""


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """An environment of a plug-in, 48 shards of a second each."""
    (tmp_path / "slow_plugin.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return ["--env", "slow_plugin:me/Slow-v0", "--out", str(tmp_path / "t"), "--processes", "2"]


def start(*arguments):
    """The command in a session of its own, as a terminal has it: Ctrl-C goes to all its processes."""
    line = [sys.executable, "-m", "envs.tabulate", *arguments]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finished(out):
    """Shards that are done."""
    return len([*out.with_name(f"{out.name}-unfinished").glob("*-*-*.json")])


def wait_until(condition, process=None, seconds=120):
    """Wait, at most until the process ends."""
    end = time.monotonic() + seconds
    while not condition() and (process is None or process.poll() is None):
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.01)


def running(session):
    """Processes of a session that are not over."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner = status.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):  # has just ended
            continue
        if int(owner) == session and state != "Z":
            found.append(int(status.parent.name))
    return found


def content(path):
    files = path.parent.glob(f"{path.name}*")
    return {file.name.removeprefix(path.name): file.read_bytes() for file in files if file.is_file()}


def end_of(process):
    told = process.communicate(timeout=600)[1]
    assert process.returncode == 0, told


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one go by one process writes."""
    path = tmp_path_factory.mktemp("whole") / "t"
    end_of(start(*DIGITS, "--out", path, "--processes", "1"))
    return content(path)


@pytest.mark.parametrize("processes", [1, 2])
def test_tables_killed_fifteen_times_are_those_of_one_go(whole, tmp_path, processes):
    draw, kills, out = random.Random(processes), 0, tmp_path / "t0"
    while kills < KILLS or not exists(out):
        if exists(out):
            assert content(out) == whole
            out = tmp_path / f"t{kills}"
        before, process = finished(out), start(*DIGITS, "--out", out, "--processes", str(processes))
        if kills >= KILLS:
            end_of(process)
            break
        if kills % 5:  # every fifth is killed while it starts
            wait_until(lambda out=out, before=before: finished(out) > before, process)
            time.sleep(draw.uniform(0, 0.1))
        else:
            time.sleep(draw.uniform(0, 6))
        process.kill()
        process.communicate(timeout=60)
        kills += process.returncode == -signal.SIGKILL
    assert content(out) == whole
    assert not [file for file in tmp_path.iterdir() if file.is_dir()]


def test_workers_end_when_their_parent_is_killed(slow, tmp_path):
    process = start(*slow)
    wait_until(lambda: finished(tmp_path / "t") >= 2, process)
    assert len(running(process.pid)) > 2
    process.kill()
    process.communicate(timeout=60)  # ends only when nobody holds the other end of its output
    wait_until(lambda: not running(process.pid), seconds=10)


def test_ctrl_c_ends_everything_cleanly_and_names_the_command_that_goes_on(slow, tmp_path):
    process = start(*slow)
    wait_until(lambda: finished(tmp_path / "t") >= 2, process)
    os.killpg(process.pid, signal.SIGINT)
    out, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"Go on with: python -m envs.tabulate {' '.join(slow)}" in told
    assert "Traceback" not in out + told
    wait_until(lambda: not running(process.pid), seconds=10)
    kept = finished(tmp_path / "t")
    process = start(*slow)
    wait_until(lambda: finished(tmp_path / "t") > kept, process)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)


def test_a_worker_that_is_killed_is_told_with_its_cure(slow, tmp_path):
    process = start(*slow)
    wait_until(lambda: finished(tmp_path / "t") >= 2, process)
    names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in running(process.pid)}
    worker = next(pid for pid, name in names.items() if b"spawn_main" in name)
    os.kill(worker, signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: a worker process was ended from outside" in told and "fewer --processes" in told
    assert "Traceback" not in told
    wait_until(lambda: not running(process.pid), seconds=10)

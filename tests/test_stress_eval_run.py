"""The harness, killed from outside: its workers go with it, and the same command goes on."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from envs import MINIATURES
from eval.parts import count_rows

pytestmark = pytest.mark.stress
ENV = "dsa/DigitsResNet-v0"
SEEDS, USERS = 4, 6


def command(out, seeds=SEEDS):
    small = [f"{name}:{value}" for name, value in MINIATURES[ENV].items()]
    more = ["--methods", "base,all_on,full_finetune", "--seeds", str(seeds), "--shown", "--no-timing", "--workers", "2"]
    return [sys.executable, "-m", "eval.run", "--env", ENV, "--env-kwargs", *small, *more, "--out", str(out)]


def children_of(process):
    """Pids of living processes that a process has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == process and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def wait_until(said, seconds=120):
    end = time.monotonic() + seconds
    while not said():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_workers_end_with_a_parent_that_is_killed_and_no_row_is_there_twice(tmp_path):
    out = tmp_path / "out"
    running = subprocess.Popen(command(out, seeds=1000), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: count_rows(out) > 3)
    workers = children_of(running.pid)
    assert len(workers) >= 2
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), seconds=20)
    before = count_rows(out)
    plan = (out / "plan.json").read_text()
    (out / "plan.json").write_text(plan.replace('"seeds": 1000', f'"seeds": {SEEDS}'))
    assert subprocess.run(command(out), capture_output=True, check=False).returncode == 0
    with (out / "results.csv").open(newline="") as file:
        rows = [(row["seed"], row["method"], row["user"]) for row in csv.DictReader(file) if int(row["seed"]) < SEEDS]
    assert len(rows) == len({*rows}) == SEEDS * 3 * USERS >= before > 3

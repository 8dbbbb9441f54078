"""The table and the picture of what it costs to trust nobody."""

import json

import numpy as np
import pytest

from eval import local_privacy
from eval.local_privacy import BEGIN, END, OPEN, draw, rewards, table


def run(ppo, masks=5, seed=0):
    users = np.linspace(0.2, 0.8, 30)
    names = [f"{seed}-{n}" for n in range(30)]
    return {"ppo": {"reward": users + ppo}, "best_static": {"reward": users}, "masks": masks, "users": names}


FOUND = {
    OPEN: [run(0.1), run(0.12, seed=1)],
    10.0: [run(0.06), run(0.08, 3, 1)],
    1.0: [run(0.0, 1), run(-0.02, 1, 1)],
}


def test_every_epsilon_is_held_against_no_noise_and_against_seeing_nothing():
    rows = table(FOUND).splitlines()[2:]
    assert rows[0] == "| observations as they are | 0.610 | - | +0.110 [+0.110, +0.110] | 5 5 |"
    assert rows[1] == "| 10 | 0.570 | -0.040 [-0.040, -0.040] | +0.070 [+0.070, +0.070] | 5 3 |"
    assert rows[2].startswith("| 1 | 0.490 | -0.120") and rows[2].endswith("| -0.010 [-0.010, -0.010] | 1 1 |")
    assert rows[3] == "| the best static mask | 0.500 | -0.110 [-0.110, -0.110] | - | 1 |"


def test_users_whom_all_seeds_share_count_once():
    assert [len(each) for each in rewards(FOUND, OPEN)] == [30, 30]
    shared = {OPEN: [run(0.1), run(0.2)]}
    (only,) = rewards(shared, OPEN)
    np.testing.assert_allclose(only, np.linspace(0.2, 0.8, 30) + 0.15)


def test_the_picture_is_drawn(tmp_path):
    draw(FOUND, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_the_command_trains_on_what_devices_send_and_writes_its_page(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    quick = [
        "-n",
        "256",
        "-P",
        "n_envs:32",
        "-P",
        "n_steps:4",
        "-P",
        "batch_size:64",
        "-P",
        "eval_freq:256",
        "--num-threads",
        "1",
    ]
    given = ["--epsilon", "3", "--seeds", "1", "--runs", str(tmp_path / "runs"), "--write", str(page), *quick, "--no-progress"]
    local_privacy.main([*given, "--figure", str(tmp_path / "curve.png")])
    assert "| 3 | 0." in page.read_text() and page.read_text().split(BEGIN)[1].split(END)[0].strip() in capsys.readouterr().out
    settings = json.loads((tmp_path / "runs" / "epsilon3-seed0" / "config.json").read_text())
    assert settings["env_kwargs"] == {"local_epsilon": 3}
    assert json.loads((tmp_path / "runs" / "epsiloninf-seed0" / "config.json").read_text())["env_kwargs"] == {}
    assert (tmp_path / "curve.png").exists()


@pytest.mark.parametrize("wrong", [["--seeds", "0"], ["--epsilon", "0"], ["--epsilon", "-1"]])
def test_what_cannot_be_measured_is_refused(wrong, tmp_path):
    with pytest.raises(SystemExit, match="at least one seed, and epsilons above 0"):
        local_privacy.main([*wrong, "--runs", str(tmp_path)])

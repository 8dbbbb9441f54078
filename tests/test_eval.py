"""The commands over several runs, on the planted problem."""

import csv
import json

import numpy as np
import pytest

from agents.train_ppo import main as train_ppo
from eval import gates, headline
from eval.pages import write_between_markers

FAST = ["-P", "n_envs:16", "-P", "batch_size:128", "-n", "512"]


@pytest.fixture(scope="module")
def page_and_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("headline")
    page = folder / "page.md"
    page.write_text(f"before\n{headline.BEGIN}\nold\n{headline.END}\nafter\n")
    flags = ["--env", "dsa/Planted-v0", "--seeds", "2", "--cost-weights", "0.1", "0.2", "--runs", str(folder / "runs")]
    headline.main([*flags, "--write", str(page), *FAST])
    return page, folder / "runs", flags


def test_the_table_replaces_what_stood_between_the_markers_and_nothing_else(page_and_runs):
    page = page_and_runs[0].read_text()
    assert page.startswith(f"before\n{headline.BEGIN}\n") and page.endswith(f"{headline.END}\nafter\n")
    assert "old" not in page and "| **ppo** |" in page and "| pooled |" in page


def test_the_table_names_the_command_that_made_it(page_and_runs):
    assert "python -m eval.headline --env dsa/Planted-v0 --seeds 2" in page_and_runs[0].read_text()


def test_every_reward_in_the_table_is_the_mean_over_seeds(page_and_runs):
    page, runs, _ = page_and_runs
    summaries = [json.loads((runs / f"seed{s}-cost0.1" / "summary.json").read_text()) for s in range(2)]
    for name in ("ppo", "best_static", "support_search"):
        rewards = [{**s["test"]["methods"], **s["test"]["equal_labels"]}[name]["reward"] for s in summaries]
        row = next(line for line in page.read_text().splitlines() if line.strip("| *").startswith(f"{name}"))
        assert f"{sum(rewards) / 2:.3f}" in row.split("|")[3]


SEEN = [([1.0, 2.0], ["x", "y"], ["ann", "bob"]), ([4.0], ["y"], ["bob"])]
"""By seed: rewards, groups and names."""


def test_real_people_count_once_with_the_mean_over_their_seeds(page_and_runs, monkeypatch):
    runs = [({"ppo": {"reward": np.array(values)}}, np.array(groups), names) for values, groups, names in SEEN]
    run, groups, people = headline.by_person(runs)
    assert (run["ppo"]["reward"].tolist(), groups.tolist(), people) == ([1.0, 3.0], ["x", "y"], ["ann", "bob"])

    folders = [page_and_runs[1] / f"seed{seed}-cost0.1" for seed in range(2)]
    said = json.loads((folders[0] / "summary.json").read_text())
    assert said["simulated"]
    plain = headline.report({0.1: folders}, "command")
    monkeypatch.setattr(headline.json, "loads", lambda text: {**json.JSONDecoder().decode(text), "simulated": False})
    once = headline.report({0.1: folders}, "command")
    assert "users within seeds" in plain and "real people, averaged over seeds" in once and "| **ppo** |" in once


def test_a_finished_run_is_not_repeated(page_and_runs, monkeypatch):
    monkeypatch.setattr(headline, "train_ppo", lambda arguments: pytest.fail("trained again"))
    headline.main([*page_and_runs[2], *FAST])


def test_runs_with_other_settings_are_refused(page_and_runs):
    with pytest.raises(ValueError, match="made with other settings"):
        headline.main([*page_and_runs[2], *FAST[:-1], "1024"])


def test_what_follows_a_marker_that_is_quoted_later_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"{headline.BEGIN}\nold\n{headline.END}\nends at {headline.END}, as said\n")
    write_between_markers(page, "table", headline.BEGIN, headline.END)
    assert page.read_text() == f"{headline.BEGIN}\ntable\n{headline.END}\nends at {headline.END}, as said\n"
    page.write_text(f"{headline.END}\n{headline.BEGIN}\n")
    with pytest.raises(ValueError, match="after it"):
        write_between_markers(page, "table", headline.BEGIN, headline.END)


def test_a_page_without_markers_is_left_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing here")
    with pytest.raises(ValueError, match="has no lines"):
        write_between_markers(page, "table", headline.BEGIN, headline.END)
    assert page.read_text() == "nothing here"


def test_gate_rates_are_shares_of_the_masks_in_the_csv(page_and_runs):
    folder = page_and_runs[1] / "seed0-cost0.1"
    rates = gates.gate_rates([folder], "group")
    with (folder / "users.csv").open() as file:
        masks = [[int(bit) for bit in row["ppo_mask"]] for row in csv.DictReader(file)]
    count, shares = rates["all"]
    assert count == len(masks) == 100
    assert shares.tolist() == pytest.approx([sum(column) / count for column in zip(*masks, strict=True)])


def test_the_picture_of_gates_is_drawn(page_and_runs, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    gates.main([str(page_and_runs[1] / "seed0-cost0.1"), "--by", "group", "--out", str(tmp_path / "gates.png")])
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")


def test_gates_of_a_run_without_results_say_what_to_do(tmp_path):
    train_ppo(["--env", "dsa/Planted-v0", "--log-dir", str(tmp_path / "run"), *FAST])
    (tmp_path / "run" / "users.csv").unlink()
    with pytest.raises(SystemExit, match=r"agents\.evaluate"):
        gates.main([str(tmp_path / "run")])

"""Accuracy on examples like and unlike the user's own."""

import numpy as np
import pytest
import torch
from harness import rows, run

from agents.bootstrap import units
from eval import unlike
from eval.plan import Place
from eval.replay import plan_of
from eval.rows import Measuring


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "few"
    run(out, "base,joint,all_on,feddpa")
    return out


def test_halves_are_the_likest_and_the_least_like_without_the_one_between():
    likest, least = unlike.halves(torch.tensor([0.3, 0.9, -0.5, 0.1, 0.7]))
    assert (likest.tolist(), least.tolist()) == ([1, 4], [3, 2])
    assert [half.tolist() for half in unlike.halves(torch.tensor([0.1, 0.2]))] == [[1], [0]]


def test_both_halves_together_are_the_accuracy_of_the_rows(folder):
    plan = plan_of(folder)
    measuring = Measuring(plan, Place(0), plan.scenario(Place(0)))
    likeness = unlike.likeness_of(measuring)
    assert likeness.shape == measuring.query.batch.labels.shape
    for name in plan.methods:
        found = unlike.accuracies(measuring, name, likeness)
        written = {row["user"]: float(row["accuracy"]) for row in rows(folder) if row["method"] == name}
        assert {user: both.mean() for user, both in found.items()} == pytest.approx(written)
        assert any(both[0] != both[1] for both in found.values())


def test_the_support_itself_is_liker_than_other_peoples(folder):
    plan = plan_of(folder)
    measuring = Measuring(plan, Place(0), plan.scenario(Place(0)))
    measuring.__dict__["query"] = measuring.support
    own = unlike.likeness_of(measuring).mean()
    measuring.__dict__["query"] = measuring.support.rows([1, 2, 3, 4, 5, 0])
    assert unlike.likeness_of(measuring).mean() < 0.8 * own < 1


def test_the_command_writes_a_line_per_method(folder, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- unlike digits: begin -->\n<!-- unlike digits: end -->\nafter\n")
    unlike.main([str(folder), "--methods", "joint,feddpa", "--write", str(page), "--section", "digits"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| `")] == ["`base`", "`joint`", "`feddpa`"]
    assert "\n".join(lines) in page.read_text() and page.read_text().endswith("after\n")
    assert (folder / "unlike.md").read_text().splitlines() == lines


def test_real_people_are_averaged_over_seeds_and_simulated_ones_are_not():
    first = {"a": np.array([0.5, 0.5]), "b": np.array([1.0, 0.0])}
    second = {"a": np.array([0.7, 0.1])}
    zero = [{user: np.zeros(2) for user in seed} for seed in (first, second)]
    (people,) = units([first, second], zero, simulated=False)
    assert people == pytest.approx(np.array([[0.6, 0.3], [1.0, 0.0]]))
    assert [len(part) for part in units([first, second], zero, simulated=True)] == [2, 1]


def test_a_folder_whose_rows_were_made_with_another_fit_is_refused(folder, tmp_path):
    for name in ("plan.json", "results.csv"):
        (tmp_path / name).write_text((folder / name).read_text())
    (known,) = {row["artefacts"] for row in rows(folder) if row["method"] == "joint"}
    (tmp_path / "results.csv").write_text((folder / "results.csv").read_text().replace(known, "0123456789abcdef"))
    with pytest.raises(SystemExit, match=r"rows of joint \(seed0\) were made with another model or fit \(0123456789abcdef,"):
        unlike.main([str(tmp_path), "--methods", "joint"])


@pytest.mark.parametrize(("methods", "reason"), [("lora", "has no 'lora', only base"), ("nonsense", "has no 'nonsense'")])
def test_a_method_that_the_folder_does_not_have_is_refused(folder, methods, reason):
    with pytest.raises(SystemExit, match=reason):
        unlike.main([str(folder), "--methods", methods])

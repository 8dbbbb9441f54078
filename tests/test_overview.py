"""The README's table of populations, out of results folders with planted differences."""

import json
from shutil import copytree

import pytest
from synthetic_results import SPECS, write_results

from eval import overview
from eval.report.__main__ import main as report


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two populations with reports; the second one lacks a method."""
    root = tmp_path_factory.mktemp("results")
    for name, left_out in (("readers", "random"), ("writers", "all_on")):
        (root / name).mkdir()
        write_results(root / name, {key: spec for key, spec in SPECS.items() if key != left_out})
        report([str(root / name)])
    return root


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{overview.BEGIN}\nstale\n{overview.END}\nafter\n")
    return path


def cells(text, line, column):
    """A cell by the first one of its line and the head of its column, from whichever table has both."""
    rows = [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in text.splitlines() if row.startswith("|")]
    starts = [place for place, row in enumerate(rows) if set(row) == {"---"}]
    for start, end in zip(starts, [*(place - 1 for place in starts[1:]), len(rows)], strict=True):
        found = {row[0]: dict(zip(rows[start - 1], row, strict=True)) for row in rows[start + 1 : end]}
        if column in found.get(line, {}):
            return found[line][column]
    raise AssertionError(f"no {line}, {column} in {text}")


def test_figures_are_those_of_the_folders_reports(folders, page):
    overview.main([str(folders / "readers"), str(folders / "writers"), "--write", str(page)])
    text = page.read_text()
    assert text.startswith(f"before\n{overview.BEGIN}\n") and text.endswith(f"{overview.END}\nafter\n") and "stale" not in text
    for name in ("readers", "writers"):
        methods = json.loads((folders / name / "summary.json").read_text())["methods"]
        assert cells(text, name, "best_static") == f"{methods['best_static']['means']['accuracy']:.3f}"
        assert cells(text, "cost", name) == f"{methods['ppo']['means']['cost']:.2f}"
    less = json.loads((folders / "readers" / "summary.json").read_text())["methods"]["full_finetune"]["against"]["ppo"][
        "accuracy"
    ]
    shown = cells(text, "accuracy, less full_finetune", "readers")
    assert shown.startswith(f"{-less['mean']:+.3f} [{-less['high']:+.3f}, {-less['low']:+.3f}]")
    assert less["verdict"] == "below" and shown.endswith(" above")  # the policy is planted to gain .08 more


def test_what_a_population_lacks_is_a_dash(folders, capsys):
    overview.main([str(folders / "writers")])
    told = capsys.readouterr().out
    assert cells(told, "writers", "all_on") == cells(told, "accuracy, less all_on", "writers") == "-"
    assert cells(told, "writers", "item_covariance") == "-"


def test_populations_that_no_folder_is_given_of_stay_as_they_are(folders, page):
    overview.main([str(folders / "readers"), str(folders / "writers"), "--write", str(page)])
    both = page.read_text()
    overview.main([str(folders / "writers"), "--write", str(page)])
    assert page.read_text() == both and "`python -m eval.overview results/readers results/writers --write" in both


def test_figures_are_replaced_and_tables_of_other_columns_refused(folders, page):
    overview.main([str(folders / "readers"), "--write", str(page)])
    whole = page.read_text()
    cost = cells(whole, "cost", "readers")
    page.write_text(whole.replace(f"| cost | {cost} |", "| cost | 9.99 |"))
    assert cells(page.read_text(), "cost", "readers") == "9.99"
    overview.main([str(folders / "readers"), "--write", str(page)])
    assert page.read_text() == whole
    for edited in (
        whole.replace("| seeds |", "| runs |"),
        whole.replace("| masks |", "| gates |"),
        whole.replace("| readers |", "| other |", 1),  # in one of two tables
        whole.replace("**What ppo takes and gains**", "").replace("\n| cost |", "\ncost |"),
        whole.replace("\n| ", "\n|"),
        whole.replace(f"| cost | {cost} |", f"| cost | {cost} | 1 |"),
        "\n".join(line for at in whole.splitlines() for line in [at] * (1 + at.startswith("| readers"))),
    ):
        page.write_text(edited)
        assert "were edited, or are of another version: empty what" in refused(folders / "writers", "--write", page)
        assert page.read_text() == edited


def test_the_command_is_named_without_the_machines_folders(folders, page):
    overview.main([str(folders / "readers"), "--write", str(page)])
    assert "`python -m eval.overview results/readers --write page.md`" in page.read_text()
    assert str(folders) not in page.read_text()


def refused(*arguments):
    with pytest.raises(SystemExit) as exit_:
        overview.main([*map(str, arguments)])
    assert str(exit_.value.code).startswith("error: ")
    return str(exit_.value.code)


def test_folders_that_cannot_be_shown_are_refused_by_name(folders, tmp_path):
    assert "no summary.json: make it with python -m eval.run" in refused(tmp_path / "nowhere")
    other = tmp_path / "readers"
    other.mkdir()
    assert "two folders have the same name" in refused(folders / "readers", folders / "readers")
    summary = json.loads((folders / "readers" / "summary.json").read_text())
    (other / "summary.json").write_text("{")
    assert "cut short or edited? python -m eval.report" in refused(other)
    (other / "summary.json").write_text(json.dumps({**summary, "format": -1}))
    assert "is of format -1" in refused(other)
    del summary["methods"]["ppo"]
    (other / "summary.json").write_text(json.dumps(summary))
    assert "was run without ppo" in refused(other)


def test_folders_whose_names_no_table_holds_are_refused(folders, tmp_path):
    path = tmp_path / "two  spaces"
    copytree(folders / "readers", path)
    assert "cannot write 'two  spaces': rename it" in refused(path)
    for name in ("population", "ppo", "a|b & <c>"):
        page, path = tmp_path / f"{len(name)}.md", tmp_path / name
        page.write_text(f"{overview.BEGIN}\n{overview.END}\n")
        copytree(folders / "readers", path)
        overview.main([str(path), "--write", str(page)])
        overview.main([str(folders / "writers"), "--write", str(page)])
        assert list(overview.figures_on(page)) == [name, "writers"]


def test_a_page_without_markers_is_left_alone(folders, tmp_path):
    path = tmp_path / "page.md"
    path.write_text("nothing\n")
    assert str(path) in refused(folders / "readers", "--write", path)
    assert path.read_text() == "nothing\n"

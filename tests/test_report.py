"""What readers get: the page, the Markdown, TensorBoard, and the figures."""

import csv
import html.parser
import json
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from synthetic_results import SPECS, Spec, write_results
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eval.report.__main__ import main as report
from eval.report.axes import apart, broken, even_ticks, logarithmic, ratio_ticks
from eval.report.contents import EXAMPLES
from eval.report.fronts import height
from eval.report.page import page, pictures, style
from eval.report.picture import COLOURS, Box, Mark, Path, Picture, Text
from eval.report.raster import to_pixels
from eval.report.sentences import markdown, sentences
from eval.report.tables import Line, Table, markdown_text, read_markdown, short
from eval.results import read_results
from eval.run_facts import ResultsError
from eval.summary import kind, summarise

EVIL = "<script>alert(1)</script>"
VOID = {"meta", "br", "link", "img", "hr", "input"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A results folder with a report; names and reasons come from someone hostile."""
    made = tmp_path_factory.mktemp("report")
    names = [EVIL, *(f"u{index}" for index in range(1, 25))]
    groups = ("clean", EVIL, "a|b")
    write_results(made, names=names, groups=groups, fewer=8, failing={("head", EVIL): f"{EVIL} & more"})
    report([str(made)])
    return made


@pytest.fixture(scope="module")
def summary(folder):
    return json.loads((folder / "summary.json").read_text())


class Checked(html.parser.HTMLParser):
    """Follows opened and closed elements."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.texts, self.attributes = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


# The page.


def test_the_page_is_well_formed_and_names_nobody_elses_files(folder):
    text = (folder / "report.html").read_text()
    parsed = Checked(text)
    assert parsed.open == [] and parsed.seen.count("figure") == 6 and parsed.seen.count("table") == 6
    assert not re.search(r"https?:|//\w|url\(|@import", text)
    assert not {"script", "link", "img", "iframe"} & set(parsed.seen)
    assert not [
        name for _, attributes in parsed.attributes for name in attributes if name.startswith("on") or name in ("src", "href")
    ]


def test_names_from_outside_are_text_and_never_tags(folder):
    parsed = Checked((folder / "report.html").read_text())
    shown = "".join(parsed.texts)
    assert "script" not in parsed.seen
    assert f"{EVIL} & more" in shown  # the reason of a failure, in full
    assert EVIL in shown.replace(f"{EVIL} & more", "")  # the user it failed for
    assert "<script" not in (folder / "results.md").read_text()
    assert "a|b" not in (folder / "results.md").read_text().replace("a\\|b", "")


def test_every_figure_has_a_title_a_text_and_labelled_axes(summary):
    drawn = pictures(summary)
    assert set(drawn) == {"fronts", "gains", "curve", "gates", "personalising", "predicting"}
    for name, picture in drawn.items():
        svg = picture.to_svg(name)
        assert f'aria-labelledby="{name}-title {name}-text"' in svg and f'<title id="{name}-title">' in svg
        assert len(picture.description) > 40
    said = {name: " ".join(item.text for item in one.items if isinstance(item, Text)) for name, one in drawn.items()}
    for name, axes in {
        "fronts": ("cost: the user's own parameters, share of all pathways on", "accuracy on query examples"),
        "gains": ("gain in accuracy",),
        "curve": ("labelled examples of the user (support first, then validation)", "gain in accuracy over base"),
        "gates": ("group of users", "share of users with the pathway on, %"),
        "personalising": ("seconds",),
        "predicting": ("milliseconds",),
    }.items():
        assert all(axis in said[name] for axis in axes)


def test_the_page_fits_a_phone_and_a_dark_room(folder):
    text = (folder / "report.html").read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    for value, unit in re.findall(r"(?<!max-)(?:min-)?width:\s*([\d.]+)(px|rem)", style()):
        assert float(value) * (16 if unit == "rem" else 1) <= 360
    parsed = Checked(text)
    assert not [tag for tag, attributes in parsed.attributes if "width" in attributes and tag not in ("rect", "polyline")]
    assert all("minmax(min(100%" in part for part in re.findall(r"grid-template-columns:[^;]+", style()))
    assert text.count("<table>") == text.count('<div class="scroll"') and "overflow-x:auto" in style()
    assert "prefers-color-scheme:dark" in style()


def luminance(colour):
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]


def _contrast(one, other):
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


@pytest.mark.parametrize("side", [0, 1])
def test_text_can_be_told_from_the_paper_in_both_lights(side):
    paper = luminance(COLOURS["paper"][side])
    assert _contrast(luminance(COLOURS["ink"][side]), luminance(COLOURS["heat"][side])) >= 4.5
    for name in set(COLOURS) - {"paper", "grid", "heat"}:
        assert _contrast(luminance(COLOURS[name][side]), paper) >= 4.5, name


def test_marks_stay_within_their_pictures(summary):
    for picture in pictures(summary).values():
        for item in picture.items:
            places = item.points if isinstance(item, Path) else [(item.x, item.y)]
            assert all(-1 <= x <= picture.width + 1 and -1 <= y <= picture.height + 1 for x, y in places), item


def test_the_point_of_a_method_stands_where_its_numbers_say(summary):
    marks = [item for item in pictures(summary)["fronts"].items if isinstance(item, Mark) and item.title]
    place = {mark.title.split(":")[0]: mark for mark in marks}
    means = {name: one["means"] for name, one in summary["methods"].items()}
    order = sorted(means, key=lambda name: means[name]["cost"])
    assert [place[name].x for name in order] == sorted(place[name].x for name in order)
    assert place["all_on"].y < place["ppo"].y < place["base"].y
    # dearer methods behind the break
    x = {name: place[name].x for name in ("base", "all_on", "full_finetune", "ppo")}
    assert x["all_on"] < 0.8 * x["full_finetune"]
    cost = means["ppo"]["cost"] / means["all_on"]["cost"]
    assert (x["ppo"] - x["base"]) / (x["all_on"] - x["base"]) == pytest.approx(cost, abs=1e-3)


def test_gate_rates_are_the_shares_of_the_masks(folder, summary):
    results = read_results(folder)
    mine = (
        (results["method"] == "ppo") & (results["cost_weight"] == 0.1) & (results["shown"] < 0) & (results["group"] == "clean")
    )
    masks = np.array([[int(bit) for bit in mask] for mask in results["mask"][mine]])
    found = summary["methods"]["ppo"]["gate_rates"]["clean"]
    assert found["rows"] == len(masks) and found["on"] == pytest.approx(masks.mean(0))
    boxes = [
        item for item in pictures(summary)["gates"].items if isinstance(item, Box) and item.title.startswith("clean, stem")
    ]
    assert boxes[0].opacity == pytest.approx(masks.mean(0)[0])


def test_gains_are_counted_and_those_below_zero_look_different(tmp_path):
    specs = {"base": SPECS["base"], "head": Spec(0.0, 0.2, noise=0.1), "ppo": SPECS["ppo"]}
    summary = summarise(read_results(write_results(tmp_path, specs, users=50, seeds=1, shown=())))
    head = summary["methods"]["head"]
    assert sum(head["gain_counts"]) == 50 and 0.0 in summary["gain_edges"]
    below = sum(count for count, edge in zip(head["gain_counts"], summary["gain_edges"][1:], strict=True) if edge <= 0)
    assert below == round(50 * head["gain"]["worse"]) > 10
    drawn = [item for item in pictures(summary)["gains"].items if isinstance(item, Box) and item.title.startswith("head")]
    assert sum(int(item.title.split()[1]) for item in drawn if item.colour == "worse") == below


# Tables and sentences.


def test_sentences_say_where_the_subject_wins_ties_and_loses(tmp_path):
    amortised = SPECS["ppo"].scope
    specs = {
        **{name: SPECS[name] for name in ("base", "best_static", "ppo")},
        "all_on": Spec(0.23, 1.0, always="1"),
        "gumbel": Spec(0.2, 0.5, amortised, trades=True),
        "greedy": Spec(0.24, 0.5, amortised, trades=True),
        "validation_search": Spec(0.24, 0.5, amortised, labels="all", trades=True),
    }
    said = sentences(summarise(read_results(write_results(tmp_path, specs, shown=()))))
    reward = next(line for line in said if line.startswith("Reward at cost weight 0.1, methods that choose pathways:"))
    assert re.search(
        r"`ppo` is above `best_static` \(\+0\.\d+\); shows no difference from `gumbel` .*; is below `greedy` \(-", reward
    )
    dense = next(line for line in said if line.startswith("Accuracy at whatever cost"))
    assert re.search(r"is above `base` \(\+.*; is below `all_on` \(-", dense)
    assert "validation_search" not in reward  # it sees more labels
    assert any("validation labels as well" in line and "is below `validation_search`" in line for line in said)
    assert any(
        line.startswith("The best method without masks at equal labels is `all_on`: `ppo` less it is -0.0") for line in said
    )


@pytest.mark.parametrize("name", ["head", "ppo"])
def test_a_method_that_differs_from_base_without_examples_is_called_a_defect(summary, name):
    assert not any("defect" in line for line in sentences(summary))
    summary = json.loads(json.dumps(summary))
    summary["methods"][name]["curve"]["0"]["high"] = 0.01
    assert any(f"a defect: `{name}`." in line for line in sentences(summary))


def test_what_is_the_same_for_all_may_differ_from_base_without_examples(summary):
    summary = json.loads(json.dumps(summary))
    summary["methods"]["joint"]["curve"] = {"0": {"mean": 0.1, "low": 0.1, "high": 0.1}}
    assert not any("defect" in line for line in sentences(summary))


def table_cells(summary, title):
    """Cells by the first of a line, of the table under a title."""
    lines = markdown(summary).split(f"**{title}")[1].split("\n**")[0].splitlines()
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_masks_are_counted_within_a_seed_and_a_fold(tmp_path):
    """A mask per population that differs between folds is one mask in each."""
    write_results(tmp_path, simulated=False, folds=2)
    path = tmp_path / "results.csv"
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    for row in table:
        if row["method"] == "best_static":
            row["mask"] = "".join("01"[place == int(row["fold"])] for place in range(len(row["mask"])))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    methods = summarise(read_results(tmp_path))["methods"]
    assert methods["best_static"]["distinct_masks"] == 1 < methods["ppo"]["distinct_masks"]


@pytest.mark.parametrize(
    ("masks", "said"), [(("10000", "10000"), "one mask for all."), (("10000", "01000"), "1.5 different masks.")]
)
def test_one_mask_for_all_is_said_where_no_seed_has_two(tmp_path, masks, said):
    specs = {name: replace(SPECS[name], always="") for name in ("base", "ppo")}
    write_results(tmp_path, specs, seeds=2, shown=(), users=6)
    text = (tmp_path / "results.csv").read_text().splitlines()
    rows = list(csv.DictReader(text))
    for row in rows:
        row["mask"] = masks[row["seed"] == "1" and row["user"] == "u000"] if row["method"] == "ppo" else ""
    with (tmp_path / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert f"It uses {said}" in markdown(summarise(read_results(tmp_path)))


def test_a_method_of_few_users_stands_where_its_difference_from_the_subject_puts_it(tmp_path):
    write_results(tmp_path, fewer=8)
    summary = summarise(read_results(tmp_path))
    slow, mine = (summary["methods"][name] for name in ("full_finetune", "ppo"))
    assert height("ppo", summary) == mine["means"]["accuracy"]
    due = mine["means"]["accuracy"] + slow["against"]["ppo"]["accuracy"]["mean"]
    assert height("full_finetune", summary) == due != slow["means"]["accuracy"]
    titles = [item.title for item in pictures(summary)["fronts"].items if isinstance(item, Mark) and item.title]
    assert any(f"accuracy {due:.3f}, by its difference from ppo on fewer users" in title for title in titles)


@pytest.fixture
def dropping(tmp_path):
    """Users u000 to u003 alone have five examples; full_finetune has a curve of its own, and eight users of one seed."""
    write_results(tmp_path, few_shown=(2, 5), fewer=8)
    path = tmp_path / "results.csv"
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    shown, user = (rows[0].index(name) for name in ("shown", "user"))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(row for row in rows if row[shown] != "5" or row[user] <= "u003")
    return summarise(read_results(tmp_path))


def test_the_curve_has_the_sizes_of_all_methods_and_says_of_how_many_users_they_are(dropping):
    assert dropping["shown"] == [0, 1, 2, 5]
    cells = table_cells(dropping, "Gain by number of labelled examples of the user (support first, then validation)")
    assert cells["method"] == ["0", "1", "2", "5", "the support (20 in the mean)"]
    assert cells["users"] == ["80", "80", "8", "4 - 8", "8 - 80"]
    slow = cells["full_finetune (8 users, 1 seed)"]
    assert slow[:2] == ["-", "-"] and slow[2] != "-" and slow[3] != "-"
    text = markdown(dropping)
    assert "Users with fewer examples drop out" in text and "methods that see validation labels as well have all" in text


def test_the_points_of_the_curve_say_of_how_many_users_they_are(dropping):
    titles = [item.title for item in pictures(dropping)["curve"].items if isinstance(item, Mark) and item.title]
    assert any(title.startswith("ppo, 5 examples, 8 users: +") for title in titles)
    assert any(title.startswith("full_finetune, 5 examples, 4 users: +") for title in titles)
    assert "drop out" in page(dropping).split("<h3>Gain by number")[1].split("</figure>")[0]


def test_the_axis_of_the_curve_fits_its_picture(dropping):
    picture = pictures(dropping)["curve"]
    titles = [item for item in picture.items if isinstance(item, Text) and item.text in EXAMPLES]
    assert len(titles) == 2 and all(title.x >= title.width / 2 and title.y + 5 < picture.height for title in titles)


def test_the_intervals_of_the_curve_stay_above_its_axis(summary):
    summary = json.loads(json.dumps(summary))
    summary["methods"]["ppo"]["curve"]["1"]["low"] = -0.3
    picture = pictures(summary)["curve"]
    axis = next(item.y for item in picture.items if isinstance(item, Text) and item.text == EXAMPLES[0])
    assert max(y for item in picture.items if isinstance(item, Path) for _, y in item.points) < axis - 30


def test_what_trains_the_whole_model_is_told_from_what_trains_a_user():
    assert kind("cotrained_all_on", "user") == kind("all_on", "user") == "meta-learned dense"
    assert kind("cotrained", "mask per user, amortised") == "masks" and kind("head", "user") == "per user"


def test_seconds_are_called_medians_with_quartiles(folder, summary):
    texts = ((folder / "report.html").read_text(), (folder / "results.md").read_text())
    assert all("edian (quartiles)" in text and "least - most" not in text and "least to most" not in text for text in texts)
    titles = [item.title for item in pictures(summary)["personalising"].items if isinstance(item, Box)]
    assert "head: median (quartiles) 0.011 (0.0088 - 0.0165) s" in titles


def test_what_was_timed_later_is_named_with_the_speed_of_the_anchor(summary):
    assert "Timed later" not in markdown(summary)
    summary = json.loads(json.dumps(summary))
    base = json.loads(json.dumps(summary["timing"]["methods"]["base"]))
    base["inference_ms"]["one user, 1 example"]["median"] *= 1.25
    summary["timing"]["later"] = [{"methods": ["head", "ppo"], "base": base}]
    assert "Timed later: head, ppo; in the same turns base took 1.25 times as long as before" in markdown(summary)


def test_markdown_names_the_command_and_every_method(folder, summary):
    text = (folder / "results.md").read_text()
    assert summary["command"] in text
    for seconds, words in ((20, "in 1 minute"), (3600, "in 60 minutes"), (9000, "in 2.5 hours")):
        assert f"{words} of one core." in markdown({**summary, "seconds": seconds})
    main = text.split("**Every method**")[1].split("**Methods that choose")[0]
    for name, method in summary["methods"].items():
        row = next(line for line in main.splitlines() if re.match(rf"\| \*?\*?{name}[ *]", line))
        assert f"{method['means']['accuracy']:.3f}" in row
    assert "full_finetune (8 users, 1 seed)" in main
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_methods_without_a_trade_off_have_a_dash_for_hypervolume(summary):
    table = markdown(summary).split("**Methods that choose pathways**")[1].split("**Gain")[0]
    cells = {line.split("|")[1].strip(" *"): line.split("|") for line in table.splitlines() if line.startswith("| ")}
    column = [cell.strip() for cell in cells["method"]].index("hypervolume")
    assert cells["all_on"][column].strip() == "-" and float(cells["ppo"][column]) > float(cells["random"][column]) > 0


def test_a_run_without_ppo_or_base_or_timing_still_gives_a_report(tmp_path):
    specs = {name: SPECS[name] for name in ("head", "best_static")}
    failing = {("head", "u000"): "singular matrix"}
    summary = summarise(read_results(write_results(tmp_path, specs, shown=(), timing=False, failing=failing)))
    assert summary["subject"] is None and "`ppo` was not run" in markdown(summary)
    assert "Failed for some users: `head`" in markdown(summary)
    assert set(pictures(summary)) == {"fronts"}
    assert "None" not in markdown(summary)
    Checked(page(summary))
    json.dumps(summary, allow_nan=False)


def test_a_run_in_which_a_method_always_failed_names_it(tmp_path):
    names = ["a", "b"]
    write_results(tmp_path, names=names, failing={("head", name): "singular matrix" for name in names})
    summary = summarise(read_results(tmp_path))
    text = markdown(summary)
    write_results(tmp_path / "ppo", names=names, failing={("ppo", name): "no" for name in names})
    assert "`ppo` failed for everybody" in markdown(summarise(read_results(tmp_path / "ppo")))
    assert "Without any result: `head`." in text and "| head | singular matrix | 16 | a, b |" in text
    Checked(page(summary))


def test_without_any_row_there_is_no_report(tmp_path):
    specs = {"head": SPECS["head"]}
    write_results(tmp_path, specs, names=["a"], failing={("head", "a"): "no"})
    with pytest.raises(ResultsError, match="no rows of methods that ran"):
        summarise(read_results(tmp_path))


def test_tables_escape_what_would_end_a_cell_or_make_a_link():
    text = Table("t", ["a", "b"], [Line(["x|y", "[z](javascript:1)"]), Line(["group"])]).to_markdown()
    assert "x\\|y" in text and "](" not in text and "| **group** |  |" in text
    assert markdown_text("a\nb<i>") == "a b&lt;i>"


def test_tables_are_read_as_they_were_written():
    first = Table("t", ["a", "b"], [Line(["x|y & z", "[z](javascript:1)"]), Line(["1 <b>", "&lt;"])], note="| no table")
    second = Table("u", ["c", "d"], [Line(["-", "1"])])
    read = read_markdown(f"before\n{first.to_markdown()}\n\nbetween\n\n{second.to_markdown()}\nafter")
    assert read == [[["a", "b"], ["x|y & z", "[z](javascript:1)"], ["1 <b>", "&lt;"]], [["c", "d"], ["-", "1"]]]


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (999.6, "1 k"), (1234, "1.23 k"), (4e7, "40 M"), (None, "-")])
def test_short_numbers(value, text):
    assert short(value) == text


# The command, and TensorBoard.


def test_the_command_writes_between_the_markers_of_a_section(folder, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- results digits: begin -->\nold\n<!-- results digits: end -->\nb\n")
    report([str(folder), "--write", str(page), "--section", "digits"])
    text = page.read_text()
    assert text.startswith("a\n<!-- results digits: begin -->\n`dsa/Made-up-v0`") and text.endswith(
        "<!-- results digits: end -->\nb\n"
    )
    with pytest.raises(SystemExit, match="has no lines <!-- results other: begin -->"):
        report([str(folder), "--write", str(page), "--section", "other"])
    assert page.read_text() == text


def test_what_is_no_results_folder_gives_an_error_and_no_traceback(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .* is not a results folder"):
        report([str(tmp_path)])


def test_the_report_is_the_same_when_made_again(folder):
    before = [(folder / name).read_bytes() for name in ("summary.json", "report.html", "results.md")]
    report([str(folder)])
    assert before == [(folder / name).read_bytes() for name in ("summary.json", "report.html", "results.md")]


def test_tensorboard_gets_scalars_tables_and_figures_once(folder, summary):
    report([str(folder)])
    assert len(list((folder / "tensorboard").glob("events.*"))) == 1
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    (point,) = events.Scalars("test/accuracy/ppo")
    assert point.value == pytest.approx(summary["methods"]["ppo"]["means"]["accuracy"])
    assert {"test/gain/head", "test/ece/base", "test/gain_worse/ppo"} <= set(events.Tags()["scalars"])
    assert "figures/fronts" in events.Tags()["images"] and len(events.Tags()["images"]) == 6
    assert any("Every method" in tag for tag in events.Tags()["tensors"])


# Drawing.


def test_shapes_are_the_same_place_in_vectors_and_pixels():
    picture = Picture("t", "d", 40, 20)
    picture.add(Box(10, 5, 10, 10, "subject"), Mark(30, 10, "circle", "masks", 4), Path([(0, 2), (40, 2)], "ink", 4))
    pixels = to_pixels(picture, 2)
    assert pixels.shape == (40, 80, 3)
    assert pixels[20, 30].tolist() == [0xC4, 0x4E, 0x00] and pixels[20, 60].tolist() == [0x00, 0x68, 0xA8]
    assert pixels[4, 40].tolist() == [0x1B, 0x1F, 0x24] and pixels[20, 50].tolist() == [255, 255, 255]
    assert '<rect x="10.0" y="5.0" width="10.0" height="10.0" style="fill:var(--subject)"' in picture.to_svg("n")


def test_text_in_pictures_is_escaped():
    picture = Picture(EVIL, EVIL, 10, 10, [Text(0, 0, EVIL), Mark(1, 1, "square", "ink", 2, EVIL)])
    assert "<script" not in picture.to_svg("n") and picture.to_svg("n").count("&lt;script&gt;") == 4


def test_ticks_are_round_and_within():
    assert even_ticks(0.43, 0.67) == [0.45, 0.5, 0.55, 0.6, 0.65]
    assert ratio_ticks(0.8, 30) == [1, 2, 5, 10, 20]
    assert ratio_ticks(0.001, 100) == [0.001, 0.01, 0.1, 1, 10, 100]
    assert even_ticks(1, 1) == [1]


def test_scales():
    scale = broken(1, 100, 0, 60, 94)
    assert (scale(0), scale(0.5), scale(1), scale(10), scale(100)) == pytest.approx((0, 30, 60, 84, 94))
    assert logarithmic(1, 100, 0, 10)(0.01) == 0


def test_labels_keep_apart_and_in_order():
    places = apart([5, 5.5, 100, 6], 10, 0, 100)
    assert places[0] < places[1] < places[3] < places[2] <= 100
    assert all(after - before >= 10 - 1e-9 for before, after in pairwise(sorted(places)))

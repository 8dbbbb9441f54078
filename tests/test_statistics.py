"""Pairing, tests and corrections against numbers worked by hand and differences that were planted."""

import csv
import json

import numpy as np
import pytest
from scipy.stats import t as student
from synthetic_results import SPECS, Spec, write_results

from agents.bootstrap import Interval, resampled_means
from eval import compare
from eval.panel import Panel
from eval.pareto import interpolated
from eval.results import COLUMNS, format_row, read_results
from eval.run_facts import ResultsError
from eval.statistics import (
    NO_DIFFERENCE,
    Difference,
    bootstrap_p,
    calibration_error,
    corrected,
    difference,
    holm,
    sign_flip,
    spread,
)
from eval.summary import beside_masks, summarise
from eval.tradeoff import at_equal_cost, points, volume, volume_lead

PAIR = {"base": SPECS["base"], "ppo": SPECS["ppo"], "head": SPECS["head"], "full_finetune": SPECS["full_finetune"]}


def panel(folder, *args, **kwargs):
    return Panel(read_results(write_results(folder, *args, **kwargs)))


def changed(folder, change):
    """Rewrite every row of ``results.csv`` by a function of its cells that returns other cells."""
    with (folder / "results.csv").open(newline="") as file:
        rows = [change(dict(row)) for row in csv.DictReader(file)]
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(format_row({name: row[name] for name in COLUMNS[:-1]}) for row in rows)
    return Panel(read_results(folder))


# Tests and their correction.


def test_holm_against_numbers_worked_by_hand():
    # sorted .01 .02 .03 .04: 4*.01, 3*.02, 2*.03 (not below .06), 1*.04 (not below .06)
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([0.03]) == [0.03] and holm([]) == []


def test_sign_flips_of_few_users_are_all_their_signs():
    # of the 8 ways to sign 1, 2, 3, two have a sum of 6 in size
    assert sign_flip([np.array([1.0, 2.0, 3.0])], flips=40000) == pytest.approx(0.25, abs=0.01)
    assert sign_flip([np.array([1.0, -1.0])]) == 1.0
    assert sign_flip([np.zeros(5)]) == 1.0


def test_sign_flips_reject_a_true_null_as_often_as_they_should():
    rng = np.random.default_rng(0)
    p = [sign_flip([rng.normal(size=15), rng.normal(size=10)], flips=400) for _ in range(400)]
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.08


def test_differences_of_many_users_survive_any_number_of_comparisons():
    each = [np.full(60, 0.1), np.full(40, 0.2)]
    least = 2 * 2.0**-100  # of all signs only the observed ones and their opposites are as far from zero
    assert least < sign_flip(each) < 1e-12
    assert holm([sign_flip(each)] * 10_000)[0] < 0.05
    assert sign_flip([np.full(6, 0.1)]) == pytest.approx(2 * 2.0**-6, abs=0.005)


@pytest.mark.parametrize("sizes", [(6,), (12,), (4, 6)])
def test_the_bootstrap_rejects_a_true_null_of_few_users_no_more_often_than_it_should(sizes):
    rng = np.random.default_rng(1)
    p = []
    for _ in range(600):
        each = [rng.normal(size=(size, 1)) for size in sizes]
        p.append(bootstrap_p(resampled_means(each, 2000)[:, 0], each))
    assert 0.01 < np.mean(np.array(p) < 0.05) < 0.07


def test_one_user_shows_nothing_however_often_resampled(tmp_path):
    assert bootstrap_p(np.ones(10_000), [np.ones((1, 2))]) == 1.0
    made = panel(tmp_path, SPECS, users=1, seeds=1, shown=())
    assert at_equal_cost(made, "ppo", "gradient_norm").p == volume_lead(made, "ppo", "gradient_norm").p == 1.0


def test_ten_users_who_all_gain_show_it_among_many_rivals():
    each = [np.random.default_rng(0).normal(0.1, 0.02, (10, 1))]
    p = bootstrap_p(resampled_means(each, 10_000)[:, 0], each)
    assert p == 2.0**-9 and holm([p] * 20)[0] < 0.05  # that of a flip of all ten signs
    each = [np.random.default_rng(0).normal(0.1, 0.1, (40, 1))]
    t = each[0].mean() / (each[0].std(ddof=1) / 40**0.5)
    assert bootstrap_p(resampled_means(each, 10_000)[:, 0], each) == pytest.approx(2 * student.sf(t, 39), rel=0.9)


def test_verdicts_are_about_corrected_p_values():
    family = {i: Difference(Interval(0.1, 0.01, 0.2), p, 9, 1) for i, p in enumerate((0.02, 0.03, 0.001))}
    family[9] = Difference(Interval(-0.1, -0.2, -0.01), 0.0001, 9, 1)
    assert [corrected(family)[key].verdict for key in (0, 1, 2, 9)] == ["above", "above", "above", "below"]
    family |= {i: Difference(Interval(0.0, -0.1, 0.1), 0.9, 9, 1) for i in range(10, 20)}
    assert [corrected(family)[key].verdict for key in (0, 1, 2, 9)] == [NO_DIFFERENCE, NO_DIFFERENCE, "above", "below"]
    assert corrected({"absent": None}) == {}


def test_of_many_null_methods_none_differs_and_a_planted_one_does(tmp_path):
    null = {f"null{i}": Spec(0.1, 0.2) for i in range(20)}
    made = panel(tmp_path, {"base": SPECS["base"], "head": Spec(0.1, 0.2), **null, "better": Spec(0.13, 0.2)}, shown=())
    family = {name: difference(made, made.rows(name), made.rows("head"), "accuracy") for name in [*null, "better"]}
    assert sum(one.p < 0.05 for one in family.values()) > 1  # one by one some null looks like something
    verdicts = {name: one.verdict for name, one in corrected(family).items()}
    assert verdicts.pop("better") == "above" and set(verdicts.values()) == {NO_DIFFERENCE}


# Who is compared with whom.


def test_methods_on_fewer_users_and_seeds_are_compared_on_those(tmp_path):
    made = panel(tmp_path, PAIR, users=20, seeds=3, fewer=7)
    one, other = made.align(made.rows("ppo"), made.rows("full_finetune"))
    assert len(one) == 7 and made.counts(one) == (7, 1)
    assert set(made.results["seed"][one.at]) == {0}
    assert list(made.results["user"][one.at]) == list(made.results["user"][other.at])
    found = difference(made, made.rows("ppo"), made.rows("full_finetune"), "accuracy")
    by_hand = made.results["accuracy"][one.at].mean() - made.results["accuracy"][other.at].mean()
    assert found.interval.mean == pytest.approx(by_hand) and (found.users, found.seeds) == (7, 1)


def test_failed_users_leave_the_pair_but_nobody_else(tmp_path):
    made = panel(tmp_path, PAIR, users=10, seeds=2, failing={("head", "u004"): "no"})
    assert made.counts(made.rows("head")) == (18, 2) and made.counts(made.rows("ppo")) == (20, 2)
    assert difference(made, made.rows("ppo"), made.rows("head"), "cost").users == 18
    nothing = made.rows("not a method")
    assert difference(made, made.rows("ppo"), nothing, "accuracy") is None and made.mean(nothing, "accuracy") is None


def test_real_people_are_averaged_over_seeds_simulated_ones_are_not(tmp_path):
    real = panel(tmp_path / "real", PAIR, users=10, seeds=4, simulated=False, folds=2)
    drawn = panel(tmp_path / "drawn", PAIR, users=10, seeds=4)
    for made, sizes in ((real, [10]), (drawn, [10] * 4)):
        rows = made.rows("ppo")
        assert [len(each) for each in made.units(rows, made.values(rows, "accuracy"))] == sizes
    rows = real.rows("head")
    each = real.units(rows, real.values(rows, "accuracy"))[0]
    mine = real.results["accuracy"][
        (real.results["method"] == "head") & (real.results["user"] == "u003") & (real.results["shown"] < 0)
    ]
    assert len(mine) == 4 and each[3] == pytest.approx(mine.mean())
    assert real.counts(rows) == (10, 4)


def test_a_user_in_two_folds_is_refused(tmp_path):
    write_results(tmp_path, PAIR, users=4, seeds=1, folds=2, shown=())
    with pytest.raises(ResultsError, match="user u000 was measured twice by base in seed 0"):
        changed(tmp_path, lambda row: row | {"user": "u000"} if row["user"] == "u001" else row)


def test_rewards_follow_the_cost_weight_that_is_asked_for(tmp_path):
    made = panel(tmp_path, PAIR, users=5)
    rows = made.rows("ppo", 0.3)
    np.testing.assert_allclose(made.values(rows, "reward", 0.3), made.results["reward"][rows.at])
    head = made.rows("head", 0.3)
    np.testing.assert_allclose(
        made.values(head, "reward", 0.3), made.results["accuracy"][head.at] - 0.3 * made.results["cost"][head.at]
    )


# Measures.


def test_the_bottom_decile_and_the_share_made_worse_by_hand(tmp_path):
    write_results(tmp_path, PAIR, users=20, seeds=1, shown=())
    gains = dict(zip([f"u{i:03d}" for i in range(20)], [-0.3, -0.1, *[0.2] * 18], strict=True))
    accuracy = {"base": lambda user: 0.5, "head": lambda user: 0.5 + gains[user]}
    made = changed(tmp_path, lambda row: row | {"accuracy": accuracy.get(row["method"], lambda user: 0.4)(row["user"])})
    found = spread(made, made.rows("head"), made.rows("base"))
    assert found.bottom_decile == pytest.approx(-0.2) and found.worse == pytest.approx(0.1)
    assert sorted(found.gains)[:2] == pytest.approx([-0.3, -0.1])


def test_calibration_error_is_of_examples_pooled_over_users(tmp_path):
    write_results(tmp_path, PAIR, users=2, seeds=1, shown=())
    empty = ["0:0.0:0"] * 8
    cells = {"u000": ["10:6.5:9", "0:0.0:0", *empty], "u001": ["10:6.5:4", "20:15.0:5", *empty]}
    made = changed(tmp_path, lambda row: row | {"calibration": ";".join(cells[row["user"]])})
    # bin one: 13 hits where 13 were expected (each user alone is off by 2.5); bin two: 5 where 15 were, of 40 in all
    assert calibration_error(made, made.rows("head")) == pytest.approx(10 / 40)


def test_hypervolume_and_equal_cost_by_hand(tmp_path):
    write_results(tmp_path, {**PAIR, "greedy": SPECS["gradient_norm"]}, users=6, seeds=1, shown=())
    cost = {"0.0": 0.5, "0.02": 0.5, "0.05": 0.5, "0.1": 0.2, "0.2": 0.2, "0.3": 0.2, "": 0.3}

    def flat(row):
        accuracy = {"ppo": 0.66, "greedy": 0.7 if cost[row["cost_weight"]] == 0.2 else 0.8}.get(row["method"], 0.5)
        mine = 0.3 if row["method"] == "ppo" else 0.0 if row["method"] == "base" else cost[row["cost_weight"]]
        return row | {"accuracy": accuracy, "cost": mine}

    made = changed(tmp_path, flat)
    # (.2, .7) rules from .2 to .5, (.5, .8) from there to 1.05; base is at .5
    assert volume(made, "greedy") == pytest.approx(0.3 * 0.2 + 0.55 * 0.3)
    assert volume(made, "head") is None
    # ppo: .75 of a width times .16; everybody is alike, so that no resample differs
    lead = volume_lead(made, "ppo", "greedy")
    assert lead.interval.mean == pytest.approx(0.75 * 0.16 - (0.3 * 0.2 + 0.55 * 0.3))
    assert lead.interval.low == pytest.approx(lead.interval.mean) == pytest.approx(lead.interval.high)
    assert lead.p < 0.05 and volume_lead(made, "ppo", "head") is None
    # the line from (.2, .7) to (.5, .8) is at .7333 where ppo costs .3
    found = at_equal_cost(made, "ppo", "greedy")
    assert found.interval.mean == pytest.approx(0.66 - (0.7 + 0.1 / 3)) and found.interval.low == pytest.approx(
        found.interval.mean
    )
    assert found.users == 6 and found.p < 0.05
    assert at_equal_cost(made, "ppo", "head").interval.mean == pytest.approx(0.16)  # as dear as ppo: as it is


@pytest.mark.parametrize(("apart", "compared"), [(0.05, True), (0.3, False)])
def test_a_rival_is_as_cheap_or_not_by_what_was_measured(tmp_path, apart, compared):
    write_results(tmp_path, {**PAIR, "greedy": SPECS["gradient_norm"]}, users=40, seeds=1, shown=())

    def dear_even_when_off(row):
        mine = 0.52 + apart * (-1) ** int(row["user"][1:])
        return row | {"cost": {"ppo": mine, "base": 0.6}.get(row["method"], 0.5)}

    found = at_equal_cost(changed(tmp_path, dear_even_when_off), "ppo", "greedy")
    assert compared == isinstance(found, Difference)
    assert compared or found.startswith("greedy is hardly ever cheaper: in ")


def test_what_is_at_equal_cost_is_corrected_for_those_who_are_shown(tmp_path):
    write_results(tmp_path, users=8, seeds=1, shown=())
    found = summarise(read_results(tmp_path))["methods"]
    shown = {name for name, method in found.items() if name != "ppo" and beside_masks(name, method)}
    assert shown == {name for name, method in found.items() if method["at_equal_cost"]} and "head" not in shown


def test_dearer_methods_without_a_trade_off_are_not_compared_at_equal_cost(tmp_path):
    made = panel(tmp_path, SPECS, users=8, seeds=1, shown=())
    assert at_equal_cost(made, "ppo", "all_on").startswith("dearer: cost 1.00 against 0.4")


def test_a_method_is_no_better_than_its_own_front(tmp_path):
    made = panel(tmp_path, SPECS, users=30, seeds=2, shown=())
    each = [part.mean(1) for part in points(made, "gradient_norm", made.rows("ppo"), made.rows("base"))]
    means = np.mean(each, axis=0)
    found = at_equal_cost(made, "ppo", "gradient_norm")
    assert found.interval.mean == pytest.approx(means[0, 1] - interpolated(means[1:], means[:1, 0])[0])
    assert found.interval.low < found.interval.mean < found.interval.high
    assert at_equal_cost(made, "gradient_norm", "gradient_norm").interval.mean <= 1e-12


def test_a_lead_in_hypervolume_is_the_difference_and_none_over_oneself(tmp_path):
    made = panel(tmp_path, SPECS, users=30, seeds=2, shown=())
    lead = volume_lead(made, "ppo", "gradient_norm").interval
    assert lead.mean == pytest.approx(volume(made, "ppo") - volume(made, "gradient_norm"))
    assert lead.low < lead.mean < lead.high
    same = volume_lead(made, "ppo", "ppo")
    assert (same.interval.low, same.interval.high) == pytest.approx((0, 0), abs=1e-12)


# Two folders.


def test_comparing_finds_a_planted_change_and_says_what_is_only_in_one(tmp_path, capsys):
    write_results(tmp_path / "a", PAIR, seeds=3, shown=(5,), timing=False)
    better = {**PAIR, "head": Spec(0.13, 0.2), "joint": SPECS["joint"]}
    write_results(tmp_path / "b", better, seeds=2, shown=(5,), draw=1, timing=False)
    compare.main([str(tmp_path / "a"), str(tmp_path / "b")])
    said = capsys.readouterr().out
    rows = {tuple(line.split(" | ")[:3]): line for line in said.splitlines() if line.startswith("| ")}
    assert "+0.02" in rows["| head", "-", "all"] and " above " in rows["| head", "-", "all"]
    assert all(verdict not in line for verdict in ("above", "below") for key, line in rows.items() if key[0] == "| ppo")
    assert rows["| ppo", "0.1", "all"].split(" | ")[3:5] == ["80", "2"]  # seed 2 is only in one
    assert ("| ppo", "0.1", "5") in rows
    only = [line for line in said.splitlines() if line.startswith("Only in")]
    assert "a`" in only[0] and "seeds: 2" in only[0] and "methods: joint" in only[1]


def test_comparing_a_folder_with_itself_shows_no_difference(tmp_path):
    results = read_results(write_results(tmp_path, PAIR, users=5, seeds=1))
    pairs = compare.paired(results, results)
    for measure in compare.MEASURES:
        found = compare.differences(results, results, pairs, measure)
        assert len(found) == len(pairs.first) and {one.verdict for one in found.values()} == {NO_DIFFERENCE}
    assert compare.only_in_one(results, results) == []


def test_costs_of_two_kinds_are_not_compared(tmp_path, capsys):
    folders = [write_results(tmp_path / name, PAIR, users=5, seeds=1, timing=False) for name in "ab"]
    facts = json.loads((folders[1] / "run.json").read_text())
    (folders[1] / "run.json").write_text(json.dumps({**facts, "counts": "flops"}))
    compare.main([*map(str, folders)])
    said = capsys.readouterr().out
    assert "Costs count parameters in one and flops in the other: they and rewards are not compared." in said
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in said.splitlines() if line.startswith("| ")]
    (heads,), every = [line for line in lines if line[0] == "method"], [line for line in lines if line[0] in PAIR]
    assert {line[heads.index(name)] for line in every for name in ("reward", "cost")} == {"-"}
    assert not {"-"} & {line[heads.index("accuracy")] for line in every}


def test_real_people_are_paired_as_people(tmp_path):
    one, other = (
        read_results(write_results(tmp_path / str(draw), PAIR, users=8, seeds=3, simulated=False, folds=2, draw=draw, shown=()))
        for draw in (0, 1)
    )
    found = compare.differences(one, other, compare.paired(one, other), "accuracy")
    assert (found["head", None, -1].users, found["head", None, -1].seeds) == (8, 3)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"population": "other"}, "different populations .* population 'made-up' and 'other'"),
        ({"groups": ("noisy", "clean", "inverted")}, "different users under the same names .* user u000 of seed 0"),
        ({"names": ["x1", "x2"]}, "have no row in common"),
    ],
)
def test_folders_that_cannot_be_paired_are_refused(tmp_path, other, said):
    write_results(tmp_path / "a", PAIR, users=2, seeds=1, shown=())
    write_results(tmp_path / "b", PAIR, **{"users": 2, "seeds": 1, "shown": (), **other})
    with pytest.raises(SystemExit, match=said):
        compare.main([str(tmp_path / "a"), str(tmp_path / "b")])

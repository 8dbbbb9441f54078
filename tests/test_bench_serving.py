"""The benchmark of serving, in miniature: what it compares is the same, and what it reports is what was measured."""

import json
import shutil
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from agents import train_ppo
from agents.bootstrap import paired_difference
from agents.checkpoint import choose_masks, load_policy
from agents.run import RunConfig
from backbones.bert import TextBackbone
from envs import MINIATURES
from eval.bench import changed, exit_speeds, exits, exits_pooled, many_loras, residents, stored
from eval.bench.__main__ import main
from eval.bench.exit_runs import exit_runs, fold_of, shared, title
from serving.records import PRECISIONS
from tests.test_bert import make_model, make_tokenizer

pytest.importorskip("peft")

POPQUORN = "dsa/PopquornBertExit-v0"
QUIET = ["--no-progress", "--num-threads", "1"]


def trained(env, folder, *arguments):
    small = [word for name, value in MINIATURES[env].items() for word in ("--env-kwargs", f"{name}:{json.dumps(value)}")]
    quick = ["-n", "128", "--eval-freq", "64", "-P", "search:false", "-P", "n_envs:16", "-P", "batch_size:64"]
    train_ppo.main(["--env", env, *quick, *arguments, *small, "-f", str(folder), *QUIET])
    return folder


@pytest.fixture(scope="module", autouse=True)
def no_longer_than_needed():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exit_speeds, "SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def exit_run(real_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "exit"
    return trained("dsa/UnipenResNetExit-v0", folder, "--cost-weight", "uniform:0:0.3")


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    return trained("dsa/DigitsResNet-v0", tmp_path_factory.mktemp("runs") / "plain")


@pytest.fixture(scope="module")
def row(exit_run):
    (found,) = exits.measure_exits([exit_run], 2)
    return found


def test_a_run_that_may_exit_is_shown_at_every_cost_weight(row, exit_run):
    ways = row["ways"]
    weights = [f"{kind}, {weight:g}" for weight in exits.WEIGHTS for kind in ("policy", "best_static")]
    assert [*ways][: 2 + len(weights)] == ["bare", "all_on", *weights]
    assert all(name.startswith(("policy for 1.", "best_static for 1.")) for name in [*ways][2 + len(weights) :])
    assert ways["all_on"]["cost"] == pytest.approx(1)
    assert [*ways["bare"]["less"]] == ["all_on"]
    config = RunConfig.load(exit_run)
    scenario = config.scenario(exit_run)
    users = scenario.users("test")
    none = np.zeros((len(users), len(scenario.pathways)), dtype=bool)
    assert ways["bare"]["accuracy"] == pytest.approx(scenario.oracle.evaluate(users, none, "query").accuracy.mean())
    assert all(way["milliseconds"]["median"] > 0 for way in ways.values())
    assert (row["seed"], row["fold"], row["simulated"]) == (0, None, False)
    assert row["settings"] == shared(config) and set(ways["bare"]["each"]) == {scenario.user_ids[user] for user in users}
    json.dumps(row)


def test_its_table_gives_speed_as_a_ratio_to_the_bare_model(row):
    slow = json.loads(json.dumps(row))
    slow["ways"]["policy, 0.1"]["milliseconds"] = {"median": 5.0, "least": 4.0, "most": 6.0}
    slow["ways"]["bare"]["milliseconds"] = {"median": 10.0, "least": 9.0, "most": 12.0}
    text = exits.exits_table([slow])
    (where,) = [line for line in text.splitlines() if "| bare |" in line]
    assert where.startswith("| UnipenResNetExit-v0 ") and ", seed 0 | bare |" in where
    line = next(line for line in text.splitlines() if "policy, 0.1 " in line)
    assert line.endswith("| 5.0 (4.0 - 6.0) | 2.00 |")


def run_of(seed=0, fold=None, simulated=False, settings=None, ms=5.0, **accuracies):
    """A measured run's row: accuracies by way and user; ``policy_15`` stands for what was chosen for a speed."""
    names = {name: name.replace("_15", f" for 1.5x, chosen in {seed}") for name in accuracies}
    return {
        "title": "Some-v0",
        "seed": seed,
        "fold": fold,
        "settings": settings or {},
        "simulated": simulated,
        "ways": {
            names[name]: {
                "each": each,
                "cost": 0.5 + seed,
                "masks": 1 + 2 * seed,
                "milliseconds": dict.fromkeys(("median", "least", "most"), 10.0 if name == "bare" else ms),
            }
            for name, each in accuracies.items()
        },
    }


def test_folds_bring_further_users_together():
    first = run_of(0, 0, bare={"a": 0.0, "b": 0.5}, all_on={"a": 1.0, "b": 1.0}, policy_15={"a": 0.5, "b": 0.5})
    second = run_of(1, 1, ms=2.0, bare={"c": 1.0}, all_on={"c": 1.0}, policy_15={"c": 1.0})
    (both,) = exits_pooled.pooled([first, second, run_of(2, settings={"rank": 4}, bare={"a": 1.0}, all_on={"a": 1.0})])
    assert (both["runs"], both["users"]) == (2, 3)
    chosen = both["ways"]["policy for 1.5x"]
    assert chosen["accuracy"] == pytest.approx(2 / 3)
    expected = paired_difference([np.array([0.5, 0.5, 1.0])], [np.array([0.0, 0.5, 1.0])])
    assert chosen["less"]["bare"] == pytest.approx(asdict(expected))
    assert (chosen["cost"], chosen["masks"], chosen["speed"]) == (1.0, [1, 3], [2.0, 5.0])
    text = exits_pooled.pooled_table([both])
    assert "| Some-v0, seeds 0, 1, folds 0, 1: 3 users | bare | 0.500 | - |" in text
    assert " | 1.00 | 2 (1 - 3) | 3.50 (2.00 - 5.00) |" in text
    json.dumps(both)


def test_a_person_of_several_seeds_counts_once_with_the_mean():
    first = run_of(0, bare={"a": 0.0, "b": 0.0}, all_on={"a": 0.2, "b": 1.0})
    second = run_of(1, bare={"c": 0.5, "a": 0.5}, all_on={"c": 0.5, "a": 1.0})
    (people,) = exits_pooled.pooled([first, second])
    expected = paired_difference([np.array([0.35, 1.0, 0.0])], [np.zeros(3)])
    assert people["users"] == 3 and people["ways"]["all_on"]["less"]["bare"] == pytest.approx(asdict(expected))
    assert people["ways"]["all_on"]["accuracy"] == pytest.approx((0.6 + 1.0 + 0.5) / 3)


def test_simulated_users_are_others_in_every_run_and_runs_weigh_the_same():
    first = run_of(0, simulated=True, bare={"a": 0.0, "b": 0.0}, all_on={"a": 0.2, "b": 1.0})
    second = run_of(1, simulated=True, bare={"a": 0.5}, all_on={"a": 1.0})
    (both,) = exits_pooled.pooled([first, second])
    expected = paired_difference([np.array([0.2, 1.0]), np.array([0.5])], [np.zeros(2), np.zeros(1)])
    assert both["users"] == 3 and both["ways"]["all_on"]["less"]["bare"] == pytest.approx(asdict(expected))
    assert both["ways"]["all_on"]["accuracy"] == pytest.approx((0.6 + 1.0) / 2)


def test_a_policy_is_compared_with_the_mask_for_all_that_was_chosen_like_it():
    ways = {"bare": {"a": 0.0}, "all_on": {"a": 1.0}, "policy, 0.05": {"a": 0.8}, "best_static, 0.05": {"a": 0.3}}
    ways |= {"policy for 1.5x, 0.2": {"a": 0.7}, "best_static for 1.2x, 01": {"a": 0.1}, "best_static for 1.5x, 10": {"a": 0.6}}
    found = exits.against([ways], simulated=False)
    assert found["policy, 0.05"]["less"]["best_static"]["mean"] == pytest.approx(0.5)
    assert found["policy for 1.5x, 0.2"]["less"]["best_static"]["mean"] == pytest.approx(0.1)
    assert [*found["best_static, 0.05"]["less"]] == ["bare", "all_on"] and [*found["all_on"]["less"]] == ["bare"]
    assert exits.less_cells(found["bare"]) == "- | -1.000 [-1.000, -1.000] | -"


def test_what_a_run_is_too_slow_for_is_left_out_and_named():
    both = {"bare": {"a": 0.0}, "all_on": {"a": 1.0}}
    (row,) = exits_pooled.pooled([run_of(0, policy_15={"a": 1.0}, **both), run_of(1, **both)])
    assert [*row["ways"]] == ["bare", "all_on"]
    assert "`policy for 1.5x` is left out, because 1 of 2 runs" in exits_pooled.pooled_table([row])


def test_runs_that_answer_for_the_same_are_refused_before_anything_is_measured(exit_run, plain_run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(exit_run, copy)
    with pytest.raises(ValueError, match="runs of one seed with the same settings: give one of them"):
        exit_runs([exit_run, copy])
    config = json.loads((copy / "config.json").read_text())
    for change in ({"seed": 1}, {"total_timesteps": 64}, {"env_kwargs": config["env_kwargs"] | {"rank": 3}}):
        (copy / "config.json").write_text(json.dumps(config | change))
        assert len(exit_runs([exit_run, copy])) == 2
    assert "fold" not in shared(RunConfig(**config | {"env": POPQUORN, "env_kwargs": {"fold": 1}}))["env_kwargs"]
    folds = [RunConfig(**config | {"env": POPQUORN, "env_kwargs": given}) for given in ({}, {"fold": 0}, {"fold": 1})]
    assert [fold_of(one) for one in [*folds, RunConfig.load(exit_run)]] == [0, 0, 1, None]
    seeds = [RunConfig.load(exit_run), replace(RunConfig.load(exit_run), seed=1, search=True)]
    assert shared(seeds[0]) == shared(seeds[1]) != shared(replace(seeds[0], total_timesteps=64))
    assert str(tmp_path) not in title(replace(seeds[0], env_kwargs={"data_root": str(tmp_path), "init": str(tmp_path / "x")}))


def test_a_run_that_cannot_exit_is_refused(plain_run):
    with pytest.raises(ValueError, match="masks run the whole network"):
        exit_runs([plain_run])


def test_what_is_timed_are_the_same_answers(exit_run):
    config = RunConfig.load(exit_run)
    scenario = config.scenario(exit_run)
    every = np.ones((len(scenario.users("test")), len(scenario.pathways)), dtype=bool)
    masks = {"bare": scenario.executed(~every), "off again": scenario.executed(~every), "all_on": every}
    calls = exit_speeds.calls(scenario, "test", masks)
    bare, served, on = calls["bare"](), calls["off again"]()[:, 0], calls["all_on"]()[:, 0]
    torch.testing.assert_close(bare, served, rtol=1e-4, atol=1e-5)
    assert (on - bare).abs().max() > 1e-3


def test_the_same_masks_under_two_names_are_timed_once(exit_run, monkeypatch):
    timed = []

    def clock(scenario, split, masks, repeats):
        timed.extend(masks)
        return {name: exits.Spread(1.0 + place, 1.0, 99.0) for place, name in enumerate(masks)}

    again = "policy for 1.5x, 0.2"
    monkeypatch.setattr(exits, "WEIGHTS", ())
    monkeypatch.setattr(exits, "timed", clock)
    monkeypatch.setattr(
        exits, "for_speeds", lambda scenario, *_: {again: np.ones((len(scenario.users("test")), len(scenario.pathways)), bool)}
    )
    (row,) = exits.measure_exits([exit_run], 1)
    assert timed[:2] == ["bare", "all_on"] and again not in timed and again in row["ways"]
    assert row["ways"][again]["milliseconds"] == row["ways"]["all_on"]["milliseconds"] != row["ways"]["bare"]["milliseconds"]


def test_batches_are_timed_for_as_long_as_said(exit_run, monkeypatch):
    scenario = RunConfig.load(exit_run).scenario(exit_run)
    asked = []
    monkeypatch.setattr(exit_speeds, "alternating_calls", lambda calls, *how: asked.append(([*calls], how)))
    monkeypatch.setattr(exit_speeds, "SECONDS", 3.0)
    none = np.zeros((len(scenario.users("test")), len(scenario.pathways)), dtype=bool)
    exit_speeds.timed(scenario, "test", {"bare": none, "one": ~none}, 2)
    assert asked == [(["bare", "one"], (2, 3.0))]


def test_choices_for_a_speed_are_made_on_val_users_and_shown_on_test_users(exit_run, monkeypatch):
    config = RunConfig.load(exit_run)
    scenario = config.scenario(exit_run)
    policy, _ = load_policy(exit_run / "policy", scenario)
    monkeypatch.setattr(exit_speeds, "fast_enough", lambda scenario, choices, repeats: {1.5: [*choices][-1]})
    found = exit_speeds.for_speeds(scenario, policy, config.rules, config.seed, 1)
    (own, masks), (static, same) = found.items()
    assert own == "policy for 1.5x, 0.3" and static.startswith("best_static for 1.5x, ")
    users = scenario.users("test")
    assert np.array_equal(masks, scenario.executed(choose_masks(policy, scenario, users, 0.3, config.rules)))
    assert ["".join(map(str, row)) for row in same.astype(int)] == [static.split(", ")[1]] * len(users)


def test_for_a_speed_the_most_accurate_choice_of_val_users_is_taken(exit_run, monkeypatch):
    scenario = RunConfig.load(exit_run).scenario(exit_run)
    places = np.arange(len(scenario.pathways))
    masks = {"late": places == 3, "early": places == 0, "early again": places == 0}
    choices = {name: lambda some, mask=mask: np.tile(mask, (len(some), 1)) for name, mask in masks.items()}
    asked = []

    def clock(scenario, split, plans, repeats):
        asked.append((split, [*plans]))
        return {name: exits.Spread.of([took[name]]) for name in plans}

    def known(oracle, users, plans, role):
        assert role == "query" and set(users) == set(scenario.users("val"))
        return SimpleNamespace(accuracy=np.where((plans == masks["late"]).all(1), 0.9, 0.8))

    monkeypatch.setattr(exit_speeds, "timed", clock)
    monkeypatch.setattr(type(scenario.oracle), "evaluate", known)
    took = {"bare": 10.0, "late": 6.0, "early again": 3.0}
    assert exit_speeds.fast_enough(scenario, choices, 1) == {1.2: "late", 1.5: "late"}
    assert asked == [("val", ["bare", "late", "early again"])]
    took["late"] = 6.5  # 1.54 times as fast: too near
    assert exit_speeds.fast_enough(scenario, choices, 1) == {1.2: "late", 1.5: "early again"}
    took |= {"late": 9.0, "early again": 9.0}
    assert exit_speeds.fast_enough(scenario, choices, 1) == {}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return TextBackbone(make_model("bert"), make_tokenizer())


def test_many_users_updates_are_compared_with_pefts_on_the_same_numbers(encoder):
    found = many_loras.measure_loras(5, 2, encoder)
    assert [*found["milliseconds"]] == ["ours", "one user", "bare", "peft adapter_names", "peft set_adapter"]
    text = many_loras.loras_table(found)
    assert "5 different users" in text and text.count("| 1 / ") == 2


def test_another_answer_of_the_rival_stops_the_comparison(encoder, monkeypatch):
    usual = many_loras.with_adapters

    def wrong(model, pathways, weights):
        return usual(model, pathways, {key: w + 0.5 for key, w in weights.items()})

    monkeypatch.setattr(many_loras, "with_adapters", wrong)
    with pytest.raises(RuntimeError, match="answers otherwise"):
        many_loras.measure_loras(3, 1, encoder)


@pytest.fixture(scope="module")
def on_disk(plain_run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "choose_masks", some_masks)  # a policy that has hardly learned may have nothing on
        return stored.measure_stored(plain_run, (50, 200))


def some_masks(policy, scenario, users, weight, rules):
    return np.random.default_rng(0).random((len(users), len(scenario.pathways))) < 0.5


def test_records_are_those_of_the_masks(on_disk, plain_run, monkeypatch):
    monkeypatch.setattr(stored, "choose_masks", some_masks)
    assert [*on_disk["precisions"]] == [*PRECISIONS]
    each = {name: one["bytes"] for name, one in on_disk["precisions"].items()}
    assert each["float32"] > each["float16"] > each["int8"] > each["int4"]
    assert [one["users"] for one in on_disk["stores"]] == [50, 200]
    for one in on_disk["stores"]:
        assert one["bytes_per_user"] >= each["int4"]
        assert bool(one["cold"]) == stored.FORGETS
        assert one["forget"] > 0
        assert all(0 < one[how]["median"] <= one[how]["p99"] for how in ("read", "cold") if one[how])
    config = RunConfig.load(plain_run)
    scenario = config.scenario(plain_run)
    adapters, gates = stored.adapters_of(plain_run, config, scenario)
    outcome = scenario.oracle.evaluate(scenario.users("test"), gates.numpy(), "query")
    assert on_disk["precisions"]["float32"]["accuracy"] == pytest.approx(outcome.accuracy.mean())
    assert len(adapters) == len(scenario.users("test"))
    assert "| PEFT checkpoint |" in stored.stored_table(on_disk)
    assert " | - | " in stored.stored_table(on_disk | {"stores": [one | {"cold": None} for one in on_disk["stores"]]})


def test_who_is_not_resident_is_answered_all_the_same(plain_run, monkeypatch):
    monkeypatch.setattr(residents, "SLOTS", 8)
    found = residents.measure_residents(plain_run, 2)
    assert [*found] == ["uniform", "zipf"]
    assert "| zipf |" in residents.residents_table(found)


def test_users_who_change_are_updated_and_compared(plain_run, monkeypatch):
    monkeypatch.setattr(changed, "_without_shift", lambda users: users[0].query)  # of so few, nobody is without
    found = changed.measure_changed(plain_run)
    for case in ("changed", "same", "unshifted"):
        assert [*found[case]] == ["kept", "update", "afresh", "bare"]
        assert found["update_less"][case]["afresh"][0] == pytest.approx(found[case]["update"] - found[case]["afresh"])
    assert "| | changed | did not change | changed, without any shift |" in changed.changed_table(found)


def test_users_without_shifts_cannot_change(exit_run):
    with pytest.raises(ValueError, match="users have no shifts"):
        changed.measure_changed(exit_run)


def test_the_command_writes_its_page(plain_run, exit_run, tmp_path, monkeypatch):
    monkeypatch.setattr(many_loras, "measure_loras", dict)
    monkeypatch.setattr(residents, "measure_residents", lambda run: {})
    monkeypatch.setattr(many_loras, "loras_table", lambda found: "loras here")
    monkeypatch.setattr(residents, "residents_table", lambda found: "residents here")
    monkeypatch.setattr(changed, "measure_changed", lambda run: {})
    monkeypatch.setattr(changed, "changed_table", lambda found: "changed here")
    monkeypatch.setattr(exits, "measure_exits", lambda runs, repeats: [str(run) for run in runs] * repeats)
    monkeypatch.setattr(exits_pooled, "pooled", lambda rows: rows[1:])
    monkeypatch.setattr(exits_pooled, "pooled_table", lambda rows: f"together {len(rows)}")
    monkeypatch.setattr(exits, "exits_table", lambda runs: f"exits of {len(runs)}")
    monkeypatch.setattr(stored, "measure_stored", lambda run, sizes: {"sizes": list(sizes)})
    monkeypatch.setattr(stored, "stored_table", lambda found: f"stored {found['sizes']}")
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- bench serving: begin -->\nold\n<!-- bench serving: end -->\nb\n")
    arguments = [
        "--runs",
        str(exit_run),
        "--repeats",
        "3",
        "--stored",
        str(plain_run),
        "--changed",
        str(plain_run),
        "--users",
        "300",
        "--num-threads",
        "1",
    ]
    main(["serving", *arguments, "--write", str(page), "--json", str(tmp_path / "out.json")])
    text = page.read_text()
    for words in (
        "exits of 3",
        "together 2",
        "loras here",
        "stored [300, 300]",
        "residents here",
        "changed here",
        "python -m eval.bench serving --runs",
    ):
        assert words in text
    assert "old" not in text and str(tmp_path) not in text and str(exit_run) not in text
    assert json.loads((tmp_path / "out.json").read_text())["stored"] == {"sizes": [300, 300]}


def test_what_is_wrong_is_said_before_anything_is_measured(plain_run, exit_run, tmp_path, monkeypatch):
    monkeypatch.setattr(many_loras, "measure_loras", lambda: pytest.fail("measured"))
    monkeypatch.setattr(exits, "measure_exit", lambda *_: pytest.fail("measured"))
    page = tmp_path / "page.md"
    page.write_text("no markers")
    cases = {
        "--repeats must be at least 1": ["--repeats", "0"],
        "--users must be at least 1": ["--users", "0"],
        "is not a run": ["--stored", str(tmp_path), "--runs", str(exit_run)],
        "it has no config.json": ["--changed", str(tmp_path), "--runs", str(exit_run)],
        "masks run the whole network": ["--runs", str(exit_run), str(plain_run)],
        "has no lines <!-- bench serving: begin -->": ["--write", str(page)],
    }
    for said, wrong in cases.items():
        with pytest.raises(SystemExit, match=f"error: .*{said}"):
            main(["serving", *wrong, "--num-threads", "1"])


def test_what_was_measured_is_kept_when_a_later_part_fails(exit_run, tmp_path, monkeypatch):
    def failing():
        raise OSError("no more room")

    monkeypatch.setattr(exits, "measure_exits", lambda runs, repeats: ["measured"])
    monkeypatch.setattr(exits, "exits_table", lambda rows: "exits")
    monkeypatch.setattr(exits_pooled, "pooled", lambda rows: [])
    monkeypatch.setattr(many_loras, "measure_loras", failing)
    with pytest.raises(SystemExit, match="error: no more room"):
        main(["serving", "--runs", str(exit_run), "--json", str(tmp_path / "out.json"), "--num-threads", "1"])
    assert json.loads((tmp_path / "out.json").read_text()) == {"exits": ["measured"], "pooled": []}

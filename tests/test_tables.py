"""Pathway tables: what is written is what was measured, whoever measured it and however often it was interrupted."""

import os
from dataclasses import fields, replace
from shutil import copytree

import gymnasium as gym
import numpy as np
import pytest

import envs
from backbones.artefacts import ArtefactError, exists
from backbones.pathways import READOUT, RUN, executed
from envs import shards, tables, tabulate
from envs.oracles import ROLES
from envs.planted import planted
from envs.scenario import load_scenario
from envs.shards import Source, cut, live_oracle, measured, table_masks
from envs.tables import PathwayTable, encoded, mask_keys
from envs.tabulate import main

ROUNDING = 8e-6
PLANTED = ["--env", "dsa/Planted-v0", "--env-kwargs", "users:64", "--processes", "1"]
DIGITS = {**envs.MINIATURES["dsa/DigitsResNet-v0"], "train_users": 70}


def refusal(*arguments):
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    return str(error.value.code)


def names(count):
    return tuple(f"p{p}" for p in range(count))


def content(path):
    """Bytes of all files of a table, by name without the table's own."""
    files = path.parent.glob(f"{path.name}*")
    return {file.name.removeprefix(path.name): file.read_bytes() for file in files if file.is_file()}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The table of 64 planted users."""
    path = tmp_path_factory.mktemp("tables") / "whole"
    main([*PLANTED, "--out", str(path)])
    return path


@pytest.fixture
def table(out):
    return PathwayTable.load(out)


@pytest.fixture(scope="module")
def digits():
    """A real model in small: its environment and its scenario."""
    source = Source.of("dsa/DigitsResNet-v0", None, DIGITS)
    return source, source.scenario()


@pytest.fixture(scope="module")
def digits_out(digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "digits"
    tabulate.tabulate(digits[0], path, 9)
    return path


# The table.


def test_a_table_survives_the_disk(out, table, tmp_path):
    table.save(tmp_path / "whole")
    assert content(tmp_path / "whole") == content(out)
    again = PathwayTable.load(f"{tmp_path / 'whole'}.json")
    for field in fields(PathwayTable):
        mine, theirs = (getattr(each, field.name) for each in (again, table))
        if field.name == "costs":
            mine, theirs = ({name: value.numpy() for name, value in each.tensors().items()} for each in (mine, theirs))
        np.testing.assert_equal(mine, theirs)


def test_a_table_holds_the_scenario_and_its_oracles_answers(table):
    live, played = planted(users=64), table.scenario()
    for name in ("pathways", "splits", "user_ids", "user_info", "embeddings", "statistics", "groups", "label_counts"):
        np.testing.assert_equal(getattr(played, name), getattr(live, name))
    assert (played.fingerprint, played.notes, played.name) == (live.fingerprint, live.notes, live.name)
    np.testing.assert_allclose(played.scores["gradient_norm"], live.scores["gradient_norm"], rtol=1e-6)
    users, masks = np.arange(64).repeat(256), np.tile(table.masks, (64, 1))
    for role in ("validation", "query"):
        found, expected = (s.oracle.evaluate(users, masks, role) for s in (played, live))
        np.testing.assert_allclose(found.accuracy, expected.accuracy, atol=ROUNDING)
        np.testing.assert_allclose(found.loss, expected.loss, rtol=2**-11)
        np.testing.assert_array_equal(found.cost, expected.cost)


def test_every_role_of_test_users_of_a_real_model_is_the_live_oracles(digits, digits_out):
    table, users = PathwayTable.load(digits_out), digits[1].users("test")
    for mask in table.masks:
        plans = np.repeat(mask[None, None], len(users), axis=0)
        expected = live_oracle(digits[1]).measure(users, plans, ROLES)
        np.testing.assert_allclose(table.scenario().oracle.measure(users, plans, ROLES), expected, atol=1e-5, rtol=1e-3)
    assert not np.array_equal(table.accuracy["query"][users], table.accuracy["query_all_labels"])


@pytest.mark.parametrize("cost_weight", [0.02, 0.3])
def test_one_table_plays_the_live_environment_at_every_cost_weight(digits_out, cost_weight):
    live = gym.make("dsa/DigitsResNet-v0", split="val", cost_weight=cost_weight, **DIGITS)
    played = gym.make("dsa/Tabular-v0", table=str(digits_out), split="val", cost_weight=cost_weight)
    for mask in PathwayTable.load(digits_out).masks:
        (seen, told), (shown, said) = live.reset(seed=3), played.reset(seed=3)
        np.testing.assert_equal((shown, said), (seen, told))
        _, expected, *_, before = live.step(mask.astype(np.int8))
        _, reward, terminated, truncated, after = played.step(mask.astype(np.int8))
        assert reward == pytest.approx(expected, abs=ROUNDING)
        assert (terminated, truncated, {*after}, after["cost"]) == (True, False, {*before}, before["cost"])


@pytest.mark.parametrize("cost_weight", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("role", ["validation", "support_halves"])
def test_optimum_regret_and_best_static_mask_are_those_of_brute_force(table, cost_weight, role):
    oracle, users = planted(users=64).oracle, table.splits["test"][::3]
    rewards = np.array([[oracle.evaluate(np.array([u]), m[None]).reward(cost_weight)[0] for m in table.masks] for u in users])
    masks, best = table.optimum(users, cost_weight, role)
    np.testing.assert_array_equal(masks, table.masks[rewards.argmax(1)])
    np.testing.assert_allclose(best, rewards.max(1), atol=ROUNDING)
    np.testing.assert_allclose(table.rewards("test", cost_weight, role)[::3], rewards, atol=ROUNDING)
    some = table.masks[np.random.default_rng(0).integers(0, 256, len(users))]
    expected = rewards.max(1) - oracle.evaluate(users, some).reward(cost_weight)
    np.testing.assert_allclose(table.regret(users, some, cost_weight, role), expected, atol=2 * ROUNDING)
    np.testing.assert_allclose(table.regret(users, masks, cost_weight, role), 0, atol=1e-9)


def test_the_best_static_mask_is_best_on_average(table):
    spread = {**table.accuracy, "query": np.arange(64 * 256, dtype=np.uint16).reshape(64, 256) * 7919}
    uneven = replace(table, accuracy=spread)
    for weight in (0.0, 0.5):
        means = uneven.rewards("val", weight, "query").mean(0)
        np.testing.assert_array_equal(uneven.best_static(weight, "val", "query"), table.masks[means.argmax()])


def test_of_masks_that_earn_the_same_the_cheapest_is_best(table):
    same = replace(table, accuracy={role: np.full_like(answers, 40000) for role, answers in table.accuracy.items()})
    assert not same.best_static(0.0).any()
    assert not same.optimum(table.splits["val"], 0.0)[0].any()


def test_960_users_and_128_masks_stay_under_two_megabytes(tmp_path):
    tabulate.tabulate(Source.of("dsa/Planted-v0", None, {"users": 960}), tmp_path / "large", 128)
    assert sum(len(data) for data in content(tmp_path / "large").values()) < 2_000_000


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.01, 1.01])
def test_what_is_no_accuracy_is_not_rounded_into_one(bad):
    with pytest.raises(FloatingPointError, match=r"outside 0\.\.1"):
        encoded(np.array([[0.5, 0.5], [bad, 0.5]]))


def test_losses_beyond_float16_are_clipped():
    assert encoded(np.array([0.5, 1e9]))[1] == np.float16(65504)


# What is not in it.


def test_several_rounds_are_refused_with_the_live_environment_as_cure(out, table):
    plans = np.zeros((1, 2, 8), dtype=bool)
    with pytest.raises(ValueError, match="rounds in the live environment dsa/Planted-v0"):
        table.scenario().oracle.measure(np.zeros(1, dtype=np.int64), plans, ("validation",))
    with pytest.raises(ValueError, match="rounds in the live environment dsa/Planted-v0"):
        gym.make("dsa/Tabular-v0", table=str(out), rounds=2)


def test_masks_and_roles_that_were_not_tabulated_are_refused_by_name(table):
    oracle = replace(table, masks=table.masks[:200]).scenario().oracle
    with pytest.raises(ValueError, match=r"the mask 11111111 is not among the 200 of 2\^8.*dsa/Planted-v0"):
        oracle.evaluate(np.array([0, 1]), np.array([[0] * 8, [1] * 8]))
    with pytest.raises(ValueError, match=r"no role 'queries'\. Did you mean 'query'"):
        oracle.evaluate(np.array([0]), np.zeros((1, 8)), "queries")
    with pytest.raises(ValueError, match="'support_halves' is tabulated for test users only, and 'user-3' is not one"):
        oracle.evaluate(np.array([63, 3]), np.zeros((2, 8)), "support_halves")


def test_masks_of_many_pathways_are_found_by_search():
    masks = table_masks(names(40), 100)
    scenario = replace(planted(users=8), pathways=names(40))
    many = PathwayTable.of("me/Many-v0", scenario, masks, {}, {})
    order = np.random.default_rng(0).permutation(100)
    np.testing.assert_array_equal(many.columns(masks[order]), order)
    for other in (~masks[50], np.arange(40) % 3 == 0, np.arange(40) > 0):
        with pytest.raises(ValueError, match=r"not among the 100 of 2\^40"):
            many.columns(other[None])


def test_a_missing_table_is_told_with_its_cure(tmp_path, monkeypatch):
    with pytest.raises(ArtefactError, match=r"no pathway table at .*absent.json; make one: python -m envs.tabulate"):
        load_scenario("tabular", table=str(tmp_path / "absent"))
    monkeypatch.setattr(tables, "_PACKAGED", tmp_path / "digits-table")
    with pytest.raises(ArtefactError, match="no packaged pathway table; reinstall"):
        PathwayTable.packaged()


def test_a_table_of_another_format_version_is_refused_by_name(table, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tables, "VERSION", 7)
        table.save(tmp_path / "new")
    with pytest.raises(ArtefactError, match=r"format version 7, this program reads version 1; tabulate again"):
        PathwayTable.load(tmp_path / "new")
    assert "format version 7" in refusal(*PLANTED, "--out", tmp_path / "new")


# Which masks, and which shards.


@pytest.mark.parametrize("pathways", [1, 7, 10])
def test_up_to_ten_pathways_every_mask_is_tabulated(pathways):
    masks = table_masks(names(pathways))
    np.testing.assert_array_equal(mask_keys(masks), np.arange(2**pathways))
    np.testing.assert_array_equal(table_masks(names(pathways), 10**6), masks)


@pytest.mark.parametrize(("pathways", "count", "expected"), [(11, None, 1024), (7, 9, 9), (7, 100, 100), (50, 60, 60)])
def test_a_sample_has_the_named_masks_and_is_always_the_same(pathways, count, expected):
    masks = table_masks(names(pathways), count)
    assert len(masks) == expected
    assert (np.diff(mask_keys(masks)) > 0).all()
    named = {0, 2**pathways - 1, *(2**p for p in range(pathways))}
    assert named <= {int(key) for key in mask_keys(masks)}
    np.testing.assert_array_equal(masks, table_masks(names(pathways), count))


@pytest.mark.parametrize(("speaking", "runs", "count"), [(7, 4, None), (9, 3, 4000), (1, 10, 10**3), (6, 5, 100)])
@pytest.mark.parametrize("readout", [(), (READOUT,)])
def test_a_sample_of_pathways_that_let_blocks_run_holds_masks_as_they_are_executed(speaking, runs, count, readout):
    pathways = (*names(speaking), *(f"{name}{RUN}" for name in names(runs)), *readout)
    masks = table_masks(pathways, count)
    np.testing.assert_array_equal(executed(pathways, masks), masks)
    keys = {int(key) for key in mask_keys(masks)}
    assert len(keys) == len(masks) <= (count or 1024)
    for wanted in (np.zeros(len(pathways)), np.ones(len(pathways)), *np.eye(len(pathways))):
        assert int(mask_keys(executed(pathways, wanted.astype(bool)[None]))[0]) in keys


def test_impossible_samples_are_refused():
    assert "--masks must be at least 10" in refusal(*PLANTED, "--out", "nowhere", "--masks", 9)
    with pytest.raises(ValueError, match="at most 62 pathways, got 63"):
        table_masks(names(63), 100)


def test_shards_cover_every_pair_once_and_hold_one_split_each():
    scenario, masks = planted(users=400), table_masks(names(8))
    seen = np.zeros((400, 256), dtype=int)
    for shard in cut(scenario, masks):
        assert len(shard.users) <= shards.USERS and len(shard.columns) <= shards.MASKS
        np.testing.assert_array_equal(shard.users, scenario.users(shard.split)[shard.start : shard.start + len(shard.users)])
        seen[np.ix_(shard.users, shard.columns)] += 1
    assert (seen == 1).all()
    assert len({shard.name for shard in cut(scenario, masks)}) == len(cut(scenario, masks))


def test_the_adaptations_that_are_announced_are_those_that_happen(digits):
    live, masks = live_oracle(digits[1]), table_masks(names(7), 9)
    for shard in [s for s in cut(digits[1], masks) if s.start == 0]:
        before = live.adaptations
        measured(live, shard, masks)
        assert live.adaptations - before == shard.adaptations


# Interruptions.


@pytest.fixture
def stop_after(monkeypatch):
    """Press Ctrl-C when so many shards are done; later calls lift the limit."""

    def limit(count):
        done = []

        def counted(source, shard, masks, folder):
            if len(done) == count:
                raise KeyboardInterrupt
            done.append(shard.name)
            shards.work(source, shard, masks, folder)

        monkeypatch.setattr(tabulate, "work", counted)
        return done

    return limit


def test_a_table_that_was_interrupted_is_that_of_one_go(out, tmp_path, stop_after, capsys):
    path = tmp_path / "whole"
    arguments = [*PLANTED, "--out", str(path)]
    first = stop_after(5)
    told = refusal(*arguments)
    assert "Go on with: python -m envs.tabulate --env dsa/Planted-v0 --env-kwargs users:64" in told
    assert not exists(path)
    (tmp_path / "whole-unfinished" / f"{first[2]}.json").unlink()
    second = stop_after(7)
    refusal(*arguments)
    assert first[2] in second and not {*first[:2], *first[3:]} & {*second}
    stop_after(None)
    main(arguments)
    assert content(path) == content(out)
    assert [file.name for file in tmp_path.iterdir() if file.is_dir()] == []
    assert "28,672 adaptations, 26,624 of them left" in capsys.readouterr().out


def test_a_complete_table_is_left_alone(out, tmp_path, stop_after, capsys):
    copytree(out.parent, tmp_path / "copy")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "copy").iterdir()}
    stop_after(0)
    main([*PLANTED, "--out", str(tmp_path / "copy" / "whole.json")])
    assert "is complete and of this content: nothing to do" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "copy").iterdir()} == before


def test_what_a_kill_left_of_the_unfinished_work_of_a_complete_table_is_removed(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tabulate, "rmtree", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        refusal(*PLANTED, "--out", tmp_path / "t")
    assert exists(tmp_path / "t") and exists(tmp_path / "t-unfinished" / "content")
    main([*PLANTED, "--out", str(tmp_path / "t")])
    assert not (tmp_path / "t-unfinished").exists()


def test_a_damaged_shard_is_named(tmp_path, stop_after):
    first = stop_after(3)
    refusal(*PLANTED, "--out", tmp_path / "t")
    (file,) = (tmp_path / "t-unfinished").glob(f"{first[1]}-*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    stop_after(None)
    assert f"{file} is truncated or altered" in refusal(*PLANTED, "--out", tmp_path / "t")


def test_worker_processes_give_the_very_same_table(digits, digits_out, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    tabulate.tabulate(digits[0], tmp_path / "digits", 9, processes=2)
    assert content(tmp_path / "digits") == content(digits_out)
    assert "OMP_NUM_THREADS" not in os.environ


PLUGIN = """
import os
import torch
from dataclasses import replace
import envs
from envs.oracles import FormulaOracle
from envs.planted import planted
from envs.scenario import SCENARIOS

def failing():
    made = planted(users=16)
    def accuracy(users, masks):
        if (users >= 12).any():
            threads = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
            raise FloatingPointError(f"it is too hot for {threads}; cool it.")
        return made.oracle._accuracy(users, masks)
    return replace(made, oracle=FormulaOracle(made.oracle.costs, accuracy))

SCENARIOS.register("failing", "failing_plugin:failing")
envs.register("me/Failing-v0", entry_point="envs.planted:PlantedEnv", scenario="failing")
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "failing_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "failing_plugin:me/Failing-v0"
    from envs.scenario import SCENARIOS

    SCENARIOS.unregister("failing")
    gym.registry.pop("me/Failing-v0")
    del envs.MINIATURES["me/Failing-v0"]


def test_what_goes_wrong_in_a_worker_is_told_with_cause_and_cure(plugin, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    told = refusal("--env", plugin, "--out", tmp_path / "t", "--processes", 2)
    assert told.startswith("error: test users 0 to 3 could not be measured: FloatingPointError: it is too hot for (1, '1')")
    assert "cool it. Finished shards are kept" in told
    assert not exists(tmp_path / "t") and exists(tmp_path / "t-unfinished" / "content")


# Other content.


MADE_OF = {"users": "u", "backbone": "b", "meta-initialisation": "m", "placement": "inline"}


@pytest.fixture
def made_of(monkeypatch):
    """Let the planted users be said to be made of something."""

    def say(**changes):
        parts = MADE_OF | {name.replace("_", "-"): value for name, value in changes.items()}
        scenario = replace(planted(users=16), made_of=parts, fingerprint="-".join(parts.values()))
        monkeypatch.setattr(Source, "scenario", lambda self: scenario)

    say()
    return say


SAYS = {
    "users": {"users": "other"},
    "backbone": {"backbone": "other"},
    "meta-initialisation": {"meta_initialisation": "other"},
    "placement": {"placement": "side"},
    "precision": {"precision": "bfloat16"},
    "masks": {},
    "environment": {},
    "format version": {},
}


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "unfinished"])
@pytest.mark.parametrize("name", SAYS)
def test_other_content_is_refused_by_name_and_overwritten_when_asked(
    name, complete, made_of, tmp_path, stop_after, monkeypatch
):
    out, flags = tmp_path / "t", ["--env", "dsa/Planted-v0"]
    stop_after(None if complete else 2)
    if complete:
        main([*PLANTED, "--out", str(out)])
    else:
        refusal(*PLANTED, "--out", out)
    stop_after(None)
    made_of(**SAYS[name])
    if name == "masks":
        flags += ["--masks", "20"]
    if name == "environment":
        monkeypatch.setitem(gym.registry, "me/Other-v0", gym.registry["dsa/Planted-v0"])
        flags = ["--env", "me/Other-v0"]
    if name == "format version":
        monkeypatch.setattr(tables, "VERSION", 2)
    told = refusal(*flags, "--processes", 1, "--out", out)
    assert f"{name} " in told
    assert "--overwrite" in told
    for other in {*SAYS, "observations"} - {name}:
        assert f" {other} (" not in told
    main([*flags, "--processes", "1", "--out", str(out), "--overwrite"])
    first = stop_after(0)
    main([*flags, "--processes", "1", "--out", str(out)])  # nothing to do
    assert not first and not (tmp_path / "t-unfinished").exists()


def test_other_observations_of_the_same_users_are_refused(made_of, tmp_path, monkeypatch):
    main([*PLANTED, "--out", str(tmp_path / "t")])
    scenario = replace(planted(users=16), made_of=MADE_OF, fingerprint="other-embedding")
    monkeypatch.setattr(Source, "scenario", lambda self: scenario)
    assert "other content: observations (u-b-m-inline, not other-embedding)" in refusal(*PLANTED, "--out", tmp_path / "t")


def test_unfinished_work_survives_an_overwriting_run_that_was_interrupted(made_of, tmp_path, stop_after):
    arguments = [*PLANTED, "--out", str(tmp_path / "t"), "--overwrite"]
    main(arguments)
    made_of(users="other")
    first = stop_after(4)
    refusal(*arguments)
    second = stop_after(None)
    main(arguments)
    assert not {*first} & {*second}
    assert PathwayTable.load(tmp_path / "t").made_of["users"] == "other"


def test_a_folder_of_something_else_is_not_taken_for_unfinished_work(tmp_path):
    (tmp_path / "t-unfinished").mkdir()
    (tmp_path / "t-unfinished" / "letter.txt").write_text("dear")
    told = refusal(*PLANTED, "--out", tmp_path / "t")
    assert "letter.txt" in told and "--overwrite" in told
    assert (tmp_path / "t-unfinished" / "letter.txt").exists()


def test_what_cannot_be_asked_for_is_refused(tmp_path, capsys):
    assert "unknown environment 'dsa/Plantd-v0'. Did you mean 'dsa/Planted-v0'" in refusal(
        "--env", "dsa/Plantd-v0", "--out", tmp_path / "t"
    )
    assert "no argument 'cost_weight'" in refusal("--env", "dsa/Planted-v0", "--out", "t", "--env-kwargs", "cost_weight:1")
    refusal(*PLANTED, "--out", tmp_path / "t", "--processes", 0)
    assert "--processes must be at least 1, got 0" in capsys.readouterr().err

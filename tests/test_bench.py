"""The benchmark's sections in miniature: what they count and compare, never how long it took."""

import json
import os
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import envs
from envs.tabulate import main as tabulate
from eval.bench import __main__ as bench
from eval.bench import clock, masks, private, scale
from eval.bench.ours import live_of, new_masks, scenario_of, some_train_users, uncached

pytest.importorskip("peft", reason="needs the extra `bench`")

from stable_baselines3.common.env_checker import check_env

from eval.bench import accuracy, env
from eval.bench.env_table import claims, env_table
from eval.bench.rival import chosen_rate, task_of, usual, usual_env
from eval.bench.usual import GatedLora

LITTLE = {"meta_steps": 2, "meta_users": 4, "pretrain_epochs": 1, "train_users": 12, "val_users": 4, "test_users": 4}
FEW = env.Sizes(
    num_envs=4,
    usual=2,
    repeats=2,
    live=2,
    seen=2,
    tabular=2,
    policy=64,
    rival=1,
    rate_users=2,
    test_users=2,
    masks=2,
    matrices=(64,),
)


@pytest.fixture(scope="module")
def scenario():
    return scenario_of("dsa/DigitsResNet-v0", LITTLE)


@pytest.fixture(scope="module")
def lora(scenario):
    return GatedLora(live_of(scenario).pathways.model)


@pytest.fixture(scope="module")
def one(scenario, lora):
    return usual_env(scenario, lora, user=0, rate=0.5)


def tensors_by_block(lora):
    return {block: [p.detach().clone() for p in parameters] for block, parameters in lora.parameters.items()}


def changed(lora, start):
    return [
        block
        for block, parameters in lora.parameters.items()
        if any(not torch.equal(now, then) for now, then in zip(parameters, start[block], strict=True))
    ]


# The usual way


def test_the_usual_env_passes_sb3s_check(one):
    check_env(one)


def test_every_block_has_a_lora_and_nothing_else_is_trained(scenario, lora):
    assert lora.blocks == scenario.pathways[:-1]
    known = {id(p) for parameters in lora.parameters.values() for p in parameters}
    lora.switch([1] * len(lora.blocks))
    assert {id(p) for p in lora.model.parameters() if p.requires_grad} == known


@pytest.mark.parametrize("mask", [[1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 1], [0] * 6, [1] * 6])
def test_a_step_trains_the_chosen_blocks_alone(lora, one, mask):
    lora.reset()
    start = tensors_by_block(lora)
    one.step(np.array(mask))
    assert changed(lora, start) == [block for block, on in zip(lora.blocks, mask, strict=True) if on]


def test_reset_restores_the_start_bit_for_bit_and_steps_do_not_remember(lora, one):
    lora.reset()
    start = tensors_by_block(lora)
    mask = np.array([1, 1, 0, 0, 1, 0])
    first = one.step(mask)
    one.step(np.ones(6, dtype=int))
    assert changed(lora, start) == list(lora.blocks)
    assert one.step(mask)[1:] == first[1:]
    lora.reset()
    assert changed(lora, start) == []


def test_with_every_block_off_the_usual_way_is_the_population_model(scenario, one):
    live = live_of(scenario)
    found = live.evaluate(np.array([0]), np.zeros((1, 7), dtype=bool))
    *_, info = one.step(np.zeros(6, dtype=int))
    assert info["accuracy"] == pytest.approx(found.accuracy[0])
    assert one.step(np.zeros(6, dtype=int))[1] == info["accuracy"]


def test_training_lowers_the_loss_on_the_support(lora, one):
    def loss():
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(lora.model(one.support.inputs), one.support.labels).item()

    lora.reset()
    before = loss()
    one.step(np.ones(6, dtype=int))
    assert loss() < before


def test_the_frozen_model_is_left_as_it_was(scenario, lora, one):
    model = live_of(scenario).pathways.model
    before = model.fingerprint()
    one.step(np.ones(6, dtype=int))
    assert model.fingerprint() == before
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_the_usual_way_gets_ours_users_and_masks(scenario, lora):
    some = some_train_users(scenario, 4)
    way = usual(some, lora, 4, 0.1)
    theirs, chosen = way.begin(repeat=3)
    users = live_of(scenario).population.users
    for single, user in zip(theirs.envs, users[:4], strict=True):
        assert torch.equal(single.support.labels, user.support.labels)
        assert torch.equal(single.measured.labels, user.validation.labels)
    ours, first = uncached(some, live_of(scenario), 4, 1).begin(repeat=3)
    assert np.array_equal(chosen(), first()[:, :-1])
    assert set(ours.core.users) <= set(range(4))


def test_the_usual_way_takes_the_next_users_in_every_repeat(scenario, lora):
    way = usual(some_train_users(scenario, 5), lora, 2, 0.1)
    users = live_of(scenario).population.users
    for repeat, first in enumerate((0, 2, 0)):
        vec, _ = way.begin(repeat)
        assert [single.support.labels.tolist() for single in vec.envs] == [
            user.support.labels.tolist() for user in users[first : first + 2]
        ]


def test_the_learning_rate_that_is_chosen_is_the_best_of_val_users(scenario, lora, monkeypatch):
    asked = []

    def known(of, lora, users, rate):
        asked.append(tuple(users))
        return -abs(rate - 0.3)

    monkeypatch.setattr("eval.bench.rival.usual_accuracy", known)
    assert chosen_rate(scenario, lora, (0.1, 0.3, 1.0), users=2) == 0.3
    assert set(asked) == {tuple(scenario.users("val")[:2].tolist())}


def test_texts_get_a_lora_in_every_attention_and_the_correction_of_cross_fitting(real_data):
    texts = scenario_of("dsa/PopquornBert-v0", envs.MINIATURES["dsa/PopquornBert-v0"])
    live, lora = live_of(texts), GatedLora(live_of(texts).pathways.model)
    assert lora.blocks == ("layer0.attention", "layer1.attention")
    user = live.population.users[0]
    task = task_of(live.data, user.support)
    frozen = live.data.table.sites[-1][user.support.inputs]
    logits = torch.nn.functional.linear(frozen, live.pathways.model.weight, live.pathways.model.bias)
    expected = logits + live.data.table.offset[user.support.inputs]
    lora.switch([0, 0])
    assert torch.allclose(lora.model(task.inputs) + task.offset, expected, atol=1e-4)


# Clocks


def test_all_new_masks_are_new(scenario):
    vec, _ = uncached(some_train_users(scenario, 2), live_of(scenario), 4, 1).begin(0)
    draw, seen = new_masks(vec, 0), set()
    for _ in range(20):
        for user, mask in zip(vec.core.users, draw(), strict=True):
            assert (user, mask.tobytes()) not in seen
            seen.add((user, mask.tobytes()))


def test_ways_take_turns_and_none_is_left_out():
    order = []

    class Env:
        num_envs = 3

        def __init__(self, name):
            self.name = name

        def step(self, chosen):
            order.append(self.name)

    ways = {name: clock.Way(lambda repeat, name=name: (Env(name), lambda: np.zeros((3, 2))), 1) for name in "abc"}
    found = clock.alternating(ways, repeats=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert all(spread.least <= spread.median <= spread.most for spread in found.values())


def test_a_product_of_matrices_counts_two_operations_per_multiply_add():
    left, right = torch.randn(3, 4), torch.randn(4, 5)
    assert clock.flops_of(lambda: left @ right) == 2 * 3 * 4 * 5
    assert clock.peak_flops(torch.float32, sizes=(8,), tries=1) > 0


def test_memory_is_counted_in_bytes():
    assert 1e7 < clock.peak_memory() < 1e12


# Sections


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    table = tmp_path_factory.mktemp("table") / "planted"  # any table will do: its speed is that of a lookup
    tabulate(["--env", "dsa/Planted-v0", "--out", str(table), "--processes", "1"])
    given = {"dsa/PopquornBert-v0": {"data_root": "/nowhere"}, "dsa/Tabular-v0": {"table": str(table)}}
    return env.measure_envs({"dsa/DigitsResNet-v0": LITTLE, **given}, FEW)


def test_the_env_section_reports_every_way_and_names_what_was_left_out(measured):
    assert measured["left_out"] == ["dsa/PopquornBert-v0"]
    part = json.loads(json.dumps(measured))["environments"]["dsa/DigitsResNet-v0"]
    assert set(part["steps_per_second"]) == {"usual", "unbatched", "live", "live_bfloat16", "cached", "tabular"}
    assert part["users"] == 4 and part["gradient_steps"] == 3 and part["placement"] == "inline"
    assert part["flops_per_step"]["usual"] > 0 and part["flops_per_step"]["live"] > 0
    assert part["training"]["usual_extrapolated"] > part["training"]["live"] - part["training"]["live_oracle"]
    assert part["training"]["tabular"] > 0
    assert part["usual_learning_rate"] in env.RATES


def test_the_env_table_names_every_way_and_says_what_is_extrapolated(measured):
    text = env_table(measured)
    for words in ("PEFT LoRA", "one user at a time", "in bfloat16", "(extrapolated)", "`dsa/PopquornBert-v0` was left out"):
        assert words in text
    assert "/nowhere" not in text


def test_a_claim_that_is_missed_is_called_missed(measured):
    part = json.loads(json.dumps(measured["environments"]["dsa/DigitsResNet-v0"]))
    part["steps_per_second"]["live"]["median"] = 2.9 * part["steps_per_second"]["usual"]["median"]
    words, value, least = claims(part)[0]
    assert (words, least) == ("live against the usual way", 3.0) and value == pytest.approx(2.9)
    text = env_table({**measured, "environments": {"dsa/DigitsResNet-v0": part}})
    assert "| live against the usual way | 2.9 | 3 | **missed** |" in text


def test_bfloat16_is_compared_on_the_same_pairs(scenario):
    found = accuracy.compare_precisions(some_train_users(scenario, 3), masks=4)
    assert found["pairs"] == 12
    assert abs(found["mean"]) <= found["mean_absolute"] < 0.1


def test_an_environment_that_is_not_optional_is_not_left_out():
    with pytest.raises(ValueError, match="no_such_argument"):
        env.measure_envs({"dsa/DigitsResNet-v0": {"no_such_argument": 1}}, FEW)


def test_operations_fall_with_a_later_first_active_pathway_and_all_off_costs_nothing():
    found = masks.measure_masks(users=3, repeats=1)
    for part in found.values():
        after = [row["and_after"]["flops"] for row in part["by_first"]]
        assert all(early > late for early, late in pairwise(after))
        density = [row["flops"] for row in part["by_density"]]
        assert density[0] == 0 and density[-1] == after[0] == max(density)
    alone = [row["alone"]["flops"] for row in found["inline"]["by_first"]]
    assert all(early > late for early, late in pairwise(alone))
    assert "| `layer1.0` |" in masks.masks_table(found)


def test_masks_of_a_density_have_that_many_bits():
    assert set(masks.fixed_density(20, 7, 3).sum(1)) == {3}
    assert len(np.unique(masks.fixed_density(20, 7, 3), axis=0)) > 5


def test_the_scale_section_measures_a_size_in_a_process_of_its_own():
    little = {name: value for name, value in LITTLE.items() if name != "train_users"}
    before = torch.get_num_threads(), os.environ["DSA_CACHE"]
    (row,) = scale.measure_scale((8,), scale.Load(num_envs=2, steps=4, env_kwargs=little))
    assert (torch.get_num_threads(), os.environ["DSA_CACHE"]) == before
    assert row["users"] == 8 and row["seen_before_ms"] > 0 and 0.05 < row["peak_memory_gb"] < 100


def test_the_scale_table_compares_the_most_users_with_the_fewest():
    row = {"first_sight_ms": 9.0, "peak_memory_gb": 1.0, "seconds_to_make": 2.0}
    text = scale.scale_table([{**row, "users": 100, "seen_before_ms": 4.0}, {**row, "users": 2000, "seen_before_ms": 5.0}])
    assert "| 2,000 | 5.0 ms | 9.0 ms | 1.00 GB | 2.0 |" in text
    assert "A step costs 1.25 times as much with 2,000 users as with 100; at first sight 1.00 times." in text


def test_the_same_users_are_stepped_twice(scenario):
    vec, draw = uncached(scenario, live_of(scenario), 2, 1).begin(0)
    seen = []
    step = vec.step
    vec.step = lambda chosen: (seen.append(vec.core.users.tolist()), step(chosen))[1]
    scale.seconds_twice(vec, draw, steps=2)
    assert seen[:2] == seen[2:] and len(seen) == 4


def test_the_command_writes_the_page_and_the_figures(tmp_path, monkeypatch, capsys):
    row = {"on": 1, "pathways": 7, "flops": 2.5e6, "milliseconds": 3.0}
    monkeypatch.setattr(bench, "measure_masks", lambda: {"inline": {"users": 2, "by_density": [row], "by_first": []}})
    page = tmp_path / "page.md"
    begin, end = bench.markers("masks")
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    bench.main(["masks", "--num-threads", "1", "--write", str(page), "--json", str(tmp_path / "out.json")])
    text = page.read_text()
    assert (
        "old" not in text
        and "| 1 of 7 | 2.50 | 3.0 |" in text
        and text.endswith("after\n")
        and "Written by `python -m eval.bench masks`." in text
    )
    assert json.loads((tmp_path / "out.json").read_text())["inline"]["users"] == 2
    assert str(tmp_path) not in text


def test_without_peft_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install -e '\.\[bench\]'"):
        bench.main(["env", "--num-threads", "1"])


def test_the_pages_of_the_repository_have_a_place_for_every_section():
    docs = Path(bench.__file__).parents[2] / "docs"
    for section in bench.SECTIONS:
        page = (docs / ("privacy.md" if section == "private" else "performance.md")).read_text()
        assert all(marker in page for marker in bench.markers(section))


def test_private_rounds_are_measured_against_plain_ones():
    found = private.measure_private(1, sizes=(12,), expected={"inline": 6, "side": 6})
    assert {*found["milliseconds"]["side"]} == {"plain", "private"} and found["bytes"]["side, 12"] > 1e7
    text = private.private_table(found)
    assert text.splitlines()[5].startswith("| inline, plain | 6 | ") and text.splitlines()[5].endswith("| 1.00 |")
    assert "| side, private | 6 | " in text and "| inline, 12 | " in text


def test_short_calls_are_repeated_for_as_long_as_asked():
    made = {"one": 0, "other": 0}

    def calls(name):
        def call():
            made[name] += 1
            time.sleep(0.001)

        return call

    ways = {name: calls(name) for name in made}
    assert set(clock.alternating_calls(ways, 3)) == set(made)
    assert made == {"one": 4, "other": 4}
    start = time.perf_counter()
    clock.alternating_calls(ways, 1, seconds=0.05)
    assert time.perf_counter() - start >= 0.05 and made["one"] == made["other"] > 6

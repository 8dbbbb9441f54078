"""Cost weights: numbers and ranges, what a core draws and shows, policies for every budget, and weights moved to a target."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from graded import PATHWAYS, best_share, graded, optimum
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents import evaluate, train_ppo
from agents.callbacks import BestOnVal, Curves, DualAscent
from agents.checkpoint import choose_masks, choose_plans, load_policy
from agents.run import RunConfig
from backbones.artefacts import load_artefact
from envs.core import PathwaySelection
from envs.cost_weights import CostWeight
from envs.planted import planted
from envs.rules import Rules
from envs.sb3 import make_sb3

RANGE = "uniform:0:0.4"
QUIET = ["--no-progress", "--num-threads", "1"]
SLOTS = np.arange(3)


# Numbers and ranges.


@pytest.mark.parametrize(
    ("given", "low", "high"),
    [
        (0.1, 0.1, 0.1),
        (0, 0, 0),
        ("0.1", 0.1, 0.1),
        ("1e-3", 0.001, 0.001),
        ("uniform:0:0.3", 0, 0.3),
        ("uniform:0.05:2", 0.05, 2),
        ("uniform:0.2:0.2", 0.2, 0.2),
    ],
)
def test_a_cost_weight_is_a_number_or_a_range(given, low, high):
    weight = CostWeight.parse(given)
    assert (weight.low, weight.high, weight.varies) == (low, high, low < high)
    assert CostWeight.parse(weight) is weight
    assert CostWeight.parse(weight.given()) == weight


@pytest.mark.parametrize("given", ["uniform:0.123456789:0.3", "uniform:0:0.1234567", 1 / 3, "uniform:1e-07:1"])
def test_what_is_given_back_is_exactly_what_was_given(given):
    assert CostWeight.parse(CostWeight.parse(given).given()) == CostWeight.parse(given)
    assert CostWeight.parse("uniform:0:0.3").given() == "uniform:0:0.3"


@pytest.mark.parametrize(
    "given", ["", "much", "uniform", "uniform:0", "uniform:0:0.1:0.2", "uniform:a:b", "normal:0:1", None, [0.1], "uniform:0.1:"]
)
def test_what_is_no_cost_weight_is_refused_with_an_example(given):
    with pytest.raises(ValueError, match=r"cost_weight must be a number such as 0.1, or uniform:0:0.3; got"):
        CostWeight.parse(given)


@pytest.mark.parametrize(
    "given",
    [-0.1, "-0.1", "nan", "inf", "uniform:-0.1:0.3", "uniform:0.3:0.1", "uniform:0:inf", "uniform:nan:1", "uniform:0:nan"],
)
def test_impossible_weights_are_refused(given):
    with pytest.raises(ValueError, match=r"cost_weight must be finite and at least 0 .* a range from low to high; got"):
        CostWeight.parse(given)


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        (0.07, (0.07,)),
        ("uniform:0:0.3", (0.05, 0.1, 0.2)),
        ("uniform:0.1:0.2", (0.1, 0.2)),
        ("uniform:0:0.08", (0.05,)),
        ("uniform:1:2", (1, 1.5, 2)),
    ],
)
def test_reports_are_made_at_the_usual_weights_of_the_range(given, weights):
    assert CostWeight.parse(given).reported() == weights


def test_rules_survive_json():
    rules = Rules("uniform:0:0.3", rounds=2, layerwise=True)
    assert Rules.from_json(json.loads(json.dumps(rules.to_json()))) == rules


@pytest.mark.parametrize(("wrong", "words"), [({"cost_weight": "much"}, "cost_weight must"), ({"rounds": 0}, "whole number")])
def test_impossible_rules_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        Rules(**wrong)


# What a core draws and shows.


def started(cost_weight=RANGE, slots=3, **kwargs):
    made = PathwaySelection(planted(), "train", cost_weight, kwargs.pop("rounds", 1), slots, **kwargs)
    for slot in range(slots):
        made.seed(slot, 100 + slot)
    made.reset(np.arange(slots))
    return made


def drawn(core, episodes, slots=SLOTS):
    """Cost weights ``[episodes, slots]`` of the episodes that follow."""
    return np.array([[info["cost_weight"] for info in core.reset(slots)] for _ in range(episodes)])


def test_weights_are_uniform_on_the_range():
    weights = drawn(started("uniform:0.1:0.3"), 1000)
    counts = np.histogram(weights, bins=10, range=(0.1, 0.3))[0]
    assert counts.sum() == weights.size
    assert counts.min() > 240
    assert np.abs(np.corrcoef(weights.T) - np.eye(3)).max() < 0.1


def test_users_meet_another_weight_on_every_lap():
    core = started(slots=1)
    core.seed(0, 100)
    laps = [{info["user"]: info["cost_weight"] for info in (core.reset(SLOTS[:1])[0] for _ in range(200))} for _ in range(2)]
    assert all(laps[0][user] != laps[1][user] for user in laps[0])


def test_the_weights_of_a_slot_do_not_depend_on_the_others():
    assert drawn(started(slots=1), 250, SLOTS[:1])[:, 0].tolist() == drawn(started(slots=3), 250)[:, 0].tolist()


def test_a_range_of_weights_does_not_change_the_order_of_users():
    ranged, fixed = started(), started(0.1)
    for _ in range(5):
        assert [i["user"] for i in ranged.reset(SLOTS)] == [i["user"] for i in fixed.reset(SLOTS)]


def test_every_slot_is_paid_by_its_own_weight():
    core = started()
    masks = np.random.default_rng(0).integers(0, 2, (3, PATHWAYS))
    shown = core.observe(SLOTS)["cost_weight"]
    found = core.step(SLOTS, masks)
    assert shown.dtype == np.float32
    for slot, info in enumerate(found.infos):
        assert shown[slot] == [np.float32(info["cost_weight"])]
        assert found.rewards[slot] == pytest.approx(info["accuracy"] - info["cost_weight"] * masks[slot].mean(), abs=1e-12)
    assert len(set(shown[:, 0].tolist())) == 3


def test_the_weight_stays_the_same_through_an_episode():
    core = started(rounds=3)
    before = core.observe(SLOTS)["cost_weight"]
    for _ in range(2):
        core.step(SLOTS, np.ones((3, PATHWAYS)))
        np.testing.assert_array_equal(core.observe(SLOTS)["cost_weight"], before)


def test_a_restored_state_goes_on_with_the_same_weights():
    first, second = started(rounds=2), PathwaySelection(planted(), "train", RANGE, 2, 3)
    first.step(SLOTS, np.ones((3, PATHWAYS)))
    second.restore(json.loads(json.dumps(first.state())))
    steps = [core.step(SLOTS, np.eye(PATHWAYS)[:3]) for core in (first, second)]
    np.testing.assert_array_equal(steps[0].rewards, steps[1].rewards)
    np.testing.assert_equal(steps[0].infos, steps[1].infos)
    np.testing.assert_array_equal(drawn(first, 250), drawn(second, 250))


def test_a_weight_asked_for_takes_no_place_in_the_sequence():
    plain, asked = started(slots=1), started(slots=1)
    one = SLOTS[:1]
    expected = plain.reset(one) + plain.reset(one)
    first = asked.reset(one, [{"cost_weight": 0.25}])
    assert first == [expected[0] | {"cost_weight": 0.25}]
    assert asked.reset(one) == expected[1:]


def test_user_and_weight_may_be_asked_for_together():
    core = started(slots=2)
    asked = [{"user": "user-7", "cost_weight": 0.3}, {"user": 3}]
    infos = core.reset(SLOTS[:2], asked)
    assert (infos[0]["user"], infos[0]["cost_weight"], infos[1]["user"]) == ("user-7", 0.3, "user-3")
    assert 0 <= infos[1]["cost_weight"] <= 0.4
    again = started(slots=2).reset(SLOTS[:2], asked)
    assert again == infos


def test_every_episode_with_a_user_asked_for_has_a_weight_of_its_own():
    core, other = started(slots=1), started(slots=1)
    asked = [core.reset(SLOTS[:1], [{"user": user}])[0]["cost_weight"] for user in range(6)]
    assert len(set(asked)) == 6
    for user in range(3):
        other.reset(SLOTS[:1], [{"user": user}])
    resumed = started(slots=1)
    resumed.restore(other.state())
    assert [resumed.reset(SLOTS[:1], [{"user": user}])[0]["cost_weight"] for user in range(3, 6)] == asked[3:]


@pytest.mark.parametrize("weight", [-0.01, 0.41, float("nan")])
def test_a_weight_outside_of_the_range_is_refused(weight):
    core = started()
    with pytest.raises(
        ValueError, match=r"is outside uniform:0:0\.4; make the environment \(or train the policy\) with a range"
    ):
        core.reset(SLOTS[:1], [{"cost_weight": weight}])
    with pytest.raises(ValueError, match="is outside"):
        core.place(SLOTS, weight)


def test_the_sb3_shell_takes_a_weight_per_slot():
    vec = make_sb3("dsa/Planted-v0", 3, cost_weight=RANGE)
    vec.set_options([{"cost_weight": 0.1}, {}, {"cost_weight": 0.3, "user": 5}])
    shown = vec.reset()["cost_weight"][:, 0].tolist()
    assert shown[0::2] == pytest.approx([0.1, 0.3])
    assert vec.reset_infos[2]["user"] == "user-5"


# Policies.


def train(folder, *arguments):
    train_ppo.main(["--env", "dsa/Planted-v0", *arguments, "-f", str(folder), *QUIET])
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def on_graded():
    """Runs find the graded problem in place of the planted one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunConfig, "scenario", lambda *args: graded())
        yield


@pytest.fixture(scope="module")
def conditioned(on_graded, tmp_path_factory):
    """A policy for every budget."""
    folder = tmp_path_factory.mktemp("weights") / "conditioned"
    train(folder, "--cost-weight", RANGE, "-n", "8192", "--eval-freq", "2048")
    return folder


def tags_of(folder):
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {name: events.Scalars(name) for name in events.Tags()["scalars"]}


def test_one_policy_serves_every_budget(conditioned):
    weights = (0.1, 0.2, 0.3)
    found = evaluate.evaluate_run(conditioned, weights)["by_cost_weight"]
    rows = [found[f"{weight:g}"]["methods"]["ppo"] for weight in weights]
    for weight, row in zip(weights, rows, strict=True):
        assert row["reward"] >= 0.9 * optimum(weight)
        assert row["active_fraction"] == pytest.approx(best_share(weight), abs=0.1)
    assert found["0.3"]["methods"]["best_static"]["reward"] <= 0 < optimum(0.3)


def test_the_masks_change_with_the_weight_that_is_shown(conditioned):
    scenario = graded()
    policy, meta = load_policy(conditioned / "policy", scenario)
    assert Rules.from_json(meta["rules"]) == Rules(RANGE)
    shares = [choose_masks(policy, scenario, scenario.users("test"), weight).mean() for weight in (0.0, 0.1, 0.2, 0.3, 0.4)]
    assert (np.diff(shares) < -0.05).all()


def test_the_summary_and_the_files_hold_every_reported_weight(conditioned):
    summary = json.loads((conditioned / "summary.json").read_text())
    assert [*summary["by_cost_weight"]] == ["0.05", "0.1", "0.2"]
    assert (summary["cost_weight"], summary["trained_for"]) == (0.1, RANGE)
    assert summary["test"] == summary["by_cost_weight"]["0.1"]
    assert {path.name for path in conditioned.glob("users*.csv")} == {"users.csv", "users_at_0.05.csv", "users_at_0.2.csv"}
    assert (conditioned / "table.md").read_text().count("\n| ppo |") == 3


def test_the_curves_show_every_reported_weight(conditioned):
    tags = tags_of(conditioned)
    each = [np.array([event.value for event in tags[f"val_users/reward_at_{w}"]]) for w in ("0.05", "0.1", "0.2")]
    np.testing.assert_allclose([event.value for event in tags["val_users/reward"]], np.mean(each, axis=0), atol=1e-6)
    _, meta = load_artefact(conditioned / "policy", "gating policy")
    assert meta["val_reward"] == pytest.approx(np.mean(each, axis=0).max(), abs=1e-6)


def test_evaluating_at_certain_weights_leaves_the_files_as_they_are(conditioned, capsys):
    before = {path.name: path.read_bytes() for path in conditioned.iterdir() if path.is_file()}
    evaluate.main([str(conditioned), "--cost-weight", "0.15", "0.35", "--num-threads", "1"])
    told = capsys.readouterr().out
    assert "reward at cost weight 0.15" in told
    assert "reward at cost weight 0.35" in told
    assert {path.name: path.read_bytes() for path in conditioned.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("weight", ["0.5", "-0.1", "nan"])
def test_a_policy_is_not_measured_at_weights_that_it_never_met(conditioned, weight):
    with pytest.raises(SystemExit, match=f"error: cost weight {weight} is outside uniform:0:0.4"):
        evaluate.main([str(conditioned), "--cost-weight", weight, "--num-threads", "1"])


def test_a_policy_for_a_range_must_be_told_the_weight(conditioned):
    scenario = graded()
    policy, _ = load_policy(conditioned / "policy", scenario)
    with pytest.raises(ValueError, match=r"trained for cost weights uniform:0:0\.4; say at which"):
        choose_plans(policy, scenario, scenario.users("test"), Rules(RANGE))


# Stopping and going on.

SHORT = ["-n", "2048", "--eval-freq", "1024"]
UNIFORM = [*SHORT, "--cost-weight", RANGE, "-P", "n_steps:7", "-P", "batch_size:64", "--env-kwargs", "rounds:2"]
"""Rollouts end in the middle of episodes, each at a weight of its own."""
TARGET = [*SHORT, "--target-active", "0.5", "-P", "n_steps:4"]


@pytest.mark.parametrize("arguments", [UNIFORM, TARGET], ids=["uniform", "target"])
def test_a_run_that_was_stopped_goes_on_to_the_very_same_end(on_graded, tmp_path, monkeypatch, arguments):
    train(tmp_path / "whole", *arguments)
    step, at = Curves._on_step, [1400, 600]

    def interrupted(self):
        if at and self.num_timesteps >= at[-1]:
            at.pop()
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Curves, "_on_step", interrupted)
    for flags in (["--env", "dsa/Planted-v0", *arguments, "-f"], ["--resume"]):
        with pytest.raises(SystemExit, match="interrupted"):
            train_ppo.main([*flags, str(tmp_path / "parts"), *QUIET])
    train_ppo.main(["--resume", str(tmp_path / "parts"), *QUIET])
    (tensors, meta), (others, theirs) = (
        load_artefact(tmp_path / n / "checkpoint", "training checkpoint") for n in ("whole", "parts")
    )
    assert meta == theirs
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])] == []
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "parts")]
    assert summaries[0]["by_cost_weight"] == summaries[1]["by_cost_weight"]


# Weights moved to a target.


@pytest.fixture(scope="module")
def targeted(on_graded, tmp_path_factory):
    """Runs by target, each from a cost weight of .1, at which seven of eight pathways are worth it."""
    made = {}
    # One look, at the end: an earlier one may meet the target in passing, where the weight has overshot.
    quick = ["-n", "10240", "-P", "n_steps:4", "-P", "n_epochs:4", "--eval-freq", "10240"]

    def get(target):
        if target not in made:
            folder = tmp_path_factory.mktemp("weights") / "targeted"
            made[target] = folder, train(folder, "--target-active", str(target), *quick)
        return made[target]

    return get


@pytest.mark.parametrize("target", [0.25, 0.5])
def test_the_cost_weight_moves_until_the_share_of_pathways_is_met(targeted, target):
    _, summary = targeted(target)
    row = summary["test"]["methods"]["ppo"]
    assert row["active_fraction"] == pytest.approx(target, abs=0.05)
    assert best_share(summary["cost_weight"]) == pytest.approx(target, abs=0.13)  # a pathway more or less
    assert row["reward"] >= 0.8 * optimum(summary["cost_weight"])


def test_a_lower_target_takes_a_higher_weight(targeted):
    (folder, few), (_, many) = targeted(0.25), targeted(0.5)
    assert few["cost_weight"] > many["cost_weight"] > 0.15
    assert few["trained_for"] == 0.1
    curve = [event.value for event in tags_of(folder)["train_users/cost_weight"]]
    assert curve[0] < 0.2 < max(curve)
    assert few["cost_weight"] in [pytest.approx(value, abs=1e-6) for value in curve]


class Fixed(DualAscent):
    """With a policy of a given active fraction."""

    def __init__(self, core, target):
        super().__init__(core.scenario, core, target, rate=0.5)
        self.model, self.num_timesteps = type("Model", (), {"policy": None, "logger": self})(), 0

    def record(self, name, value):
        self.recorded = {name: value}


def test_the_weight_rises_by_rate_times_excess_and_never_below_zero(monkeypatch):
    core = started(0.1)
    masks = np.zeros((10, 8), dtype=bool)
    masks[:, :6] = True
    monkeypatch.setattr("agents.callbacks.choose_masks", lambda *args, **kwargs: masks)
    ascent = Fixed(core, 0.25)
    ascent._on_rollout_start()
    assert core.cost_weight.low == 0.1  # nothing was learned yet
    ascent.num_timesteps = 512
    ascent._on_rollout_start()
    assert core.cost_weight == CostWeight(0.35, 0.35)
    assert ascent.recorded == {"train_users/cost_weight": 0.35}
    masks[:] = False
    for timesteps in range(513, 519):
        ascent.num_timesteps = timesteps
        ascent._on_rollout_start()
    assert core.cost_weight == CostWeight(0.0, 0.0)
    assert [info.get("cost_weight") for info in core.reset(SLOTS)] == [None] * 3  # a weight that moves is not shown


def judge(best, distance):
    """What keeps the policy that meets a target, after one of some rewards and distance."""
    found = BestOnVal(None, 0.0, planted(), started(0.1), Rules(), 1, None, {}, target=0.5)
    found.best, found.best_distance = np.array(best), distance
    return found


def test_the_policy_kept_is_first_near_the_target_and_then_accurate():
    rewards = np.array([0.5, 0.7])
    assert judge(rewards, 0.1)._is_better(rewards - 0.4, 0.05)
    assert not judge(rewards, 0.05)._is_better(rewards + 0.4, 0.1)
    assert judge(rewards, 0.05)._is_better(rewards + 0.01, 0.05)
    assert not judge(rewards, 0.05)._is_better(rewards - 0.01, 0.05)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target-active", "0"], "target_active is a share of the pathways, above 0 and at most 1; got 0.0"),
        (["--target-active", "1.5"], "above 0 and at most 1; got 1.5"),
        (["--target-active", "nan"], "above 0 and at most 1; got nan"),
        (["--target-active", "0.5", "--cost-weight", RANGE], "give one number as cost_weight to start from, no range"),
        (["--cost-weight", "uniform:0.3:0"], "a range from low to high"),
        (["--cost-weight", "uniform:0"], "uniform:0:0.3; got 'uniform:0'"),
    ],
)
def test_mistakes_are_refused_and_leave_no_run(tmp_path, arguments, words):
    with pytest.raises(SystemExit, match=f"error: .*{words}"):
        train(tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()

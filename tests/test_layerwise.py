"""One pathway per step: what the core pays and shows, the policy that decides by turn, and learning with it."""

import json
import os
import signal
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor

import envs
from agents import evaluate, train_ppo
from agents.callbacks import Curves
from agents.checkpoint import choose_masks, choose_plans, load_policy
from agents.policies import POLICIES
from agents.run import RunConfig
from backbones.artefacts import load_artefact
from envs.core import GATE, PathwaySelection
from envs.oracles import Oracle
from envs.planted import PATHWAYS, planted
from envs.rules import Rules
from envs.sb3 import PathwaySelectionVecEnv, make_sb3

QUIET = ["--no-progress", "--num-threads", "1"]
SLOTS = np.arange(3)
LAYERWISE = Rules(layerwise=True)


class CountingOracle(Oracle):
    """Notes the plans of every call."""

    def __init__(self, inner):
        self.inner, self.costs, self.calls = inner, inner.costs, []

    def measure(self, users, plans, roles):
        self.calls.append(plans.copy())
        return self.inner.measure(users, plans, roles)


def started(layerwise=True, scenario=None, **kwargs):
    settings = {"cost_weight": 0.1, "rounds": 1, "slots": 3, **kwargs}
    made = PathwaySelection(scenario or planted(), "train", **settings, layerwise=layerwise)
    for slot in range(settings["slots"]):
        made.seed(slot, 100 + slot)
    made.reset(np.arange(settings["slots"]))
    return made


def random_masks(*shape):
    return np.random.default_rng(0).integers(0, 2, (*shape, PATHWAYS))


# The core.


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_mask_is_worth_the_same_however_it_was_decided(rounds):
    by_turn, at_once = started(rounds=rounds), started(layerwise=False, rounds=rounds)
    for masks in random_masks(rounds, 3):
        whole = at_once.step(SLOTS, masks)
        for p in range(PATHWAYS):
            last = by_turn.step(SLOTS, masks[:, [p]])
            if p < PATHWAYS - 1:
                assert not last.rewards.any() and not last.terminated.any()
        np.testing.assert_array_equal(last.rewards, whole.rewards)
        np.testing.assert_array_equal(last.terminated, whole.terminated)
        np.testing.assert_equal(last.infos, whole.infos)
    assert last.terminated.all()


def test_the_oracle_is_asked_once_per_mask():
    oracle = CountingOracle(planted().oracle)
    core = started(scenario=replace(planted(), oracle=oracle), rounds=2)
    masks = random_masks(2, 3)
    for bits in masks.transpose(0, 2, 1).reshape(-1, 3, 1):
        core.step(SLOTS, bits)
    assert [plans.shape for plans in oracle.calls] == [(3, 1, PATHWAYS), (3, 2, PATHWAYS)]
    np.testing.assert_array_equal(oracle.calls[1], masks.transpose(1, 0, 2))


def test_slots_out_of_step_are_answered_as_if_alone():
    mixed, alone = started(), started()
    masks = random_masks(3)
    for p in range(3):
        mixed.step(SLOTS[:1], masks[:1, [p]])
    rewards = np.zeros(3)
    for turn in range(PATHWAYS):
        slots = SLOTS if turn < PATHWAYS - 3 else SLOTS[1:]
        bits = np.stack([masks[s, [turn + 3 if s == 0 else turn]] for s in slots])
        rewards[slots] += mixed.step(slots, bits).rewards
    expected = [sum(alone.step(SLOTS[[s]], masks[[s], [p]][:, None]).rewards[0] for p in range(PATHWAYS)) for s in SLOTS]
    np.testing.assert_allclose(rewards, expected, atol=1e-14)
    assert (rewards != 0).all()


def test_turn_and_gates_start_anew_with_every_mask():
    core = started(rounds=2)
    ones = np.ones((3, 1))
    for step in range(2 * PATHWAYS):
        seen, p = core.observe(SLOTS), step % PATHWAYS
        assert (seen["turn"] == np.eye(PATHWAYS)[p]).all()
        assert (seen["pathways"][..., GATE] == (np.arange(PATHWAYS) < p)).all()
        core.step(SLOTS, ones)
    last = core.observe(SLOTS)
    assert (last["turn"] == np.eye(PATHWAYS)[0]).all()
    assert not last["pathways"][..., GATE].any()


def test_the_other_statistics_are_those_of_the_user():
    core = started()
    core.step(SLOTS, np.ones((3, 1)))
    shown = np.delete(core.observe(SLOTS)["pathways"], GATE, axis=2)
    np.testing.assert_array_equal(shown, np.delete(core.scenario.statistics[core.users], GATE, axis=2))


def test_a_state_restored_within_a_mask_goes_on_exactly():
    first, second = started(), PathwaySelection(planted(), "train", 0.1, 1, 3, layerwise=True)
    for bits in random_masks(3).T[:5, :, None]:
        first.step(SLOTS, bits)
    second.restore(json.loads(json.dumps(first.state())))
    for bits in random_masks(3).T[5:, :, None]:
        np.testing.assert_equal(first.observe(SLOTS), second.observe(SLOTS))
        one, other = first.step(SLOTS, bits), second.step(SLOTS, bits)
        np.testing.assert_equal(one.infos, other.infos)
    assert one.terminated.all() and (one.rewards == other.rewards).all()


@pytest.mark.parametrize("bits", [0, 2, PATHWAYS])
def test_a_whole_mask_is_refused_where_a_step_decides_one_pathway(bits):
    env = gym.make("dsa/Planted-v0", layerwise=True).unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match=f"an action is one bit; got an action of shape .{bits},"):
        env.step(np.zeros(bits, dtype=np.int8))


def test_a_step_after_the_last_pathway_is_refused():
    core = started(slots=1)
    for _ in range(PATHWAYS):
        core.step(SLOTS[:1], np.ones((1, 1)))
    with pytest.raises(RuntimeError, match=r"episode is over; call reset\(\)"):
        core.step(SLOTS[:1], np.ones((1, 1)))


def test_episodes_of_the_sb3_shell_are_as_long_as_there_are_pathways():
    vec = VecMonitor(make_sb3("dsa/DigitsResNetLayerwise-v0", 2, **envs.MINIATURES["dsa/DigitsResNetLayerwise-v0"]))
    vec.seed(0)
    vec.reset()
    for step in range(7):
        seen, _, dones, infos = vec.step(np.ones((2, 1), dtype=np.int8))
        assert dones.tolist() == [step == 6] * 2
        assert ("accuracy" in infos[0]) == (step == 6)
    assert [info["episode"]["l"] for info in infos] == [7, 7]
    assert [info["episode"]["r"] for info in infos] == pytest.approx([info["accuracy"] - 0.1 for info in infos], abs=1e-5)
    for slot, info in enumerate(infos):
        assert info["terminal_observation"]["turn"].tolist() == seen["turn"][slot].tolist() == [1, 0, 0, 0, 0, 0, 0]


# The policy.


def small_ppo(policy="GatingPolicy", **kwargs):
    env = PathwaySelectionVecEnv(planted(), num_envs=4, layerwise=True)
    return PPO(POLICIES[policy], env, n_steps=8, batch_size=16, n_epochs=1, seed=0, device="cpu", policy_kwargs=kwargs)


@pytest.mark.parametrize("policy", ["GatingPolicy", "MultiInputPolicy"])
def test_a_policy_learns_without_complaint_and_decides_whole_masks(policy):
    model = small_ppo(policy).learn(64)
    masks = choose_masks(model.policy, planted(), planted().users("val"))
    assert masks.shape == (100, PATHWAYS)
    assert masks.dtype == bool


def test_the_logit_is_the_score_of_the_pathway_whose_turn_it_is():
    policy, core = small_ppo().policy, started()
    scorer, logits = policy.mlp_extractor, []
    observation = {name: torch.as_tensor(part) for name, part in core.observe(SLOTS).items()}
    for p in range(PATHWAYS):
        observation["turn"] = torch.eye(PATHWAYS)[[p] * 3]
        with torch.no_grad():
            features = policy.extract_features(observation)
            every = scorer.score(features.unflatten(1, (PATHWAYS, -1)))[..., 0]
            logits.append(policy.get_distribution(observation).distribution.logits)
        torch.testing.assert_close(logits[-1], every[:, [p]])
    assert torch.cat(logits, 1).std() > 1e-4


def test_the_logit_depends_on_what_was_decided_before():
    policy, core = small_ppo().policy, started()
    for _ in range(3):
        core.step(SLOTS, np.ones((3, 1)))
    observation = {name: torch.as_tensor(part) for name, part in core.observe(SLOTS).items()}
    other = {name: part.clone() for name, part in observation.items()}
    other["pathways"][:, 1, GATE] = 0
    with torch.no_grad():
        one, two = (policy.get_distribution(seen).distribution.logits for seen in (observation, other))
    assert (one != two).all()


def test_plans_are_what_the_deterministic_policy_plays():
    scenario, users = planted(), planted().users("test")[:5]
    model = small_ppo().learn(256)
    core = started(slots=5)
    core.place(users)
    for _ in range(PATHWAYS):
        actions = model.predict(core.observe(np.arange(5)), deterministic=True)[0]
        infos = core.step(np.arange(5), actions).infos
    plans = choose_plans(model.policy, scenario, users, LAYERWISE)
    assert plans.shape == (5, 1, PATHWAYS)
    np.testing.assert_array_equal(plans[:, 0], [info["mask"] for info in infos])


# Runs.


def train(folder, *arguments, env="dsa/Planted-v0"):
    by_turn = ["--env-kwargs", "layerwise:true"] if env == "dsa/Planted-v0" else []
    train_ppo.main(["--env", env, *by_turn, *arguments, "-f", str(folder), *QUIET])
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run, and its summary."""
    folder = tmp_path_factory.mktemp("layerwise") / "learned"
    return folder, train(folder, "-n", "12288", "-P", "n_epochs:4")


def test_ppo_learns_the_planted_masks_one_pathway_at_a_time(learned):
    methods = learned[1]["test"]["methods"]
    assert methods["ppo"]["reward"] >= 0.85 * (1 - 0.1 / 2)
    assert methods["ppo"]["distinct_masks"] > 10
    assert methods["best_static"]["reward"] < 0.6


def test_a_loaded_policy_goes_on_deciding_by_turn(learned):
    folder, summary = learned
    policy, meta = load_policy(folder / "policy", planted())
    assert Rules.from_json(meta["rules"]) == LAYERWISE
    assert {*policy.observation_space.spaces} == {"user", "pathways", "turn"}
    assert evaluate.evaluate_run(folder)["test"]["methods"] == summary["test"]["methods"]


def test_a_run_that_was_stopped_within_masks_goes_on_to_the_very_same_end(tmp_path, monkeypatch):
    arguments = ["-n", "2048", "--eval-freq", "1024", "-P", "n_steps:5", "-P", "batch_size:160"]
    train(tmp_path / "whole", *arguments)
    step, asked = Curves._on_step, []

    def interrupted(self):
        if self.num_timesteps >= 1200 and not asked:
            asked.append(os.kill(os.getpid(), signal.SIGINT))
        return step(self)

    monkeypatch.setattr(Curves, "_on_step", interrupted)
    with pytest.raises(SystemExit, match="interrupted"):
        train(tmp_path / "parts", *arguments)
    stopped = load_artefact(tmp_path / "parts" / "checkpoint", "training checkpoint")[1]
    assert {done % PATHWAYS for done in stopped["env"]["done"]} != {0}
    train_ppo.main(["--resume", str(tmp_path / "parts"), *QUIET])
    (tensors, meta), (others, theirs) = (
        load_artefact(tmp_path / name / "checkpoint", "training checkpoint") for name in ("whole", "parts")
    )
    assert meta == theirs
    assert [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])] == []


def test_the_layerwise_digits_train_end_to_end(tmp_path):
    pairs = {**envs.MINIATURES["dsa/DigitsResNetLayerwise-v0"], "test_users": 2}
    kwargs = [word for name, value in pairs.items() for word in ("--env-kwargs", f"{name}:{value}")]
    flags = ["-n", "256", "-P", "n_envs:16", "-P", "batch_size:128", "-P", "search:false"]
    summary = train(tmp_path / "run", *flags, *kwargs, env="dsa/DigitsResNetLayerwise-v0")
    assert RunConfig.load(tmp_path / "run").rules == LAYERWISE
    assert summary["test"]["n_users"] == 2
    assert 0 <= summary["test"]["methods"]["ppo"]["accuracy"] <= 1
    assert summary["seconds_per_user"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-P", "warm_start:true"], "warm_start departs from a whole mask; pass -P warm_start:false"),
        (["--max-active", "3"], "max_active needs the scores of all pathways at once"),
    ],
)
def test_what_needs_whole_masks_is_refused(tmp_path, arguments, words):
    with pytest.raises(SystemExit, match=f"error: {words}"):
        train(tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_a_budget_is_not_put_on_a_policy_that_decides_by_turn(learned):
    with pytest.raises(SystemExit, match="error: --max-active needs a GatingPolicy that scores all pathways at once"):
        evaluate.main([str(learned[0]), "--max-active", "3", "--num-threads", "1"])


def test_a_start_is_a_whole_mask_and_refused_as_well():
    with pytest.raises(ValueError, match="start needs the scores of all pathways at once"):
        small_ppo(start=[1.0] * PATHWAYS)

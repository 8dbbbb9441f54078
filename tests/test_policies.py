"""Gating policies: any number of pathways in any order, saved and loaded, and departing from a mask."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from agents.checkpoint import choose_masks, choose_plans, load_policy, save_policy
from agents.policies import POLICIES
from backbones.artefacts import ArtefactError
from envs.core import PathwaySelection
from envs.oracles import FormulaOracle
from envs.planted import planted
from envs.rules import Rules
from envs.sb3 import PathwaySelectionVecEnv


def widened(pathways):
    """The planted users with another number of pathways."""
    scenario = planted()
    columns = np.arange(pathways) % 8
    return replace(
        scenario,
        pathways=tuple(f"pathway{p}" for p in range(pathways)),
        statistics=scenario.statistics[:, columns],
        oracle=FormulaOracle(np.full(pathways, 1 / pathways), lambda users, masks: masks.mean(1)),
        scores={name: score[:, columns] for name, score in scenario.scores.items()},
    )


def small_ppo(scenario, policy="GatingPolicy", seed=0):
    env = PathwaySelectionVecEnv(scenario, num_envs=4)
    return PPO(POLICIES[policy], env, n_steps=8, batch_size=16, n_epochs=1, seed=seed, device="cpu")


def meta_of(scenario, policy="GatingPolicy"):
    known = {"policy": policy, "policy_kwargs": {}, "pathways": list(scenario.pathways), "scenario": scenario.fingerprint}
    return known | {"rules": Rules().to_json()}


def logits_of(policy, user, pathways):
    observation = {"user": torch.as_tensor(user), "pathways": torch.as_tensor(pathways)}
    with torch.no_grad():
        return policy.get_distribution(observation).distribution.logits


def test_the_gating_policy_has_the_same_parameters_for_any_number_of_pathways():
    shapes = []
    for pathways in (5, 9):
        state = small_ppo(widened(pathways)).policy.state_dict()
        shapes.append({name: tuple(tensor.shape) for name, tensor in state.items()})
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) > 0


def test_a_gating_policy_serves_another_number_of_pathways():
    few, many = small_ppo(widened(5)).policy, small_ppo(widened(12), seed=1).policy
    many.load_state_dict(few.state_dict())
    scenario = widened(12)
    assert choose_masks(many, scenario, scenario.users("test")).shape == (100, 12)


def test_permuting_pathways_permutes_the_logits():
    scenario = planted()
    policy = small_ppo(scenario).policy
    order = np.random.default_rng(0).permutation(8)
    users = scenario.users("test")[:20]
    user, pathways = scenario.embeddings[users], scenario.statistics[users]
    before, after = logits_of(policy, user, pathways), logits_of(policy, user, pathways[:, order])
    np.testing.assert_allclose(after, before[:, order], atol=1e-5)
    assert before.std() > 0
    assert (before[:, order] - before).abs().max() > 1e-4


def test_the_logits_depend_on_the_user_and_on_the_other_pathways():
    scenario = planted()
    policy = small_ppo(scenario).policy
    user, pathways = scenario.embeddings[:1], scenario.statistics[:1]
    before = logits_of(policy, user, pathways)
    assert (logits_of(policy, scenario.embeddings[1:2], pathways) != before).any()
    other = pathways.copy()
    other[:, 0] += 1
    assert (logits_of(policy, user, other)[:, 1:] != before[:, 1:]).any()


def test_a_new_policy_has_no_opinion():
    scenario = planted()
    chances = logits_of(small_ppo(scenario).policy, scenario.embeddings, scenario.statistics).sigmoid()
    np.testing.assert_allclose(chances, 0.5, atol=0.05)


@pytest.mark.parametrize("policy", ["GatingPolicy", "MultiInputPolicy"])
def test_a_policy_learns_without_complaint_and_chooses_masks(policy):
    scenario = planted()
    model = small_ppo(scenario, policy).learn(64)
    masks = choose_masks(model.policy, scenario, scenario.users("val"))
    assert masks.shape == (100, 8)
    assert masks.dtype == bool


@pytest.mark.parametrize("policy", ["GatingPolicy", "MultiInputPolicy"])
def test_a_saved_policy_chooses_the_same_masks_when_loaded(policy, tmp_path):
    scenario = planted()
    model = small_ppo(scenario, policy).learn(256)
    save_policy(tmp_path / "policy", model.policy, meta_of(scenario, policy))
    loaded, meta = load_policy(tmp_path / "policy", scenario)
    users = np.arange(400)
    mine = choose_masks(model.policy, scenario, users)
    np.testing.assert_array_equal(choose_masks(loaded, scenario, users), mine)
    assert len(np.unique(mine, axis=0)) > 1
    assert meta["pathways"] == list(scenario.pathways)
    for name, tensor in model.policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_policy_arguments_are_used_again_when_loaded(tmp_path):
    scenario = planted()
    env = PathwaySelectionVecEnv(scenario, num_envs=4)
    model = PPO(POLICIES["GatingPolicy"], env, n_steps=8, batch_size=16, policy_kwargs={"hidden": 17}, device="cpu")
    save_policy(tmp_path / "policy", model.policy, {**meta_of(scenario), "policy_kwargs": {"hidden": 17}})
    loaded, _ = load_policy(tmp_path / "policy", scenario)
    users = scenario.users("test")
    np.testing.assert_array_equal(choose_masks(loaded, scenario, users), choose_masks(model.policy, scenario, users))


def test_a_policy_of_other_pathways_is_refused(tmp_path):
    scenario = planted()
    save_policy(tmp_path / "policy", small_ppo(scenario).policy, meta_of(scenario))
    with pytest.raises(ArtefactError, match="trained on the pathways"):
        load_policy(tmp_path / "policy", widened(12))
    renamed = replace(scenario, pathways=tuple(f"layer{p}" for p in range(8)))
    with pytest.raises(ArtefactError, match="trained on the pathways"):
        load_policy(tmp_path / "policy", renamed)


def test_a_policy_of_other_observations_is_refused(tmp_path):
    scenario = planted()
    save_policy(tmp_path / "policy", small_ppo(scenario).policy, meta_of(scenario))
    wider = replace(scenario, embeddings=np.pad(scenario.embeddings, ((0, 0), (0, 3))))
    with pytest.raises(ArtefactError, match="does not fit this scenario's observations"):
        load_policy(tmp_path / "policy", wider)


def test_a_missing_policy_is_named(tmp_path):
    with pytest.raises(ArtefactError, match="no gating policy at"):
        load_policy(tmp_path / "policy", planted())


def test_the_core_that_a_policy_is_built_for_matches_the_environment():
    scenario = planted()
    space = PathwaySelection(scenario, "train", 0.0, 1, 1).observation_space
    assert space == PathwaySelectionVecEnv(scenario, num_envs=1).observation_space


# Departing from a mask.


START = [1.5, -1.5, -1.5, 1.5, 1.5, -1.5, 1.5, -1.5]


def departing(scenario, **kwargs):
    env = PathwaySelectionVecEnv(scenario, num_envs=4)
    return PPO(
        POLICIES["GatingPolicy"],
        env,
        n_steps=8,
        batch_size=16,
        n_epochs=2,
        seed=0,
        device="cpu",
        policy_kwargs={"start": START, **kwargs},
    )


def test_a_policy_with_a_start_begins_with_that_mask_for_everybody():
    scenario = planted()
    policy = departing(scenario).policy
    masks = choose_masks(policy, scenario, np.arange(400))
    assert np.array_equal(masks, np.repeat([[logit > 0 for logit in START]], 400, axis=0))
    logits = logits_of(policy, scenario.embeddings[:50], scenario.statistics[:50])
    assert (logits - torch.tensor(START)).abs().max() < 0.5


def started(rows, at):
    env = PathwaySelectionVecEnv(planted(), num_envs=4, cost_weight="uniform:0:0.3")
    return PPO(POLICIES["GatingPolicy"], env, n_steps=8, batch_size=16, policy_kwargs={"start": rows, "start_at": at}).policy


def test_a_start_per_cost_weight_is_that_of_the_weight_and_between_them_a_mixture():
    scenario, users = planted(), np.arange(20)
    first, second = START, [-logit for logit in START]
    policy, rules = started([first, second], [0.1, 0.2]), Rules(cost_weight="uniform:0:0.3")
    for weight, row in ((0.0, first), (0.1, first), (0.14, first), (0.16, second), (0.2, second), (0.3, second)):
        plans = choose_plans(policy, scenario, users, rules, weight)
        assert (plans[:, -1] == (np.array(row) > 0)).all(), weight
    middle = policy.mlp_extractor.departure(torch.tensor([0.15, 0.125]))
    assert torch.allclose(middle, torch.stack([torch.zeros(8), torch.tensor(START) / 2]), atol=1e-6)


@pytest.mark.parametrize("at", [[0.1], [0.2, 0.1], [0.1, 0.1], [0.0, 0.1, 0.2]])
def test_starts_without_a_rising_cost_weight_each_are_refused(at):
    with pytest.raises(ValueError, match="one rising cost weight for each row"):
        started([START, START], at)


def test_starts_per_cost_weight_need_to_see_it():
    with pytest.raises(ValueError, match="observations show none"):
        departing(planted(), start=[START, START], start_at=[0.1, 0.2])


def test_the_start_is_learned_along():
    model = departing(planted())
    optimised = {id(p) for group in model.policy.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.policy.parameters()} == optimised
    model.learn(64)
    assert (model.policy.mlp_extractor.departure.start.detach() - torch.tensor(START)).abs().max() > 1e-4


def test_a_policy_with_a_start_chooses_the_same_masks_when_loaded(tmp_path):
    scenario = planted()
    policy = departing(scenario).learn(64).policy
    save_policy(tmp_path / "policy", policy, meta_of(scenario) | {"policy_kwargs": {"start": START}})
    loaded, _ = load_policy(tmp_path / "policy", scenario)
    first, second = (logits_of(p, scenario.embeddings, scenario.statistics) for p in (policy, loaded))
    assert torch.equal(first, second)
    with pytest.raises(ArtefactError, match="does not fit"):
        save_policy(tmp_path / "other", policy, meta_of(scenario))
        load_policy(tmp_path / "other", scenario)

"""An exact budget: the distribution against a sum over all masks, and PPO that never has more pathways on."""

import csv
import json

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from agents import evaluate, train_ppo
from agents.budget import AtMost
from agents.checkpoint import choose_masks, load_policy
from agents.policies import POLICIES
from agents.run import RunConfig
from envs.core import PathwaySelection
from envs.oracles import all_masks
from envs.planted import planted
from envs.sb3 import PathwaySelectionVecEnv

PATHWAYS = 5
MASKS = torch.from_numpy(all_masks(PATHWAYS)).double()
"""``[32, 5]``."""
BUDGETS = range(PATHWAYS + 1)
QUIET = ["--no-progress", "--num-threads", "1"]

each_budget = pytest.mark.parametrize("budget", BUDGETS)


def some_logits(rows=6, requires_grad=False):
    logits = 2 * torch.randn(rows, PATHWAYS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return logits.requires_grad_(requires_grad)


def made(logits, budget):
    return AtMost(PATHWAYS, budget).proba_distribution(logits)


def by_enumeration(logits, budget):
    """Log-probability of every mask ``[B, 32]``: independent gates, those above the budget ruled out."""
    return (logits @ MASKS.T).masked_fill(MASKS.sum(1) > budget, -torch.inf).log_softmax(1)


def log_probs(distribution):
    """Of every mask, ``[B, 32]``."""
    return torch.stack([distribution.log_prob(mask.expand_as(distribution.logits)) for mask in MASKS], 1)


@each_budget
def test_log_probabilities_are_those_of_all_masks_within_the_budget(budget):
    logits = some_logits()
    found = log_probs(made(logits, budget))
    torch.testing.assert_close(found, by_enumeration(logits, budget))
    torch.testing.assert_close(found.exp().sum(1), torch.ones(6, dtype=torch.float64))


def test_without_a_limit_the_gates_are_independent():
    logits = some_logits()
    plain = torch.distributions.Bernoulli(logits=logits)
    expected = torch.stack([plain.log_prob(mask.expand_as(logits)).sum(1) for mask in MASKS], 1)
    torch.testing.assert_close(log_probs(made(logits, PATHWAYS)), expected)


@each_budget
def test_the_entropy_is_that_of_all_masks_within_the_budget(budget):
    logits = some_logits(requires_grad=True)
    each = by_enumeration(logits, budget)
    expected = -(each.exp() * each.masked_fill(each == -torch.inf, 0)).sum(1)
    found = made(logits, budget).entropy()
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(made(logits.detach(), budget).entropy(), expected)


@each_budget
def test_gradients_are_those_of_the_sum_over_all_masks(budget):
    """Of log-probabilities and of the entropy: PPO follows both."""
    weights = torch.randn(6, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    within = MASKS.sum(1) <= budget
    gradients = []
    for exact in (True, False):
        logits = some_logits(requires_grad=True)
        each = (by_enumeration(logits, budget) if exact else log_probs(made(logits, budget)))[:, within]
        entropy = -(each.exp() * each).sum(1) if exact else made(logits, budget).entropy()
        value = (each * weights[:, within]).sum() + (entropy * weights[:, 0]).sum()
        gradients.append(torch.autograd.grad(value, logits)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("budget", [1, 2, 4, 5])
def test_samples_are_as_frequent_as_they_are_probable(budget):
    logits, draws = some_logits(1), 20_000
    torch.manual_seed(0)
    samples = made(logits.expand(draws, -1), budget).sample()
    assert samples.sum(1).max() == budget
    numbers = (samples @ 2.0 ** torch.arange(PATHWAYS)).long()
    shares = torch.bincount(numbers, minlength=32) / draws
    # Four standard errors of a share; the fixed seed is one of the many for which all 32 hold.
    expected = by_enumeration(logits, budget).exp()[0]
    assert ((shares - expected).abs() <= 4 * (expected * (1 - expected) / draws).sqrt()).all()


@each_budget
def test_the_mode_is_the_most_probable_mask_the_best_k_above_zero(budget):
    logits = some_logits(200)
    mode = made(logits, budget).mode()
    assert torch.equal(mode, MASKS[by_enumeration(logits, budget).argmax(1)])
    for row, mask in zip(logits, mode, strict=True):
        best = row.argsort(descending=True)[:budget]
        assert mask.nonzero()[:, 0].tolist() == sorted(p for p in best.tolist() if row[p] > 0)


def test_ties_go_to_the_earlier_pathway():
    mode = AtMost(8, 3).proba_distribution(torch.tensor([[0.5, -1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5]])).mode()
    assert mode.tolist() == [[1, 0, 1, 1, 0, 0, 0, 0]]


def test_a_budget_of_nothing_switches_nothing_on():
    distribution = made(some_logits(requires_grad=True), 0)
    assert not distribution.sample().any()
    assert not distribution.mode().any()
    assert torch.equal(distribution.entropy(), torch.zeros(6, dtype=torch.float64))
    assert torch.equal(distribution.log_prob(MASKS[:1].expand(6, -1)), torch.zeros(6, dtype=torch.float64))


@each_budget
def test_extreme_logits_give_numbers(budget):
    logits = torch.tensor([[80.0, -80.0, 80.0, 80.0, -80.0], [-80.0] * 5, [80.0] * 5], requires_grad=True)
    distribution = made(logits, budget)
    mode = distribution.mode()
    assert distribution.sample().sum(1).max() <= budget
    value = distribution.log_prob(mode).sum() + distribution.entropy().sum()
    assert value.isfinite()
    assert torch.autograd.grad(value, logits)[0].isfinite().all()


@pytest.mark.parametrize("budget", [-1, PATHWAYS + 1, 2.5])
def test_an_impossible_budget_is_refused(budget):
    with pytest.raises(ValueError, match=f"whole number from 0 to 5, the number of pathways; got {budget}"):
        AtMost(PATHWAYS, budget)


# PPO.


def small_ppo(budget, policy="GatingPolicy", **kwargs):
    env = PathwaySelectionVecEnv(planted(), num_envs=8, **kwargs)
    made_of = {"max_active": budget}
    return PPO(POLICIES[policy], env, n_steps=8, batch_size=32, n_epochs=2, seed=0, device="cpu", policy_kwargs=made_of)


def train(folder, *arguments):
    train_ppo.main(["--env", "dsa/Planted-v0", *arguments, "-f", str(folder), *QUIET])
    return json.loads((folder / "summary.json").read_text())["test"]["methods"]


@pytest.fixture(scope="module")
def limited(tmp_path_factory):
    """A run under a budget of 4, its table, and how many pathways every mask had on that was played meanwhile."""
    played, step = [], PathwaySelection.step

    def noted(self, slots, actions):
        played.append(actions.sum(1))
        return step(self, slots, actions)

    folder = tmp_path_factory.mktemp("budget") / "limited"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PathwaySelection, "step", noted)
        methods = train(folder, "--max-active", "4", "-n", "4096")
    return folder, methods, np.concatenate(played)


@pytest.fixture(scope="module")
def unlimited(tmp_path_factory):
    """A short run without a budget, of which most users get more than two pathways."""
    folder = tmp_path_factory.mktemp("budget") / "unlimited"
    train(folder, "-n", "2048")
    return folder


def masks_of(folder):
    with (folder / "users.csv").open() as file:
        return np.array([[int(bit) for bit in row["ppo_mask"]] for row in csv.DictReader(file)])


def test_no_mask_exceeds_the_budget_in_training_or_at_use(limited):
    folder, _, played = limited
    assert len(played) >= 4096
    assert played.max() == masks_of(folder).sum(1).max() == 4


def test_ppo_learns_what_is_best_under_the_budget(limited):
    _, methods, _ = limited
    scenario = planted()
    masks, users = all_masks(8), scenario.users("test")
    masks = masks[masks.sum(1) <= 4]
    rewards = [scenario.oracle.evaluate(users, np.repeat(m[None], len(users), 0), "query").reward(0.1) for m in masks]
    assert methods["ppo"]["reward"] >= 0.9 * np.max(rewards, axis=0).mean()
    assert methods["best_static"]["reward"] < 0.7 * np.max(rewards, axis=0).mean()


def test_a_policy_keeps_its_budget_when_loaded(limited):
    folder, _, _ = limited
    scenario = RunConfig.load(folder).scenario()
    policy, _ = load_policy(folder / "policy", scenario)
    np.testing.assert_array_equal(choose_masks(policy, scenario, scenario.users("test")), masks_of(folder).astype(bool))


def test_gradients_are_followed_under_any_budget():
    for budget in (0, 3, 8):
        model = small_ppo(budget).learn(128)
        assert all(torch.isfinite(parameter).all() for parameter in model.policy.parameters())


@pytest.mark.parametrize("budget", [0, 2, 5])
def test_a_budget_may_be_put_on_a_trained_policy(unlimited, budget):
    """Of the pathways that it would switch on, the best-scored are left."""
    scenario = RunConfig.load(unlimited).scenario()
    policy, _ = load_policy(unlimited / "policy", scenario)
    free = masks_of(unlimited)
    evaluate.limit(policy, budget)
    masks = choose_masks(policy, scenario, scenario.users("test"))
    np.testing.assert_array_equal(masks.sum(1), np.minimum(free.sum(1), budget))
    assert not (masks & (free == 0)).any()
    assert free.sum(1).max() > 5


def test_a_run_is_evaluated_under_a_budget_from_the_command_line(unlimited, capsys):
    before = {path.name: path.read_bytes() for path in unlimited.iterdir() if path.is_file()}
    shares = {}
    for budget in (1, 8):
        evaluate.main([str(unlimited), "--max-active", str(budget), "--num-threads", "1"])
        row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| ppo |"))
        shares[budget] = int(row.split("|")[5].strip(" %"))
    assert shares[1] <= 12 < shares[8] == round(100 * masks_of(unlimited).mean())
    assert {path.name: path.read_bytes() for path in unlimited.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("budget", ["9", "-1"])
def test_an_impossible_budget_is_refused_by_both_commands(unlimited, tmp_path, budget):
    with pytest.raises(SystemExit, match=f"error: max_active must be a whole number from 0 to 8.*got {budget}"):
        evaluate.main([str(unlimited), "--max-active", budget, "--num-threads", "1"])
    with pytest.raises(SystemExit, match=f"error: max_active must be a whole number from 0 to 8.*got {budget}"):
        train(tmp_path / "run", "--max-active", budget)


def test_other_policies_take_no_budget(tmp_path):
    flags = ["-P", "policy:MultiInputPolicy", "-n", "512"]
    with pytest.raises(SystemExit, match="max_active needs the policy GatingPolicy, not 'MultiInputPolicy'"):
        train(tmp_path / "run", *flags, "--max-active", "3")
    train(tmp_path / "run", *flags)
    with pytest.raises(SystemExit, match="needs a GatingPolicy"):
        evaluate.main([str(tmp_path / "run"), "--max-active", "3", "--num-threads", "1"])


def test_a_budget_needs_all_scores_at_once():
    with pytest.raises(
        ValueError, match="max_active needs the scores of all pathways at once; leave it out where steps decide one"
    ):
        small_ppo(3, layerwise=True)

"""Attacks on initialisations and adapters: they find what is there to find, and the command that runs them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from coins import coins, learned, part_of

from agents import train_private
from agents.private import PrivateSettings, learn_private, mask_rewards, new_policy, scorer, scorer_features
from envs.oracles import FormulaOracle
from envs.rules import Rules
from envs.scenario import load_scenario
from eval import privacy
from eval.attacks import lira
from eval.membership import _dealt, example_membership, log_likelihoods, user_membership
from eval.policy_membership import expected_rewards, policy_membership
from meta import train
from meta.inner import MetaInit

SMALL = ["train_users:40", "val_users:6", "test_users:6", "pretrain_epochs:1"]


@pytest.fixture(scope="module")
def world():
    return coins()


def test_users_whom_a_start_knows_by_heart_are_found_and_others_are_not(world):
    members, others, judged = range(8), range(100, 260), range(260, 340)
    references = [learned(world, range(340 + 8 * n, 348 + 8 * n), 1 + n) for n in range(3)]
    found = user_membership(world, learned(world, members, 0), references, members, others, judged)
    assert found.auc_ci95[0] > 0.55 and (found.members, found.others) == (8, 160)
    strangers = user_membership(world, learned(world, range(380, 388), 0), references, members, others, judged)
    assert strangers.auc_ci95[0] < 0.5 < strangers.auc_ci95[1]


def test_the_likelihood_of_a_user_is_that_of_all_their_query_examples(world):
    pathways, count = world.pathways, world.pathways.num_pathways
    init = MetaInit(pathways.start(0), torch.full((1, count), 0.0), torch.ones(count, dtype=torch.bool))
    users = range(5)
    found = log_likelihoods(pathways, init, *part_of(world, users))
    query = part_of(world, users)[1].rows(torch.arange(5))
    weights = {key: w.expand(5, *w.shape) for key, w in init.weights.items()}
    logits = pathways.logits(query.frozen, weights, torch.ones(5, count, dtype=torch.bool))
    likely = logits.log_softmax(-1).gather(-1, query.labels[..., None])[..., 0]
    np.testing.assert_allclose(found, (likely * (query.weights > 0)).sum(1).detach(), rtol=1e-5)


def test_users_whom_a_policy_knows_by_heart_are_found_and_others_are_not():
    """Users whose best masks are coins, which a policy can only learn from their rewards."""
    planted = load_scenario("planted")
    draw = np.random.default_rng(0)
    rewarded = draw.random((len(planted.embeddings), len(planted.pathways))) < 0.5
    everybody = planted.users("train")
    noise = draw.normal(size=(*planted.embeddings.shape,)).astype(np.float32)
    costs = np.full(len(planted.pathways), 1 / len(planted.pathways))
    oracle = FormulaOracle(costs, lambda users, masks: (masks == rewarded[users]).mean(1))
    scenario = replace(planted, embeddings=noise, oracle=oracle)
    rules, settings = Rules(0.1), PrivateSettings(rounds=120, users=10, masks=8, hidden=64, rate=0.02, entropy=0.0)

    def learned_from(users, seed):
        return learn_private(replace(scenario, splits={**scenario.splits, "train": users}), rules, settings, seed, None)

    members, others, judged = everybody[:10], everybody[10:130], everybody[130:170]
    references = [learned_from(everybody[170 + 10 * n : 180 + 10 * n], 1 + n) for n in range(2)]
    found = policy_membership(learned_from(members, 0), references, scenario, rules, members, others, judged)
    assert found.auc_ci95[0] > 0.6
    strangers = policy_membership(learned_from(everybody[190:200], 0), references, scenario, rules, members, others, judged)
    assert strangers.auc_ci95[0] < 0.5 < strangers.auc_ci95[1]


def test_expected_rewards_are_those_of_each_policys_own_masks():
    planted = load_scenario("planted")
    rules, users = Rules(0.1), planted.users("val")[:6]
    policies = [new_policy(planted, rules, PrivateSettings(hidden=8), seed) for seed in range(2)]
    found = expected_rewards(policies, planted, rules, users, masks=2000)
    for policy, mine in zip(policies, found, strict=True):
        chance = scorer(policy)(scorer_features(policy, planted, rules, users))[..., 0].sigmoid().detach().numpy()
        masks = np.random.default_rng(1).random((6, 4000, chance.shape[1])) < chance[:, None]
        np.testing.assert_allclose(mine, mask_rewards(planted, rules, users, masks).mean(1), atol=0.02)


def test_examples_are_found_in_adapters_that_learn_them_by_heart(world):
    pathways, count = world.pathways, world.pathways.num_pathways

    def attacked(speed):
        rates = torch.full((60, count), 0.3 * speed)
        rates[:, -1] = 50.0 * speed
        init = MetaInit(pathways.start(0), rates, torch.ones(count, dtype=torch.bool))
        return example_membership(world, init, "train", 40, shadows=32)

    by_heart, untouched = attacked(1.0), attacked(0.0)
    assert by_heart.auc_ci95[0] > 0.65
    assert untouched.auc == pytest.approx(0.5, abs=0.02)


def test_shadows_are_dealt_so_that_every_example_is_in_some_and_out_of_some():
    inside = _dealt(80, 20, 4, torch.Generator().manual_seed(0))
    assert inside.sum(0).eq(1).all() and inside.sum(1).eq(20).all()
    many = _dealt(14, 6, 64, torch.Generator().manual_seed(0)).float().mean(0)
    assert (many - 6 / 14).abs().max() < 0.05
    with pytest.raises(ValueError, match="in none of the shadow models or in all"):
        lira(np.zeros(3), np.zeros((2, 3)), np.array([[True, True, False], [True, False, False]]))


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("private")
    quick = ["--num-threads", "1", "--noise-seed", "1"]
    flags = [part for pair in SMALL for part in ("-K", pair)]
    train.main(
        [
            "--private",
            "--steps",
            "2",
            "--users-per-step",
            "20",
            "--rank",
            "2",
            "--placement",
            "side",
            "--out",
            str(folder),
            *quick,
            *flags,
        ]
    )
    init = next(folder.glob("meta-*.json"))
    flags = [part for pair in [*SMALL, "rank:2"] for part in ("--env-kwargs", pair)]
    quick += [
        "--env",
        "dsa/Personal-v0",
        "--rounds",
        "2",
        "--users-per-round",
        "10",
        "--masks",
        "2",
        "--no-search",
        "--epsilon",
        "9",
    ]
    train_private.main(["--init", str(init), "--log-dir", str(folder / "run"), *quick, *flags])
    return folder / "run"


def test_the_command_writes_figures_and_a_picture_into_the_run(run, monkeypatch, capsys):
    for name, value in {"ASKED": 110, "JUDGED": 20, "FEW": 10, "OVERFITTED": 2, "BY_HEART": 2, "AUDITED": 200}.items():
        monkeypatch.setattr(privacy, name, value)
    privacy.main([str(run), "--references", "1", "--shadows", "4", "--users", "2", "--num-threads", "1"])
    printed = capsys.readouterr().out
    found = json.loads((run / "attacks.json").read_text())
    assert [*found["users"]] == ["this run", "without privacy", "overfitted to 10 users"]
    assert [*found["policy"]] == [*found["users"]] and found["policy"]["overfitted to 10 users"]["members"] == 10
    assert found["users"]["this run"]["members"] == 40 and found["users"]["this run"]["others"] == 110
    assert found["examples"]["members"] == 40 and found["audit"]["canaries"] == 200
    assert (run / "attacks.md").read_text() in printed + "\n" and (run / "attacks.png").stat().st_size > 5000
    assert "RMIA, 1 references" in printed and "which holds" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--references", "0"], "at least 1 reference"), (["--shadows", "3"], "4 shadow"), (["--users", "0"], "and 1 user")],
)
def test_attacks_that_say_nothing_are_refused(run, arguments, message):
    with pytest.raises(SystemExit, match=message):
        privacy.main([str(run), *arguments])


def test_runs_without_privacy_are_refused(run, tmp_path):
    with pytest.raises(SystemExit, match="is not a run"):
        privacy.main([str(tmp_path)])
    config = json.loads((run / "config.json").read_text())
    plain = ["--num-threads", "1", "--steps", "1", "--rank", "2", "--placement", "side", "--out", str(tmp_path)]
    train.main([*plain, *[part for pair in SMALL for part in ("-K", pair)]])
    config["env_kwargs"]["init"] = str(next(tmp_path.glob("meta-*.json")).with_suffix(""))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="was not learned in private"):
        privacy.main([str(tmp_path)])


def test_a_broken_promise_is_said_in_bold():
    from eval.attacks import Success
    from eval.audit import Audit

    one = Success(0.5, (0.4, 0.6), 0.01, (0.0, 0.02), 0.01, 100, 1000)
    text = privacy.table({"x": one}, {}, one, 64, 4, Audit(5.0, 3.0, 10, 10, 1000, 1e-6))
    assert "**does not hold**" in text
    kept = privacy.table({"x": one}, {}, one, 64, 4, replace(Audit(5.0, 3.0, 10, 10, 1000, 1e-6), epsilon=2.0))
    assert "**" not in kept

"""Gating policies under differential privacy: updates by hand, learning, composition with the start, what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from agents import train_private
from agents.checkpoint import choose_masks, load_policy
from agents.private import PrivateSettings, begun, check_rules, learn_private, new_policy, policy_updates, scorer
from agents.rivals import best_static
from backbones.artefacts import ArtefactError, load_artefact, save_artefact
from envs.modelled import scenario_from
from envs.rules import Rules
from envs.scenario import load_scenario
from meta import train
from meta.accountant import Accountant, spent_by
from meta.inner import MetaInit
from meta.private import Privacy, PrivateRounds
from meta.store import KIND
from tests import tastes
from users.base import Examples
from users.items import TensorItems

RULES = Rules(0.1)
SMALL = {"train_users": 40, "val_users": 8, "test_users": 6, "pretrain_epochs": 1}
PAIRS = [f"{name}:{value}" for name, value in SMALL.items()]
INIT = ["--placement", "side"] + [part for pair in PAIRS for part in ("-K", pair)]
ENV = ["--env", "dsa/Personal-v0"] + [part for pair in PAIRS for part in ("--env-kwargs", pair)]


@pytest.fixture(scope="module")
def planted():
    return load_scenario("planted")


def rounds_for(scenario, settings, clip=0.3, noise=1.0):
    privacy = Privacy(300.0, 1e-3, clip, noise, noise_seed=0)
    return PrivateRounds(privacy, len(scenario.users("train")), settings.users, settings.rounds, "policy")


def reward(scenario, masks):
    return float(scenario.oracle.evaluate(scenario.users("val"), masks, "query").reward(0.1).mean())


def test_a_private_policy_learns_who_needs_what(planted):
    settings = PrivateSettings(rounds=60, users=50)
    users = planted.users("val")
    static = reward(planted, np.tile(best_static(planted, 0.1, 0), (len(users), 1)))
    found = {}
    for name, private in (("noise", rounds_for(planted, settings)), ("none", None)):
        policy = learn_private(planted, RULES, settings, 0, private)
        found[name] = reward(planted, choose_masks(policy, planted, users, rules=RULES))
    assert found["none"] > static + 0.35
    assert static + 0.25 < found["noise"] < found["none"] + 0.01


def test_what_val_users_teach_beforehand_owes_nothing_to_train_users(planted, monkeypatch):
    settings, asked = PrivateSettings(rounds=1, users=5, public_rounds=20), []
    evaluate = type(planted.oracle).evaluate
    monkeypatch.setattr(
        type(planted.oracle), "evaluate", lambda self, users, *a, **k: (asked.append(users), evaluate(self, users, *a, **k))[1]
    )
    taught, fresh = begun(planted, RULES, settings, 0), new_policy(planted, RULES, settings, 0)
    assert {*np.concatenate(asked)} <= {*planted.users("val")}
    assert any((a != b).any() for a, b in zip(scorer(taught).parameters(), scorer(fresh).parameters(), strict=True))
    none = replace(settings, rate=1e-12)
    learned = learn_private(planted, RULES, none, 0, rounds_for(planted, none))
    for a, b in zip(scorer(learned).parameters(), scorer(taught).parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_each_users_update_is_the_policy_gradient_worked_out_alone(planted):
    policy = new_policy(planted, RULES, PrivateSettings(hidden=4), 0)
    torch.manual_seed(0)
    pathways, width = policy.features_extractor.shape
    features, masks, rewards = torch.randn(5, pathways, width), torch.rand(5, 3, pathways) < 0.5, torch.rand(5, 3)
    found = policy_updates(policy, features, masks, rewards, entropy=0.05)
    for user in range(5):
        chance = torch.distributions.Bernoulli(logits=scorer(policy)(features[user])[:, 0])
        baseline = torch.stack([rewards[user][[j for j in range(3) if j != m]].mean() for m in range(3)])
        likely = torch.stack([chance.log_prob(mask.float()).sum() for mask in masks[user]])
        loss = -((rewards[user] - baseline) * likely).mean() - 0.05 * chance.entropy().sum()
        for name, slope in zip(
            dict(scorer(policy).named_parameters()), torch.autograd.grad(loss, [*scorer(policy).parameters()]), strict=True
        ):
            assert name in found
            torch.testing.assert_close(found[name][user], slope, rtol=1e-4, atol=1e-6)


def test_the_network_starts_the_same_for_a_seed_and_disturbs_nobodys_random_numbers(planted):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (new_policy(planted, RULES, PrivateSettings(), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    states = [torch.cat([w.flatten() for w in scorer(policy).parameters()]) for policy in (first, again, other)]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


@pytest.mark.parametrize("rules", [Rules(0.1, rounds=2), Rules(0.1, layerwise=True), Rules("uniform:0:0.3")])
def test_episodes_of_several_decisions_are_refused(rules):
    with pytest.raises(ValueError, match="learned from one mask per user at one cost weight"):
        check_rules(rules)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"users": 0}, {"masks": 1}, {"hidden": 0}, {"rate": 0}, {"average": 1.0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must be"):
        PrivateSettings(**wrong)


def test_masks_of_private_rounds_come_from_numbers_that_nobody_knows(planted):
    settings, found = PrivateSettings(rounds=3, users=20), []
    for noise_seed in (0, 0, 1):
        privacy = Privacy(300.0, 1e-3, 0.3, 1.0, noise_seed=noise_seed)
        rounds = PrivateRounds(privacy, len(planted.users("train")), 20, 3, "policy")
        kept = planted.oracle.evaluate
        seen = []

        def watched(users, masks, *rest, kept=kept, seen=seen):
            seen.append((users, masks))
            return kept(users, masks, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planted.oracle, "evaluate", watched)
            patch.setattr(rounds, "cohort", lambda step, r=rounds: (type(r).cohort(r, step), torch.arange(20))[1])
            learn_private(planted, RULES, settings, 0, rounds)
        found.append(np.concatenate([masks.ravel() for _, masks in seen]))
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


# The command


@pytest.fixture(scope="module")
def private_init(tmp_path_factory):
    folder = tmp_path_factory.mktemp("init")
    quick = ["--steps", "2", "--users-per-step", "20", "--rank", "4", "--num-threads", "1", "--noise-seed", "1"]
    train.main(["--private", "--epsilon", "3", *quick, "--out", str(folder), *INIT])
    return next(path for path in folder.glob("meta-*.json")).with_suffix("")


def run(init, folder, *more):
    quick = [
        "--rounds",
        "3",
        "--users-per-round",
        "20",
        "--masks",
        "2",
        "--num-threads",
        "1",
        "--noise-seed",
        "2",
        "--no-search",
    ]
    rank = ["--env-kwargs", "rank:4"]
    train_private.main(["--init", str(init), "--log-dir", str(folder), *quick, *ENV, *rank, *more])


def test_start_and_policy_are_accounted_for_together(private_init, tmp_path, capsys):
    run(f"{private_init}.json", tmp_path / "run", "--epsilon", "5")
    printed = capsys.readouterr().out
    assert "of 5 spent at delta" in printed and "learned from train users' rewards" in printed
    assert "a repetition too, adds to it" in printed and "whoever knows it is promised nothing" in printed
    account = Accountant.of(json.loads((tmp_path / "run/privacy.json").read_text())["accountant"])
    start = Accountant.of(load_artefact(private_init, KIND)[1]["accountant"])
    counted = {kind.part: rounds for kind, rounds in account.rounds.items()}
    assert counted == {"meta-initialisation": 2, "policy": 3}
    assert start.spent() < account.spent() <= 5.0
    alone = {kind: rounds for kind, rounds in account.rounds.items() if kind.part == "policy"}
    assert account.spent() < start.spent() + spent_by(alone, account.delta)
    assert (tmp_path / "run/summary.json").exists()
    _, meta = load_artefact(tmp_path / "run/policy", "gating policy")
    assert Accountant.of(meta["accountant"]).rounds == account.rounds


def test_neither_policy_nor_start_says_anything_of_train_users_but_their_number(private_init, tmp_path):
    run(private_init, tmp_path / "run", "--epsilon", "5")
    scenario = load_scenario("modelled", **arguments(private_init))
    policy = (tmp_path / "run/policy.json").read_text()
    assert scenario.fingerprint not in policy and scenario.made_of["users"] not in policy
    assert load_policy(tmp_path / "run/policy", scenario)
    others = load_scenario("modelled", **arguments(private_init, train_users=39))
    with pytest.raises(ArtefactError, match="trained on other observations"):  # scaled by other val users
        load_policy(tmp_path / "run/policy", load_scenario("modelled", **arguments(private_init, val_users=7)))
    assert load_policy(tmp_path / "run/policy", others)  # nothing in it tells these users from those
    plain = load_scenario("modelled", **arguments(private_init, observed_on="train"))
    with pytest.raises(ArtefactError, match="trained on other observations"):
        load_policy(tmp_path / "run/policy", plain)


def arguments(init, **changes):
    fixed = {"users": "digits", "backbone": "resnet-small", "placement": "side", "rank": 4, "init": str(init)}
    return {**fixed, **SMALL, "seed": 0, "observed_on": "val", **changes}


def test_observations_are_standardised_on_val_users_alone(private_init):
    seen, fewer = (load_scenario("modelled", **arguments(private_init, train_users=n)) for n in (40, 39))
    users = seen.users("val"), fewer.users("val")
    np.testing.assert_array_equal(seen.statistics[users[0]], fewer.statistics[users[1]])
    np.testing.assert_array_equal(seen.embeddings[users[0]], fewer.embeddings[users[1]])
    usual = load_scenario("modelled", **arguments(private_init, observed_on="train"))
    assert not np.array_equal(usual.statistics[users[0]], seen.statistics[users[0]])
    assert usual.fingerprint != seen.fingerprint
    with pytest.raises(ValueError, match="not 'test'"):
        load_scenario("modelled", **arguments(private_init, observed_on="test"))


def test_items_of_train_users_alone_are_not_in_what_a_private_policy_says(tmp_path):
    """Or else whoever guesses somebody's text could confirm it by the policy's file."""
    people = tastes.population(tastes.biased)
    first, *others = people.train
    secret = len(people.items)  # an item that nobody else has
    mine = replace(first, support=Examples(torch.full_like(first.support.inputs, secret), first.support.labels))

    def seen(value):
        items = TensorItems(torch.cat([people.items.values, torch.full((1, 1, 4, 4), value)]))
        data = tastes.seen_through(replace(people, train=(mine, *others), items=items))
        start = MetaInit(data.pathways.start(0), torch.full((1, data.pathways.num_pathways), 0.1), torch.ones(2).bool())
        return scenario_from(data, start, "toy", "side", None, observed_on="val")

    one, other = seen(0.2), seen(0.8)
    assert one.fingerprint != other.fingerprint
    assert one.without_users == other.without_users


def test_a_policy_learned_from_public_users_spends_nothing_further(private_init, tmp_path, capsys):
    run(private_init, tmp_path / "run", "--on", "val")
    assert "learned from val users' rewards, who are public" in capsys.readouterr().out
    account = Accountant.of(json.loads((tmp_path / "run/privacy.json").read_text())["accountant"])
    assert [kind.part for kind in account.rounds] == ["meta-initialisation"]


def test_what_does_not_add_up_is_refused(private_init, tmp_path):
    with pytest.raises(SystemExit, match=r"is spent already, of a budget of 1"):
        run(private_init, tmp_path / "a", "--epsilon", "1")
    with pytest.raises(SystemExit, match=r"is accounted for at delta .* give --delta"):
        run(private_init, tmp_path / "b", "--epsilon", "5", "--delta", "0.3")
    tensors, said = load_artefact(private_init, KIND)
    said.pop("accountant")
    save_artefact(tmp_path / "open", KIND, tensors, said)
    with pytest.raises(SystemExit, match="was learned without privacy"):
        run(tmp_path / "open", tmp_path / "c")
    with pytest.raises(SystemExit, match="no meta-initialisation at"):
        run(tmp_path / "nowhere", tmp_path / "d")
    assert not [*tmp_path.glob("[abcd]/policy*")]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(SystemExit, match="holds files already"):
        run(private_init, tmp_path / "full")

"""Co-training: whose masks the adapters go on learning under, and what a co-trained run is made of."""

import json

import pytest
import torch

from agents import cotrain, train_ppo
from agents.checkpoint import choose_plans, load_policy
from agents.cotrain import OWN, WEIGHTS, meta_config, mixed, own_masks
from agents.run import RunConfig
from backbones.artefacts import exists, load_artefact
from backbones.base import hash_tensors
from backbones.pathways import make_pathways
from meta.inner import MetaInit
from meta.masks import sample_masks
from meta.trainer import MetaConfig, MetaTrainer
from users.batch import stack

QUIET = ["--no-progress", "--num-threads", "1"]
SIZES = {"train_users": 16, "val_users": 6, "test_users": 6, "pretrain_epochs": 1, "widths": "[8,16]"}
META = {"meta_steps": 7, "meta_users": 4, "keep": "last"}
SHORT = ["-n", "256", "--eval-freq", "64", "-P", "n_envs:16", "-P", "batch_size:64", "-P", "warm_start:false"]
DIGITS = ["--env", "dsa/Personal-v0", *SHORT, "-P", "search:false", "--cost-weight", "uniform:0:0.3", "--cotrain", "1"]
DIGITS += [word for name, value in (SIZES | META).items() for word in ("--env-kwargs", f"{name}:{value}")]


def train(folder, *arguments):
    train_ppo.main([*DIGITS, *arguments, "-f", str(folder), *QUIET])


def refused(*arguments):
    with pytest.raises(SystemExit) as exit_:
        train_ppo.main([*map(str, arguments), *QUIET])
    return str(exit_.value.code)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with one turn."""
    folder = tmp_path_factory.mktemp("runs") / "cotrained"
    train(folder)
    return folder


@pytest.fixture
def config(run):
    return RunConfig.load(run)


def init_at(path):
    return MetaInit.from_tensors(load_artefact(path, "meta-initialisation")[0])


# The masks.


def coded(weights, users):
    """Masks ``[weights, users, 12]`` that tell whose they are, with the first pathway on and the last one off."""
    numbers = torch.arange(weights * users).view(weights, users, 1)
    masks = torch.zeros(weights, users, 12, dtype=torch.bool)
    masks[..., 0] = True
    masks[..., 1:11] = numbers >> torch.arange(10) & 1 == 1
    return masks


def decoded(masks):
    """Whose masks these are; -1 for everything on, which here is the usual mask."""
    numbers = (masks[:, 1:11] * 2 ** torch.arange(10)).sum(1)
    return torch.where(masks.all(1), -1, numbers)


def usually(all_on):
    return lambda users, generator: sample_masks(len(users), 12, generator, all_on)


def test_a_share_of_users_gets_a_mask_that_the_policy_chose_for_them_at_any_weight():
    draw = mixed(coded(5, 40), usually(1.0))
    users = torch.arange(40).repeat(200)
    numbers = decoded(draw(users, torch.Generator().manual_seed(0)))
    own = numbers >= 0
    assert float(own.float().mean()) == pytest.approx(OWN, abs=0.02)  # 4 standard errors
    assert torch.equal(numbers[own] % 40, users[own])
    shares = torch.bincount(numbers[own] // 40, minlength=5) / own.sum()
    assert shares.tolist() == pytest.approx([0.2] * 5, abs=0.025)


def test_the_others_get_the_usual_masks():
    config, users = MetaConfig(all_on=0.2), torch.zeros(4000, dtype=torch.long)
    masks = mixed(coded(1, 1), usually(config.all_on))(users, torch.Generator().manual_seed(0))
    others = masks[(masks != coded(1, 1)[0, 0]).any(1)]
    usual = sample_masks(4000, 12, torch.Generator().manual_seed(1), config.all_on)
    assert len(others) / 4000 == pytest.approx(1 - OWN, abs=0.03)
    assert float(others.all(1).float().mean()) == pytest.approx(float(usual.all(1).float().mean()), abs=0.05)
    assert others.float().mean(0).tolist() == pytest.approx([0.6] * 12, abs=0.06)


def test_a_mask_with_nothing_on_is_replaced():
    own = coded(1, 2)
    own[:, 1] = False
    masks = mixed(own, usually(1.0))(torch.tensor([0, 1]).repeat(500), torch.Generator().manual_seed(0))
    assert masks.any(1).all()
    assert masks[1::2].all()
    assert not masks[::2].all()


def test_masks_follow_from_the_generator():
    draw, users = mixed(coded(5, 40), usually(0.2)), torch.arange(40)
    first, again, other = (draw(users, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_policys_masks_are_those_it_chooses_for_train_users_over_the_range(run, config):
    scenario, path = config.scenario(run, 0), run / "cotrain-1" / "policy"
    own = own_masks(config, scenario, path)
    assert (own.shape, own.dtype) == ((WEIGHTS, 16, len(scenario.pathways)), torch.bool)
    policy, _ = load_policy(path, scenario)
    for row, weight in {0: 0.0, WEIGHTS // 2: 0.15, WEIGHTS - 1: 0.3}.items():
        expected = choose_plans(policy, scenario, scenario.users("train"), config.rules, weight)[:, -1]
        assert (own[row].numpy() == expected).all()


# The meta-training.


@pytest.fixture
def parts(model, population):
    """Pathways, and train users' support and query."""
    pathways = make_pathways("side", model, rank=4)
    return pathways, *(stack(pathways, population.train, role) for role in ("support", "query"))


def test_meta_training_begins_exactly_at_a_start_and_leaves_it_as_it_was(parts):
    torch.manual_seed(1)
    weights = {name: torch.randn_like(weight) for name, weight in parts[0].start(0).items()}
    start = MetaInit(weights, torch.rand(3, parts[0].num_pathways), torch.ones(parts[0].num_pathways, dtype=torch.bool))
    before = {name: tensor.clone() for name, tensor in start.tensors().items()}
    trainer = MetaTrainer(*parts, MetaConfig(steps=2, users=4), start=start)
    for name, tensor in trainer.present().tensors().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-6, atol=0)  # rates pass through their logarithm
    for name, tensor in trainer.present().weights.items():
        assert torch.equal(tensor, start.weights[name])
    learned = trainer.run()
    assert any(not torch.equal(tensor, start.weights[name]) for name, tensor in learned.weights.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in start.tensors().items())


def test_meta_training_asks_for_masks_in_every_step(parts):
    asked = []

    def masks(users, generator):
        asked.append(users)
        return sample_masks(len(users), parts[0].num_pathways, generator)

    MetaTrainer(*parts, MetaConfig(steps=3, users=4), masks=masks).run()
    assert [users.shape for users in asked] == [(4,)] * 3
    assert all(0 <= int(user) < 12 for users in asked for user in users)
    assert len({tuple(users.tolist()) for users in asked}) > 1


def test_a_pathway_that_no_mask_switches_on_stays_where_it_started(parts):
    def masks(users, generator):
        return torch.arange(parts[0].num_pathways).expand(len(users), -1) > 0

    trainer = MetaTrainer(*parts, MetaConfig(steps=2, users=4), masks=masks)
    before = trainer.present()
    after = trainer.run()
    assert torch.equal(after.rates[:, 0], before.rates[:, 0])
    assert not torch.equal(after.rates[:, 1], before.rates[:, 1])


def test_a_turn_meta_trains_for_half_as_long_as_the_environment(config):
    assert meta_config(config).steps == 4
    assert (meta_config(config).users, meta_config(config).keep) == (4, "last")


# The run.


def test_a_turn_makes_another_initialisation_by_way_of_a_policy(run, config):
    before, after = config.scenario(run, 0).oracle.live.init, init_at(run / "meta-1")
    assert {*before.weights} == {*after.weights}
    assert any(not torch.equal(before.weights[name], after.weights[name]) for name in before.weights)
    said = load_artefact(run / "meta-1", "meta-initialisation")[1]
    assert (said["algorithm"], said["inner_steps"]) == (meta_config(config).algorithm, meta_config(config).inner_steps)
    assert load_artefact(run / "cotrain-1" / "checkpoint", "training checkpoint")[1]["num_timesteps"] == 128
    assert load_artefact(run / "checkpoint", "training checkpoint")[1]["num_timesteps"] == 256


def test_a_turn_learns_under_the_masks_of_its_policy(run, config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cotrain, "OWN", 0.0)
        (tmp_path / "run").mkdir()
        config.save(tmp_path / "run")
        cotrain.cotrain(config, tmp_path / "run", progress=False)
    policies = [load_artefact(folder / "cotrain-1" / "policy", "gating policy")[0] for folder in (run, tmp_path / "run")]
    assert hash_tensors(policies[0]) == hash_tensors(policies[1])
    inits = [init_at(folder / "meta-1") for folder in (run, tmp_path / "run")]
    assert hash_tensors(inits[0].tensors()) != hash_tensors(inits[1].tensors())


def test_a_run_is_trained_and_measured_on_its_own_initialisation(run, config):
    plain, own = config.scenario(run, 0), config.scenario(run)
    assert own.fingerprint != plain.fingerprint
    assert own.made_of["meta-initialisation"] == hash_tensors(init_at(run / "meta-1").tensors())
    assert {name for name in own.made_of if own.made_of[name] != plain.made_of[name]} == {"meta-initialisation"}
    assert load_artefact(run / "cotrain-1" / "policy", "gating policy")[1]["scenario"] == plain.fingerprint
    assert load_artefact(run / "policy", "gating policy")[1]["scenario"] == own.fingerprint
    assert (run / "summary.json").exists()
    with pytest.raises(ValueError, match="give the folder"):
        config.scenario()


def test_a_finished_turn_is_not_repeated(run, config, monkeypatch):
    monkeypatch.setattr(cotrain, "learn", lambda *args, **kwargs: pytest.fail("a policy was trained again"))
    monkeypatch.setattr(cotrain, "trainer_for", lambda *args, **kwargs: pytest.fail("meta-trained again"))
    before = {file: file.stat().st_mtime_ns for file in run.rglob("meta*")}
    cotrain.cotrain(config, run, progress=False)
    assert {file: file.stat().st_mtime_ns for file in run.rglob("meta*")} == before


def test_overwriting_takes_over_no_turn_of_the_run_before(run, tmp_path):
    other = tmp_path / "run"
    train(other, "--cost-weight", "uniform:0:0.1", "-n", "128")
    (other / "meta-notes.txt").write_text("mine")
    train(other, "--overwrite")
    for name in ("meta-1", "cotrain-1/policy", "policy", "checkpoint"):
        bodies = [json.loads((folder / f"{name}.json").read_text()) for folder in (run, other)]
        assert bodies[0]["tensors_sha256"] == bodies[1]["tensors_sha256"], name
    assert (other / "meta-notes.txt").read_text() == "mine"


# What is refused.


def test_an_environment_without_adapters_is_refused(tmp_path):
    told = refused("--env", "dsa/Planted-v0", "--cotrain", "1", "-f", tmp_path / "run")
    assert told == "error: co-training needs an environment whose adapters can be meta-trained; dsa/Planted-v0 has none."
    assert not exists(tmp_path / "run" / "cotrain-1" / "checkpoint")


def test_fewer_turns_than_none_are_refused(tmp_path):
    told = refused("--env", "dsa/Planted-v0", "--cotrain", "-1", "-f", tmp_path / "run")
    assert told == "error: cotrain must be at least 0 turns, got -1."
    assert not (tmp_path / "run").exists()

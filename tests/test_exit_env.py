"""The environments in which a mask decides how much is run: starts, costs, what is executed, and the harness over them."""

import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents import cotrain
from backbones.artefacts import ArtefactError
from backbones.costs import CostModel
from backbones.pathways import population_logits
from envs import MINIATURES, latency
from envs.rules import Rules
from envs.scenario import load_scenario
from eval import run
from eval.budgets import measure_seed
from meta import learned, start
from meta.learned import learned_init
from meta.start import check_fitting, fitted_start, taken, with_copies
from meta.trainer import MetaConfig
from tests import tastes, worlds

UNIPEN = "dsa/UnipenResNetExit-v0"


@pytest.fixture(scope="module")
def scenario(real_data):
    return worlds.scenario(UNIPEN)


def test_a_mask_with_nothing_on_is_executed_and_reported_as_the_whole_bare_model(scenario):
    env = gym.make(UNIPEN, **MINIATURES[UNIPEN])
    env.reset(seed=0)
    _, _, _, _, info = env.step(np.zeros(env.action_space.n, dtype=np.int8))
    assert info["mask"].sum() == info["mask"][scenario.pathways.index("readout")] == 1
    env.reset(seed=0)
    only = np.zeros(len(info["mask"]), dtype=np.int8)
    only[scenario.pathways.index("readout")] = 1
    _, _, _, _, said = env.step(only)
    assert (said["accuracy"], said["loss"]) == (info["accuracy"], info["loss"])
    assert said["cost"] == pytest.approx(info["cost"])


def test_less_of_the_network_costs_less(scenario):
    costs = scenario.oracle.costs
    blocks = len(scenario.pathways) - 2
    assert (np.diff(costs.alone[:blocks]) > 0).all()
    assert float(costs(torch.ones(len(scenario.pathways)))) == pytest.approx(1)
    assert scenario.counts == "flops"
    bare = costs.of(np.zeros((1, len(scenario.pathways)), dtype=bool))[0]
    assert costs.alone[blocks - 1] < bare + 0.1 and costs.alone[0] < bare


def test_milliseconds_must_be_measured_before_they_count(real_data, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DSA_CACHE", str(tmp_path))
    small = {name: value for name, value in MINIATURES[UNIPEN].items()}
    arguments = {**gym.spec(UNIPEN).kwargs, **small, "cost": "latency"}
    name = arguments.pop("scenario")
    with pytest.raises(ArtefactError, match=r"python -m envs.latency --env ID"):
        load_scenario(name, **arguments)
    pairs = [f"{key}:{json.dumps(value)}" for key, value in small.items()]
    monkeypatch.setattr(latency, "latency", lambda pathways, batch: {part: 2.0 for part in latency_parts(pathways)})
    latency.main(["--env", UNIPEN, "--env-kwargs", *pairs, "--batch", "3"])
    assert "| +readout | 2.000 |" in capsys.readouterr().out
    made = load_scenario(name, **arguments)
    assert made.counts == "latency"
    alone = made.oracle.costs.alone
    parts = len(latency_parts(made.data.pathways))
    assert float(alone[0]) == pytest.approx(3 / parts)  # stem, one block, one pathway


def latency_parts(pathways):
    from backbones.prices import parts

    return parts(pathways)


def test_parts_take_time(scenario):
    from backbones.prices import cost_model
    from backbones.prices import latency as measured

    found = measured(scenario.data.pathways, examples=2, turns=5)
    assert all(value > 0 for value in found.values())
    assert isinstance(cost_model(scenario.data.pathways, found), CostModel)


def test_unknown_costs_and_environments_without_a_model_are_refused(real_data):
    with pytest.raises(ValueError, match=r"unknown cost 'flop'\. Did you mean 'flops'\?"):
        worlds.scenario(UNIPEN, cost="flop")
    with pytest.raises(SystemExit, match="has no argument 'rnak'"):
        latency.main(["--env", UNIPEN, "--env-kwargs", "rnak:64"])
    with pytest.raises(SystemExit, match="has no model"):
        latency.main(["--env", "dsa/Planted-v0"])
    with pytest.raises(SystemExit, match="at least 1"):
        latency.main(["--env", "dsa/DigitsResNet-v0", "--batch", "0", "--env-kwargs", "train_users:12", "pretrain_epochs:1"])


def test_a_fitted_start_answers_without_the_models_own_readout(scenario):
    data, pathways = scenario.data, scenario.data.pathways
    table, places, labels = data.fitting()
    blocks = torch.zeros(1, pathways.num_pathways, dtype=torch.bool)
    blocks[:, :-2] = True
    right = []
    for steps in (1, 150):
        weights, again = (fitted_start(data, steps, seed=0) for _ in range(2))
        assert all(torch.equal(w, again[key]) for key, w in weights.items())
        stacked = {key: w[None] for key, w in weights.items()}
        logits = pathways.logits(taken(table, places[None]), stacked, blocks)[0]
        right.append(float((logits.argmax(1) == labels).float().mean()))
    assert right[1] > right[0] + 0.2
    assert not weights["head.weight"].any()


def test_a_fitted_start_learns_from_what_the_whole_model_says(scenario, monkeypatch):
    data, pathways = scenario.data, scenario.data.pathways
    table, places, _ = data.fitting()
    said = population_logits(pathways.model, table)[places].log_softmax(1)
    blocks = torch.zeros(1, pathways.num_pathways, dtype=torch.bool)
    blocks[:, :-2] = True
    apart = []
    for taught in (0.0, 1.0):
        monkeypatch.setattr(start, "TEACHER", taught)
        stacked = {key: w[None] for key, w in fitted_start(data, 150, seed=0).items()}
        own = pathways.logits(taken(table, places[None]), stacked, blocks)[0].log_softmax(1)
        apart.append(float((said.exp() * (said - own)).sum(1).mean()))
    assert apart[1] < apart[0]


def test_changed_copies_stand_behind_the_examples_they_are_of(scenario):
    data = scenario.data
    table, places, labels = data.fitting()
    found, at, known = with_copies(data, 2, "handwriting", torch.Generator().manual_seed(0))
    size, count = len(table.sites[0]), len(places)
    assert len(found.sites[0]) == size + 2 * count
    assert torch.equal(known, labels.repeat(3)) and torch.equal(at[:count], places)
    assert torch.equal(at[count:], size + torch.arange(2 * count))
    for site, old in zip(found.sites, table.sites, strict=True):
        own, first, second = (site[at[k * count : (k + 1) * count]] for k in range(3))
        assert torch.equal(own, old[places])
        assert not torch.equal(first, second)
    close = torch.cdist(found.sites[-1][at[count : 2 * count]], table.sites[-1][places])
    assert (close.argmin(1) == torch.arange(count)).float().mean() > 2 / count  # a copy looks like what it is of


def test_a_start_that_is_fitted_is_kept_by_all_that_it_follows_from(scenario, tmp_path, monkeypatch):
    config = MetaConfig(steps=1, users=2, start_steps=1, shrink=True)
    first = learned_init(scenario.data, config, tmp_path)
    assert learned_init(scenario.data, config, tmp_path) == first
    assert learned_init(scenario.data, replace(config, start_copies=1), tmp_path) != first
    monkeypatch.setattr(learned, "CONSTANTS", [*start.CONSTANTS[:-1], 0.25])
    assert learned_init(scenario.data, config, tmp_path) != first


def test_copies_are_made_of_images_alone_and_only_where_a_start_is_fitted(text_world):
    with pytest.raises(ValueError, match="made of images, and population"):
        check_fitting(text_world.scenario.data, 1)
    with pytest.raises(ValueError, match="set start_copies=0 as well"):
        MetaConfig(start_copies=2)
    with pytest.raises(ValueError, match="start_copies must be at least 0, got -1"):
        MetaConfig(start_copies=-1, start_steps=1)
    with pytest.raises(ValueError, match="Did you mean 'shift'"):
        MetaConfig(start_augment="shfit")


def test_a_start_is_never_fitted_to_what_users_are_rewarded_on(real_data):
    crossed = worlds.scenario("dsa/PopquornBert-v0").data
    with pytest.raises(ValueError, match="is cross-fitted: users are rewarded on its fitting examples"):
        fitted_start(crossed, 1, 0)
    with pytest.raises(ValueError, match="has no `fitting` examples"):
        check_fitting(tastes.seen_through(tastes.population(tastes.biased)))
    for wrong in ({"start_steps": -1}, {"start_steps": 1, "neutral": True}, {"start_steps": 1, "random_start": True}):
        with pytest.raises(ValueError, match="start"):
            MetaConfig(**wrong)


def test_co_training_passes_over_masks_that_have_nothing_to_learn(scenario, monkeypatch):
    chosen = np.zeros((len(scenario.users("train")), 1, len(scenario.pathways)), dtype=bool)
    chosen[..., scenario.pathways.index("readout")] = True
    chosen[0, 0, 0] = True
    monkeypatch.setattr(cotrain, "load_policy", lambda *_: (None, None))
    monkeypatch.setattr(cotrain, "choose_plans", lambda *_: chosen)
    own = cotrain.own_masks(SimpleNamespace(rules=Rules(0.1)), scenario, None)[0]
    assert own[0].sum() == 2
    assert not own[1:].any()


def test_budgets_are_of_parameters(tmp_path):
    with pytest.raises(ValueError, match="counts flops: budgets are of personal parameters"):
        measure_seed(tmp_path, UNIPEN, 0, [])


def test_the_harness_measures_masks_that_end_early(real_data, tmp_path):
    pairs = [word for name, value in MINIATURES[UNIPEN].items() for word in ("--env-kwargs", f"{name}:{json.dumps(value)}")]
    methods = "base,intercept,all_on,best_static,gradient_norm,importance,random,gumbel,hard_concrete,greedy"
    few = ["--seeds", "1", "--workers", "1", "--shown", "--no-timing", "--cost-weights", "0.1"]
    run.main(["--env", UNIPEN, *pairs, "--methods", methods, *few, "--out", str(tmp_path)])
    with (tmp_path / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "ok"]
    by = {name: [row for row in rows if row["method"] == name] for name in methods.split(",")}
    bare = float(by["base"][0]["cost"])
    assert 0 < bare < 1
    assert {float(row["cost"]) for row in by["intercept"]} == {bare}  # all that runs is counted: the bare model at least
    assert {float(row["cost"]) for row in by["all_on"]} == {1.0}
    assert all(0 < float(row["cost"]) <= 1 for each in by.values() for row in each)
    report = (tmp_path / "results.md").read_text()
    assert (
        "Cost: operations, as a share of what everything on takes, of all that runs" in report
        and "cost: operations" in (tmp_path / "report.html").read_text()
    )
    assert "inf" not in report.replace("info", "")
    assert {"1" in row["mask"] for name in ("best_static", "greedy", "random") for row in by[name]} == {True}

"""Deciding again between rounds, against one decision held for as many gradient steps, on miniature digits."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from agents.run import RunConfig
from envs import MINIATURES
from envs.oracles import LiveOracle, Plans, all_masks
from envs.scenario import load_scenario
from eval import rounds
from eval.rounds import Figures, difference, figures, live_oracle, tiled, titles, verdict
from meta.inner import MetaInit
from meta.store import init_facts, load_init

ENV = "dsa/DigitsResNet-v0"
SMALL = MINIATURES[ENV] | {"widths": [8, 16], "rank": 4}
FLAGS = ["--env-kwargs", *(f"{name}:{json.dumps(value)}" for name, value in SMALL.items()), "--num-threads", "1"]
SETTINGS = {"n_envs": 16, "n_steps": 4, "batch_size": 64, "n_epochs": 2, "total_timesteps": 256, "eval_freq": 128}
# Everything on, before and after training: re-gating must then come to what holding comes to.
SETTINGS |= {"learning_rate": 1e-9, "policy_kwargs": {"initial_logit": 3.0}}
PPO = [f"-P={name}:{json.dumps(value)}" for name, value in SETTINGS.items()]


@pytest.fixture(scope="module")
def config():
    return rounds.settings(rounds.parse([*FLAGS, *PPO]), seed=0)


@pytest.fixture(scope="module")
def scenario(config):
    return config.scenario()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page after the command, the runs, and the command."""
    folder = tmp_path_factory.mktemp("rounds")
    page = folder / "page.md"
    page.write_text(f"before\n{rounds.BEGIN}\nold\n{rounds.END}\nafter\n")
    words = [*FLAGS, *PPO, "--rounds", "2", "--runs", str(folder / "runs")]
    rounds.main([*words, "--write", str(page)])
    return page, next((folder / "runs").iterdir()), words


def cells(page, title):
    line = next(line for line in page.read_text().splitlines() if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


@pytest.mark.parametrize("count", [2, 3])
def test_a_mask_through_r_rounds_is_the_mask_on_the_tiled_initialisation(scenario, count):
    live = live_oracle(scenario)
    # Rates as different as can be from step to step, so that their order matters.
    rates = live.init.rates * torch.tensor([0.5, 1.0, 2.0])[:, None]
    base = LiveOracle(live.data, replace(live.init, rates=rates))
    long = LiveOracle(live.data, tiled(base.init, count))
    users = scenario.users("test")
    masks = all_masks(len(scenario.pathways))[[1, 6, 9, 16, 23, 31]]
    through = base.evaluate(users, np.repeat(masks[:, None], count, 1), "query")
    held = long.evaluate(users, masks, "query")
    np.testing.assert_allclose(through.loss, held.loss, atol=1e-5)
    np.testing.assert_array_equal(through.accuracy, held.accuracy)
    assert np.abs(base.evaluate(users, masks, "query").loss - held.loss).max() > 1e-3  # or nothing was compared


def test_tiling_repeats_the_steps_in_order_and_changes_nothing_else():
    init = MetaInit({"a": torch.ones(2)}, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([True, False]))
    long = tiled(init, 3)
    assert long.rates.tolist() == [[1.0, 2.0], [3.0, 4.0]] * 3 and long.steps == 6
    assert long.weights is init.weights and long.adapted is init.adapted
    with pytest.raises(ValueError, match="at least 1, got 0"):
        tiled(init, 0)


def test_both_rivals_see_equally_many_episodes_and_gradient_steps(config, scenario, tmp_path):
    again, held = rounds.regating(config, 3), rounds.holding(config, 3, tmp_path)
    assert (config.rules.rounds, again.rules.rounds, held.rules.rounds) == (1, 3, 1)
    for name in ("total_timesteps", "eval_freq"):
        assert getattr(again, name) == 3 * getattr(config, name) == 3 * getattr(held, name)
    assert again.ppo == {**config.ppo, "n_steps": 12} and held.ppo == config.ppo
    assert again.scenario() is scenario
    saved = load_init(tmp_path / "init-3", init_facts(scenario.data))
    assert held.env_kwargs["init"] == str(tmp_path / "init-3")
    assert saved.steps == live_oracle(held.scenario()).init.steps == 3 * live_oracle(scenario).init.steps == 9


def test_changes_of_mask_and_gradient_steps_are_counted_per_user(scenario):
    plans: Plans = np.zeros((len(scenario.users("test")), 2, len(scenario.pathways)), dtype=bool)
    plans[0, :, 0] = True  # held
    plans[1, 1, 0] = True  # off, then on
    plans[2, 0, 1], plans[2, 1, 2] = True, True  # another one
    found = figures(scenario, plans, 0.5)
    assert found.changed.tolist() == [0, 1, 1, 0, 0, 0]
    assert found.steps.tolist() == [6, 3, 6, 0, 0, 0]
    np.testing.assert_allclose(found.cost, scenario.oracle.costs.of(plans[:, -1]))
    np.testing.assert_allclose(found.reward, found.accuracy - 0.5 * found.cost)


def test_the_page_has_every_row_and_keeping_everything_on_is_holding_it(written):
    page, _, _ = written
    text = page.read_text()
    assert text.startswith(f"before\n{rounds.BEGIN}\n") and text.endswith(f"{rounds.END}\nafter\n") and "old" not in text
    once, again, held, fixed = (cells(page, title) for title in (rounds.ONCE, *titles(2)))
    assert once[2:] == ["1.000", "0%", "3.0"]
    assert again[2:] == held[2:] == ["1.000", "0%", "6.0"] and again[:2] == held[:2]
    assert len(fixed) == 5 and len(cells(page, "2")) == 5
    assert "by reward, re-gating in 2 rounds: no difference shown." in text
    assert "6 test users each" in text and "about 256 episodes" in text


def test_every_row_is_what_its_title_says(config, monkeypatch, tmp_path):
    def facts(made, rows):
        return rows, made.rules.rounds, live_oracle(made.scenario()).init.steps, made.total_timesteps

    monkeypatch.setattr(rounds, "learned", lambda made, folder: facts(made, folder.name))
    monkeypatch.setattr(rounds, "static", lambda made: facts(made, "static"))
    assert rounds.measured(config, [2, 3], tmp_path) == {
        "one round": ("once", 1, 3, 256),
        "2 rounds, re-gated": ("regated-2", 2, 3, 512),
        "2 rounds, held": ("held-2", 1, 6, 256),
        "2 rounds, best_static": ("static", 1, 6, 256),
        "3 rounds, re-gated": ("regated-3", 3, 3, 768),
        "3 rounds, held": ("held-3", 1, 9, 256),
        "3 rounds, best_static": ("static", 1, 9, 256),
    }


def test_tables_hold_means_and_differences_over_users_and_seeds():
    rng = np.random.default_rng(0)
    names = (rounds.ONCE, *titles(2))
    seeds = [{name: Figures(*rng.random((5, 20))) for name in names} for _ in range(2)]

    def mean(title, field):
        return np.mean([getattr(seed[title], field) for seed in seeds])

    for name, line in zip(names, rounds.table(seeds)[2:], strict=True):
        _, reward, accuracy, cost, changed, steps = (cell.strip() for cell in line.split("|")[1:-1])
        assert (reward, accuracy, cost) == tuple(f"{mean(name, field):.3f}" for field in ("reward", "accuracy", "cost"))
        assert (changed, steps) == (f"{mean(name, 'changed'):.0%}", f"{mean(name, 'steps'):.1f}")
    again, held, fixed = titles(2)
    wanted = [mean(again, field) - mean(held, field) for field in ("reward", "accuracy", "cost")]
    wanted += [mean(again, "reward") - mean(fixed, "reward"), mean(held, "reward") - mean(rounds.ONCE, "reward")]
    found = [cell.split()[0] for cell in rounds.differences(seeds, [2], None)[2].split("|")[2:-1]]
    assert found == [f"{value:+.3f}" for value in wanted]


def test_the_page_names_the_command_but_nobodys_folders(written):
    page, _, _ = written
    assert "python -m eval.rounds --env-kwargs meta_steps:2" in page.read_text()
    assert str(page.parent) not in page.read_text()
    assert rounds.shown("data_root:/home/me/data") == "data_root:data"


def test_equally_many_episodes_were_trained_on(written):
    _, runs, _ = written
    steps = {
        name: json.loads((runs / name / "checkpoint.json").read_text())["meta"]["num_timesteps"]
        for name in ("once", "regated-2", "held-2")
    }
    assert steps == {"once": 256, "regated-2": 512, "held-2": 256}


def test_called_again_it_trains_nothing_and_finds_the_same(written, monkeypatch):
    page, _, words = written
    before = page.read_text()
    monkeypatch.setattr("stable_baselines3.PPO.learn", lambda *_, **__: pytest.fail("trained again"))
    rounds.main([*words, "--write", str(page)])
    assert page.read_text() == before


@pytest.mark.parametrize(("gain", "words"), [(0.2, "better"), (-0.2, "worse"), (0.0, "no difference shown")])
def test_the_verdict_follows_from_the_interval(gain, words):
    noise = np.random.default_rng(0).normal(0, 0.1, 100)
    again, held, _ = titles(2)
    blank = Figures(*(np.zeros(100) for _ in range(5)))
    seed = {again: replace(blank, reward=noise - noise.mean() + gain), held: blank}
    assert difference([seed], again, held).mean == pytest.approx(gain)
    assert verdict([seed], [2], None).endswith(f"re-gating in 2 rounds: {words}.")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--rounds", "1", "2"], "at least 2, got 1"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--env-kwargs", "rounds:2"], "--rounds says how many"),
        (["--env", "dsa/Plantd-v0"], "Did you mean 'dsa/Planted-v0'"),
        (["--total-timesteps", "0"], "total_timesteps must be at least 1"),
        (["--cost-weight", "-1"], "cost_weight must be finite and at least 0"),
    ],
)
def test_bad_arguments_are_refused(words, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        rounds.settings(rounds.parse(words), seed=0)
    with pytest.raises(SystemExit, match=match):
        rounds.main([*words, "--runs", str(tmp_path), "--num-threads", "1"])
    assert not list(tmp_path.iterdir())


def test_a_problem_without_a_model_is_refused_before_anything_is_trained(tmp_path):
    planted = load_scenario("planted", users=40, seed=0)
    with pytest.raises(ValueError, match="choose another --env"):
        live_oracle(planted)
    config = RunConfig("dsa/Planted-v0", 0, 0.1, 64, 64, 4, 0.0, "GatingPolicy", env_kwargs={"users": 40})
    with pytest.raises(ValueError, match="choose another --env"):
        rounds.measured(config, [2], tmp_path)
    assert not list(tmp_path.iterdir())

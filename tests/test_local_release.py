"""What devices send in place of observations: as noisy as promised, made of public facts, one look at a user."""

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import worlds
from gymnasium.utils.env_checker import check_env
from scipy.stats import norm

from envs.local_release import DELTA, SENT, LocalRelease, released
from envs.modelled import OBSERVED
from envs.rules import Rules
from envs.scenario import load_scenario
from envs.statistics import STANDARDISED
from envs.tables import PathwayTable
from eval.world import World
from serving import Personaliser

USERS, PATHWAYS = 60, 3


@pytest.fixture(scope="module")
def observed():
    draw = np.random.default_rng(0)
    shape = draw.normal(size=(8 + PATHWAYS * STANDARDISED, 4))
    seen = (draw.normal(size=(USERS, 4)) @ shape.T * 0.5).astype(np.float32)
    own = seen[:, 8:].reshape(USERS, PATHWAYS, STANDARDISED)
    return seen[:, :8], np.concatenate([own, np.ones((USERS, PATHWAYS, 3), np.float32)], 2)


@pytest.fixture(scope="module")
def table():
    return load_scenario("tabular")


def test_the_noise_is_just_enough_for_any_two_observations(observed):
    release = LocalRelease.fit(*observed, epsilon=2.0, directions=3)
    far = 1000 * (observed[0] - observed[0].mean(0)), 1000 * observed[1]
    quiet = replace(release, noise=0.0).send(*far, np.random.default_rng(0))
    apart = max(np.linalg.norm(quiet - other, axis=1).max() for other in quiet)
    assert apart <= 2 * release.clip + 1e-9 and apart > 1.8 * release.clip
    ratio = 2 * release.clip / release.noise  # sensitivity in standard deviations; Balle & Wang, theorem 5
    delta = norm.cdf(ratio / 2 - 2.0 / ratio) - np.exp(2.0) * norm.cdf(-ratio / 2 - 2.0 / ratio)
    assert delta == pytest.approx(DELTA, rel=1e-3)
    one = observed[0][:1].repeat(4000, 0), observed[1][:1].repeat(4000, 0)
    sent = release.send(*one, np.random.default_rng(1))
    np.testing.assert_allclose(sent.std(0), release.noise, rtol=0.05)


def test_without_need_for_noise_policies_see_the_observation(observed):
    release = LocalRelease.fit(*observed, epsilon=1e7, directions=4)
    sent = replace(release, clip=1e9).send(*observed, np.random.default_rng(0))
    embeddings, statistics = release.read(sent, observed[1])
    np.testing.assert_allclose(embeddings, observed[0].clip(-5, 5), atol=0.02)
    np.testing.assert_allclose(statistics, observed[1].clip(-5, 5), atol=0.02)


def test_what_is_read_depends_on_what_was_sent_and_on_what_is_the_same_for_everybody(observed):
    release = LocalRelease.fit(*observed, epsilon=1.0)
    sent = release.send(*observed, np.random.default_rng(0))
    other = observed[1].copy()
    other[:, :, :STANDARDISED] += 1.0
    for first, second in zip(release.read(sent, observed[1]), release.read(sent, other), strict=True):
        np.testing.assert_array_equal(first, second)
    assert all(np.abs(each).max() <= 5 for each in release.read(1e6 * sent, observed[1]))


def test_public_users_alone_say_how(table):
    private = np.concatenate([table.users("train"), table.users("test")])
    embeddings = table.embeddings.copy()
    embeddings[private] += 3.0
    first, second = released(table, 4.0).sent, released(replace(table, embeddings=embeddings), 4.0).sent
    np.testing.assert_array_equal(first.axes, second.axes)
    assert (first.clip, first.noise) == (second.clip, second.noise)


def test_experiments_can_be_repeated_whoever_is_looked_at_first(table):
    one, again, other = (released(table, 4.0, seed=seed) for seed in (0, 0, 1))
    backwards = np.stack([one.embeddings[user] for user in range(9, -1, -1)])[::-1]
    np.testing.assert_array_equal(backwards, again.embeddings[np.arange(10)])
    np.testing.assert_array_equal(one.statistics[np.arange(10)], again.statistics[np.arange(10)])
    assert (other.embeddings[np.arange(10)] != backwards).any()
    assert len({table.fingerprint, one.fingerprint, other.fingerprint, released(table, 5.0).fingerprint}) == 4
    assert one.made_of["sent"] == "4 numbers at epsilon 4, delta 1e-05, seed 0"


def test_nobody_is_looked_at_twice(table):
    sent = released(table, 4.0)
    with pytest.raises(ValueError, match="sent once: play with rounds=1"):
        Rules(0.1, rounds=2).core(sent, slots=2)
    with pytest.raises(ValueError, match="sent once: play with rounds=1"):
        sent.observe(np.array([0]), np.ones((1, 1, len(table.pathways)), bool))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_environment_takes_it_as_arguments():
    env = gymnasium.make("dsa/Tabular-v0", local_epsilon=2.0, local_directions=2, seed=3)
    check_env(env.unwrapped, skip_render_check=True)
    plain = gymnasium.make("dsa/Tabular-v0")
    first, second = env.reset(seed=0)[0], plain.reset(seed=0)[0]
    assert (first["user"] != second["user"]).any()
    np.testing.assert_array_equal(first["pathways"][:, STANDARDISED:], second["pathways"][:, STANDARDISED:])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epsilon": 0.0}, "local_epsilon must be"),
        ({"epsilon": float("inf")}, "local_epsilon must be"),
        ({"epsilon": float("nan")}, "local_epsilon must be"),
        ({"epsilon": 1.0, "delta": 0.0}, "delta of a local release"),
        ({"epsilon": 1.0, "directions": 0}, "local_directions must be 1 to"),
        ({"epsilon": 1.0, "directions": 10_000}, "local_directions must be 1 to"),
    ],
)
def test_settings_out_of_range_are_refused(table, wrong, message):
    with pytest.raises(ValueError, match=message):
        released(table, **wrong)


def test_toy_problems_have_nothing_to_send():
    with pytest.raises(ValueError, match="no statistics of real pathways"):
        planted = load_scenario("planted")
        released(replace(planted, statistics=np.zeros((*planted.statistics.shape[:2], 2), np.float32)), 1.0)


def test_train_users_are_not_in_the_scales_of_what_is_sent():
    with pytest.raises(ValueError, match="observed_on='val'"):
        worlds.scenario("dsa/DigitsResNet-v0", local_epsilon=1.0)


def tabulated(tmp_path, **facts):
    """The packaged table as one of yours, that says more of what it was made of."""
    found = PathwayTable.packaged()
    replace(found, made_of={**found.made_of, **facts}).save(tmp_path / "mine")
    return str(tmp_path / "mine")


def test_train_users_are_not_in_the_scales_of_a_table_of_yours_either(tmp_path):
    with pytest.raises(ValueError, match=r"those of .*mine are theirs: tabulate with --env-kwargs observed_on:val"):
        load_scenario("tabular", table=tabulated(tmp_path), local_epsilon=2.0)
    assert load_scenario("tabular", table=tabulated(tmp_path, **{OBSERVED: "val 0"}), local_epsilon=2.0, seed=1).sent


def test_what_was_sent_is_not_sent_again(tmp_path):
    mine = tabulated(tmp_path, **{OBSERVED: "val 0", SENT: "4 numbers"})
    with pytest.raises(ValueError, match=r"holds what devices sent already \(4 numbers\): leave out local_epsilon"):
        load_scenario("tabular", table=mine, local_epsilon=2.0)


def test_rivals_that_see_examples_are_not_measured_beside_it():
    scenario = worlds.scenario("dsa/DigitsResNet-v0", local_epsilon=1.0, observed_on="val")
    with pytest.raises(ValueError, match="leave out local_epsilon"):
        World.of(scenario, "dsa/DigitsResNet-v0", {}, 0, None)


def test_served_users_are_shown_to_the_policy_as_devices_send_them(tmp_path):
    scenario, seen = worlds.scenario("dsa/DigitsResNet-v0", local_epsilon=1.0, observed_on="val"), []

    class Looking:
        def predict(self, observation, deterministic):
            seen.append(observation["user"].copy())
            return np.ones((len(observation["user"]), len(scenario.pathways)), bool), None

    user = scenario.data.population.train[0]
    with Personaliser(scenario, Looking(), Rules(0.1), tmp_path / "users.db") as service:
        for _ in range(2):
            service.enroll("ann", user.support.inputs, user.support.labels)
    raw = scenario.look.arrays["embeddings"][0]
    assert (seen[0] != seen[1]).any() and np.abs(seen[0][0] - raw).max() > 0.1
    axes = scenario.sent.axes[: len(raw)]
    outside = seen[0][0] - scenario.sent.mean[: len(raw)]
    assert np.linalg.matrix_rank(np.column_stack([axes, outside]), tol=1e-3) <= axes.shape[1]

"""The core under the shells: its errors, its state, and on the digits in miniature the oracle and the statistics."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

import envs
from backbones.artefacts import ArtefactError
from backbones.pathways import make_pathways
from envs.core import PathwaySelection
from envs.oracles import CachedOracle, FormulaOracle, LiveOracle, Oracle, Outcome
from envs.planted import PlantedEnv, planted
from envs.scenario import load_scenario
from envs.statistics import NAMES, STANDARDISED, PathwayStatistics
from meta.inner import MetaInit, stacked, user_loss
from users.base import Examples, Population, User
from users.batch import Prepared, stack

WIDTH = 8
"""Pathways of the planted problem."""
SLOTS = np.arange(3)


class RecordingOracle(Oracle):
    """Notes every pair and role that gets through to the inner oracle."""

    def __init__(self, inner):
        self.inner, self.costs, self.asked = inner, inner.costs, []

    def measure(self, users, plans, roles):
        for user, plan in zip(users.tolist(), plans, strict=True):
            self.asked.append((user, plan.tobytes(), roles))
        return self.inner.measure(users, plans, roles)

    def pairs(self):
        return [(user, plan) for user, plan, _ in self.asked]


@pytest.fixture(scope="module")
def digits():
    kwargs = {**gym.spec("dsa/DigitsResNet-v0").kwargs, **envs.MINIATURES["dsa/DigitsResNet-v0"]}
    return load_scenario(kwargs.pop("scenario"), **kwargs)


@pytest.fixture(scope="module")
def live(digits):
    """The live oracle of the miniature; remembers nothing but weights between rounds."""
    return digits.oracle.live


@pytest.fixture
def recorded(digits, live):
    """The miniature with an empty cache, and what its live oracle is asked."""
    oracle = RecordingOracle(live)
    return replace(digits, oracle=CachedOracle(oracle, digits.oracle.query_of)), oracle


def core(**kwargs):
    settings = {"split": "train", "cost_weight": 0.1, "rounds": 1, "slots": 3, **kwargs}
    return PathwaySelection(planted(), **settings)


def started(**kwargs):
    made = core(**kwargs)
    for slot in range(len(made.users)):
        made.seed(slot, 100 + slot)
    made.reset(np.arange(len(made.users)))
    return made


def random_masks(count, pathways=WIDTH, seed=0):
    return np.random.default_rng(seed).integers(0, 2, (count, pathways)).astype(bool)


# Errors: each names the cause and the cure.


@pytest.mark.parametrize("bits", [0, 7, 9])
def test_a_mask_of_the_wrong_length_is_refused(bits):
    env = gym.make("dsa/Planted-v0").unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match=f"8 bits, one per pathway; got an action of shape .{bits},"):
        env.step(np.zeros(bits, dtype=np.int8))


def test_a_scalar_action_is_refused():
    env = gym.make("dsa/Planted-v0").unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match="8 bits"):
        env.step(1)


@pytest.mark.parametrize("value", [0.5, -1, 2, float("nan"), float("inf"), "1", None])
def test_a_mask_with_other_values_than_bits_is_refused(value):
    env = gym.make("dsa/Planted-v0").unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match="only 0 and 1"):
        env.step([value] * WIDTH)


def test_the_refusal_shows_the_value_that_is_wrong():
    env = gym.make("dsa/Planted-v0").unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"0\.5"):
        env.step([0.0] * (WIDTH - 1) + [0.5])


@pytest.mark.parametrize("kind", [bool, np.int8, np.int64, np.float32])
def test_bits_of_any_numeric_type_are_taken(kind):
    env = gym.make("dsa/Planted-v0").unwrapped
    env.reset(seed=0)
    mask = random_masks(1)[0]
    assert env.step(mask.astype(kind))[4]["mask"].tolist() == mask.astype(int).tolist()


def test_a_refused_action_leaves_the_episode_as_it_was():
    first, second = started(), started()
    with pytest.raises(ValueError, match="only 0 and 1"):
        first.step(SLOTS, np.full((3, WIDTH), 0.5))
    assert first.state() == second.state()


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_an_impossible_cost_weight_is_refused(weight):
    with pytest.raises(ValueError, match="cost_weight must be"):
        gym.make("dsa/Planted-v0", cost_weight=weight)


@pytest.mark.parametrize("rounds", [0, -1, 1.5])
def test_an_impossible_number_of_rounds_is_refused(rounds):
    with pytest.raises(ValueError, match="whole number of at least 1"):
        gym.make("dsa/Planted-v0", rounds=rounds)


def test_no_slots_are_refused():
    with pytest.raises(ValueError, match="at least one user at a time"):
        core(slots=0)


def test_an_unknown_split_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown split 'validation'; choose from train, val, test"):
        gym.make("dsa/Planted-v0", split="validation")


def test_an_unknown_render_mode_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown render_mode 'humn'; choose from ansi, rgb_array"):
        PlantedEnv("planted", render_mode="humn")


def test_a_step_after_the_end_is_refused():
    env = gym.make("dsa/Planted-v0").unwrapped
    env.reset(seed=0)
    env.step(np.zeros(WIDTH, dtype=np.int8))
    with pytest.raises(RuntimeError, match=r"episode is over; call reset\(\)"):
        env.step(np.zeros(WIDTH, dtype=np.int8))


@pytest.mark.parametrize("user", ["nobody", 400, -1])
def test_an_unknown_user_is_refused(user):
    env = gym.make("dsa/Planted-v0")
    with pytest.raises(ValueError, match=f"no user .*{user}"):
        env.reset(seed=0, options={"user": user})


def test_an_unknown_scenario_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match=r"unknown scenario 'plantd'\. Did you mean 'planted'"):
        load_scenario("plantd")


@pytest.mark.parametrize("users", [0, 12, -8])
def test_a_planted_population_of_impossible_size_is_refused(users):
    with pytest.raises(ValueError, match="multiple of 8"):
        planted(users=users)


# Users and state.


@pytest.mark.parametrize("asked", ["user-7", 7])
def test_a_user_can_be_asked_for_by_id_and_by_position(asked):
    env = gym.make("dsa/Planted-v0")
    observation, info = env.reset(seed=0, options={"user": asked})
    assert info["user"] == "user-7"
    np.testing.assert_array_equal(observation["user"], env.unwrapped.core.scenario.embeddings[7])


def test_asking_for_a_user_takes_no_place_in_the_sequence():
    env = gym.make("dsa/Planted-v0")
    order = [env.reset(seed=5)[1]["user"], env.reset()[1]["user"]]
    assert env.reset(seed=5)[1]["user"] == order[0]
    env.reset(options={"user": "user-7"})
    assert env.reset()[1]["user"] == order[1]


def test_restoring_a_state_goes_on_exactly():
    first, second = started(rounds=3, slots=3), core(rounds=3, slots=3)
    masks = random_masks(3 * 12).reshape(12, 3, WIDTH)
    first.step(SLOTS, masks[0])
    first.step(SLOTS[:1], masks[1][:1])
    second.restore(first.state())
    assert second.state() == first.state()
    for actions in masks[2:]:
        over = np.flatnonzero(first.done >= 3)
        assert first.reset(over) == second.reset(over)
        np.testing.assert_equal(first.observe(SLOTS), second.observe(SLOTS))
        one, other = first.step(SLOTS, actions), second.step(SLOTS, actions)
        np.testing.assert_array_equal(one.rewards, other.rewards)
        np.testing.assert_equal(one.infos, other.infos)
    assert second.state() == first.state()


def test_a_states_rewards_depend_on_what_was_earned_before():
    first, second = started(rounds=2), core(rounds=2)
    first.step(SLOTS, random_masks(3))
    second.restore({**first.state(), "earned": [0.0] * 3})
    rewards = [c.step(SLOTS, random_masks(3, seed=1)).rewards for c in (first, second)]
    assert (rewards[0] != rewards[1]).any()


def test_slots_out_of_step_are_answered_as_if_alone():
    mixed, alone = started(rounds=3), started(rounds=3)
    masks = random_masks(6).reshape(2, 3, WIDTH)
    mixed.step(SLOTS[:1], masks[0][:1])
    mixed_rewards = mixed.step(SLOTS, masks[1]).rewards
    alone.step(SLOTS[:1], masks[0][:1])
    expected = [alone.step(SLOTS[s : s + 1], masks[1][s : s + 1]).rewards[0] for s in SLOTS]
    np.testing.assert_allclose(mixed_rewards, expected, atol=1e-14)


def test_the_reward_of_an_outcome_is_accuracy_minus_weighted_cost():
    outcome = Outcome(np.array([0.5, 0.75]), np.array([9.0, 9.0]), np.array([0.0, 0.5]))
    assert outcome.reward(0.2).tolist() == [0.5, 0.65]


# The oracle, on the digits in miniature.


def test_costs_sum_to_one_and_all_off_costs_nothing(digits, live):
    users, pathways = digits.users("test")[:2], len(digits.pathways)
    masks = np.stack([np.zeros(pathways, dtype=bool), np.ones(pathways, dtype=bool)])
    assert live.costs.own.sum() == pytest.approx(1)
    assert (live.costs.own > 0).all()
    assert live.evaluate(users, masks).cost.tolist() == pytest.approx([0.0, 1.0])


def test_the_cost_of_a_mask_is_its_share_of_personal_parameters(digits, live):
    mask = random_masks(1, len(digits.pathways), seed=3)
    sizes = live.pathways.sizes.numpy()
    assert live.evaluate(digits.users("val")[:1], mask).cost[0] == pytest.approx(sizes[mask[0]].sum() / sizes.sum())


def test_all_off_is_the_population_model(digits, live):
    users = digits.users("test")
    off = np.zeros((len(users), len(digits.pathways)), dtype=bool)
    right = [
        float((live.pathways.model(user.query.inputs).argmax(-1) == user.query.labels).double().mean())
        for user in live.population.test
    ]
    np.testing.assert_allclose(live.evaluate(users, off, "query").accuracy, right, atol=1e-6)


def test_users_of_all_splits_are_answered_together_as_alone(digits, live):
    users = np.concatenate([digits.users(split)[:2] for split in ("test", "train", "val")])
    masks = random_masks(len(users), len(digits.pathways))
    together = live.evaluate(users, masks)
    for row in range(len(users)):
        alone = live.evaluate(users[row : row + 1], masks[row : row + 1])
        assert together.accuracy[row] == pytest.approx(alone.accuracy[0], abs=1e-6)
        assert together.loss[row] == pytest.approx(alone.loss[0], abs=1e-4)


def test_adapting_two_users_in_chunks_of_one_changes_nothing(digits, live):
    small = LiveOracle(Prepared(live.pathways, live.population), live.init, chunk=1)
    users, masks = digits.users("val"), random_masks(4, len(digits.pathways))
    np.testing.assert_allclose(small.evaluate(users, masks).loss, live.evaluate(users, masks).loss, atol=1e-4)


def test_no_pair_is_adapted_twice(recorded):
    scenario, oracle = recorded
    users, masks = scenario.users("train")[:5], random_masks(5, len(scenario.pathways))
    first = scenario.oracle.evaluate(users, masks)
    second = scenario.oracle.evaluate(users[::-1], masks[::-1])
    assert len(oracle.asked) == 5
    np.testing.assert_array_equal(first.accuracy, second.accuracy[::-1])


def test_pairs_that_occur_twice_within_a_call_are_adapted_once(recorded):
    scenario, oracle = recorded
    users = np.repeat(scenario.users("train")[:2], 3)
    masks = np.repeat(random_masks(2, len(scenario.pathways)), 3, axis=0)
    found = scenario.oracle.evaluate(users, masks)
    assert len(oracle.asked) == 2
    assert len(set(found.loss[:3].tolist())) == len(set(found.loss[3:].tolist())) == 1


def test_only_missing_pairs_are_asked_again(recorded):
    scenario, oracle = recorded
    users, masks = scenario.users("train")[:4], random_masks(4, len(scenario.pathways))
    scenario.oracle.evaluate(users[:2], masks[:2])
    scenario.oracle.evaluate(users, masks)
    assert sorted(oracle.pairs()) == sorted({*oracle.pairs()})
    assert len(oracle.asked) == 4


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("roles", [("validation", "query"), ("query", "validation")])
def test_validation_and_query_of_val_and_test_users_are_measured_in_one_adaptation(recorded, split, roles):
    scenario, oracle = recorded
    users, masks = scenario.users(split), random_masks(len(scenario.users(split)), len(scenario.pathways))
    for role in roles:
        scenario.oracle.evaluate(users, masks, role)
    assert len(oracle.asked) == len(users)


def test_query_examples_of_train_users_are_not_looked_at_for_rewards(recorded):
    scenario, oracle = recorded
    scenario.oracle.evaluate(scenario.users("train")[:3], random_masks(3, len(scenario.pathways)))
    assert {roles for _, _, roles in oracle.asked} == {("validation",)}


def test_each_role_is_answered_as_the_live_oracle_answers_it(recorded, live):
    scenario, _ = recorded
    users, masks = scenario.users("val")[:2], random_masks(2, len(scenario.pathways))
    for role in ("query", "support_halves", "validation", "query_all_labels"):
        mine, theirs = scenario.oracle.evaluate(users, masks, role), live.evaluate(users, masks, role)
        np.testing.assert_allclose(mine.accuracy, theirs.accuracy, atol=1e-6)
        np.testing.assert_allclose(mine.loss, theirs.loss, atol=1e-5)


def test_an_episode_of_the_environment_asks_nothing_that_is_known(recorded):
    scenario, oracle = recorded
    mask = np.ones((3, len(scenario.pathways)), dtype=bool)
    played = PathwaySelection(scenario, "train", 0.1, 1, slots=3)
    for _ in range(12):
        played.reset(SLOTS)
        played.step(SLOTS, mask)
    assert len(oracle.asked) <= len(scenario.users("train"))
    assert len(oracle.pairs()) == len({*oracle.pairs()})


def test_answers_survive_on_disk(digits, live, tmp_path):
    users, masks = digits.users("val"), random_masks(4, len(digits.pathways))
    before = CachedOracle(live, digits.oracle.query_of, tmp_path / "answers")
    kept = [before.evaluate(users, masks, role) for role in ("validation", "query", "support_halves")]
    before.save()
    silent = RecordingOracle(live)
    after = CachedOracle(silent, digits.oracle.query_of, tmp_path / "answers")
    assert len(after) == len(before) == 4
    for role, outcome in zip(("validation", "query", "support_halves"), kept, strict=True):
        np.testing.assert_equal(vars(after.evaluate(users, masks, role)), vars(outcome))
    assert silent.asked == []


def test_answers_added_after_loading_survive_as_well(digits, live, tmp_path):
    users, masks = digits.users("val"), random_masks(4, len(digits.pathways))
    plans = random_masks(4, len(digits.pathways), seed=1).reshape(2, 2, -1)
    for part in (slice(0, 2), slice(2, 4)):
        oracle = CachedOracle(live, digits.oracle.query_of, tmp_path / "answers")
        oracle.evaluate(users[part], masks[part])
        oracle.evaluate(users[:2], plans)
        oracle.save()
    silent = RecordingOracle(live)
    CachedOracle(silent, digits.oracle.query_of, tmp_path / "answers").evaluate(users, masks)
    assert silent.asked == []


def test_saving_without_a_path_writes_nothing(recorded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scenario, _ = recorded
    scenario.oracle.evaluate(scenario.users("val")[:1], random_masks(1, len(scenario.pathways)))
    scenario.oracle.save()
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("suffix", ["*.json", "*.safetensors"])
def test_a_damaged_file_of_answers_is_refused(digits, live, tmp_path, suffix):
    oracle = CachedOracle(live, digits.oracle.query_of, tmp_path / "answers")
    oracle.evaluate(digits.users("val")[:1], random_masks(1, len(digits.pathways)))
    oracle.save()
    file = next(tmp_path.glob(suffix))
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ArtefactError, match="Remove"):
        CachedOracle(live, digits.oracle.query_of, tmp_path / "answers")


def test_more_answers_than_the_table_first_holds_are_kept():
    oracle = RecordingOracle(planted().oracle)
    cached = CachedOracle(oracle, np.zeros(400, dtype=bool))
    users, masks = np.arange(2500) % 400, random_masks(2500)
    outcomes = [cached.evaluate(users, masks).accuracy for _ in range(2)]
    np.testing.assert_array_equal(outcomes[0], planted().oracle.evaluate(users, masks).accuracy)
    np.testing.assert_array_equal(*outcomes)
    assert len(oracle.asked) == len({*oracle.pairs()}) == len(cached)


def test_a_reward_that_is_not_a_number_names_the_user(digits, live, monkeypatch):
    def broken(pathways, weights, gates, batch):
        return torch.full((len(batch),), torch.nan), torch.zeros(len(batch))

    monkeypatch.setattr("envs.oracles.measure", broken)
    user = digits.users("val")[1]
    with pytest.raises(FloatingPointError, match=f"user '{digits.user_ids[user]}'.*NaN"):
        live.evaluate(np.array([user]), random_masks(1, len(digits.pathways)))


def test_an_answer_that_failed_is_asked_again(recorded, monkeypatch):
    scenario, oracle = recorded
    users, masks = scenario.users("val")[:1], random_masks(1, len(scenario.pathways))
    with monkeypatch.context() as patch:
        patch.setattr(oracle.inner, "measure", raises_floating_point_error)
        with pytest.raises(FloatingPointError):
            scenario.oracle.evaluate(users, masks)
    assert np.isfinite(scenario.oracle.evaluate(users, masks).accuracy).all()


def raises_floating_point_error(*args):
    raise FloatingPointError("user 'x' gave NaN")


# Several rounds.


def test_a_second_round_goes_on_from_the_first(digits, live):
    """Four steps are two rounds of two, under the same mask."""
    init = MetaInit(live.init.weights, live.init.rates[:1].repeat(4, 1), live.init.adapted)
    short = MetaInit(init.weights, init.rates[:2], init.adapted)
    users, masks = digits.users("val"), random_masks(4, len(digits.pathways))
    once = LiveOracle(Prepared(live.pathways, live.population), init).evaluate(users, masks)
    plans = np.repeat(masks[:, None], 2, axis=1)
    twice = LiveOracle(Prepared(live.pathways, live.population), short).evaluate(users, plans)
    first = LiveOracle(Prepared(live.pathways, live.population), short).evaluate(users, masks)
    np.testing.assert_allclose(twice.loss, once.loss, atol=1e-5)
    assert (twice.loss != first.loss).any()


def test_remembered_weights_give_what_recomputed_ones_give(digits, live):
    users = digits.users("train")[:3]
    plans = random_masks(9, len(digits.pathways), seed=4).reshape(3, 3, -1)
    remembering, fresh = (LiveOracle(Prepared(live.pathways, live.population), live.init) for _ in range(2))
    for rounds in (1, 2, 3):
        last = remembering.evaluate(users, plans[:, :rounds])
    np.testing.assert_allclose(last.loss, fresh.evaluate(users, plans).loss, atol=1e-6)


def test_adapted_weights_are_remembered_only_where_somebody_goes_on_from_them(digits, live):
    users = digits.users("train")[:3]
    plans = random_masks(9, len(digits.pathways), seed=5).reshape(3, 3, -1)
    oracle = LiveOracle(Prepared(live.pathways, live.population), live.init)
    oracle.evaluate(users, plans[:, 0])
    assert not oracle._recent and oracle.adaptations == 3
    for rounds, adaptations in ((2, 9), (3, 12)):  # the first time it is not known yet
        oracle.evaluate(users, plans[:, :rounds])
        assert oracle._recent and oracle.adaptations == adaptations


@pytest.mark.parametrize("wrong", [-1, 10_000])
def test_positions_where_nobody_is_are_refused(digits, live, wrong):
    plans = random_masks(2, len(digits.pathways))[:, None]
    users = np.array([0, wrong])
    for ask in (
        lambda: live.measure(users, plans, ("validation",)),
        lambda: live.adapted(users, plans),
        lambda: digits.observe(users, plans),
    ):
        with pytest.raises(IndexError, match=rf"no user at position {wrong}; the population has {len(digits.user_ids)}"):
            ask()


def test_the_order_of_masks_matters_over_rounds(digits, live):
    users, pathways = digits.users("val")[:1], len(digits.pathways)
    masks = np.eye(pathways, dtype=bool)
    plan = np.stack([masks[-1], masks[0]])[None]
    ahead, back = live.evaluate(users, plan), live.evaluate(users, plan[:, ::-1].copy())
    assert ahead.loss[0] != back.loss[0]
    assert ahead.cost[0] == pytest.approx(live.costs.own[0])
    assert back.cost[0] == pytest.approx(live.costs.own[-1])


def test_the_statistics_of_a_round_are_at_its_weights_and_mask(digits, live):
    statistics = PathwayStatistics.fit(live.pathways, live.init, live.batch("train", "support"))
    users, plans = digits.users("val")[:2], random_masks(2, len(digits.pathways))[:, None]
    found = digits.observe(users, plans)
    weights = live.adapted(users, plans)
    gates = torch.from_numpy(plans[:, -1])
    support = live.batch("val", "support").rows(torch.arange(2))
    expected = statistics.observe(statistics.raw(support, weights, gates), gates).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert (found[..., : STANDARDISED - 2] != digits.statistics[users][..., : STANDARDISED - 2]).any()
    np.testing.assert_array_equal(found[..., NAMES.index("gate")], plans[:, -1])


# Roles that may not look at everything.


def changed(population, role, **how):
    """The population with other examples in one role."""

    def other(user):
        examples = getattr(user, role)
        inputs = examples.inputs.flip(0) * how.get("scale", 1.0)
        return replace(user, **{role: Examples(inputs, (examples.labels + 3) % population.num_classes)})

    return replace(population, **{split: tuple(map(other, getattr(population, split))) for split in ("val", "test")})


@pytest.mark.parametrize(
    ("role", "looks_at"),
    [
        ("support_halves", {"support"}),
        ("validation", {"support", "validation"}),
        ("query", {"support", "query"}),
        ("query_all_labels", {"support", "validation", "query"}),
    ],
)
@pytest.mark.parametrize("part", ["support", "validation", "query"])
def test_a_role_looks_at_its_own_examples_only(digits, live, role, looks_at, part):
    users, masks = digits.users("test"), np.ones((6, len(digits.pathways)), dtype=bool)
    other = LiveOracle(Prepared(live.pathways, changed(live.population, part)), live.init)
    before, after = live.evaluate(users, masks, role), other.evaluate(users, masks, role)
    if part in looks_at:
        assert (before.loss != after.loss).all()
    else:
        np.testing.assert_array_equal(before.loss, after.loss)
        np.testing.assert_array_equal(before.accuracy, after.accuracy)


def test_support_halves_measures_each_half_after_adaptation_on_the_other(digits, live):
    users, masks = digits.users("val"), np.ones((4, len(digits.pathways)), dtype=bool)
    found = []
    for fit, on in ((0, 1), (1, 0)):
        halved = replace(live.population, val=tuple(halves(user, fit, on) for user in live.population.val))
        found.append(LiveOracle(Prepared(live.pathways, halved), live.init).evaluate(users, masks))
    crossed = live.evaluate(users, masks, "support_halves")
    np.testing.assert_allclose(crossed.accuracy, (found[0].accuracy + found[1].accuracy) / 2, atol=1e-6)
    np.testing.assert_allclose(crossed.loss, (found[0].loss + found[1].loss) / 2, atol=1e-4)


def halves(user, fit, on):
    parts = [Examples(user.support.inputs[i::2], user.support.labels[i::2]) for i in (fit, on)]
    return User(user.user_id, parts[0], parts[1], user.query, user.info)


def test_query_all_labels_adapts_on_support_and_validation_together(digits, live):
    users, masks = digits.users("val"), np.ones((4, len(digits.pathways)), dtype=bool)
    joined = replace(live.population, val=tuple(all_labels(user) for user in live.population.val))
    expected = LiveOracle(Prepared(live.pathways, joined), live.init).evaluate(users, masks, "query")
    found = live.evaluate(users, masks, "query_all_labels")
    np.testing.assert_allclose(found.accuracy, expected.accuracy, atol=1e-6)
    np.testing.assert_allclose(found.loss, expected.loss, atol=1e-4)


def all_labels(user):
    inputs = torch.cat([user.support.inputs, user.validation.inputs])
    labels = torch.cat([user.support.labels, user.validation.labels])
    return replace(user, support=Examples(inputs, labels))


def ragged(population, sizes):
    """Test users cut to the given support sizes; nobody else."""
    cut = [
        replace(user, support=Examples(user.support.inputs[:n], user.support.labels[:n]))
        for user, n in zip(population.test, sizes, strict=False)
    ]
    return Population("ragged", population.num_classes, population.train[:2], population.val[:1], tuple(cut))


@pytest.mark.parametrize("role", ["validation", "support_halves", "query_all_labels"])
def test_a_user_with_few_examples_is_answered_the_same_alone_or_beside_others(live, role):
    sizes = (1, 3, 20, 2)
    beside = LiveOracle(Prepared(live.pathways, ragged(live.population, sizes)), live.init)
    mask = np.ones((1, live.pathways.num_pathways), dtype=bool)
    for place in range(len(sizes)):
        few = ragged(live.population, sizes)
        alone = LiveOracle(Prepared(live.pathways, replace(few, test=few.test[place : place + 1])), live.init)
        one, other = alone.evaluate(np.array([3]), mask, role), beside.evaluate(np.array([3 + place]), mask, role)
        assert one.accuracy[0] == pytest.approx(other.accuracy[0], abs=1e-6), sizes[place]
        assert one.loss[0] == pytest.approx(other.loss[0], abs=1e-4), sizes[place]


# Statistics.


def fitted(live):
    return PathwayStatistics.fit(live.pathways, live.init, live.batch("train", "support"))


def test_statistics_have_one_finite_row_per_pathway(digits):
    users, pathways = len(digits.user_ids), len(digits.pathways)
    assert digits.statistics.shape == (users, pathways, len(NAMES))
    assert np.isfinite(digits.statistics).all()
    assert np.isfinite(digits.embeddings).all()


def test_statistics_are_standardised_on_train_users(live):
    statistics = fitted(live)
    raw = statistics.raw(live.batch("train", "support"))
    # Clipping would shift the mean a little.
    values = ((statistics._transformed(raw) - statistics.mean) / statistics.scale).numpy()
    np.testing.assert_allclose(values.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(values.std(0), 1, atol=1e-2)


def test_the_observed_statistics_are_close_to_standardised(digits):
    shown = digits.statistics[digits.users("train")][..., :STANDARDISED]
    assert np.abs(shown.mean(0)).max() < 0.2


def test_raw_columns_are_depth_cost_and_gate(digits, live):
    depth, cost, gate = np.moveaxis(digits.statistics[..., -3:], -1, 0)
    pathways = len(digits.pathways)
    np.testing.assert_allclose(depth, np.broadcast_to(np.linspace(0, 1, pathways), depth.shape), atol=1e-6)
    np.testing.assert_allclose(cost, np.broadcast_to(live.costs.own, cost.shape), atol=1e-6)
    assert (gate == 1).all()


@pytest.mark.parametrize(("part", "moves"), [("support", True), ("validation", False), ("query", False)])
def test_observations_depend_on_the_support_alone(live, part, moves):
    other = LiveOracle(Prepared(live.pathways, changed(live.population, part, scale=0.5)), live.init)
    shown = [fitted(live).observe(fitted(live).raw(o.batch("test", "support"))) for o in (live, other)]
    assert torch.equal(*shown) != moves


def test_statistics_of_a_user_are_the_same_alone_or_in_a_batch(live):
    statistics, support = fitted(live), live.batch("test", "support")
    together = statistics.observe(statistics.raw(support))
    for row in range(len(support)):
        alone = statistics.observe(statistics.raw(support.rows(torch.tensor([row]))))
        np.testing.assert_allclose(alone[0], together[row], atol=2e-3)


def test_statistics_hold_gradients_whoever_asks(live):
    """Users of an open-ended population are observed when a policy is asked, which may be under no_grad."""
    statistics, support = fitted(live), live.batch("test", "support")
    expected = statistics.observe(statistics.raw(support))
    with torch.no_grad():
        found = statistics.observe(statistics.raw(support))
    assert torch.equal(found, expected) and not found.requires_grad
    assert (statistics.raw(support).gradient_norm > 0).all()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 20])
def test_statistics_of_a_user_with_few_examples_are_finite_and_do_not_depend_on_padding(live, size):
    statistics = fitted(live)
    population = ragged(live.population, [size, 20])
    both, alone = (stack(live.pathways, population.test[:n], "support") for n in (2, 1))
    one, other = (statistics.raw(batch) for batch in (alone, both))
    for name in vars(one):
        assert getattr(other, name).isfinite().all(), name
        np.testing.assert_allclose(getattr(one, name)[0].log1p(), getattr(other, name)[0].log1p(), atol=1e-3, err_msg=name)


def test_the_gradient_norm_is_that_of_the_mean_support_loss(live):
    """Dealing the support into parts must not change the gradient of the whole."""
    support = live.batch("val", "support").rows(torch.tensor([2]))
    weights = {k: w.detach().clone().requires_grad_() for k, w in stacked(live.init, 1).items()}
    gates = torch.ones(1, live.pathways.num_pathways, dtype=torch.bool)
    user_loss(live.pathways.logits(support.frozen, weights, gates), support).sum().backward()
    found = fitted(live).raw(support).gradient_norm[0]
    for p, keys in live.pathways.keys.items():
        norm = torch.cat([weights[k].grad.flatten() for k in keys]).norm() / live.pathways.sizes[p] ** 0.5
        assert float(found[p]) == pytest.approx(float(norm), rel=1e-3)


def test_another_number_of_pathways_gives_as_many_rows(live):
    wider = make_pathways("inline", live.pathways.model, rank=2)
    assert wider.num_pathways == live.pathways.num_pathways
    init = MetaInit(wider.start(0), torch.full((2, wider.num_pathways), 0.1), torch.ones(wider.num_pathways).bool())
    oracle = LiveOracle(Prepared(wider, live.population), init)
    assert fitted(oracle).raw(oracle.batch("val", "support")).gradient_norm.shape == (4, wider.num_pathways)


def test_two_processes_that_share_a_cache_keep_each_others_answers(tmp_path):
    costs = np.full(3, 1 / 3)
    one, two = (
        CachedOracle(FormulaOracle(costs, lambda users, masks: masks.mean(1)), np.zeros(4, dtype=bool), tmp_path / "answers")
        for _ in range(2)
    )
    one.evaluate(np.array([0]), np.ones((1, 3), dtype=bool))
    two.evaluate(np.array([1]), np.zeros((1, 3), dtype=bool))
    one.save()
    two.save()
    third = CachedOracle(one.live, np.zeros(4, dtype=bool), tmp_path / "answers")
    assert len(third) == 2
    third.live = None  # nothing may be asked any more
    assert third.evaluate(np.array([0, 1]), np.array([[1, 1, 1], [0, 0, 0]], dtype=bool)).accuracy.tolist() == [1.0, 0.0]

"""Oracles on the digits in miniature: what a mask is worth, that nothing is measured twice, rounds, and roles."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from recording import RecordingOracle
from varied import SLOTS, changed, ragged, random_masks

from backbones.artefacts import ArtefactError
from envs.core import PathwaySelection
from envs.oracles import CachedOracle, FormulaOracle, LiveOracle, Outcome
from envs.planted import planted
from meta.inner import MetaInit
from users.base import Examples, User
from users.batch import Prepared


@pytest.fixture
def recorded(digits, live):
    """The miniature with an empty cache, and what its live oracle is asked."""
    oracle = RecordingOracle(live)
    return replace(digits, oracle=CachedOracle(oracle, digits.oracle.query_of)), oracle


def test_costs_sum_to_one_and_all_off_costs_nothing(digits, live):
    users, pathways = digits.users("test")[:2], len(digits.pathways)
    masks = np.stack([np.zeros(pathways, dtype=bool), np.ones(pathways, dtype=bool)])
    assert live.costs.own.sum() == pytest.approx(1)
    assert (live.costs.own > 0).all()
    assert live.evaluate(users, masks).cost.tolist() == pytest.approx([0.0, 1.0])


def test_the_reward_of_an_outcome_is_accuracy_minus_weighted_cost():
    outcome = Outcome(np.array([0.5, 0.75]), np.array([9.0, 9.0]), np.array([0.0, 0.5]))
    assert outcome.reward(0.2).tolist() == [0.5, 0.65]


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


def test_where_somebody_has_many_examples_fewer_are_adapted_together(digits, live, monkeypatch):
    users, masks = digits.users("test"), random_masks(len(digits.users("test")), len(digits.pathways))
    whole = live.evaluate(users, masks).loss
    monkeypatch.setattr("envs.oracles.PADDED", 1)
    small, asked = LiveOracle(Prepared(live.pathways, live.population), live.init, chunk=60), []
    monkeypatch.setattr(
        small, "rows", lambda split, role, users: asked.append(len(users)) or small.data.rows(split, role, users)
    )
    np.testing.assert_allclose(small.evaluate(users, masks).loss, whole, atol=1e-4)
    longest = max(len(getattr(user, role)) for user in live.population.users for role in ("support", "validation", "query"))
    assert max(asked) == 60 // longest < len(users)


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


# Roles that may not look at everything.


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

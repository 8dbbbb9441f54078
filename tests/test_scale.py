"""Bounded memory, users drawn on demand, precision, and a meta-initialisation given from outside."""

import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from backbones.artefacts import ArtefactError
from backbones.base import hash_tensors
from backbones.pathways import make_pathways
from backbones.resnet import small_resnet
from envs import modelled as module
from envs.by_user import ByUser
from envs.core import PathwaySelection
from envs.modelled import modelled_scenario
from envs.oracles import CachedOracle, FormulaOracle, LiveOracle
from envs.scenario import load_scenario
from meta.inner import MetaInit
from meta.prepare import prepared
from meta.store import init_facts, load_init, save_init
from users import digits as digits_module
from users.base import ROLES, SPLITS, Examples, Population, User
from users.batch import Prepared, stack
from users.describe import describe
from users.digits import digits_population
from users.lazy import KEPT, MANY

TINY = {"meta_steps": 2, "meta_users": 4, "train_users": 12, "val_users": 4, "test_users": 6, "pretrain_epochs": 1}


def start(pathways):
    """A meta-initialisation with which users change much."""
    weights = {key: torch.randn_like(w) * 0.1 for key, w in pathways.start(0).items()}
    count = pathways.num_pathways
    return MetaInit(weights, torch.full((2, count), 0.1 * pathways.rate_scale), torch.ones(count, dtype=torch.bool))


def masks(count, pathways, seed=0):
    return np.random.default_rng(seed).random((count, pathways.num_pathways)) < 0.6


@pytest.fixture
def many(monkeypatch):
    """A limit of 20 users beyond which users are drawn on demand."""
    monkeypatch.setattr(digits_module, "MANY", 20)


# Bounded memory


@pytest.fixture(scope="module", params=["inline", "lora", "side"])
def either(request, model):
    return make_pathways(request.param, model, rank=4)


@pytest.mark.parametrize("memory", [0.0, 3e-4, 1.0])
def test_forgotten_states_are_made_again_bit_by_bit(either, population, memory):
    data = Prepared(either, population, memory=memory)
    for split in SPLITS:
        everybody = getattr(population, split)
        order = torch.randperm(len(everybody)).repeat(2)
        for role in ROLES:
            expected = stack(either, everybody, role).rows(order)
            found = data.rows(split, role, order)
            assert torch.equal(found.labels, expected.labels) and torch.equal(found.weights, expected.weights)
            for p in range(either.num_pathways):
                torch.testing.assert_close(found.frozen.sites[p], expected.frozen.sites[p], rtol=1e-5, atol=1e-5)
    again = [data.rows("train", "query", torch.arange(12)).frozen.sites[p] for p in range(either.num_pathways)]
    plenty = [Prepared(either, population).rows("train", "query", torch.arange(12)).frozen.sites[p] for p in range(len(again))]
    assert all(map(torch.equal, again, plenty))


def test_answers_do_not_depend_on_the_memory(either, population):
    users, gates = np.arange(12), masks(12, either)
    roles = ("validation", "query", "support_halves", "query_all_labels")
    init = start(either)
    oracles = [LiveOracle(Prepared(either, population, memory=gigabytes), init, 8) for gigabytes in (0.0, 3e-4, 4.0)]
    first, *others = [oracle.measure(users, gates[:, None], roles) for oracle in oracles]
    assert np.ptp(first[:, 0, 0]) > 0.1
    assert all(np.array_equal(first, other) for other in others)
    assert oracles[0].data.kept.bytes == 0
    assert oracles[0].data.kept.made > oracles[2].data.kept.made


def test_kept_bytes_stay_under_the_setting_and_are_counted_rightly(either, population):
    data = Prepared(either, population, memory=3e-4)
    everything = Prepared(either, population)
    most = 0
    for split in SPLITS:
        for role in ROLES:
            for user in range(len(getattr(population, split))):
                batch = data.rows(split, role, torch.tensor([user]))
                everything.rows(split, role, torch.tensor([user]))
                assert batch.labels.shape[0] == 1
                held = data.kept._found.values()
                assert data.kept.bytes == sum(one.bytes for one in held) <= 3e5
                most = max(most, data.kept.bytes)
    assert most > 1.5e5  # it was full, and something else than nothing
    assert everything.kept.made == len(everything.kept._found) == 3 * len(population.users)
    floats = sum(site.numel() for one in everything.kept._found.values() for site in one.frozen.sites)
    assert everything.kept.bytes == 4 * floats + 8 * 120 * len(population.users)
    before = everything.kept.made
    everything.rows("train", "query", torch.arange(12))
    assert everything.kept.made == before


def test_the_users_asked_for_last_are_those_kept(either, population):
    probe = Prepared(either, population)
    probe.rows("train", "support", torch.tensor([0]))
    data = Prepared(either, population, memory=2.5e-9 * probe.kept.bytes)
    for user in (0, 1, 0, 2):  # 1 is the one used longest ago when 2 comes
        data.rows("train", "support", torch.tensor([user]))
    assert [key[-1] for key in data.kept._found] == [0, 2]


def test_users_of_different_sizes_are_padded_to_the_longest_of_the_split(either, population):
    def cut(user, n):
        return replace(user, support=Examples(user.support.inputs[:n], user.support.labels[:n]))

    ragged = replace(population, train=tuple(cut(u, n) for u, n in zip(population.train[:3], (20, 3, 7), strict=True)))
    data, users = Prepared(either, ragged), torch.tensor([2, 1])
    found, expected = data.rows("train", "support", users), stack(either, ragged.train, "support").rows(users)
    assert found.labels.shape == (2, 20)
    present = found.weights > 0
    assert torch.equal(found.labels, expected.labels) and torch.equal(found.weights, expected.weights)
    assert torch.equal(present.sum(1), torch.tensor([7, 3]))
    last = data.readouts("train", "support")
    assert torch.equal(last.rows(users).weights, found.weights)
    for batch in (found, last.rows(users)):
        torch.testing.assert_close(batch.frozen.sites[-1][present], expected.frozen.sites[-1][present], rtol=1e-5, atol=1e-5)
    assert len(data.readouts("train", "support", 2)) == len(data.part("train", "support", 2)) == 2


def test_sites_that_nobody_reads_are_not_put_together(pathways, population):
    batch = Prepared(pathways, population).rows("train", "query", torch.arange(12))
    assert not batch.table.sites._found
    batch.frozen.sites[2]
    assert list(batch.table.sites._found) == [2]


def test_pooled_features_that_do_not_fit_are_not_kept_on_disk(model, population, tmp_path):
    side = make_pathways("side", model, rank=4)
    small = Prepared(side, population, tmp_path, memory=1e-4)
    few = small.rows("train", "query", torch.arange(3))
    assert not list(tmp_path.iterdir())
    large = Prepared(side, population, tmp_path).rows("train", "query", torch.arange(3))
    assert list(tmp_path.iterdir())
    torch.testing.assert_close(few.frozen.sites[0], large.frozen.sites[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory", [-1.0, float("nan"), float("inf")])
def test_an_impossible_memory_is_refused(pathways, population, memory):
    with pytest.raises(ValueError, match="memory must be a finite number of GB of at least 0"):
        Prepared(pathways, population, memory=memory)


def test_the_oracle_s_memory_can_be_limited_and_then_not_be_on_disk(tmp_path):
    asked = []

    def accuracy(users, plans):
        asked.extend(users.tolist())
        return users / 10

    formula = FormulaOracle(np.ones(2) / 2, accuracy)
    cached, plans = CachedOracle(formula, np.zeros(9, dtype=bool), limit=3), np.ones((2, 2), dtype=bool)
    for users in ([0, 1], [0, 2], [3, 0], [0, 3]):
        assert cached.evaluate(np.array(users), plans).accuracy.tolist() == [u / 10 for u in users]
        assert len(cached) <= 4
    assert asked == [0, 1, 2, 3, 0]
    with pytest.raises(ValueError, match="a path or a limit"):
        CachedOracle(formula, np.zeros(9, dtype=bool), tmp_path / "answers", limit=3)


# Users drawn on demand


def test_fingerprints_of_users_drawn_at_once_are_what_they_always_were():
    """A changed fingerprint would have everybody's artefacts made again."""
    population = digits_population(0, 12, 3, 4)
    assert (population.fingerprint(), population.fingerprint("train")) == ("cb4b6f16e70e655f", "f9140e8269dd3004")
    assert not digits_population(0, 600, 120, 240).lazy


def test_a_hundred_thousand_users_take_no_memory():
    tracemalloc.start()
    population = digits_population(0, train_users=100_000, val_users=2, test_users=2)
    text, first = describe(population), population.fingerprint()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6  # drawn at once they are 3 GB
    assert population.train.drawn <= 32
    assert "100,000 train" in text and "12,000,480 examples" in text
    assert len(population.users) == len(population.ids) == len(population.infos) == len(population.sizes("query")) == 100_004
    assert population.train.drawn <= 32
    assert population.fingerprint() == first


def test_users_drawn_on_demand_are_those_drawn_at_once(many):
    lazy, eager = digits_population(3, 30, 2, 25), digits_population(3, 20, 2, 20)
    assert lazy.lazy and not eager.lazy
    info = [lazy.infos[n] for n in (4, 31, 32)]  # before anybody is drawn
    assert lazy.ids[:20] == eager.ids[:20] and lazy.ids[32:52] == eager.ids[22:]
    for split in SPLITS:
        for n, expected in enumerate(getattr(eager, split)[:20]):
            found = getattr(lazy, split)[n]
            assert found.user_id == expected.user_id and found.info == expected.info
            for role in ROLES:
                one, other = getattr(found, role), getattr(expected, role)
                assert torch.equal(one.inputs, other.inputs) and torch.equal(one.labels, other.labels)
    assert info == [lazy.train[4].info, lazy.val[1].info, lazy.test[0].info]
    assert lazy.users[31].user_id == "val-1" and lazy.users[-1].user_id == "test-24" == lazy.ids[-1]
    assert [user.user_id for user in lazy.train[27:]] == ["train-27", "train-28", "train-29"]
    for role in ROLES:
        assert np.array_equal(lazy.sizes(role), [len(getattr(user, role)) for user in lazy.users])
        assert lazy.sizes(role).dtype == eager.sizes(role).dtype
    with pytest.raises(IndexError):
        lazy.users[57]


def test_only_the_latest_users_are_remembered():
    train = digits_population(0, MANY + 1, 1, 1).train
    before = train.drawn
    for n in range(20, 20 + KEPT + 5):
        train[n]
    assert train.drawn == before + KEPT + 5 and len(train._kept) == KEPT
    train[20 + KEPT], train[20]
    assert train.drawn == before + KEPT + 6  # the first one again


@pytest.mark.parametrize("other", [{"seed": 4}, {"train_users": 31}, {"two_shifts": 0.5}, {"shifts": ("none", "noisy")}])
def test_fingerprints_of_users_drawn_on_demand_follow_what_they_are_drawn_from(many, other):
    arguments = {"seed": 3, "train_users": 30, "val_users": 1, "test_users": 1}
    prints = [digits_population(**arguments).fingerprint("train") for _ in range(2)]
    assert prints[0] == prints[1] != digits_population(**{**arguments, **other}).fingerprint("train")


def test_fingerprints_of_users_drawn_on_demand_follow_the_code_that_draws_them(many, monkeypatch):
    before = digits_population(3, 30, 1, 1).fingerprint("train")
    monkeypatch.setattr(digits_module, "_draw_rows", lambda split, pools, rng: np.arange(120))
    assert digits_population(3, 30, 1, 1).fingerprint("train") != before


def test_labels_of_users_drawn_on_demand_are_checked(many):
    lazy = digits_population(3, 30, 1, 1)
    with pytest.raises(ValueError, match=r"user 'train-0' has support labels outside 0\.\.4"):
        replace(lazy, num_classes=5)
    with pytest.raises(ValueError, match="must be unique across splits"):
        Population("twice", 10, lazy.train, (User("train-7", *_parts(lazy.val[0])),), lazy.test)


def _parts(user):
    return user.support, user.validation, user.query


@pytest.fixture
def crowd(pathways, monkeypatch):
    """A scenario over 20,000 train users, and the oracle behind it."""
    monkeypatch.setattr(module, "SAMPLE", 6)
    live = LiveOracle(Prepared(pathways, digits_population(0, 20_000, 2, 2), memory=0.05), start(pathways))
    return modelled_scenario("crowd", live, "crowd", None, {}), live


def test_a_step_touches_only_the_users_it_needs(crowd):
    scenario, live = crowd
    before = live.population.train.drawn
    assert before <= 24
    core = PathwaySelection(scenario, "train", 0.1, 1, 5)
    core.streams[:] = np.arange(5)
    core.reset(np.arange(5))
    seen = core.observe(np.arange(5))
    transition = core.step(np.arange(5), np.ones((5, len(scenario.pathways)), dtype=int))
    assert live.population.train.drawn <= before + 5
    assert live.adaptations == 5
    assert np.isfinite(transition.rewards).all() and seen["user"].any(1).all()
    users = [int(info["user"].removeprefix("train-")) for info in transition.infos]
    assert [info["shifts"] for info in transition.infos] == [live.population.train[u].info["shifts"] for u in users]
    assert max(users) > 100 and "group" not in transition.infos[0]
    assert live.data.kept.bytes <= 5e7


def test_observations_on_demand_are_those_made_at_once(pathways, monkeypatch):
    monkeypatch.setattr(digits_module, "MANY", 5)
    monkeypatch.setattr(module, "SAMPLE", 6)
    lazy, init = digits_population(0, 6, 2, 2), start(pathways)
    eager = replace(lazy, train=lazy.train[:])
    assert lazy.lazy and not eager.lazy
    found, expected = (
        modelled_scenario("toy", LiveOracle(Prepared(pathways, p), init), "toy", None, {}) for p in (lazy, eager)
    )
    assert found.user_ids == expected.user_ids
    assert list(found.user_info) == list(expected.user_info) and list(found.groups) == list(expected.groups)
    for name, one in {"embeddings": found.embeddings, "statistics": found.statistics, **found.scores}.items():
        other = {"embeddings": expected.embeddings, "statistics": expected.statistics, **expected.scores}[name]
        assert isinstance(one, ByUser) and isinstance(other, np.ndarray)
        assert one.shape == other.shape and one.dtype == other.dtype and len(one) == len(other)
        for index in (7, slice(2, 4), [5, 5, 0], np.array([8, 1]), np.arange(10) > 6, (slice(0, 3), [0, 1])):
            np.testing.assert_allclose(one[index], other[index], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(np.asarray(one), other, rtol=1e-4, atol=1e-4)
    for role, counts in expected.label_counts.items():
        assert np.array_equal(found.label_counts[role], counts)
    assert np.array_equal(np.array(found.groups), np.array(expected.groups))


def test_observations_are_made_for_those_who_are_looked_at_and_once(crowd):
    scenario, live = crowd
    made = live.data.kept.made
    first = scenario.statistics[[19_999, 7_000]]
    assert live.data.kept.made == made + 2
    second, _, _ = scenario.statistics[[7_000, 19_999]], scenario.embeddings[7_000], scenario.scores["gradient_norm"][19_999]
    assert live.data.kept.made == made + 2
    assert np.array_equal(first, second[::-1])


# A meta-initialisation from outside


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outside")
    data = prepared("digits", "resnet-small", "inline", 4, 0, folder, {k: v for k, v in TINY.items() if "meta" not in k})
    return data, folder


def test_a_saved_initialisation_is_loaded_as_it_was(tiny):
    data, folder = tiny
    init = start(data.pathways)
    save_init(folder / "mine", init, {**init_facts(data), "note": "more facts do no harm"})
    found = load_init(folder / "mine", init_facts(data)).tensors()
    assert found.keys() == init.tensors().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in init.tensors().items())


@pytest.mark.parametrize(
    ("fact", "said"),
    [
        ("model", "another population model"),
        ("train_users", "other train users"),
        ("rank", r"another rank \(rank 9, here 4\)"),
        ("placement", "another placement"),
    ],
)
def test_an_initialisation_for_something_else_is_refused(tiny, fact, said):
    data, folder = tiny
    save_init(folder / fact, start(data.pathways), {**init_facts(data), fact: 9})
    with pytest.raises(ArtefactError, match=said) as raised:
        load_init(folder / fact, init_facts(data))
    assert str(raised.value).count("here") == 1
    save_init(folder / "exits", start(data.pathways), {**init_facts(data), "gates": "exit"})
    with pytest.raises(ArtefactError, match=r"another gates \(gates exit, here adapters\)"):
        load_init(folder / "exits", init_facts(data))
    save_init(folder / "nothing", start(data.pathways), {})
    with pytest.raises(ArtefactError, match=f"{fact} not stated"):
        load_init(folder / "nothing", init_facts(data))


def test_an_environment_starts_from_the_initialisation_given(tmp_path, monkeypatch):
    monkeypatch.setenv("DSA_CACHE", str(tmp_path))
    arguments = {"users": "digits", "backbone": "resnet-small", "rank": 4, "seed": 71, **TINY}
    learned = load_scenario("modelled", **arguments)
    path = tmp_path / "given"
    mine = start(learned.data.pathways)
    save_init(path, mine, init_facts(learned.data))
    given = load_scenario("modelled", **arguments, init=str(path))
    assert given.made_of["meta-initialisation"] != learned.made_of["meta-initialisation"]
    assert given.fingerprint != learned.fingerprint
    assert {k: v for k, v in given.made_of.items() if k != "meta-initialisation"} == {
        k: v for k, v in learned.made_of.items() if k != "meta-initialisation"
    }
    assert given.made_of["meta-initialisation"] == hash_tensors(mine.tensors())
    assert len(list(tmp_path.rglob("meta-*.json"))) == 1  # nothing was learned for it
    with pytest.raises(ArtefactError, match="another rank"):
        load_scenario("modelled", **{**arguments, "rank": 5}, init=str(path))
    with pytest.raises(ArtefactError, match="no meta-initialisation at"):
        load_scenario("modelled", **arguments, init=str(tmp_path / "nowhere"))


# Precision, and what answers are made of


def test_what_answers_depend_on_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("DSA_CACHE", str(tmp_path))
    arguments = {"users": "digits", "backbone": "resnet-small", "rank": 4, "seed": 72, **TINY}
    plain, low = (load_scenario("modelled", **arguments, precision=p) for p in ("float32", "bfloat16"))
    assert set(plain.made_of) == {"users", "backbone", "meta-initialisation", "placement"}
    assert plain.made_of["users"] == plain.data.population.fingerprint()
    assert low.made_of == {**plain.made_of, "precision": "bfloat16"}
    assert low.fingerprint == plain.fingerprint  # the same observations, so policies may move
    for scenario in (plain, low):
        scenario.oracle.evaluate(np.arange(2), masks(2, scenario.data.pathways))
        scenario.save()
    names = sorted(path.stem for path in tmp_path.rglob("answers-*.json"))
    assert names == [f"answers-{plain.fingerprint}", f"answers-{plain.fingerprint}-bfloat16"]
    assert json.dumps(plain.made_of)
    with pytest.raises(ValueError, match=r"unknown precision 'bfloat'.*bfloat16"):
        load_scenario("modelled", **arguments, precision="bfloat")


def test_bfloat16_is_float32_within_noise(either, population):
    users, gates, init = np.arange(12), masks(12, either), start(either)
    gates[0], gates[1] = True, False
    roles = ("validation", "query", "support_halves", "query_all_labels")
    data = Prepared(either, population)
    low = LiveOracle(data, init, precision="bfloat16").measure(users, gates[:, None], roles)
    full = LiveOracle(Prepared(either, population), init).measure(users, gates[:, None], roles)
    assert low.dtype == np.float64 and (low != full).any()
    assert np.abs(low[..., 0] - full[..., 0]).mean() < 0.02
    noise = np.abs(low[..., 1] - full[..., 1]) / (1 + np.abs(full[..., 1]))
    assert noise.mean() < 0.02 and np.quantile(noise, 0.95) < 0.05
    hits = low[:, 0, 0] * 40  # shares of 40 examples, not rounded to three digits
    np.testing.assert_allclose(hits, hits.round(), atol=1e-4)
    plain = Prepared(either, population).rows("train", "support", torch.arange(12))
    for p in range(either.num_pathways):  # frozen states were made in full precision all the same
        assert torch.equal(data.rows("train", "support", torch.arange(12)).frozen.sites[p], plain.frozen.sites[p])


def test_weights_stay_float32_and_rounds_work_in_bfloat16(either, population):
    live = LiveOracle(Prepared(either, population), start(either), precision="bfloat16")
    plans = masks(6, either).reshape(3, 2, -1)
    weights = live.adapted(np.arange(3), plans)
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert live.evaluate(np.arange(3), plans).accuracy.shape == (3,)


def test_a_reward_that_is_no_number_is_refused_in_bfloat16(pathways, population):
    init = start(pathways)
    live = LiveOracle(Prepared(pathways, population), replace(init, rates=init.rates * 1e30), precision="bfloat16")
    with pytest.raises(FloatingPointError, match="NaN or infinite reward or loss"):
        live.evaluate(np.arange(2), np.ones((2, pathways.num_pathways), dtype=bool))


def test_models_of_other_weights_are_told_apart(population, tmp_path, trained_network):
    """The same facts for another classifier are not the same model."""
    other = small_resnet(10, trained_network.state_dict(), widths=(8, 16), depth=2)
    first = init_facts(Prepared(make_pathways("inline", other, 4), population))
    other.weight.data.mul_(1.5)
    second = init_facts(Prepared(make_pathways("inline", other, 4), population))
    assert first["model"] != second["model"] and {**first, "model": 0} == {**second, "model": 0}

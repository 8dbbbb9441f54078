"""User-level differential privacy of meta-training: the account, one round by hand, the training, what is refused."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import norm

from backbones.artefacts import ArtefactError, load_artefact
from meta import accountant, train
from meta.accountant import Accountant, BudgetError, ContradictionError, Round, noise_for, spent_by, usual_delta
from meta.inner import MetaInit
from meta.learned import learned_init, trainer_for
from meta.masks import masks_for
from meta.outer import ALGORITHMS
from meta.private import (
    PART,
    UPDATES,
    Privacy,
    PrivateRounds,
    check_covered,
    clipped,
    poisson_cohort,
    secret,
    together,
    unguessable,
)
from meta.store import KIND, init_facts, load_init
from meta.trainer import MetaConfig, MetaTrainer
from tests import tastes
from tests.broken_rounds import NoisyPieces, OverTheDrawn, Quiet, Shuffled, Unclipped
from users.base import Examples, Population, User
from users.duplicates import duplicates
from users.items import TensorItems, TextItems

FEW = ["train_users:40", "val_users:4", "test_users:4", "pretrain_epochs:1"]


# The account


def test_the_account_of_a_single_sum_is_that_of_the_gaussian_mechanism():
    for noise in (0.8, 2.0):
        spent = spent_by({Round("x", 1.0, noise): 1}, 1e-5)
        delta = norm.cdf(0.5 / noise - spent * noise) - math.exp(spent) * norm.cdf(-0.5 / noise - spent * noise)
        assert delta == pytest.approx(1e-5, rel=0.02)  # Balle & Wang 2018


def test_known_values_of_sampled_rounds():
    """Values of dp-accounting 0.6.0, computed apart from this code."""
    kind = Round("x", 0.02, 1.0)
    assert spent_by({kind: 500}, usual_delta(10_000)) == pytest.approx(2.50, abs=0.01)
    assert spent_by({Round("x", 0.1, 4.0): 200}, usual_delta(1_000)) == pytest.approx(1.01, abs=0.01)
    half = {Round("a", 0.02, 1.0): 250, Round("b", 0.02, 1.0): 250}
    assert spent_by(half, usual_delta(10_000)) == pytest.approx(2.50, abs=0.01)  # parts are composed, not added up
    assert spent_by({}, 1e-3) == 0


def test_the_least_noise_for_a_budget_is_found():
    delta = usual_delta(10_000)
    noise = noise_for(2.5, delta, [(0.02, 500)])
    assert noise == pytest.approx(1.0, abs=0.01)
    assert spent_by({Round("x", 0.02, noise): 500}, delta) <= 2.5
    before = {Round("y", 0.02, 1.0): 250}
    more = noise_for(2.5, delta, [(0.02, 250)], before)
    assert more == pytest.approx(1.0, abs=0.02)
    nearly = {Round("y", 0.1, 2.073): 200}  # by the looser account these alone spend more than 3
    assert noise_for(3.0, delta, [(0.04, 60)], nearly) == pytest.approx(2.07, abs=0.05)
    with pytest.raises(BudgetError, match="no noise below"):
        noise_for(spent_by(nearly, delta) + 1e-6, delta, [(0.04, 60)], nearly)
    with pytest.raises(BudgetError, match="is spent already, of a budget of 1"):
        noise_for(1.0, delta, [(0.02, 1)], before)


@pytest.mark.parametrize(
    ("epsilon", "delta", "sampling", "rounds", "noise"),
    [
        (0.1, 1e-6, 0.01, 5_000, 25.86),
        (0.5, 1e-5, 0.005, 20_000, 5.04),
        (0.2, 1e-5, 0.01, 5_000, 11.59),
        (0.1, 1e-5, 0.02, 2_000, 27.60),
        (1.0, 1e-5, 0.002, 100_000, 2.469),
        (3.0, 1e-15, 0.02, 500, 1.56),  # such tails are cut off by one of the accounts
    ],
)
def test_rounds_that_lose_little_each_are_accounted_for(epsilon, delta, sampling, rounds, noise):
    found = noise_for(epsilon, delta, [(sampling, rounds)])
    assert found == pytest.approx(noise, rel=0.005)
    kind = Round("x", sampling, found)
    assert 0.98 * epsilon < spent_by({kind: rounds}, delta) <= epsilon
    assert spent_by({kind: rounds}, delta) <= accountant._by_divergences({kind: rounds}, delta)


def test_accounts_that_contradict_each_other_are_refused(monkeypatch):
    monkeypatch.setattr(accountant, "_by_divergences", lambda rounds, delta: 1.0)
    with pytest.raises(ContradictionError, match="one must be wrong"):
        spent_by({Round("x", 0.02, 1.0): 500}, usual_delta(10_000))


def test_a_round_beyond_the_budget_is_refused_and_not_taken_down():
    kind = Round("x", 0.5, 1.0)
    account = Accountant(6.0, 1e-3)
    made = 0
    with pytest.raises(BudgetError, match="a further round would spend epsilon"):
        while made < 100:
            account.charge(kind)
            made += 1
    assert account.rounds == {kind: made} and account.spent() <= 6.0
    assert spent_by({kind: made + 1}, 1e-3) > 6.0
    ahead = Accountant(6.0, 1e-3)
    for _ in range(made):
        ahead.charge(kind, planned=made)
    with pytest.raises(BudgetError):
        ahead.charge(kind, planned=1)
    assert Accountant.of(json.loads(json.dumps(account.state()))).rounds == account.rounds
    assert f"x: {made} rounds" in account.card()[1] and "of 6 spent" in account.card()[0]


@pytest.mark.parametrize(("epsilon", "delta"), [(0, 0.1), (-1, 0.1), (math.inf, 0.1), (math.nan, 0.1), (1, 0), (1, 1)])
def test_budgets_out_of_range_are_refused(epsilon, delta):
    with pytest.raises(ValueError, match=r"must (be a number above 0|lie between 0 and 1)"):
        Privacy(epsilon, delta)


@pytest.mark.parametrize("wrong", [{"clip": 0}, {"clip": math.inf}, {"noise": 0}, {"noise": -1}])
def test_clips_and_noises_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="must be a number above 0"):
        Privacy(3.0, **wrong)


def test_more_users_than_there_are_cannot_be_expected():
    for expected in (0, 11):
        with pytest.raises(ValueError, match=f"rounds of {expected} users in the mean cannot be drawn from 10"):
            PrivateRounds(Privacy(noise=1.0), 10, expected, 5)


# One round


def test_a_users_whole_update_is_clipped_not_its_parts():
    updates = {"a": torch.tensor([[3.0, 0.0], [0.3, 0.0]]), "b": torch.tensor([[[4.0]], [[0.4]]])}
    found = clipped(updates, 1.0)
    torch.testing.assert_close(found["a"].float(), torch.tensor([[0.6, 0.0], [0.3, 0.0]]))
    torch.testing.assert_close(found["b"].float(), torch.tensor([[[0.8]], [[0.4]]]))
    for wrong in (math.nan, math.inf):
        found = clipped({"a": torch.tensor([[wrong, 1.0], [0.3, 0.4]])}, 1.0)["a"]
        assert found.tolist() == [[0.0, 0.0], pytest.approx([0.3, 0.4])]


USERS, EXPECTED, CLIP, NOISE = 40, 10, 2.0, 0.5


def check_rounds(rounds_class=PrivateRounds):
    """Rounds on neighbouring populations, with and without the last user, against the sums worked out by hand."""
    torch.manual_seed(0)
    updates = torch.randn(USERS, 3) * 3
    sizes = []
    every, fewer = (rounds_class(Privacy(200.0, 1e-3, CLIP, NOISE, noise_seed=3), USERS, EXPECTED, 60) for _ in range(2))
    for step in range(60):

        def released(rounds, left_out=(), step=step):
            cohort = rounds.cohort(step)
            some = torch.tensor([user for user in cohort.tolist() if user not in left_out], dtype=torch.long)
            return cohort, rounds.release({"w": torch.zeros(3)}, ({"w": updates[piece]} for piece in some.split(4)))["w"]

        cohort, found = released(every)
        sizes.append(len(cohort))
        noise = NOISE * CLIP * torch.randn(3, generator=secret(3, step, f"{PART}: noise"), dtype=torch.float64)
        shares = updates.double() * (CLIP / updates.double().norm(dim=1, keepdim=True)).clamp_max(1)
        torch.testing.assert_close(found.double(), (shares[cohort].sum(0) + noise) / EXPECTED, rtol=1e-5, atol=1e-6)
        difference = found - released(fewer, left_out=(USERS - 1,))[1]
        mine = shares[-1] / EXPECTED if USERS - 1 in cohort.tolist() else torch.zeros(3)
        torch.testing.assert_close(difference.double(), mine.double(), rtol=1e-4, atol=1e-6)
        assert float(difference.norm()) <= CLIP / EXPECTED * (1 + 1e-5)
    spread = torch.tensor(sizes).double()
    assert abs(float(spread.mean()) - EXPECTED) < 1.5
    assert 4 < float(spread.var()) < 13  # 40 independent coins: 7.5


def test_rounds_on_neighbouring_populations_are_the_sums_worked_out_by_hand():
    check_rounds()


@pytest.mark.parametrize("wrong", [OverTheDrawn, NoisyPieces, Shuffled, Unclipped, Quiet])
def test_rounds_that_promise_more_than_they_keep_are_caught(wrong):
    with pytest.raises(AssertionError):
        check_rounds(wrong)


def test_nobody_may_be_drawn_and_then_noise_alone_is_released():
    rounds = PrivateRounds(Privacy(50.0, 1e-3, CLIP, NOISE, noise_seed=3), USERS, 1, 20)
    empty = next(step for step in range(20) if not len(rounds.cohort(step)))
    found = rounds.release({"w": torch.zeros(3)}, iter(()))["w"]
    noise = NOISE * CLIP * torch.randn(3, generator=secret(3, empty, f"{PART}: noise"), dtype=torch.float64)
    torch.testing.assert_close(found.double(), noise)


def test_noise_is_drawn_once_per_round_and_is_secret_without_a_seed():
    rounds = PrivateRounds(Privacy(50.0, 1e-3, CLIP, NOISE, noise_seed=3), USERS, 4, 5)
    rounds.cohort(0)
    rounds.release({"w": torch.zeros(3)}, ())
    with pytest.raises(RuntimeError, match=r"cohort\(\) comes first"):
        rounds.release({"w": torch.zeros(3)}, ())
    draws = [torch.rand(4, generator=secret(None, 0, "x")) for _ in range(2)]
    assert not torch.equal(*draws)
    same = [torch.rand(4, generator=secret(5, 1, "x")) for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], torch.rand(4, generator=secret(5, 1, "y")))


def test_everybody_is_drawn_with_the_same_probability():
    drawn = torch.cat([poisson_cohort(50, 0.3, torch.Generator().manual_seed(n)) for n in range(2000)])
    shares = torch.bincount(drawn, minlength=50) / 2000
    assert float((shares - 0.3).abs().max()) < 0.05


# Updates


@pytest.fixture(scope="module")
def world():
    return tastes.seen_through(tastes.population(tastes.biased, users=(24, 6, 6)))


def inputs_of(data, users=6):
    everybody = torch.arange(users)
    return data.part("train", "support").rows(everybody), data.part("train", "query").rows(everybody)


@pytest.mark.parametrize("algorithm", ["fomaml", "reptile"])
def test_the_mean_of_users_updates_is_the_meta_gradient(world, algorithm):
    pathways = world.pathways
    support, query = inputs_of(world)
    gates = masks_for(pathways, 6, torch.Generator().manual_seed(0))
    if algorithm == "reptile":  # which averages over the users who have a pathway on
        gates[:] = True
    config = MetaConfig(algorithm, inner_rate=0.3)
    trainer = MetaTrainer(pathways, support, query, config)
    with torch.no_grad():
        for weight in trainer.weights.values():
            weight += 0.1 * torch.randn_like(weight)
    ALGORITHMS.get(algorithm)(pathways, trainer.init(), support, query, gates)[0].backward()
    found = UPDATES.get(algorithm)(pathways, trainer.present(), support, query, gates)
    assert {*trainer._learned()} == {*found}
    for name, parameter in trainer._learned().items():
        torch.testing.assert_close(found[name].mean(0), parameter.grad, rtol=1e-4, atol=1e-7)


def test_each_users_update_is_that_of_the_user_alone(world):
    support, query = inputs_of(world)
    pathways = world.pathways
    gates = masks_for(pathways, 6, torch.Generator().manual_seed(0))
    count = pathways.num_pathways
    init = MetaInit(pathways.start(0), torch.full((2, count), 0.2), torch.ones(count, dtype=torch.bool))
    together = UPDATES.get("fomaml")(pathways, init, support, query, gates)
    for user in range(6):
        one = torch.tensor([user])
        alone = UPDATES.get("fomaml")(pathways, init, support.rows(one), query.rows(one), gates[one])
        for key, update in alone.items():
            torch.testing.assert_close(together[key][user], update[0], rtol=1e-4, atol=1e-6)


def test_one_user_less_changes_what_a_training_round_releases_by_their_own_share_alone(world):
    """Masks and the dealing of examples are set aside: they are drawn for each user alone, from numbers nobody knows."""

    def released(left_out):
        every = lambda users, _: torch.ones(len(users), world.pathways.num_pathways, dtype=torch.bool)  # noqa: E731
        rounds = PrivateRounds(Privacy(50.0, 1e-3, 0.01, 1.0, noise_seed=4), 24, 8, 3)
        parts = [world.part("train", role) for role in ("support", "query")]
        trainer = MetaTrainer(world.pathways, *parts, MetaConfig(steps=3, users=8, inner_rate=0.3), masks=every, private=rounds)
        cohort = rounds.cohort(0)
        kept = torch.tensor([user for user in cohort.tolist() if user != left_out])
        rounds.cohort = lambda step: (setattr(rounds, "_noise", rounds.source(step, "noise")), kept)[1]
        trainer._private_gradients(rounds)
        return torch.cat([w.grad.flatten() for w in trainer._learned().values()]), cohort

    whole, cohort = released(None)
    for user in cohort.tolist()[:3]:
        difference = float((whole - released(user)[0]).norm())
        assert 0 < difference <= 0.01 / 8 * (1 + 1e-4)


def test_masks_of_private_rounds_come_from_numbers_that_nobody_knows(world):
    seen = []

    def masks(users, draw):
        seen.append(torch.rand(3, generator=draw))
        return torch.ones(len(users), world.pathways.num_pathways, dtype=torch.bool)

    parts = [world.part("train", role) for role in ("support", "query")]
    for noise_seed in (1, 1, 2, None, None):
        rounds = PrivateRounds(Privacy(50.0, noise=1.0, noise_seed=noise_seed), 24, 8, 1)
        MetaTrainer(world.pathways, *parts, MetaConfig(steps=1, users=8), masks=masks, private=rounds).run()
    assert torch.equal(seen[0], seen[1])
    assert len({tuple(drawn.tolist()) for drawn in seen}) == 4


def test_secret_numbers_depend_on_far_more_than_a_seeds_32_bits(monkeypatch):
    import secrets

    words = bytearray(secrets.token_bytes(4 * 624))
    monkeypatch.setattr("meta.private.secrets.token_bytes", lambda count: bytes(words[:count]))
    first = torch.rand(1000, generator=unguessable())
    assert torch.equal(first, torch.rand(1000, generator=unguessable()))
    for place in (0, 1200, 2495):  # the first word of the state has one bit that counts, its highest
        changed = bytearray(words)
        changed[place if place else 3] ^= 0x80
        monkeypatch.setattr("meta.private.secrets.token_bytes", lambda count, changed=changed: bytes(changed[:count]))
        assert not torch.equal(first, torch.rand(1000, generator=unguessable()))
    monkeypatch.undo()
    drawn = torch.rand(20_000, generator=unguessable())
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.02) and len(drawn.unique()) > 19_900
    assert float(torch.randn(20_000, generator=unguessable()).std()) == pytest.approx(1, abs=0.03)


# Training


def private_trainer(data, folder=None, privacy=None, **settings):
    config = MetaConfig(**{"steps": 6, "users": 8, "inner_rate": 0.3, **settings})
    return trainer_for(data, config, folder, privacy=privacy or Privacy(4.0, noise_seed=1, public_model=True))


def test_without_noise_and_clipping_everybody_drawn_it_is_the_plain_training(world):
    users, every = len(world.population.train), lambda users, _: torch.ones(len(users), world.pathways.num_pathways).bool()
    config = MetaConfig(steps=5, users=users, inner_rate=0.3)
    parts = [world.part("train", role) for role in ("support", "query")]
    rounds = PrivateRounds(Privacy(1e6, 0.5, 1e6, 1.0, noise_seed=1), users, users, 5)
    rounds.kind = replace(rounds.kind, noise=1e-12)
    rounds.accountant.charge = lambda *_: None  # the account of no noise at all cannot be worked out
    private = MetaTrainer(world.pathways, *parts, config, masks=every, private=rounds).run()
    plain = MetaTrainer(world.pathways, *parts, config, masks=every).run()
    for name, tensor in plain.tensors().items():
        torch.testing.assert_close(private.tensors()[name], tensor, rtol=1e-3, atol=1e-4)


def test_memory_does_not_grow_with_the_cohort(world, monkeypatch):
    seen, inner = [], UPDATES.get("fomaml")

    def counted(pathways, init, support, *rest):
        seen.append(len(support))
        return inner(pathways, init, support, *rest)

    monkeypatch.setitem(UPDATES._things, "fomaml", counted)
    monkeypatch.setattr("meta.private.POOLED", 5)
    private_trainer(world, users=20, steps=2).run()
    assert max(seen) == 5 < sum(seen) / 2
    assert [together(SimpleNamespace(pooled=pooled)) for pooled in (True, False)] == [5, 32]


class Killed(Exception):
    pass


def test_after_a_kill_it_goes_on_as_if_nothing_had_been_and_the_account_with_it(world, tmp_path, monkeypatch):
    whole = private_trainer(world, tmp_path / "a").run(every=2)

    def stop(tag, *_):
        """Killed while it shows round 4: what was spent is on disk by then."""
        if tag == "privacy/epsilon" and trainer.step == 4:
            raise Killed

    trainer = private_trainer(world, tmp_path / "b")
    with pytest.raises(Killed):
        trainer.run(stop, every=2)
    trainer = private_trainer(world, tmp_path / "b")
    assert trainer.step == 4 and trainer.private.accountant.rounds[trainer.private.kind] == 4

    def kill(users, draw):
        raise Killed

    trainer.masks = kill  # within round 5, which is charged and never shown
    with pytest.raises(Killed):
        trainer.run(every=2)
    assert trainer.private.accountant.rounds[trainer.private.kind] == 5
    again = private_trainer(world, tmp_path / "b")
    assert again.step == 4 and again.private.accountant.rounds[again.private.kind] == 4
    rest = again.run(every=2)
    assert again.private.accountant.rounds == {again.private.kind: 6}
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, rest.tensors()[name])


def altered(folder, change):
    """Change the facts of a checkpoint, checksum included, as somebody would who means to."""
    from backbones.artefacts import save_artefact

    tensors, facts = load_artefact(folder / "meta-checkpoint", "meta checkpoint")
    change(facts)
    save_artefact(folder / "meta-checkpoint", "meta checkpoint", tensors, facts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts: facts.pop("accountant"), "has no account of the privacy"),
        (lambda facts: facts["accountant"]["rounds"].clear(), "is not that of 6 rounds"),
        (lambda facts: facts["accountant"]["rounds"][0].update(rounds=1), "is not that of 6 rounds"),
        (lambda facts: facts["accountant"]["rounds"][0].update(noise=9.0), "is not that of 6 rounds"),
        (lambda facts: facts["accountant"].update(epsilon=99.0), "is not that of 6 rounds"),
        (lambda facts: facts["accountant"].pop("delta"), "cannot be read"),
    ],
)
def test_a_checkpoint_whose_account_is_missing_or_altered_is_refused(world, tmp_path, change, message):
    private_trainer(world, tmp_path).run(every=2)
    altered(tmp_path, change)
    with pytest.raises(ArtefactError, match=message):
        private_trainer(world, tmp_path)


def test_plain_and_private_training_do_not_go_on_from_each_other(world, tmp_path):
    private_trainer(world, tmp_path / "private").run()
    with pytest.raises(ArtefactError, match="is of a private training"):
        trainer_for(world, MetaConfig(steps=6, users=8, inner_rate=0.3), tmp_path / "private")
    trainer_for(world, MetaConfig(steps=6, users=8, inner_rate=0.3), tmp_path / "plain").run()
    with pytest.raises(ArtefactError, match="has no account"):
        private_trainer(world, tmp_path / "plain")


def test_a_training_that_does_not_fit_into_the_budget_stops_before_it(world, tmp_path):
    with pytest.raises(BudgetError, match=r"50 rounds with noise 0\.5 spend more than epsilon 4: take noise \d\.\d+, fewer"):
        private_trainer(world, tmp_path, Privacy(4.0, noise=0.5, public_model=True), steps=50)
    trainer = private_trainer(world, tmp_path, steps=3)
    trainer.private.accountant.epsilon = 1e-3  # somebody's budget shrinks on the way
    with pytest.raises(BudgetError, match="a further round would spend"):
        trainer.run()
    assert trainer.step == 0


def test_what_train_users_lose_is_neither_logged_nor_shown(world, capsys):
    logged = []
    private_trainer(world).run(lambda tag, value, step: logged.append(tag))
    assert "meta/train_query_loss" not in logged and "privacy/epsilon" in logged
    assert "query_loss" not in capsys.readouterr().err


def test_a_private_start_says_what_it_spent_and_no_hash_of_train_users(world, tmp_path):
    config = MetaConfig(steps=2, users=8)
    privacy = Privacy(4.0, noise_seed=1, public_model=True)
    path = learned_init(world, config, tmp_path, privacy=privacy)
    _, said = load_artefact(path, KIND)
    spent = Accountant.of(said["accountant"])
    assert 3.5 < spent.spent() <= 4.0 and sum(spent.rounds.values()) == 2
    fingerprint = world.population.fingerprint("train")
    assert fingerprint not in path.with_suffix(".json").read_text()
    assert said["privacy"]["noise_seed"] is None and spent.repeatable
    elsewhere = learned_init(world, config, tmp_path / "b", privacy=privacy)
    assert elsewhere.name != path.name  # a name that everybody could work out would be a hash of train users too
    assert isinstance(load_init(path, init_facts(world)), MetaInit)
    assert learned_init(world, config, tmp_path, privacy=privacy) == path  # nothing is spent twice
    others = {
        learned_init(world, config, tmp_path),
        learned_init(world, config, tmp_path, privacy=Privacy(5.0, public_model=True)),
    }
    assert len({path, *others}) == 3


# What is refused


def test_components_without_noise_are_refused_by_name(world):
    with pytest.raises(ValueError, match=r"unknown private algorithm 'maml'"):
        check_covered(world.population, Privacy(public_model=True), "maml")
    fitting = Examples(torch.randn(4, 2), torch.randint(2, (4,)))
    people = Population("p", 2, *([person(name)] for name in "abc"), fitting=fitting)
    with pytest.raises(ValueError, match=r"population model of 'p' is fitted on examples of people .* \(--public-model\)"):
        check_covered(people, Privacy(), "fomaml")
    check_covered(people, Privacy(public_model=True), "fomaml")
    crossed = replace(tastes.population(tastes.biased, users=(2, 1, 1)), folds=torch.zeros(tastes.ITEMS, dtype=torch.long))
    with pytest.raises(ValueError, match="is cross-fitted on everybody's examples"):
        check_covered(crossed, Privacy(public_model=True), "fomaml")


def person(name, seed=None):
    torch.manual_seed(hash(name) % 1000 if seed is None else seed)
    each = [Examples(torch.randn(3, 2), torch.randint(2, (3,))) for _ in range(3)]
    return User(name, *each)


def test_one_person_under_two_ids_is_found_whatever_the_order_and_the_roles():
    ann = person("ann", 1)
    turned = Examples(ann.support.inputs.flip(0), ann.support.labels.flip(0))
    again = User("ann2", ann.query, ann.validation, turned)
    nearly = User("bob", Examples(ann.support.inputs, 1 - ann.support.labels), ann.validation, ann.query)
    people = Population("p", 2, [ann, nearly, again], [person("v")], [person("t")])
    assert [*duplicates(people, "train")] == [("ann", "ann2")]
    with pytest.raises(ValueError, match=r"1 train or val users have exactly the examples of another \('ann' and 'ann2'\)"):
        check_covered(people, Privacy(), "fomaml")
    with pytest.raises(ValueError, match=r"\('ann' and 'ann2'\).* and none for whoever is a val user too"):
        check_covered(replace(people, train=[ann, nearly], val=[again]), Privacy(), "fomaml")


@pytest.mark.parametrize("make", [TensorItems, lambda values: TextItems(tuple(str(row.tolist()) for row in values))])
def test_one_person_under_two_ids_is_found_where_examples_are_positions_among_items(make):
    values = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    items = make(torch.cat([values, values[:6]]))  # the first six once more, at places of their own

    def at(name, first):
        return User(name, *(Examples(torch.arange(first + n, first + n + 2), torch.tensor([0, 1])) for n in (0, 2, 4)))

    people = Population("p", 2, [at("ann", 0), at("bob", 6)], [at("ann2", 12)], [person_at("t")], items=items)
    assert [*duplicates(people, "train", "val")] == [("ann", "ann2")] and not [*duplicates(people, "train")]


def person_at(name):
    return User(name, *(Examples(torch.tensor([9 + n]), torch.tensor([0])) for n in range(3)))


@pytest.mark.parametrize("flag", [("--epsilon", "1"), ("--noise", "2"), ("--public-model",), ("--noise-seed", "3")])
def test_a_promise_without_private_is_refused_before_anything_is_learned(flag, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        train.main([*flag, "--out", str(tmp_path)])
    assert f"without --private nothing is private, and {flag[0]} does nothing: add --private" in str(error.value.code)
    assert not [*tmp_path.iterdir()]


def test_the_command_prints_what_was_spent(tmp_path, capsys):
    small = [part for pair in FEW for part in ("-K", pair)]
    train.main(
        [
            "--private",
            "--epsilon",
            "4",
            "--steps",
            "3",
            "--users-per-step",
            "8",
            "--out",
            str(tmp_path),
            "--num-threads",
            "1",
            *small,
        ]
    )
    printed = capsys.readouterr().out
    assert "of 4 spent at delta" in printed and "meta-initialisation: 3 rounds" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epsilon", "-1"], "epsilon must be a number above 0"),
        (["--delta", "2"], "delta must lie between 0 and 1"),
        (["--users-per-step", "41"], "rounds of 41 users in the mean cannot be drawn from 40"),
        (["--algorithm", "anil"], "unknown private algorithm 'anil'"),
    ],
)
def test_commands_that_promise_what_cannot_be_kept_are_refused(tmp_path, arguments, message):
    small = [part for pair in FEW for part in ("-K", pair)]
    with pytest.raises(SystemExit, match=message):
        train.main(["--private", "--steps", "2", "--out", str(tmp_path), "--num-threads", "1", *arguments, *small])


def test_without_the_accountant_the_cure_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("meta.accountant.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install -e '\.\[privacy\]'"):
        train.main(["--private", "--out", str(tmp_path)])

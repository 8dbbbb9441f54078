"""Masks by scores, masks for everybody, dense rivals, searches on validation examples, and adapters made of others'."""

from copy import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import agents.rivals
import meta.shrinkage
import meta.trainer
from agents.rivals import best_static as best_static_of
from agents.rivals import best_threshold
from envs import MINIATURES
from envs.oracles import FormulaOracle, Oracle, all_masks
from eval.group import Group
from eval.methods import all_labels, make_method, meta_learned, per_pcs
from eval.methods.base import Fitted
from meta.inner import MetaInit, adapt, measure, user_loss
from meta.learned import meta_initialisation
from meta.trainer import MetaConfig, MetaTrainer
from users.batch import Batch

P = 7
"""Pathways of the digits' worlds."""
SCORED = ("gradient_norm", "relative_gradient", "importance")
DENSE = ("meta_maml", "meta_fomaml", "meta_anil", "meta_reptile")
OTHERS = ("best_static", "adapterdrop", "all_on_all_labels", "validation_search", "per_pcs")


class Recording(Oracle):
    """Notes what is asked."""

    def __init__(self, inner):
        self.inner, self.costs, self.users, self.roles, self.masks = inner, inner.costs, set(), set(), []

    def measure(self, users, plans, roles):
        self.users |= {*users.tolist()}
        self.roles |= {*roles}
        self.masks += list(plans[:, -1])
        return self.inner.measure(users, plans, roles)


def rewarded(world, accuracy):
    """The world with a formula ``(users, masks) -> accuracy`` for an oracle, and that oracle, which notes what it is asked."""
    oracle = Recording(FormulaOracle(world.scenario.oracle.costs, accuracy))
    return replace(world, scenario=replace(world.scenario, oracle=oracle, save=lambda: None)), oracle


def started(world, init):
    """The world with another meta-initialisation."""
    look = copy(world.look)
    look.of = replace(look.of, init=init)
    return replace(world, scenario=replace(world.scenario, look=look))


def shown_to(method, world, split="val"):
    support = world.group(split, "support")
    return Group.joined(support, world.group(split, "validation")) if method.labels == "all" else support


def with_threshold(fitted, threshold):
    return Fitted({**fitted.tensors, "threshold": torch.tensor(threshold, dtype=torch.float64)})


@pytest.fixture(scope="module")
def world(side_world):
    return replace(side_world, kwargs={**MINIATURES[side_world.env], **side_world.kwargs})


@pytest.fixture(scope="module")
def fits(world):
    """Every method with what it learned from a formula that likes half of the pathways."""
    cheap, _ = rewarded(world, lambda users, masks: 1 - abs(masks.mean(1) - 0.5))
    found = {name: (method := make_method(name), method.fit(cheap, 0.1)) for name in (*SCORED, *DENSE, *OTHERS)}
    search, fitted = found["validation_search"]
    return found | {"validation_search": (search, Fitted({"masks": fitted.tensors["masks"][::9]}))}  # the rest takes long


# What all have in common.


@pytest.mark.parametrize("name", [*SCORED, *DENSE, *OTHERS])
def test_what_a_user_gets_depends_neither_on_the_others_nor_on_their_order(world, fits, name):
    method, fitted = fits[name]
    shown, asked = shown_to(method, world), world.group("val", "query")
    together = method.personalise(world, fitted, shown, 0.1)
    order = [2, 0, 3, 1]
    turned = method.personalise(world, fitted, shown.rows(order), 0.1)
    assert torch.equal(turned.masks, together.masks[order])
    torch.testing.assert_close(turned.logits(asked.rows(order)), together.logits(asked)[order], atol=1e-4, rtol=1e-4)
    for user in range(len(shown)):
        alone = method.personalise(world, fitted, shown.rows([user]), 0.1)
        assert torch.equal(alone.masks[0], together.masks[user])
        torch.testing.assert_close(alone.logits(asked.rows([user]))[0], together.logits(asked)[user], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*SCORED, *DENSE, *OTHERS])
def test_one_example_is_enough_beside_somebody_who_has_more(world, fits, name):
    method, fitted = fits[name]
    support = world.group("val", "support")
    few = support.pick([torch.arange(n) for n in (1, 3, 20, 2)])
    shown = Group.joined(few, world.group("val", "validation")) if method.labels == "all" else few
    found = method.personalise(world, fitted, shown, 0.1)
    alone = method.personalise(world, fitted, shown.rows([0]), 0.1)
    asked = world.group("val", "query")
    assert torch.equal(alone.masks[0], found.masks[0])
    torch.testing.assert_close(alone.logits(asked.rows([0]))[0], found.logits(asked)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["meta_anil", "importance", "per_pcs", "validation_search"])
def test_what_is_served_is_what_is_looked_up_less_what_cross_fitting_adds(text_world, name):
    world = replace(text_world, kwargs={**MINIATURES[text_world.env], **text_world.kwargs})
    method = make_method(name)
    before = world.model.fingerprint()
    found = method.personalise(world, method.fit(world, 0.0), shown_to(method, world), 0.0)
    asked = world.group("val", "query")
    logits = found.logits(asked)
    assert asked.offset(0) is not None
    for user in range(len(asked)):
        served = found.serve(asked.inputs(user).expand(len(asked), *asked.inputs(user).shape))[user]
        torch.testing.assert_close(served + asked.offset(user), logits[user, : len(served)], atol=1e-4, rtol=1e-4)
    assert world.model.fingerprint() == before


# Thresholds on scores.


def planted(world, place, relative):
    """A start at which one side adapter's gradient (relative: to its weights) exceeds the others' by far."""
    name = world.pathways.names[place]
    weights = {k: w * (1e-4 if relative and k.startswith(f"{name}.") else 1) for k, w in world.init.weights.items()}
    if not relative:
        weights[f"{name}.up"] = torch.randn(weights[f"{name}.up"].shape, generator=torch.Generator().manual_seed(0))
        weights[f"{name}.down"] *= 30
    return started(world, replace(world.init, weights=weights, rates=world.init.rates * 1e-3))


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("place", [1, 4])
def test_a_pathway_that_dominates_is_found(world, name, place):
    only = np.arange(P) == place
    start = planted(world, place, name == "relative_gradient")
    odd, _ = rewarded(start, lambda users, masks: (masks == only).mean(1))
    method = make_method(name)
    masks = method.choose(odd, method.fit(odd, 0.0), odd.group("val", "support"), 0.0)
    assert torch.equal(masks, torch.from_numpy(only).expand(len(masks), -1))


@pytest.mark.parametrize("score", ["relative_change", "first_order"])
@pytest.mark.parametrize("cost_weight", [0.0, 0.2])
def test_the_threshold_is_the_best_on_val_users(world, score, cost_weight):
    method, val = make_method("importance", score=score), world.scenario.users("val")
    rng = np.random.default_rng(0)
    table = rng.random((len(val), 2**P))
    bits = 1 << np.arange(P)
    judged, oracle = rewarded(world, lambda users, masks: table[users - val[0], masks @ bits])
    threshold = float(method.fit(judged, cost_weight).tensors["threshold"])
    known = method.scores(world, world.group("val", "support").batch).double().numpy()

    def reward(t):
        masks = known >= t
        return (table[np.arange(len(val)), masks @ bits] - cost_weight * oracle.costs.of(masks)).mean()

    tried = [reward(t * (1 - 1e-4)) for t in np.quantile(known, np.linspace(0, 1, 32))]
    assert reward(threshold) == pytest.approx(max([*tried, reward(np.inf)]))
    assert len({*tried}) > 5
    assert (oracle.users, oracle.roles) == ({*val.tolist()}, {"query"})


def test_thresholds_reach_from_everything_to_nothing(world):
    for reward, everything in ((lambda users, masks: masks.mean(1), True), (lambda users, masks: 1 - masks.mean(1), False)):
        judged, _ = rewarded(world, reward)
        for name in SCORED:
            method = make_method(name)
            masks = method.choose(judged, method.fit(judged, 0.0), judged.group("val", "support"), 0.0)
            assert masks.all() if everything else not masks.any()


def test_rounding_of_the_lowest_score_switches_nothing():
    scores = np.random.default_rng(0).normal(size=(5, P))
    threshold = best_threshold(scores, lambda masks: masks.mean(), "all on")
    assert ((scores * (1 + 1e-5) >= threshold) & (scores * (1 - 1e-5) >= threshold)).all()


@pytest.mark.parametrize("name", ["gradient_norm", "relative_gradient"])
def test_gates_score_as_the_rivals_of_the_policy_do(world, name):
    mine = make_method(name).scores(world, world.group("val", "support").batch)
    known = world.scenario.scores[name][world.scenario.users("val")]
    np.testing.assert_allclose(mine, known, rtol=1e-4)


@pytest.mark.parametrize("name", [*SCORED, "per_pcs"])
def test_a_mask_follows_the_examples_shown_not_the_user(world, fits, name):
    method, fitted = fits[name]
    shown = world.group("train", "support")
    if name == "per_pcs":
        fitted = with_threshold(fitted, np.median(method._assembled(world, fitted, shown.batch)[1]))
    order = [*range(1, len(shown)), 0]
    disguised = replace(shown.rows(order), ids=shown.ids)
    masks = method.personalise(world, fitted, shown, 0.1).masks
    assert torch.equal(method.personalise(world, fitted, disguised, 0.1).masks, masks[order])
    few = method.personalise(world, fitted, shown.first(2), 0.1).masks
    assert len(masks.unique(dim=0)) > 1
    assert not torch.equal(few, masks)


# Importance.


def test_the_relative_change_is_that_of_the_adapted_adapters(world):
    support = world.group("val", "support").batch
    found = make_method("importance").scores(world, support)
    weights = adapt(world.pathways, world.init, support, torch.ones(len(support), P, dtype=torch.bool))
    base = world.pathways.logits(support.frozen, weights, torch.zeros(len(support), P, dtype=torch.bool))
    for p in range(P):
        one = (torch.arange(P) == p).expand(len(support), -1)
        delta = world.pathways.logits(support.frozen, weights, one) - base
        by_hand = ((delta.norm(dim=2) / base.norm(dim=2)) * support.weights).sum(1)
        torch.testing.assert_close(found[:, p], by_hand, rtol=1e-3, atol=1e-5)


def test_the_first_order_score_is_the_mean_of_weights_times_gradients_after_the_inner_loop(world):
    support = world.group("val", "support").batch
    found = make_method("importance", score="first_order").scores(world, support)
    on = torch.ones(len(support), P, dtype=torch.bool)
    weights = adapt(world.pathways, world.init, support, on)
    for p, keys in world.pathways.keys.items():
        total = torch.zeros(len(support))
        for key in keys:
            leaf = weights[key].clone().requires_grad_()
            loss = user_loss(world.pathways.logits(support.frozen, weights | {key: leaf}, on), support).sum()
            total += (leaf.detach() * torch.autograd.grad(loss, leaf)[0]).abs().flatten(1).sum(1)
        torch.testing.assert_close(found[:, p], total / world.pathways.sizes[p], rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("score", ["relative_change", "first_order"])
def test_a_neutral_start_has_scores_because_the_inner_loop_comes_first(world, score):
    silent = {k: w * (k not in world.pathways.outputs) for k, w in world.init.weights.items()}
    neutral = started(world, replace(world.init, weights=silent))
    scores = make_method("importance", score=score).scores(neutral, world.group("val", "support").batch)
    assert (scores > 0).all()


@pytest.mark.parametrize("score", ["relative_change", "first_order"])
def test_who_diverges_scores_nothing_and_spoils_nobody(world, score):
    wild = started(world, replace(world.init, rates=world.init.rates * torch.inf))
    scores = make_method("importance", score=score).scores(wild, world.group("val", "support").batch)
    assert torch.equal(scores, torch.zeros_like(scores))


def test_looks_at_the_support_are_counted(world):
    tries = {score: make_method("importance", score=score).tries(world) for score in ("relative_change", "first_order")}
    assert tries == {"relative_change": 1, "first_order": 2}
    assert make_method("gradient_norm").tries(world) == 1
    with pytest.raises(ValueError, match="relative_change"):
        make_method("importance", score="relative_chance")


# One mask for everybody.


def test_best_static_is_that_of_the_rivals(world):
    need = np.array([1, 0, 0, 1, 1, 0, 1], dtype=bool)
    judged, oracle = rewarded(world, lambda users, masks: (masks == need).mean(1))
    fitted = make_method("best_static").fit(judged, 0.01)
    assert torch.equal(fitted.tensors["mask"], torch.from_numpy(need))
    assert (oracle.users, oracle.roles) == ({*world.scenario.users("train").tolist()}, {"validation"})
    real = make_method("best_static").fit(world, 0.1).tensors["mask"].numpy()
    np.testing.assert_array_equal(real, best_static_of(world.scenario, 0.1, world.seed))


@pytest.mark.parametrize("kept", range(P + 1))
def test_adapterdrop_keeps_the_last_pathways_and_tries_nothing_else(world, kept):
    need = np.arange(P) >= P - kept
    judged, oracle = rewarded(world, lambda users, masks: (masks == need).mean(1))
    method = make_method("adapterdrop")
    masks = method.choose(judged, method.fit(judged, 0.01), judged.group("val", "support"), 0.01)
    assert torch.equal(masks, torch.from_numpy(need).expand(4, -1))
    assert all((np.diff(mask.astype(int)) >= 0).all() for mask in oracle.masks)
    assert len(np.unique(oracle.masks, axis=0)) == P + 1
    assert (oracle.users, oracle.roles) == ({*world.scenario.users("train").tolist()}, {"validation"})


def test_adapterdrop_drops_what_makes_no_difference(world):
    judged, _ = rewarded(world, lambda users, masks: np.full(len(users), 0.5))
    assert not make_method("adapterdrop").fit(judged, 0.0).tensors["mask"].any()


# Dense rivals.


@pytest.fixture
def trained(monkeypatch):
    """The configurations that somebody meta-trains by; nothing is trained."""
    found = []
    start = MetaInit({}, torch.ones(1, P), torch.ones(P, dtype=torch.bool))
    monkeypatch.setattr(meta_learned, "meta_initialisation", lambda data, config, folder: (found.append(config), start)[1])
    return found


def test_the_environments_own_start_is_taken_where_its_algorithm_is_asked_for(world, trained):
    assert world.env == "dsa/DigitsResNet-v0"  # FOMAML's
    fitted = make_method("meta_fomaml").fit(world, 0.1)
    assert not trained
    assert all(torch.equal(fitted.tensors[k], v) for k, v in world.init.tensors().items())
    maml = replace(world, kwargs={**world.kwargs, "algorithm": "maml"})
    make_method("meta_maml").fit(maml, 0.1)
    assert not trained


def test_others_are_trained_with_the_environments_settings_but_the_algorithm(world, trained):
    plain = replace(world, kwargs={**world.kwargs, "inner_steps": 5}, seed=3)
    for name in ("meta_maml", "meta_anil", "meta_reptile"):
        make_method(name).fit(plain, 0.1)
    assert [config.algorithm for config in trained] == ["maml", "anil", "reptile"]
    assert {(c.steps, c.users, c.inner_steps, c.seed, c.outer_rate, c.all_on, c.keep) for c in trained} == {
        (2, 4, 5, 3, 1e-2, 0.2, "last")
    }


def test_a_start_given_from_outside_is_nobodys_algorithm(world, trained):
    make_method("meta_fomaml").fit(replace(world, kwargs={**world.kwargs, "init": "somewhere"}), 0.1)
    assert [config.algorithm for config in trained] == ["fomaml"]


def test_dense_meta_training_has_every_pathway_on(world, trained):
    make_method("meta_fomaml", dense=True).fit(world, 0.1)
    assert [config.all_on for config in trained] == [1.0]


@pytest.mark.parametrize("dense", [True, False])
def test_a_dense_start_is_kept_and_held_back_by_what_users_do_with_every_pathway_on(world, tmp_path, monkeypatch, dense):
    config, asked, masks = MetaConfig(steps=1, all_on=1.0 if dense else 0.2, keep="best", shrink=True), [], []
    drawn, shown = meta.trainer.masks_for, meta.shrinkage.Shown.of
    draws = lambda *given, **named: asked.append(named.get("all_on")) or drawn(*given, **named)  # noqa: E731
    monkeypatch.setattr(meta.trainer, "masks_for", draws)
    monkeypatch.setattr(meta.shrinkage.Shown, "of", lambda *given: masks.extend(shown(*given).masks) or shown(*given))
    meta_initialisation(world.data, config, tmp_path)
    assert {*asked} - {None} == {1.0 if dense else 0.5}
    assert [bool(mask.all()) for mask in masks] == ([True] if dense else [True, False])


def test_a_neutral_start_would_leave_anil_nothing_to_learn(world, trained):
    neutral = replace(world, kwargs={**world.kwargs, "neutral": True})
    for name in ("meta_maml", "meta_anil"):
        make_method(name).fit(neutral, 0.1)
    assert [config.neutral for config in trained] == [True, False]


def test_starts_differ_by_algorithm_and_are_found_again(world, fits, monkeypatch):
    starts = [fits[name][1].fingerprint() for name in DENSE]
    assert len({*starts}) == len(DENSE)

    def refuse(self, *args):
        raise AssertionError("trained again")

    monkeypatch.setattr(MetaTrainer, "run", refuse)
    assert [make_method(name).fit(world, 0.3).fingerprint() for name in DENSE] == starts


def test_anil_changes_the_head_alone(world, fits):
    method, fitted = fits["meta_anil"]
    found = method.personalise(world, fitted, world.group("val", "support"), 0.1)
    start = MetaInit.from_tensors(fitted.tensors).weights
    for key, weight in found.weights.items():
        same = torch.equal(weight, start[key].expand_as(weight))
        assert same != key.startswith("head.")
    assert found.masks.all()
    head, everything = int(world.pathways.sizes[-1]), int(world.pathways.sizes.sum())
    assert [(s.trainable, s.active, s.stored) for s in found.sizes] == [(head, everything, 4 * head + 1)] * 4
    dense = fits["meta_maml"][0].personalise(world, fits["meta_maml"][1], world.group("val", "support"), 0.1)
    assert dense.sizes[0].trainable == everything
    assert [size.charged for size in (found.sizes[0], dense.sizes[0])] == [head, everything], "what is everybody's costs nobody"


# Labels of the validation examples.


def test_all_on_all_labels_adapts_on_both(world):
    method = make_method("all_on_all_labels")
    shown = shown_to(method, world)
    found = method.personalise(world, Fitted(), shown, 0.1)
    for user in range(len(shown)):
        parts = [world.group("val", role).rows([user]).batch for role in ("support", "validation")]
        alone = adapt(world.pathways, world.init, Batch.joined(*parts), torch.ones(1, P, dtype=torch.bool))
        for key, weight in alone.items():
            torch.testing.assert_close(found.weights[key][user], weight[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cost_weight", [0.0, 0.1])
def test_a_search_keeps_the_mask_that_its_validation_examples_reward_most(world, cost_weight):
    method = make_method("validation_search")
    fitted = method.fit(world, cost_weight)
    support, validation = world.group("val", "support").batch, world.group("val", "validation").batch
    found = method.personalise(world, fitted, shown_to(method, world), cost_weight)
    costs = world.pathways.costs.alone

    def rewards(masks):
        weights = adapt(world.pathways, world.init, support, masks)
        return measure(world.pathways, weights, masks, validation)[0].double() - cost_weight * (masks * costs).sum(1)

    mine = rewards(found.masks)
    cheapest = (found.masks * costs).sum(1)
    for mask in torch.from_numpy(all_masks(P)):
        others = rewards(mask.expand(4, -1))
        assert (mine >= others - 1e-6).all()
        assert ((mine > others + 1e-6) | (cheapest <= (mask * costs).sum() + 1e-9)).all()
    by_support = adapt(world.pathways, world.init, support, found.masks)
    assert all(torch.equal(weight, by_support[key]) for key, weight in found.weights.items())
    assert (method.tries(world), found.adaptations) == (2**P, 2**P + 1)


def test_of_equally_good_masks_a_search_keeps_the_cheapest(world, monkeypatch):
    half = torch.full((4,), 0.5)
    monkeypatch.setattr(all_labels, "measure", lambda *args: (half, half))
    masks = torch.from_numpy(all_masks(P)[:0:-1].copy())  # all on first, all off left out
    method = make_method("validation_search")
    found = method.personalise(world, Fitted({"masks": masks}), shown_to(method, world), 0.0)
    cheapest = masks[(masks * world.pathways.costs.alone).sum(1).argmin()]
    assert torch.equal((found.masks * world.pathways.sizes).sum(1), (cheapest * world.pathways.sizes).sum().expand(4))


def test_a_search_among_many_pathways_tries_the_best_static_mask_too(world, monkeypatch):
    monkeypatch.setattr(agents.rivals, "EXHAUSTIVE", 3)
    monkeypatch.setattr(agents.rivals, "SAMPLED", 8)
    monkeypatch.setattr(all_labels, "EXHAUSTIVE", 3)
    static = np.array([0, 1, 1, 0, 0, 1, 0], dtype=bool)
    monkeypatch.setattr(all_labels, "best_static", lambda scenario, cost_weight, seed: static)
    method = make_method("validation_search")
    masks = method.fit(world, 0.1).tensors["masks"]
    rows = {row.numpy().tobytes() for row in masks}
    assert {bytes(static), b"\0" * P, b"\1" * P} <= rows
    assert 10 <= len(masks) == method.tries(world) < 2**P


def test_a_search_needs_validation_examples_apart(world):
    method = make_method("validation_search")
    with pytest.raises(ValueError, match=r"Group\.joined"):
        method.personalise(world, method.fit(world, 0.1), world.group("val", "support"), 0.1)


# Pieces of others.


def test_with_one_sharer_everybody_gets_that_sharers_weights(world):
    method = make_method("per_pcs", sharers=1)
    fitted = method.fit(world, 0.1)
    found = method.personalise(world, with_threshold(fitted, -np.inf), world.group("val", "support"), 0.1)
    users = fitted.tensors["sharers"]
    assert len(users) == 1
    both = Batch.joined(*(world.group("train", role, users).batch for role in ("support", "query")))
    sharer = adapt(world.pathways, world.init, both, torch.ones(1, P, dtype=torch.bool))
    assert found.masks.all()
    for key, weight in found.weights.items():
        torch.testing.assert_close(weight, sharer[key].expand_as(weight))


def test_a_new_user_takes_no_gradient_step_and_keeps_k_entries_per_active_pathway(world, fits, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("somebody was adapted")

    monkeypatch.setattr(per_pcs, "adapt", refuse)
    method, fitted = make_method("per_pcs", top=2), fits["per_pcs"][1]
    middle = float(fits["per_pcs"][0]._assembled(world, fitted, world.group("val", "support").batch)[1].median())
    found = method.personalise(world, with_threshold(fitted, middle), world.group("val", "support"), 0.1)
    on = found.masks.sum(1).tolist()
    assert len({*on}) > 1
    active = (found.masks * world.pathways.sizes).sum(1).tolist()
    entries = [(0, a, 2 * 8 * n + 1) for a, n in zip(active, on, strict=True)]
    assert [(s.trainable, s.active, s.stored) for s in found.sizes] == entries
    assert found.adaptations == 0


def test_a_higher_price_switches_fewer_pieces_on(world):
    method, shown = make_method("per_pcs"), world.group("val", "support")
    masks = [method.personalise(world, method.fit(world, weight), shown, weight).masks for weight in (0.0, 1.0)]
    assert masks[1].sum() < masks[0].sum()


def test_who_shows_a_sharers_examples_gets_that_sharers_pieces(world):
    method = make_method("per_pcs", sharers=4, top=1)
    fitted = method.fit(world, 0.1)
    users = fitted.tensors["sharers"]
    found = method.personalise(world, fitted, world.group("train", "support", users), 0.1)
    own = [
        torch.allclose(found.weights[keys[0]][n], fitted.tensors[f"piece/{keys[0]}"][n], atol=1e-6)
        for n in range(len(users))
        for keys in world.pathways.keys.values()
    ]
    assert len(users) > 2
    assert np.mean(own) > 0.9


def test_labels_tell_who_is_alike(world, fits):
    method, fitted = fits["per_pcs"]
    shown = world.group("val", "support").batch
    turned = replace(shown, labels=(shown.labels + 1) % 10)
    scores = [method._assembled(world, fitted, batch)[1] for batch in (shown, turned)]
    assert (scores[0] - scores[1]).abs().min() > 1e-3


def test_a_piece_scores_the_mean_likeness_of_what_is_read_to_the_sharers_mean_of_the_same_class(world, fits):
    fitted, support = fits["per_pcs"][1], world.group("val", "support")
    users = fitted.tensors["sharers"]
    sharers = Group.joined(world.group("train", "support", users), world.group("train", "query", users))
    mean, scale = world.look.of.sites[2]

    def read(group, user):
        return ((world.pathways.pool(2, group.rows([user]).batch.frozen)[0] - mean) / scale).clamp(-5, 5)

    means = torch.full((len(users), 10, len(mean)), torch.nan)
    for s in range(len(users)):
        for label in sharers.labels(s).unique().tolist():
            means[s, label] = read(sharers, s)[sharers.labels(s) == label].mean(0)
    centre = means.nanmean(0)
    found = per_pcs._scores(world, fitted.tensors, support.batch, 2)
    for s in range(len(users)):
        each = []
        for x, label in zip(read(support, 1), support.labels(1).tolist(), strict=True):
            mine, theirs = x - centre[label], means[s, label] - centre[label]
            likeness = torch.cosine_similarity(mine - mine.mean(), theirs - theirs.mean(), dim=0) * len(mean) ** 0.5
            each.append(torch.nan_to_num(likeness))  # a class that the sharer lacks
        assert float(found[1, s]) == pytest.approx(float(torch.stack(each).mean()), abs=1e-3)


def test_the_best_k_pieces_are_averaged_by_the_softmax_of_their_scores(world, fits):
    fitted, support = fits["per_pcs"][1], world.group("val", "support").batch
    sharers = len(fitted.tensors["sharers"])
    everyone = make_method("per_pcs", top=sharers + 5)._assembled(world, fitted, support)
    assert everyone[2] == sharers
    scores = torch.stack([per_pcs._scores(world, fitted.tensors, support, p) for p in range(P)], 1)
    for top, temperature in ((2, 1.0), (3, 0.3)):
        weights, best, _ = make_method("per_pcs", top=top, temperature=temperature)._assembled(world, fitted, support)
        torch.testing.assert_close(best, scores.amax(-1))
        order = scores[0, -1].argsort(descending=True)[:top]
        shares = (scores[0, -1, order] / temperature).softmax(0)
        by_hand = (shares[:, None, None] * fitted.tensors["piece/head.weight"][order]).sum(0)
        torch.testing.assert_close(weights["head.weight"][0], by_hand)


def test_the_threshold_of_pieces_is_the_best_on_val_users(world):
    method = make_method("per_pcs", sharers=5)
    fitted = method.fit(world, 0.1)
    support, query = world.group("val", "support").batch, world.group("val", "query").batch
    weights, best, _ = method._assembled(world, fitted, support)

    def reward(threshold):
        masks = best.double() >= threshold
        accuracy = measure(world.pathways, weights, masks, query)[0].double().mean()
        return float(accuracy) - 0.1 * float(world.pathways.costs(masks).mean())

    tried = [reward(t - 1e-4 * abs(t)) for t in np.quantile(best.double(), np.linspace(0, 1, 32))]
    assert reward(float(fitted.tensors["threshold"])) == pytest.approx(max([*tried, reward(np.inf)]))
    assert len({*tried}) > 1


def test_sharers_are_different_train_users_far_from_each_other(world):
    users = world.scenario.users("train")
    for sharers in (3, 50):
        found = make_method("per_pcs", sharers=sharers)._sharers(world)
        assert len(found) == len(found.unique()) <= min(sharers, len(users))
        assert len(found) >= 2
        assert found.max() < len(users)


def test_a_sharer_whose_adapters_diverge_shares_nothing(world, monkeypatch):
    real = per_pcs._pieces

    def broken(world, shown):
        pieces = real(world, shown)
        pieces["piece/head.bias"][0] = torch.nan
        return pieces

    whole = make_method("per_pcs", sharers=4).fit(world, 0.1).tensors["sharers"]
    monkeypatch.setattr(per_pcs, "_pieces", broken)
    fitted = make_method("per_pcs", sharers=4).fit(world, 0.1)
    assert torch.equal(fitted.tensors["sharers"], whole[1:])
    assert all(tensor.isfinite().all() for name, tensor in fitted.tensors.items() if name != "threshold")
    monkeypatch.setattr(per_pcs, "_pieces", lambda world, shown: {k: v * torch.nan for k, v in real(world, shown).items()})
    with pytest.raises(FloatingPointError, match="every sharer"):
        make_method("per_pcs", sharers=4).fit(world, 0.1)


def test_among_many_pathways_only_the_best_static_mask_is_asked_about_by_itself(monkeypatch):
    asked = []
    monkeypatch.setattr(
        all_labels, "_accuracies", lambda world, masks, *_: asked.append(len(masks)) or masks.double()[None, :, 0]
    )
    masks = torch.eye(9, dtype=torch.bool).flip(0)[-5:]  # the last one alone has the first pathway on
    world = SimpleNamespace(pathways=SimpleNamespace(num_pathways=9, costs=lambda some: some.double().mean(1)))
    shown, fitted = SimpleNamespace(parts=(None, None)), Fitted({"masks": masks})
    chosen = all_labels.ValidationSearch().choose(world, fitted, shown, 0.1)
    assert asked == [4, 1] and torch.equal(chosen, masks[-1:])

"""Groups of users' examples, worlds without test users, and what is written down about predictions."""

import numpy as np
import pytest
import torch
import worlds

from eval.group import Group
from eval.measure import BINS, measures
from eval.methods import make_method
from eval.world import World
from meta.inner import adapt


@pytest.fixture(scope="module", params=["digits_world", "side_world", "text_world"])
def world(request):
    return request.getfixturevalue(request.param)


def same(first: Group, second: Group) -> None:
    """The same users with the same examples, before and after the frozen model."""
    assert first.ids == second.ids and first.counts == second.counts
    for user, count in enumerate(first.counts):
        assert torch.equal(first.inputs(user), second.inputs(user))
        assert torch.equal(first.labels(user), second.labels(user))
        last = [g.batch.rows(torch.tensor([user])).frozen.sites[-1][0, :count] for g in (first, second)]
        assert torch.equal(*last)
        assert torch.equal(first.batch.labels[user, :count], first.labels(user))


def test_raw_and_frozen_examples_are_the_same_ones(world):
    group = world.group("val", "support")
    for user in range(len(group)):
        features = world.model.backbone(group.inputs(user))
        kept = group.rows([user]).batch.frozen.sites[-1][0]
        torch.testing.assert_close(features, kept, atol=2e-5, rtol=1e-4)


def test_picked_examples_come_in_the_order_asked_for(world):
    group = world.group("val", "support")
    backwards = group.pick([torch.arange(n).flip(0) for n in group.counts])
    assert torch.equal(backwards.labels(0), group.labels(0).flip(0))
    same(backwards.pick([torch.arange(n).flip(0) for n in group.counts]), group)


def test_joined_groups_put_padding_last_and_remember_their_parts(world):
    support, validation = (world.group("val", role) for role in ("support", "validation"))
    uneven = support.pick([torch.arange(1 + i) for i in range(len(support))])
    both = Group.joined(uneven, validation)
    assert both.counts == [1 + i + n for i, n in enumerate(validation.counts)]
    present = both.batch.weights > 0
    assert (present.int().diff(dim=1) <= 0).all()
    torch.testing.assert_close(both.batch.weights.sum(1), torch.ones(len(both)))
    assert both.parts is not None
    same(both.first(1), uneven.first(1))
    same(both.parts[1], validation)


def test_offsets_of_raw_examples_are_those_of_the_frozen_ones(text_world):
    group = text_world.group("val", "support")
    offset = group.offset(1)
    assert offset is not None and offset.abs().sum() > 0
    assert torch.equal(offset, group.rows([1]).batch.frozen.offset[0])


def test_examples_that_are_padding_do_not_change_what_users_learn(digits_world):
    group = digits_world.group("val", "support")
    masks = torch.ones(2, digits_world.pathways.num_pathways, dtype=torch.bool)
    uneven = group.rows([0, 1]).pick([torch.arange(3), torch.arange(20)])
    together = adapt(digits_world.pathways, digits_world.init, uneven.batch, masks)
    alone = adapt(digits_world.pathways, digits_world.init, group.rows([0]).first(3).batch, masks[:1])
    for name, value in alone.items():
        torch.testing.assert_close(together[name][:1], value, atol=1e-6, rtol=1e-4)


def test_a_world_gives_away_no_test_user(world):
    for ask in (world.data.rows, world.data.part, world.data.batch, world.data.readouts):
        with pytest.raises(PermissionError, match="must not see test users"):
            ask("test", "support", torch.arange(1))
    with pytest.raises(ValueError, match="unknown split 'test'"):
        world.scenario.users("test")


def test_an_environment_without_examples_has_no_world(tmp_path):
    with pytest.raises(ValueError, match="has no model that could be personalised"):
        World.of(worlds.scenario("dsa/Planted-v0"), "dsa/Planted-v0", {}, 0, tmp_path)


def test_draws_follow_from_seed_and_facts_alone(digits_world):
    first, again, other = (digits_world.generator(*facts) for facts in (("u", 1), ("u", 1), ("u", 2)))
    drawn = [torch.rand(3, generator=generator) for generator in (first, again, other)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_serving_runs_the_whole_model(world):
    query = world.group("val", "query").first(3)
    for name in ("base", "all_on"):
        method = make_method(name)
        predictor = method.personalise(world, method.fit(world, 0.1), world.group("val", "support"), 0.1)
        raw = [query.inputs(i) for i in range(len(query))]
        if raw[0].dim() == 2:  # texts of different lengths
            width = max(ids.shape[1] for ids in raw)
            raw = [torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=-1) for ids in raw]
        served, looked_up = predictor.serve(torch.stack(raw)), predictor.logits(query)
        offset = query.batch.frozen.offset
        torch.testing.assert_close(served, looked_up - (0 if offset is None else offset), atol=1e-4, rtol=1e-4)


def test_measures_of_known_logits():
    logits = torch.log(torch.tensor([[0.75, 0.25], [0.4, 0.6], [0.55, 0.45]]))
    found = measures(logits, torch.tensor([0, 0, 0]))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["log_likelihood"] == pytest.approx(np.log([0.75, 0.4, 0.55]).mean(), abs=1e-6)
    bins = [bin.split(":") for bin in found["calibration"].split(";")]
    assert len(bins) == BINS
    assert [int(count) for count, _, _ in bins] == [0, 0, 0, 0, 0, 1, 1, 1, 0, 0]
    assert [int(hits) for _, _, hits in bins] == [0, 0, 0, 0, 0, 1, 0, 1, 0, 0]


def test_nan_logits_are_refused():
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        measures(torch.tensor([[float("nan"), 0.0]]), torch.tensor([0]))

"""Batches: what an index says, without copies, and batches that are joined."""

from dataclasses import replace

import pytest
import torch
from toys import Spied

from backbones.pathways import Frozen
from users.batch import Batch


def small_batch(sites=3, examples=9, offset=True, users=2, columns=4, table=None):
    """Random places in a table whose tensors all differ."""
    if table is None:
        tensors = tuple(torch.randn(examples, 2, 3) for _ in range(sites))
        table = Frozen(tensors, {"mask": torch.rand(examples, 2) < 0.5}, torch.randn(examples, 5) if offset else None)
    index = torch.randint(len(table.sites[0]), (users, columns))
    present = torch.rand(users, columns) < 0.7
    present[:, 0] = True
    return Batch(table, index, torch.randint(5, (users, columns)), present / present.sum(1, keepdim=True))


def row_of(frozen, *place):
    """Everything that is known of one example."""
    return [*(site[place] for site in frozen.sites), *(c[place] for c in frozen.context.values()), frozen.offset[place]]


def same_rows(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_batch_holds_what_its_index_says():
    batch = small_batch()
    for user in range(2):
        for column in range(4):
            expected = row_of(batch.table, int(batch.index[user, column]))
            assert same_rows(row_of(batch.frozen, user, column), expected)


def test_of_the_sites_only_those_that_are_read_are_gathered_and_once():
    batch = small_batch()
    sites = Spied(batch.table.sites)
    batch = replace(batch, table=replace(batch.table, sites=sites))
    frozen = batch.frozen
    assert sites.asked == []
    first = frozen.sites[1]
    assert frozen.sites[1] is first
    assert batch.frozen.sites[1] is first
    assert sites.asked == [1]
    assert torch.equal(frozen.sites[-1], sites[2][batch.index])
    assert len(frozen.sites) == 3
    with pytest.raises(IndexError):
        frozen.sites[3]


def test_an_offset_that_is_none_stays_none():
    assert small_batch(offset=False).frozen.offset is None


def test_rows_of_a_shared_table_are_the_users_asked_for():
    batch = small_batch(users=3)
    picked = batch.rows(torch.tensor([2, 0, 2]))
    assert picked.table is batch.table
    for row, user in enumerate([2, 0, 2]):
        assert torch.equal(picked.labels[row], batch.labels[user])
        assert torch.equal(picked.weights[row], batch.weights[user])
        assert all(same_rows(row_of(picked.frozen, row, c), row_of(batch.frozen, user, c)) for c in range(4))


def test_columns_of_a_shared_table_are_the_examples_asked_for():
    batch = small_batch(users=3)
    picked = batch.columns(torch.tensor([3, 0]))
    for user in range(3):
        for column, old in enumerate([3, 0]):
            assert picked.labels[user, column] == batch.labels[user, old]
            assert same_rows(row_of(picked.frozen, user, column), row_of(batch.frozen, user, old))
            assert (picked.weights[user, column] > 0) == (batch.weights[user, old] > 0)
    torch.testing.assert_close(picked.weights.sum(1), torch.ones(3))


@pytest.mark.parametrize("shared", [True, False])
def test_joined_batches_are_both_users_examples_side_by_side(shared):
    first = small_batch(users=3)
    second = small_batch(users=3, columns=2, examples=7, table=first.table if shared else None)
    joined = Batch.joined(first, second)
    assert (joined.table is first.table) == shared
    for user in range(3):
        count = sum(int((b.weights[user] > 0).sum()) for b in (first, second))
        for column in range(6):
            batch, old = (first, column) if column < 4 else (second, column - 4)
            assert same_rows(row_of(joined.frozen, user, column), row_of(batch.frozen, user, old))
            assert joined.labels[user, column] == batch.labels[user, old]
            assert joined.weights[user, column] == pytest.approx(float(batch.weights[user, old] > 0) / count)


def test_joined_sequences_of_different_lengths_are_padded_with_nothing():
    long, short = small_batch(), small_batch()
    cut = Frozen(short.table.sites, short.table.context).map(lambda t: t[:, :1])
    short = replace(short, table=cut)
    joined = Batch.joined(replace(long, table=replace(long.table, offset=None)), short).frozen
    assert torch.equal(joined.sites[0][:, :4], long.frozen.sites[0])
    assert torch.equal(joined.sites[0][:, 4:, :1], short.frozen.sites[0])
    assert not joined.sites[0][:, 4:, 1:].any() and not joined.context["mask"][:, 4:, 1:].any()


def test_joining_with_an_offset_and_without_is_refused():
    """Losing the one offset, or applying it to the wrong examples, would change logits without a word."""
    first, second = small_batch(), small_batch(offset=False)
    for pair in ((first, second), (second, first)):
        with pytest.raises(ValueError, match="1 of 2 parts have an offset from cross-fitting; prepare all of them with"):
            Batch.joined(*pair)
    joined = Batch.joined(first, small_batch(columns=2)).frozen
    assert torch.equal(joined.offset[:, :4], first.frozen.offset)

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import backbones
from backbones import make_backbone, register_backbone
from backbones.base import Backbone, Hidden, PopulationModel
from backbones.pathways import Frozen, make_pathways
from backbones.resnet import small_resnet


class TinyTokens(Backbone):
    """Tokens under a mask, as in a language model: each block mixes in the mean of the tokens that are there.

    An input is ``[T, 4]``: three numbers per token and whether it is there.
    """

    channel_axis = -1

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.blocks = nn.ModuleList(nn.Linear(12, 6) for _ in range(3))
        self.block_names = ("mix0", "mix1", "mix2")
        self.feature_width = 6
        self.reference_shape = (5, 4)
        self.freeze()

    def stem(self, inputs):
        return Hidden(self.embed(inputs[..., :3]), {"mask": inputs[..., 3]})

    def block(self, index, hidden):
        mean = self.pool(hidden)[:, None].expand_as(hidden.tensor)
        return hidden.with_tensor(hidden.tensor + self.blocks[index](torch.cat([hidden.tensor, mean], -1)).tanh())

    def readout(self, hidden):
        return self.pool(hidden)

    def pool(self, hidden):
        mask = hidden.context["mask"][..., None]
        return (hidden.tensor * mask).sum(1) / mask.sum(1).clamp_min(1)


@pytest.fixture(scope="module")
def token_model():
    def build():
        torch.manual_seed(0)
        return PopulationModel(TinyTokens(), torch.randn(4, 6), torch.randn(4))

    register_backbone("tiny-tokens", build)
    yield make_backbone("tiny-tokens")
    backbones.BACKBONES.unregister("tiny-tokens")


def token_inputs(*shape):
    """Random tokens; at least the first of the five is there."""
    inputs = torch.randn(*shape, 5, 4)
    inputs[..., 3] = (torch.rand(*shape, 5) < 0.5).float()
    inputs[..., 0, 3] = 1
    return inputs


@pytest.fixture(params=["images", "tokens"])
def case(request, pathways, token_model):
    """Pathways, and inputs ``[32, 3, ...]`` for them: 32 users with 3 examples each."""
    if request.param == "images":
        return pathways, torch.rand(32, 3, 1, 8, 8)
    return make_pathways("inline", token_model, rank=4), token_inputs(32, 3)


def side_by_side(pathways, inputs):
    """The frozen part of ``inputs [U, N, ...]``."""
    return pathways.frozen(inputs.flatten(0, 1)).map(lambda t: t.unflatten(0, inputs.shape[:2]))


def strong_weights(pathways, users):
    """Weights that change the hidden states by about as much as there is, different for every user."""
    return {k: torch.randn(users, *w.shape) * 0.3 for k, w in pathways.start(0).items()}


def shared_start(pathways, users, seed=0):
    return {k: w.expand(users, *w.shape) for k, w in pathways.start(seed).items()}


def of_one(weights, user):
    return {k: w[user] for k, w in weights.items()}


def every_mask(pathways):
    """All masks, in an order in which the first active pathway jumps to and fro; as many as users asked for."""
    number = torch.arange(32)[torch.randperm(32, generator=torch.Generator().manual_seed(0))] % 2**pathways.num_pathways
    return (number[:, None] >> torch.arange(pathways.num_pathways)) % 2 == 1


def by_hand(pathways, inputs, weights, gates):
    """One user's logits, and ``||delta|| / ||h||`` per pathway, the formula written out."""
    model, backbone = pathways.model, pathways.model.backbone
    hidden = backbone.stem(inputs)
    changes = torch.full((len(inputs), pathways.num_pathways), torch.nan)
    for index, name in enumerate(backbone.block_names):
        hidden = backbone.block(index, hidden)
        if gates[index]:
            read = hidden.tensor.movedim(backbone.channel_axis, -1)
            inside = (read @ weights[f"{name}.down"] + weights[f"{name}.down_bias"]).relu()
            delta = inside @ weights[f"{name}.up"] + weights[f"{name}.up_bias"]
            changes[:, index] = delta.flatten(1).norm(dim=1) / read.flatten(1).norm(dim=1)
            hidden = hidden.with_tensor((read + delta).movedim(-1, backbone.channel_axis))
    features = backbone.readout(hidden)
    logits = features @ model.weight.T + model.bias
    if gates[-1]:
        delta = features @ weights["head.weight"] + weights["head.bias"]
        changes[:, -1] = delta.norm(dim=1) / logits.norm(dim=1)
        logits = logits + delta
    return logits, changes


def flops_of(pathways, frozen, weights, gates):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        pathways.logits(frozen, weights, gates)
    return counter.get_total_flops()


def test_before_training_everything_on_is_the_population_model(case):
    pathways, inputs = case
    on = torch.ones(32, pathways.num_pathways, dtype=torch.bool)
    logits = pathways.logits(side_by_side(pathways, inputs), shared_start(pathways, 32), on)
    expected = pathways.model(inputs.flatten(0, 1)).unflatten(0, (32, 3))
    assert (logits - expected).norm() < 1e-2 * expected.norm()
    assert not torch.equal(logits, expected)  # at exactly zero the down-projections would never learn


def test_everything_off_is_the_population_model_whatever_the_weights(case):
    pathways, inputs = case
    off = torch.zeros(32, pathways.num_pathways, dtype=torch.bool)
    logits = pathways.logits(side_by_side(pathways, inputs), strong_weights(pathways, 32), off)
    expected = pathways.model(inputs.flatten(0, 1)).unflatten(0, (32, 3))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_every_user_gets_what_their_own_mask_and_weights_say(case):
    pathways, inputs = case
    weights, gates = strong_weights(pathways, 32), every_mask(pathways)
    logits = pathways.logits(side_by_side(pathways, inputs), weights, gates)
    plain = pathways.model(inputs.flatten(0, 1)).unflatten(0, (32, 3))
    for user in range(32):
        expected, _ = by_hand(pathways, inputs[user], of_one(weights, user), gates[user])
        torch.testing.assert_close(logits[user], expected, rtol=1e-4, atol=1e-4)
        assert gates[user].any() == ((logits[user] - plain[user]).abs().max() > 1e-2)


def test_users_in_a_batch_get_what_they_get_alone(case):
    pathways, inputs = case
    weights, gates = strong_weights(pathways, 32), every_mask(pathways)
    frozen = side_by_side(pathways, inputs)
    logits = pathways.logits(frozen, weights, gates)
    for user in range(32):
        one = slice(user, user + 1)
        alone = pathways.logits(frozen.map(lambda t, one=one: t[one]), of_one(weights, one), gates[one])
        torch.testing.assert_close(logits[one], alone, rtol=1e-5, atol=1e-5)


def test_weights_of_a_pathway_that_is_off_do_not_matter(case):
    pathways, inputs = case
    weights, gates = strong_weights(pathways, 32), every_mask(pathways)
    frozen = side_by_side(pathways, inputs)
    before = pathways.logits(frozen, weights, gates)
    for p, keys in pathways.keys.items():
        other = weights | {key: weights[key] + 1 for key in keys}
        same = (pathways.logits(frozen, other, gates) == before).flatten(1).all(1)
        assert same[~gates[:, p]].all()
        assert not same[gates[:, p]].any()


def test_changes_are_relative_norms_where_a_pathway_is_on_and_untouched_elsewhere(case):
    pathways, inputs = case
    weights, gates = strong_weights(pathways, 32), every_mask(pathways)
    changes = torch.full((32, inputs.shape[1], pathways.num_pathways), torch.nan)
    pathways.logits(side_by_side(pathways, inputs), weights, gates, changes)
    assert torch.equal(changes.isfinite(), gates[:, None].expand_as(changes))
    expected = torch.stack([by_hand(pathways, inputs[u], of_one(weights, u), gates[u])[1] for u in range(32)])
    torch.testing.assert_close(changes, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_asking_for_changes_does_not_change_the_logits(pathways):
    frozen, weights = side_by_side(pathways, torch.rand(32, 3, 1, 8, 8)), strong_weights(pathways, 32)
    gates = every_mask(pathways)
    asked = pathways.logits(frozen, weights, gates, torch.zeros(32, 3, pathways.num_pathways))
    assert torch.equal(asked, pathways.logits(frozen, weights, gates))


def test_gradients_reach_the_active_pathways_of_a_user_and_no_other(case):
    pathways, inputs = case
    gates = every_mask(pathways)
    weights = {k: w.requires_grad_() for k, w in strong_weights(pathways, 32).items()}
    pathways.logits(side_by_side(pathways, inputs), weights, gates).square().sum().backward()
    for p, keys in pathways.keys.items():
        for key in keys:
            reached = weights[key].grad.flatten(1).abs().sum(1) > 0
            assert not reached[~gates[:, p]].any(), key
            assert reached[gates[:, p]].all(), key


def test_a_pathway_that_nobody_has_on_is_not_in_the_graph(pathways):
    gates = torch.zeros(2, pathways.num_pathways, dtype=torch.bool)
    gates[:, 2] = True
    weights = {k: w.requires_grad_() for k, w in strong_weights(pathways, 2).items()}
    pathways.logits(side_by_side(pathways, torch.rand(2, 3, 1, 8, 8)), weights, gates).sum().backward()
    assert {key for key, w in weights.items() if w.grad is not None} == set(pathways.keys[2])


def test_the_later_the_first_active_pathway_the_less_is_computed(pathways):
    frozen, weights = side_by_side(pathways, torch.rand(1, 3, 1, 8, 8)), strong_weights(pathways, 1)
    last = pathways.num_pathways - 1
    flops = []
    for first in range(last + 1):
        gates = torch.arange(last + 1)[None] >= first
        flops.append(flops_of(pathways, frozen, weights, gates))
    assert flops == sorted(set(flops), reverse=True)
    assert flops[last] == 2 * (2 * 3 * pathways.widths[last] * 10)  # the model's classifier and the user's head


def test_a_batch_costs_what_its_users_cost_one_by_one(case):
    pathways, inputs = case
    frozen, weights, gates = side_by_side(pathways, inputs), strong_weights(pathways, 32), every_mask(pathways)
    alone = []
    for user in range(32):
        one = slice(user, user + 1)
        part = frozen.map(lambda t, one=one: t[one])
        alone.append(flops_of(pathways, part, of_one(weights, one), gates[one]))
    assert flops_of(pathways, frozen, weights, gates) == sum(alone)


def test_tokens_that_are_not_there_change_nothing_through_any_adapter(token_model):
    pathways = make_pathways("inline", token_model, rank=4)
    inputs, weights, gates = token_inputs(32, 3), strong_weights(pathways, 32), every_mask(pathways)
    inputs[..., 4, 3] = 0
    before = pathways.logits(side_by_side(pathways, inputs), weights, gates)
    inputs[..., 4, :3] += 5
    torch.testing.assert_close(pathways.logits(side_by_side(pathways, inputs), weights, gates), before)
    inputs[..., 4, 3] = 1
    seen = pathways.logits(side_by_side(pathways, inputs), weights, gates)
    assert ((seen - before).flatten(1).abs().amax(1) > 1e-3).all()


def test_context_is_mapped_together_with_the_sites():
    frozen = Frozen((torch.ones(2), torch.zeros(3)), {"mask": torch.ones(1)}).map(lambda t: t + 1)
    assert [site.tolist() for site in frozen.sites] == [[2, 2], [1, 1, 1]]
    assert frozen.context["mask"].tolist() == [2]


def test_pooled_reads_are_the_backbones_own_pools(case):
    pathways, inputs = case
    backbone, frozen = pathways.model.backbone, side_by_side(pathways, inputs)
    hidden = backbone.stem(inputs.flatten(0, 1))
    for p in range(pathways.num_pathways - 1):
        hidden = backbone.block(p, hidden)
        expected = backbone.pool(hidden).unflatten(0, (32, 3))
        torch.testing.assert_close(pathways.pool(p, frozen), expected)
        assert expected.shape[-1] == pathways.widths[p]
    features = backbone(inputs.flatten(0, 1)).unflatten(0, (32, 3))
    torch.testing.assert_close(pathways.pool(pathways.num_pathways - 1, frozen), features)


def test_names_are_the_blocks_and_the_head(pathways):
    assert pathways.names == ("layer1.0", "layer1.1", "layer2.0", "layer2.1", "head")
    assert pathways.widths == (8, 8, 16, 16, 16)


def test_costs_are_shares_of_the_personal_parameters(pathways):
    rank, classes = 4, 10
    sizes = [2 * width * rank + rank + width for width in (8, 8, 16, 16)] + [16 * classes + classes]
    assert pathways.sizes.tolist() == sizes
    torch.testing.assert_close(pathways.costs.alone, torch.tensor(sizes).double() / sum(sizes))
    assert sum(w.numel() for w in pathways.start(0).values()) == sum(sizes)


def test_the_start_follows_its_seed(pathways):
    first, again, other = (pathways.start(seed) for seed in (0, 0, 1))
    assert set(first) == {key for keys in pathways.keys.values() for key in keys}
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["layer1.0.down"], other["layer1.0.down"])
    assert not torch.equal(first["layer1.0.down"], first["layer1.1.down"])


def test_a_rank_below_one_is_refused(model):
    with pytest.raises(ValueError, match="rank of an adapter must be at least 1, got 0"):
        make_pathways("inline", model, rank=0)


def test_an_unknown_placement_is_answered_with_a_suggestion(model):
    with pytest.raises(ValueError, match=r"unknown placement 'inlne'\. Did you mean 'inline'"):
        make_pathways("inlne", model)


def test_a_chain_of_one_block_has_an_adapter_and_a_head():
    pathways = make_pathways("inline", small_resnet(3, widths=(4,), depth=1), rank=2)
    assert pathways.names == ("layer1.0", "head")
    inputs, weights = torch.rand(2, 3, 1, 8, 8), strong_weights(pathways, 2)
    gates = torch.tensor([[False, True], [True, False]])
    logits = pathways.logits(side_by_side(pathways, inputs), weights, gates)
    for user in range(2):
        expected, _ = by_hand(pathways, inputs[user], of_one(weights, user), gates[user])
        torch.testing.assert_close(logits[user], expected, rtol=1e-4, atol=1e-4)

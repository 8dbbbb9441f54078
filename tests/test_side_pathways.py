"""Pathways beside the model: their logits by hand, and what is not read or computed."""

from dataclasses import replace

import torch
from toys import Spied, of_one, some_masks, strong_weights

from backbones.pathways import make_pathways, population_logits


def side_frozen(pathways, users, examples):
    """The frozen part of random images, ``[U, N, ...]``, and the images."""
    images = torch.rand(users, examples, 1, 8, 8)
    return pathways.frozen(images.flatten(0, 1)).map(lambda t: t.unflatten(0, (users, examples))), images


def side_by_hand(pathways, image, weights, gates):
    """One user's logits of one image, and ``||delta|| / ||logits||`` per pathway, the formula written out."""
    model, backbone = pathways.model, pathways.model.backbone
    hidden, reads = backbone.stem(image[None]), []
    for index in range(len(backbone.blocks)):
        hidden = backbone.block(index, hidden)
        pooled = hidden.tensor.mean((2, 3))[0]
        reads.append((pooled - pooled.mean()) / (pooled.var(unbiased=False) + 1e-5).sqrt())
    features = backbone.readout(hidden)[0]
    base = total = model.weight @ features + model.bias
    changes = torch.full((pathways.num_pathways,), torch.nan)
    for p, name in enumerate(pathways.names):
        if not gates[p]:
            continue
        if name == "head":
            unit = torch.nn.functional.layer_norm(features, features.shape[-1:]) / features.shape[-1] ** 0.5
            delta = unit @ weights["head.weight"] + weights["head.bias"]
        else:
            inside = torch.nn.functional.gelu(reads[p] @ weights[f"{name}.down"] + weights[f"{name}.down_bias"])
            delta = inside @ weights[f"{name}.up"] + weights[f"{name}.up_bias"]
        changes[p] = delta.norm() / base.norm()
        total = total + delta
    return total, changes


def test_side_logits_and_changes_are_what_each_users_mask_and_weights_say(side):
    frozen, images = side_frozen(side, 6, 3)
    weights, gates = strong_weights(side, 6), some_masks(side, 6)
    changes = torch.full((6, 3, side.num_pathways), torch.nan)
    logits = side.logits(frozen, weights, gates, changes)
    for user in range(6):
        own = {key: weight[user] for key, weight in weights.items()}
        for example in range(3):
            expected, moved = side_by_hand(side, images[user, example], own, gates[user])
            torch.testing.assert_close(logits[user, example], expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(changes[user, example], moved, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert torch.equal(logits, side.logits(frozen, weights, gates))  # asking for changes changes nothing


def test_side_pathways_all_off_are_the_population_model(side):
    frozen, images = side_frozen(side, 4, 3)
    off = torch.zeros(4, side.num_pathways, dtype=torch.bool)
    logits = side.logits(frozen, strong_weights(side, 4), off)
    assert torch.equal(logits, population_logits(side.model, frozen))
    torch.testing.assert_close(logits, side.model(images.flatten(0, 1)).view(4, 3, 10), rtol=1e-5, atol=1e-5)


def test_side_pathways_all_on_start_as_the_population_model(side):
    frozen, _ = side_frozen(side, 4, 3)
    start = {key: weight.expand(4, *weight.shape) for key, weight in side.start(0).items()}
    logits = side.logits(frozen, start, torch.ones(4, side.num_pathways, dtype=torch.bool))
    expected = population_logits(side.model, frozen)
    assert (logits - expected).norm() < 1e-2 * expected.norm()
    assert not torch.equal(logits, expected)  # at exactly zero the down-projections would never learn


def test_side_pathways_that_nobody_has_on_are_not_read_and_not_in_the_graph(side):
    frozen, _ = side_frozen(side, 3, 2)
    sites = Spied(frozen.sites)
    gates = torch.zeros(3, side.num_pathways, dtype=torch.bool)
    gates[1:, 2] = True
    weights = {key: weight.requires_grad_() for key, weight in strong_weights(side, 3).items()}
    side.logits(replace(frozen, sites=sites), weights, gates).sum().backward()
    assert set(sites.asked) <= {2, -1}
    assert {key for key, weight in weights.items() if weight.grad is not None} == set(side.keys[2])


def test_side_pathways_that_a_user_has_off_are_not_computed_for_them(side):
    frozen, _ = side_frozen(side, 6, 2)
    gates = some_masks(side, 6)
    weights = strong_weights(side, 6)
    for p, keys in side.keys.items():
        for key in keys:
            weights[key][~gates[:, p]] = torch.nan
        if p < side.num_pathways - 1:  # the classifier reads the last site of everyone
            frozen.sites[p][~gates[:, p]] = torch.nan
    weights = {key: weight.requires_grad_() for key, weight in weights.items()}
    logits = side.logits(frozen, weights, gates)
    assert logits.isfinite().all()
    logits.square().sum().backward()
    for p, keys in side.keys.items():
        for key in keys:
            reached = weights[key].grad.flatten(1).abs().sum(1) > 0
            assert torch.equal(reached, gates[:, p]), key


def test_side_logits_of_a_user_do_not_depend_on_the_others(side):
    frozen, _ = side_frozen(side, 6, 3)
    weights, gates = strong_weights(side, 6), some_masks(side, 6)
    logits = side.logits(frozen, weights, gates)
    for user in range(6):
        one = slice(user, user + 1)
        alone = side.logits(frozen.map(lambda t, one=one: t[one]), of_one(weights, user), gates[one])
        torch.testing.assert_close(logits[one], alone, rtol=1e-5, atol=1e-5)
    order = torch.randperm(6)
    turned = side.logits(frozen.map(lambda t: t[order]), {k: w[order] for k, w in weights.items()}, gates[order])
    torch.testing.assert_close(turned, logits[order], rtol=1e-5, atol=1e-5)


def test_side_pathways_read_pooled_states_of_mean_zero_and_scale_one(side):
    frozen, _ = side_frozen(side, 2, 5)
    for p in range(side.num_pathways):
        read = side.pool(p, frozen)
        assert read.shape == (2, 5, side.widths[p])
        if p < side.num_pathways - 1:
            torch.testing.assert_close(read.mean(-1), torch.zeros(2, 5), rtol=0, atol=1e-5)
            torch.testing.assert_close(read.std(-1, unbiased=False), torch.ones(2, 5), rtol=0.05, atol=0.05)


def test_side_pathways_never_run_the_backbone_again(side, monkeypatch):
    frozen, _ = side_frozen(side, 2, 3)

    def refuse(*_):
        raise AssertionError("the backbone was run")

    for method in ("stem", "block", "readout"):
        monkeypatch.setattr(type(side.model.backbone), method, refuse)
    side.logits(frozen, strong_weights(side, 2), torch.ones(2, side.num_pathways, dtype=torch.bool))


def test_both_placements_have_the_same_names_and_heads(model):
    inline, side = (make_pathways(placement, model, rank=4) for placement in ("inline", "side"))
    assert inline.names == side.names and inline.widths == side.widths
    assert inline.sizes[-1] == side.sizes[-1]
    assert side.sizes[:-1].tolist() == [width * 4 + 4 + 4 * 10 + 10 for width in side.widths[:-1]]

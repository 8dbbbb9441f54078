"""Methods that train through the backbone: what they change, what they leave, and that they are what their papers say."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import conv_transpose2d, cross_entropy
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval

from backbones.base import Backbone
from backbones.inline import InlinePathways
from eval.methods import make_method
from eval.methods.base import Fitted
from eval.methods.bias import PerChannel
from eval.methods.bottleneck import WithAdapters
from eval.methods.dcft import Deconvolved
from eval.methods.finetune import Tunable, adam

NAMES = ("full_finetune", "bitfit", "norm_affine", "bottleneck", "dcft")
WORLDS = ("digits_world", "text_world")


@pytest.fixture(params=WORLDS)
def world(request):
    return request.getfixturevalue(request.param)


def method(name, **settings):
    return make_method(name, **{"steps": 3, **settings})


def uneven(world):
    """Four users with 1, 3, 20 and 7 examples."""
    group = world.group("val", "support")
    return group.pick([torch.arange(n) for n in (1, 3, 20, 7)])


def personal(world, name, shown=None, **settings):
    chosen = method(name, **settings)
    shown = world.group("val", "support").rows([0, 1]) if shown is None else shown
    return chosen.personalise(world, chosen.fit(world, 0.1), shown, 0.1)


def asked(world, users=(0, 1)):
    return world.group("val", "query").rows(list(users))


def states(predictor, user):
    """All parameters of one user's model, and of the model before."""
    predictor.method.put(predictor.model, predictor.states[user])
    return {name: value.detach().clone() for name, value in predictor.model.named_parameters()}


def fresh(predictor, world):
    return dict(predictor.method.tunable(world, Fitted()).named_parameters())


@pytest.mark.parametrize("name", NAMES)
def test_users_do_not_matter_to_each_other_and_the_shared_model_stays(name, world):
    before, shown = world.model.fingerprint(), uneven(world)
    together = personal(world, name, shown, batch=8).logits(asked(world, range(4)))
    for order in ([2, 0], [1], [3]):
        apart = personal(world, name, shown.rows(order), batch=8).logits(asked(world, order))
        for row, user in enumerate(order):
            count = len(world.group("val", "query").examples[user])
            assert torch.equal(apart[row, :count], together[user, :count])
    assert world.model.fingerprint() == before
    assert not any(p.requires_grad for p in world.model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_predictions_are_those_of_the_whole_personalised_model_run_on_raw_inputs(name, world):
    predictor = personal(world, name)
    for user in (0, 1):  # one by one, as their texts differ in length
        alone, one = personal(world, name, world.group("val", "support").rows([user])), asked(world, (user,))
        offset = one.offset(0)
        served = alone.serve(one.inputs(0)[None])[0] + (0 if offset is None else offset)
        looked_up = predictor.logits(asked(world))[user, : len(served)]
        assert torch.allclose(served, looked_up, atol=1e-4)
        assert (looked_up - world.model(one.inputs(0))).abs().max() > 1e-3  # something was learned


@pytest.mark.parametrize("name", NAMES)
def test_training_fits_the_support(name, world):
    shown = world.group("val", "support").rows([0])
    before = make_method("base").personalise(world, Fitted(), shown, 0.1)
    after = personal(world, name, shown, steps=8, rate=1e-2 if name != "full_finetune" else 1e-3)
    base, loss = (cross_entropy(predictor.logits(shown)[0], shown.labels(0)) for predictor in (before, after))
    assert loss < base - 0.02


@pytest.mark.parametrize("name", NAMES)
def test_sizes_count_what_is_each_users_own(name, world):
    predictor = personal(world, name)
    backbone = world.model.backbone
    head = world.model.weight.numel() + world.model.num_classes
    size = predictor.sizes[0]
    if name == "full_finetune":
        assert size.trainable == sum(p.numel() for p in backbone.parameters()) + head
    if name == "bottleneck":
        assert size.trainable == sum(w * 16 + 16 + 16 * w + w for w in world.pathways.widths[:-1]) + head
    if name == "bitfit":
        biases = sum(p.numel() for n, p in backbone.named_parameters() if n.endswith("bias"))
        assert size.trainable == biases + world.model.num_classes
    assert size.stored == 4 * size.trainable
    assert size.active == size.trainable


def test_full_fine_tuning_trains_everything_the_embeddings_of_the_users_words_too(text_world):
    predictor = personal(text_world, "full_finetune", text_world.group("val", "support").rows([0]))
    after, before = states(predictor, 0), fresh(predictor, text_world)
    assert not [n for n in after if n not in predictor.states[0]]
    still = [n for n in after if torch.equal(after[n], before[n])]
    assert not still
    words = "backbone.embeddings.word_embeddings.weight"
    changed = (after[words] != before[words]).any(1).nonzero()[:, 0]
    seen = text_world.group("val", "support").inputs(0).unique()
    assert changed.tolist() == [token for token in seen.tolist() if token >= 0]


def test_full_fine_tuning_is_adam_on_logits_with_what_cross_fitting_adds(text_world):
    shown = text_world.group("val", "support").rows([0])
    assert shown.offset(0).abs().max() > 0
    model = Tunable(text_world.model).requires_grad_(True)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimiser.zero_grad()
        cross_entropy(model(shown.inputs(0)) + shown.offset(0), shown.labels(0)).backward()
        optimiser.step()
    after = states(personal(text_world, "full_finetune", shown, rate=1e-3), 0)
    for name, value in model.named_parameters():
        if "key.bias" not in name:  # whose gradient is rounding: attention does not depend on it
            assert torch.allclose(after[name], value, atol=1e-5), name


@pytest.mark.parametrize("made", [Tunable, lambda model: WithAdapters(model, 4, torch.Generator().manual_seed(0))])
def test_texts_in_pieces_give_the_logits_and_gradients_of_texts_at_once(made, text_world, monkeypatch):
    model = made(text_world.model)
    model.requires_grad_(True)
    group = text_world.group("train", "query", torch.tensor([0]))
    inputs = group.inputs(0)
    inputs = inputs.repeat(6, 1)
    inputs[::2, 5:] = -1
    assert len(model.backbone.pieces(inputs)) > 1

    def found():
        model.zero_grad()
        logits = model(inputs)
        logits.square().sum().backward()
        return [logits, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    widths, trimmed = [], type(model.backbone).trimmed
    monkeypatch.setattr(type(model.backbone), "trimmed", lambda self, some: widths.append(len(some)) or trimmed(self, some))
    pieces = found()
    assert len(widths) > 1 and sum(widths) == len(inputs)
    monkeypatch.setattr(type(text_world.model.backbone), "pieces", Backbone.pieces)
    whole = found()
    assert len(pieces) == len(whole) > 10
    for one, other in zip(pieces, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_users_take_their_batches_in_orders_of_their_own(digits_world):
    shown = digits_world.group("val", "support").rows([0])
    renamed = replace(shown, ids=("somebody else",))
    for name in ("bitfit", "bottleneck"):
        first, second = (personal(digits_world, name, who, batch=5).logits(shown) for who in (shown, renamed))
        assert not torch.allclose(first, second, atol=1e-5)


def test_bitfit_changes_biases_and_nothing_else(world):
    predictor = personal(world, "bitfit", rate=1e-2)
    after, before = states(predictor, 1), fresh(predictor, world)
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert changed
    assert all(n.endswith("bias") for n in changed)
    still = {n for n in after if n.endswith("bias")} - changed
    assert not still
    assert "classifier.bias" in changed


def test_no_kernels_gradient_is_computed_for_a_bias(digits_world):
    for name in ("bitfit", "norm_affine"):
        model = method(name).tunable(digits_world, Fitted())
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert len(convolutions) == sum(isinstance(m, nn.Conv2d) for m in digits_world.model.modules())
        assert not any(p.requires_grad for m in convolutions for p in m.parameters())


def test_scales_are_added_by_norm_affine_per_channel_or_layer_norm(digits_world, text_world):
    channels = sum(m.out_channels for m in digits_world.model.modules() if isinstance(m, nn.Conv2d))
    widths = sum(m.weight.numel() for m in text_world.model.modules() if isinstance(m, nn.LayerNorm))
    for world, scales in ((digits_world, channels), (text_world, widths)):
        small, large = personal(world, "bitfit"), personal(world, "norm_affine")
        assert large.sizes[0].trainable - small.sizes[0].trainable == scales > 0
        start = method("norm_affine").tunable(world, Fitted())
        inputs = world.group("val", "query").inputs(0)
        assert torch.allclose(start(inputs), world.model(inputs), atol=1e-5)


def test_scale_and_bias_of_a_folded_convolution_reach_every_affine_of_its_batch_norm():
    conv, norm = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(5)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.2, 3)
        images = torch.randn(4, 3, 7, 7)
        folded = PerChannel(fuse_conv_bn_eval(conv.eval(), norm.eval()), scales=True)
        old, norm.weight.data, norm.bias.data = norm.weight.clone(), torch.randn(5), torch.randn(5)
        folded.scale.data = norm.weight / old
        folded.bias.data = norm.bias - norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt()
        assert torch.allclose(folded(images), norm(conv(images)), atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "size", "side"), [((12, 8), 4, 4), ((12, 18), 4, 2), ((6, 2, 3, 3), 8, 2), ((5, 1, 3, 3), 8, 1)]
)
def test_dcfts_change_is_a_transposed_convolution_and_a_kronecker_product(shape, size, side):
    change = Deconvolved(torch.zeros(shape), size, torch.Generator().manual_seed(0))
    nn.init.normal_(change.rows)
    found = change(torch.zeros(shape)).flatten(1)
    low = torch.outer(change.rows, change.columns)
    assert torch.allclose(found, conv_transpose2d(low[None, None], change.tile[None, None], stride=side)[0, 0], atol=1e-6)
    assert torch.allclose(found, torch.kron(low, change.tile), atol=1e-6)
    out, inside = found.shape
    assert sum(p.numel() for p in change.parameters()) == inside // side + out // side + side**2


def test_dcft_starts_at_the_model_with_gradients_and_then_all_its_parts_learn(world):
    chosen = method("dcft", classifier=False)
    start = chosen.tunable(world, Fitted())
    inputs = world.group("val", "support").inputs(0)
    assert torch.allclose(start(inputs), world.model(inputs), atol=1e-6)
    cross_entropy(start(inputs), world.group("val", "support").labels(0)).backward()
    rows = [p.grad for n, p in start.named_parameters() if n.endswith("rows")]
    assert len(rows) == sum(isinstance(m, nn.Linear | nn.Conv2d) for m in world.model.modules())
    assert all(gradient.abs().max() > 0 for gradient in rows)
    predictor = personal(world, "dcft", classifier=False, rate=1e-2)
    after, before = states(predictor, 0), dict(start.named_parameters())
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    assert {n.rpartition(".")[2] for n in changed} == {"rows", "columns", "tile"}
    assert changed == {n for n in after if "parametrizations.weight.0" in n}


def test_dcft_merged_into_the_weights_gives_the_same_logits(world):
    predictor = personal(world, "dcft", rate=1e-2)
    inputs = asked(world).inputs(1)
    expected = personal(world, "dcft", world.group("val", "support").rows([1]), rate=1e-2).serve(inputs[None])[0]
    predictor.method.put(predictor.model, predictor.states[1])
    for module in predictor.model.backbone.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    plain = Tunable(world.model)
    plain.load_state_dict(predictor.model.state_dict())
    assert torch.allclose(plain(inputs), expected, atol=1e-5)


def test_adapters_are_near_the_identity_before_they_are_trained(world):
    predictor = personal(world, "bottleneck", steps=1, rate=1e-9)
    base = make_method("base").personalise(world, Fitted(), asked(world), 0.1)
    moved = (predictor.logits(asked(world)) - base.logits(asked(world))).abs()[asked(world).batch.weights > 0]
    assert 0 < moved.max() < 1e-2


def test_adapters_have_the_form_of_our_inline_pathways(world):
    pathways = InlinePathways(world.model, rank=3)
    model = WithAdapters(world.model, 3, torch.Generator().manual_seed(0))
    weights = {"head.weight": torch.randn(1, *world.model.weight.T.shape), "head.bias": torch.randn(1, world.model.num_classes)}
    for name, adapter in zip(pathways.names, model.adapters, strict=False):
        for tensor in adapter.parameters():
            nn.init.normal_(tensor, 0, 0.2)
        for part in ("down", "up"):
            linear = getattr(adapter, part)
            weights |= {f"{name}.{part}": linear.weight.T[None], f"{name}.{part}_bias": linear.bias[None]}
    model.classifier.weight.data += weights["head.weight"][0].T
    model.classifier.bias.data += weights["head.bias"][0]
    inputs, everything = asked(world).inputs(0), torch.ones(1, pathways.num_pathways, dtype=torch.bool)
    assert torch.allclose(model(inputs), pathways.forward(inputs[None], weights, everything)[0], atol=1e-4)


def test_nothing_below_the_first_adapter_is_differentiated(world):
    model, seen = method("bottleneck").tunable(world, Fitted()), []
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    model(asked(world).inputs(0)[:1])
    assert seen == [False] + [True] * (len(model.backbone.blocks) - 1)


def test_the_classifier_stays_where_it_is_not_trained(world):
    for name in ("bottleneck", "dcft"):
        with_it, without = (personal(world, name, classifier=flag).sizes[0].trainable for flag in (True, False))
        assert with_it - without == world.model.weight.numel() + world.model.num_classes


@pytest.mark.parametrize("name", NAMES)
def test_low_precision_is_near_and_is_another_computation(name, text_world):
    exact, low = (personal(text_world, name, low_precision=flag).logits(asked(text_world)) for flag in (False, True))
    assert low.dtype == torch.float32
    assert 0 < (exact - low).abs().max() < 0.2


@pytest.mark.parametrize("make", [lambda: torch.randn(8, 12), lambda: torch.randn(8, 12)[:, ::2], lambda: torch.randn(6, 8).T])
def test_fast_adam_is_adam_whatever_the_layout(make):
    start, pull = make(), torch.randn(make().shape)
    found = []
    for build in (adam, lambda parameters, rate: torch.optim.Adam(parameters, lr=rate)):
        value = torch.empty_strided(start.shape, start.stride()).copy_(start).requires_grad_()
        optimiser = build([value], 0.1)
        for _ in range(3):
            optimiser.zero_grad()
            (value * pull).sin().sum().backward()
            optimiser.step()
        found.append(value.detach())
    assert torch.allclose(*found, atol=1e-5)

"""Low-rank updates of the blocks' own weights: the same as weights that were changed, and as PEFT's."""

import copy
import threading

import pytest
import torch
from torch import nn

from backbones.base import PopulationModel
from backbones.lora import targets_of
from backbones.pathways import make_pathways
from backbones.resnet import small_resnet
from meta.inner import MetaInit, adapt
from tests.test_pathways import TinyTokens, token_inputs
from users.batch import Batch


def spread(pathways, users):
    torch.manual_seed(1)
    return {key: w + 0.2 * torch.randn(users, *w.shape) for key, w in pathways.start(0).items()}


def frozen_of(pathways, inputs):
    return pathways.frozen(inputs.flatten(0, 1)).map(lambda t: t.unflatten(0, inputs.shape[:2]))


@pytest.fixture(params=["images", "tokens"])
def case(request):
    """A model with pathways and inputs ``[6, 3, ...]``."""
    torch.manual_seed(0)
    if request.param == "images":
        return make_pathways("lora", small_resnet(5, widths=(8, 16), image_size=8), 3), torch.rand(6, 3, 1, 8, 8)
    return make_pathways("lora", PopulationModel(TinyTokens(), torch.randn(4, 6), torch.randn(4)), 3), token_inputs(6, 3)


def gates_of(pathways):
    gates = torch.rand(6, pathways.num_pathways) < 0.5
    gates[0], gates[1] = True, False
    return gates


def merged(pathways, weights, gates, user):
    """The population model with one user's updates added to its weights."""
    model = copy.deepcopy(pathways.model)
    for p, name in enumerate(pathways.names[:-1]):
        for inside in pathways.targets[p] if gates[user, p] else ():
            down, up = (weights[f"{name}.{inside}.{kind}"][user] for kind in ("down", "up"))
            layer = model.backbone.blocks[p].get_submodule(inside)
            scale = layer.scale if hasattr(layer, "scale") else torch.ones(len(up))
            layer.weight.data += (scale[:, None] * up @ down.flatten(1)).view(layer.weight.shape)
    return model


def test_every_layer_of_a_block_is_updated(case):
    pathways, _ = case
    for block, layers in zip(pathways.model.backbone.blocks, pathways.targets, strict=True):
        assert [*layers.values()] == [m for m in block.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def test_it_is_what_changed_weights_give(case):
    pathways, inputs = case
    weights, gates = spread(pathways, 6), gates_of(pathways)
    found = pathways.forward(inputs, weights, gates)
    for user in range(6):
        logits = merged(pathways, weights, gates, user)(inputs[user])
        if gates[user, -1]:
            features = merged(pathways, weights, gates, user).backbone(inputs[user])
            logits = logits + features @ weights["head.weight"][user] + weights["head.bias"][user]
        torch.testing.assert_close(found[user], logits, rtol=1e-4, atol=1e-5)


def test_one_users_updates_are_merged_and_leave_nothing_to_do(case):
    pathways, inputs = case
    weights, gates = spread(pathways, 6), gates_of(pathways)
    before = pathways.model(inputs[0])
    for user in range(6):
        model = pathways.merged({key: w[user] for key, w in weights.items()}, gates[user])
        found = pathways.forward(
            inputs[user : user + 1], {k: w[user : user + 1] for k, w in weights.items()}, gates[user : user + 1]
        )
        torch.testing.assert_close(model(inputs[user]), found[0], rtol=1e-4, atol=1e-5)
        assert not any(layer._forward_hooks for layer in model.modules())
    assert torch.equal(pathways.model(inputs[0]), before)


def test_cached_states_give_what_a_pass_through_the_model_gives(case):
    pathways, inputs = case
    weights, gates = spread(pathways, 6), gates_of(pathways)
    cached = pathways.logits(frozen_of(pathways, inputs), weights, gates)
    torch.testing.assert_close(cached, pathways.forward(inputs, weights, gates), rtol=1e-4, atol=1e-5)


def test_the_model_is_itself_afterwards_and_in_other_threads(case):
    pathways, inputs = case
    weights, gates = spread(pathways, 6), torch.ones(6, pathways.num_pathways, dtype=torch.bool)
    bare = pathways.model(inputs[0])
    seen, inside = [], threading.Event()
    layer = next(iter(pathways.targets[0].values()))

    def elsewhere():
        inside.wait()
        seen.append(pathways.model(inputs[0]))

    thread = threading.Thread(target=elsewhere)
    thread.start()

    def wait(*_):
        if threading.current_thread() is not thread:
            inside.set()
            thread.join()

    handle = layer.register_forward_pre_hook(wait)
    pathways.forward(inputs, weights, gates)
    handle.remove()
    assert torch.equal(seen[0], bare)
    assert torch.equal(pathways.model(inputs[0]), bare)


def test_a_pass_that_fails_leaves_no_update_behind(case):
    pathways, inputs = case
    bare = pathways.model(inputs[0])
    weights = spread(pathways, 6)
    last = [key for key in weights if key.endswith(".up")][-1]
    weights[last] = weights[last][..., :2]  # of another rank
    with pytest.raises(RuntimeError):
        pathways.forward(inputs, weights, torch.ones(6, pathways.num_pathways, dtype=torch.bool))
    assert torch.equal(pathways.model(inputs[0]), bare)


def test_two_sets_of_pathways_along_one_model_add_nothing_twice():
    torch.manual_seed(0)
    model = small_resnet(5, widths=(8,), depth=1, image_size=8)
    first, second = (make_pathways("lora", model, 3) for _ in range(2))
    inputs, gates = torch.rand(2, 3, 1, 8, 8), torch.ones(2, 2, dtype=torch.bool)
    weights = spread(first, 2)
    logits = [each.forward(inputs, weights, gates) for each in (first, second)]
    assert torch.equal(*logits)


def test_second_derivatives_pass_through(case):
    pathways, inputs = case
    init = MetaInit(
        {key: w.requires_grad_() for key, w in pathways.start(0).items()},
        torch.full((2, pathways.num_pathways), 0.1),
        torch.ones(pathways.num_pathways, dtype=torch.bool),
    )
    labels = torch.randint(pathways.model.num_classes, (6, 3))
    batch = Batch.of(frozen_of(pathways, inputs), labels, torch.full((6, 3), 1 / 3))
    gates = gates_of(pathways)
    weights = adapt(pathways, init, batch, gates, meta=True, second_order=True)
    pathways.logits(batch.frozen, weights, gates).square().sum().backward()
    key = f"{pathways.names[0]}.{next(iter(pathways.targets[0]))}.down"
    assert init.weights[key].grad.abs().max() > 0


def test_it_is_peft_with_the_same_numbers():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = small_resnet(5, widths=(8, 16), image_size=8)
    pathways = make_pathways("lora", model, 3)
    weights, inputs = spread(pathways, 1), torch.rand(1, 4, 1, 8, 8)
    gates = torch.ones(1, pathways.num_pathways, dtype=torch.bool)
    gates[0, -1] = False
    for layer in (m for m in model.modules() if hasattr(m, "scale")):
        layer.scale.uniform_(0.5, 2.0)
    plain = copy.deepcopy(model)
    paths = {
        f"backbone.blocks.{p}.{inside}": f"{name}.{inside}"
        for p, name in enumerate(pathways.names[:-1])
        for inside in pathways.targets[p]
    }
    wrapped = peft.get_peft_model(plain, peft.LoraConfig(r=3, lora_alpha=3, target_modules=[*paths]))
    for path, key in paths.items():
        layer = wrapped.base_model.model.get_submodule(path)
        layer.lora_A["default"].weight.data = weights[f"{key}.down"][0]
        up = weights[f"{key}.up"][0] * model.get_submodule(path).scale[:, None]
        layer.lora_B["default"].weight.data = up.view(*up.shape, *[1] * (layer.lora_B["default"].weight.dim() - 2))
    torch.testing.assert_close(pathways.forward(inputs, weights, gates)[0], wrapped(inputs[0]), rtol=1e-4, atol=1e-5)


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, groups=2)


def test_blocks_that_cannot_be_updated_are_refused():
    with pytest.raises(ValueError, match=r"b\.conv is a convolution in groups"):
        targets_of("b", Grouped())
    with pytest.raises(ValueError, match="block 'b' has no dense layer"):
        targets_of("b", nn.Sequential(nn.ReLU()))

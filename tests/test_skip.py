"""Blocks that a mask leaves out: logits, what is run, what it costs, and how adapters learn to make up for it."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from backbones.base import PopulationModel
from backbones.pathways import make_pathways
from backbones.prices import cost_model, flops
from backbones.resnet import small_resnet
from envs import MINIATURES
from envs.oracles import all_masks
from envs.rendering import gates_as_text
from eval.methods.relaxed import relaxed_logits
from meta.inner import MetaInit, adapt, user_loss
from meta.masks import LEFT_OUT, masks_for
from tests.test_exit import Counting, frozen_of, spread
from tests.test_pathways import TinyTokens, token_inputs
from users.batch import Batch

USERS = 24
CASES = [("images", "side", "skip"), ("images", "side", "exit+skip"), ("images", "inline", "skip")]
CASES += [("tokens", *rest) for _, *rest in CASES]


def model_of(kind):
    torch.manual_seed(0)
    if kind == "images":
        return small_resnet(5, widths=(8, 16), image_size=8)
    return PopulationModel(TinyTokens(), torch.randn(4, 6), torch.randn(4))


def inputs_for(kind, users=USERS):
    return torch.rand(users, 3, 1, 8, 8) if kind == "images" else token_inputs(users, 3)


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    """Pathways, inputs ``[24, 3, ...]``, and a mask for each of the 24 users."""
    kind, placement, gates = request.param
    pathways = make_pathways(placement, model_of(kind), 4, gates)
    masks = torch.rand(USERS, pathways.num_pathways) < 0.6
    masks[2:8, 0] = True  # they have something to learn
    masks[0], masks[1] = True, False
    return pathways, inputs_for(kind), masks


def by_hand(pathways, inputs, weights, mask):
    """One user's logits, block by block, in words of this file alone. Inputs ``[N, ...]``, weights without a user."""
    backbone, model = pathways.model.backbone, pathways.model
    on = dict(zip(pathways.names, mask.tolist(), strict=True))
    personal = [name for name in pathways.names if not name.endswith(".run")]
    if not any(on[name] for name in personal):
        return model(inputs)
    hidden, said = backbone.stem(inputs), 0.0
    for index, name in enumerate(backbone.block_names):
        if on.get(f"{name}.run", True):
            hidden = backbone.block(index, hidden)
        if not on[name]:
            continue
        part = {key: weights[f"{name}.{key}"] for key in ("down", "down_bias", "up", "up_bias")}
        if type(pathways).__name__ == "InlinePathways":
            last = hidden.tensor.movedim(backbone.channel_axis, -1)
            change = (last @ part["down"] + part["down_bias"]).relu() @ part["up"] + part["up_bias"]
            hidden = hidden.with_tensor((last + change).movedim(-1, backbone.channel_axis))
        else:
            read = backbone.outline(hidden) if pathways.exits else backbone.pool(hidden)
            read = nn.functional.layer_norm(read, read.shape[-1:])
            said = said + nn.functional.gelu(read @ part["down"] + part["down_bias"]) @ part["up"] + part["up_bias"]
    features = backbone.readout(hidden)
    if on.get("readout", True):
        said = said + features @ model.weight.T + model.bias
    if on["head"]:
        if type(pathways).__name__ != "InlinePathways":
            features = nn.functional.layer_norm(features, features.shape[-1:]) / features.shape[-1] ** 0.5
        said = said + features @ weights["head.weight"] + weights["head.bias"]
    return said


def test_logits_are_those_worked_out_block_by_block(case):
    pathways, inputs, masks = case
    weights = spread(pathways, USERS)
    cached = pathways.logits(frozen_of(pathways, inputs), weights, masks)
    passed = pathways.forward(inputs, weights, masks)
    for user, mask in enumerate(masks):
        expected = by_hand(pathways, inputs[user], {key: w[user] for key, w in weights.items()}, mask)
        torch.testing.assert_close(cached[user], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(passed[user], expected, rtol=1e-4, atol=1e-4)


def test_blocks_of_one_shape_in_and_out_have_a_gate_before_readout_and_head(case):
    pathways, _, masks = case
    specs = pathways.model.backbone.specs()
    assert pathways.runs == {
        block: pathways.names.index(f"{spec.name}.run") for block, spec in enumerate(specs) if spec.skippable
    }
    assert len(pathways.runs) > 0
    assert pathways.names[-1] == "head" and (pathways.names[-2] == "readout") == pathways.exits
    gates = [*pathways.runs.values()]
    assert not pathways.sizes[gates].any() and not pathways.costs.alone[gates].any()
    none = pathways.executed(masks[1:2])
    assert none.sum() == len(gates) + pathways.exits and none[:, gates].all()


def test_adapting_under_a_mask_is_gradient_descent_on_the_logits_under_it(case):
    pathways, inputs, masks = case
    count = pathways.num_pathways
    init = MetaInit(pathways.start(0), torch.full((2, count), 0.1), torch.ones(count, dtype=torch.bool))
    labels = torch.randint(4, (USERS, 3))
    batch = Batch.of(frozen_of(pathways, inputs), labels, torch.full((USERS, 3), 1 / 3))
    found = adapt(pathways, init, batch, masks)
    for user in range(2, 8):
        mine = {key: w.clone() for key, w in init.weights.items()}
        for _ in range(init.steps):
            wanted = {key: w.detach().requires_grad_() for key, w in mine.items()}
            logits = by_hand(pathways, inputs[user], wanted, masks[user])
            loss = nn.functional.cross_entropy(logits, labels[user])
            slopes = torch.autograd.grad(loss, [*wanted.values()], allow_unused=True, materialize_grads=True)
            mine = {key: w - 0.1 * slope for (key, w), slope in zip(mine.items(), slopes, strict=True)}
        for key, w in mine.items():
            torch.testing.assert_close(found[key][user], w, rtol=1e-3, atol=1e-5)


def test_the_network_is_run_again_once_for_all_inner_steps(monkeypatch):
    pathways = make_pathways("side", model_of("images"), 4, "skip")
    counting = nn.ModuleList(Counting(block) for block in pathways.model.backbone.blocks)
    inputs = inputs_for("images", 4)
    frozen = frozen_of(pathways, inputs)
    monkeypatch.setitem(pathways.model.backbone._modules, "blocks", counting)
    masks = torch.ones(4, pathways.num_pathways, dtype=torch.bool)
    masks[1, pathways.runs[1]] = masks[2, pathways.runs[0]] = False
    init = MetaInit(pathways.start(0), torch.full((5, len(masks[0])), 0.1), torch.ones(len(masks[0]), dtype=torch.bool))
    adapt(pathways, init, Batch.of(frozen, torch.zeros(4, 3, dtype=torch.long), torch.full((4, 3), 1 / 3)), masks)
    assert [block.examples for block in counting] == [3, 3, 6, 6]  # two users leave something out


def test_a_block_that_is_left_out_is_not_run(monkeypatch):
    pathways = make_pathways("side", model_of("images"), 4, "exit+skip")
    counting = nn.ModuleList(Counting(block) for block in pathways.model.backbone.blocks)
    monkeypatch.setitem(pathways.model.backbone._modules, "blocks", counting)
    masks = torch.zeros(3, pathways.num_pathways, dtype=torch.bool)
    masks[0, [1, pathways.runs[1]]] = True  # reads behind block 1, leaves block 0 out
    masks[1, pathways.readout] = True  # the model without any block that can be left out
    masks[2, pathways.runs[0]] = True  # nothing speaks: the whole bare model
    pathways.forward(inputs_for("images", 3), spread(pathways, 3), masks)
    assert [block.examples for block in counting] == [3, 6, 6, 3]
    assert pathways.depth(pathways.executed(masks)).tolist() == [2, 5, 5]


def test_operations_are_those_that_torch_counts(case):
    pathways, _, _ = case
    costs = cost_model(pathways, flops(pathways))
    masks = torch.from_numpy(all_masks(pathways.num_pathways))
    inputs, weights = pathways.model.backbone.reference_inputs()[None], spread(pathways, 1)

    def counted(mask):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            pathways.forward(inputs, weights, mask[None])
        return counter.get_total_flops()

    whole = counted(masks[-1])
    for mask in masks[:: max(1, len(masks) // 32)]:
        assert float(costs(mask)) == pytest.approx(counted(mask) / whole)
        assert float(costs(pathways.executed(mask[None])[0])) == pytest.approx(float(costs(mask)))
    chance = torch.full((pathways.num_pathways,), 0.5, dtype=torch.float64)
    assert float(costs(chance)) == pytest.approx(float(costs(masks).mean()))
    again = type(costs).from_tensors(costs.tensors())
    np.testing.assert_allclose(again(masks), costs(masks), rtol=1e-7)


def test_meta_training_leaves_some_blocks_out_and_lets_a_personal_pathway_speak(case):
    pathways, _, _ = case
    masks = masks_for(pathways, 4000, torch.Generator().manual_seed(0), all_on=0.2)
    assert (masks & (pathways.sizes > 0)).any(1).all()
    assert float(masks.all(1).float().mean()) > 0.2
    partly = masks[~masks.all(1)]
    for gate in pathways.runs.values():
        assert float((~partly[:, gate]).float().mean()) == pytest.approx(LEFT_OUT / 2, abs=0.03)


def test_adapters_learn_to_make_up_for_blocks_that_are_left_out():
    """Trained under a mask that leaves blocks out, they do better under it than trained with all blocks."""
    pathways = make_pathways("inline", model_of("images"), 4, "skip")
    inputs = inputs_for("images", 8)
    labels = torch.randint(5, (8, 3))
    frozen = frozen_of(pathways, inputs)
    batch = Batch.of(frozen, labels, torch.full((8, 3), 1 / 3))
    without = torch.ones(8, pathways.num_pathways, dtype=torch.bool)
    without[:, [*pathways.runs.values()]] = False

    def trained(masks):
        weights = {key: w.requires_grad_() for key, w in pathways.start(0).items()}
        optimiser = torch.optim.Adam(weights.values(), 1e-2)
        for _ in range(60):
            stacked = {key: w.expand(8, *w.shape) for key, w in weights.items()}
            optimiser.zero_grad()
            user_loss(pathways.logits(frozen, stacked, masks), batch).mean().backward()
            optimiser.step()
        with torch.no_grad():
            stacked = {key: w.expand(8, *w.shape) for key, w in weights.items()}
            return float(user_loss(pathways.logits(frozen, stacked, without), batch).mean())

    assert trained(without) < trained(torch.ones_like(without)) - 0.1


def test_what_is_left_out_and_what_is_behind_the_exit_is_drawn():
    names = ("a", "b", "a.run", "b.run", "readout", "head")
    mask = np.array([1, 0, 0, 1, 0, 0], dtype=np.int8)  # block b would be run, but nothing reads it
    assert gates_as_text(names, [("u", mask)]).splitlines()[1] == "u            ■     ·     ■"
    mask[-1] = 1
    assert gates_as_text(names, [("u", mask)]).splitlines()[1].count("·") == 3


def test_gates_of_blocks_where_they_make_no_sense_are_refused():
    images = model_of("images")
    with pytest.raises(ValueError, match=r"gates='skip' needs placement 'inline' or 'side'"):
        make_pathways("lora", images, 4, "skip")
    with pytest.raises(ValueError, match="gates='exit\\+skip' needs placement='side'"):
        make_pathways("inline", images, 4, "exit+skip")
    pathways = make_pathways("side", images, 4, "skip")
    with pytest.raises(ValueError, match="cannot be partly on"):
        relaxed_logits(pathways, frozen_of(pathways, inputs_for("images", 1)), spread(pathways, 1), torch.ones(1, 9))
    images.backbone.block_names = ("a", "b", "b.run", "c")
    with pytest.raises(ValueError, match=r"a block is called 'b\.run'"):
        make_pathways("side", images, 4)


def test_in_an_environment_a_mask_with_nothing_on_is_the_whole_bare_model():
    env_id = "dsa/DigitsResNet-v0"
    env = gym.make(env_id, **MINIATURES[env_id], placement="side", gates="exit+skip", cost="flops")
    env.reset(seed=0)
    _, _, _, _, info = env.step(np.zeros(env.action_space.n, dtype=np.int8))
    names = env.unwrapped.core.scenario.pathways
    assert [bool(on) for on in info["mask"]] == [name.endswith(".run") or name == "readout" for name in names]

"""Inference that ends early: masks, logits, what is run, and what it costs."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from backbones.base import PopulationModel
from backbones.pathways import make_pathways
from backbones.prices import cost_model, flops, parts
from backbones.resnet import small_resnet
from envs.oracles import all_masks
from envs.rendering import gates_as_image, gates_as_text
from meta.inner import MetaInit, adapt
from meta.masks import masks_for, sample_masks
from tests.test_pathways import TinyTokens, token_inputs
from users.batch import Batch

BLOCKS = 4


@pytest.fixture(scope="module")
def tokens():
    torch.manual_seed(0)
    return PopulationModel(TinyTokens(), torch.randn(4, 6), torch.randn(4))


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    return small_resnet(5, widths=(8, 16), image_size=8)


@pytest.fixture(params=["images", "tokens"])
def case(request, images, tokens):
    """Pathways that may exit, and inputs ``[U, 3, ...]``."""
    if request.param == "images":
        return make_pathways("side", images, 4, "exit"), torch.rand(2 ** (BLOCKS + 2), 3, 1, 8, 8)
    return make_pathways("side", tokens, 4, "exit"), token_inputs(2**5, 3)


def spread(pathways, users):
    """Weights far from the start, another set for every user."""
    torch.manual_seed(1)
    return {key: w + 0.3 * torch.randn(users, *w.shape) for key, w in pathways.start(0).items()}


def frozen_of(pathways, inputs):
    return pathways.frozen(inputs.flatten(0, 1)).map(lambda t: t.unflatten(0, inputs.shape[:2]))


def test_the_models_own_readout_is_the_last_pathway_but_one_and_has_no_weights(case):
    pathways, _ = case
    assert pathways.names[-2:] == ("readout", "head")
    assert pathways.readout == pathways.num_pathways - 2
    assert pathways.keys[pathways.readout] == ()
    assert pathways.sizes[pathways.readout] == 0
    assert pathways.costs.alone[pathways.readout] == 0


def test_a_pass_through_the_model_gives_what_cached_features_give_for_every_mask(case):
    pathways, inputs = case
    gates = torch.from_numpy(all_masks(pathways.num_pathways))
    weights = spread(pathways, len(gates))
    cached = pathways.logits(frozen_of(pathways, inputs), weights, gates)
    torch.testing.assert_close(pathways.forward(inputs, weights, gates), cached, rtol=1e-4, atol=1e-4)


def test_users_of_a_mixed_batch_get_what_they_get_alone(case):
    pathways, inputs = case
    gates = torch.from_numpy(all_masks(pathways.num_pathways))
    weights = spread(pathways, len(gates))
    together = pathways.forward(inputs, weights, gates)
    for user in range(0, len(gates), 5):
        alone = slice(user, user + 1)
        mine = {key: w[alone] for key, w in weights.items()}
        torch.testing.assert_close(pathways.forward(inputs[alone], mine, gates[alone]), together[alone], rtol=1e-4, atol=1e-4)


def test_with_nothing_on_the_whole_bare_model_answers(case):
    pathways, inputs = case
    none = torch.zeros(len(inputs), pathways.num_pathways, dtype=torch.bool)
    bare = pathways.model(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])
    weights = spread(pathways, len(inputs))
    torch.testing.assert_close(pathways.forward(inputs, weights, none), bare, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pathways.logits(frozen_of(pathways, inputs), weights, none), bare, rtol=1e-4, atol=1e-5)
    assert pathways.executed(none)[:, pathways.readout].all()
    assert pathways.executed(none).sum() == len(inputs)


def test_without_the_readout_the_models_own_logits_count_for_nothing(case):
    pathways, inputs = case
    weights = {key: torch.zeros(len(inputs), *w.shape) for key, w in pathways.start(0).items()}
    gates = torch.zeros(len(inputs), pathways.num_pathways, dtype=torch.bool)
    gates[:, 0] = gates[:, -1] = True
    assert pathways.logits(frozen_of(pathways, inputs), weights, gates).abs().max() == 0


class Counting(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.examples = inner, 0

    def forward(self, *arguments):
        self.examples += len(arguments[0])
        return self.inner(*arguments)


def test_nothing_is_run_beyond_the_deepest_block_that_is_read(images, monkeypatch):
    pathways = make_pathways("side", images, 4, "exit")
    blocks = images.backbone.blocks
    counting = torch.nn.ModuleList(Counting(block) for block in blocks)
    monkeypatch.setitem(images.backbone._modules, "blocks", counting)
    gates = torch.zeros(4, pathways.num_pathways, dtype=torch.bool)
    gates[0, 0] = gates[1, 2] = gates[2, [0, 1]] = True  # the last one has nothing on and is whole
    pathways.forward(torch.rand(4, 3, 1, 8, 8), spread(pathways, 4), gates)
    assert [block.examples for block in counting] == [12, 9, 6, 3]
    for block in counting:
        block.examples = 0
    only = torch.zeros(1, pathways.num_pathways, dtype=torch.bool)
    only[0, -1] = True  # the user's head reads the last block
    pathways.forward(torch.rand(1, 3, 1, 8, 8), spread(pathways, 1), only)
    assert [block.examples for block in counting] == [3, 3, 3, 3]


def test_adapting_leaves_the_readout_alone_and_works_without_anything_on(images):
    pathways = make_pathways("side", images, 4, "exit")
    init = MetaInit(pathways.start(0), torch.full((2, 6), 0.1), torch.ones(6, dtype=torch.bool))
    inputs = torch.rand(3, 5, 1, 8, 8)
    batch = Batch.of(frozen_of(pathways, inputs), torch.randint(5, (3, 5)), torch.full((3, 5), 0.2))
    gates = torch.zeros(3, 6, dtype=torch.bool)
    gates[1, 4] = gates[2, [1, 4]] = True
    weights = adapt(pathways, init, batch, gates)
    for key, start in init.weights.items():
        moved = (weights[key] != start).flatten(1).any(1)
        assert moved.tolist() == [False, False, key.startswith("layer1.1.")]


def test_operations_are_those_that_torch_counts(case):
    pathways, _ = case
    found = flops(pathways)
    costs = cost_model(pathways, found)
    masks = torch.from_numpy(all_masks(pathways.num_pathways))
    inputs = pathways.model.backbone.reference_inputs()[None]
    weights = spread(pathways, 1)

    def counted(mask):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            pathways.forward(inputs, weights, mask[None])
        return counter.get_total_flops()

    whole = counted(masks[-1])
    for mask in masks[:: max(1, len(masks) // 16)]:
        assert float(costs(mask)) == pytest.approx(counted(mask) / whole)


@pytest.mark.parametrize("placement", ["side", "inline", "lora"])
def test_of_adapters_alone_operations_are_never_less_than_the_models(images, placement):
    pathways = make_pathways(placement, images, 4)
    costs = cost_model(pathways, flops(pathways))
    masks = torch.from_numpy(all_masks(pathways.num_pathways))
    bare = float(costs(masks[0]))
    assert 0.5 < bare < 1
    assert (costs(masks[1:]) > bare).all()
    inputs, weights = pathways.model.backbone.reference_inputs()[None], spread(pathways, 1)
    with FlopCounterMode(display=False) as none, torch.no_grad():
        pathways.forward(inputs, weights, masks[:1])
    with FlopCounterMode(display=False) as every, torch.no_grad():
        pathways.forward(inputs, weights, masks[-1:])
    assert bare == pytest.approx(none.get_total_flops() / every.get_total_flops())


def test_every_part_of_a_pass_has_a_price(case):
    pathways, _ = case
    assert [*flops(pathways)] == [*parts(pathways)]
    cost_model(pathways, dict.fromkeys(parts(pathways), 1.0))
    with pytest.raises(KeyError):
        cost_model(pathways, {"stem": 1.0})


def test_meta_training_sees_masks_of_every_depth_and_none_without_weights(images):
    pathways = make_pathways("side", images, 4, "exit")
    masks = masks_for(pathways, 4000, torch.Generator().manual_seed(0), all_on=0.2)
    assert (masks & (pathways.sizes > 0)).any(1).all()
    assert float(masks.all(1).float().mean()) == pytest.approx(0.2 + 0.8 / 7, abs=0.05)  # a density near one
    depth = torch.bincount(pathways.depth(masks), minlength=6)[1:] / len(masks)
    assert (depth > 0.04).all()
    inline = make_pathways("inline", images, 4)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert torch.equal(masks_for(inline, 9, generators[0]), sample_masks(9, 5, generators[1]))


def test_what_is_not_run_is_drawn():
    names, mask = ("a", "b", "c", "readout", "head"), np.array([0, 1, 0, 0, 0], dtype=np.int8)
    assert gates_as_text(names, [("u", mask)]).splitlines()[1] == "u            · ■"
    colours = [tuple(cell) for cell in gates_as_image(names, [mask], height=1)[8, 8::16]]
    assert colours[2] == colours[3] == colours[4] != colours[0]
    whole = np.array([0, 1, 0, 0, 1], dtype=np.int8)
    assert gates_as_text(names, [("u", whole)]).splitlines()[1] == "u            · ■ ·    ·     ■"
    plain = gates_as_text(("a", "b", "c"), [("u", mask[:3])]).splitlines()[1]
    assert plain == "u            · ■ ·"


def test_gates_that_make_no_sense_are_refused(images):
    with pytest.raises(ValueError, match=r"unknown gates 'exits'\. Did you mean 'exit'\?"):
        make_pathways("side", images, 4, "exits")
    with pytest.raises(ValueError, match="gates='exit' needs placement='side'"):
        make_pathways("inline", images, 4, "exit")


def test_backbones_without_an_outline_of_their_own_are_read_as_ever(tokens):
    assert make_pathways("side", tokens, 4, "exit").widths[:3] == make_pathways("side", tokens, 4).widths[:3]
    assert "outline" not in vars(TinyTokens)


def test_an_undecided_mask_is_drawn_as_the_whole_model():
    names, none = ("a", "b", "readout", "head"), np.zeros(4, dtype=np.int8)
    assert gates_as_text(names, [("u", none)]).splitlines()[1].count("·") == 4


class Named(TinyTokens):
    def __init__(self):
        super().__init__()
        self.block_names = ("one", "readout", "three")


def test_block_names_that_mean_something_else_are_refused():
    model = PopulationModel(Named(), torch.randn(4, 6), torch.randn(4))
    with pytest.raises(ValueError, match="a block is called 'readout'"):
        make_pathways("inline", model, 4)

"""Methods that PEFT brings: what each changes in the frozen model, for whom, and what of it is kept."""

from copy import deepcopy

import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("peft", reason="needs the extra `eval`")

import envs
from backbones.base import PopulationModel
from backbones.resnet import small_resnet
from eval.methods import make_method
from eval.methods.adalora import AdaLoRA
from eval.methods.base import Fitted
from eval.methods.finetune import Tunable
from eval.methods.ia3 import IA3
from eval.methods.injected import matrices, modules
from eval.methods.lora import LoRA
from eval.methods.prefix import Prefix
from eval.methods.shira import SHiRA

NAMES = ("lora", "adalora", "shira", "ia3", "prefix")
ON_IMAGES = ("lora", "adalora", "shira", "ia3")


@pytest.fixture(params=["digits_world", "text_world"])
def world(request):
    return request.getfixturevalue(request.param)


def some(world):
    """Three val users with 4, 1 and 6 examples."""
    support = world.group("val", "support").rows([0, 1, 2])
    return support.pick([torch.arange(n) for n in (4, 1, 6)])


def logits_of(world, method, shown):
    return method.personalise(world, Fitted(), shown, 0.1).logits(shown)


def model_of(world, method, shown, user=0):
    """A population model of its own with one user's state in, PEFT's modules and all."""
    predictor = method.personalise(world, Fitted(), shown, 0.1)
    method.put(predictor.model, predictor.states[user])
    return predictor.model


def plain(world):
    """A copy of the population model that may be changed by hand."""
    model = Tunable(world.model)
    return model, model.backbone


@pytest.mark.parametrize(
    "kind, name", [("digits_world", name) for name in ON_IMAGES] + [("text_world", name) for name in NAMES]
)
def test_a_user_is_served_by_a_model_of_their_own_alone(request, kind, name):
    world, method = request.getfixturevalue(kind), make_method(name, steps=3, rate=3e-2)
    before, random_state, shown = world.model.fingerprint(), torch.get_rng_state(), some(world)
    predictor = method.personalise(world, Fitted(), shown, 0.1)
    logits = predictor.logits(shown)
    # OPPU's published code trains user i on the examples of users 0..i.
    for order in ([1], [2, 0]):
        alone = logits_of(world, method, shown.rows(order))
        for place, user in enumerate(order):
            count = shown.counts[user]
            assert torch.equal(alone[place, :count], logits[user, :count])
    for user, count in enumerate(shown.counts):
        offset = shown.offset(user)
        served = predictor.serve(shown.inputs(user).expand(3, *shown.inputs(user).shape))[user]
        torch.testing.assert_close(served + (0 if offset is None else offset), logits[user, :count])
    assert len({tuple(row) for row in logits[:, 0].tolist()}) == 3
    assert world.model.fingerprint() == before
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_loss_on_the_users_support(text_world, name):
    shown = some(text_world).rows([2])
    short, long = (logits_of(text_world, make_method(name, steps=n, head="nothing"), shown)[0] for n in (1, 30))
    assert cross_entropy(long, shown.labels(0)) < cross_entropy(short, shown.labels(0)) - 0.02


def test_products_in_half_precision_change_little(world):
    shown = some(world)
    exact, rough = (logits_of(world, LoRA(steps=2, low_precision=low), shown)[0, :4] for low in (False, True))
    assert rough.dtype == torch.float32 and not torch.equal(exact, rough)
    torch.testing.assert_close(exact, rough, atol=0.2, rtol=0.1)


@pytest.mark.parametrize("head, trained", [("nothing", set()), ("bias", {"bias"}), ("all", {"bias", "weight"})])
def test_of_the_classifier_only_the_head_asked_for_is_trained(digits_world, head, trained):
    model = IA3(head=head).tunable(digits_world, Fitted())
    assert {name for name, p in model.classifier.named_parameters() if p.requires_grad} == trained
    rest = [name for name, p in model.backbone.named_parameters() if p.requires_grad]
    assert rest and all(".ia3_l." in name for name in rest)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_options_are_named(name):
    with pytest.raises(ValueError, match="head='weights' is none of nothing, bias, all"):
        make_method(name, head="weights")


@pytest.mark.parametrize("method, option", [(LoRA, "rank"), (AdaLoRA, "rank"), (SHiRA, "rank"), (Prefix, "tokens")])
def test_nothing_of_size_zero(method, option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        method(**{option: 0})


@pytest.mark.parametrize("where", ["usual", "all"])
def test_peft_changes_the_modules_named_and_no_others_though_there_are_many(where):
    """PEFT shortens lists of 20 paths and more to suffixes."""
    backbone = small_resnet(10, widths=(4, 4, 4), depth=4).backbone
    wanted = matrices(backbone, where)
    assert len(wanted) == 24 + 2 * (where == "all")  # the 1x1 convolutions of shortcuts are not usual
    LoRA(where=where).inject(backbone, wanted)
    assert {path for path, module in backbone.named_modules() if hasattr(module, "lora_A")} == set(wanted)


def test_in_texts_the_usual_modules_are_queries_and_values(text_world):
    backbone = text_world.model.backbone
    assert matrices(backbone, "usual") == [f"blocks.{block}.{name}" for block in (0, 2) for name in ("query", "value")]
    assert len(matrices(backbone, "all")) == 2 * 6


def test_modules_that_are_never_called_get_no_adapter():
    backbone = small_resnet(10, widths=(4,), depth=1).backbone
    backbone.blocks.append(torch.nn.MultiheadAttention(4, 2))  # reads out_proj.weight, and never calls out_proj
    assert list(modules(backbone)) == ["blocks.0.conv1", "blocks.0.conv2"]


def test_loras_update_is_b_times_a(text_world):
    shown = some(text_world)
    method = LoRA(steps=4, rate=3e-2, rank=3, head="all")
    tuned = model_of(text_world, method, shown)
    model, backbone = plain(text_world)
    model.classifier.load_state_dict(tuned.classifier.state_dict())
    values = dict(tuned.named_parameters())
    with torch.no_grad():
        for path in matrices(backbone, "usual"):
            down, up = (values[f"backbone.model.{path}.lora_{x}.default.weight"] for x in "AB")
            assert down.shape[0] == 3 and up.abs().max() > 0.01
            backbone.get_submodule(path).weight.add_(up @ down)
        torch.testing.assert_close(model(shown.inputs(0)), tuned(shown.inputs(0)))


def live_ranks(model):
    return [int((value != 0).sum()) for name, value in model.named_parameters() if ".lora_E." in name]


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_adaloras_budget_is_met_for_every_length_and_never_exceeded_again(world, steps, monkeypatch):
    totals, stepped = [], AdaLoRA.stepped
    monkeypatch.setattr(AdaLoRA, "stepped", lambda self, m, step: (stepped(self, m, step), totals.append(sum(live_ranks(m)))))
    method = AdaLoRA(steps=steps, rank=2)
    predictor = method.personalise(world, Fitted(), some(world), 0.1)
    places = len(method.targets(world.model.backbone))
    for user in range(3):
        run = totals[user * steps : (user + 1) * steps]
        settled = max(steps, 2) - max(1, steps // 2)
        assert run[settled:] == [2 * places] * (steps - settled)
        assert run[-1] == 2 * places  # it was 3 each
        assert run == sorted(run, reverse=True)
        if steps == 10:
            assert run[0] == 3 * places and len(set(run)) > 2
        kept = [len(v) for name, v in predictor.states[user].items() if ".lora_E." in name]
        assert sum(kept) == 2 * places and len(kept) == places


def test_adaloras_modules_may_end_with_nothing(text_world):
    """What survives is kept and nothing else; put into a model that was another user's it answers the same."""
    method, shown = AdaLoRA(rank=2), some(text_world)
    model = method.tunable(text_world, Fitted())
    parts = [p for name, p in model.named_parameters() if ".lora_" in name and p.requires_grad]
    first = [p for name, p in model.named_parameters() if ".lora_E." in name]
    with torch.no_grad():
        for part in parts:
            part.normal_()
        first[0].zero_()
        first[1][1] = 0.0  # in the middle
        expected = model(shown.inputs(0))
        state = method.own(model)
        for part in parts:
            part.normal_()
        assert not torch.allclose(model(shown.inputs(0)), expected, atol=1e-3)
        method.put(model, state)
        torch.testing.assert_close(model(shown.inputs(0)), expected)
    assert [len(v) for name, v in state.items() if ".lora_E." in name] == [0, 2, 3, 3]
    size, width = method.size(state), 32
    assert size.trainable == size.active == 8 * (2 * width + 1) + text_world.model.num_classes
    assert size.stored == 4 * size.active + 4  # and the ranks of four modules


def test_adaloras_penalty_is_zero_for_orthonormal_directions_alone(text_world):
    method = AdaLoRA(orthogonality=0.5)
    model = method.tunable(text_world, Fitted())
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                torch.nn.init.orthogonal_(value)
        assert float(method.penalty(model)) < 1e-5
        for name, value in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                value.mul_(2)
        assert float(method.penalty(model)) == pytest.approx(0.5 * 3 * 3**0.5, rel=1e-4)  # ||4 I - I|| of rank 3


def sensitivities(world, shown, user, paths):
    """``|gradient x weight|`` of the support loss in the frozen weights, by plain autograd."""
    model, backbone = plain(world)
    weights = [backbone.get_submodule(path).weight.requires_grad_() for path in paths]
    offset = shown.offset(user)
    logits = model(shown.inputs(user)) + (0 if offset is None else offset)
    gradients = torch.autograd.grad(cross_entropy(logits, shown.labels(user)), weights)
    return [(g * w).abs().detach().flatten() for g, w in zip(gradients, weights, strict=True)]


@pytest.mark.parametrize("batch", [32, 4])  # 6 examples: at once, and in two parts
def test_shira_changes_the_weights_of_largest_sensitivity_and_no_others(world, batch):
    method, shown, user = SHiRA(steps=3, rank=2, batch=batch, rate=1e-2), some(world), 2
    predictor = method.personalise(world, Fitted(), shown, 0.1)
    tuned, state = predictor.model, predictor.states[user]
    method.put(tuned, state)
    paths = matrices(world.model.backbone, "usual")
    for path, score in zip(paths, sensitivities(world, shown, user, paths), strict=True):
        frozen = world.model.backbone.get_submodule(path).weight
        layer = tuned.backbone.model.get_submodule(path)
        (rows, columns), values = layer.shira_indices["default"], layer.shira_weight["default"].detach()
        changed = frozen.flatten(1).clone().index_put((rows, columns), values, accumulate=True)
        assert torch.equal(layer.base_layer.weight, frozen)
        different = (changed != frozen.flatten(1)).flatten()
        count = 2 * sum(frozen.flatten(1).shape)
        assert len(values) == len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == count
        assert count * 0.9 < different.sum() <= count  # a dead channel has no gradient to move by
        chosen = torch.zeros_like(score, dtype=torch.bool)
        chosen[rows * frozen.flatten(1).shape[1] + columns] = True
        assert not (different & ~chosen).any()
        assert score[chosen].min() >= score[~chosen].max() * (1 - 1e-3)
    places = [name for name in state if name.endswith(".places")]
    assert any(not torch.equal(state[name], predictor.states[0][name]) for name in places)  # each user's own
    size = method.size(state)
    head = world.model.num_classes
    assert size.stored == 8 * (size.trainable - head) + 4 * head


def test_shira_answers_like_the_model_with_those_weights_changed(world):
    shown = some(world)
    tuned = model_of(world, SHiRA(steps=3, rate=3e-2, where="all", rank=1, head="nothing"), shown)
    model, backbone = plain(world)
    with torch.no_grad():
        for path in matrices(backbone, "all"):
            layer, weight = tuned.backbone.model.get_submodule(path), backbone.get_submodule(path).weight
            places = tuple(layer.shira_indices["default"])
            weight.copy_(weight.flatten(1).index_put(places, layer.shira_weight["default"], accumulate=True).view_as(weight))
        expected = model(shown.inputs(0))
        torch.testing.assert_close(SHiRA().run(tuned, shown.inputs(0)), expected)
        assert not torch.allclose(expected, world.model(shown.inputs(0)), atol=1e-3)


def test_shira_refuses_a_rank_that_would_change_more_weights_than_there_are(text_world):
    assert SHiRA(rank=16).refuses(text_world) is None
    assert "rank 17 would change 1088 weights of blocks.0.query, which has 1024" in SHiRA(rank=17).refuses(text_world)


def test_ia3_scales_keys_values_and_the_inner_activation(text_world):
    shown = some(text_world)
    tuned = model_of(text_world, IA3(steps=4, rate=5e-2, head="nothing"), shown)
    model, backbone = plain(text_world)
    with torch.no_grad():
        for block in (0, 2):
            for name in ("key", "value"):
                dense, factors = backbone.blocks[block].get_submodule(name), tuned.backbone.model.blocks[block]
                scale = factors.get_submodule(name).ia3_l["default"]
                assert scale.shape == (32, 1) and (scale - 1).abs().max() > 0.01
                dense.weight.mul_(scale)
                dense.bias.mul_(scale[:, 0])
            scale = tuned.backbone.model.blocks[block + 1].outer.ia3_l["default"]
            assert scale.shape == (1, 64)
            backbone.blocks[block + 1].outer.weight.mul_(scale)
        torch.testing.assert_close(model(shown.inputs(0)), tuned(shown.inputs(0)))
        assert not torch.allclose(tuned(shown.inputs(0)), text_world.model(shown.inputs(0)), atol=1e-3)


def test_ia3_scales_the_channels_of_every_convolution(digits_world):
    method = IA3()
    model = method.tunable(digits_world, Fitted())
    convolutions = [m for m in digits_world.model.backbone.blocks.modules() if isinstance(m, torch.nn.Conv2d)]
    scales = [p for name, p in model.named_parameters() if ".ia3_l." in name]
    assert [s.numel() for s in scales] == [conv.out_channels for conv in convolutions]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # between PEFT's PeftModel and transformers
# PEFT hands the prefix over by a name that transformers 5.24 deprecates.
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_a_prefix_does_what_pefts_does_in_hugging_faces_model(text_world):
    from peft import PeftModelForFeatureExtraction, PrefixTuningConfig
    from transformers import BertModel

    source = envs.MINIATURES["dsa/PopquornBert-v0"]["source"]
    shown, tokens = some(text_world), 3
    tuned = model_of(text_world, Prefix(steps=3, rate=3e-2, tokens=tokens), shown, user=2)
    (prefix,) = [p.detach() for name, p in tuned.named_parameters() if name.endswith("encoder.embedding.weight")]
    config = PrefixTuningConfig(num_virtual_tokens=tokens, task_type="FEATURE_EXTRACTION")
    theirs = PeftModelForFeatureExtraction(BertModel.from_pretrained(source).eval(), config).eval()
    ids = shown.inputs(2)
    mask = ids >= 0
    assert not mask.all()
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(prefix)
        positions = torch.arange(ids.shape[1]).expand(ids.shape) - tokens  # PEFT adds as many
        hidden = theirs(ids.clamp_min(0), attention_mask=mask.long(), position_ids=positions).last_hidden_state
        expected = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        torch.testing.assert_close(tuned.backbone(ids), expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(expected, text_world.model.backbone(ids), atol=1e-3)


def test_virtual_tokens_do_not_stay_one(text_world):
    """Started alike they would get the same gradient for ever."""
    tuned = model_of(text_world, Prefix(steps=3, tokens=3), some(text_world))
    (prefix,) = [p.detach() for name, p in tuned.named_parameters() if name.endswith("encoder.embedding.weight")]
    assert prefix.shape == (3, 2 * 2 * 32)
    assert torch.cdist(prefix, prefix)[~torch.eye(3, dtype=torch.bool)].min() > 0.5


def test_a_prefix_needs_tokens_and_an_adapter_a_module(digits_world):
    assert "ResNetBackbone does not read any" in Prefix().refuses(digits_world)
    backbone = deepcopy(digits_world.model.backbone)
    backbone.blocks = torch.nn.ModuleList([torch.nn.Identity()])

    class Bare:
        model = PopulationModel(backbone, digits_world.model.weight, digits_world.model.bias)

    for name in ON_IMAGES:
        assert "no block of ResNetBackbone has a module" in make_method(name).refuses(Bare)
        assert make_method(name).refuses(digits_world) is None

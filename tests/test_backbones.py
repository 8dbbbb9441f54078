import copy
from urllib.error import URLError

import pytest
import torch
import torchvision
from conftest import SHAPE
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from backbones import make_backbone
from backbones.artefacts import ArtefactError
from backbones.base import Backbone, Hidden, PopulationModel, hash_tensors
from backbones.pretrain import Labelled, pretrain
from backbones.resnet import ResNetBackbone, SmallResNet, small_resnet, torchvision_resnet


class Normalised(Backbone):
    """A backbone that keeps a batch-norm layer and a dropout, which a careless train() would wake."""

    channel_axis = -1

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))])
        self.block_names = ("only",)
        self.feature_width = 4
        self.reference_shape = (4,)
        self.freeze()

    def stem(self, inputs):
        return Hidden(inputs)

    def block(self, index, hidden):
        return hidden.with_tensor(self.blocks[index](hidden.tensor))

    def readout(self, hidden):
        return hidden.tensor

    def pool(self, hidden):
        return hidden.tensor


@pytest.fixture(scope="module")
def resnet18_file(tmp_path_factory):
    """Official architecture, random weights, batch-norm statistics that are not 0 and 1."""
    torch.manual_seed(1)
    network = torchvision.models.resnet18(weights=None)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    file = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(network.state_dict(), file)
    return file


def test_the_small_chain_computes_what_the_trained_network_computes(trained_network, model):
    norms = [module for module in trained_network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all((norm.running_mean.abs() > 0.05).any() for norm in norms)
    images = torch.rand(16, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(images), trained_network(images), rtol=1e-5, atol=1e-5)


def test_the_chain_leaves_the_trained_network_as_it_was(trained_network):
    before = hash_tensors(trained_network.state_dict())
    small_resnet(10, trained_network.state_dict(), **SHAPE)
    assert hash_tensors(trained_network.state_dict()) == before


def test_the_resnet18_chain_computes_what_torchvision_computes(resnet18_file):
    reference = torchvision.models.resnet18(weights=None).eval()
    reference.load_state_dict(torch.load(resnet18_file, weights_only=True))
    ours = make_backbone("resnet18", weights=str(resnet18_file))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = reference(images)
        torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
    assert ours.num_classes == 1000


def test_a_chain_of_bottlenecks_computes_what_torchvision_computes():
    network = ResNet(Bottleneck, [1, 2, 1, 1], num_classes=5)
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(4, 3, 32, 32) * 2 + 1)
    network.eval()
    expected = copy.deepcopy(network)
    stem = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
    stages = [network.layer1, network.layer2, network.layer3, network.layer4]
    backbone = ResNetBackbone(stem, stages, network.fc.in_features, (3, 32, 32))
    ours = PopulationModel(backbone, network.fc.weight, network.fc.bias)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), expected(images), rtol=1e-4, atol=1e-4)
    assert [spec.skippable for spec in backbone.specs()] == [False, False, True, False, False]
    assert [spec.width for spec in backbone.specs()] == [256, 512, 512, 1024, 2048]


def test_weights_none_are_random_and_always_the_same():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    ours, again = (torchvision_resnet("resnet18", weights=None) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert ours.fingerprint() == again.fingerprint()
    torch.manual_seed(0)
    reference = torchvision.models.resnet18(weights=None).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), reference(images), rtol=1e-4, atol=1e-4)


def test_a_file_with_weights_of_another_network_is_refused(tmp_path, trained_network):
    file = tmp_path / "small.pth"
    torch.save(trained_network.state_dict(), file)
    with pytest.raises(ArtefactError, match=r"small\.pth does not hold weights of resnet18"):
        torchvision_resnet("resnet18", weights=file)


@pytest.mark.parametrize("content", [b"", b"not a state_dict"])
def test_a_file_that_holds_no_weights_is_refused(tmp_path, content):
    file = tmp_path / "junk.pth"
    file.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"junk\.pth does not hold weights of resnet18"):
        torchvision_resnet("resnet18", weights=file)


def test_a_path_without_a_file_is_named(tmp_path):
    with pytest.raises(ArtefactError, match=r"absent\.pth"):
        torchvision_resnet("resnet18", weights=tmp_path / "absent.pth")


def test_without_a_network_the_cure_is_told(monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(ArtefactError, match=r"could not be downloaded.*weights='/path/to/state_dict\.pth'"):
        torchvision_resnet("resnet18")


def test_a_damaged_download_is_refused(monkeypatch):
    def damaged(*args, **kwargs):
        raise RuntimeError('invalid hash value (expected "f37072fd", got "e3b0c442")')

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", damaged)
    with pytest.raises(ArtefactError, match="invalid hash value"):
        torchvision_resnet("resnet18")


def test_train_does_not_wake_a_frozen_backbone():
    backbone = Normalised()
    model = PopulationModel(backbone, torch.randn(3, 4), torch.randn(3))
    before = model.fingerprint()
    inputs = torch.randn(16, 4) * 3 + 1
    expected = model(inputs)
    nn.Sequential(model).train()
    backbone.train(True)
    assert not any(module.training for module in backbone.modules())
    assert torch.equal(model(inputs), expected)
    assert model.fingerprint() == before


def test_no_gradient_reaches_a_frozen_model(model):
    images = torch.rand(2, 1, 8, 8, requires_grad=True)
    model(images).sum().backward()
    assert images.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_fingerprint_knows_every_weight(trained_network, model):
    assert small_resnet(10, trained_network.state_dict(), **SHAPE).fingerprint() == model.fingerprint()
    for name in model.state_dict():
        other = copy.deepcopy(model)
        weight = other.state_dict()[name]
        weight[(0,) * weight.dim()] += 1e-3
        assert other.fingerprint() != model.fingerprint(), name


def test_hashes_tell_names_shapes_and_types_apart():
    ones = torch.ones(4)
    variants = [{"a": ones}, {"b": ones}, {"a": ones.view(2, 2)}, {"a": ones.int()}, {"a": ones.double()}, {"a": -ones}]
    assert len({hash_tensors(variant) for variant in variants}) == len(variants)
    assert hash_tensors({"a": ones, "b": -ones}) == hash_tensors({"b": -ones, "a": ones})


def test_specs_of_the_small_chain_are_as_computed_by_hand(model):
    specs = model.backbone.specs()
    assert [spec.name for spec in specs] == ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]
    assert [spec.width for spec in specs] == [8, 8, 16, 16]
    assert [spec.skippable for spec in specs] == [True, True, False, True]
    # layer1.0: two 3x3 convolutions from 8 to 8 channels at 8x8 positions, each with the folded bias.
    assert specs[0].flops == 2 * (8 * 8) * 2 * (8 * 8 * 9)
    assert specs[0].parameters == 2 * (8 * 8 * 9 + 8)
    # layer2.0: 3x3 from 8 to 16 and from 16 to 16, and a 1x1 shortcut from 8 to 16, all at 4x4 positions.
    assert specs[2].flops == 2 * (4 * 4) * (8 * 16 * 9 + 16 * 16 * 9 + 8 * 16)
    assert specs[2].parameters == (8 * 16 * 9 + 16) + (16 * 16 * 9 + 16) + (8 * 16 + 16)


@pytest.mark.parametrize("image_size", [8, 16])
def test_flops_are_counted_at_the_reference_size(image_size):
    specs = small_resnet(3, image_size=image_size, widths=(4, 6), depth=1).backbone.specs()
    assert specs[0].flops == 2 * image_size**2 * 2 * (4 * 4 * 9)


def test_specs_of_resnet18_have_unique_names_and_torchvision_widths(resnet18_file):
    specs = torchvision_resnet("resnet18", weights=resnet18_file).backbone.specs()
    assert len({spec.name for spec in specs}) == len(specs) == 8
    assert [spec.width for spec in specs] == [64, 64, 128, 128, 256, 256, 512, 512]
    assert [spec.skippable for spec in specs] == [True, True, False, True, False, True, False, True]
    assert specs[0].flops == 2 * 56**2 * 2 * (64 * 64 * 9)
    assert all(spec.flops > 0 and spec.parameters > 0 for spec in specs)


def test_pooling_is_the_mean_over_positions(model):
    hidden = model.backbone.block(0, model.backbone.stem(torch.rand(3, 1, 8, 8)))
    torch.testing.assert_close(model.backbone.pool(hidden), hidden.tensor.flatten(2).mean(2))


def test_hidden_keeps_its_context_around_another_tensor():
    hidden = Hidden(torch.zeros(2), {"mask": torch.ones(2)})
    assert hidden.with_tensor(torch.ones(2)).context is hidden.context


def test_pretraining_follows_its_seed_and_lowers_the_loss():
    torch.manual_seed(0)
    start = SmallResNet(2, widths=(4,), depth=1)
    images = torch.rand(64, 1, 8, 8)
    images[:32, :, :4] += 1
    labels = torch.arange(64) // 32
    ends = [pretrain(copy.deepcopy(start), Labelled(images, labels), epochs=20, batch_size=16, seed=s) for s in (0, 0, 1)]
    hashes = [hash_tensors(network.state_dict()) for network in ends]
    assert hashes[0] == hashes[1] != hashes[2]
    assert not ends[0].training
    losses = [nn.functional.cross_entropy(network.eval()(images), labels).item() for network in (start, ends[0])]
    assert losses[1] < 0.75 * losses[0]

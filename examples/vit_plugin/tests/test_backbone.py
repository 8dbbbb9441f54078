"""What a backbone owes to whoever puts pathways along it."""

import dsa_vit.backbone
import pytest
import torch
from dsa_vit.backbone import ViT, attend, vit_b_16
from PIL import Image
from torchvision.models import VisionTransformer, ViT_B_16_Weights

from backbones import make_backbone
from backbones.artefacts import ArtefactError
from backbones.base import Hidden, PopulationModel
from backbones.images import MEAN, STD
from backbones.pathways import make_pathways

SHAPE = {"image_size": 8, "patch_size": 4, "num_layers": 3, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
TOKENS, WIDTH, INNER = 5, 32, 64


@pytest.fixture
def network():
    """A network far from torchvision's initial zeros."""
    torch.manual_seed(0)
    network = VisionTransformer(**SHAPE, num_classes=5).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


def test_without_pathways_it_is_torchvisions_forward(network):
    """Of the frozen chain, of the population model, and of both placements with everything off."""
    images = torch.randn(6, 3, 8, 8)
    expected = network(images).detach()
    model = PopulationModel(ViT(network), network.heads.head.weight, network.heads.head.bias)
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    for placement in ("inline", "side"):
        pathways = make_pathways(placement, model, rank=4)
        frozen = pathways.frozen(images).map(lambda t: t[None])
        weights = {
            k: v[None]
            for p in range(pathways.num_pathways)
            for k, v in pathways.initial(torch.Generator().manual_seed(p), p).items()
        }
        logits = pathways.logits(frozen, weights, torch.zeros(1, pathways.num_pathways, dtype=torch.bool))
        torch.testing.assert_close(logits[0], expected, atol=1e-5, rtol=1e-5)


def test_second_derivatives_are_right(network):
    """MAML differentiates through the gradient step; ``gradgradcheck`` compares with finite differences."""
    backbone = ViT(network).double()
    tokens = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: backbone.block(0, Hidden(t)).tensor.sum(-1), tokens, fast_mode=True)


def test_attention_is_torchs(network):
    """The one layer that is computed here and not by torchvision."""
    attention, tokens = network.encoder.layers[0].self_attention, torch.randn(4, TOKENS, WIDTH)
    expected = attention(tokens, tokens, tokens, need_weights=False)[0]
    torch.testing.assert_close(attend(attention, tokens), expected, atol=1e-5, rtol=1e-5)


def test_every_multiplication_of_a_layer_is_counted(network):
    """Fused kernels are missing from the counter, and costs would be too low."""
    dense = TOKENS * (3 * WIDTH * WIDTH + WIDTH * WIDTH + 2 * WIDTH * INNER)
    for spec in ViT(network).specs():
        assert spec.flops == 2 * (dense + 2 * TOKENS * TOKENS * WIDTH)
        assert (spec.width, spec.skippable) == (WIDTH, True)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_scaled_resized_and_normalised(channels):
    """Bytes and floats of any size give the same."""
    backbone = make_backbone("vit-tiny")
    raw = torch.full((2, channels, 20, 30), 51, dtype=torch.uint8)
    prepared = backbone.prepare(raw)
    torch.testing.assert_close(prepared, ((0.2 - MEAN) / STD).expand(2, 3, 8, 8))
    torch.testing.assert_close(backbone.prepare(raw / 255), prepared)
    torch.testing.assert_close(backbone.prepare([Image.new("RGB", (30, 20), (51, 51, 51))] * 2), prepared)  # files of a table
    official = ViT_B_16_Weights.DEFAULT.transforms()
    assert MEAN.flatten().tolist() == pytest.approx(official.mean)
    assert STD.flatten().tolist() == pytest.approx(official.std)


def test_the_tiny_one_is_always_the_same():
    """Its weights are part of the fingerprints, and nobody else's random numbers are used up."""
    before = torch.get_rng_state()
    first, second = (make_backbone("vit-tiny").state_dict() for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)
    assert torch.get_rng_state().equal(before)


def test_weights_come_from_a_local_file_or_by_name(network, tmp_path, monkeypatch):
    """On a small stand-in, since the real one has 86 million parameters."""
    asked = []

    def get_model(name, weights):
        asked.append((name, weights))
        return VisionTransformer(**SHAPE, num_classes=5)

    monkeypatch.setattr(dsa_vit.backbone, "get_model", get_model)
    file = tmp_path / "vit.pth"
    torch.save(network.state_dict(), file)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(vit_b_16(str(file))(images), network(images).detach(), atol=1e-5, rtol=1e-5)
    vit_b_16()
    assert asked == [("vit_b_16", None), ("vit_b_16", "DEFAULT")]


def test_weights_that_are_unknown_or_do_not_fit_are_told_without_a_traceback(tmp_path):
    """Neither by name nor as a file."""
    with pytest.raises(ArtefactError, match="NO_SUCH is no usable file or name of weights of vit_b_16"):
        vit_b_16("NO_SUCH")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ArtefactError, match=r"other\.pth is no usable file"):
        vit_b_16(str(tmp_path / "other.pth"))

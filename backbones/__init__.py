"""Frozen models as chains of blocks, and the pathways through them."""

from collections.abc import Callable

from dynamic_sparse_adapters import check_names

check_names()

from backbones.registry import Registry  # noqa: E402

BACKBONES: "Registry[Callable]" = Registry("backbone")


def register_backbone(name: str, factory: Callable) -> None:
    """Make ``factory`` available as ``make_backbone(name, **kwargs)``.

    It returns a :class:`backbones.base.PopulationModel`, or a :class:`backbones.base.Backbone` on whose features a
    classifier is then fitted. Other distributions can register without importing us: an entry point of the group
    ``dsa.backbones``.
    """
    BACKBONES.register(name, factory)


def make_backbone(name: str, **kwargs):
    """Build what is registered as ``name``. Raises ``ValueError`` with a suggestion for unknown names."""
    return BACKBONES.get(name)(**kwargs)


def _small(num_classes: int, state=None, image_size: int = 8, **shape):
    from backbones.resnet import small_resnet

    return small_resnet(num_classes, state, image_size, **shape)


def _official(name: str) -> Callable:
    def build(weights: str | None = "DEFAULT"):
        from backbones.resnet import torchvision_resnet

        return torchvision_resnet(name, weights)

    return build


def _minilm(max_length: int = 128):
    from backbones.hub import minilm

    return minilm(max_length)


def _bert(source: str = "bert-base-uncased", max_length: int = 128):
    from backbones.hub import hf_encoder

    return hf_encoder(source, max_length)


register_backbone("resnet-small", _small)
for _name in ("resnet18", "resnet34", "resnet50"):
    register_backbone(_name, _official(_name))
register_backbone("minilm", _minilm)
register_backbone("bert", _bert)

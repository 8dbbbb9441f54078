"""Frozen models as chains of blocks, and the pathways through them."""

from collections.abc import Callable

from dynamic_sparse_adapters import check_names

check_names()

from backbones.registry import Registry  # noqa: E402

BACKBONES: "Registry[Callable]" = Registry("backbone")


def register_backbone(name: str, factory: Callable) -> None:
    """Make ``factory(**kwargs) -> PopulationModel`` available as ``make_backbone(name, **kwargs)``.

    Other distributions can register without importing us: an entry point of the group ``dsa.backbones``.
    """
    BACKBONES.register(name, factory)


def make_backbone(name: str, **kwargs):
    """Build the population model registered as ``name``. Raises ``ValueError`` with a suggestion for unknown names."""
    return BACKBONES.get(name)(**kwargs)


def _small(**kwargs):
    from backbones.resnet import small_resnet

    return small_resnet(**kwargs)


def _official(name: str) -> Callable:
    def build(**kwargs):
        from backbones.resnet import torchvision_resnet

        return torchvision_resnet(name, **kwargs)

    return build


register_backbone("resnet-small", _small)
for _name in ("resnet18", "resnet34", "resnet50"):
    register_backbone(_name, _official(_name))

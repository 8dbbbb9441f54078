"""Every way of personalising by name. To add one: a file with a :class:`eval.methods.base.Method`, and a line here.

Other distributions add theirs by an entry point of the group ``dsa.methods``, whose value is the class.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from backbones.registry import Registry, did_you_mean
from eval.methods.base import Method

METHODS: Registry[str | type[Method]] = Registry("method")
"""Names to ``"module:Class"``, imported when first asked for."""


def _register(module: str, **classes: str) -> None:
    for name, kind in classes.items():
        METHODS.register(name, f"eval.methods.{module}:{kind}")


_register("unchanged", base="Base")
_register("finetune", full_finetune="FullFineTuning")
_register("pathway", all_on="AllOn")


def method_class(name: str) -> type[Method]:
    """The class behind a name.

    Raises:
        ValueError: for an unknown name, with a suggestion.
        ModuleNotFoundError: for a method that needs a distribution which is not installed, with the cure.
    """
    kind = METHODS.get(name)
    if isinstance(kind, str):
        module, _, attribute = kind.partition(":")
        kind = getattr(import_module(module), attribute)
    assert not isinstance(kind, str)
    for distribution in kind.needs:
        if find_spec(distribution) is None:
            raise ModuleNotFoundError(
                f"the method {name!r} needs {distribution}: pip install 'dynamic-sparse-adapters[eval]', or leave it out "
                "with --methods."
            )
    return kind


def make_method(name: str, **settings: Any) -> Method:
    """A method with some hyperparameters changed. Raises ``ValueError`` for a hyperparameter that it does not have."""
    kind = method_class(name)
    known = kind.__dataclass_fields__  # type: ignore[attr-defined]
    for setting in settings:
        if setting not in known:
            raise ValueError(f"method {name!r} has no hyperparameter {setting!r}. {did_you_mean(setting, known)}")
    return kind(**settings)

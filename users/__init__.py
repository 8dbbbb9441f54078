"""Who is personalised: populations of users, simulated and real, and what is known of a user from the support set."""

from collections.abc import Callable
from importlib import import_module

from dynamic_sparse_adapters import check_names

check_names()

from backbones.registry import Registry  # noqa: E402

POPULATIONS: "Registry[str | Callable]" = Registry("population")
"""Names to ``"module:function"``, imported when first asked for, or to functions ``(seed=..., **kwargs) -> Population``."""


def register_population(name: str, factory: "str | Callable") -> None:
    """Make ``factory(**kwargs) -> Population`` available by name; a string ``"module:function"`` is imported when needed.

    Other distributions can register without importing us: an entry point of the group ``dsa.populations``.
    """
    POPULATIONS.register(name, factory)


def population_factory(name: str) -> Callable:
    """The function behind a name. Raises ``ValueError`` with a suggestion for unknown names."""
    found = POPULATIONS.get(name)
    if isinstance(found, str):
        module, function = found.split(":")
        return getattr(import_module(module), function)
    return found


for _name in ("digits", "unipen", "popquorn", "jester", "lamp", "table"):
    register_population(_name, f"users.{_name}:{_name}{'_population' if _name == 'digits' else ''}")

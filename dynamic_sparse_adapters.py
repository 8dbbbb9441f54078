"""The distribution's version, and the check that our top-level names are ours.

The packages have short names (``agents``, ``envs``, ...) that another distribution, or a folder in the working
directory, may use as well. Every package calls :func:`check_names` when it is imported, so that such a collision is
reported by name instead of as a puzzling ``ImportError`` somewhere below.
"""

from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"
PACKAGES = ("backbones", "users", "meta", "envs", "agents", "serving", "eval")


def check_names(packages: tuple[str, ...] = PACKAGES, home: Path | None = None) -> None:
    """Raise ``ImportError`` if Python would find one of our packages somewhere else than beside this file.

    Nothing is imported by the check.
    """
    home = home or Path(__file__).resolve().parent
    for name in packages:
        spec = find_spec(name)
        found = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if found != home / name:
            raise ImportError(
                f"the top-level package `{name}` of dynamic-sparse-adapters ({home / name}) is hidden by another one "
                f"({found or 'without an __init__.py'}). Uninstall the distribution that brings it, rename that "
                "folder, or install dynamic-sparse-adapters into a virtual environment of its own."
            )

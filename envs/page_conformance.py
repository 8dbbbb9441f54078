"""What the page of every environment must tell, and how the conformance suite makes an environment. Needs pytest."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium as gym
import pytest

from envs.registration import MINIATURES, known_spec
from envs.scenario import builder_of
from envs.single import PathwaySelectionEnv

HEADINGS = [
    "## Description",
    "## Observation space",
    "## Action space",
    "## Rewards",
    "## Starting state",
    "## Episode end",
    "## Arguments",
    "## Versions",
]
ARGUMENT = re.compile(r"^    (\w+(?:, \w+)*): ", re.MULTILINE)
DEFAULT = re.compile(r"(``\w+``) \((``.*?``|[^\s,;)]+)(?=[);,])")
WHAT_IT_IS = ("scenario", "users", "backbone", "layerwise")
"""What an id is registered with that its name and its page's first lines tell."""
REFERENCE = re.compile(r":(?:class|func):`~?([\w.]+)\.(\w+)`")


class PageConformance:
    """The part of :class:`envs.conformance.EnvConformance` that reads docstrings; no page needs to repeat another.

    Attributes:
        env_id, kwargs: see there.
    """

    env_id: str
    kwargs: ClassVar[Mapping[str, Any] | None] = None

    @pytest.fixture(autouse=True)
    def _users_cache_stays_as_it_is(self, monkeypatch, tmp_path_factory):
        if "DSA_CACHE" not in os.environ:
            monkeypatch.setenv("DSA_CACHE", str(tmp_path_factory.getbasetemp() / "dsa-cache"))

    def small(self) -> dict[str, Any]:
        """Arguments that make the environment small."""
        return dict(MINIATURES[known_spec(self.env_id).id] if self.kwargs is None else self.kwargs)

    def make(self, **kwargs: Any) -> Any:
        """The environment, in small."""
        return gym.make(self.env_id, **{**self.small(), **kwargs})

    def make_vector(self, **kwargs: Any) -> Any:
        """Three of them at a time."""
        return gym.make_vec(self.env_id, num_envs=3, vectorization_mode="vector_entry_point", **{**self.small(), **kwargs})

    def two_rounds(self) -> int:
        """2, or 1 where the page refuses more."""
        return 2 if self.make().unwrapped.several_rounds else 1

    def test_the_docstring_has_the_fixed_headings_in_order(self):
        """Pages are read side by side."""
        lines = [line.strip() for line in self._page().splitlines()]
        assert [line for line in lines if line.startswith("## ")] == HEADINGS

    def test_the_docstring_mentions_every_constructor_argument(self):
        """By name, or by a reference under Arguments to a class or function that documents it."""
        told = _with_references(_arguments_of(self._page()))
        missing = sorted(name for name in self._arguments() if f"``{name}``" not in told)
        assert not missing, f"{type(self.make().unwrapped).__name__}'s docstring lacks ``{'``, ``'.join(missing)}``."

    def test_the_docstring_tells_the_defaults_of_this_id(self):
        """They are other than what a page that it refers to says. A page for any population is no id's own."""
        if self._is_for_any_population():
            return
        told = " ".join(_with_references(_arguments_of(self._page())).split())
        own = {name: value for name, value in known_spec(self.env_id).kwargs.items() if name not in WHAT_IT_IS}
        values = {name: f'"{value}"' if isinstance(value, str) else str(value) for name, value in own.items()}
        missing = [f"``{n}`` ({v})" for n, v in values.items() if not {f"``{n}`` ({v})", f"``{n}`` (``{v}``)"} & _said(told)]
        assert not missing, f"{type(self.make().unwrapped).__name__}'s docstring lacks {', '.join(missing)}."

    def test_the_docstring_mentions_every_key_of_info(self):
        """A page for any population cannot know the facts about its users."""
        env = self.make()
        _, before = env.reset(seed=0)
        facts = {*before} - {"user"} if self._is_for_any_population() else set()
        over = False
        while not over:
            _, _, over, _, info = env.step(env.action_space.sample())
        missing = [key for key in info if f"``{key}``" not in self._page() and key not in facts]
        assert not missing, f"{type(env.unwrapped).__name__}'s docstring lacks ``{'``, ``'.join(missing)}``."

    def test_importing_envs_registers_the_id_without_importing_torch(self):
        """Listing ids is instant; a distribution's own are registered by its entry point of the group ``dsa.envs``."""
        code = f"import sys, envs; envs.known_spec({self.env_id!r}); assert 'torch' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def _page(self) -> str:
        return inspect.getdoc(type(self.make().unwrapped)) or ""

    def _is_for_any_population(self) -> bool:
        """Whether the page offers the choice of population and backbone, whose own arguments and facts vary."""
        return "``backbone``" in self._page()

    def _arguments(self) -> set[str]:
        """What ``gym.make(env_id, ...)`` takes: arguments of the shell, of the scenario's builder, of what that calls."""
        spec = known_spec(self.env_id)
        builder = builder_of(spec.kwargs["scenario"])
        names = {*inspect.signature(PathwaySelectionEnv.__init__).parameters, *inspect.signature(builder).parameters}
        if hasattr(builder, "further_arguments") and not self._is_for_any_population():
            names |= builder.further_arguments({**spec.kwargs, **self.small()})
        return names - {"self", "scenario", "scenario_kwargs", "more"}


def _with_references(text: str, known: tuple[tuple[str, str], ...] = ()) -> str:
    """A text on arguments, and whatever it and these refer to."""
    names = [name for name in dict.fromkeys(REFERENCE.findall(text)) if name not in known]
    return text + "".join(_with_references(_documentation(*name), (*known, *names)) for name in names)


def _said(text: str) -> set[str]:
    """Every "name (default)" in a text."""
    return {f"{name} ({value})" for name, value in DEFAULT.findall(text)}


def _documentation(module: str, name: str) -> str:
    """What a class or function tells of its arguments, in the pages' form."""
    thing = getattr(importlib.import_module(module), name)
    if not inspect.isclass(thing):
        return " ".join(f"``{argument}``" for argument in inspect.signature(thing).parameters)
    page = inspect.getdoc(thing) or ""
    listed = ", ".join(ARGUMENT.findall(page)).split(", ")
    return _arguments_of(page) + " ".join(f"``{argument}``" for argument in listed)


def _arguments_of(page: str) -> str:
    """What stands under Arguments, or everything where there is no such heading."""
    return page.split("## Arguments")[-1].split("\n## ")[0]

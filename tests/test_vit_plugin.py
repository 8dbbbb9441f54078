"""The example of a plug-in, installed as its readers would, passes its own tests and does what its README says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dynamic_sparse_adapters

ROOT = Path(dynamic_sparse_adapters.__file__).resolve().parent
PLUGIN = ROOT / "examples" / "vit_plugin"
PAGE = (PLUGIN / "README.md").read_text()
PROSE = re.sub(r"```.*?```", "", PAGE, flags=re.S)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the package installed, entry points and all, and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    alone = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--target", str(folder))
    done = python("-m", "pip", "install", "--quiet", *alone, str(PLUGIN), site=folder)
    assert done.returncode == 0, done.stderr
    return folder


def python(*arguments, site):
    """Run Python away from the checkout, with our packages and those of ``site`` on its path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(site)))}
    return subprocess.run([sys.executable, *arguments], cwd=site, env=environment, capture_output=True, text=True)


def test_its_own_tests_pass(site):
    done = python("-m", "pytest", "-p", "no:cacheprovider", str(PLUGIN), site=site)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_the_python_in_its_readme_runs_and_prints_what_it_says(site):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (promised,) = re.findall(r"print\(.*?\)  # (.*)", code)
    done = python("-W", "error", "-c", code, site=site)
    assert done.stdout.strip() == promised, done.stderr


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", PROSE))
def test_the_links_of_its_readme_lead_somewhere(link):
    assert (PLUGIN / link).exists()

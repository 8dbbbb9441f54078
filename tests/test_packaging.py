import os
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest

import dynamic_sparse_adapters
from dynamic_sparse_adapters import PACKAGES, check_names

ROOT = Path(dynamic_sparse_adapters.__file__).resolve().parent


def python(*arguments, cwd):
    """Run Python in a folder, with our packages behind that folder on its path."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def package(folder, name):
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").touch()


REGISTERED = """
import sys
import gymnasium
assert {"dsa/Planted-v0", "dsa/DigitsResNet-v0"} <= set(gymnasium.registry)
heavy = {"torch", "torchvision", "sklearn", "stable_baselines3"} & set(sys.modules)
assert not heavy, heavy
"""


def test_importing_envs_registers_the_ids_without_torch(tmp_path):
    done = python("-c", "import envs" + REGISTERED, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_entry_point_registers_the_ids_without_torch_as_often_as_it_is_called(tmp_path):
    code = "from envs.registration import register_all; register_all(); register_all()" + REGISTERED
    done = python("-W", "error", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_gymnasiums_entry_point_is_ours():
    ours = [point for point in entry_points(group="gymnasium.envs") if point.value.startswith("envs.")]
    if not ours:
        pytest.skip("dynamic-sparse-adapters is on the path but not installed")
    assert {(point.name, point.value) for point in ours} == {("__root__", "envs.registration:register_all")}
    assert callable(ours[0].load())


@pytest.mark.parametrize("name", PACKAGES)
def test_every_package_can_be_imported_on_its_own(tmp_path, name):
    done = python("-c", f"import {name}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("imported", ["envs", "backbones"])
def test_a_foreign_agents_folder_is_reported_by_name_and_place(tmp_path, imported):
    package(tmp_path, "agents")
    done = python("-c", f"import {imported}", cwd=tmp_path)
    assert done.returncode != 0
    assert "ImportError: the top-level package `agents`" in done.stderr
    assert str(tmp_path / "agents") in done.stderr


def test_a_foreign_module_is_reported_too(tmp_path):
    (tmp_path / "users.py").touch()
    done = python("-c", "import envs", cwd=tmp_path)
    assert done.returncode != 0
    assert "ImportError: the top-level package `users`" in done.stderr


def test_a_folder_that_is_no_package_hides_nothing(tmp_path):
    for name in PACKAGES:
        (tmp_path / name).mkdir()
    done = python("-c", "import envs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_our_own_packages_pass_the_check():
    check_names()


def test_the_check_imports_nothing_and_sees_where_a_package_is(tmp_path, monkeypatch):
    package(tmp_path / "ours", "zebra_one")
    package(tmp_path / "theirs", "zebra_one")
    monkeypatch.syspath_prepend(tmp_path / "ours")
    check_names(("zebra_one",), home=tmp_path / "ours")
    monkeypatch.syspath_prepend(tmp_path / "theirs")
    with pytest.raises(ImportError, match=r"`zebra_one`.*is hidden by another one") as error:
        check_names(("zebra_one",), home=tmp_path / "ours")
    assert str(tmp_path / "theirs" / "zebra_one") in str(error.value)
    assert "zebra_one" not in sys.modules


def test_a_package_that_is_missing_is_reported(tmp_path):
    with pytest.raises(ImportError, match=r"`zebra_two`.*without an __init__\.py"):
        check_names(("zebra_two",), home=tmp_path)


def test_the_wheel_holds_the_packages_and_the_hyperparameters_but_no_tests(tmp_path):
    if find_spec("build") is None or find_spec("hatchling") is None:
        pytest.skip("needs the modules build and hatchling")
    done = python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert dynamic_sparse_adapters.__version__ in wheel.name
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
        points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert {f"{name}/__init__.py" for name in PACKAGES} <= names
    settings = {"agents/hyperparameters/ppo.yml", "eval/hyperparameters/methods.yml"}
    assert settings | {"dynamic_sparse_adapters.py", "backbones/pathways.py"} <= names
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {*PACKAGES, "dynamic_sparse_adapters.py"}
    assert not [name for name in names if "__pycache__" in name]
    assert "envs.registration:register_all" in points

"""A disk that is full: what was there stays whole, the message names file, cause and cure, and going on ends the same.

The limit on file sizes (RLIMIT_FSIZE) is the kernel's own: a write beyond it fails as one to a full disk does.
"""

import errno
import os
import pickle
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from agents import evaluate, train_ppo
from agents.callbacks import BestOnVal
from backbones.artefacts import DiskFullError, load_artefact, save_artefact, write_atomically
from envs import tabulate
from envs.tables import PathwayTable

QUIET = ["--no-progress", "--num-threads", "1"]
SMALL = ["-P", "policy_kwargs:{hidden: 8}", "-P", "search:false", "-P", "n_epochs:2"]
RUN = ["--env", "dsa/Planted-v0", "-n", "2048", "--eval-freq", "512", *SMALL]
TABLE = ["--env", "dsa/Planted-v0", "--env-kwargs", "users:64", "--processes", "1"]


@contextmanager
def room(size):
    """Files of at most so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def content(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(main, *arguments):
    """The message with which a command ends."""
    with pytest.raises(SystemExit) as exit_:
        main([*map(str, arguments)])
    message = str(exit_.value.code)
    assert message.startswith("error: ") and "\n" not in message
    return message


def assert_told(message, file):
    """What the user must know."""
    assert f"{file} could not be written: the disk or the quota is full (" in message
    for cure in ("Free some space", "--out", "--log-dir", "$DSA_CACHE", "What was there before is untouched."):
        assert cure in message


# Files.


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize(("module", "call"), [(os, "fsync"), (os, "replace"), (os, "open"), (Path, "mkdir")])
def test_whatever_finds_no_room_is_told_by_the_name_of_the_file(tmp_path, monkeypatch, number, module, call):
    file = tmp_path / "note"
    write_atomically(file, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(module, call, lambda *args, **kwargs: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
        with pytest.raises(DiskFullError) as error:
            write_atomically(file, b"new")
    assert_told(str(error.value), file)
    assert f"({os.strerror(number)})" in str(error.value)
    assert content(tmp_path) == {Path("note"): b"old"}


def test_another_error_is_not_put_down_to_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(OSError, match="I/O error") as error:
        write_atomically(tmp_path / "note", b"new")
    assert not isinstance(error.value, DiskFullError)


@pytest.mark.parametrize("size", [50, 200], ids=["no room for the tensors", "no room for the JSON"])
def test_an_artefact_that_finds_no_room_leaves_the_one_before_and_nothing_else(tmp_path, size):
    save_artefact(tmp_path / "thing", "toy", {"w": torch.ones(2)}, {})
    before = content(tmp_path)
    with room(size), pytest.raises(DiskFullError) as error:
        save_artefact(tmp_path / "thing", "toy", {"w": torch.zeros(2)}, {"long": "x" * 200})
    assert str(tmp_path / "thing") in str(error.value)
    assert content(tmp_path) == before
    assert load_artefact(tmp_path / "thing", "toy")[0]["w"].tolist() == [1, 1]


def test_saving_the_same_tensors_without_room_for_the_json_keeps_them(tmp_path):
    save_artefact(tmp_path / "thing", "toy", {"w": torch.ones(2)}, {})
    before = content(tmp_path)
    with room(200), pytest.raises(DiskFullError):
        save_artefact(tmp_path / "thing", "toy", {"w": torch.ones(2)}, {"long": "x" * 200})
    assert content(tmp_path) == before


def test_the_error_comes_whole_from_a_worker_process():
    error = pickle.loads(pickle.dumps(DiskFullError("t.json could not be written")))
    assert (type(error), str(error)) == (DiskFullError, "t.json could not be written")


# Training.


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with room."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train_ppo.main([*RUN, "-f", str(folder), *QUIET])
    return folder


def tensors(folder):
    """Names, which hold hashes of the content."""
    return sorted(file.name for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("at", [0, 1024, 2048])
def test_a_run_on_a_full_disk_keeps_its_last_checkpoint_and_goes_on_to_the_same_end(whole, tmp_path, monkeypatch, at):
    folder, save, before = tmp_path / "run", BestOnVal.save, {}

    def without_room(self):
        if self.num_timesteps < at:
            return save(self)
        before.update(content(folder))
        with room(20_000):
            save(self)

    with monkeypatch.context() as patch:
        patch.setattr(BestOnVal, "save", without_room)
        message = refused(train_ppo.main, *RUN, "-f", folder, *QUIET)
    assert_told(message, next(word for word in message.split() if "checkpoint-" in word))
    assert message.endswith(f" Go on with --resume {folder}")
    assert content(folder) == before
    assert (folder / "checkpoint.json").exists() == (at > 0)
    train_ppo.main(["--resume", str(folder), *QUIET])
    assert tensors(folder) == tensors(whole)


def test_no_room_for_the_settings_leaves_the_folder_to_the_same_command(tmp_path):
    folder = tmp_path / "run"
    with room(100):
        message = refused(train_ppo.main, *RUN, "-f", folder, *QUIET)
    assert_told(message, folder / "config.json")
    assert "--resume" not in message
    assert list(folder.iterdir()) == []


def test_no_room_for_the_curves_is_told_once_and_by_name(tmp_path, whole, capfd):
    folder = tmp_path / "run"
    with room(40_000):  # enough for a checkpoint
        message = refused(train_ppo.main, *RUN, "-n", "8192", "--eval-freq", "256", "-f", folder, *QUIET)
    assert_told(message, folder / "tensorboard")
    assert "Traceback" not in "".join(capfd.readouterr())
    assert load_artefact(folder / "checkpoint", "training checkpoint")[1]["num_timesteps"] > 0


def test_no_room_for_a_report_leaves_the_one_before(whole):
    before = content(whole)
    with room(1000):
        message = refused(evaluate.main, whole, "--num-threads", "1")
    assert_told(message, whole / "summary.json")
    changed = [file.name for file, data in content(whole).items() if before.get(file) != data]
    assert changed in ([], ["seconds.json"])
    assert {*content(whole)} == {*before}


# Tabulation.


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table's files, by name without the table's own."""
    folder = tmp_path_factory.mktemp("tables")
    tabulate.main([*TABLE, "--out", str(folder / "whole")])
    return {name.name.removeprefix("whole"): data for name, data in content(folder).items()}


@pytest.mark.parametrize(("size", "file"), [(300, "t-unfinished/content.json"), (900, "t-unfinished/train-"), (20_000, "t-")])
def test_a_table_that_finds_no_room_is_the_same_when_there_is_some(table, tmp_path, size, file):
    with room(size):
        message = refused(tabulate.main, *TABLE, "--out", tmp_path / "t")
    assert_told(message, next(word for word in message.split() if str(tmp_path / file) in word))
    assert message.endswith(" What is finished is kept: then give the same command again.")
    assert not [name for name in content(tmp_path) if name.name.startswith((".", "t.", "t-0"))]
    tabulate.main([*TABLE, "--out", str(tmp_path / "t")])
    assert {name.name.removeprefix("t"): data for name, data in content(tmp_path).items()} == table


def test_a_table_that_cannot_be_replaced_stays(tmp_path):
    tabulate.main([*TABLE, "--out", str(tmp_path / "t"), "--masks", "20"])
    before = content(tmp_path)
    with room(20_000):
        refused(tabulate.main, *TABLE, "--out", tmp_path / "t", "--overwrite")
    assert {name: data for name, data in content(tmp_path).items() if name.parent == Path()} == before
    assert len(PathwayTable.load(tmp_path / "t").masks) == 20


# Tuning.


def test_a_line_that_a_full_disk_tore_is_dropped_from_the_file_of_trials(tmp_path):
    search = pytest.importorskip("agents.search", reason="needs the extra `tune`")
    path = tmp_path / "best.trials"
    search.open_study(path, {"env": "one"})
    before = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"op_code": 4, "wor')
    search.open_study(path, {"env": "one"})
    assert path.read_bytes().startswith(before)
    assert b'"wor{' not in path.read_bytes()
    with pytest.raises(ValueError, match="another env"):
        search.open_study(path, {"env": "other"})

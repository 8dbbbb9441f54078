import json
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from threading import Event

import pytest
import torch

from backbones import artefacts
from backbones.artefacts import (
    ArtefactError,
    cache_key,
    cache_root,
    exists,
    load_artefact,
    load_or_make,
    save_artefact,
    write_atomically,
)

TENSORS = {
    "weight": torch.arange(12.0).view(3, 4),
    "turned": torch.arange(6).view(2, 3).T,
    "mask": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 5),
}
META = {"step": 3, "names": ["a", "b"], "rate": 0.1, "none": None, "umlaut": "ä"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "thing"


@pytest.fixture
def saved(path):
    save_artefact(path, "toy", TENSORS, META)
    return path


def json_file(path):
    return path.parent / "thing.json"


def tensor_file(path):
    (found,) = path.parent.glob("*.safetensors")
    return found


def remake():
    raise AssertionError("a damaged artefact was made again")


def assert_refused(path, culprit):
    """Neither way to load it works, the error names the file, and nothing was removed or made again."""
    before = sorted(path.parent.iterdir())
    for load in (lambda: load_artefact(path, "toy"), lambda: load_or_make(path, "toy", remake)):
        with pytest.raises(ArtefactError, match=re.escape(str(culprit))):
            load()
    assert sorted(path.parent.iterdir()) == before


def forge(path, **changes):
    """Rewrite the JSON with other content and a checksum that fits it."""
    body = json.loads(json_file(path).read_text()) | changes
    body.pop("self_sha256")
    body["self_sha256"] = artefacts._digest(body)
    json_file(path).write_text(json.dumps(body))


def test_tensors_and_meta_come_back_as_they_were(saved):
    tensors, meta = load_artefact(saved, "toy")
    assert meta == META
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        assert torch.equal(tensors[name], tensor)


def test_meta_with_number_keys_can_be_loaded_again(path):
    save_artefact(path, "toy", {}, {"scores": {2: "b", 10: "j"}})
    assert load_artefact(path, "toy")[1]["scores"] == {"2": "b", "10": "j"}


def test_tensors_that_need_gradients_can_be_saved(path):
    save_artefact(path, "toy", {"w": torch.ones(2, requires_grad=True) * 3}, {})
    assert load_artefact(path, "toy")[0]["w"].tolist() == [3, 3]


def test_a_missing_artefact_is_reported_by_kind_and_file(path):
    assert not exists(path)
    with pytest.raises(ArtefactError, match=f"no toy at {re.escape(str(json_file(path)))}"):
        load_artefact(path, "toy")


@pytest.mark.parametrize("kept", [0, 1, 7, -1])
def test_a_truncated_tensor_file_is_refused(saved, kept):
    file = tensor_file(saved)
    file.write_bytes(file.read_bytes()[:kept])
    assert_refused(saved, file)


@pytest.mark.parametrize("where", [0, 20, -1])
def test_one_flipped_byte_in_the_tensor_file_is_refused(saved, where):
    file = tensor_file(saved)
    data = bytearray(file.read_bytes())
    data[where] ^= 1
    file.write_bytes(data)
    assert_refused(saved, file)


def test_a_missing_tensor_file_is_refused(saved):
    file = tensor_file(saved)
    file.unlink()
    assert_refused(saved, file)


def test_altered_meta_is_refused(saved):
    file = json_file(saved)
    file.write_text(file.read_text().replace('"step": 3', '"step": 4'))
    assert_refused(saved, file)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"null", b"3", b"[]", b'"text"', b"\xff\xfe\x00"])
def test_what_is_not_our_json_is_refused(saved, content):
    json_file(saved).write_bytes(content)
    assert_refused(saved, json_file(saved))


@pytest.mark.parametrize("kept", [10, 100, -1])
def test_a_truncated_json_is_refused(saved, kept):
    json_file(saved).write_bytes(json_file(saved).read_bytes()[:kept])
    assert_refused(saved, json_file(saved))


def test_another_kind_is_refused(saved):
    with pytest.raises(ArtefactError, match=f"{re.escape(str(json_file(saved)))} holds a toy, not a tool"):
        load_artefact(saved, "tool")
    with pytest.raises(ArtefactError, match="holds a toy, not a tool"):
        load_or_make(saved, "tool", remake)


def test_another_format_version_is_refused(saved):
    forge(saved)
    load_artefact(saved, "toy")  # the forgery itself is good: what is refused below is the version
    forge(saved, format=artefacts.FORMAT + 1)
    assert_refused(saved, json_file(saved))


def test_saving_again_replaces_and_leaves_no_other_file(saved):
    save_artefact(saved, "toy", {"weight": torch.zeros(2)}, {"step": 4})
    tensors, meta = load_artefact(saved, "toy")
    assert meta == {"step": 4}
    assert torch.equal(tensors["weight"], torch.zeros(2))
    assert sorted(saved.parent.iterdir()) == sorted([json_file(saved), tensor_file(saved)])


def test_saving_the_same_again_keeps_it_whole(saved):
    save_artefact(saved, "toy", TENSORS, META)
    assert load_artefact(saved, "toy")[1] == META


def test_artefacts_with_names_that_begin_alike_leave_each_other_alone(path):
    names = ("thing", "thing-a", "thing-0123456789ab", "thing-", "thin")
    for _ in range(2):
        for number, name in enumerate(names):
            save_artefact(path.with_name(name), "toy", {"w": torch.full((3,), number)}, {})
    for number, name in enumerate(names):
        assert torch.equal(load_artefact(path.with_name(name), "toy")[0]["w"], torch.full((3,), number))


@pytest.mark.parametrize("killed_at", [1, 2])
def test_a_kill_between_the_writes_leaves_the_old_artefact(saved, monkeypatch, killed_at):
    calls = []
    replace = os.replace

    def dies(*paths):
        calls.append(paths)
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            save_artefact(saved, "toy", {"weight": torch.zeros(2)}, {"step": 4})
    assert len(calls) == killed_at
    tensors, meta = load_artefact(saved, "toy")
    assert meta == META
    assert torch.equal(tensors["weight"], TENSORS["weight"])
    assert not list(saved.parent.glob(".*"))
    for left in saved.parent.glob("*.safetensors"):
        os.utime(left, (0, 0))
    save_artefact(saved, "toy", {"weight": torch.ones(2)}, {"step": 5})
    assert load_artefact(saved, "toy")[1] == {"step": 5}
    assert sorted(saved.parent.iterdir()) == sorted([json_file(saved), tensor_file(saved)])


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    file = tmp_path / "note"
    write_atomically(file, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_files_have_the_permissions_of_others_that_are_made_here_and_keep_those_they_have(tmp_path):
    usual, file = tmp_path / "usual", tmp_path / "note"
    usual.touch()
    write_atomically(file, b"new")
    assert file.stat().st_mode == usual.stat().st_mode
    file.chmod(0o640)
    write_atomically(file, b"newer")
    assert file.stat().st_mode & 0o777 == 0o640
    write_atomically(tmp_path / "secret", b"", mode=0o600)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


def test_saving_is_deterministic_to_the_byte(saved, tmp_path):
    other = tmp_path / "elsewhere" / "thing"
    save_artefact(other, "toy", TENSORS, META)
    contents = [{file.name: file.read_bytes() for file in p.parent.iterdir()} for p in (saved, other)]
    assert contents[0] == contents[1]


def test_load_or_make_makes_once(path):
    made = []

    def make():
        made.append(1)
        return {"w": torch.ones(2)}, {"by": "make"}

    for _ in range(2):
        tensors, meta = load_or_make(path, "toy", make)
        assert meta == {"by": "make"}
        assert torch.equal(tensors["w"], torch.ones(2))
    assert made == [1]


def test_the_cache_is_where_the_environment_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("DSA_CACHE", str(tmp_path / "here"))
    assert cache_root() == tmp_path / "here"
    monkeypatch.delenv("DSA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "dynamic-sparse-adapters"


def test_a_cache_key_depends_on_the_facts_and_not_on_their_order():
    assert cache_key(a=1, b="x") == cache_key(b="x", a=1)
    assert len({cache_key(a=1), cache_key(a=2), cache_key(b=1), cache_key(a="1"), cache_key()}) == 5


def test_a_file_that_another_process_has_just_written_is_left_alone(saved):
    other = saved.parent / "thing-0123456789ab.safetensors"
    other.write_bytes(b"being committed")
    save_artefact(saved, "toy", {"weight": torch.ones(2)}, {"step": 5})
    assert other.exists()


def test_of_programs_that_want_it_together_one_makes_it(path, caplog):
    begun, go_on = Event(), Event()

    def make():
        begun.set()
        assert go_on.wait(30)
        return TENSORS, META

    with caplog.at_level(logging.INFO, "dsa"), ThreadPoolExecutor(2) as pool:
        first = pool.submit(load_or_make, path, "toy", make)
        assert begun.wait(30)
        second = pool.submit(load_or_make, path, "toy", remake)
        with pytest.raises(FutureTimeout):
            second.result(0.5)
        go_on.set()
        assert first.result(30)[1] == second.result(30)[1] == META
    assert f"another program is making the toy {path}; waiting for it" in caplog.text


def test_the_next_one_makes_what_could_not_be_made(path):
    def diverge():
        raise FloatingPointError("the loss is NaN")

    with pytest.raises(FloatingPointError):
        load_or_make(path, "toy", diverge)
    assert load_or_make(path, "toy", lambda: (TENSORS, META))[1] == META

"""The store: bytes in, the same bytes out, whatever happens in between."""

import multiprocessing
import os
import signal
import sqlite3
import threading
import time

import numpy as np
import pytest

from serving.store import (
    LONGEST_ID,
    DamagedRecordError,
    ForeignStoreError,
    StoreBusyError,
    StoreFullError,
    UnknownUserError,
    UserStore,
)

IDENTITY = {"model": "abc", "rank": "4"}


def record(user, version=0, size=4000):
    """Bytes that tell whose and which they are, everywhere."""
    return (f"{user}/{version}/".encode() * size)[:size]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "users.db"


def test_records_come_back_and_can_be_overwritten(path):
    with UserStore(path, IDENTITY) as store:
        store.put({"ann": b"1", "bob": b"2"})
        store.put({"ann": b"3"})
        assert (store.get("ann"), store.get("bob"), len(store), [*store]) == (b"3", b"2", 2, ["ann", "bob"])
        assert "ann" in store and "eve" not in store
    with UserStore(path, IDENTITY) as store:
        assert store.get("ann") == b"3"


def test_a_closed_store_says_so_and_can_be_closed_again(path):
    store = UserStore(path, IDENTITY)
    store.put({"ann": b"1"})
    store.close()
    store.close()
    for ask in (lambda: store.get("ann"), lambda: store.put({"ann": b"2"}), lambda: store.forget(["ann"]), store.changed):
        with pytest.raises(ValueError, match=r"users\.db has been closed; open it anew"):
            ask()
    with UserStore(path, IDENTITY) as store:
        assert store.get("ann") == b"1"


@pytest.mark.parametrize("user", ["../../etc/passwd", "'; DROP TABLE users; --", "ü 漢\n\x00", "x" * LONGEST_ID, "%", "CON"])
def test_ids_are_data(path, user):
    with UserStore(path, IDENTITY) as store:
        store.put({user: b"mine", "other": b"theirs"})
        assert store.get(user) == b"mine" and store.get("other") == b"theirs"
        assert store.forget([user]) == 1 and [*store] == ["other"]
    assert {each.name for each in path.parent.iterdir()} == {"users.db"}


@pytest.mark.parametrize(
    ("user", "said"), [(7, "give str"), ("", "1 to 256"), ("x" * 257, "1 to 256"), ("\ud800", "no valid Unicode")]
)
def test_ids_that_are_none_are_refused(path, user, said):
    with UserStore(path, IDENTITY) as store:
        for ask in (store.get, lambda user: store.put({"fine": b"", user: b""}), lambda user: store.forget([user])):
            with pytest.raises(ValueError, match=said):
                ask(user)
        assert len(store) == 0


def test_who_is_not_there_is_named(path):
    with UserStore(path, IDENTITY) as store, pytest.raises(UnknownUserError, match="user 'eve' is not enrolled; enrol them"):
        store.get("eve")


def test_a_store_of_another_model_is_refused_by_name_and_left_alone(path):
    with UserStore(path, IDENTITY) as store:
        store.put({"ann": b"1"})
    with pytest.raises(ForeignStoreError, match=r"model is abc there and xyz here; rank is 4 there and 8 here\. Serve them"):
        UserStore(path, {"model": "xyz", "rank": "8"})
    with UserStore(path, IDENTITY) as store:
        assert store.get("ann") == b"1"


def test_other_files_are_refused_and_left_alone(path):
    path.write_bytes(b"a letter to my grandmother" * 100)
    with pytest.raises(ForeignStoreError, match="no store of users"):
        UserStore(path, IDENTITY)
    assert path.read_bytes() == b"a letter to my grandmother" * 100
    path.unlink()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE recipes (name TEXT)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(ForeignStoreError, match="another program's database"):
        UserStore(path, IDENTITY)
    assert path.read_bytes() == before
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        UserStore(path.parent / "nowhere" / "users.db", IDENTITY)


def test_every_flipped_byte_of_a_record_is_noticed(path):
    content = record("ann", size=60)
    with UserStore(path, IDENTITY) as store:
        store.put({"ann": content, "bob": record("bob", size=60)})
    whole = path.read_bytes()
    start = whole.index(content)
    for place in range(start, start + len(content) + 16):  # the digest lies behind
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with UserStore(path, IDENTITY) as store:
            with pytest.raises(DamagedRecordError, match=r"of user 'ann' .* is damaged; enrol them anew"):
                store.get("ann")
            assert store.get("bob") == record("bob", size=60)


def test_somebody_elses_record_under_an_id_is_noticed(path):
    with UserStore(path, IDENTITY) as store:
        store.put({"ann": b"1", "bob": b"2"})
    with sqlite3.connect(path) as tampering:
        tampering.execute(
            "UPDATE users SET (record, digest) = (SELECT record, digest FROM users WHERE id = 'bob') WHERE id = 'ann'"
        )
    tampering.close()
    with UserStore(path, IDENTITY) as store, pytest.raises(DamagedRecordError):
        store.get("ann")


@pytest.mark.parametrize("size", [100, 4000, 100_000])
def test_after_forgetting_no_sixteen_bytes_of_a_record_are_in_any_file(path, size):
    """Nor of the record that it had overwritten, nor the id."""

    def runs(content):
        return {content[place : place + 16] for place in range(len(content) - 15)}

    versions = [os.urandom(size) for _ in range(2)]
    with UserStore(path, IDENTITY) as store:
        store.put({f"other {i}": record("other", i, size) for i in range(20)})
        for version in versions:
            store.put({"ann-the-forgotten": version})
        assert b"ann-the-forgotten" in b"".join(each.read_bytes() for each in path.parent.iterdir())
        assert store.forget(["ann-the-forgotten", "nobody"]) == 1
        files = [each.read_bytes() for each in path.parent.iterdir()]
        left = set().union(*(runs(content) for content in files))
        assert not any(left & runs(version) for version in versions)
        assert not any(b"ann-the-forgotten" in content for content in files)
        assert all(store.get(f"other {i}") == record("other", i, size) for i in range(20))


@pytest.mark.parametrize("seed", [0, 1])  # with the second one copies are left if the file is not written anew
def test_nothing_is_left_behind_by_pages_that_were_split_and_joined(path, seed):
    """Among many users of mixed sizes, who were overwritten now and then."""
    draw = np.random.default_rng(seed)
    names, content = [draw.bytes(12).hex() for _ in range(3000)], {}
    with UserStore(path, IDENTITY) as store:
        for _ in range(3):
            order = [str(name) for name in draw.permutation(names)]
            for start in range(0, len(order), 50):
                some = {name: draw.bytes(int(draw.integers(30, 90))) for name in order[start : start + 50]}
                store.put(some)
                content |= some
        gone = [str(name) for name in draw.permutation(names)[:300]]
        assert store.forget(gone) == len(gone)
        left = b"".join(each.read_bytes() for each in path.parent.iterdir())
        runs = {left[place : place + 16] for place in range(len(left) - 15)}
        assert not [name for name in gone if name.encode() in left]
        assert not [n for n in gone if any(content[n][place : place + 16] in runs for place in range(len(content[n]) - 15))]
        assert all(store.get(name) == content[name] for name in {*names} - {*gone})


def test_a_record_is_replaced_only_if_it_is_what_was_read(path):
    with UserStore(path, IDENTITY) as store:
        store.put({"ann": b"1"})
        assert store.replace("ann", b"1", b"2") and not store.replace("ann", b"1", b"3") and store.get("ann") == b"2"
        store.forget(["ann"])
        with pytest.raises(UnknownUserError):
            store.replace("ann", b"2", b"3")
        store.put({"bob": b"still works"})


def test_whoever_reads_meanwhile_is_named_as_the_reason_that_bytes_may_be_left(path, monkeypatch):
    monkeypatch.setattr("serving.store.WAIT", 0.05)
    with UserStore(path, IDENTITY) as store:
        store.put({"ann": b"1", "bob": b"2"})
        with sqlite3.connect(path) as other:
            other.execute("BEGIN")
            other.execute("SELECT * FROM users").fetchone()
            with pytest.raises(StoreBusyError, match="deleted, but their bytes may still be in"):
                store.forget(["ann"])
        other.close()
        assert "ann" not in store and store.forget(["ann"]) == 0 and store.get("bob") == b"2"


def test_whoever_writes_meanwhile_is_named_as_the_reason_that_nothing_was_changed(path, monkeypatch):
    monkeypatch.setattr("serving.store.WAIT", 0.05)
    with UserStore(path, IDENTITY) as store:
        store.put({"ann": b"1"})
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        for change in (
            lambda: store.put({"bob": b"2"}),
            lambda: store.replace("ann", b"1", b"2"),
            lambda: store.forget(["ann"]),
        ):
            with pytest.raises(StoreBusyError, match="another process has been writing"):
                change()
        with pytest.raises(OSError, match="could not be opened: another process"):
            UserStore(path, IDENTITY)
        other.close()
        assert "bob" not in store and store.get("ann") == b"1"


def _open_at_once(path, start, failures):
    start.wait(60)
    try:
        UserStore(path, IDENTITY).close()
    except Exception as error:
        failures.put(repr(error))


def test_several_processes_may_make_a_store_at_once(path):
    context = multiprocessing.get_context("spawn")
    start, failures = context.Event(), context.Queue()
    openers = [context.Process(target=_open_at_once, args=(path, start, failures)) for _ in range(3)]
    for opener in openers:
        opener.start()
    time.sleep(0.5)
    start.set()
    for opener in openers:
        opener.join()
    assert failures.empty() and not any(opener.exitcode for opener in openers)


def test_a_full_disk_is_reported_and_nothing_is_lost(path):
    with UserStore(path, IDENTITY, megabytes=0.3) as store:
        written = 0
        with pytest.raises(StoreFullError, match=r"no room in .*Nothing was changed; free some space"):
            for written in range(1000):
                store.put({f"user {written}": record("user", written), f"twin {written}": record("twin", written)})
        assert len(store) == 2 * written > 10
        assert all(store.get(f"user {i}") == record("user", i) for i in range(written))
        store.forget(["user 0"])
        store.put({"small": b"fits"})
        assert store.get("small") == b"fits"


def test_threads_see_whole_records(path):
    with UserStore(path, IDENTITY) as store:
        store.put({"ann": record("ann", 0)})
        valid, stop, wrong = {record("ann", version) for version in range(30)}, threading.Event(), []

        def read():
            while not stop.is_set():
                if store.get("ann") not in valid:
                    wrong.append(1)

        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        for version in range(30):
            store.put({"ann": record("ann", version)})
        stop.set()
        for reader in readers:
            reader.join()
        assert not wrong and store.get("ann") == record("ann", 29)


def test_what_another_process_writes_is_told(path):
    with UserStore(path, IDENTITY) as store, UserStore(path, IDENTITY) as other:
        assert not store.changed()
        store.put({"ann": b"mine"})
        assert not store.changed() and other.changed() and not other.changed()


def _write_for_ever(path, started):
    with UserStore(path, IDENTITY) as store:
        version = 0
        while True:
            store.put({f"user {i}": record(f"user {i}", version) for i in range(8)})
            started.set()
            version += 1


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.stress)])
def test_killed_amid_writes_every_record_is_whole_and_all_are_of_one_write(path, kills):
    context = multiprocessing.get_context("spawn")
    for kill in range(kills):
        started = context.Event()
        writer = context.Process(target=_write_for_ever, args=(path, started))
        writer.start()
        assert started.wait(60)
        time.sleep(0.003 * (kill % 7))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        writer.close()
        with UserStore(path, IDENTITY) as store:
            versions = {store.get(f"user {i}").split(b"/")[1] for i in range(8)}
            assert len(versions) == 1
            assert all(store.get(f"user {i}") == record(f"user {i}", int(next(iter(versions)))) for i in range(8))

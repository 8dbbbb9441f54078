"""Users' records on disk: one SQLite file, one row per user, whole or not at all.

What a record means is none of the store's business; it keeps bytes, notices when a byte has changed, and forgets for good.
"""

import hashlib
import json
import math
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

FORMAT = 1
PAGE = 16384
"""Bytes of a database page: a record of a few thousand bytes then lies in a page with its neighbours."""
LONGEST_ID = 256
"""Characters."""
WAIT = 10.0
"""Seconds that one process waits for another."""


class UnknownUserError(KeyError):
    """Somebody who was never enrolled, or was forgotten, is asked for."""

    def __str__(self) -> str:
        return str(self.args[0])


class DamagedRecordError(ValueError):
    """A record is not what was written."""


class ForeignStoreError(ValueError):
    """The file holds users of another model, or is no store."""


class StoreFullError(OSError):
    """There was no room; nothing was changed."""


class StoreBusyError(RuntimeError):
    """Another process is in the way."""


class UserStore:
    """Records by user id.

    Ids are data: any string of 1 to :data:`LONGEST_ID` characters. Every write is one transaction, on disk when the call
    returns: a process that is killed leaves the old record or the new one. Several threads may use a store; so may several
    processes, see :meth:`changed`. Once closed it answers with ``ValueError``, whatever is asked.

    Args:
        path: of the database file, made if it is not there. Its folder must exist.
        identity: facts by name that whoever reads the records must share (the model's hash, say).
        megabytes: that the file may take up, its log (some 16 more) not counted; None: as many as there are.

    Raises:
        ForeignStoreError: if the file is of another identity or format (names what differs), or no database.
        FileNotFoundError: if its folder does not exist. OSError: if it cannot be opened.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, str], megabytes: float | None = None) -> None:
        self.path = Path(path)
        if megabytes is not None and not 0 < megabytes < math.inf:
            raise ValueError(f"megabytes of a store must be above 0, got {megabytes}; leave it out for no limit.")
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {self.path.parent} to keep the users in; make it first.")
        self._lock = threading.RLock()
        self._database = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None, timeout=WAIT)
        self._closed = False
        try:
            self._prepare({"format": str(FORMAT), **identity}, megabytes)
        except BaseException as error:
            self.close()
            if isinstance(error, sqlite3.OperationalError | StoreBusyError):  # locked, read-only, no such disk
                raise OSError(f"{self.path} could not be opened: {error}.") from error
            if isinstance(error, sqlite3.DatabaseError):
                raise ForeignStoreError(f"{self.path} is no store of users ({error}); give another path.") from error
            raise
        self._version = self._data_version()

    @property
    def _connection(self) -> sqlite3.Connection:
        if self._closed:
            raise ValueError(f"the store {self.path} has been closed; open it anew.")
        return self._database

    def _prepare(self, identity: Mapping[str, str], megabytes: float | None) -> None:
        run = self._connection.execute
        run(f"PRAGMA page_size = {PAGE}")
        if (
            run("SELECT count(*) FROM sqlite_master").fetchone()[0]
            and not run("SELECT count(*) FROM sqlite_master WHERE name = 'identity'").fetchone()[0]
        ):
            raise ForeignStoreError(f"{self.path} is another program's database; give another path.")
        self._log_ahead()
        run("PRAGMA synchronous = FULL")
        run("PRAGMA secure_delete = ON")  # what is deleted is overwritten with zeros
        with self._transaction():
            run("CREATE TABLE IF NOT EXISTS identity (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
            run("CREATE TABLE IF NOT EXISTS users (id TEXT PRIMARY KEY, record BLOB NOT NULL, digest BLOB NOT NULL)")
            there = dict(run("SELECT name, value FROM identity"))
            if not there:
                self._connection.executemany("INSERT INTO identity VALUES (?, ?)", identity.items())
        if there and there != dict(identity):
            differing = [
                f"{name} is {there.get(name, 'unknown')} there and {identity.get(name, 'unknown')} here"
                for name in sorted({*there, *identity})
                if there.get(name) != identity.get(name)
            ]
            raise ForeignStoreError(
                f"the users in {self.path} are not of this model: {'; '.join(differing)}. Serve them with the model they were "
                "enrolled with, or enrol them anew in another file."
            )
        if megabytes is not None:
            run(f"PRAGMA max_page_count = {max(1, int(megabytes * 1e6) // PAGE)}")

    def _log_ahead(self) -> None:
        """Write-ahead logging. The switch does not wait for another process that is making it, as all else does."""
        deadline = time.monotonic() + WAIT
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            connection = self._connection
            try:
                connection.execute("BEGIN IMMEDIATE")
                yield
                connection.execute("COMMIT")
            except BaseException as error:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    self._explain(error)
                raise

    def _explain(self, error: sqlite3.OperationalError) -> None:
        """Raise what SQLite says by a name of its own, where it has one."""
        if "full" in str(error):
            raise StoreFullError(
                f"no room in {self.path}: {error}. Nothing was changed; free some space, or allow the store more."
            ) from error
        if "locked" in str(error) or "busy" in str(error):
            raise StoreBusyError(
                f"another process has been writing to {self.path} for {WAIT:g} seconds. Nothing was changed; try again."
            ) from error

    def put(self, records: Mapping[str, bytes]) -> None:
        """Write or overwrite users' records, all of them or none.

        Raises:
            StoreFullError: if there is no room. StoreBusyError: if another process keeps writing.
            ValueError: for an id that is no string, empty or too long.
        """
        rows = [(check_id(user), record, _digest(user, record)) for user, record in records.items()]
        with self._transaction():
            self._connection.executemany(
                "INSERT INTO users VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET record = excluded.record, "
                "digest = excluded.digest",
                rows,
            )

    def replace(self, user: str, old: bytes, new: bytes) -> bool:
        """Overwrite a record if it still is ``old``; returns whether it was.

        Raises:
            UnknownUserError: if the user was forgotten in the meantime. StoreFullError: if there is no room.
            StoreBusyError: if another process keeps writing.
        """
        with self._transaction():
            if self.get(user) != old:
                return False
            change = "UPDATE users SET record = ?, digest = ? WHERE id = ?"
            self._connection.execute(change, (new, _digest(user, new), user))
        return True

    def get(self, user: str) -> bytes:
        """A user's record.

        Raises:
            UnknownUserError: for somebody who has none. DamagedRecordError: if it is not what was written.
        """
        with self._lock:
            row = self._connection.execute("SELECT record, digest FROM users WHERE id = ?", (check_id(user),)).fetchone()
        if row is None:
            raise UnknownUserError(f"user {user!r} is not enrolled; enrol them first, or ask for the bare model.")
        record, digest = row
        if _digest(user, record) != digest:
            raise DamagedRecordError(f"the record of user {user!r} in {self.path} is damaged; enrol them anew.")
        return record

    def forget(self, users: Iterable[str]) -> int:
        """Erase users' records: when the call returns, their bytes are in none of the database's files.

        That takes writing the whole file anew, so forget many users at once rather than one after the other.

        Returns:
            How many of them there were.

        Raises:
            StoreBusyError: if another process keeps reading or writing. They are deleted, but their bytes may still be there.
            StoreFullError: likewise, if there is no room for the file twice.
        """
        with self._transaction():
            gone = sum(self._connection.execute("DELETE FROM users WHERE id = ?", (check_id(user),)).rowcount for user in users)
        with self._lock:
            try:
                self._erase()
            except sqlite3.OperationalError as error:
                kind = StoreFullError if "full" in str(error) else StoreBusyError
                raise kind(
                    f"deleted, but their bytes may still be in {self.path} ({error}); forget them again when there is room "
                    "for the file twice and nobody else is at work on it."
                ) from error
        return gone

    def _erase(self) -> None:
        """What is deleted stays behind in pages that were split or joined before, and in the log."""
        self._connection.execute("VACUUM")
        if self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            raise sqlite3.OperationalError("another process is reading")

    def changed(self) -> bool:
        """Whether another process has written since this was last asked: what was read before may be out of date."""
        with self._lock:
            before, self._version = self._version, self._data_version()
        return before != self._version

    def _data_version(self) -> int:
        return int(self._connection.execute("PRAGMA data_version").fetchone()[0])

    def __len__(self) -> int:
        with self._lock:
            return int(self._connection.execute("SELECT count(*) FROM users").fetchone()[0])

    def __contains__(self, user: object) -> bool:
        with self._lock:
            return self._connection.execute("SELECT 1 FROM users WHERE id = ?", (user,)).fetchone() is not None

    def __iter__(self) -> Iterator[str]:
        """Ids in order."""
        with self._lock:
            return iter([row[0] for row in self._connection.execute("SELECT id FROM users ORDER BY id")])

    def bytes(self) -> int:
        """That the database takes up on disk, its log included."""
        log = self.path.with_name(f"{self.path.name}-wal")
        return self.path.stat().st_size + (log.stat().st_size if log.exists() else 0)

    def close(self) -> None:
        """Carry the log over and let go of the file; a closed store can be closed again."""
        with self._lock:
            self._closed = True
            self._database.close()

    def __enter__(self) -> "UserStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_id(user: str) -> str:
    """The id. Raises ``ValueError`` if it is no string, empty, too long or no valid Unicode."""
    if not isinstance(user, str):
        raise ValueError(f"a user id must be a string, got {user!r}; give str({user!r}).")
    if not 1 <= len(user) <= LONGEST_ID:
        raise ValueError(f"a user id must have 1 to {LONGEST_ID} characters, got {len(user)}; give a shorter one, a hash say.")
    try:
        user.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the user id {user!r} is no valid Unicode ({error.reason}); give its escaped form.") from error
    return user


def _digest(user: str, record: bytes) -> bytes:
    """Of a record and whose it is: a record under somebody else's id is as damaged as one with another byte."""
    return hashlib.blake2b(json.dumps(user).encode() + record, digest_size=16).digest()

"""Saved tensors that can be trusted: safetensors beside JSON, checksummed, versioned, written atomically.

``save("x", ...)`` writes ``x-<hash>.safetensors`` first and then ``x.json``, which names it. The rename of the JSON is
the commit: a kill at any moment leaves either the old artefact or the new one. Nothing is ever unpickled.
"""

import errno
import hashlib
import json
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import load
from safetensors.torch import save as to_bytes
from torch import Tensor

LOG = logging.getLogger("dsa")
FORMAT = 1
LEFT_BEHIND = 3600.0
"""Seconds after which a tensor file that no JSON names was left behind by a kill, not just written by another process."""


NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""What the system says when a disk, a quota, or a limit on file sizes is full."""


class ArtefactError(RuntimeError):
    """An artefact is missing, truncated, altered, or of another kind or version."""


class DiskFullError(OSError):
    """There was no room to write a file; the message names it, the cause and the cure."""


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Within: what fails for want of room raises :class:`DiskFullError`, which names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise DiskFullError(
            f"{path} could not be written: the disk or the quota is full ({error.strerror}). Free some space, or write "
            "elsewhere (--out, --log-dir, $DSA_CACHE). What was there before is untouched."
        ) from error


def write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write beside ``path`` and rename, so that ``path`` is always whole. Raises :class:`DiskFullError` without room.

    A file that is there keeps its permissions; a new one gets ``mode``, less what the umask forbids.
    """
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            if path.exists():
                os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _tensor_file(path: Path, checksum: str) -> Path:
    return path.with_name(f"{path.name}-{checksum[:12]}.safetensors")


def _json_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def exists(path: Path) -> bool:
    """Whether an artefact was committed at ``path`` (given without suffix)."""
    return _json_file(path).exists()


def save_artefact(path: Path, kind: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Save ``tensors`` and JSON-able ``meta`` as ``path`` (given without suffix), replacing what was there.

    Raises:
        DiskFullError: without room for it; what was there stays, and nothing else does.
    """
    data = to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    checksum = hashlib.sha256(data).hexdigest()
    body = {"format": FORMAT, "kind": kind, "tensors_sha256": checksum, "meta": json.loads(json.dumps(dict(meta)))}
    body["self_sha256"] = _digest(body)
    target, replaced = _tensor_file(path, checksum), _named_tensors(path)
    write_atomically(target, data)
    try:
        write_atomically(_json_file(path), json.dumps(body, indent=1).encode())
    except DiskFullError:
        if target != _named_tensors(path):
            target.unlink(missing_ok=True)
        raise
    for old in path.parent.glob(f"{path.name}-{'?' * 12}.safetensors"):
        if old != target and (old == replaced or _age(old) > LEFT_BEHIND):
            old.unlink(missing_ok=True)


def _age(file: Path) -> float:
    """Seconds since a file was written; 0 if another process has just removed it."""
    return time.time() - file.stat().st_mtime if file.exists() else 0.0


def _named_tensors(path: Path) -> Path | None:
    """The tensor file that the JSON names now."""
    try:
        return _tensor_file(path, json.loads(_json_file(path).read_bytes())["tensors_sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_artefact(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and meta of ``path`` (given without suffix).

    Raises:
        ArtefactError: if it is missing, damaged, or of another kind or version. Nothing is deleted or retrained:
            whoever wants it made again removes it.
    """
    source = _json_file(path)
    if not source.exists():
        raise ArtefactError(f"no {kind} at {source}.")
    cure = f"Remove {source} to make it again, or restore it from a backup."
    try:
        body = json.loads(source.read_bytes())
        claimed = body.pop("self_sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ArtefactError(f"{source} is not a whole artefact ({error}). {cure}") from error
    if claimed != _digest(body):
        raise ArtefactError(f"{source} was altered: its checksum does not match. {cure}")
    if body["format"] != FORMAT:
        raise ArtefactError(f"{source} has format {body['format']}, this version reads {FORMAT}. {cure}")
    if body["kind"] != kind:
        raise ArtefactError(f"{source} holds a {body['kind']}, not a {kind}.")
    tensors = _tensor_file(path, body["tensors_sha256"])
    if not tensors.exists():
        if _named_tensors(path) != tensors:  # replaced by another process since the JSON was read
            return load_artefact(path, kind)
        raise ArtefactError(f"{tensors}, which {source} names, is missing. {cure}")
    data = tensors.read_bytes()
    if hashlib.sha256(data).hexdigest() != body["tensors_sha256"]:
        raise ArtefactError(f"{tensors} is truncated or altered: its checksum does not match. {cure}")
    return load(data), body["meta"]


def load_or_make(
    path: Path,
    kind: str,
    make: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The artefact at ``path``; made and saved first if it was never committed. A damaged one raises.

    Of programs that want it together one makes it, and the others wait.
    """
    if not exists(path):
        with _turn(path, kind):
            if not exists(path):
                save_artefact(path, kind, *make())
    return load_artefact(path, kind)


@contextmanager
def _turn(path: Path, kind: str) -> Iterator[None]:
    """Within: no other program makes what is to be kept at ``path``. The system ends the turn of a program that is killed."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            LOG.info("another program is making the %s %s; waiting for it", kind, path)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def cache_root() -> Path:
    """Where artefacts are kept between runs: ``$DSA_CACHE``, else ``~/.cache/dynamic-sparse-adapters``."""
    return Path(os.environ.get("DSA_CACHE", Path.home() / ".cache" / "dynamic-sparse-adapters"))


def cache_key(**facts: Any) -> str:
    """A short hash of JSON-able facts, for file names."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

"""Files and folders that appear whole or not at all, and fingerprints of what is in them."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from clseave_cli.errors import ClseaveError, DataError, ModelError

_CHUNK_BYTES = 1 << 20
#: Above this many files one sync of everything is faster than one each (thousands of pictures).
_MOST_SINGLE_SYNCS = 100


def _disk_error(error: Exception, target: Path) -> ClseaveError | None:
    number = _error_number(error)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ClseaveError(
            f"{target}: the disk is full; what was there before is untouched. "
            "Free some space and run the same command again."
        )
    if number in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
        return ClseaveError(
            f"{target}: cannot be written ({os.strerror(number)}); choose another folder."
        )
    return None


def _error_number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # safetensors and tokenizers write from Rust, and tell the system's error only in words.
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turns a full or read-only disk met inside the block into a `ClseaveError` naming `target`."""
    try:
        yield
    except Exception as error:
        translated = _disk_error(error, target)
        if translated is None:
            raise
        raise translated from error


def fsync_folder(folder: Path) -> None:
    """Makes the names in `folder` survive a power cut (POSIX: a rename needs its folder synced)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(target: Path) -> Iterator[BinaryIO]:
    """Opens a binary file that becomes `target` when the block ends well, and vanishes otherwise.

    Raises:
        ClseaveError: the disk is full or read-only; an older `target` is left as it was.
    """
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        aside = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            aside.chmod(0o666 & ~_umask())
            aside.replace(target)
            fsync_folder(target.parent)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path, aside_in: Path | None = None) -> Iterator[Path]:
    """A folder to fill, which takes `target`'s place when the block ends well.

    An older `target` is replaced as a whole; until the last rename it stays readable.

    Args:
        target: see above.
        aside_in: where it is filled, and an older one put to be deleted; in the file system of
            `target`, beside which both are done otherwise.

    Raises:
        ClseaveError: the disk is full or read-only; an older `target` is left as it was.
    """
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = aside_in or target.parent
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=folder))
        try:
            yield aside
            _sync_files([path for path in aside.rglob("*") if path.is_file()])
            aside.chmod(0o777 & ~_umask())
            if target.exists():
                # Not a name of `asides`: a kill now leaves the only copy of an older one in it.
                old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=folder))
                target.rename(old / target.name)
                try:
                    aside.rename(target)
                except OSError:
                    (old / target.name).rename(target)
                    old.rmdir()
                    raise
                shutil.rmtree(old)
            else:
                aside.rename(target)
            fsync_folder(target.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def asides(folder: Path, name: str) -> list[Path]:
    """What is being written in `folder` to be renamed at its end, or was when a kill came.

    Args:
        folder: where `atomic_file` and `atomic_folder` write.
        name: a regular expression of their targets' names.
    """
    # The last eight are what tempfile makes.
    pattern = re.compile(rf"\.(?:{name})\.[a-z0-9_]{{8}}")
    return [path for path in folder.iterdir() if pattern.fullmatch(path.name)]


@contextmanager
def locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Holds a lock on a file or folder; however the process ends, the kernel lets go of it.

    Raises:
        BlockingIOError: `how` says not to wait, and somebody else holds one.
    """
    # NFS grants an exclusive lock only on what is open for writing, which a folder cannot be.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


def _sync_files(paths: list[Path]) -> None:
    if len(paths) > _MOST_SINGLE_SYNCS:
        os.sync()
        return
    for path in paths:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(target: Path, value: Any) -> None:
    """Writes `value` as indented UTF-8 JSON, atomically."""
    with atomic_file(target) as stream:
        stream.write((json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Reads a JSON document that clseave wrote.

    Raises:
        ModelError: the file is missing, unreadable, no regular file, or not JSON.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for without end
            raise ModelError(f"{path}: not a regular file.")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; is this a folder that clseave wrote?") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: damaged, not valid JSON ({error}); make it again.") from None


def cache_root() -> Path:
    """Where caches live: `CLSEAVE_CACHE`, or `~/.cache/clseave`."""
    return Path(os.environ.get("CLSEAVE_CACHE") or Path.home() / ".cache" / "clseave")


def file_digest(path: Path, num_bytes: int = 32) -> str:
    """BLAKE2b of a file's bytes, in hex (`b2sum -l 256`; twice SHA-256's speed without SHA-NI).

    Args:
        path: the file.
        num_bytes: length of the digest.

    Raises:
        DataError: the file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=num_bytes)
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    """BLAKE2b-256 of a JSON value, independent of key order, in hex."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()

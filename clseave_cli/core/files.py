"""Files and folders that appear whole or not at all, and never replace something unrelated."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from clseave_cli.errors import ClseaveError, DataError, ModelError, UsageError

#: Above this many files (thousands of pictures), one sync of everything is faster than one each.
_MOST_SINGLE_SYNCS = 100
_NOT_WRITABLE = ("EACCES", "EROFS", "EPERM", "ENOTDIR", "EEXIST", "EISDIR", "ELOOP", "ENAMETOOLONG")
#: Errors of file systems without locks (Lustre without `flock`, NFS without its daemon).
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
#: Arguments of renameat2(2): paths as in rename(2); swap the two.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

#: Options whose folders an output must neither replace nor contain.
_INPUTS = (
    "data", "images", "runs", "teacher", "clip", "text", "vision", "student", "students",
    "autoencoder", "guided", "init_from",
)  # fmt: skip
#: What file managers and NFS put into any folder.
_LITTER = r"(.*/)?(\.DS_Store|\.nfs[0-9a-f]+)"


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turns the errors of a full or read-only disk into a `ClseaveError` that names `target`."""
    try:
        yield
    except Exception as error:
        # In nested blocks, the outermost one names what the user knows.
        cause = (error.__cause__ if type(error) is ClseaveError else None) or error
        # safetensors and tokenizers write from Rust; the error number is only in the message.
        message = re.search(r"\(os error (\d+)\)", str(cause))
        number = cause.errno if isinstance(cause, OSError) else int(message[1]) if message else 0
        if "Symlink loop" in str(cause):  # pathlib's RuntimeError
            number = errno.ELOOP
        name = errno.errorcode.get(number or 0, "")
        if name in ("ENOSPC", "EDQUOT", "EFBIG"):
            raise ClseaveError(
                f"{target}: the disk is full; existing files are untouched. "
                "Free some space and run the same command again."
            ) from cause
        # Nothing can be created there (/proc), or the folder was removed meanwhile.
        parent = Path(os.path.realpath(getattr(cause, "filename", None) or os.curdir)).parent
        is_gone = name == "ENOENT" and parent in Path(os.path.realpath(target)).parents
        if name in _NOT_WRITABLE or is_gone:
            raise ClseaveError(
                f"{target}: cannot be written ({os.strerror(number or 0)}); choose another folder."
            ) from cause
        raise


@dataclass(frozen=True)
class Kind:
    """A kind of folder that clseave writes, and how to recognise one."""

    name: str  # for messages, such as `a report`
    #: Regular expression that matches the paths of its files; those listed in a `config.json` are
    #: members, too.
    members: str
    marker: str = ""  # a JSON file in every such folder; empty: the members suffice
    #: Whether the marker's content is of this kind.
    marks: Callable[[dict[str, Any]], bool] = lambda content: True


def require_replaceable(out: Path, kind: Kind | None, config: object = None) -> None:
    """Refuses an output folder that would replace something else.

    A folder is replaced as a whole. So `out` must be new, empty, or of the same kind with no other
    files in it, and must not contain an input of the command, the working directory or the home
    directory. Every command calls this before it starts and again before it writes. `kind` None
    requires a new or empty folder; `config` has the options that name inputs.

    Raises:
        UsageError: `out` is or contains something else; names it.
        ClseaveError: `out` is a file, is below one, or cannot be written.
    """
    for path in (out, *out.parents):
        if os.path.lexists(path) and not path.is_dir():
            raise ClseaveError(f"{path}: is not a folder; choose another output.")
    with writing(out):
        folder = out.resolve()
        for name, protected in _protected(config):
            if protected.resolve().is_relative_to(folder):
                raise UsageError(
                    f"{out}: is {name}, or contains it, and would be replaced as a whole; "
                    "choose another folder."
                )
        if not os.access(next(path for path in folder.parents if path.exists()), os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "no write permission")
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        if names and (kind is None or not kind.marks(json_object(folder / kind.marker))):
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            raise UsageError(
                f"{out}: already exists (with {', '.join(names[:2])}{more}) and is not "
                f"{kind.name if kind else 'empty'}; choose another folder, or move that one away."
            )
        if kind is not None and (foreign := next(_foreign_files(kind, folder), None)):
            raise UsageError(
                f"{out / foreign}: clseave did not write it, and {out} is replaced as a whole; "
                "move it elsewhere, or choose another folder."
            )
        if os.path.ismount(folder):
            raise UsageError(f"{out}: is a mount point; choose a folder inside it.")


def _protected(config: object) -> Iterator[tuple[str, Path]]:
    with suppress(OSError):
        yield "the working directory", Path.cwd()
    with suppress(RuntimeError):
        yield "the home directory", Path.home()
    for name in _INPUTS:
        value = getattr(config, name, None)
        for path in value if isinstance(value, tuple) else (value,):
            with suppress(OSError, ValueError):  # may be a hub id
                if path and Path(path).exists():
                    yield f"--{name.replace('_', '-')} {path}", Path(path)


def _foreign_files(kind: Kind, folder: Path) -> Iterator[str]:
    """Paths, relative to a folder, of files that do not belong to its kind."""
    members = re.compile(f"{kind.members}|{_LITTER}")
    listed = set(json_object(folder / "config.json").get("files", ()))
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_folder = path.is_dir() and not path.is_symlink()
        if not (is_folder or name in listed or members.fullmatch(name)):
            yield name


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none."""
    with suppress(OSError, ValueError, RecursionError):
        if path.is_file() and isinstance(content := json.loads(path.read_bytes()), dict):
            return content
    return {}


def fsync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def aside(target: Path) -> Path:
    """A temporary name next to `target` for what will replace it; `sweep` recognises it."""
    return target.with_name(f".{target.name}.clseave-{secrets.token_hex(4)}")


def sweep(folder: Path, name: str = ".*") -> None:
    """Removes temporary files of killed processes; nobody else may be writing to the folder.

    `name` is a regular expression for the targets of `atomic_file` and `atomic_folder`.
    """
    pattern = re.compile(rf"\.(?:{name})\.clseave-[0-9a-f]{{8}}")
    for path in folder.iterdir():
        if pattern.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif pattern.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[BinaryIO]:
    """Opens a binary file that becomes `target` if the block succeeds and is removed otherwise.

    Raises:
        ClseaveError: the disk is full or read-only; an older `target` is untouched.
    """
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = aside(target)
        try:
            with unfinished.open("xb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            unfinished.replace(target)
            fsync_folder(target.parent)
        finally:
            unfinished.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` if the block succeeds.

    An older `target` is replaced as a whole, so call `require_replaceable` first. There is always
    an old or a new folder, except for an instant on file systems that cannot swap two folders. If
    killed in that instant, `locked_target` or the next `atomic_folder` restores the old one.

    Raises:
        ClseaveError: the disk is full or read-only; an older `target` is untouched.
    """
    with writing(target):
        target = target.resolve()  # keeps symbolic links
        target.parent.mkdir(parents=True, exist_ok=True)
        _restore(target)
        unfinished = aside(target)
        try:
            unfinished.mkdir()
            yield unfinished
            _finish(unfinished)
            if not (target.is_dir() and _swapped(unfinished, target)):
                if target.is_dir():
                    target.rename(_old(target))
                unfinished.rename(target)
            fsync_folder(target.parent)
        finally:
            _restore(target)
            shutil.rmtree(unfinished, ignore_errors=True)


def _swapped(one: Path, other: Path) -> bool:
    """Swaps two folders atomically if the system can (Linux); False: nothing was done."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    paths = [argument for path in (one, other) for argument in (_AT_FDCWD, os.fsencode(path))]
    return bool(renameat2(*paths, _RENAME_EXCHANGE) == 0)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.clseave-old")


def _restore(target: Path) -> None:
    """Moves an older folder back if its replacement was never completed."""
    old = _old(target)
    if not target.exists() and old.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _finish(folder: Path) -> None:
    """Syncs a folder's files to disk, with the modes that the umask asks for."""
    mode = folder.stat().st_mode & 0o666
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(mode)  # some writers (safetensors) create files only the owner can read
        if len(files) <= _MOST_SINGLE_SYNCS:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    if len(files) > _MOST_SINGLE_SYNCS:
        os.sync()


@contextmanager
def locked_target(target: Path) -> Iterator[None]:
    """Locks a file or folder for this process, and removes what killed ones left unfinished.

    The lock file is `.NAME.lock` next to `target`, removed at the end of the block; a kill releases
    it. On file systems without locks, nothing is locked or removed.

    Raises:
        ClseaveError: another process is writing `target`, or its folder cannot be written.
    """
    with writing(target):
        resolved = target.resolve()
        resolved.parent.mkdir(parents=True, exist_ok=True)
        path = resolved.with_name(f".{resolved.name}.lock")
        lock, is_locked = _open_locked(path, target)
    try:
        if is_locked:
            _restore(resolved)
            sweep(resolved.parent, re.escape(resolved.name))
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.close()


def _open_locked(path: Path, target: Path) -> tuple[BinaryIO, bool]:
    """The lock file, and whether it is locked; if not, the file system has no locks."""
    while True:
        lock = path.open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(path.stat(), os.fstat(lock.fileno())):
                return lock, True
        except FileNotFoundError:
            pass  # its holder removed it just before we got it
        except BlockingIOError:
            lock.close()
            raise ClseaveError(
                f"{target}: another process is writing it; let it end or stop it, or choose "
                "another output."
            ) from None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return lock, False
            lock.close()
            raise
        lock.close()


def write_json(target: Path, value: Any) -> None:
    """Writes indented UTF-8 JSON atomically."""
    with atomic_file(target) as stream:
        stream.write((json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Reads a JSON document that clseave wrote.

    Raises:
        ModelError: the file is missing, unreadable, not a regular file, or not JSON.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe might never end
            raise ModelError(f"{path}: not a regular file.")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; is this a folder that clseave wrote?") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: damaged, not valid JSON ({error}); create it again.") from None


def cache_root() -> Path:
    """The folder of all caches: `CLSEAVE_CACHE`, or `~/.cache/clseave`.

    Raises:
        ClseaveError: neither is defined.
    """
    with suppress(RuntimeError):
        return Path(os.environ.get("CLSEAVE_CACHE") or Path.home() / ".cache" / "clseave")
    raise ClseaveError("this user has no home directory for caches; set CLSEAVE_CACHE to a folder.")


#: The content of each folder in `cache_root`. The last one may have cost money.
CACHES = {
    "image": "embeddings of photos",
    "patches": "states of photos' patches",
    "states": "inputs of the trained blocks of an image tower",
    "text": "the teacher's embeddings of sentences",
    "words": "links between words",
    "hypothesis-only": "answers of the hypothesis-only baseline",
    "ctranslate2": "converted translation models",
    "translation": "translations, and the files they went to",
}


def cache_sizes() -> dict[str, int]:
    """The size of each of `CACHES`, in bytes."""
    return {kind: folder_bytes(cache_root() / kind) for kind in CACHES}


def clear_caches(kinds: Collection[str]) -> int:
    """Deletes some of `CACHES`; returns their size in bytes.

    Raises:
        UsageError: there is no such cache.
        ClseaveError: one cannot be deleted.
    """
    for kind in kinds:
        if kind not in CACHES:
            raise UsageError(f"{kind}: no such cache; there are: {', '.join(CACHES)}.")
    num_bytes = 0
    for folder in (cache_root() / kind for kind in kinds):
        num_bytes += folder_bytes(folder)
        try:
            if folder.exists():
                shutil.rmtree(folder)
        except OSError as error:
            raise ClseaveError(f"{folder}: cannot be deleted ({error.strerror}).") from None
    return num_bytes


def folder_bytes(folder: Path) -> int:
    """The size of all files in a folder; 0 if it does not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def file_digest(path: Path, num_bytes: int = 32) -> str:
    """BLAKE2b of a file, in hex (`b2sum -l 256`; twice as fast as SHA-256 without SHA-NI).

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=num_bytes))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    """BLAKE2b-256 of a JSON value, independent of key order, in hex."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()

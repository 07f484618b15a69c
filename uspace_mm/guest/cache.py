"""The user's cache folder: entries named by what they were made from, made once, checked before each use.

An entry is a directory. It is built under a temporary name, its files are digested and synced, and it is
renamed into place, so that an entry that exists is whole. Each use compares the files' status (size, times,
inode) with the one recorded; where they differ the content decides, and an entry whose content changed is
made again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from uspace_mm.errors import UspaceError
from uspace_mm.guest.progress import Progress, silent

MANIFEST = ".manifest.json"
_IN_USE = ".in-use"
_USE_GRAIN_S = 3600
# A new layout of entries gets a new number, so that old ones are not misread.
LAYOUT = 1


class CacheError(UspaceError):
    """The cache folder cannot be written to; the message names it and what to do."""

    exit_status = 3


def cache_root() -> Path:
    """``$UMM_GUEST_CACHE``, or ``uspace_mm/guest`` under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    own = os.environ.get("UMM_GUEST_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "uspace_mm" / "guest"
    except RuntimeError as error:  # a container's user that is in no passwd
        raise CacheError("no home directory for the cache: set UMM_GUEST_CACHE to a folder") from error


def digest_file(path: Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(inputs: Mapping[str, object]) -> str:
    """SHA-256 of `inputs` (anything JSON can hold) in a form that does not depend on their order."""
    text = json.dumps({"layout": LAYOUT, **inputs}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def obtain(
    kind: str,
    inputs: Mapping[str, object],
    make: Callable[[Path], None],
    *,
    progress: Progress = silent,
) -> Path:
    """The directory of the entry of `kind` made from `inputs`; ``make(directory)`` fills a new one.

    `inputs` must name everything the result depends on. A damaged entry is made again; two processes that
    want the same entry make it once. Raises :class:`CacheError` when the folder cannot be written or is full,
    and passes on what `make` raises, leaving nothing behind.
    """
    folder = cache_root() / kind
    entry = folder / digest_of(inputs)[:32]
    if _is_whole(entry):
        return entry
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        with in_use(), _locked(folder / f".{entry.name}.lock", progress):
            if _is_whole(entry):  # made while we waited
                return entry
            if entry.exists():
                progress(f"the cached {kind} is damaged, making it again")
                remove(entry)
            _build(folder, entry, inputs, make)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CacheError(
                f"no space left in {folder}: free some, or set UMM_GUEST_CACHE to a folder that has it"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EIO):
            raise _cannot_write(folder, error) from error
        raise
    return entry


def _cannot_write(folder: Path, error: OSError) -> CacheError:
    return CacheError(
        f"cannot write to {folder}: {error.strerror}; set UMM_GUEST_CACHE to a folder of your own"
    )


def find(kind: str, inputs: Mapping[str, object]) -> Path | None:
    """The directory of the entry when it is there and whole, else None."""
    entry = cache_root() / kind / digest_of(inputs)[:32]
    return entry if _is_whole(entry) else None


@contextmanager
def in_use() -> Iterator[None]:
    """While inside, nobody empties the cache. For a command that uses entries after it has obtained them."""
    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / _IN_USE).open("w")
    except OSError:  # a cache that we may only read cannot be emptied by us either
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


@contextmanager
def alone() -> Iterator[None]:
    """While inside, nobody else uses the cache; raises :class:`CacheError` when somebody does."""
    root = cache_root()
    try:
        lock = (root / _IN_USE).open("w")
    except OSError as error:
        raise CacheError(f"cannot write to {root}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CacheError(f"{root} is in use by another command: wait for its end and try again") from None
        yield


def _build(folder: Path, entry: Path, inputs: Mapping[str, object], make: Callable[[Path], None]) -> None:
    # Only the holder of the entry's lock makes temporary folders of its name: older ones belong to the dead.
    for stale in folder.glob(f".{entry.name}-*.new"):
        remove(stale)
    new = Path(tempfile.mkdtemp(prefix=f".{entry.name}-", suffix=".new", dir=folder))
    try:
        make(new)
        files = {}
        for path in sorted(p for p in new.rglob("*") if p.is_file() and not p.is_symlink()):
            _sync(path)
            files[str(path.relative_to(new))] = {"sha256": digest_file(path), "status": _status(path)}
        manifest = {"inputs": dict(inputs), "files": files}
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1))
        _sync(new / MANIFEST)
        new.chmod(0o755)
        new.rename(entry)
        _sync(folder)
    finally:
        remove(new)


def _is_whole(entry: Path) -> bool:
    try:
        manifest = json.loads((entry / MANIFEST).read_text())
        files: dict[str, dict[str, object]] = manifest["files"]
        changed = False
        for name, recorded in files.items():
            path = entry / name
            status = _status(path)
            if status != recorded["status"]:
                if digest_file(path) != recorded["sha256"]:
                    return False
                recorded["status"] = status
                changed = True
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False
    if changed:
        # Copied or restored from a backup: the content is right, so the next use need not read it all.
        new = entry / f"{MANIFEST}.{os.getpid()}"
        try:
            new.write_text(json.dumps(manifest, indent=1))
            new.replace(entry / MANIFEST)
        except OSError:  # a cache that we may only read, or without space
            with suppress(OSError):
                new.unlink(missing_ok=True)
    _note_use(entry)
    return True


def _note_use(entry: Path) -> None:
    """The manifest's time says when the entry was used last, to the hour: what is old may be removed."""
    manifest = entry / MANIFEST
    with suppress(OSError):
        if time.time() - manifest.stat().st_mtime > _USE_GRAIN_S:
            os.utime(manifest)


def _status(path: Path) -> list[int]:
    # The change time cannot be set by programs, so a file written to since differs in it.
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a tree, its read-only directories included."""
    if path.is_symlink() or path.is_file():
        path.unlink()
        return

    def writable(function: Callable[[str], object], name: str, _: object) -> None:
        Path(name).parent.chmod(0o700)
        Path(name).chmod(0o700)
        function(name)

    if path.exists():
        shutil.rmtree(path, onerror=writable)


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that makes the same entry of the cache")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield

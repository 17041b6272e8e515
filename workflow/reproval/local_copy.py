"""A model's files on the disk of the node, for as long as jobs there read them.

Many jobs that read one shared file system at once wait for each other, and an engine of several ranks reads every file
several times. With `local_copy` a job copies its model once, checks every byte on the way, and the last job that used
the copy removes it. The name of the copy does not change from job to job, since vLLM's compile cache depends on it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from reproval.files import NO_LOCKS
from reproval.records import ModelManifest

RESERVE_BYTES = 2**30
"""Left free on the node's disk for everybody's temporary files."""
_PIECE_BYTES = 16 * 2**20
_COMPLETE = ".complete"


class LocalCopyError(Exception):
    """The copy cannot be made; the message says what would help."""


def root(asked: str) -> Path:
    """The folder for this user's copies: below $TMPDIR, as Python understands it, or below an absolute path."""
    base = Path(tempfile.gettempdir()) if asked == "$TMPDIR" else Path(asked)
    return base / f"reproval-models-{os.getuid()}"


@contextmanager
def copied(manifest: ModelManifest, asked: str | None) -> Iterator[str]:
    """Yield a folder with the manifest's files: a local copy, or, with nothing asked, the store's own.

    Jobs on one node share a copy. Raises LocalCopyError: there is no room, or a file is not what was staged.
    """
    if asked is None:
        yield manifest.folder
        return
    folder = root(asked)
    place = folder / manifest.digest[:16]
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_uid != os.getuid():
                raise LocalCopyError(f"local_copy: {folder} belongs to somebody else; choose another folder")
            _sweep(folder, but=place.name)
            held.enter_context(_shared(place, manifest))
        except OSError as error:
            if error.errno in NO_LOCKS:
                raise LocalCopyError(
                    f"local_copy: {folder} is on a file system without locks; choose a folder on the node's own disk"
                ) from error
            raise LocalCopyError(f"local_copy: {error.filename or folder}: {error.strerror or error}") from error
        yield str(place)


@contextmanager
def _shared(place: Path, manifest: ModelManifest) -> Iterator[None]:
    """Hold the copy at `place`, made if it is not there; remove it afterwards unless another job holds it.

    The lock ends with the process however that ends, and the next job on the node clears up.
    """
    while True:
        # Held by all who read, and by nobody else while one copies or removes.
        lock = _lock(place, fcntl.LOCK_SH)
        if (place / _COMPLETE).exists():
            break
        os.close(lock)
        lock = _lock(place, fcntl.LOCK_EX)
        try:
            if not (place / _COMPLETE).exists():
                _copy(manifest, place)
        except BaseException:
            _remove(place)
            raise
        finally:
            os.close(lock)
    try:
        yield
    finally:
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(place)
        os.close(lock)


def _lock(place: Path, kind: int) -> int:
    """A lock of the kind on PLACE.lock, which whoever removes the copy removes too."""
    while True:
        handle = os.open(f"{place}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, kind)
        except BaseException:
            os.close(handle)
            raise
        if _is_named(handle, place):
            return handle
        os.close(handle)


def _is_named(handle: int, place: Path) -> bool:
    try:
        return os.fstat(handle).st_ino == Path(f"{place}.lock").stat().st_ino
    except FileNotFoundError:
        return False


def _remove(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    Path(f"{place}.lock").unlink(missing_ok=True)


def _sweep(folder: Path, but: str) -> None:
    """Remove what killed jobs have left: copies that nobody holds."""
    for path in folder.glob("*.lock"):
        place = path.with_suffix("")
        if place.name == but:
            continue
        with suppress(BlockingIOError):
            lock = _lock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(place)
            os.close(lock)


def _copy(manifest: ModelManifest, place: Path) -> None:
    """Copy every file and compare its SHA-256 on the way."""
    shutil.rmtree(place, ignore_errors=True)
    needed = sum(entry.size_bytes for entry in manifest.files)
    free = shutil.disk_usage(place.parent).free
    if needed + RESERVE_BYTES > free:
        raise LocalCopyError(
            f"local_copy: {manifest.model} has {needed / 2**30:.1f} GiB, and {place.parent} has {free / 2**30:.1f} GiB "
            "free; name a larger disk, or leave local_copy out"
        )
    with _ended_by_sigterm():
        for entry in manifest.files:
            source, target = Path(manifest.folder) / entry.path, place / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            if _copy_hashed(source, target) != entry.sha256:
                raise LocalCopyError(f"{source}: its content is not what was staged (SHA-256 differs)")
    (place / _COMPLETE).touch()


def _copy_hashed(source: Path, target: Path) -> str:
    digest = hashlib.sha256()
    with source.open("rb") as reading, target.open("wb") as writing:
        while piece := reading.read(_PIECE_BYTES):
            digest.update(piece)
            writing.write(piece)
    return digest.hexdigest()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process as an exception does, so that half a copy is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

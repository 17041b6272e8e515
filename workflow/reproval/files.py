"""Reading and writing of files that other stages rely on: whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import ValidationError

from reproval.records import Record

R = TypeVar("R", bound=Record)

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""What a file system without locks says to one that asks for a lock."""


class RecordError(Exception):
    """A record could not be read: missing, cut off, of another version, or written by hand."""


def mend_of(error: OSError, place: Path) -> str:
    """What a command says that ends because of a file; `place` stands for one that the error does not name."""
    return f"{error.filename or place}: {error.strerror or error}; mend that (make room, permit it), and start again"


@contextmanager
def atomic(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on success it takes the name `path`, on failure it is removed.

    `mode` is "w" (text, UTF-8) or "wb". The file is synced before it is renamed, so that a crash leaves the old
    content or the new, never half of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        with part.open(mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def part_of(path: Path) -> Path:
    """A name beside `path` that nobody else has, for what takes that name when it is whole.

    Not `tempfile`'s: what that makes is private, and to learn the umask it would have to be changed for all threads.
    """
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")


def write_record(path: Path, record: Record) -> None:
    """Write a record as indented JSON, atomically. Raises OSError."""
    with atomic(path) as stream:
        stream.write(record.model_dump_json(indent=1) + "\n")


def read_record(path: Path, kind: type[R]) -> R:
    """Read a record of the given kind. Raises RecordError with the file, the first key that is wrong and the mend."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror}); run the stage that writes it") from error
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "(the whole file)"
        raise RecordError(
            f"{path}: {key}: {first['msg']}; it was written by another version of reproval or by hand. "
            "Delete it and run its stage again"
        ) from error


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, read in pieces. Raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value in one canonical form: sorted keys, no spaces, UTF-8.

    Raises TypeError for what JSON cannot hold, and ValueError for NaN, so that a key never depends on a repr.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return sha256_bytes(text.encode("utf-8"))


def file_time(folder: Path) -> float | None:
    """The time by the clock that stamps files in `folder`, which on a shared file system is the server's.

    None if nothing can be written there.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock-") as stream:
            stream.write(b".")
            stream.flush()
            return Path(stream.name).stat().st_mtime
    except OSError:
        return None

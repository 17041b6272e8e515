"""Finished requests of an interrupted evaluation, kept on disk.

One file for one key; the key says everything that decides an answer besides the request (model, revision, settings,
environment). The key is in the file's name, in its first line, and in every digest, so an answer of one model cannot
be found under another.

The file is only appended to. A line is `CRC32 DIGEST JSON`; a line that a crash cut off fails its check sum, and the
file is cut back to the last whole line when it is opened again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

FORMAT = 1


class RequestCacheError(Exception):
    """The cache cannot be used: another process has it, or the file is not one."""


class RequestCache:
    """Answers by request, for one key. A value is anything that JSON can hold; floats come back bit for bit."""

    def __init__(self, folder: Path, key: str) -> None:
        """Open or make the file of `key` in `folder`. Raises RequestCacheError and OSError."""
        self._key = hashlib.sha256(key.encode("utf-8")).digest()
        self.path = folder / f"requests-{self._key.hex()[:32]}.jsonl"
        self._answers: dict[bytes, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._stream = self.path.open("a+b")
        try:
            self._lock()
            self._read()
        except BaseException:
            self._stream.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise RequestCacheError(
                    f"{self.path}: another process is writing it. Wait until that evaluation has ended"
                ) from error
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise  # Some cluster file systems have no locks; there the workflow's own lock has to do.

    def _read(self) -> None:
        header = self._line("header", {"format": FORMAT, "key": self._key.hex()})
        self._stream.seek(0)
        first = self._stream.readline()
        if not first.endswith(b"\n"):
            self._stream.truncate(0)
            self._stream.write(header)
            self._stream.flush()
            return
        if first != header:
            raise RequestCacheError(
                f"{self.path}: the first line is not that of a request cache of this key and format {FORMAT}. Delete it"
            )
        whole = self._stream.tell()
        for line in self._stream:
            parsed = self._parse(line)
            if parsed is None:
                break
            digest, value = parsed
            self._answers[digest] = value
            whole += len(line)
        self._stream.truncate(whole)
        self._stream.seek(0, os.SEEK_END)

    @staticmethod
    def _line(name: str, value: Any) -> bytes:
        body = f"{name} {json.dumps(value, ensure_ascii=True)}".encode("ascii")
        return b"%08x %s\n" % (zlib.crc32(body), body)

    @staticmethod
    def _parse(line: bytes) -> tuple[bytes, Any] | None:
        checksum, _, body = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(body):
            return None
        name, _, value = body.partition(b" ")
        return bytes.fromhex(name.decode("ascii")), json.loads(value)

    def digest(self, kind: str, *parts: bytes) -> bytes:
        """16 bytes that stand for a request under this cache's key."""
        return request_digest(kind, *parts, key=self._key)

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, digest: bytes) -> Any:
        """The answer, or None."""
        return self._answers.get(digest)

    def put(self, digest: bytes, value: Any) -> None:
        """Keep an answer. It is on disk after `flush`."""
        self._answers[digest] = value
        self._stream.write(self._line(digest.hex(), value))

    def flush(self) -> None:
        """Hand what was put to the operating system: it survives the death of this process."""
        self._stream.flush()

    def close(self) -> None:
        if not self._stream.closed:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()


def request_digest(kind: str, *parts: bytes, key: bytes = b"") -> bytes:
    """16 bytes that stand for a request. Parts are length-prefixed, so that no two lists of parts look alike."""
    state = hashlib.blake2b(digest_size=16, key=key)
    for part in (kind.encode("ascii"), *parts):
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()

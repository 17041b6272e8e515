"""Finished requests of an interrupted evaluation, kept on disk.

One key says everything that decides an answer besides the request (model, revision, settings, environment). It is in
the names of the files, in their first lines, and in every digest, so an answer of one model cannot be found under
another.

Every process that writes has a file of its own and reads those of all others. So nothing is locked, and a lock that a
dead node left on a network file system cannot keep its successor out. A file is only appended to. A line is
`CRC32 DIGEST JSON`; one that a crash cut off fails its check sum, and reading ends before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
import zlib
from datetime import UTC, datetime
from io import BufferedWriter
from pathlib import Path
from typing import Any

FORMAT = 1
SYNC_S = 5.0
"""What a node that dies may cost; a process that dies costs nothing that was flushed."""


class RequestCacheError(Exception):
    """A file of the cache is not one."""


class RequestCache:
    """Answers by request, for one key. A value is anything that JSON can hold; floats come back bit for bit."""

    def __init__(self, folder: Path, key: str) -> None:
        """Read what `folder` has under `key`. Raises RequestCacheError and OSError."""
        self._key = hashlib.sha256(key.encode("utf-8")).digest()
        self._answers: dict[bytes, Any] = {}
        self._header = self._line("header", {"format": FORMAT, "key": self._key.hex()})
        name = f"requests-{self._key.hex()[:32]}"
        # The time in a name puts later files behind earlier ones: what was answered again counts as it was last.
        for path in sorted(folder.glob(f"{name}*.jsonl")):
            self._read(path)
        begun = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        self.path = folder / f"{name}.{begun}-{uuid.uuid4().hex[:8]}.jsonl"
        self._stream: BufferedWriter | None = None
        self._synced = time.monotonic()

    def _read(self, path: Path) -> None:
        with path.open("rb") as stream:
            first = stream.readline()
            if not first.endswith(b"\n"):  # Its writer died, or is, at its first line.
                return
            if first != self._header:
                raise RequestCacheError(
                    f"{path}: the first line is not that of a request cache of this key and format {FORMAT}. Delete it"
                )
            for line in stream:
                parsed = self._parse(line)
                if parsed is None:
                    return
                self._answers[parsed[0]] = parsed[1]

    @staticmethod
    def _line(name: str, value: Any) -> bytes:
        body = f"{name} {json.dumps(value)}".encode()
        return b"%08x %s\n" % (zlib.crc32(body), body)

    @staticmethod
    def _parse(line: bytes) -> tuple[bytes, Any] | None:
        """Digest and value of a whole line, or None."""
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
        if self._stream is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self.path.open("xb")
            self._stream.write(self._header)
        self._stream.write(self._line(digest.hex(), value))

    def flush(self) -> None:
        """Hand what was put to the operating system, where it survives this process, and every SYNC_S to the disk."""
        if self._stream is None:
            return
        self._stream.flush()
        if time.monotonic() - self._synced > SYNC_S:
            os.fsync(self._stream.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        """Put everything on the disk. Nothing can be put afterwards."""
        if self._stream is not None and not self._stream.closed:
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

"""What a child tells while it runs: events on a pipe, and its log, both in bounded memory whatever it writes."""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reproval import failures

Event = dict[str, Any]

LONGEST_EVENT_BYTES = 2**20


class Lines:
    """JSON objects, one a line, from a pipe that does not block. What is no JSON object is passed over."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.rest = b""
        self.ended = False

    def read(self) -> Iterator[Event]:
        while not self.ended:
            try:
                data = os.read(self.fd, 65536)
            except BlockingIOError:
                return
            self.ended = not data
            *whole, self.rest = (self.rest + data).split(b"\n")
            if len(self.rest) > LONGEST_EVENT_BYTES:
                self.rest = b""
            for line in whole:
                with contextlib.suppress(ValueError, RecursionError):
                    if isinstance(record := json.loads(line), dict):
                        yield record


class Tail:
    """Reads a growing log from `offset` on, and keeps of it what a failure can be told by, in bounded memory."""

    PIECE_BYTES = 2**20
    LONGEST_LINE_BYTES = 2**16
    FIRST, LAST, END = 500, 1500, 100

    def __init__(self, path: Path, offset: int) -> None:
        self._stream = path.open("rb", buffering=0)
        self._stream.seek(offset)
        self._texts = [text.encode() for text in failures.patterns().texts()]
        self._rest = b""
        self._number = 0
        self._first: list[tuple[int, str]] = []
        self._last: deque[tuple[int, str]] = deque(maxlen=self.LAST)
        self._end: deque[tuple[int, str]] = deque(maxlen=self.END)

    def __enter__(self) -> Tail:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def read(self) -> Iterator[str | None]:
        """The new lines that hold one of the texts, and None for a piece of log without any; of 16 pieces at most."""
        for _ in range(16):
            data = self._stream.read(self.PIECE_BYTES)
            if not data:
                return
            # Progress bars overwrite their line by carriage returns.
            piece = (self._rest + data).replace(b"\r", b"\n")
            cut = piece.rfind(b"\n") + 1
            if cut == 0 and len(piece) > self.LONGEST_LINE_BYTES:
                cut = len(piece)
            piece, self._rest = piece[:cut], piece[cut:]
            yield from self._take(piece)

    def _take(self, piece: bytes) -> Iterator[str | None]:
        if not any(text in piece for text in self._texts):
            count = piece.count(b"\n")
            last = piece.rsplit(b"\n", self.END + 1)[1:] if count > self.END else piece.split(b"\n")
            self._number += count + 1
            for index, line in enumerate(last):
                self._keep_end(self._number - len(last) + index, line)
            yield None
            return
        for line in piece.split(b"\n"):
            self._number += 1
            self._keep_end(self._number, line)
            if any(text in line for text in self._texts):
                entry = (self._number, self._text(line))
                if len(self._first) < self.FIRST:
                    self._first.append(entry)
                else:
                    self._last.append(entry)
                yield entry[1]

    def _keep_end(self, number: int, line: bytes) -> None:
        if line.strip():
            self._end.append((number, self._text(line)))

    @staticmethod
    def _text(line: bytes) -> str:
        return line[:4000].decode("utf-8", "replace")

    def lines(self) -> list[str]:
        """What was kept: the lines with a text, and the last of all lines, in their order."""
        if self._rest:
            list(self._take(self._rest))
            self._rest = b""
        kept = dict(self._first) | dict(self._last) | dict(self._end)
        return [kept[number] for number in sorted(kept)]

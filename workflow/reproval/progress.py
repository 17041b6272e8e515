"""Progress of one evaluation: few lines on stderr, never going back, and a file that `snakemake status` reads."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TextIO

from reproval.files import write_record
from reproval.records import JobProgress

# Shorter than this, an estimate tells more of the engine's warm-up than of the work.
_FIRST_ESTIMATE_S = 10.0
_WINDOW_S = 120.0

WRITE_S = 10.0
"""A running job writes its file as often, whether anything happened or not: `status` takes silence for its end."""
FILE = "progress.json"
ENGINE_START = "engine start"


class Progress:
    """Prints a line such as `[run] 3/8 tasks, 41 %, 1:20 left` for the events of the engine child.

    `progress` events carry `done` and `total`, tokens over all tasks; `unit_done` events count tasks. `kept` tasks of
    the `tasks` are done from an earlier run. Nothing is printed within `every_s` seconds of the last line, nor if
    nothing changed since.
    """

    def __init__(
        self,
        run: str,
        tasks: int,
        kept: int = 0,
        *,
        every_s: float = 5.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._tasks, self._finished = run, tasks, kept
        self._every_s, self._stream, self._clock = every_s, stream, clock
        self._share = 0.0
        self._doing = ENGINE_START
        self._points: deque[tuple[float, float]] = deque()
        self._printed_at = float("-inf")
        self._printed: tuple[int, int] | None = None

    def event(self, event: dict[str, Any]) -> None:
        """Take in one event of the child; events of other kinds change nothing."""
        now = self._clock()
        if event.get("event") == "unit_done":
            self._finished = min(self._finished + 1, self._tasks)
        elif event.get("event") == "unit_started":
            self._doing = str(event.get("unit"))
            return
        elif event.get("event") == "progress":
            done, total = event.get("done"), event.get("total")
            if not isinstance(done, int | float) or not isinstance(total, int | float) or total <= 0:
                return
            self._share = max(self._share, min(done / total, 1.0))
            self._points.append((now, self._share))
            while len(self._points) > 2 and now - self._points[1][0] > _WINDOW_S:
                self._points.popleft()
        elif event.get("event") != "done":
            return
        # The last task always has its line.
        if now - self._printed_at >= self._every_s or self._finished == self._tasks:
            self._print(now)

    def state(self) -> dict[str, Any]:
        """The fields of JobProgress that tell how far it is."""
        return {
            "doing": self._doing,
            "tasks": self._tasks,
            "tasks_done": self._finished,
            "share": self._share,
            "left_s": self._left_s(self._clock()),
        }

    def _print(self, now: float) -> None:
        state = (self._finished, int(100 * self._share))
        if state == self._printed:
            return
        text = f"[{self._run}] {state[0]}/{self._tasks} tasks, {state[1]} %"
        left = self._left_s(now)
        if left is not None:
            text += f", {_minutes(left)} left"
        self._printed, self._printed_at = state, now
        print(text, file=self._stream or sys.stderr, flush=True)

    def _left_s(self, now: float) -> float | None:
        """Seconds left at the pace of the last two minutes; None as long as that says little, and at the end."""
        if not self._points or self._share >= 1.0:
            return None
        then, share = self._points[0]
        if now - then < _FIRST_ESTIMATE_S or self._share <= share:
            return None
        return (1.0 - self._share) * (now - then) / (self._share - share)


class ProgressFile:
    """Keeps a JobProgress on disk; `follow` names the Progress that it is taken from."""

    def __init__(self, path: Path, tasks: int, every_s: float = WRITE_S) -> None:
        self._path, self._every_s = path, every_s
        self._begin = datetime.now(UTC).isoformat(timespec="seconds")
        self._followed = Progress("", tasks)
        self._ended = threading.Event()

    def follow(self, progress: Progress) -> None:
        self._followed = progress

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Write the file now, every few seconds, and at the end with how it ended.

        Nothing that depends on it is computed, so a disk that is full for a moment ends no evaluation.
        """
        self._write("running")
        thread = threading.Thread(target=self._loop, name="progress", daemon=True)
        thread.start()
        try:
            yield
        except BaseException as error:
            self._stop(thread)
            self._write("failed", str(error) or type(error).__name__)
            raise
        self._stop(thread)
        self._write("finished")

    def _stop(self, thread: threading.Thread) -> None:
        self._ended.set()
        thread.join()

    def _loop(self) -> None:
        while not self._ended.wait(self._every_s):
            self._write("running")

    def _write(self, state: Literal["running", "finished", "failed"], message: str | None = None) -> None:
        job = os.environ.get("SLURM_JOB_ID")
        record = JobProgress(state=state, begin=self._begin, slurm_job=job, message=message, **self._followed.state())
        try:
            write_record(self._path, record)
        except OSError as error:
            print(f"{self._path}: {error.strerror}; `snakemake status` will not know of it", file=sys.stderr)


def _minutes(seconds: float) -> str:
    whole = max(1, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"

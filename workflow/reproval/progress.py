"""Progress of one evaluation on stderr: few lines, never going back, with the time left as soon as it can be told."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TextIO

# Shorter than this, an estimate tells more of the engine's warm-up than of the work.
_FIRST_ESTIMATE_S = 10.0
_WINDOW_S = 120.0


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
        self._points: deque[tuple[float, float]] = deque()
        self._printed_at = float("-inf")
        self._printed: tuple[int, int] | None = None

    def event(self, event: dict[str, Any]) -> None:
        """Take in one event of the child; events of other kinds change nothing."""
        now = self._clock()
        if event.get("event") == "unit_done":
            self._finished = min(self._finished + 1, self._tasks)
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


def _minutes(seconds: float) -> str:
    whole = max(1, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"

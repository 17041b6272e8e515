"""Trying the rungs of a plan, one after the other, until the engine finishes; a neighbour's GPU is waited for."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from reproval import failures
from reproval.records import Attempt, EngineSettings, Rung
from reproval.resources import BUSY_S
from reproval.supervise import ChildOutcome


@dataclass(frozen=True)
class BusyPolicy:
    """How to wait for a GPU that a neighbour holds: `first_s`, then twice as long each time, `limit_s` in all."""

    first_s: float = 15.0
    longest_s: float = 240.0
    limit_s: float = BUSY_S

    def waits(self) -> Iterator[float]:
        """The waits in seconds, one after the other, until their sum is `limit_s`."""
        left, wait = self.limit_s, self.first_s
        while left > 0:
            yield min(wait, left)
            left -= wait
            wait = min(2 * wait, self.longest_s)


def climb(
    ladder: Sequence[Rung],
    start_child: Callable[[EngineSettings, int], ChildOutcome],
    *,
    first: int = 0,
    on_cpu: bool = False,
    busy: BusyPolicy = BusyPolicy(),
    holders: Callable[[], Iterable[str]] = tuple,
    wait: Callable[[float], None] = time.sleep,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> tuple[list[Attempt], bool]:
    """Try the rungs from `first` on until the engine finishes; every attempt, and whether one finished.

    `start_child(settings, rung)` runs one attempt. After a failure of memory the next rung is the first later one that
    differs from the failed settings in what helps against its class (failures.yaml, `answers`); others are passed over.
    A failure that is not of memory, a deadline and an interruption end it. A GPU that a neighbour holds is waited for
    on the same rung, as `busy` says; `holders` names who holds it, for the message.
    """
    attempts: list[Attempt] = []
    rung, waits = first, busy.waits()
    while rung < len(ladder):
        settings = ladder[rung].settings
        outcome = start_child(settings, rung)
        attempts.append(attempt(rung, settings, outcome))
        if outcome.finished:
            return attempts, True
        failure = outcome.failure
        if failure in (None, "not_memory", "deadline", "interrupted"):
            return attempts, False
        if failure == "gpu_busy":
            who = "; ".join(holders()) or "NVML does not show who"
            pause = next(waits, None)
            if pause is None:
                text = f"{outcome.message}; held by: {who}; waited {busy.limit_s:g} s for it"
                attempts[-1] = attempts[-1].model_copy(update={"message": text})
                say(f"the GPU is still in use, giving up: {text}")
                return attempts, False
            say(f"the GPU is in use: {outcome.message}; held by: {who}; trying again in {pause:g} s")
            wait(pause)
            continue
        later = range(rung + 1, len(ladder))
        helps = (n for n in later if failures.answers(failure, settings, ladder[n].settings, on_cpu=on_cpu))
        step = next(helps, None)
        if step is None:
            say(f"rung {rung} failed ({failure}: {outcome.message}), and no later rung answers that")
            return attempts, False
        changes = ", ".join(
            f"{name} {before} -> {after}"
            for name, before in settings
            if (after := getattr(ladder[step].settings, name)) != before
        )
        say(f"rung {rung} failed ({failure}: {outcome.message}); going on with rung {step}: {changes}")
        rung = step
    return attempts, False


def attempt(rung: int, settings: EngineSettings, outcome: ChildOutcome) -> Attempt:
    """The record of an attempt that ended."""
    ending = "finished" if outcome.finished else "interrupted" if outcome.failure == "interrupted" else "failed"
    return Attempt(
        rung=rung,
        settings=settings,
        outcome=cast(Any, ending),
        failure=outcome.failure,
        message=outcome.message,
        begin=outcome.begin,
        duration_s=outcome.duration_s,
        gpu_peak_bytes=outcome.gpu_peak_bytes,
        host_peak_bytes=outcome.host_peak_bytes,
        phases=list(outcome.phases),
    )


def cut_off(rung: int, settings: EngineSettings) -> Attempt:
    """The record of an attempt that begins now, as it is to be read if nobody is left to tell how it ended."""
    return Attempt(
        rung=rung,
        settings=settings,
        outcome="interrupted",
        failure="interrupted",
        message="its job was killed, or the node went down; how long it ran is not known",
        begin=datetime.now(UTC).isoformat(timespec="milliseconds"),
        duration_s=0,
        gpu_peak_bytes=None,
        host_peak_bytes=0,
        phases=[],
    )

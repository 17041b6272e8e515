"""Telling failures of the engine apart, by its log and by how it ended; the texts are data in failures.yaml.

Pure: nothing here starts, waits or reads a log by itself.
"""

from __future__ import annotations

import re
import signal as signals
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import yaml
from pydantic import Field

from reproval.records import Dtype, EngineSettings, FailureClass, Part, Phase

PHASES: tuple[Phase, ...] = get_args(Phase)
DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

# vLLM puts "(EngineCore pid=123) ERROR 11-22 23:58:43 [core.py:1510] " before every line of a traceback, PyTorch's C++
# "[rank0]:[E1123 06:30:45.150985709 shim_common.cpp:523] ", and either may follow a progress bar, which ends no line.
_PREFIX = re.compile(
    r"^\s*(?:.*\[[^\[\]]*(?:it/s|s/it)\]\s*)?(?:\([^()]* pid=\d+\)\s*)?(?:\[rank\d+\]:\s*)?"
    r"(?:\[[EWIF]\d{4} [\d:.]+ [^\]]*\]\s*|[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)? \[[^\]]*\]\s*)?"
)
_EXCEPTION = re.compile(
    r"^(?:[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt|OutOfResources|Failure)\b(?::|$)"
    r"|Fatal Python error|!+ Segfault)"
)

Change = Literal["up", "down", "on", "changed", "smaller"]


class Marker(Part):
    text: str
    phase: Phase
    after: Phase = "start"


class Cause(Part):
    text: str
    failure: FailureClass
    also: str | None = None
    unless: str | None = None

    def __call__(self, line: str) -> bool:
        return (
            self.text in line
            and (self.also is None or self.also in line)
            and (self.unless is None or self.unless not in line)
        )


class Patterns(Part):
    """The content of failures.yaml."""

    markers: list[Marker]
    causes: list[Cause]
    out_of_memory: list[str]
    frames: list[Cause]
    out_of_memory_by_phase: dict[Phase, FailureClass]
    ambiguous: list[str]
    fatal: list[str]
    vanished: list[str]
    answers: dict[str, dict[str, Change]] = Field(
        description="Failure class -> setting -> the change from the failed rung that can help."
    )

    def texts(self) -> list[str]:
        """Every text that says something about a failure or a phase."""
        lines = [m.text for m in self.markers] + [c.text for c in self.causes + self.frames]
        return [*lines, *self.out_of_memory, *self.ambiguous, *self.fatal, *self.vanished, _TRACEBACK]


_TRACEBACK = "Traceback (most recent call last)"


@cache
def patterns() -> Patterns:
    """failures.yaml, read once."""
    text = Path(__file__).with_name("failures.yaml").read_text(encoding="utf-8")
    return Patterns.model_validate(yaml.safe_load(text))


def phase_after(line: str, phase: Phase) -> Phase:
    """The phase that the engine is in once it has logged `line` while in `phase`; never an earlier one."""
    order = PHASES.index
    for marker in patterns().markers:
        if marker.text in line and order(marker.phase) > order(phase) >= order(marker.after):
            return marker.phase
    return phase


def is_fatal(line: str) -> bool:
    """Whether the engine is gone once this is in the log, whatever its parent makes of it."""
    return any(text in line for text in patterns().fatal)


def is_ambiguous(line: str) -> bool:
    """Whether a parent says here that a child of its own failed, and not why."""
    return any(text in line for text in patterns().ambiguous)


def message_of(line: str) -> str:
    """A line of the log without vLLM's prefix, at most 500 characters."""
    return _PREFIX.sub("", line.strip(), count=1)[:500]


def classify(
    log_lines: Iterable[str],
    returncode: int | None,
    signal: int | None,
    cgroup_oom: bool,
    phase: Phase,
) -> tuple[FailureClass, str]:
    """The class of a failure and the line that decided it.

    `log_lines` are the lines of one attempt in their order; lines without any of `Patterns.texts` may have been left
    out, the last ones not. `returncode` is the child's exit code (None if a signal ended it), `signal` that signal's
    number, `cgroup_oom` whether the kernel killed for memory in this control group meanwhile, and `phase` how far the
    attempt came, by log and events.

    The text of a cause decides before the way the child ended, since parents write nothing that names one.
    """
    known = patterns()
    lines = list(log_lines)
    if (cause := _cause(lines, phase)) is not None:
        return cause
    killed = signal == signals.SIGKILL or returncode == 128 + signals.SIGKILL
    vanished = any(text in line for line in lines for text in known.vanished)
    last = _last_words(lines)
    if cgroup_oom:
        return "host_memory", "the kernel killed a process of this job for memory (oom_kill in its control group)"
    if (killed or vanished) and (last is None or is_ambiguous(last)):
        who = "the child was" if killed else "the engine's process was"
        return "host_memory", f"{who} killed without a traceback, as the kernel does when the host's memory ends"
    if signal in (signals.SIGTERM, signals.SIGINT, signals.SIGHUP):
        return "interrupted", f"ended by {signals.Signals(signal).name} from outside"
    how = f"killed by {signals.Signals(signal).name}" if signal else f"exit code {returncode}"
    return "not_memory", f"{last} ({how})" if last else f"{how}, and nothing in the log says why"


def _cause(lines: list[str], phase: Phase) -> tuple[FailureClass, str] | None:
    """What the log names as the cause, and its line.

    The last one wins: an engine may go on after an earlier one, and after the one that ended it come only the lines of
    parents, which repeat it. What was logged before the tasks began did not end an engine that reached them.
    """
    known = patterns()
    cause: tuple[FailureClass, str] | None = None
    frame: FailureClass | None = None
    now: Phase = "start"
    for line in lines:
        before, now = now, phase_after(line, now)
        if now != before and now == "tasks":
            cause = None
        if _TRACEBACK in line:
            frame = None
        frame = next((candidate.failure for candidate in known.frames if candidate(line)), frame)
        if cause is not None and is_ambiguous(line):
            continue
        if any(text in line for text in known.out_of_memory):
            # The frames tell more than how far the log had come; without them it may be the collapse after the cause.
            if frame is not None:
                cause = (frame, message_of(line))
            elif cause is None:
                reached = phase if phase == "tasks" else now
                cause = (known.out_of_memory_by_phase[reached], message_of(line))
        for candidate in known.causes:
            if candidate(line):
                cause = (candidate.failure, message_of(line))
    return cause


def _last_words(lines: list[str]) -> str | None:
    """The last exception that a process wrote at its end, one that names something before one that does not."""
    written = [message_of(line) for line in lines]
    exceptions = [line for line in written if _EXCEPTION.match(line)]
    clear = [line for line in exceptions if not is_ambiguous(line)]
    return next(iter((clear or exceptions)[-1:]), None)


def answers(failure: FailureClass, failed: EngineSettings, rung: EngineSettings, *, on_cpu: bool) -> bool:
    """Whether `rung` differs from the settings that `failed` in a way that can help against `failure`."""
    name: str = failure
    if failure == "host_memory" and on_cpu:
        name = "host_memory_on_cpu"
    if failure == "kv_below_one_request" and failed.kv_cache_memory_bytes is not None:
        name = "kv_below_one_request_of_given_cache"
    if failure == "graph_capture" and failed.enforce_eager:
        name = "running"  # There were no graphs: memory ended while the engine warmed up.
    return any(
        _changed(change, getattr(failed, setting), getattr(rung, setting))
        for setting, change in patterns().answers.get(name, {}).items()
    )


def _changed(change: Change, before: object, after: object) -> bool:
    if change == "on":
        return not before and bool(after)
    if change == "changed":
        return before != after
    if change == "smaller":
        return DTYPE_BYTES[after] < DTYPE_BYTES[before]  # type: ignore[index]
    if not isinstance(before, int | float) or not isinstance(after, int | float):
        return False
    return after > before if change == "up" else after < before

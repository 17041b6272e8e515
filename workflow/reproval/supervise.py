"""Running the engine as a child that always ends, with everything it started.

The supervisor never touches CUDA, so a failed engine can be replaced in the same job. Between it and the child stands
the guardian (guardian.py), which is why no way of ending the supervisor, kill -9 included, leaves an engine behind.
docs/supervision.md says why it is done so.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reproval import failures, guardian, memory
from reproval.records import FailureClass, Phase, PhasePeak
from reproval.supervise_output import Event, Lines, Tail

RUN_VARIABLE = "REPROVAL_RUN"
EVENTS_VARIABLE = "REPROVAL_EVENTS_FD"

_TICK_S = 0.1

# A terminal, a shell and a workflow engine may each pass on the same Ctrl-C; a later signal is a second request.
_SAME_REQUEST_S = 1.0


@dataclass(frozen=True)
class Deadlines:
    """How long the child may take; None is for ever."""

    after_done_s: float = 30.0  # from its `done` to its end; stock lm_eval was seen not to exit on a GPU
    grace_s: float = 20.0  # from SIGTERM to SIGKILL; below Slurm's KillWait, which is 30 s unless a site changed it
    # From its `failed`, or from the log's word that the engine is dead: vLLM 0.32 then may wait for it for ever.
    after_death_s: float = 30.0
    linger_s: float = 2.0  # what its own children get to end by themselves after it
    idle_s: float | None = None  # with neither a line of log nor an event


@dataclass(frozen=True)
class ChildOutcome:
    """How one attempt went. `finished` is true exactly if the child said `done`, however it ended afterwards."""

    finished: bool
    returncode: int | None  # None if a signal ended it, or if it never ran
    signal: int | None  # the signal that ended it
    failure: FailureClass | None
    message: str | None  # the line that decided `failure`; with a finished child, what was odd about its end
    interrupted_by: int | None  # the signal that asked the supervisor to stop
    phases: tuple[PhasePeak, ...]
    trace: memory.Trace
    begin: str  # UTC, ISO 8601
    duration_s: float
    gpu_peak_bytes: int | None
    host_peak_bytes: int


def run_child(
    argv: Sequence[str],
    env: Mapping[str, str],
    log_path: Path,
    on_event: Callable[[Event], None],
    *,
    gpus: int = 0,
    deadlines: Deadlines = Deadlines(),
    interval_s: float = 0.03,
) -> ChildOutcome:
    """Run `argv` with the environment `env` to its end, and leave nothing of it behind.

    The child's output is appended to `log_path`. It finds the number of a file descriptor in REPROVAL_EVENTS_FD and
    writes its events there, one JSON object a line, each with a key `event`: `phase` (phase), `unit_started`
    (unit), `progress`, `unit_done`, `engine`, `done`, `failed` (message; its traceback is in the log). `on_event`
    is called with each of them, in this thread; if it raises, the child is ended and the exception goes on. Lines
    that are no events are passed over.

    SIGTERM, SIGINT and SIGHUP to this process, if this is its main thread, are answered by SIGTERM to the child and all
    that it started and, after `deadlines.grace_s` or a second signal, by SIGKILL; the outcome is then `interrupted`.
    """
    return _Run(argv, env, log_path, on_event, gpus, deadlines, interval_s).run()


class _Run:
    """The state of one run_child."""

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        log_path: Path,
        on_event: Callable[[Event], None],
        gpus: int,
        deadlines: Deadlines,
        interval_s: float,
    ) -> None:
        self.argv, self.log_path, self.on_event = list(argv), log_path, on_event
        self.gpus, self.deadlines, self.interval_s = gpus, deadlines, interval_s
        self.marker = uuid.uuid4().hex
        self.env = {
            "PYTHONUNBUFFERED": "1",  # else the last lines before a crash stay in the child's buffer
            "PYTHONFAULTHANDLER": "1",  # else a segmentation fault is as silent as a SIGKILL
            **env,
            RUN_VARIABLE: self.marker,
            "SPT_NOENV": "1",  # vLLM renames its processes; without this setproctitle overwrites the marker
        }
        self.phase: Phase = "start"
        self.done = False
        self.dead_at: float | None = None  # when the child, or the log, said that the engine is dead
        self.failed_message: str | None = None
        self.exit_code: int | None = None  # as subprocess gives it: negative for a signal
        self.refused: str | None = None
        self.interrupted_by: int | None = None
        self.interrupted_at = 0.0
        self.kill_now = False
        self.ended_for: str | None = None  # why the supervisor ended it
        self.kill_at: float | None = None

    def run(self) -> ChildOutcome:
        begin = datetime.now(UTC).isoformat(timespec="milliseconds")
        started = time.monotonic()
        oom_before = memory.oom_kills()
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        nvml = _gpus(self.gpus, self.env)
        with contextlib.ExitStack() as stack:
            if nvml is not None:
                stack.callback(nvml.close)
            selector = stack.enter_context(selectors.DefaultSelector())
            signals = stack.enter_context(_signals(self._interrupt))
            selector.register(signals, selectors.EVENT_READ)
            log = self.log_path.open("ab", buffering=0)
            stack.callback(log.close)
            tail = stack.enter_context(Tail(self.log_path, log.seek(0, os.SEEK_END)))
            events, events_child = os.pipe()
            stack.callback(os.close, events)
            status, status_guardian = os.pipe()
            stack.callback(os.close, status)
            control_guardian, self.control = os.pipe()
            self.env[EVENTS_VARIABLE] = str(events_child)
            guard = [str(fd) for fd in (control_guardian, status_guardian, events_child)]
            linger = str(self.deadlines.linger_s)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", guardian.__file__, *guard, linger, "--", *self.argv],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(control_guardian, status_guardian, events_child),
                start_new_session=True,
            )
            # Runs whatever happens below: closing the control pipe tells the guardian to kill everything.
            stack.callback(self._clear_up, process)
            stack.callback(os.close, self.control)
            for fd in (control_guardian, status_guardian, events_child):
                os.close(fd)
            sampler = memory.Sampler(process.pid, nvml, self.interval_s)
            stack.callback(sampler.stop)
            self._watch(selector, signals, events, status, tail, sampler)
            while self._read_log(tail, sampler):
                pass
            phases = sampler.stop()
        return self._outcome(begin, time.monotonic() - started, tail, sampler.trace, phases, oom_before)

    def _watch(
        self,
        selector: selectors.BaseSelector,
        signals: int,
        events: int,
        status: int,
        tail: Tail,
        sampler: memory.Sampler,
    ) -> None:
        """Follow the child until the guardian has nothing left to guard."""
        lines: dict[int, Lines] = {}
        for fd in (events, status):
            os.set_blocking(fd, False)
            selector.register(fd, selectors.EVENT_READ)
            lines[fd] = Lines(fd)
        alive = time.monotonic()
        done_at: float | None = None
        guarded = True
        while guarded:
            for key, _ in selector.select(_TICK_S):
                fd = key.fd
                if fd == signals:
                    with contextlib.suppress(BlockingIOError):
                        os.read(signals, 64)
                    continue
                for record in lines[fd].read():
                    if fd == status:
                        self._status(record)
                    elif isinstance(record.get("event"), str):
                        alive = time.monotonic()
                        self._event(record, sampler)
                if lines[fd].ended:
                    selector.unregister(fd)
                    guarded = guarded and fd != status
            if self._read_log(tail, sampler):
                alive = time.monotonic()
            now = time.monotonic()
            if self.done and done_at is None:
                done_at = now
            self._enforce(now, alive, done_at)
        for record in lines[events].read():
            if isinstance(record.get("event"), str):
                self._event(record, sampler)

    def _status(self, record: Event) -> None:
        if "exited" in record:
            self.exit_code = record["exited"]
        elif "refused" in record:
            self.refused = record["refused"]
        elif "stuck" in record:
            print(f"processes {record['stuck']} did not end on SIGKILL", file=sys.stderr, flush=True)

    def _event(self, event: Event, sampler: memory.Sampler) -> None:
        name = event["event"]
        if name == "phase" and event.get("phase") in failures.PHASES:
            self._enter(event["phase"], sampler)
        elif name == "unit_started":
            self._enter("tasks", sampler, f"task:{event.get('unit', '')}")
        elif name == "done":
            self.done = True
            self._enter("end", sampler)
        elif name == "failed":
            self.failed_message = failures.message_of(str(event.get("message", "")))
            if self.dead_at is None:
                self.dead_at = time.monotonic()
        self.on_event(event)

    def _enter(self, phase: Phase, sampler: memory.Sampler, name: str | None = None) -> None:
        if failures.PHASES.index(phase) >= failures.PHASES.index(self.phase):
            self.phase = phase
            sampler.enter(name or phase)

    def _read_log(self, tail: Tail, sampler: memory.Sampler) -> bool:
        """Take in what was added to the log; whether anything was."""
        grown = False
        for line in tail.read():
            grown = True
            if line is None:
                continue
            if (phase := failures.phase_after(line, self.phase)) != self.phase:
                self._enter(phase, sampler)
            if self.dead_at is None and failures.is_fatal(line):
                self.dead_at = time.monotonic()
        return grown

    def _interrupt(self, number: int) -> None:
        now = time.monotonic()
        if self.interrupted_by is None:
            self.interrupted_by, self.interrupted_at = number, now
        elif now - self.interrupted_at > _SAME_REQUEST_S:
            self.kill_now = True

    def _enforce(self, now: float, alive: float, done_at: float | None) -> None:
        """End the child if it is time to."""
        limits = self.deadlines
        if self.kill_at is None and self.exit_code is None:
            if self.interrupted_by is not None:
                self.ended_for = f"interrupted by {signal.Signals(self.interrupted_by).name}"
            elif done_at is not None:
                if now - done_at > limits.after_done_s:
                    self.ended_for = f"did not exit within {limits.after_done_s:g} s after its last task, and was ended"
            elif self.dead_at is not None:
                if now - self.dead_at > limits.after_death_s:
                    self.ended_for = f"had failed {limits.after_death_s:g} s before"
            elif limits.idle_s is not None and now - alive > limits.idle_s:
                self.ended_for = f"gave no sign of life for {limits.idle_s:g} s"
            if self.ended_for is not None:
                self.kill_at = now + limits.grace_s
                self._order(b"T")
        if self.kill_now or (self.kill_at is not None and now >= self.kill_at):
            self.kill_at = float("inf")
            self.kill_now = False
            self._order(b"K")

    def _order(self, order: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self.control, order)

    def _clear_up(self, process: subprocess.Popen[bytes]) -> None:
        try:
            process.wait(guardian.STUCK_S + 5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.returncode != 0:
            # Somebody killed the guardian. The child died of that; what it started is found by its environment.
            kill_marked(self.marker)

    def _outcome(
        self,
        begin: str,
        duration_s: float,
        tail: Tail,
        trace: memory.Trace,
        phases: list[PhasePeak],
        oom_before: int,
    ) -> ChildOutcome:
        code = self.exit_code
        returncode = code if code is not None and code >= 0 else None
        signal_number = -code if code is not None and code < 0 else None
        failure: FailureClass | None = None
        message: str | None = None
        if self.done:
            message = self.ended_for
            if message is None and code != 0:
                message = f"ended with {_how(code)} after its last task"
        elif self.interrupted_by is not None:
            failure, message = "interrupted", self.ended_for or "interrupted"
        elif self.ended_for is not None and self.dead_at is None:
            failure, message = "deadline", self.ended_for
        elif self.refused is not None:
            failure, message = "not_memory", f"could not be started: {self.refused}"
        else:
            oom = memory.oom_kills() > oom_before
            if self.ended_for is not None:  # then the way it ended says nothing of why it failed
                failure, message = failures.classify(tail.lines(), None, None, oom, self.phase)
            else:
                failure, message = failures.classify(tail.lines(), returncode, signal_number, oom, self.phase)
            if failure == "not_memory":
                # A parent's exception repeats that its engine failed; the log may name why.
                if self.failed_message and not failures.is_ambiguous(self.failed_message):
                    message = self.failed_message
                elif code == 0:
                    message = "ended with exit code 0 before it had done its tasks"
                elif code is None:
                    message = "its guardian process was killed"
        gpu_peaks = [peak.gpu_peak_bytes for peak in phases if peak.gpu_peak_bytes is not None]
        return ChildOutcome(
            finished=self.done,
            returncode=returncode,
            signal=signal_number,
            failure=failure,
            message=message,
            interrupted_by=self.interrupted_by,
            phases=tuple(phases),
            trace=trace,
            begin=begin,
            duration_s=round(duration_s, 3),
            gpu_peak_bytes=max(gpu_peaks, default=None),
            host_peak_bytes=max((peak.host_peak_bytes for peak in phases), default=0),
        )


def _how(code: int | None) -> str:
    if code is None:
        return "no exit code"
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _gpus(count: int, env: Mapping[str, str]) -> memory.Gpus | None:
    if count == 0:
        return None
    try:
        return memory.Gpus(count, env)
    except RuntimeError as error:
        print(error, file=sys.stderr, flush=True)
        return None


@contextlib.contextmanager
def _signals(handle: Callable[[int], None]) -> Iterator[int]:
    """Call `handle` on SIGTERM, SIGINT and SIGHUP; gives a file descriptor that becomes readable then.

    A signal that is ignored, as SIGHUP is below nohup, stays so. Outside the main thread Python allows no handlers.
    """
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    before: dict[int, Any] = {}

    def handler(number: int, _frame: object) -> None:
        handle(number)
        with contextlib.suppress(BlockingIOError):
            os.write(writer, b"s")

    number: int
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                with contextlib.suppress(ValueError):
                    before[number] = signal.signal(number, handler)
        yield reader
    finally:
        for number, old in before.items():
            signal.signal(number, old)
        os.close(reader)
        os.close(writer)


def kill_marked(marker: str, deadline_s: float = 10.0) -> None:
    """SIGKILL every process whose environment carries REPROVAL_RUN=`marker`, until there is none."""
    end = time.monotonic() + deadline_s
    while (found := marked(marker)) and time.monotonic() < end:
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def marked(marker: str) -> list[int]:
    """Processes of this user, zombies apart, whose environment at their start carried REPROVAL_RUN=`marker`."""
    wanted = f"{RUN_VARIABLE}={marker}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found

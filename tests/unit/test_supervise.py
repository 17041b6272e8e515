"""The engine child always ends, with everything it started.

All processes here are real; they are small, and found by a variable in their environment or by their process id.
"""

from __future__ import annotations

import io
import os
import resource
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reproval import supervise
from reproval.progress import Progress
from reproval.supervise import ChildOutcome, Deadlines, run_child

QUICK = Deadlines(after_done_s=0.3, grace_s=0.3, linger_s=0.1)

# What every child begins with. `offspring` starts the descendants that are hard to find: in another session, orphaned
# by a parent that ended at once, and with an empty environment; their process ids go to $PIDS.
PRELUDE = """
import json, os, signal, subprocess, sys, time
def event(name, **more):
    os.write(int(os.environ["REPROVAL_EVENTS_FD"]), json.dumps({"event": name, **more}).encode() + b"\\n")
def offspring():
    forever = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    same = subprocess.Popen([sys.executable, "-S", "-c", forever])
    session = subprocess.Popen([sys.executable, "-S", "-c", forever], start_new_session=True)
    script = (
        "import os, subprocess, sys;"
        f"command = [sys.executable, '-S', '-c', {forever!r}];"
        "p = subprocess.Popen(command, start_new_session=True, env={}, stdout=subprocess.DEVNULL);"
        "print(p.pid)"
    )
    orphan = subprocess.run([sys.executable, "-S", "-c", script], stdout=subprocess.PIPE, text=True).stdout
    with open(os.environ["PIDS"], "w") as stream:
        stream.write(f"{os.getpid()} {os.getppid()} {same.pid} {session.pid} {orphan}")
"""

DRIVER = """
import os, sys
from pathlib import Path
from reproval.supervise import Deadlines, run_child
outcome = run_child(
    [sys.executable, "-S", "-c", os.environ["CHILD"]], dict(os.environ), Path(os.environ["LOG"]), lambda event: None,
    deadlines=Deadlines(grace_s=float(os.environ.get("GRACE", "0.3")), linger_s=0.1),
)
print(outcome.finished, outcome.failure, outcome.interrupted_by, outcome.message)
"""


class Lab:
    """A place for one child: its log, its marker, and the processes it told of."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "engine.log"
        self.pids_file = folder / "pids"
        self.mark = uuid.uuid4().hex
        self.events: list[dict[str, Any]] = []
        self.env = {**os.environ, "LAB": self.mark, "PIDS": str(self.pids_file), "PYTHONPATH": "workflow"}

    def run(self, code: str, deadlines: Deadlines = QUICK, **more: Any) -> ChildOutcome:
        on_event = more.pop("on_event", self.events.append)
        argv = [sys.executable, "-S", "-c", PRELUDE + code]
        return run_child(argv, self.env, self.log, on_event, deadlines=deadlines, **more)

    def start_supervisor(self, code: str, **env: str) -> subprocess.Popen[str]:
        """A supervisor in a process of its own; returns once its child has started its offspring."""
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER],
            env={**self.env, "CHILD": PRELUDE + code, "LOG": str(self.log), **env},
            stdout=subprocess.PIPE,
            text=True,
        )
        wait_for(lambda: self.pids_file.exists() and len(self.pids()) == 5, 20)
        return process

    def pids(self) -> list[int]:
        return [int(pid) for pid in self.pids_file.read_text().split()]

    def left(self) -> list[int]:
        """Processes that carry the marker or told their id, and that still run."""
        told = [pid for pid in self.pids() if running(pid)] if self.pids_file.exists() else []
        wanted = f"LAB={self.mark}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if wanted in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
                except OSError:
                    continue
        return told + found


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    place = Lab(tmp_path)
    yield place
    for pid in place.left():
        os.kill(pid, signal.SIGKILL)


# --- how a child ends ----------------------------------------------------------------------------------------------


def test_a_normal_end_leaves_nothing_though_its_children_stay(lab: Lab) -> None:
    outcome = lab.run(
        "print('Model loading took 1 GiB'); event('unit_started', unit='s/t'); offspring(); event('done')"
    )
    assert (outcome.finished, outcome.returncode, outcome.failure) == (True, 0, None)
    assert [event["event"] for event in lab.events] == ["unit_started", "done"]
    assert [peak.phase for peak in outcome.phases][-2:] == ["task:s/t", "end"]
    assert len(lab.pids()) == 5
    assert lab.left() == []


def test_a_child_that_hangs_after_its_last_task_is_ended_and_counts_as_finished(lab: Lab) -> None:
    begin = time.monotonic()
    outcome = lab.run("offspring(); signal.signal(signal.SIGTERM, signal.SIG_IGN); event('done'); time.sleep(600)")
    assert time.monotonic() - begin < 10
    assert outcome.finished
    assert outcome.signal == signal.SIGKILL
    assert "did not exit within 0.3 s" in str(outcome.message)
    assert lab.left() == []


def test_a_child_that_hangs_after_its_last_task_gets_to_end_by_sigterm(lab: Lab) -> None:
    outcome = lab.run(
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); event('done'); time.sleep(600)",
        Deadlines(after_done_s=0.2, grace_s=60),
    )
    assert (outcome.finished, outcome.returncode) == (True, 7)


def test_a_crash_gives_its_exit_code_and_its_own_words(lab: Lab) -> None:
    outcome = lab.run("offspring(); raise KeyError('no such task')")
    assert (outcome.finished, outcome.returncode, outcome.failure) == (False, 1, "not_memory")
    assert outcome.message == "KeyError: 'no such task' (exit code 1)"
    assert lab.left() == []


def test_what_the_child_says_of_its_failure_is_the_message(lab: Lab) -> None:
    outcome = lab.run("event('failed', message='task arc is not known'); sys.exit(4)")
    assert (outcome.failure, outcome.message) == ("not_memory", "task arc is not known")


def test_an_exit_code_of_zero_before_done_is_a_failure(lab: Lab) -> None:
    outcome = lab.run("event('unit_started', unit='s/t')")
    assert (outcome.finished, outcome.failure) == (False, "not_memory")
    assert "before it had done its tasks" in str(outcome.message)


def test_a_crash_while_python_shuts_down_after_done_does_not_undo_the_results(lab: Lab) -> None:
    outcome = lab.run("event('done'); os.abort()")
    assert (outcome.finished, outcome.signal, outcome.failure) == (True, signal.SIGABRT, None)
    assert "SIGABRT" in str(outcome.message)


def test_a_killed_child_leaves_none_of_its_workers(lab: Lab) -> None:
    outcome = lab.run("offspring(); os.kill(os.getpid(), signal.SIGKILL)")
    assert (outcome.returncode, outcome.signal, outcome.failure) == (None, signal.SIGKILL, "host_memory")
    assert lab.left() == []


def test_a_command_that_cannot_be_started_says_so(lab: Lab) -> None:
    outcome = run_child(["/no/such/program"], lab.env, lab.log, lab.events.append)
    assert (outcome.finished, outcome.failure) == (False, "not_memory")
    assert "/no/such/program" in str(outcome.message)


def test_a_deadline_ends_a_child_that_is_silent_but_none_that_logs(lab: Lab) -> None:
    code = "offspring()\nfor _ in range(30): print('at work', flush=True); time.sleep(0.05)\ntime.sleep(600)"
    outcome = lab.run(code, Deadlines(grace_s=0.2, linger_s=0.1, idle_s=1.0))
    assert outcome.duration_s > 2
    assert (outcome.finished, outcome.failure) == (False, "deadline")
    assert "1 s" in str(outcome.message)
    assert lab.left() == []


def test_a_child_that_waits_for_a_dead_engine_is_ended_and_told_by_the_log(lab: Lab) -> None:
    code = """
print("init engine (profile, create kv cache, warmup model) took 2.11 s")
print("WARNING [core_client.py:817] [shutdown] MPClient: engine core exited unexpectedly; starting cleanup", flush=True)
while True: event("progress", done=1, total=2); time.sleep(0.05)
"""
    outcome = lab.run(code, Deadlines(after_death_s=0.5, grace_s=0.2, linger_s=0.1))
    assert (outcome.finished, outcome.failure) == (False, "host_memory")
    assert "the engine's process was killed" in str(outcome.message)


def test_a_child_that_failed_and_does_not_exit_is_ended_and_told_by_its_traceback(lab: Lab) -> None:
    code = """
print('Traceback (most recent call last):\\n  File "x.py", line 1, in load_model', file=sys.stderr)
print("torch.OutOfMemoryError: CUDA out of memory.", file=sys.stderr, flush=True)
offspring()
event("failed", message="RuntimeError: Engine core initialization failed.")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""
    begin = time.monotonic()
    outcome = lab.run(code, Deadlines(after_death_s=0.3, grace_s=0.3, linger_s=0.1))
    assert time.monotonic() - begin < 10
    assert (outcome.finished, outcome.failure) == (False, "weights_too_big")
    assert outcome.message == "torch.OutOfMemoryError: CUDA out of memory."
    assert lab.left() == []


def test_an_engine_that_fails_leaves_at_once_though_a_thread_of_it_would_stay(lab: Lab) -> None:
    code = """
import sys, threading, time
from reproval import engine
class OutOfMemoryError(Exception): pass
def run(*_):
    threading.Thread(target=time.sleep, args=(600,)).start()
    raise OutOfMemoryError("CUDA out of memory.")
engine.run, engine.read_record = run, lambda *_: None
sys.argv = ["engine", "task.json"]
engine.main()
"""
    begin = time.monotonic()
    outcome = run_child([sys.executable, "-c", code], lab.env, lab.log, lab.events.append)
    assert time.monotonic() - begin < 20
    assert (outcome.returncode, outcome.failure) == (1, "gpu_busy")  # by the phase: nothing was loaded yet
    assert [event["event"] for event in lab.events] == ["failed"]
    assert "Traceback (most recent call last)" in lab.log.read_text()
    assert "line 7, in run" in lab.log.read_text()


def test_the_parents_words_do_not_hide_what_the_log_names(lab: Lab) -> None:
    code = """
print("ValueError: Unrecognized quantization method: fp7", flush=True)
event("failed", message="RuntimeError: Engine core initialization failed. See root cause above.")
sys.exit(1)
"""
    assert lab.run(code).message == "ValueError: Unrecognized quantization method: fp7 (exit code 1)"


def test_an_exception_in_the_caller_ends_the_child_first(lab: Lab) -> None:
    def fails(_: dict[str, Any]) -> None:
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        lab.run("offspring(); event('unit_started', unit='s/t'); time.sleep(600)", on_event=fails)
    assert len(lab.pids()) == 5
    assert lab.left() == []


def test_signals_of_the_caller_are_his_again_afterwards(lab: Lab) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    files = sorted(path.name for path in Path("/proc/self/fd").iterdir())
    lab.run("event('done')")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before
    assert sorted(path.name for path in Path("/proc/self/fd").iterdir()) == files


# --- how the supervisor ends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_supervisor_ends_the_child(lab: Lab, number: signal.Signals) -> None:
    said = "signal.signal(signal.SIGTERM, lambda *_: (print('asked to end', flush=True), sys.exit(0)))"
    process = lab.start_supervisor(f"{said}; offspring(); time.sleep(600)")
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert output.split()[:3] == ["False", "interrupted", str(int(number))]
    assert "asked to end" in lab.log.read_text()
    assert lab.left() == []


def test_a_batch_system_that_signals_every_process_is_obeyed(lab: Lab) -> None:
    said = "signal.signal(signal.SIGTERM, lambda *_: (print('asked to end', flush=True), sys.exit(0)))"
    process = lab.start_supervisor(f"{said}; offspring(); time.sleep(600)")
    for pid in [*lab.pids(), process.pid]:
        os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert output.split()[:2] == ["False", "interrupted"]
    assert "guardian" not in output
    assert "asked to end" in lab.log.read_text()
    assert lab.left() == []


def test_a_second_signal_does_not_wait_for_the_grace(lab: Lab) -> None:
    said = "signal.signal(signal.SIGTERM, lambda *_: print('asked to end', flush=True))"
    forever = "while True: time.sleep(1)"
    process = lab.start_supervisor(f"{said}; offspring()\n{forever}", GRACE="600")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)  # the same request, passed on by somebody else; the kernel may deliver it first
    wait_for(lambda: "asked to end" in lab.log.read_text(), 20)
    time.sleep(1.2)
    assert running(lab.pids()[0])
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert "interrupted by SIG" in output
    assert lab.left() == []


def test_kill_9_of_the_supervisor_leaves_nothing(lab: Lab) -> None:
    process = lab.start_supervisor("signal.signal(signal.SIGTERM, signal.SIG_IGN); offspring(); time.sleep(600)")
    process.kill()
    process.wait()
    wait_for(lambda: not lab.left(), 20)


def test_kill_9_of_the_guardian_leaves_nothing_and_is_said(lab: Lab) -> None:
    process = lab.start_supervisor("offspring(); time.sleep(600)")
    child, guardian, *_ = lab.pids()
    os.kill(guardian, signal.SIGKILL)
    output, _ = process.communicate(timeout=20)
    assert "not_memory" in output
    assert "guardian" in output
    assert not running(child)
    # Of the offspring the one without its environment cannot be found any more; docs/supervision.md names this gap.
    hidden = lab.pids()[-1]
    assert [pid for pid in lab.left() if pid != hidden] == []


def test_kill_9_of_both_at_once_ends_the_child_itself(lab: Lab) -> None:
    process = lab.start_supervisor("signal.signal(signal.SIGTERM, signal.SIG_IGN); offspring(); time.sleep(600)")
    child, guardian, *_ = lab.pids()
    os.kill(process.pid, signal.SIGSTOP)  # so that it cannot do anything in between
    os.kill(guardian, signal.SIGKILL)
    process.kill()
    process.wait()
    wait_for(lambda: not running(child), 20)


# --- log and events ------------------------------------------------------------------------------------------------


def test_a_flood_of_log_neither_fills_the_memory_nor_hides_the_cause(lab: Lab) -> None:
    code = """
lines = b"Processed prompts: 12 of 340, est. speed input 3.50 toks/s, output 0.58 toks/s\\n" * 13000
sys.stdout.write("init engine (profile, create kv cache, warmup model) took 2.11 s\\n")
sys.stdout.write("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 4.53 GiB.\\n")
sys.stdout.flush()
for _ in range(100):
    os.write(1, lines)
sys.exit(1)
"""
    Path("/proc/self/clear_refs").write_text("5")  # the peak below counts from here
    before = status_bytes("VmRSS")
    outcome = lab.run(code)
    assert lab.log.stat().st_size > 100_000_000
    assert status_bytes("VmHWM") - before < 30_000_000
    assert outcome.failure == "running"
    assert "Tried to allocate 4.53 GiB" in str(outcome.message)


def status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def test_an_event_that_never_ends_is_dropped(lab: Lab) -> None:
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    outcome = lab.run("""
fd = int(os.environ["REPROVAL_EVENTS_FD"])
for _ in range(640):
    piece = b"x" * 65536
    while piece: piece = piece[os.write(fd, piece):]
os.write(fd, b"\\n")
event("done")
""")
    assert outcome.finished
    assert status_bytes("VmHWM") - before < 20_000_000


def test_events_cut_in_the_middle_and_garbage_do_no_harm(lab: Lab) -> None:
    code = """
fd = int(os.environ["REPROVAL_EVENTS_FD"])
os.write(fd, b'{"event": "progress", "do'); time.sleep(0.2); os.write(fd, b'ne": 5}\\n')
long = b"[" * 100000 + b"\\n", b"x" * 3000000 + b"\\n"
for piece in (b"\\xff\\xfe\\n", b"[1, 2]\\n", b"{}\\n", b'{"event": 7}\\n', *long):
    while piece:
        piece = piece[os.write(fd, piece):]
event("unit_done", unit="s/t")
event("done")
os.write(fd, b'{"event": "unit_done"')
"""
    outcome = lab.run(code)
    assert outcome.finished
    assert lab.events == [{"event": "progress", "done": 5}, {"event": "unit_done", "unit": "s/t"}, {"event": "done"}]


def test_a_child_that_closes_its_events_is_waited_for_without_spinning(lab: Lab) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF)
    outcome = lab.run('os.close(int(os.environ["REPROVAL_EVENTS_FD"])); time.sleep(1.5)')
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.4
    assert not outcome.finished


def test_phases_come_from_the_log_of_this_attempt_alone(lab: Lab) -> None:
    lab.log.write_text("init engine (profile, create kv cache, warmup model) took 2 s\ntorch.OutOfMemoryError: old\n")
    outcome = lab.run("print('Starting to load model x'); print('\\rtorch.OutOfMemoryError: new'); sys.exit(1)")
    assert (outcome.failure, outcome.message) == ("weights_too_big", "torch.OutOfMemoryError: new")
    assert [peak.phase for peak in outcome.phases] == ["start", "weights"]
    assert lab.log.read_text().startswith("init engine")


# --- progress ------------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_is_seldom_and_never_goes_back() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress("smol", 8, kept=2, stream=stream, clock=clock)
    for second in range(100):
        clock.now = float(second)
        progress.event({"event": "progress", "done": second * 10 - (25 if second == 50 else 0), "total": 1000})
    assert stream.getvalue().startswith("[smol] 2/8 tasks, 0 %\n")
    shares = [int(line.split(", ")[1].split()[0]) for line in stream.getvalue().splitlines()]
    assert shares == sorted(shares)
    assert len(shares) == 20
    assert "45 %, 0:55 left" in stream.getvalue()


def test_progress_is_quiet_when_nothing_changes_and_tells_the_last_task() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress("smol", 1, stream=stream, clock=clock)
    for second in range(60):
        clock.now = float(second)
        progress.event({"event": "progress", "done": 1, "total": 2})
    assert stream.getvalue() == "[smol] 0/1 tasks, 50 %\n"
    progress.event({"event": "progress", "done": 2, "total": 2})
    progress.event({"event": "unit_done", "unit": "s/t"})
    progress.event({"event": "done"})
    assert stream.getvalue().splitlines()[-1] == "[smol] 1/1 tasks, 100 %"


@pytest.mark.parametrize(
    "event", [{"event": "progress"}, {"event": "progress", "done": 1, "total": 0}, {"event": "engine"}]
)
def test_progress_passes_over_what_says_nothing(event: dict[str, Any]) -> None:
    stream = io.StringIO()
    Progress("smol", 1, stream=stream).event(event)
    assert stream.getvalue() == ""


def test_time_left_follows_the_pace_of_now() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress("smol", 1, stream=stream, clock=clock)
    progress.event({"event": "progress", "done": 0, "total": 10_000})
    clock.now = 500.0  # the first request waited for a warm-up
    for second in range(500, 800):
        clock.now = float(second)
        progress.event({"event": "progress", "done": 10 * (second - 500), "total": 10_000})
    assert stream.getvalue().splitlines()[-1].endswith("29 %, 11:49 left")


def test_processes_are_found_by_their_marker(lab: Lab) -> None:
    marker = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", "import time; time.sleep(600)"], env={**lab.env, supervise.RUN_VARIABLE: marker}
    )
    wait_for(lambda: supervise.marked(marker) == [process.pid], 20)
    supervise.kill_marked(marker)
    assert process.wait(5) == -signal.SIGKILL

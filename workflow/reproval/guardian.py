"""The process between the supervisor and the engine: whatever happens above it, nothing is left below it.

It is the parent of the engine child, and by PR_SET_CHILD_SUBREAPER the parent of every process whose own parent died,
in whatever session or process group that process is. So it finds all that the child ever started by walking down from
itself, whatever those processes did to their group, their session, their title or their environment. It ends when the
child and all of these have ended. The supervisor holds the only writing end of its control pipe: end of file there
means that the supervisor is gone, by kill -9 too, and then everything is killed.

Run by path and isolated: `python -I -S guardian.py CONTROL STATUS EVENTS LINGER -- COMMAND`, where the first three are
inherited file descriptors and LINGER is what the child's own children get to end by themselves after it, in seconds.
It imports nothing of reproval, starts in milliseconds and stays small for as many hours as the engine runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

# A process that is stuck in a driver dies when the driver lets it go; waiting for it longer helps nobody.
STUCK_S = 30.0


def descendants(root: int) -> list[int]:
    """Process ids of everything below `root`, by one pass over /proc; parents before children."""
    children: dict[int, list[int]] = {}
    # Called many times a second; pathlib would take several times as long.
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as stream:  # noqa: PTH123
                    stat = stream.read()
            except OSError:
                continue
            # The command's name stands in parentheses and may hold any character, parentheses too.
            parent = int(stat[stat.rindex(b")") + 2 :].split(None, 2)[1])
            children.setdefault(parent, []).append(int(name))
    found = list(children.get(root, []))
    for pid in found:
        found.extend(children.get(pid, []))
    return found


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")


class Guardian:
    """Starts the child, passes signals on, reports its end, and clears up below itself."""

    def __init__(self, control: int, status: int, events: int, linger_s: float) -> None:
        self.control, self.status, self.events, self.linger_s = control, status, events, linger_s
        self.child = 0
        self.exited_at: float | None = None

    def report(self, **record: Any) -> None:
        # A supervisor that is gone reads nothing; end of file on the control pipe says so as well.
        with contextlib.suppress(OSError):
            os.write(self.status, json.dumps(record).encode() + b"\n")

    def reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.child:
                self.exited_at = time.monotonic()
                self.report(exited=os.waitstatus_to_exitcode(status))

    def signal_all(self, number: int) -> None:
        for pid in descendants(os.getpid()):
            with contextlib.suppress(OSError):
                os.kill(pid, number)

    def kill_all(self) -> None:
        end = time.monotonic() + STUCK_S
        while (left := descendants(os.getpid())) and time.monotonic() < end:
            self.signal_all(signal.SIGKILL)
            time.sleep(0.01)
            self.reap()
        if left:
            self.report(stuck=left)

    def run(self, command: list[str]) -> None:
        # A batch system signals every process of a job. Handlers rather than SIG_IGN: exec resets them for the child.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        waker, wake = os.pipe()
        os.set_blocking(waker, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        guardian = os.getpid()

        def in_child() -> None:
            _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != guardian:
                os._exit(1)

        try:
            # This process has one thread, so code between fork and exec is safe here, as it is not in the supervisor.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=(self.events,), start_new_session=True, preexec_fn=in_child
            )
        except (OSError, subprocess.SubprocessError) as error:
            self.report(refused=f"{command[0]}: {error}")
            return
        self.child = process.pid
        self.report(started=self.child)
        os.close(self.events)
        while True:
            left = None if self.exited_at is None else 0.02
            ready, _, _ = select.select([self.control, waker], [], [], left)
            if waker in ready:
                os.read(waker, 512)
            self.reap()
            if self.control in ready:
                order = os.read(self.control, 64)
                if not order or b"K" in order:
                    break
                if b"T" in order:
                    self.signal_all(signal.SIGTERM)
            if self.exited_at is not None and (
                not descendants(os.getpid()) or time.monotonic() > self.exited_at + self.linger_s
            ):
                break
        self.kill_all()


def main(argv: list[str]) -> None:
    control, status, events = map(int, argv[1:4])
    Guardian(control, status, events, float(argv[4])).run(argv[6:])


if __name__ == "__main__":
    main(sys.argv)

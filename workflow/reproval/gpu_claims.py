"""Which GPUs a job takes, so that jobs that run side by side on one machine take different ones.

Each GPU is a small file in a folder that the jobs share. A job holds a POSIX lock on all of the file, or, where jobs
may share a GPU, on its part of it. Locks go with the process, however it ends, so there is nothing to clean up.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from reproval.files import NO_LOCKS

UNITS = 2520
"""Bytes of a file that are locked in all: the least number that 1 to 10 jobs divide evenly."""
WAIT_S = 5.0
_HELD = (errno.EAGAIN, errno.EACCES)


@contextmanager
def claimed(
    folder: Path,
    uuids: Mapping[str, str],
    count: int,
    jobs_per_gpu: int = 1,
    *,
    wait: Callable[[float], None] = time.sleep,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> Iterator[list[str]]:
    """Hold `count` GPUs, or of each the share of one of `jobs_per_gpu` jobs; gives their names in the order of `uuids`.

    `uuids` has the UUID of every GPU that the job may see, by its name in CUDA_VISIBLE_DEVICES. While too few are free,
    it waits and says so once. Where the file system has no locks, the first ones are taken. Raises ValueError if the
    machine has fewer than `count`.
    """
    if len(uuids) < count:
        raise ValueError(f"{count} GPUs are asked for and {len(uuids)} are visible")
    folder.mkdir(parents=True, exist_ok=True)
    waited = False
    while True:
        with ExitStack() as stack:
            try:
                names = _take(stack, folder, uuids, count, jobs_per_gpu)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                say(f"{folder} is on a file system without locks: GPUs are not kept from other jobs")
                names = list(uuids)[:count]
            if names is not None:
                yield names
                return
        if not waited:
            say(f"waiting for a GPU: of the {len(uuids)} visible ones, fewer than {count} are free of other jobs")
            waited = True
        # Two jobs that wait for several GPUs must not take each other's first one again and again.
        wait(WAIT_S * random.uniform(0.5, 1.5))


def _take(stack: ExitStack, folder: Path, uuids: Mapping[str, str], count: int, jobs_per_gpu: int) -> list[str] | None:
    """The names of `count` GPUs that are locked until `stack` is closed; None if too few are free."""
    names: list[str] = []
    part = UNITS // jobs_per_gpu
    for name, uuid in uuids.items():
        if len(names) == count:
            break
        # A process loses its locks on a file when it closes any descriptor of it: this is the only one.
        stream = os.open(folder / f"{socket.gethostname()}-{uuid}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        stack.callback(os.close, stream)
        for job in range(jobs_per_gpu):
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB, part, job * part)
            except OSError as error:
                if error.errno not in _HELD:
                    raise
                continue
            names.append(name)
            break
    return names if len(names) == count else None

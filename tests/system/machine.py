"""What the system tests need of the machine: Apptainer and a registry, installed where that is possible."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

BASE = Path(__file__).resolve().parents[2]
LAB = Path(__file__).resolve().parent / "lab"
CPU_PYTHON = BASE / ".env/cpu/bin/python"
DEMO_MODEL = BASE / "resources/demo/SmolLM2-135M-Instruct"
PROBE_TASK = """
task: probe
custom_dataset: !function probe.load
test_split: test
output_type: multiple_choice
doc_to_text: "The opposite of {{word}} is"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
metadata:
  version: 1.0
"""
"""A task for lm-eval whose data come from probe.py beside it, which each test writes to see what it wants to."""


def is_debian_12_with_root() -> bool:
    try:
        release = Path("/etc/os-release").read_text(encoding="utf-8")
    except OSError:
        return False
    return os.geteuid() == 0 and "VERSION_CODENAME=bookworm" in release


@dataclass(frozen=True)
class Lab:
    """The scripts of lab/, with one folder for what they keep."""

    folder: Path
    port: int

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SNAKEMAKE"))}
        return kept | {"LAB": str(self.folder), "REGISTRY_PORT": str(self.port), "APPTAINER_NOHTTPS": "1"}

    def run(self, *command: str | Path, timeout: float = 600) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout.strip()

    def digest(self, name: str, tag: str) -> str:
        """Digest that the registry gives to NAME:TAG."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v2/{name}/manifests/{tag}",
            headers={"Accept": "application/vnd.oci.image.manifest.v1+json"},
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return str(answer.headers["Docker-Content-Digest"])


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Apptainer on PATH and a registry on loopback; a skip where they are neither there nor to be had."""
    if not os.environ.get("REPROVAL_SYSTEM_TESTS"):
        pytest.skip("installs Apptainer and a registry on this machine: set REPROVAL_SYSTEM_TESTS=1")
    if not is_debian_12_with_root():
        missing = [name for name in ("apptainer", "docker-registry") if shutil.which(name) is None]
        if missing:
            pytest.skip(f"needs {' and '.join(missing)}; installed by the test itself only as root on Debian 12")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = Lab(tmp_path_factory.mktemp("lab"), port)
    if is_debian_12_with_root():
        made.run(LAB / "install-apptainer")
    made.run(LAB / "registry", "start")
    yield made
    made.run(LAB / "registry", "stop")

"""Snakemake as a user calls it, in a working directory of the test's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest

BASE = Path(__file__).resolve().parents[2]
DEMO_MODEL = BASE / "resources/demo/SmolLM2-135M-Instruct"
Snakemake = Callable[..., subprocess.CompletedProcess[str]]


def command(*arguments: str, base: Path = BASE) -> list[str]:
    return [sys.executable, "-m", "snakemake", "--snakefile", str(base / "Snakefile"), "--cores", "2", *arguments]


def copy_checkout(folder: Path) -> Path:
    """Fill a folder with the workflow's files as Git has them or would take them: no environments, models, results."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=BASE,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (BASE / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(BASE / name, folder / name)
    return folder


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SNAKEMAKE"))}


@cache
def without_network() -> tuple[str, ...]:
    """What runs a command where there is no network but its own loopback; nothing where that is not permitted."""
    alone = ("unshare", "--user", "--map-root-user", "--net")
    up = "ip link set lo up && "
    try:
        made = subprocess.run([*alone, "sh", "-c", f"{up} true"], capture_output=True, timeout=30)
    except OSError:
        return ()
    return (*alone, "sh", "-c", f'{up} exec "$@"', "sh") if made.returncode == 0 else ()


@pytest.fixture(scope="session")
def snakemake() -> Snakemake:
    """Run Snakemake in `folder`; returns what it printed, both streams together, and its exit code."""

    def run(
        folder: Path, *arguments: str, base: Path = BASE, prefix: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*prefix, *command(*arguments, base=base)],
            cwd=folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )

    return run


@pytest.fixture(scope="session")
def engine() -> Path:
    """Python of the engine's environment, or a skip."""
    python = BASE / ".env/cpu/bin/python"
    if not python.exists():
        pytest.skip(f"needs the engine: {BASE}/envs/install cpu")
    return python


@pytest.fixture(scope="session")
def demo_model() -> Path:
    if not (DEMO_MODEL / "config.json").exists():
        pytest.skip("needs the demo's model: make model")
    return DEMO_MODEL

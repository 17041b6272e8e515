"""Staged with the network, run without: what is missing is named before a job that asks for a GPU is queued."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import Snakemake, command, environment, without_network
from loopback_hub import COMMIT, Hub, serving

from reproval.files import read_record
from reproval.records import ModelManifest, TaskManifest

pytestmark = pytest.mark.skipif(
    not os.environ.get("REPROVAL_SYSTEM_TESTS"), reason="takes a minute and a half: set REPROVAL_SYSTEM_TESTS=1"
)

CONFIG = f"""
models:
  tiny: {{hub: org/m, revision: {COMMIT}}}
suites:
  core: {{include_path: tasks, tasks: [capitals]}}
hardware: {{host_memory_gib: 4, cpus: 1}}
"""

# As most of lm-eval's tasks, it keeps its data set in the cache of `datasets`.
TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{country}} is"
doc_to_choice: [Paris, Rome]
doc_to_target: answer
metric_list: [{metric: acc}]
metadata: {version: 1}
"""


def model_files(model: Path) -> dict[str, bytes]:
    """The demo's model with weights of two shards, of which nothing but the headers is real. The second is large."""
    files = {path.name: path.read_bytes() for path in model.iterdir() if path.suffix in (".json", ".txt", ".jinja")}
    for number, size in ((1, 8), (2, 12 * 2**20)):
        tensor = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
        header = json.dumps({f"w{number}": tensor}).encode()
        data = len(header).to_bytes(8, "little") + header + bytes(size)
        files[f"model-0000{number}-of-00002.safetensors"] = data
    names = {f"w{number}": f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": names}).encode()
    return files


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory, demo_model: Path, engine: Path) -> Path:
    """A working directory whose store was filled from a Hub that is gone by now."""
    folder = tmp_path_factory.mktemp("airgap")
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "tasks").mkdir()
    data = folder / "tasks/capitals.jsonl"
    data.write_text('{"country": "France", "answer": 0}\n{"country": "Italy", "answer": 1}\n')
    (folder / "tasks/capitals.yaml").write_text(TASK.replace("DATA", str(data)))
    with serving(model_files(demo_model)) as address:

        def ask(target: str) -> subprocess.CompletedProcess[str]:
            done = subprocess.run(
                command("--configfile", "config.yaml", "--", target),
                cwd=folder,
                env=environment() | {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, done.stdout
            return done

        assert "tiny" in ask("plan").stdout
        large = "model-00002-of-00002.safetensors"
        assert [wanted for name, wanted in Hub.asked if name == large] == ["bytes=0-100000"], "a plan fetched weights"
        done = ask("stage")
    assert "The store resources is complete: 2 manifests" in done.stdout
    return folder


def stored(staged: Path, what: str) -> Path:
    """One file of the store, of the kind that is to go."""
    if what == "data set":
        (path,) = (staged / "resources/manifests/suites").iterdir()
        arrow = next(entry for entry in read_record(path, TaskManifest).files if entry.path.endswith(".arrow"))
        return staged / "resources" / arrow.path
    (path,) = (staged / "resources/manifests/models").glob("*.json")
    name = {"tokenizer": "tokenizer.json", "shard": "model-00002-of-00002.safetensors"}[what]
    return staged / read_record(path, ModelManifest).folder / name


@pytest.mark.parametrize("what", ["data set", "tokenizer", "shard"])
def test_a_file_that_is_missing_is_named_before_anything_is_counted(
    staged: Path, snakemake: Snakemake, tmp_path: Path, what: str
) -> None:
    path = stored(staged, what)
    shutil.move(path, tmp_path / "away")
    try:
        done = snakemake(staged, "--configfile", "config.yaml", prefix=without_network())
        stage = snakemake(staged, "--configfile", "config.yaml", "--", "stage", prefix=without_network())
    finally:
        shutil.move(tmp_path / "away", path)
    assert done.returncode != 0
    assert f"{path.relative_to(staged)}: missing" in done.stdout
    assert "snakemake stage" in done.stdout
    assert "rule evaluate:" not in done.stdout.partition("Select jobs to execute")[2]
    assert f"{path.relative_to(staged)}: missing" in stage.stdout
    assert stage.returncode != 0


def test_with_all_there_the_plan_is_made_without_a_network(staged: Path, snakemake: Snakemake) -> None:
    done = snakemake(staged, "--configfile", "config.yaml", "--", "plan", prefix=without_network())
    assert done.returncode == 0, done.stdout
    assert "tiny" in done.stdout


def test_what_goes_missing_after_the_plan_is_named_before_an_engine_starts(
    staged: Path, snakemake: Snakemake, tmp_path: Path
) -> None:
    planned = snakemake(staged, "--configfile", "config.yaml", "--", "plan", prefix=without_network())
    assert planned.returncode == 0, planned.stdout
    path = stored(staged, "shard")
    shutil.move(path, tmp_path / "away")
    try:
        done = snakemake(staged, "--configfile", "config.yaml", prefix=without_network())
    finally:
        shutil.move(tmp_path / "away", path)
    assert done.returncode != 0
    assert "localrule check_store:" in done.stdout
    assert f"{path.relative_to(staged)}: missing" in done.stdout
    assert [path.name for path in (staged / "results/work").iterdir()] == ["facts"]  # No engine's folder.

"""The workflow on a machine that has Snakemake and nothing else: no engine, no GPU, no container runtime."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Snakemake, copy_checkout

TARGETS = ["all", "plan", "facts", "stage", "report", "export"]
CONFIG = """
models:
  tiny: {path: model}
suites:
  core:
    tasks: [arc_easy, {task: gsm8k, num_fewshot: 5, limit: 10}]
hardware: {host_memory_gib: 8, cpus: 2}
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A working directory with a configuration and a local model of one small tensor."""
    model = tmp_path / "model"
    model.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1}
    (model / "config.json").write_text(json.dumps(config))
    (model / "tokenizer.json").write_text("{}")
    write_weights(model, bytes(8))
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def write_weights(model: Path, weights: bytes) -> None:
    size = len(weights)
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + weights)


@pytest.mark.parametrize("target", TARGETS)
def test_a_dry_run_of_every_target_needs_no_engine(
    checkout: Path, project: Path, snakemake: Snakemake, target: str
) -> None:
    assert not (checkout / ".env").exists()
    done = snakemake(project, "--configfile", "config.yaml", "-n", "--", target, base=checkout)
    assert done.returncode == 0, done.stdout
    wanted = {"all": "report", "plan": "make_plan", "facts": "find_facts", "stage": "stage_suite", "report": "collect"}
    assert wanted.get(target, "bundle") in done.stdout
    assert not (project / "results").exists()


def test_the_plan_is_for_the_runner_that_the_caller_chose(
    checkout: Path, project: Path, snakemake: Snakemake, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "gpu.yaml").write_text(
        CONFIG.replace("{host", "{gpus: 1, gpu_memory_gib: 80, compute_capability: '9.0', host")
    )
    for value, chosen in (("0", True), ("1", False)):
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", value)
        for configuration, gpus in (("gpu.yaml", True), ("config.yaml", False)):
            done = snakemake(project, "--configfile", configuration, "-n", "-p", "plan", base=checkout)
            assert done.returncode == 0, done.stdout
            assert ("--runner v1" in done.stdout) == (chosen and gpus)


def test_the_default_target_is_everything(checkout: Path, project: Path, snakemake: Snakemake) -> None:
    done = snakemake(project, "--configfile", "config.yaml", "-n", base=checkout)
    assert done.returncode == 0, done.stdout
    assert "rule report:" in done.stdout


def test_the_configuration_that_is_named_replaces_the_default(
    checkout: Path, project: Path, snakemake: Snakemake
) -> None:
    done = snakemake(project, "--configfile", "config.yaml", "-n", base=checkout)
    assert done.stdout.count("rule evaluate:") == 1


def test_a_wrong_configuration_is_refused_before_any_job(project: Path, snakemake: Snakemake) -> None:
    (project / "config.yaml").write_text(CONFIG.replace("host_memory_gib", "host_memory_gb"))
    done = snakemake(project, "--configfile", "config.yaml", "-n")
    assert done.returncode != 0
    for said in ("config.yaml", "hardware.host_memory_gb", "host_memory_gib"):
        assert said in done.stdout
    assert "Traceback" not in done.stdout
    assert "rule " not in done.stdout


def test_a_key_given_on_the_command_line_is_checked_too(project: Path, snakemake: Snakemake) -> None:
    done = snakemake(project, "--configfile", "config.yaml", "--config", "policy=autoo", "-n")
    assert done.returncode != 0
    assert "--config" in done.stdout
    assert "auto" in done.stdout


def test_a_project_may_lie_in_a_folder_of_any_name(checkout: Path, project: Path, snakemake: Snakemake) -> None:
    odd = project / "it's {x} $HOME ünï"
    odd.mkdir()
    for name in ("model", "config.yaml"):
        (project / name).rename(odd / name)
    done = snakemake(odd, "--configfile", "config.yaml", "-n", base=checkout)
    assert done.returncode == 0, done.stdout


def test_a_workflow_in_a_folder_that_snakemake_cannot_name_is_refused(
    project: Path, snakemake: Snakemake, tmp_path: Path
) -> None:
    done = snakemake(project, "--configfile", "config.yaml", "-n", base=copy_checkout(tmp_path / "{x}"))
    assert done.returncode != 0
    assert "move the workflow to a folder without" in done.stdout


def test_a_container_run_without_an_image_says_what_is_missing(
    checkout: Path, project: Path, snakemake: Snakemake
) -> None:
    done = snakemake(project, "--configfile", "config.yaml", "--use-singularity", "-n", base=checkout)
    assert done.returncode != 0
    assert "container:" in done.stdout


def test_a_job_without_its_environment_says_how_to_make_it(checkout: Path, project: Path, snakemake: Snakemake) -> None:
    done = snakemake(project, "--configfile", "config.yaml", "--", "facts", base=checkout)
    assert done.returncode != 0
    assert "envs/install cpu" in done.stdout


def test_trackers_without_their_libraries_are_refused_before_any_job(
    checkout: Path, project: Path, snakemake: Snakemake
) -> None:
    asked = ("--configfile", "config.yaml", "-n", "--config", "export={formats: [mlflow]}", "--")
    done = snakemake(project, *asked, "export", base=checkout)
    assert done.returncode != 0
    assert "export.formats: mlflow needs a library" in done.stdout
    assert f"mend: {checkout}/envs/install export" in done.stdout
    assert snakemake(project, *asked, "report", base=checkout).returncode == 0


def test_repeats_are_runs_beside_the_first(checkout: Path, project: Path, snakemake: Snakemake) -> None:
    def runs(*more: str) -> set[str]:
        done = snakemake(project, "--configfile", "config.yaml", "-n", *more, base=checkout)
        assert done.returncode == 0, done.stdout
        return {word for line in done.stdout.splitlines() if "run=" in line for word in line.split() if "run=" in word}

    (first,) = runs()
    assert len(runs("--config", "repeats=3")) == 3
    assert first in runs("--config", "repeats=3")


def test_weights_that_changed_in_place_are_measured_anew_wherever_the_change_is(
    checkout: Path, project: Path, snakemake: Snakemake
) -> None:
    weights = bytearray(32 * 2**20)

    def staged() -> str:
        write_weights(project / "model", bytes(weights))
        done = snakemake(project, "--configfile", "config.yaml", "--until", "stage_model", "--", "facts", base=checkout)
        assert done.returncode == 0, done.stdout
        (manifest,) = project.glob("resources/manifests/models/*.json")
        return str(json.loads(manifest.read_text())["digest"])

    before = staged()
    weights[10_000] = 1
    # Of large files Snakemake's start reads samples, and finds the same name: so there is one manifest still.
    assert staged() != before


def test_a_change_of_what_decides_scores_is_another_run(checkout: Path, project: Path, snakemake: Snakemake) -> None:
    def runs() -> set[str]:
        done = snakemake(project, "--configfile", "config.yaml", "-n", base=checkout)
        assert done.returncode == 0, done.stdout
        return {word for line in done.stdout.splitlines() if "run=" in line for word in line.split() if "run=" in word}

    before = runs()
    (project / "config.yaml").write_text(CONFIG.replace("cpus: 2", "cpus: 1"))
    assert runs() == before
    (project / "config.yaml").write_text(CONFIG.replace("num_fewshot: 5", "num_fewshot: 4"))
    assert not runs() & before

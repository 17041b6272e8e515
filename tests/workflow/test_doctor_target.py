"""`snakemake doctor` on this machine, for real, with and without something to mend."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Snakemake

CONFIG = """
models:
  tiny: {hub: organization/tiny, revision: 0123456789abcdef0123456789abcdef01234567, gated: true}
suites:
  core: {tasks: [arc_easy]}
hardware: {host_memory_gib: 0.5, cpus: 1}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def test_it_looks_everywhere_and_fails_only_for_a_problem(
    project: Path, snakemake: Snakemake, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_thisisnotforanybodytosee")
    healthy = snakemake(project, "--configfile", "config.yaml", "--", "doctor")
    assert healthy.returncode == 0, healthy.stdout
    for place in (r"^here +store complete", r"^node +host memory", r"^engine +socket names"):
        assert re.search(place, healthy.stdout, re.MULTILINE)
    # The working directory is not a place to import from, and no GPU was found to be fine.
    assert "engine  other packages   ok" in healthy.stdout
    assert "engine  GPUs             not checked  hardware.gpus is 0" in healthy.stdout
    assert "0 problems" in healthy.stdout
    assert "hf_thisisnot" not in healthy.stdout
    assert not list((project / "results").rglob("*.json"))

    monkeypatch.delenv("HF_TOKEN")
    sick = snakemake(project, "--configfile", "config.yaml", "--", "doctor")
    assert sick.returncode == 1
    assert "problem: tokens (here): none for tiny" in sick.stdout
    assert "mend: export HF_TOKEN=" in sick.stdout


def write_profile(folder: Path, **settings: Any) -> list[str]:
    """Arguments for a profile of these settings."""
    (folder / "profiles/mine").mkdir(parents=True)
    (folder / "profiles/mine/config.yaml").write_text(yaml.safe_dump(settings))
    return ["--profile", "profiles/mine", "--configfile", "config.yaml"]


@pytest.mark.parametrize("quote", ["{}", "'{}'"])
def test_its_job_has_what_the_profile_sets_for_evaluations(project: Path, snakemake: Snakemake, quote: str) -> None:
    chosen = {"slurm_partition": quote.format("gpu"), "gpu_model": "h100", "runtime": 999}
    arguments = write_profile(
        project, **{"set-resources": {"evaluate": chosen}, "default-resources": {"slurm_account": "mine"}}
    )
    shown = snakemake(project, *arguments, "-n", "-p", "--", "doctor").stdout
    (resources,) = [line for line in shown.splitlines() if "resources:" in line and "slurm_partition" in line]
    for wanted in ("slurm_partition=gpu", "gpu_model=h100", "slurm_account=mine", "runtime=15", "mem_mb=512"):
        assert wanted in resources
    assert "--gpu-model h100 --partition gpu" in shown


def test_what_was_seen_here_is_told_and_looked_at_again_if_no_job_can_be_submitted(
    project: Path, snakemake: Snakemake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    submit = {"cluster-generic-submit-cmd": "false", "cluster-generic-status-cmd": "false"}
    arguments = write_profile(project, executor="cluster-generic", jobs=1, retries=2, **submit)
    refused = snakemake(project, *arguments, "--", "doctor")
    assert refused.returncode == 1
    assert "problem: tokens (here): none for tiny" in refused.stdout
    monkeypatch.setenv("HF_TOKEN", "hf_thisisnotforanybodytosee")
    again = snakemake(project, *arguments, "--", "doctor")
    assert "HF_TOKEN set, for tiny" in again.stdout


def test_a_problem_is_told_once_however_often_a_profile_tries_again(
    project: Path, snakemake: Snakemake, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    sick = snakemake(project, "--configfile", "config.yaml", "--retries", "2", "--", "doctor")
    assert sick.returncode == 1
    assert sick.stdout.count("Trying to restart") == 0

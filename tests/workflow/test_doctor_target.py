"""`snakemake doctor` on this machine, for real, with and without something to mend."""

from __future__ import annotations

from pathlib import Path

import pytest
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
    for place in ("here    store complete", "node    host memory", "engine  socket names"):
        assert place in healthy.stdout
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

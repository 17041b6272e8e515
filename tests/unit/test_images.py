"""The record of the images is as new as what they are built from, and the Dockerfile keeps to the locks."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

BASE = Path(__file__).parents[2]
sys.path[:0] = [str(BASE / "envs"), str(BASE / "containers")]

import build  # noqa: E402
import images  # noqa: E402
import install  # noqa: E402


def test_the_record_is_as_new_as_dockerfile_and_locks() -> None:
    assert images.problems(images.read()) == []


@pytest.mark.parametrize("changed", ["Dockerfile", "lock"])
def test_a_change_that_was_not_recorded_is_found(changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = images.read()
    if changed == "Dockerfile":
        copy = Path(shutil.copy(images.DOCKERFILE, tmp_path))
        monkeypatch.setattr(images, "DOCKERFILE", copy)
    else:
        shutil.copytree(images.ENVS, tmp_path / "envs", ignore=shutil.ignore_patterns("__pycache__"))
        copy = tmp_path / "envs" / "cpu.txt"
        monkeypatch.setattr(install, "ENVS", copy.parent)
    with copy.open("a") as stream:
        stream.write("# another line\n")
    found = images.problems(record)
    assert any("cpu" in problem and "containers/build cpu --record" in problem for problem in found)
    renewed = images.renewed(images.renewed(record, "cpu"), "gpu")
    assert images.problems(renewed) == []
    assert renewed["cpu"]["built"] is None


def test_bases_are_named_by_digest_and_a_published_image_must_be() -> None:
    for engine in images.ENGINES:
        assert re.fullmatch(r"\S+:\S+@sha256:[0-9a-f]{64}", images.pinned_base(engine))
    record = images.read()
    tagged = record | {"gpu": record["gpu"] | {"published": "docker://registry.example/reproval:latest"}}
    assert any("by digest" in problem for problem in images.problems(tagged))


def test_labels_name_lock_base_and_the_versions_that_decide_scores() -> None:
    labels = images.labels("gpu", images.pinned_base("gpu"))
    assert labels["reproval.lock.sha256"] == images.read()["gpu"]["lock_sha256"]
    assert labels["org.opencontainers.image.base.digest"].startswith("sha256:")
    for package in ("vllm", "lm-eval", "torch", "bitsandbytes", "vllm-bnb-plugin", "nvidia-ml-py"):
        assert re.fullmatch(r"[\d.]+(\+\w+)?", labels[f"reproval.version.{package}"])


def test_only_wheels_that_a_lock_names_by_hash_are_taken_from_this_machine(tmp_path: Path) -> None:
    (tmp_path / "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl").write_bytes(b"not that one")
    assert build.local_wheels("cpu", {"find-links": str(tmp_path)}) == []

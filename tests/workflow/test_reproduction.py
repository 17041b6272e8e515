"""The whole story of a bundle: made in one clone, run again in another: other path, locale, time zone and cores."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from conftest import BASE, command, copy_checkout, environment

from reproval.files import read_record
from reproval.records import Evaluation
from reproval.reproduce_content import Reproduction

CONFIG = """
models:
  smollm2: {path: resources/model, dtype: float32}
suites:
  short:
    include_path: config/demo/tasks
    limit: 6
    tasks: [demo_opposites, demo_prose]
hardware: {gpus: 0, host_memory_gib: 8, cpus: 2}
"""
HARDWARE = "hardware: {gpus: 0, host_memory_gib: 6, cpus: 1}\n"
REFERENCE = """
title: Ten opposites
source: {url: "https://example.org/paper", where: table 1, seen: written for this test}
made_with: {harness: lm-eval, engine: vLLM, hardware: a computer, chat_template: false}
margin: {absolute: 0.05, because: written for this test}
models:
  smollm2: {hub: a/b, revision: 0123456789012345678901234567890123456789, dtype: float32, suites: [short]}
suites: {short: {include_path: TASKS, tasks: [{task: demo_opposites, limit: 6}, {task: demo_prose, limit: 6}]}}
scores:
  - {model: smollm2, suite: short, task: demo_opposites, metric: acc, value: 0.1, n: 1000, task_version: 7}
"""
# On every machine. What a German or Turkish locale would change (decimal commas, sorting, case), C changes too.
FIRST = {"LC_ALL": "C.utf8", "TZ": "America/New_York"}
SECOND = {"LC_ALL": "C", "TZ": "Asia/Tokyo"}


def clone(folder: Path) -> Path:
    """The workflow's files as Git has or would take them, with the environments that are installed here."""
    copy_checkout(folder)
    (folder / ".env").symlink_to(BASE / ".env")
    return folder


def run(base: Path, variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments, base=base),
        cwd=base,
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, demo_model: Path, engine: Path) -> Path:
    base = clone(tmp_path_factory.mktemp("first") / "reproval")
    (base / "resources").mkdir()
    (base / "resources/model").symlink_to(demo_model)
    (base / "small.yaml").write_text(CONFIG)
    done = run(base, FIRST, "bundle", "--configfile", "small.yaml")
    assert done.returncode == 0, done.stdout
    return base


@pytest.fixture(scope="module")
def second(first: Path, tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    """Another clone with the bundle, the weights somewhere else, and a configuration that says only where it runs."""
    base = clone(tmp_path_factory.mktemp("second") / "a/longer/path/to/reproval")
    (base / "weights").symlink_to(demo_model)
    (base / "here.yaml").write_text(HARDWARE)
    shutil.copy(first / "results/bundle.zip", base / "got.zip")
    shutil.rmtree(base / "config/demo")
    return base


@pytest.fixture(scope="module")
def reproduced(second: Path) -> Reproduction:
    weights = "models={smollm2: {path: weights}}"
    arguments = ["--configfile", "here.yaml", "--config", "bundle=got.zip", weights]
    done = run(second, SECOND, "--cores", "1", "reproduce", *arguments)
    assert done.returncode == 0, done.stdout
    assert "Run again from got.zip: " in done.stdout
    assert "demo_opposites" in done.stdout
    (evaluation,) = second.glob("results/runs/*/evaluation.json")
    shutil.copy(evaluation, second / "evaluation-from-the-bundle.json")
    return read_record(second / "results/reproduction.json", Reproduction)


def test_a_bundle_is_whole_and_tells_nothing_of_the_machine(first: Path) -> None:
    checked = subprocess.run(
        [command()[0], "-m", "reproval.bundle", "check", "results/bundle.zip"],
        cwd=first,
        env=environment() | {"PYTHONPATH": str(BASE / "workflow")},
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stderr
    with zipfile.ZipFile(first / "results/bundle.zip") as archive:
        names = archive.namelist()
        for name in names:
            assert str(first).encode() not in archive.read(name), name
    assert not any(name.endswith(".safetensors") for name in names)
    for needed in ("configuration.yaml", "workflow/envs/cpu.txt", "task-files/short/opposites.yaml"):
        assert needed in names


def test_without_the_weights_it_says_which_they_are(second: Path) -> None:
    done = run(second, SECOND, "reproduce", "--configfile", "here.yaml", "--config", "bundle=got.zip")
    assert done.returncode != 0
    assert "models.smollm2.path" in done.stdout
    assert "model.safetensors with SHA-256" in done.stdout
    assert "in the same --config: 'models={smollm2: {path: FOLDER}}'" in done.stdout


def test_another_machine_gets_the_same_answers(reproduced: Reproduction) -> None:
    assert reproduced.verdict in ("identical", "reproduced")
    scores = {score.metric: score for score in reproduced.scores}
    assert set(scores) == {"acc", "word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert scores["acc"].verdict == "identical"
    for score in scores.values():
        assert score.samples is not None
        assert score.samples.documents == 6
        assert (score.samples.only_reference, score.samples.only_here) == (0, 0)
        assert score.samples.changed_prompts == score.samples.changed_answers == 0
        assert score.samples.largest_log_probability_difference is not None
        assert score.samples.largest_log_probability_difference < 0.01
        assert not {"model", "task and its prompts", "limit", "dtype"} & {entry.what for entry in score.unlike}


def test_the_second_machine_is_described_by_itself(first: Path, second: Path, reproduced: Reproduction) -> None:
    here = read_record(second / "evaluation-from-the-bundle.json", Evaluation)
    (there,) = (read_record(path, Evaluation) for path in first.glob("results/runs/*/evaluation.json"))
    assert (here.plan.hardware.cpus, there.plan.hardware.cpus) == (1, 2)
    for ours, theirs in zip(here.units, there.units, strict=True):
        assert ours.key == theirs.key
        assert not ours.reused


def test_a_published_value_is_judged_and_the_verdict_outlives_the_failed_run(
    second: Path, reproduced: Reproduction
) -> None:
    """It asks for what the bundle asked for, so that nothing has to be run again."""
    (tasks,) = second.glob("resources/bundles/*/task-files/short")
    (second / "paper.yaml").write_text(REFERENCE.replace("TASKS", str(tasks.relative_to(second))))
    arguments = ["--configfile", "here.yaml", "--config", "reference=paper.yaml", "models={smollm2: {path: weights}}"]
    done = run(second, SECOND, "--cores", "1", "reproduce", *arguments)
    found = read_record(second / "results/reproduction.json", Reproduction)
    assert (found.verdict, found.exit_code, done.returncode) == ("differs", 1, 1), done.stdout
    assert "Ten opposites: DIFFERS" in done.stdout
    (score,) = found.scores
    assert [entry.what for entry in score.unlike][:2] == ["model", "task version"]
    assert (second / "results/reproduction.md").read_text().startswith("# Ten opposites: differs")
    assert "rule evaluate" not in done.stdout


def test_a_changed_byte_is_named_before_anything_starts(second: Path) -> None:
    data = bytearray((second / "got.zip").read_bytes())
    with zipfile.ZipFile(second / "got.zip") as archive:
        changed = next(info for info in archive.infolist() if info.filename.endswith("/result.json"))
    data[changed.header_offset + 30 + len(changed.filename) + 100] ^= 1
    (second / "bad.zip").write_bytes(data)
    done = run(second, SECOND, "reproduce", "--configfile", "here.yaml", "--config", "bundle=bad.zip")
    assert done.returncode != 0
    assert f"{changed.filename}: changed after it was bundled" in done.stdout
    assert len(list((second / "resources/bundles").iterdir())) <= 1

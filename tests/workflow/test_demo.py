"""The demo for real: Snakemake, lm-eval and vLLM on the CPU, its scores beside those of stock lm_eval."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import BASE, Snakemake, command, environment, without_network

from reproval.files import read_record, sha256_file
from reproval.records import Evaluation, UnitResult

CONFIG = str(BASE / "config/demo/config.yaml")
TASKS = ["demo_opposites", "demo_endings", "demo_counting", "demo_prose"]
DTYPES = {"smollm2-bf16": "bfloat16", "smollm2-fp32": "float32"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, demo_model: Path, engine: Path) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    (folder / "resources").mkdir()
    (folder / "resources/demo").symlink_to(demo_model.parent)
    return folder


@pytest.fixture(scope="module")
def done(project: Path, snakemake: Snakemake) -> Path:
    """The working directory after a first run, which is interrupted by Ctrl-C while the engine works, and a second.

    Only staging has a network, where a network can be taken away.
    """
    staged = snakemake(project, "--configfile", CONFIG, "--", "stage")
    assert staged.returncode == 0, staged.stdout
    interrupt_when_tasks_run(project)
    assert engines(project) == []
    finished = snakemake(project, "--configfile", CONFIG, prefix=without_network())
    assert finished.returncode == 0, finished.stdout
    assert finished.stdout.count(f"Report: {project.resolve()}/results/report.html") == 1
    return project


def engines(project: Path) -> list[int]:
    """Processes in this working directory that an engine's supervisor has marked as its own."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                here = (entry / "cwd").readlink() == project.resolve()
                marked = here and b"\0REPROVAL_RUN=" in b"\0" + (entry / "environ").read_bytes()
            except OSError:
                continue
            if marked:
                found.append(int(entry.name))
    return found


def interrupt_when_tasks_run(project: Path) -> None:
    """Start the demo, press Ctrl-C as soon as a first task is kept, and wait for its end."""
    process = subprocess.Popen(
        [*without_network(), *command("--configfile", CONFIG)],
        cwd=project,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 400
    while not list(project.glob("results/tasks/*/*/result.json")):
        assert process.poll() is None, "the demo ended before its first task was kept"
        assert time.monotonic() < deadline, "no task was kept in time"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) != 0


def evaluations(project: Path) -> Iterator[Evaluation]:
    for path in sorted(project.glob("results/runs/*/evaluation.json")):
        yield read_record(path, Evaluation)


def results(project: Path, evaluation: Evaluation) -> Iterator[UnitResult]:
    for unit in evaluation.units:
        yield read_record(project / "results" / unit.folder / "result.json", UnitResult)


def test_a_run_after_ctrl_c_goes_on_where_it_stopped(done: Path) -> None:
    found = list(evaluations(done))
    assert {evaluation.model for evaluation in found} == set(DTYPES)
    reused = {unit.task for evaluation in found for unit in evaluation.units if unit.reused}
    assert reused, "what was finished before the interruption was computed again"
    outcomes = [attempt.outcome for evaluation in found for attempt in evaluation.attempts]
    assert sorted(outcomes) == ["finished", "finished", "interrupted"]
    assert all(attempt.host_peak_bytes > 2**29 for evaluation in found for attempt in evaluation.attempts)


def test_after_staging_no_network_is_needed(done: Path) -> None:
    if not without_network():
        pytest.skip("needs `unshare --user --net` without privileges, and ip")
    connect = "import socket; socket.create_connection(('192.0.2.1', 80), 5)"
    reached = subprocess.run([*without_network(), sys.executable, "-c", connect], capture_output=True, text=True)
    assert "Network is unreachable" in reached.stderr
    assert (done / "results/report.html").stat().st_size > 0


def test_one_engine_start_serves_all_tasks_of_a_model(done: Path) -> None:
    for evaluation in evaluations(done):
        assert [unit.task for unit in evaluation.units] == TASKS
        phases = [phase.phase for phase in evaluation.attempts[-1].phases]
        assert phases.count("weights") == 1


def test_the_report_names_every_file_of_the_models_by_its_hash(done: Path, demo_model: Path) -> None:
    told = json.loads((done / "results/report.json").read_text(encoding="utf-8"))["provenance"]
    for model in DTYPES:
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            assert told["files"][model][name] == sha256_file(demo_model / name)
    assert all(task["dataset"].startswith("task files of the suite, SHA-256 ") for task in told["tasks"])
    assert told["common"]["tokenizer SHA-256"].startswith(sha256_file(demo_model / "tokenizer.json"))


def test_snakemakes_own_report_has_the_results_with_their_captions(
    done: Path, snakemake: Snakemake, tmp_path: Path
) -> None:
    page = tmp_path / "snakemake.html"
    made = snakemake(done, "--configfile", CONFIG, "--report", str(page))
    assert made.returncode == 0, made.stdout
    text = page.read_text(encoding="utf-8")
    for result in ("results/report.html", "results/scores.csv"):
        assert f'"{result}": {{"name"' in text
    for said in ("The whole report as one page that opens offline", "Every score: one row for each run", *DTYPES):
        assert said in text


@pytest.mark.parametrize("model", DTYPES)
def test_scores_are_those_of_stock_lm_eval(
    done: Path, engine: Path, demo_model: Path, tmp_path: Path, model: str
) -> None:
    settings = f"pretrained={demo_model},dtype={DTYPES[model]},enforce_eager=True"
    tasks = ["--tasks", ",".join(TASKS), "--include_path", str(BASE / "config/demo/tasks")]
    output = ["--batch_size", "auto", "--output_path", str(tmp_path)]
    stock_environment = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    # Without a C++ compiler, which is not needed for the demo either.
    stock_environment["TORCH_COMPILE_DISABLE"] = "1"
    command = [engine, "-m", "lm_eval", "run", "--model", "vllm", "--model_args", settings, *tasks, *output]
    # What counts is what it has saved: once it was seen to be killed by SIGABRT, and its exit on GPUs may take minutes.
    said = ""
    for _ in range(2):
        ended = subprocess.run(
            command,
            env=environment() | stock_environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=400,
        )
        said += f"{ended.stdout[-4000:]}\nexit status {ended.returncode}\n"
        if any(tmp_path.rglob("results_*.json")):
            break
    written = next(tmp_path.rglob("results_*.json"), None)
    assert written is not None, said
    stock = json.loads(written.read_text())["results"]
    (evaluation,) = (entry for entry in evaluations(done) if entry.model == model)
    scores = [score for result in results(done, evaluation) for score in result.scores]
    assert len(scores) == 7
    for score in scores:
        expected = stock[score.task][f"{score.metric},{score.filter}"]
        assert score.value == pytest.approx(expected, rel=1e-4), score
        if score.stderr is not None:
            assert score.stderr == pytest.approx(stock[score.task][f"{score.metric}_stderr,{score.filter}"], rel=1e-4)


def test_every_choice_of_the_one_token_task_is_one_request_a_question(done: Path) -> None:
    evaluation = next(evaluations(done))
    paths = {task: path for result in results(done, evaluation) for task, path in result.paths.items()}
    assert paths["demo_opposites"].one_token == paths["demo_opposites"].requests == 128
    assert all(path.cut == 0 for path in paths.values())


def test_a_second_run_has_nothing_to_do(done: Path, snakemake: Snakemake) -> None:
    again = snakemake(done, "--configfile", CONFIG)
    assert again.returncode == 0
    assert "Nothing to be done" in again.stdout


def test_another_way_to_run_the_jobs_runs_none_again(done: Path, snakemake: Snakemake) -> None:
    again = snakemake(done, "--configfile", CONFIG, "-n", "--config", "silence_limit_h=2", "local_copy=$TMPDIR")
    assert again.returncode == 0
    assert "Nothing to be done" in again.stdout


def test_a_lost_evaluation_is_put_together_from_what_was_kept_without_an_engine(
    done: Path, snakemake: Snakemake
) -> None:
    lost = next(done.glob("results/runs/smollm2-bf16-*/evaluation.json"))
    lost.unlink()
    began = time.monotonic()
    again = snakemake(done, "--configfile", CONFIG)
    assert again.returncode == 0, again.stdout
    assert all(unit.reused for unit in read_record(lost, Evaluation).units)
    assert time.monotonic() - began < 60


def test_an_evaluation_that_failed_is_not_taken_for_done_by_the_report_of_before(
    done: Path, snakemake: Snakemake
) -> None:
    for _ in range(2):
        failed = snakemake(done, "--configfile", CONFIG, "--config", "hardware={host_memory_gib: 0.5}")
        assert failed.returncode != 0, failed.stdout
        assert " cannot run: " in failed.stdout
    assert (done / "results/report.html").exists()
    assert snakemake(done, "--configfile", CONFIG).returncode == 0


def test_nothing_is_written_outside_results_resources_and_logs(done: Path) -> None:
    assert {entry.name for entry in done.iterdir()} <= {"results", "resources", "logs", ".snakemake"}


def test_the_printed_plan_names_every_model(done: Path, snakemake: Snakemake) -> None:
    table = snakemake(done, "--configfile", CONFIG, "--", "plan").stdout
    assert all(model in table for model in DTYPES)
    assert "below-7B" in table

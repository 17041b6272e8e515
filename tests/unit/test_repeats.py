"""Repeats: other seeds and nothing else, one score for all of them, and no question counted twice."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import synthetic

from reproval import bundle_content, collect, config, repeats, report, report_html, report_markdown
from reproval.files import read_record, write_record
from reproval.records import Evaluation
from reproval.reproduce_judge import judge_runs
from reproval.run_file import RunFile, run_file
from reproval.seeds import engine_seed, seeds
from reproval.settings import Config, Run
from reproval.statistics import compare_means

TASKS = (*synthetic.DEMO_TASKS, synthetic.Task("mmlu", "group", 60, 5, shots=5))
WEAK, STRONG = synthetic.Model("weak", 0.45), synthetic.Model("strong", 0.55)
N = 3


# --- runs -------------------------------------------------------------------------------------------------------------


def made(tmp_path: Path, **keys: object) -> list[Run]:
    digest = "a" * 40
    asked = {
        "models": {"m": {"hub": "a/b", "revision": digest}, "n": {"hub": "a/c", "revision": digest}},
        "suites": {"s": {"tasks": ["gsm8k"], "generation": {"do_sample": True, "temperature": 0.7, "seed": 7}}},
    }
    return config.runs(Config.model_validate(asked | keys), tmp_path, tmp_path, "lock")


def test_the_first_repeat_is_the_run_without_the_key(tmp_path: Path) -> None:
    alone, many = made(tmp_path), made(tmp_path, repeats=N)
    assert [run for run in many if not run.repeat] == alone
    assert [(run.model_name, run.repeat) for run in many] == [(m, k) for m in ("m", "n") for k in range(N)]
    assert len({run.name for run in many}) == len(many)
    assert {run.repeat_of for run in many if run.repeat} == {run.name for run in alone}
    # More repeats later leave those that are there.
    assert {run.name for run in many} < {run.name for run in made(tmp_path, repeats=N + 1)}


def files(tmp_path: Path, **keys: object) -> list[RunFile]:
    asked = Config.model_validate({"models": {"m": {"path": "."}}, "suites": {"s": {"tasks": ["x"]}}} | keys)
    return [run_file(run, asked, "lock") for run in made(tmp_path, **keys) if run.model_name == "m"]


def test_every_seed_is_moved_by_the_repeat(tmp_path: Path) -> None:
    own = [RunFile.model_validate_json(entry.model_dump_json()) for entry in files(tmp_path, repeats=2)]
    assert [list(seeds(entry.seed).values()) for entry in own] == [[0, 1234, 1234, 1234], [1, 1235, 1235, 1235]]
    assert [engine_seed(entry.seed) for entry in own] == [None, 1235]
    given = files(tmp_path, repeats=2, seed=5)
    assert [set(seeds(entry.seed).values()) for entry in given] == [{5}, {6}]
    assert [engine_seed(entry.seed) for entry in given] == [5, 6]
    asked = [entry.run.units[0].settings.generation for entry in own]
    assert [generation["seed"] for generation in asked if generation] == [7, 8]


def test_a_bundle_asks_for_the_same_repeats_of_the_same_configuration(tmp_path: Path) -> None:
    asked = bundle_content.configuration(files(tmp_path, repeats=N), {})
    assert asked["repeats"] == N
    assert asked["seed"] is None
    assert [task["generation"]["seed"] for task in asked["suites"]["s"]["tasks"]] == [7]
    assert "repeats" not in bundle_content.configuration(files(tmp_path), {})


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[collect.ModelData]:
    every = [replace(model, repeat=k) for model in (WEAK, STRONG) for k in range(N)]
    project = synthetic.write_project(tmp_path_factory.mktemp("repeats"), every, TASKS)
    return collect.load(project.results, project.evaluations)


@pytest.fixture(scope="module")
def built(models: list[collect.ModelData]) -> report.Report:
    return report.build(models)


def test_the_score_is_the_mean_over_repeats_and_the_noise_their_deviation(
    models: list[collect.ModelData], built: report.Report
) -> None:
    assert built.models == ["weak", "strong"]
    table = collect.rows(models)
    for line in built.headlines:
        for cell in line.cells:
            assert cell is not None
            mine = [
                row["value"]
                for row in table
                if (row["model"], row["task"], row["metric"], row["filter"])
                == (cell.model, line.task, line.metric, line.filter)
            ]
            assert len(mine) == N == cell.repeats
            assert cell.repeat_sd == pytest.approx(np.std(mine, ddof=1))
            mean = math.exp(np.mean(np.log(mine))) if "perplexity" in line.metric else np.mean(mine)
            assert cell.value == pytest.approx(mean)
            assert cell.low is not None
            assert cell.high is not None
            assert cell.low < cell.value < cell.high


def test_a_repeat_is_no_further_question(models: list[collect.ModelData], built: report.Report) -> None:
    sizes = {task.name: task.documents * max(task.subtasks, 1) for task in TASKS}
    assert {line.task: {cell.n for cell in line.cells if cell} for line in built.headlines} == {
        name: {n} for name, n in sizes.items()
    }
    assert {pair.task: pair.n for pair in built.comparisons} == sizes
    assert built.untested == []
    # The test of a 0/1 task is that of every question's mean, and wider than if each repeat were a sample of its own.
    (pair,) = [pair for pair in built.comparisons if pair.task == "capitals"]
    columns = {
        name: np.array(
            [
                unit.samples[("capitals", "none")].values["acc_norm"]
                for m in models
                if m.label == name
                for unit in m.units[:1]
            ]
        )
        for name in ("weak", "strong")
    }
    honest = compare_means(columns["weak"].mean(axis=0), columns["strong"].mean(axis=0))
    boastful = compare_means(columns["weak"].ravel(), columns["strong"].ravel())
    assert honest is not None
    assert boastful is not None
    assert pair.p_value == pytest.approx(honest.p_value)
    assert (pair.low, pair.high) == (pytest.approx(honest.low), pytest.approx(honest.high))
    assert pair.high is not None
    assert pair.low is not None
    assert boastful.high is not None
    assert boastful.low is not None
    assert pair.high - pair.low > 1.3 * (boastful.high - boastful.low)


def test_repeats_that_answer_alike_leave_the_report_of_one_run(tmp_path: Path) -> None:
    calm = [replace(model, flips=0.0, repeat=k) for model in (WEAK, STRONG) for k in range(2)]
    tasks = [task for task in TASKS if task.kind != "rolling"]
    many = synthetic.write_project(tmp_path / "many", calm, tasks)
    one = synthetic.write_project(tmp_path / "one", [WEAK, STRONG], tasks)
    with_repeats = report.build(collect.load(many.results, many.evaluations))
    without = report.build(collect.load(one.results, one.evaluations))
    assert with_repeats.comparisons == without.comparisons
    for line, alone in zip(with_repeats.headlines, without.headlines, strict=True):
        for cell, other in zip(line.cells, alone.cells, strict=True):
            assert cell is not None
            assert other is not None
            assert cell.repeat_sd == 0.0
            assert cell.value == pytest.approx(other.value)
            assert (cell.low, cell.high) == (pytest.approx(other.low), pytest.approx(other.high))
            assert cell.stderr == pytest.approx(other.stderr)


def test_the_tables_keep_a_row_for_each_repeat(models: list[collect.ModelData], tmp_path: Path) -> None:
    table = collect.rows(models)
    collect.write_table(table, tmp_path / "s.csv", tmp_path / "s.parquet")
    with (tmp_path / "s.csv").open(encoding="utf-8") as stream:
        found = list(csv.DictReader(stream))
    assert len({(row["model"], row["repeat"]) for row in found}) == 2 * N
    assert len(found) == N * len({(row["model"], row["task"], row["metric"], row["filter"]) for row in found})
    assert len({row["run"] for row in found}) == 2 * N


def test_the_noise_floor_stands_beside_the_standard_error_and_is_explained(built: report.Report) -> None:
    (cell, *_) = built.headlines[0].cells
    assert cell is not None
    said = f"SD {cell.repeat_sd:.4f} over {N} repeats"
    for text in (report_html.render(built), report_markdown.render(built)):
        assert said in text
        assert f"SE {cell.stderr:.4f}" in text
        assert "mean over repeats of the run with other seeds" in text
        assert "arXiv:2411.00640" in text


def test_every_run_is_in_times_attempts_and_provenance(built: report.Report) -> None:
    names = [f"{model}{text}" for model in ("weak", "strong") for text in ("", ", repeat 1", ", repeat 2")]
    assert [timing.model for timing in built.timing] == names
    assert [row.model for row in built.attempts] == names
    assert [memory.model for memory in built.memory] == built.models
    assert built.provenance.common["seeds"] == " / ".join(f"engine={s}, fewshot={s}" for s in (1234, 1235, 1236))


def test_a_report_without_repeats_says_nothing_of_them(tmp_path: Path) -> None:
    project = synthetic.write_project(tmp_path, [WEAK, STRONG], TASKS)
    alone = report.build(collect.load(project.results, project.evaluations))
    assert "repeats" not in alone.methods
    for text in (report_html.render(alone), report_markdown.render(alone)):
        assert "repeats of the run" not in text
        assert "SD over" not in text


def test_runs_of_two_configurations_are_no_repeats_of_each_other(tmp_path: Path) -> None:
    project = synthetic.write_project(tmp_path, [WEAK, replace(WEAK, repeat=1)], TASKS[:1])
    assert [m.label for m in collect.load(project.results, project.evaluations)] == ["weak", "weak"]
    other = read_record(project.evaluations[1], Evaluation)
    write_record(project.evaluations[1], other.model_copy(update={"repeat": 0, "repeat_of": None}))
    loaded = collect.load(project.results, project.evaluations)
    assert [m.label for m in loaded] == [m.evaluation.run for m in loaded]
    assert len(repeats.together(loaded)) == 2


def test_a_run_is_judged_against_the_same_repeat(tmp_path: Path, models: list[collect.ModelData]) -> None:
    results = models[0].folder.parents[1]
    same = judge_runs("t", "s", (results, models), (results, models))
    assert {score.verdict for score in same.scores} == {"identical"}
    assert {score.model for score in same.scores} >= {"weak", "weak, repeat 1", "weak, repeat 2"}
    fewer = judge_runs("t", "s", (results, models), (results, [m for m in models if not m.repeat]))
    assert {score.model for score in fewer.scores} == {"weak", "strong"}

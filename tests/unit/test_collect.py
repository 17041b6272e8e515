"""The table of scores: what it holds, and what it refuses."""

from __future__ import annotations

import csv
import gzip
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import synthetic

from reproval import collect, statistics
from reproval.files import RecordError, read_record, sha256_file, write_record
from reproval.records import Evaluation, Score, UnitResult

GROUPED = (*synthetic.DEMO_TASKS, synthetic.Task("mmlu", "group", 25, 4, shots=5))
MODELS = (*synthetic.DEMO_MODELS, synthetic.GPU_MODELS[2])


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> synthetic.Project:
    return synthetic.write_project(tmp_path_factory.mktemp("collect"), MODELS, GROUPED)


@pytest.fixture(scope="module")
def tables(project: synthetic.Project) -> tuple[Path, Path]:
    paths = project.results / "scores.csv", project.results / "scores.parquet"
    arguments = ["--results", project.results, "--evaluations", *project.evaluations, "--csv", paths[0], "--parquet"]
    assert collect.main([*map(str, arguments), str(paths[1])]) == 0
    return paths


def test_every_column_is_explained() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/report.md").read_text(encoding="utf-8")
    table = text.partition("## The tables")[2].partition("\n\n`results/runs")[0]
    cells = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    assert [name for cell in cells for name in re.findall(r"`(\w+)`", cell)] == collect.SCHEMA.names


def results(project: synthetic.Project) -> list[UnitResult]:
    units = [(p, u) for p in project.evaluations for u in read_record(p, Evaluation).units]
    return [read_record(project.results / u.folder / "result.json", UnitResult) for _, u in units]


def test_every_score_of_the_records_is_a_row_with_its_own_value(
    project: synthetic.Project, tables: tuple[Path, Path]
) -> None:
    expected = [
        (r.model, r.suite, s.task, s.metric, s.filter, s.value, s.stderr, s.n, s.group, r.key)
        for r in results(project)
        for s in r.scores
    ]
    columns = ["model", "suite", "task", "metric", "filter", "value", "stderr", "n", "group", "key"]
    found = [tuple(row[c] for c in columns) for row in pq.read_table(tables[1]).to_pylist()]
    assert found == expected
    assert len(found) > 50


def test_csv_and_parquet_hold_the_same(tables: tuple[Path, Path]) -> None:
    parquet = pq.read_table(tables[1])
    assert parquet.schema == collect.SCHEMA
    with tables[0].open(encoding="utf-8", newline="") as stream:
        from_csv = list(csv.DictReader(stream))
    rows = parquet.to_pylist()
    assert len(from_csv) == len(rows)
    for text, row in zip(from_csv, rows, strict=True):
        assert {k: "" if v is None else str(v) for k, v in row.items()} == text


def test_levers_settings_and_versions_stand_in_every_row(tables: tuple[Path, Path]) -> None:
    rows = pq.read_table(tables[1]).to_pylist()
    changed = [row for row in rows if row["score_levers_pulled"]]
    assert {row["model"] for row in changed} == {"qwen3-14b"}
    assert {row["score_levers"] for row in changed} == {"max_model_len"}
    assert {row["max_model_len"] for row in changed} == {2048}
    # As the engine had it on the rung that finished, not as the plan began.
    assert {row["max_num_batched_tokens"] for row in changed} == {2048}
    assert {row["dtype"] for row in rows if row["model"] == "smollm2-135m-fp32"} == {"float32"}
    assert {(row["vllm_version"], row["torch_version"]) for row in rows} == {("0.32.0", "2.13.0")}
    cut = {row["task"] for row in rows if row["prompts_cut"]}
    assert cut == {"sums"}
    assert {row["n_shot"] for row in rows if row["task"] == "capitals"} == {3}


def test_subtasks_stand_below_their_group(tables: tuple[Path, Path]) -> None:
    rows = [row for row in pq.read_table(tables[1]).to_pylist() if row["entry"] == "mmlu"]
    assert {row["task"] for row in rows if row["top"]} == {"mmlu"}
    assert {row["task"] for row in rows if not row["top"]} == {f"mmlu_{i:02d}" for i in range(4)}


def test_each_kind_of_score_has_the_interval_that_suits_it(tables: tuple[Path, Path]) -> None:
    methods = {
        (row["task"], row["metric"]): row["interval_method"]
        for row in pq.read_table(tables[1]).to_pylist()
        if row["model"] == "smollm2-135m"
    }
    assert methods[("capitals", "acc")] == "Wilson"
    assert methods[("sums", "exact_match")] == "Wilson"
    assert methods[("mmlu", "acc")] == "Wilson, effective n"
    assert methods[("essays", "word_perplexity")] == "Student t, log scale"
    assert methods[("essays", "bits_per_byte")] == "Student t, ratio"


def test_intervals_are_those_of_the_samples(project: synthetic.Project, tables: tuple[Path, Path]) -> None:
    model = collect.load(project.results, project.evaluations)[0]
    samples = model.units[0].samples[("capitals", "none")].values["acc"]
    row = next(r for r in pq.read_table(tables[1]).to_pylist() if (r["task"], r["metric"]) == ("capitals", "acc"))
    expected = statistics.wilson(float(samples.sum()), samples.size)
    assert (row["interval_low"], row["interval_high"]) == (expected.low, expected.high)
    assert row["value"] == pytest.approx(samples.mean())


def test_a_score_that_is_no_mean_of_its_samples_falls_back_on_its_standard_error(project: synthetic.Project) -> None:
    unit = collect.load(project.results, project.evaluations)[0].units[0]
    score = Score(task="capitals", metric="acc", filter="none", value=0.123, stderr=0.01, n=48, higher_is_better=True)
    interval = collect.score_interval(score, unit)
    assert interval is not None
    assert interval.method == "normal"
    assert (interval.low, interval.high) == pytest.approx((0.1034, 0.1426), abs=1e-4)
    assert collect.score_interval(score.model_copy(update={"stderr": None}), unit) is None


@pytest.mark.parametrize("damage", ["missing", "cut off", "other", "not samples"])
def test_damaged_samples_are_named_and_nothing_is_written(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = synthetic.write_project(tmp_path, synthetic.DEMO_MODELS[:1], synthetic.DEMO_TASKS[:1])
    path = next(project.results.glob("tasks/*/*/samples.jsonl.gz"))
    record = path.parent / "result.json"
    if damage == "missing":
        path.unlink()
    elif damage == "cut off":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "other":
        path.write_bytes(gzip.compress(b"{}\n"))
    else:
        path.write_bytes(gzip.compress(json.dumps({"metrics": ["acc"], "acc": 1}).encode()))
        result = read_record(record, UnitResult)
        write_record(record, result.model_copy(update={"samples_sha256": sha256_file(path)}))
    out = tmp_path / "scores.csv"
    arguments = ["--results", project.results, "--evaluations", project.evaluations[0], "--csv", out, "--parquet"]
    code = collect.main([*map(str, arguments), str(tmp_path / "scores.parquet")])
    assert code == 1
    assert str(path) in (said := capsys.readouterr().err)
    assert "the evaluation.json of its run, and start again" in said
    assert not out.exists()


def test_a_result_that_is_gone_is_named_with_what_makes_it_anew(tmp_path: Path) -> None:
    project = synthetic.write_project(tmp_path, synthetic.DEMO_MODELS[:1], synthetic.DEMO_TASKS[:1])
    path = next(project.results.glob("tasks/*/*/result.json"))
    path.unlink()
    # Snakemake does not know of it, and would say that nothing is to be done.
    with pytest.raises(RecordError, match=rf"{path}: .*: remove {project.evaluations[0]}, which names it"):
        collect.load(project.results, project.evaluations)


def test_results_of_another_run_are_refused(tmp_path: Path) -> None:
    project = synthetic.write_project(tmp_path, synthetic.DEMO_MODELS[:1], synthetic.DEMO_TASKS[:1])
    evaluation = read_record(project.evaluations[0], Evaluation)
    other = evaluation.units[0].model_copy(update={"key": "0" * 64})
    write_record(project.evaluations[0], evaluation.model_copy(update={"units": [other]}))
    with pytest.raises(RecordError, match=r"result.json: key: expected 0000"):
        collect.load(project.results, project.evaluations)

"""What others read: records that their schema takes, runs that their libraries open, and nothing of this machine."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import synthetic

from reproval import collect, export, export_every_eval_ever, manifests
from reproval.files import read_record, sha256_file, write_record
from reproval.records import DatasetSource, ModelManifest, StoredFile, TaskManifest, UnitResult

PUBLISHED = Path(__file__).parent / "published"
PACKAGES = Path(__file__).resolve().parents[2] / ".env/export"
COMMIT = "5" * 40
TASKS = (*synthetic.DEMO_TASKS, synthetic.Task("mmlu", "group", 20, 3, shots=5))
MODELS = (
    synthetic.Model("from-the-hub", 0.7, 14_768_307_200, 1, levers=(synthetic.CAP,), cut=7),
    synthetic.Model("from-a-folder", 0.4, remote_code=True, provenance={"engine_variables": {"VLLM_X": "1"}}),
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> synthetic.Project:
    root = tmp_path_factory.mktemp("export")
    weights = [StoredFile(path="model.safetensors", size_bytes=8, sha256="1" * 64)]
    for folder, manifest in {
        "models": ModelManifest(
            model="from-the-hub", source="hub", hub_id="Maker/Model-14B", revision=COMMIT, folder="m", files=weights,
            digest="2" * 64,
        ),
        "suites": TaskManifest(
            suite="demo", datasets=[DatasetSource(task="capitals", path="geo/capitals", revision=COMMIT)],
            task_files=[], digest="3" * 64,
        ),
    }.items():  # fmt: skip
        write_record(root / "resources/manifests" / folder / "one.json", manifest)
    return synthetic.write_project(root, MODELS, TASKS)


def arguments(project: synthetic.Project, kind: str, out: Path | str, *more: str) -> list[str]:
    staged = sorted((project.results.parent / "resources/manifests").rglob("*.json"))
    return [
        *(kind, "--results", "results", "--out", str(out), *more),
        *("--evaluations", *(str(path.relative_to(project.results.parent)) for path in project.evaluations)),
        *("--manifests", *(str(path.relative_to(project.results.parent)) for path in staged)),
    ]


def make(project: synthetic.Project, kind: str, out: Path | str, *more: str) -> int:
    """In the project's folder, as the rule does it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(project.results.parent)
        return export.main(arguments(project, kind, out, *more))


# --- Every Eval Ever --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(project: synthetic.Project, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, dict[str, Any]]:
    """Every record with its file, samples beside it."""
    out = tmp_path_factory.mktemp("out") / "every-eval-ever"
    asked = ["--samples", "--organization", "A lab", "--relationship", "third_party"]
    assert make(project, "every-eval-ever", out, *asked) == 0
    return {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.rglob("*.json"))}


def validator(name: str) -> Any:
    schema = json.loads((PUBLISHED / name).read_text(encoding="utf-8"))
    assert schema["version"] == export_every_eval_ever.SCHEMA_VERSION
    return jsonschema.Draft7Validator(schema)


def lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.with_name(f"{path.stem}_samples.jsonl").read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def test_the_published_schema_takes_every_record_and_every_sample(records: dict[Path, dict[str, Any]]) -> None:
    logs, samples = validator("eval.schema.json"), validator("instance_level_eval.schema.json")
    assert len(records) == len(MODELS) * len(TASKS)
    for path, record in records.items():
        assert list(logs.iter_errors(record)) == []
        rows = list(lines(path))
        assert [error for row in rows for error in samples.iter_errors(row)] == []
        pointer = record["detailed_evaluation_results"]
        assert pointer["total_rows"] == len(rows) > 0
        assert pointer["checksum"] == sha256_file(path.with_name(f"{path.stem}_samples.jsonl"))
        assert path.as_posix().endswith(pointer["file_path"].replace("_samples.jsonl", ".json"))
        assert {row["evaluation_id"] for row in rows} == {record["evaluation_id"]}
        assert {row["model_id"] for row in rows} == {record["model_info"]["id"]}


def test_the_schema_would_refuse_a_record_that_is_not_one(records: dict[Path, dict[str, Any]]) -> None:
    record = next(iter(records.values()))
    assert list(validator("eval.schema.json").iter_errors({**record, "model_info": {"name": "x"}}))


def test_every_score_of_the_records_is_there_with_its_error_and_interval(
    project: synthetic.Project, records: dict[Path, dict[str, Any]]
) -> None:
    table = collect.rows(collect.load(project.results, project.evaluations))
    found = {
        (record["model_info"]["name"], *result["evaluation_result_id"].split(":")): result["score_details"]
        for record in records.values()
        for result in record["evaluation_results"]
    }
    assert len(found) == len(table)
    for row in table:
        details = found[(row["model"], row["task"], row["metric"], row["filter"])]
        error = details["uncertainty"].get("standard_error", {})
        between = details["uncertainty"]["confidence_interval"]
        assert details["score"] == row["value"]
        assert error.get("value") == row["stderr"]
        assert (between["lower"], between["upper"]) == (row["interval_low"], row["interval_high"])
        assert details["uncertainty"]["num_samples"] == row["n"]


def test_a_mean_of_the_samples_is_the_score_they_count_for(records: dict[Path, dict[str, Any]]) -> None:
    for path, record in records.items():
        rows = list(lines(path))
        for result in record["evaluation_results"]:
            mine = [
                r["evaluation"]["score"] for r in rows if r["evaluation_result_id"] == result["evaluation_result_id"]
            ]
            if result["score_details"]["details"]["group"] == "true" or "perplexity" in result["evaluation_result_id"]:
                continue
            if "bits_per_byte" not in result["evaluation_result_id"]:
                assert sum(mine) / len(mine) == pytest.approx(result["score_details"]["score"])


def test_answers_are_told_by_what_was_asked(records: dict[Path, dict[str, Any]]) -> None:
    rows = {name: next(lines(path)) for path in records for name in [path.parts[-4]]}
    choice, text, prose = rows["capitals"], rows["sums"], rows["essays"]
    assert choice["input"] == {"raw": "capitals question 0", "reference": [" A"], "choices": [" A", " B"]}
    assert choice["answer_attribution"][0]["extraction_method"] == "highest log-likelihood"
    assert (choice["output"]["raw"] == [" A"]) == choice["evaluation"]["is_correct"]
    assert (text["output"]["raw"], text["answer_attribution"][0]["extracted_value"]) == (["A, I think"], "A")
    assert text["answer_attribution"][0]["extraction_method"] == "strict-match"
    assert prose["evaluation"]["score"] > 1


def test_the_place_names_developer_and_model_and_the_source_its_commit(records: dict[Path, dict[str, Any]]) -> None:
    places = {"/".join(path.parts[-5:-1]): record for path, record in records.items()}
    assert places.keys() == {
        f"data/{task.name}/{model}" for task in TASKS for model in ("Maker/Model-14B", "local/from-a-folder")
    }
    hub = places["data/capitals/Maker/Model-14B"]
    assert hub["model_info"]["additional_details"]["revision"] == COMMIT
    assert "max_model_len" in hub["model_info"]["additional_details"]["score_changing_levers"]
    local = places["data/capitals/local/from-a-folder"]
    assert [r["model_info"]["additional_details"]["trust_remote_code"] for r in (hub, local)] == ["false", "true"]
    assert local["eval_library"]["additional_details"]["engine_variables"] == '{"VLLM_X": "1"}'
    (source,) = {json.dumps(result["source_data"]) for result in hub["evaluation_results"]}
    assert json.loads(source)["hf_repo"] == "geo/capitals"
    assert COMMIT in json.loads(source)["additional_details"]["revision"]
    assert hub["source_metadata"]["source_organization_name"] == "A lab"
    for path in records:
        assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", path.stem)


def test_the_same_results_make_the_same_files_and_questions_stay_here_unless_asked_for(
    project: synthetic.Project, records: dict[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "again"
    assert make(project, "every-eval-ever", out, "--organization", "A lab", "--relationship", "third_party") == 0
    again = {path.relative_to(out): path for path in out.rglob("*") if path.is_file()}
    assert all(path.suffix == ".json" for path in again)
    (before,) = {path.parents[4] for path in records}
    for path, record in records.items():
        without = {key: value for key, value in record.items() if key != "detailed_evaluation_results"}
        assert json.loads(again.pop(path.relative_to(before)).read_text(encoding="utf-8")) == without
    assert not again


def test_an_unknown_metric_has_no_range_and_an_infinite_score_is_left_out(
    project: synthetic.Project,
) -> None:
    (model, *_) = collect.load(project.results, project.evaluations)
    unit = model.units[0]
    scores = [unit.result.scores[0].model_copy(update=change) for change in ({"metric": "mystery"}, {"value": 1e999})]
    changed = collect.UnitData(unit.reference, unit.result.model_copy(update={"scores": scores}), unit.samples)
    source = export_every_eval_ever.Source("x", None, "other")
    record = export_every_eval_ever.record(model, changed, manifests.Manifests(), source)
    assert list(validator("eval.schema.json").iter_errors(record)) == []
    (result,) = record["evaluation_results"]
    assert result["metric_config"]["metric_id"] == "lm-evaluation-harness.mystery"
    assert result["metric_config"]["additional_details"]["bounds_status"] == "unknown"
    assert "min_score" not in result["metric_config"]
    assert record["source_metadata"]["additional_details"]["not_finite"] == '["capitals acc"]'


def metric_name(row: dict[str, Any]) -> str:
    name = f"{row['suite']}/{row['task']}/{row['metric']}"
    return name if row["filter"] == "none" else f"{name}.{row['filter']}"


# --- trackers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries of .env/export, after this environment's own."""
    if not (PACKAGES / "reproval-lock.json").exists():
        pytest.skip("needs the libraries of trackers: envs/install export")
    monkeypatch.setattr(sys, "path", [*sys.path, str(PACKAGES)])


def test_mlflow_opens_what_is_written_wherever_the_project_lies(
    project: synthetic.Project, packages: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make(project, "mlflow", "results/exports/mlflow") == 0
    (tmp_path / "elsewhere/results/exports").mkdir(parents=True)
    (project.results / "exports/mlflow").rename(tmp_path / "elsewhere/results/exports/mlflow")
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri="results/exports/mlflow")
    (experiment,) = [e for e in client.search_experiments() if e.name == "reproval"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {model.name for model in MODELS}
    for model in collect.load(project.results, project.evaluations):
        run = runs[model.label]
        for row in collect.rows([model]):
            name = metric_name(row)
            assert run.data.metrics[name] == row["value"]
        assert run.data.metrics["memory/host_peak_bytes"] == model.evaluation.host_peak_bytes
        assert run.info.status == "FINISHED"
        assert run.info.end_time - run.info.start_time == round(1000 * model.evaluation.duration_s)
        trace = client.get_metric_history(run.info.run_id, "memory/host_bytes")
        assert max(point.value for point in trace) == model.evaluation.attempts[-1].host_peak_bytes
        written = Path(client.download_artifacts(run.info.run_id, "evaluation.json")).read_text(encoding="utf-8")
        assert json.loads(written)["run"] == model.evaluation.run
    assert runs["from-the-hub"].data.params["revision"] == COMMIT
    assert runs["from-the-hub"].data.tags["score-changing levers"] == "max_model_len"
    assert runs["from-the-hub"].data.tags["lock"]


def wandb_records(path: Path) -> Iterator[Any]:
    """Records of a .wandb file: LevelDB's log format after a header of seven bytes, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, held = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        held += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(held)
            held = b""
            yield record


def test_weights_and_biases_gets_a_run_for_each_model_to_sync(
    project: synthetic.Project, packages: None, tmp_path: Path
) -> None:
    out = tmp_path / "wandb"
    assert make(project, "wandb", out) == 0
    assert len(list(out.iterdir())) == len(MODELS)
    runs = {}
    for path in out.glob("offline-run-*/run-*.wandb"):
        found: dict[str, Any] = {"summary": {}, "memory": []}
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "run":
                found["name"] = record.run.display_name
                found["config"] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            for item in record.summary.update:
                found["summary"]["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
            found["memory"] += [i.value_json for i in record.history.item if "host" in "".join([i.key, *i.nested_key])]
        runs[found["name"]] = found
        assert {file.name for file in (path.parent / "files").iterdir()} >= {"evaluation.json", "scores.json"}
    assert runs.keys() == {model.name for model in MODELS}
    for model in collect.load(project.results, project.evaluations):
        run = runs[model.label]
        for row in collect.rows([model]):
            name = metric_name(row)
            assert run["summary"][name] == pytest.approx(row["value"])
        assert len(run["memory"]) > 10
    assert runs["from-the-hub"]["config"]["hub"] == "Maker/Model-14B"


@pytest.mark.parametrize("kind", ["mlflow", "wandb"])
def test_without_the_library_the_command_that_installs_it_is_named(
    project: synthetic.Project, tmp_path: Path, kind: str
) -> None:
    root = Path(export.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "reproval.export", *arguments(project, kind, tmp_path / kind)],
        cwd=project.results.parent,
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == f"reproval.export: {kind} needs the package {kind}: envs/install export\n"
    assert list(tmp_path.iterdir()) == []


# --- what must not be told --------------------------------------------------------------------------------------------

TOKEN = "hf_" + "aB3" * 12


@pytest.mark.parametrize("kind", export.FORMATS)
def test_no_export_tells_a_secret_a_user_or_a_path(
    packages: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "no-known-shape-at-all")
    for name in ("USER", "LOGNAME", "WANDB_USERNAME", "WANDB_ENTITY", "WANDB_NOTES", "MLFLOW_TRACKING_USERNAME"):
        monkeypatch.setenv(name, "alice")
    private = {
        "engine_arguments": {"model": "/home/alice/models/qwen"},
        "lock": f"cpu {tmp_path}/envs/cpu.txt",
        "cpu": f"no-known-shape-at-all {TOKEN}",
    }
    model = synthetic.Model("m", provenance=private)
    project = synthetic.write_project(tmp_path / "p", [model], synthetic.DEMO_TASKS[:1])
    out = tmp_path / "out"
    assert make(project, kind, out) == 0
    files = [path for path in out.rglob("*") if path.is_file()]
    assert files
    for path in files:
        told = path.read_bytes()
        for secret in ("alice", "no-known-shape", TOKEN, str(tmp_path), "/home/"):
            assert secret.encode() not in told, (path, secret)
            assert secret not in str(path.relative_to(out))


@pytest.mark.parametrize("samples", [False, True])
def test_what_would_tell_a_secret_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], samples: bool
) -> None:
    monkeypatch.setenv("SOME_SECRET", "strong-enough")
    project = synthetic.write_project(tmp_path / "p", MODELS[:1], synthetic.DEMO_TASKS[:1])
    if samples:
        (folder,) = project.results.glob("tasks/*/*")
        with gzip.open(folder / "samples.jsonl.gz", "rt") as stream:
            text = stream.read().replace("question 3", "strong-enough")
        with gzip.open(folder / "samples.jsonl.gz", "wt") as stream:
            stream.write(text)
        result = read_record(folder / "result.json", UnitResult)
        changed = result.model_copy(update={"samples_sha256": sha256_file(folder / "samples.jsonl.gz")})
        write_record(folder / "result.json", changed)
    else:
        monkeypatch.setattr(export_every_eval_ever, "scrub", lambda value, root: (value, 0))
    more = ["--samples"] if samples else ["--organization", "strong-enough"]
    assert make(project, "every-eval-ever", tmp_path / "out/eee", *more) == 1
    said = capsys.readouterr().err
    assert "SOME_SECRET" in said
    assert "strong-enough" not in said
    assert list((tmp_path / "out").iterdir()) == []

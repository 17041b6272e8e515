"""What several shards answered, merged, is what one job leaves: with a real engine and lm-eval's own metrics."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from demo_project import MODEL, NAME, SETTINGS, Project, own_tasks, started

from reproval import keep
from reproval.engine import ChildTask, ShardTask, answer_unit, evaluate_unit
from reproval.files import sha256_file, write_record
from reproval.merge import MergeError, merge, read_shards
from reproval.provenance import collect
from reproval.records import (
    Evaluation,
    ShardAnswers,
    ShardResult,
    UnitResult,
)
from reproval.shards import write_answers

if TYPE_CHECKING:
    from reproval.scoring import ReprovalVLLM

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def engine() -> Iterator[ReprovalVLLM]:
    with started() as lm:
        yield lm


MADE_WITH = collect(None, {}, False, {})


def one_job(project: Project, engine: ReprovalVLLM, results: Path) -> None:
    task = ChildTask(
        run=project.run,
        settings=SETTINGS,
        model_folder=str(MODEL),
        request_cache="",
        score_levers=[],
        units=project.units(results),
        kept_tokens=0,
    )
    for entry in task.units:
        evaluate_unit(engine, entry, task, MADE_WITH)


def one_shard(project: Project, engine: ReprovalVLLM, results: Path, number: int, of: int) -> Path:
    path = results / f"{number}-of-{of}.json"
    answers = path.with_suffix(".answers.jsonl.gz")
    task = ShardTask(shard=number, shards=of, answers=str(answers))
    answered = [answer_unit(engine, entry, project.run, task) for entry in project.units(results)]
    write_answers(answers, {unit.key: found for unit, found in answered})
    result = ShardResult(
        run=NAME,
        shard=number,
        shards=of,
        rung=0,
        settings=SETTINGS,
        score_levers=[],
        answered=ShardAnswers(units=[unit for unit, _ in answered], provenance=MADE_WITH),
        answers_sha256=sha256_file(answers),
        attempts=[],
        begin="2026-01-01T00:00:00+00:00",
        duration_s=1,
    )
    write_record(path, result)
    return path


def merged(project: Project, results: Path, paths: list[Path]) -> Evaluation:
    shards = read_shards(paths, NAME)
    return merge(project.run, project.facts, project.plan, project.manifest, results, shards)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    own_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def project(tasks: Path) -> Project:
    if not (MODEL / "config.json").exists():
        pytest.skip("needs the demo's model: make model")
    return Project(own=tasks)


@pytest.fixture(scope="module")
def folders(engine: ReprovalVLLM, project: Project, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Results of one job; of three shards that read that job's answers; and of three that compute their own."""
    from reproval.request_cache import RequestCache

    found = {name: tmp_path_factory.mktemp(name) for name in ("one", "same", "own")}
    kept = tmp_path_factory.mktemp("requests")
    engine.request_cache = RequestCache(kept, "key")
    one_job(project, engine, found["one"])
    engine.request_cache.close()
    for name in ("same", "own"):
        paths = []
        for number in (1, 2, 3):
            folder = kept if name == "same" else tmp_path_factory.mktemp("requests")
            engine.request_cache = RequestCache(folder, "key")
            paths.append(one_shard(project, engine, found[name], number, 3))
            engine.request_cache.close()
        merged(project, found[name], paths)
    engine.request_cache = None
    return found


def samples(result: UnitResult, project: Project, folder: Path) -> list[dict[str, Any]]:
    (entry,) = (each for each in project.units(folder) if each.key == result.key)
    with gzip.open(Path(entry.folder) / keep.SAMPLES) as stream:
        return [json.loads(line) for line in stream]


def test_from_the_same_answers_everything_is_the_same(folders: dict[str, Path], project: Project) -> None:
    one, merged = project.results(folders["one"]), project.results(folders["same"])
    assert len(one) == 6
    for task, result in one.items():
        other = merged[task]
        assert other.scores == result.scores, task
        assert all(math.isfinite(score.value) for score in other.scores)
        assert other.samples_sha256 == result.samples_sha256, task
        assert (other.key, other.versions, other.n_shot) == (result.key, result.versions, result.n_shot)
        assert other.group_subtasks == result.group_subtasks
        told = {name for name in result.lm_eval if result.lm_eval[name] != other.lm_eval.get(name)}
        assert told <= {"date"}, task
        assert {t: p.requests for t, p in other.paths.items()} == {t: p.requests for t, p in result.paths.items()}
    assert {score.stderr is None for score in one["sums"].scores} == {False}
    assert {score.task for score in one["sums"].scores if score.group} == {"sums"}


def test_every_draw_of_a_sampled_answer_is_kept(folders: dict[str, Path], project: Project) -> None:
    result = project.results(folders["same"])["sums_drawn"]
    assert result.paths["sums_drawn"].requests == 3 * 8
    rows = samples(result, project, folders["same"])
    assert any(len(set(row["resps"][0])) > 1 for row in rows), "sampling gave three equal answers for every question"


def test_from_answers_of_their_own_shards_make_the_scores_of_one_job(
    folders: dict[str, Path], project: Project
) -> None:
    one, merged = project.results(folders["one"]), project.results(folders["own"])
    for task in one:
        if task == "sums_drawn":  # Draws depend on what was drawn before.
            continue
        for score, other in zip(one[task].scores, merged[task].scores, strict=True):
            assert other.value == pytest.approx(score.value, rel=1e-5), score
            assert (other.stderr or 0) == pytest.approx(score.stderr or 0, rel=1e-5), score
    shared = [result.paths for result in merged.values()]
    assert sum(path.cached for paths in shared for path in paths.values()) == 0


def test_an_answer_that_is_missing_is_an_error_that_names_its_shard(
    engine: ReprovalVLLM, project: Project, folders: dict[str, Path], tmp_path: Path
) -> None:
    paths = []
    for number in (1, 2, 3):
        path = folders["same"] / f"{number}-of-3.json"
        shard = ShardResult.model_validate_json(path.read_text())
        answers = tmp_path / f"{number}-of-3.answers.jsonl.gz"
        content = gzip.decompress(path.with_suffix(".answers.jsonl.gz").read_bytes())
        if number == 2:
            content = b"".join(content.splitlines(keepends=True)[1:])
        answers.write_bytes(gzip.compress(content))
        paths.append(tmp_path / path.name)
        write_record(paths[-1], shard.model_copy(update={"answers_sha256": sha256_file(answers)}))
    with pytest.raises(MergeError, match=r"have no answer, .* expected from shard 2 of 3"):
        merged(project, tmp_path, paths)

"""Run beside run, and run beside published value: what is said, of what, and the first thing that was not the same."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import synthetic

from reproval import reproduce
from reproval.collect import load
from reproval.files import read_record, sha256_file, write_record
from reproval.records import Evaluation, UnitResult
from reproval.reference import Reference
from reproval.reproduce_content import Reproduction, ScoreVerdict
from reproval.reproduce_judge import NothingToJudge, judge_published
from reproval.reproduce_settings import against_published
from reproval.reproduce_words import table_markdown, table_text
from reproval.settings import SuiteConfig

TASKS = (*synthetic.DEMO_TASKS, synthetic.Task("mmlu", "group", 60, 3, shots=5))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> synthetic.Project:
    return synthetic.write_project(tmp_path_factory.mktemp("a"), synthetic.DEMO_MODELS[:1], TASKS, trace=False)


@pytest.fixture
def other(project: synthetic.Project, tmp_path: Path) -> Path:
    shutil.copytree(project.results, tmp_path / "b")
    return tmp_path / "b"


def edit(results: Path, task: str, sample: Callable[[dict[str, Any]], None], **result: Any) -> None:
    """Change samples, and fields of the record, of the unit that holds a task; hashes and keys stay right."""
    (path,) = (p for p in results.glob("tasks/*/*/result.json") if read_record(p, UnitResult).task == task)
    samples = path.parent / "samples.jsonl.gz"
    lines = [json.loads(line) for line in gzip.decompress(samples.read_bytes()).splitlines()]
    for line in lines:
        sample(line)
    samples.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    record = read_record(path, UnitResult)
    write_record(path, record.model_copy(update={"samples_sha256": sha256_file(samples)} | result))


def judged(a: Path, b: Path, tmp_path: Path, *arguments: str) -> tuple[int, Reproduction]:
    out = tmp_path / "verdict.json"
    code = reproduce.main(["compare", str(a), str(b), "--json", str(out), *arguments])
    return code, read_record(out, Reproduction)


def score(found: Reproduction, task: str, metric: str) -> ScoreVerdict:
    return next(entry for entry in found.scores if (entry.task, entry.metric) == (task, metric))


def test_a_run_beside_itself_is_identical(project: synthetic.Project, other: Path, tmp_path: Path) -> None:
    code, found = judged(project.results, other, tmp_path)
    assert (code, found.verdict) == (0, "identical")
    assert {entry.task for entry in found.scores} == {task.name for task in TASKS}
    for entry in found.scores:
        assert entry.unlike == []
        assert entry.samples is not None
        assert entry.samples.equal_bits
        assert entry.samples.changed_answers == 0


def test_a_score_that_fell_differs_and_the_others_stay_identical(
    project: synthetic.Project, other: Path, tmp_path: Path
) -> None:
    def worse(line: dict[str, Any]) -> None:
        line["acc"] = 0.0
        line["filtered_resps"] = [["-9.0", "False"]]

    old = next(r for p in other.glob("tasks/*/*/result.json") if (r := read_record(p, UnitResult)).task == "capitals")
    scores = [s.model_copy(update={"value": 0.0}) if s.metric == "acc" else s for s in old.scores]
    edit(other, "capitals", worse, scores=scores, versions={"capitals": 99})
    code, found = judged(project.results, other, tmp_path)
    assert (code, found.verdict) == (1, "differs")
    entry = score(found, "capitals", "acc")
    assert entry.verdict == "differs"
    assert entry.effect == pytest.approx(-(entry.reference or 0))
    assert entry.unlike[0].what == "task version"
    assert entry.samples is not None
    assert entry.samples.changed_answers > 0
    assert score(found, "physics_sentences", "acc").verdict == "identical"
    assert "first difference: task version" in table_text(found)


def test_models_suites_and_filters_are_told_apart(tmp_path: Path) -> None:
    tasks = [
        synthetic.Task("sums", "generation", 40, suite=suite, shots=shots) for suite, shots in (("a", 0), ("b", 5))
    ]
    project = synthetic.write_project(tmp_path / "one", synthetic.DEMO_MODELS, tasks, trace=False)
    shutil.copytree(project.results, tmp_path / "two")

    def worse(line: dict[str, Any]) -> None:
        if line["filter"] == "strict-match" and line["doc_id"] < 20:
            line["exact_match"], line["filtered_resps"] = 1.0 - line["exact_match"], ["<s>|B"]

    ((path, old),) = (
        (p, r)
        for p in (tmp_path / "two").glob("tasks/smollm2-135m/a.*/result.json")
        if (r := read_record(p, UnitResult)).suite == "a"
    )
    shutil.copytree(path.parent, tmp_path / "edited/tasks/x/y")
    edit(tmp_path / "edited", "sums", worse, scores=old.scores)
    shutil.rmtree(path.parent)
    shutil.copytree(tmp_path / "edited/tasks/x/y", path.parent)
    _, found = judged(project.results, tmp_path / "two", tmp_path)
    said = table_text(found)
    assert "sums (a) exact_match,strict-match of smollm2-135m: 40 documents, 0 prompts and 20 answers changed" in said
    assert (
        "sums (a) exact_match,strict-match of smollm2-135m-fp32: 40 documents, 0 prompts and 0 answers changed" in said
    )
    assert "exact_match, strict-match" not in said
    assert "<s>" not in table_markdown(found)


def test_prompts_are_compared_before_scores(project: synthetic.Project, other: Path, tmp_path: Path) -> None:
    def reworded(line: dict[str, Any]) -> None:
        if line["doc_id"] == 3:
            line["prompt_hash"] = "f" * 64
            line["arguments"] = [["Another question?", "x"]]

    edit(other, "physics_sentences", reworded)
    _, found = judged(project.results, other, tmp_path)
    entry = score(found, "physics_sentences", "acc")
    assert entry.verdict != "identical"
    assert entry.samples is not None
    assert entry.samples.changed_prompts == 1
    assert "document 3" in (entry.samples.first_changed_prompt or "")
    assert entry.unlike[-1].what == "prompt"
    assert "document 3" in table_markdown(found)


def test_documents_of_one_side_only_are_told_and_left_out(
    project: synthetic.Project, other: Path, tmp_path: Path
) -> None:
    (path,) = (p for p in other.glob("tasks/*/*/result.json") if read_record(p, UnitResult).task == "capitals")
    samples = path.parent / "samples.jsonl.gz"
    lines = gzip.decompress(samples.read_bytes()).splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["doc_id"] < 20]
    samples.write_bytes(gzip.compress(b"".join(kept)))
    record = read_record(path, UnitResult)
    values = [json.loads(line)["acc"] for line in kept]
    scores = [
        s.model_copy(update={"value": sum(values) / 20, "n": 20}) if s.metric == "acc" else s for s in record.scores
    ]
    write_record(path, record.model_copy(update={"samples_sha256": sha256_file(samples), "scores": scores}))
    code, found = judged(project.results, other, tmp_path)
    entry = score(found, "capitals", "acc")
    assert code == 3
    assert (entry.verdict, entry.n, entry.effect) == ("inconclusive", 20, 0.0)
    assert entry.samples is not None
    assert entry.samples.only_reference == 28
    assert "judged on the 20 documents of both sides" in entry.notes


def test_two_runs_of_nothing_in_common_are_not_judged(
    project: synthetic.Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apart = synthetic.write_project(
        tmp_path / "c", synthetic.DEMO_MODELS[:1], [synthetic.Task("elsewhere")], trace=False
    )
    assert reproduce.main(["compare", str(project.results), str(apart.results)]) == 2
    assert "no score in common" in capsys.readouterr().err
    assert reproduce.main(["compare", str(project.results), str(tmp_path)]) == 2
    assert "name a results folder or a bundle" in capsys.readouterr().err


def published(results: Path, task: str, metric: str, value: float, **fields: Any) -> Reference:
    unit = next(r for p in results.glob("tasks/*/*/result.json") if (r := read_record(p, UnitResult)).task == task)
    entry = {"model": unit.model, "suite": unit.suite, "task": task, "metric": metric, "value": value}
    return Reference.model_validate(
        {
            "title": "A paper",
            "source": {"url": "https://example.org", "where": "a table", "seen": "for this test"},
            "made_with": {"harness": "lm-eval", "hardware": "another computer"},
            "margin": {"absolute": 0.25, "because": "of this test"},
            "models": {unit.model: {"hub": "a/b", "revision": "0" * 40}},
            "suites": {unit.suite: {"tasks": [task]}},
            "scores": [entry | fields],
        }
    )


@pytest.mark.parametrize(
    ("task", "metric", "away", "fields", "word"),
    [
        ("capitals", "acc", 0.0, {"n": 5000}, "reproduced"),
        ("capitals", "acc", 0.4, {"n": 5000}, "differs"),
        ("capitals", "acc", 0.05, {"n": 5000, "margin": {"absolute": 0.1, "because": "x"}}, "inconclusive"),
        ("capitals", "acc", 0.0, {"stderr": 0.01}, "reproduced"),
        ("capitals", "acc", 0.0, {}, "reproduced"),
        ("capitals", "acc", 0.0, {"n": 5000, "rounded_to": 0.4}, "inconclusive"),
        ("essays", "word_perplexity", 0.0, {"margin": {"relative": 0.5, "because": "x"}}, "reproduced"),
        ("mmlu", "acc", 0.0, {"stderr": 0.01}, "reproduced"),
        ("mmlu", "acc", 0.5, {"stderr": 0.01}, "differs"),
    ],
)
def test_a_published_value(
    project: synthetic.Project, task: str, metric: str, away: float, fields: dict[str, Any], word: str
) -> None:
    models = load(project.results, project.evaluations)
    value = next(s.value for u in models[0].units for s in u.result.scores if (s.task, s.metric) == (task, metric))
    found = judge_published(published(project.results, task, metric, value - away, **fields), models)
    (entry,) = found.scores
    assert entry.verdict == word
    assert entry.effect is not None
    assert (entry.low or 0) <= entry.effect <= (entry.high or 0)
    assert entry.unlike[0].what == "model"
    assert "hardware" in [unlike.what for unlike in entry.unlike]
    assert bool([note for note in entry.notes if "taken to" in note]) == (not {"n", "stderr"} & fields.keys())


@pytest.mark.parametrize(
    ("said", "same"),
    [
        ({"harness": "lm-eval", "engine": "vllm"}, True),
        ({"harness": "lm-eval", "harness_version": "0.4.13", "engine": "vLLM", "engine_version": "0.32.0"}, True),
        ({"harness": "lm-eval", "harness_version": "0.4", "engine": "vLLM", "engine_version": "0.32"}, True),
        ({"harness": "lm-eval", "harness_version": "0.4.1", "engine": "vLLM", "engine_version": "0.3"}, False),
        ({"harness": "lm-eval", "harness_version": "0.4.130", "engine": "vLLM", "engine_version": "0.32.0.1"}, False),
        ({"harness": "lighteval", "engine": "v"}, False),
    ],
)
def test_a_published_version_is_met_by_itself_and_by_what_it_leaves_open(
    project: synthetic.Project, said: dict[str, str], same: bool
) -> None:
    found = unlike_published(project, made_with=said) & {"harness", "engine"}
    assert found == (set() if same else {"harness", "engine"})


def unlike_published(
    project: synthetic.Project,
    settings: dict[str, Any] | None = None,
    suite: dict[str, Any] | None = None,
    **score: Any,
) -> set[str]:
    """What is named as not the same, with these settings of the task here and this suite in the reference."""
    (model,) = load(project.results, project.evaluations)
    unit = next(u for u in model.units if u.result.task == "capitals")
    result = unit.result.model_copy(update={"made_of": {**unit.result.made_of, "settings": settings or {}}})
    reference = published(project.results, "capitals", "acc", 0.5, **score)
    if suite is not None:
        reference = reference.model_copy(update={"suites": {unit.result.suite: SuiteConfig.model_validate(suite)}})
    found = against_published(reference, reference.scores[0], model, dataclasses.replace(unit, result=result))
    return {unlike.what for unlike in found}


@pytest.mark.parametrize(
    ("suite", "limit", "same"),
    [
        ({"tasks": ["capitals"]}, None, True),
        ({"tasks": ["capitals"]}, 20, False),
        ({"tasks": ["capitals"], "limit": 20}, 20, True),
        ({"tasks": [{"task": "capitals", "limit": 20}], "limit": 5}, 20, True),
        ({"tasks": [{"task": "capitals", "limit": None}], "limit": 5}, None, True),
        ({"tasks": [{"task": "capitals", "limit": 20}]}, None, False),
    ],
)
def test_a_limit_that_the_reference_asks_for_is_none_of_the_differences(
    project: synthetic.Project, suite: dict[str, Any], limit: int | None, same: bool
) -> None:
    assert ("limit" in unlike_published(project, {"limit": limit}, suite)) == (not same)


@pytest.mark.parametrize(
    ("said", "here", "same"),
    [
        (True, "tool_use", True),
        (True, True, True),
        (False, None, True),
        (False, "tool_use", False),
        (True, None, False),
    ],
)
def test_a_chat_template_with_a_name_is_one(
    project: synthetic.Project, said: bool, here: bool | str | None, same: bool
) -> None:
    unlike = unlike_published(project, {"apply_chat_template": here}, made_with={"chat_template": said})
    assert ("chat template" in unlike) == (not same)


def test_a_published_score_that_was_not_evaluated_is_inconclusive(project: synthetic.Project) -> None:
    models = load(project.results, project.evaluations)
    known = published(project.results, "capitals", "acc", 0.5, n=50)
    unknown = published(project.results, "capitals", "f1", 0.5)
    found = judge_published(known.model_copy(update={"scores": [*known.scores, *unknown.scores]}), models)
    assert found.scores[1].verdict == "inconclusive"
    assert found.scores[1].notes == ["not evaluated here"]
    with pytest.raises(NothingToJudge, match=r"expected capitals f1 \(none\); found capitals acc \(none\)"):
        judge_published(unknown, models)


def test_a_percentage_as_reference_is_named_not_tested(project: synthetic.Project) -> None:
    models = load(project.results, project.evaluations)
    reference = published(project.results, "sums", "exact_match", 0.5, n=60, filter="strict-match")
    percent = reference.scores[0].model_copy(update={"value": 54.0})
    found = judge_published(reference.model_copy(update={"scores": [percent]}), models)
    assert found.verdict == "inconclusive"
    assert "value 54 is no proportion: a percentage?" in found.scores[0].notes[0]


def with_value(results: Path, task: str, metric: str, change: Callable[[float], float]) -> None:
    """Another value of a score, with the same samples."""
    old = next(r for p in results.glob("tasks/*/*/result.json") if (r := read_record(p, UnitResult)).task == task)
    scores = [
        s.model_copy(update={"value": change(s.value)}) if (s.task, s.metric) == (task, metric) else s
        for s in old.scores
    ]
    edit(results, task, lambda _: None, scores=scores)


@pytest.mark.parametrize(("task", "metric"), [("capitals", "acc"), ("essays", "bits_per_byte"), ("mmlu", "acc")])
@pytest.mark.parametrize("side", ["reference", "here"])
def test_the_same_samples_with_another_value_are_not_identical(
    project: synthetic.Project, other: Path, tmp_path: Path, task: str, metric: str, side: str
) -> None:
    with_value(other, task, metric, lambda value: value / 3)
    a, b = (other, project.results) if side == "reference" else (project.results, other)
    code, found = judged(a, b, tmp_path)
    entry = score(found, task, metric)
    assert entry.verdict not in ("identical", "reproduced")
    assert entry.here is not None
    assert entry.reference is not None
    if entry.effect is None:
        assert "no standard error of the score here: nothing to test with" in entry.notes
    else:
        assert entry.effect == pytest.approx(entry.here - entry.reference)
    assert entry.samples is not None
    assert entry.samples.changed_scores == 0
    assert "the samples are the same and the values are not: another aggregation" in entry.notes
    assert code in (1, 3)
    assert found.exit_code == code


@pytest.mark.parametrize("side", ["reference", "here"])
@pytest.mark.parametrize("what", ["value", "stderr"])
def test_a_score_that_is_no_number_is_inconclusive_and_the_others_are_judged(
    project: synthetic.Project, other: Path, tmp_path: Path, what: str, side: str
) -> None:
    def broken(results: Path) -> None:
        old = next(r for p in results.glob("tasks/*/*/result.json") if (r := read_record(p, UnitResult)).task == "sums")
        wrong = {"value": 0.9} | {what: math.nan}
        scores = [s.model_copy(update=wrong) if s.filter == "strict-match" else s for s in old.scores]
        edit(results, "sums", lambda _: None, scores=scores)

    broken(other)
    with_value(other, "capitals", "acc", lambda value: 0.0)
    a, b = (other, project.results) if side == "reference" else (project.results, other)
    code, found = judged(a, b, tmp_path)
    entry = score(found, "sums", "exact_match")
    name = "value" if what == "value" else "standard error"
    where = "in the reference" if side == "reference" else "here"
    assert (entry.verdict, entry.effect) == ("inconclusive", None)
    assert f"the {name} {where} is no finite number: nothing to test with" in entry.notes
    assert ("another aggregation" in " ".join(entry.notes)) == (what == "stderr")
    assert score(found, "capitals", "acc").verdict == "differs"
    assert score(found, "physics_sentences", "acc").verdict == "identical"
    assert (code, found.verdict) == (1, "differs")


def test_a_run_may_come_to_a_value_that_no_reference_may_state(
    project: synthetic.Project, other: Path, tmp_path: Path
) -> None:
    with_value(other, "capitals", "acc", lambda value: 100 * value)
    _, found = judged(other, project.results, tmp_path)
    entry = score(found, "capitals", "acc")
    assert entry.verdict == "inconclusive"
    assert "no proportion: a percentage?" in entry.notes[-1]


def without_the_first_essay(results: Path) -> float:
    """Take one document out of what makes the perplexity of a rolling task, whose new value is returned."""
    likelihoods, words = [], []

    def leave_out(line: dict[str, Any]) -> None:
        if line["doc_id"] == 0:
            line["word_perplexity"] = None
        else:
            likelihoods.append(line["word_perplexity"][0])
            words.append(line["word_perplexity"][1])

    edit(results, "essays", leave_out)
    value = math.exp(-sum(likelihoods) / sum(words))
    with_value(results, "essays", "word_perplexity", lambda _: value)
    return value


def test_a_document_without_a_log_likelihood_is_left_out_of_pairs(
    project: synthetic.Project, other: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    shutil.copytree(project.results, first)
    without_the_first_essay(first)
    _, found = judged(first, project.results, tmp_path)
    entry = score(found, "essays", "word_perplexity")
    assert entry.samples is not None
    assert (entry.n, entry.scale, entry.effect, entry.samples.changed_scores) == (23, "ratio", 1.0, 1)
    without_the_first_essay(other)
    _, found = judged(first, other, tmp_path)
    entry = score(found, "essays", "word_perplexity")
    assert entry.samples is not None
    assert (entry.verdict, entry.samples.changed_scores) == ("identical", 0)


def test_a_document_without_a_log_likelihood_is_left_out_beside_a_published_perplexity(
    project: synthetic.Project, other: Path
) -> None:
    value = without_the_first_essay(other)
    reference = published(project.results, "essays", "word_perplexity", value, margin={"relative": 0.5, "because": "x"})
    found = judge_published(reference, load(other, reproduce.newest(other)))
    assert (found.verdict, found.scores[0].scale) == ("reproduced", "ratio")


def test_a_score_that_its_samples_do_not_make_is_compared_as_two_values(
    project: synthetic.Project, other: Path, tmp_path: Path
) -> None:
    """With both sides aggregated in the same unknown way, and one answer changed."""
    first = tmp_path / "first"
    shutil.copytree(project.results, first)

    def flip(line: dict[str, Any]) -> None:
        if line["doc_id"] == 5:
            line["acc"] = 1 - line["acc"]
            line["filtered_resps"] = line["filtered_resps"][::-1]

    for results in (first, other):
        with_value(results, "capitals", "acc", lambda value: value**2)
    edit(other, "capitals", flip)
    _, found = judged(first, other, tmp_path)
    entry = score(found, "capitals", "acc")
    assert entry.effect == 0
    assert entry.method is not None
    assert entry.method.startswith("two values")
    assert "compared as two values" in entry.notes[0]
    assert entry.samples is not None
    assert entry.samples.changed_answers == 1


def test_a_generation_setting_of_one_side_only_is_named(
    project: synthetic.Project, other: Path, tmp_path: Path
) -> None:
    def asked(results: Path, generation: dict[str, Any]) -> None:
        old = next(r for p in results.glob("tasks/*/*/result.json") if (r := read_record(p, UnitResult)).task == "sums")
        settings = {**old.made_of.get("settings", {}), "generation": generation}
        edit(results, "sums", lambda _: None, made_of={**old.made_of, "settings": settings})

    first = tmp_path / "first"
    shutil.copytree(project.results, first)
    for ours, theirs, expected in (
        ({"temperature": 0.7}, {}, ("not set", "0.7")),
        ({}, {"temperature": 0.7}, ("0.7", "not set")),
        ({"max_gen_toks": 8, "temperature": 0.7}, {"max_gen_toks": 8}, ("not set", "0.7")),
    ):
        asked(first, theirs)
        asked(other, ours)
        _, found = judged(first, other, tmp_path)
        (unlike,) = score(found, "sums", "exact_match").unlike
        assert (unlike.what, unlike.reference, unlike.here) == ("generation: temperature", *expected)


def test_a_variable_of_vllm_of_one_side_only_is_named(project: synthetic.Project, other: Path, tmp_path: Path) -> None:
    # Batch invariance has a line of its own.
    variables = {"VLLM_BATCH_INVARIANT": "1", "VLLM_SLEEP_WHEN_IDLE": "1"}
    old = next(r for p in other.glob("tasks/*/*/result.json") if (r := read_record(p, UnitResult)).task == "sums")
    made = old.provenance.model_copy(update={"engine_variables": variables, "batch_invariant": True})
    edit(other, "sums", lambda _: None, provenance=made)
    _, found = judged(project.results, other, tmp_path)
    assert [(unlike.what, unlike.reference, unlike.here) for unlike in score(found, "sums", "exact_match").unlike] == [
        ("batch invariant", "false", "true"),
        ("vLLM's variables: VLLM_SLEEP_WHEN_IDLE", "not set", "1"),
    ]


@pytest.mark.parametrize("margin", ["0", "-0.1", "nan", "much"])
def test_a_margin_that_is_none_is_refused(margin: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(["compare", "a", "b", f"--margin={margin}"])
    assert stopped.value.code == 2
    assert "--margin" in capsys.readouterr().err


def test_a_fault_of_the_program_does_not_exit_as_a_difference_does(
    project: synthetic.Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("of this test")

    monkeypatch.setattr(reproduce, "judge_runs", fail)
    assert reproduce.main(["compare", str(project.results), str(project.results)]) == 2
    assert "of this test" in capsys.readouterr().err


def test_shown_verdicts_exit_with_their_code(
    project: synthetic.Project, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, found = judged(project.results, other, tmp_path)
    for word, code in (("identical", 0), ("reproduced", 0), ("differs", 1), ("inconclusive", 3)):
        record = found.model_copy(update={"verdict": word, "exit_code": code})
        write_record(tmp_path / "shown.json", record)
        capsys.readouterr()
        assert reproduce.main(["show", str(tmp_path / "shown.json")]) == code
        assert word.upper() in capsys.readouterr().out


def test_the_newest_evaluation_of_a_model_counts(project: synthetic.Project, other: Path) -> None:
    (path,) = other.glob("runs/*/evaluation.json")
    old = read_record(path, Evaluation)
    write_record(other / "runs/older/evaluation.json", old.model_copy(update={"begin": "2020-01-01T00:00:00+00:00"}))
    assert reproduce.newest(other) == [path]

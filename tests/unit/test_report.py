"""The content of the report, its Markdown, and what it must not show. The page itself is tested in a browser."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import synthetic
import yaml

from reproval import (
    collect,
    compare,
    report,
    report_facts,
    report_html,
    report_markdown,
    reproduce_settings,
    scrub,
    statistics,
    templates,
    words,
)
from reproval.files import read_record, write_record
from reproval.records import DatasetSource, ModelManifest, ScoringPath, StoredFile, TaskManifest, UnitResult
from reproval.report_content import Report

TASKS = (*synthetic.DEMO_TASKS, synthetic.Task("mmlu", "group", 60, 5, shots=5))
MODELS = (
    synthetic.Model("weak", 0.35),
    synthetic.Model("strong", 0.75, 14_768_307_200, 1, levers=(synthetic.CAP,), failures=("running",), cut=7),
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> synthetic.Project:
    return synthetic.write_project(tmp_path_factory.mktemp("report"), MODELS, TASKS)


@pytest.fixture(scope="module")
def models(project: synthetic.Project) -> list[collect.ModelData]:
    return collect.load(project.results, project.evaluations)


@pytest.fixture(scope="module")
def built(models: list[collect.ModelData]) -> Report:
    return report.build(models)


def test_each_task_has_one_line_with_the_score_of_its_record(built: Report, models: list[collect.ModelData]) -> None:
    assert [line.task for line in built.headlines] == [task.name for task in TASKS]
    assert [line.metric for line in built.headlines] == [
        "acc_norm", "acc_norm", "exact_match", "word_perplexity", "acc_norm",
    ]  # fmt: skip
    for line in built.headlines:
        for model, cell in zip(models, line.cells, strict=True):
            unit = next(u for u in model.units if u.result.task == line.task)
            score = next(
                s for s in unit.result.scores if (s.task, s.metric, s.filter) == (line.task, line.metric, line.filter)
            )
            assert cell is not None
            assert (cell.value, cell.stderr, cell.n) == (score.value, score.stderr, score.n)
            assert cell.low is not None
            assert cell.high is not None
            assert cell.low < cell.value < cell.high


def test_the_better_model_is_named_whichever_way_the_metric_goes(built: Report) -> None:
    found = {pair.task: pair for pair in built.comparisons}
    assert found["mmlu"].better == "strong"
    assert found["mmlu"].effect < 0
    assert found["essays"].better == "strong"
    assert found["essays"].scale == "ratio"
    assert found["essays"].effect > 1
    assert all(pair.p_holm >= pair.p_value for pair in built.comparisons)
    assert "essays: strong is better than weak, word_perplexity ×0." in " ".join(built.findings)
    assert all("score-changing lever" in finding for finding in built.findings)


def test_every_pair_is_compared_on_every_task_and_corrected_together(tmp_path: Path) -> None:
    three = synthetic.write_project(tmp_path, synthetic.GPU_MODELS, synthetic.DEMO_TASKS)
    built = report.build(collect.load(three.results, three.evaluations))
    assert len(built.comparisons) == 3 * len(synthetic.DEMO_TASKS)
    assert min(p.p_holm for p in built.comparisons) == pytest.approx(
        min(1.0, 12 * min(p.p_value for p in built.comparisons))
    )


def test_models_on_other_documents_are_not_compared_and_it_says_so(tmp_path: Path) -> None:
    one = synthetic.write_project(tmp_path / "a", MODELS[:1], [synthetic.Task("capitals", documents=40)])
    two = synthetic.write_project(tmp_path / "b", MODELS[1:], [synthetic.Task("capitals", documents=48)])
    loaded = collect.load(one.results, one.evaluations) + collect.load(two.results, two.evaluations)
    built = report.build(loaded)
    assert built.comparisons == []
    assert [item.reason for item in built.untested] == ["not the same documents: 40 and 48, 40 of them shared"]
    assert "no two of them on the same questions" in built.answer


def test_perplexities_are_compared_on_the_documents_that_have_one(
    built: Report, models: list[collect.ModelData]
) -> None:
    line = next(line for line in built.headlines if line.task == "essays")

    def without_the_first(model: collect.ModelData) -> compare.Side:
        side = compare.side(model, line)
        assert isinstance(side, compare.Side)
        assert side.weights is not None
        value = math.exp(-side.values[1:].sum() / side.weights[1:].sum())
        unknown = np.where(np.arange(side.values.size) == 0, math.nan, 0.0)
        score = side.score.model_copy(update={"value": value})
        return replace(side, score=score, values=side.values + unknown, weights=side.weights + unknown)

    found = compare.compare(*map(without_the_first, models), 0.05)
    assert isinstance(found, statistics.Comparison), found
    assert (found.n, found.scale) == (23, "ratio")


def test_other_prompts_for_the_same_documents_are_compared_and_marked(tmp_path: Path) -> None:
    one = synthetic.write_project(tmp_path / "a", MODELS[:1], [synthetic.Task("capitals", documents=40, shots=0)])
    two = synthetic.write_project(tmp_path / "b", MODELS[1:], [synthetic.Task("capitals", documents=40, shots=5)])
    loaded = collect.load(one.results, one.evaluations) + collect.load(two.results, two.evaluations)
    built = report.build(loaded)
    assert [pair.prompts_equal for pair in built.comparisons] == [False]
    assert "prompts differ" in report_markdown.render(built)


def test_one_model_alone_is_reported_without_comparisons(tmp_path: Path) -> None:
    alone = synthetic.write_project(tmp_path, MODELS[:1], synthetic.DEMO_TASKS, trace=False)
    built = report.build(collect.load(alone.results, alone.evaluations))
    assert built.comparisons == built.untested == built.findings == []
    assert built.memory[0].curve is None
    assert "Differences between models" not in report_html.render(built)
    assert "nothing is compared" in report_markdown.render(built)


def test_what_was_done_and_what_failed_and_what_was_cut_is_there(built: Report) -> None:
    weak, strong = built.fits
    assert (weak.changes_scores, strong.changes_scores) == (False, True)
    assert strong.rung == 1
    assert [(a.model, a.attempt.outcome, a.attempt.failure) for a in built.attempts] == [
        ("weak", "finished", None), ("strong", "failed", "running"), ("strong", "finished", None),
    ]  # fmt: skip
    assert [(c.model, c.task, c.cut) for c in built.cuts] == [("strong", "sums", 7)]
    assert [m.device for m in built.memory] == ["host", "GPU"]


def test_requests_that_were_kept_earlier_make_no_throughput(tmp_path: Path) -> None:
    project = synthetic.write_project(tmp_path, MODELS[:1], synthetic.DEMO_TASKS[:3])
    for task, kept in (("capitals", 192), ("physics_sentences", 40)):
        path = next(project.results.glob(f"tasks/*/demo.{task}-*/result.json"))
        result = read_record(path, UnitResult)
        paths = {task: result.paths[task].model_copy(update={"cached": kept})}
        write_record(path, result.model_copy(update={"paths": paths, "duration_s": 10.0}))
    capitals, physics, sums = report.build(collect.load(project.results, project.evaluations)).timing[0].tasks
    assert (capitals.requests_per_s, capitals.tokens_per_s) == (None, None)
    assert (physics.requests_per_s, physics.tokens_per_s) == (12.0, None)
    assert sums.tokens_per_s is not None


def test_how_a_model_thinks_stands_beside_its_scores(tmp_path: Path) -> None:
    told = {"enable_thinking": True, "think_end_token": "</think>", "chat_template_args": {"effort": "low"}}
    models = (synthetic.Model("plain"), synthetic.Model("thinks", thinking=told))
    project = synthetic.write_project(tmp_path, models, synthetic.DEMO_TASKS[:1])
    loaded = collect.load(project.results, project.evaluations)
    plain, thinks = (next(row for row in collect.rows([model])) for model in loaded)
    assert [plain[name] for name in told] == [None, None, None]
    assert [thinks[name] for name in told] == [True, "</think>", '{"effort": "low"}']
    facts = report.build(loaded).provenance.by_model
    assert {"enable thinking": "True", "think end token": "</think>"}.items() <= facts["thinks"].items()
    assert "enable thinking" not in facts["plain"]
    assert [each.what for each in reproduce_settings.between_runs(*(m.units[0] for m in loaded), "capitals")][1:4] == [
        "thinking", "end of thoughts", "chat template arguments: effort",
    ]  # fmt: skip


def test_what_marks_scores_is_said_first(tmp_path: Path) -> None:
    short = synthetic.Task("capitals", documents=20, settings={"limit": 20, "apply_chat_template": True})
    part = synthetic.Task("sums", "generation", documents=30, settings={"limit": 0.1})
    models = (
        MODELS[1],
        synthetic.Model("own-code", remote_code=True),
        synthetic.Model("changed", provenance={"git_dirty": True}),
    )
    project = synthetic.write_project(tmp_path, models, (short, part, synthetic.DEMO_TASKS[3]))
    built = report.build(collect.load(project.results, project.evaluations))
    assert [notice.text for notice in built.notices] == [
        "† Score-changing levers were pulled for strong: the marked numbers are not those of the checkpoint as "
        "published.",
        "Only the first 20 documents of each task were asked in demo/capitals (limit): for trying out, not for "
        "publishing.",
        "Only the first 10 % of the documents of each task were asked in demo/sums (limit): for trying out, not for "
        "publishing.",
        "Prompts that were longer than the engine's length lost their beginning: 7 for strong.",
        "Python code that came with the checkpoint was allowed to run for own-code (trust_remote_code).",
        "The workflow had changes beyond its Git commit when it evaluated changed.",
    ]  # fmt: skip
    assert [line.limit for line in built.headlines] == [20, 0.1, None]
    assert [task.settings for task in built.provenance.tasks] == [
        {"limit": "20", "chat template": "true"}, {"limit": "0.1"}, {},
    ]  # fmt: skip
    text, page = report_markdown.render(built), report_html.render(built)
    for notice in built.notices:
        assert f"> {notice.text}" in text
        assert notice.text.replace("'", "&#39;") in page
    assert "20 (limit 20)" in text


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "NaN"), (math.inf, "∞")])
def test_a_score_that_is_no_number_is_shown_as_that_and_compared_with_none(
    tmp_path: Path, value: float, shown: str
) -> None:
    project = synthetic.write_project(tmp_path, MODELS, synthetic.DEMO_TASKS)
    path = next(project.results.glob("tasks/strong/demo.essays-*/result.json"))
    result = read_record(path, UnitResult)
    scores = [result.scores[0].model_copy(update={"value": value}), *result.scores[1:]]
    write_record(path, result.model_copy(update={"scores": scores}))
    built = report.build(collect.load(project.results, project.evaluations))
    cell = built.headlines[3].cells[1]
    assert cell is not None
    assert (str(cell.value), cell.low) == (str(value), None)
    assert [(item.task, item.reason) for item in built.untested] == [("essays", "a score is not a number")]
    assert any("Scores or log-probabilities of strong are not numbers" in notice.text for notice in built.notices)
    assert f"| {shown}† (–) |" in report_markdown.render(built)
    assert f"<b>{shown}†</b>" in report_html.render(built)
    again = Report.model_validate(json.loads(built.model_dump_json(), parse_constant=pytest.fail))
    assert str(again.headlines[3].cells[1]) == str(cell)


def test_an_accuracy_made_of_no_numbers_is_not_passed_over(tmp_path: Path) -> None:
    project = synthetic.write_project(tmp_path, MODELS, synthetic.DEMO_TASKS)
    path = next(project.results.glob("tasks/strong/demo.essays-*/result.json"))
    result = read_record(path, UnitResult)
    paths = {task: each.model_copy(update={"not_a_number": 1}) for task, each in result.paths.items()}
    write_record(path, result.model_copy(update={"paths": paths}))
    built = report.build(collect.load(project.results, project.evaluations))
    assert any("log-probabilities of strong are not numbers" in notice.text for notice in built.notices)


def test_answers_that_their_length_ended_are_counted_and_thoughts_without_an_end_told(tmp_path: Path) -> None:
    models = (synthetic.Model("plain"), synthetic.Model("thinks", thinking={"think_end_token": "</think>"}))
    project = synthetic.write_project(tmp_path, models, synthetic.DEMO_TASKS)
    for path in project.results.glob("tasks/*/demo.sums-*/result.json"):
        result = read_record(path, UnitResult)
        paths = {task: each.model_copy(update={"ended_by_length": 3}) for task, each in result.paths.items()}
        write_record(path, result.model_copy(update={"paths": paths}))
    loaded = collect.load(project.results, project.evaluations)
    built = report.build(loaded)
    assert [(cut.model, cut.cut, cut.ended_by_length) for cut in built.cuts] == [("plain", 0, 3), ("thinks", 0, 3)]
    assert [notice.text for notice in built.notices] == [
        "Answers of thinks reached max_gen_toks. What has no think_end_token by then is judged as it is, though it may "
        "be a thought."
    ]
    ended = {row["task"]: row["answers_ended_by_length"] for row in collect.rows(loaded)}
    assert ended.pop("sums") == 3
    assert set(ended.values()) == {0}
    assert "| plain | sums | 0 | 3 |" in report_markdown.render(built)


def test_answers_that_were_drawn_are_told_and_whether_anybody_asked_for_it(tmp_path: Path) -> None:
    project = synthetic.write_project(tmp_path, (synthetic.Model("plain"),), synthetic.DEMO_TASKS)
    (path,) = project.results.glob("tasks/*/demo.sums-*/result.json")
    result = read_record(path, UnitResult)
    paths = {task: each.model_copy(update={"sampled": 3}) for task, each in result.paths.items()}
    for kwargs, unasked in (({"temperature": 0.7}, False), ({"until": ["."]}, True)):
        told = result.lm_eval | {"configs": {"sums": {"generation_kwargs": kwargs}}}
        write_record(path, result.model_copy(update={"paths": paths, "lm_eval": told}))
        (notice,) = report.build(collect.load(project.results, project.evaluations)).notices
        assert "drawn at random in demo/sums" in notice.text
        assert ("In demo/sums nobody asked for it" in notice.text) == unasked


def test_a_plain_evaluation_has_no_notices(built: Report, models: list[collect.ModelData]) -> None:
    assert report.build(models[:1]).notices == []
    assert len(built.notices) == 2


def test_a_task_of_two_suites_is_told_apart_wherever_it_stands(tmp_path: Path) -> None:
    tasks = [
        synthetic.Task("capitals", documents=200, suite=suite, shots=shots) for suite, shots in (("a", 0), ("b", 5))
    ]
    one = synthetic.write_project(tmp_path / "one", MODELS, tasks)
    other = synthetic.write_project(tmp_path / "other", [synthetic.Model("third")], [replace(tasks[0], documents=9)])
    loaded = collect.load(one.results, one.evaluations) + collect.load(other.results, other.evaluations)
    built = report.build(loaded)
    assert len(built.findings) == 2
    assert {finding.partition(":")[0] for finding in built.findings} == {"capitals (a)", "capitals (b)"}
    text = report_markdown.render(built)
    named = [line for line in text.splitlines() if "capitals" in line]
    assert len(named) > 20
    assert [line for line in named if not re.search(r"capitals \([ab]\)|task:[ab]/capitals", line)] == []
    rows = re.findall(r"<th scope=\"row\"[^>]*>capitals.*", report_html.render(built))
    assert len(rows) > 20
    assert [row for row in rows if not re.search(r"(<small[^>]*>|· )[ab]</small>", row)] == []


def test_memory_is_that_of_the_record_and_its_curve_reaches_the_peak(
    built: Report, models: list[collect.ModelData]
) -> None:
    strong, evaluation = built.memory[1], models[1].evaluation
    assert strong.measured_bytes == evaluation.attempts[-1].gpu_peak_bytes
    assert strong.predicted_bytes == evaluation.plan.ladder[1].predicted.peak_bytes
    assert strong.curve is not None
    assert strong.curve.attempt == 1
    assert max(strong.curve.series["gpu0"]) == strong.measured_bytes


def test_thinning_keeps_ends_order_and_every_series_peak() -> None:
    n = 10_000
    gpu0, gpu1 = [1] * n, [5] * n
    gpu0[1234], gpu1[8765] = 3, 6
    times, series = report_facts.thin([float(i) for i in range(n)], {"gpu0": gpu0, "gpu1": gpu1}, 50)
    assert len(times) <= 103
    assert times[0] == 0.0
    assert times[-1] == n - 1
    assert times == sorted(times)
    assert (max(series["gpu0"]), max(series["gpu1"])) == (3, 6)


def test_the_markdown_has_every_headline_number_and_every_section(built: Report) -> None:
    text = report_markdown.render(built)
    for line in built.headlines:
        for cell in line.cells:
            assert cell is not None
            assert words.number(cell.value) in text
            assert f"({words.number(cell.low)} to {words.number(cell.high)})" in text
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
        "What each model scored", "What was done to make each model fit", "Memory, predicted and measured",
        "Time and throughput", "Failures and retries", "Cut prompts and answers", "Provenance", "How to reproduce",
    ]  # fmt: skip


def test_markdown_tables_are_whole(built: Report) -> None:
    text = report_markdown.render(built)
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert len(tables) > 10
    for table in tables:
        rows = table.splitlines()
        bars = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
        assert len(bars) == 1, table
        assert re.fullmatch(r"\|(:?-+:?\|)+", rows[1]), table


def test_special_tokens_are_no_html_in_markdown(tmp_path: Path) -> None:
    project = synthetic.write_project(tmp_path, MODELS[:1], synthetic.DEMO_TASKS[:1])
    path = next(project.results.glob("tasks/*/*/result.json"))
    known = {"tokenizer_bos_token": ["<s>", 1], "tokenizer_eos_token": ["<|end|>", 2]}
    write_record(path, read_record(path, UnitResult).model_copy(update={"lm_eval": known}))
    built = report.build(collect.load(project.results, project.evaluations))
    assert "| special tokens | bos &lt;s> = 1, eos &lt;\\|end\\|> = 2 |" in report_markdown.render(built)


def test_the_json_is_the_content(project: synthetic.Project, built: Report, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    arguments = ["--results", str(project.results), "--json", str(out), "--evaluations"]
    assert report.main([*arguments, *map(str, project.evaluations)]) == 0
    assert Report.model_validate(json.loads(out.read_text(encoding="utf-8"))) == built


def test_the_image_and_its_network_are_in_the_provenance(built: Report) -> None:
    told = built.provenance.by_model["strong"]
    assert told["container digest"].startswith("sha256:")
    assert (told["container runtime"], told["container network"]) == ("apptainer 1.4.5", "off")
    assert built.provenance.by_model["weak"]["container image"] == "none; ran in the environment of the lock"


def test_what_was_staged_is_in_the_provenance(
    project: synthetic.Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit, weights, tokenizer = "5" * 40, "1" * 64, "2" * 64
    files = [
        StoredFile(path="model.safetensors", size_bytes=8, sha256=weights),
        StoredFile(path="tokenizer.json", size_bytes=8, sha256=tokenizer),
    ]
    staged = {
        "models/weak.json": ModelManifest(
            model="weak", source="hub", hub_id="maker/weak", revision=commit, folder="m", files=files, digest="3" * 64
        ),
        "suites/demo.json": TaskManifest(
            suite="demo", datasets=[DatasetSource(task="capitals", path="geo/capitals", name="all", revision=commit)],
            task_files=[], digest="4" * 64,
        ),
    }  # fmt: skip
    for name, manifest in staged.items():
        write_record(tmp_path / name, manifest)
    out = tmp_path / "report.json"
    arguments = ["--results", str(project.results), "--json", str(out), "--evaluations"]
    manifests = ["--manifests", *(str(tmp_path / name) for name in staged)]
    assert report.main([*arguments, *map(str, project.evaluations), *manifests]) == 0
    other = ModelManifest(model="weak", source="local", folder="m", files=files, digest="5" * 64)
    write_record(tmp_path / "models/other.json", other)
    assert report.main([*arguments, *map(str, project.evaluations), *manifests, str(tmp_path / "models/other.json")])
    assert "models/other.json describe two states of model weak; expected one" in capsys.readouterr().err
    told = Report.model_validate_json(out.read_text(encoding="utf-8")).provenance
    assert told.files == {"weak": {"model.safetensors": weights, "tokenizer.json": tokenizer}}
    assert told.by_model["weak"]["model commit"] == commit
    assert told.by_model["weak"]["model source"] == "maker/weak"
    assert told.by_model["weak"]["tokenizer SHA-256"] == f"{tokenizer} (tokenizer.json)"
    assert [t.dataset for t in told.tasks if t.task == "capitals"] == [f"geo/capitals, all @ {commit}"]


def test_every_method_that_the_code_can_name_is_explained() -> None:
    known = yaml.safe_load((templates.FOLDER / "methods.yaml").read_text(encoding="utf-8"))
    source = Path(statistics.__file__).read_text(encoding="utf-8")
    for name in [*known["intervals"], *known["comparisons"]]:
        assert f'"{name}"' in source
    for name in re.findall(r'"((?:Wilson|Student t|normal|McNemar|paired|stratified)[^"\n]*)"(?!")', source):
        assert name in known["intervals"] or name in known["comparisons"], name


# --- what must not be shown ----------------------------------------------------------------------------------------


def test_paths_and_secrets_are_taken_out_and_counted(tmp_path: Path) -> None:
    token = "hf_" + "aB3" * 12
    env = {"WANDB_API_KEY": "correct-horse-battery", "HOME": "/home/alice"}
    value = {
        "message": f"Bearer {'x' * 30} and {token} at /home/alice/models/qwen, key correct-horse-battery",
        "inside": f"{tmp_path}/resources/models/qwen",
        "file inside": f"file://{tmp_path}/resources/data",
        "root": str(tmp_path),
        "search": "PATH=/usr/bin:/home/alice/bin",
        "url": "https://alice:secretword@example.org/x",
        "file": "file:///home/alice/data",
        "tilde": "~alice/models/qwen",
    }
    clean, removed = scrub.scrub(value, tmp_path, env)
    text = json.dumps(clean)
    assert removed == 9
    for private in ("alice", token, "correct-horse", "secretword", "xxxx"):
        assert private not in text, private
    assert clean["inside"] == "resources/models/qwen"
    assert clean["file inside"] == "resources/data"
    assert clean["root"] == "."


@pytest.mark.parametrize(
    "token",
    [
        *(
            f"{begin}{'aB3' * 12}"
            for begin in ("hf_", "sk-", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "Bearer ")
        ),
        "hf_" + "aB3dE" * 4,
        "sk-proj-" + "aB3_dE-f" * 3,
        "AKIA" + "A1B2" * 4,
        "eyJ" + ".".join(["a1" * 10] * 3),
        "https://somebody:secretword@example.org/x",
    ],
)
def test_every_shape_of_a_token_is_known(token: str, tmp_path: Path) -> None:
    clean, removed = scrub.scrub({"said": f"with {token} in it"}, tmp_path, {})
    assert removed == 1
    assert scrub.SECRET in clean["said"]
    assert scrub.leaks(f"with {token} in it") == "something shaped like a token"
    assert scrub.leaks(clean["said"]) is None


@pytest.mark.parametrize(
    "harmless",
    [
        "docker://ghcr.io/example/reproval@sha256:" + "a" * 64,
        "oras://registry.example.org/team/image@sha256:" + "b" * 64,
        "12.5 tokens/s, 3/4 and/or 7 /s",
        "resources/models/qwen3-4b",
        "Qwen/Qwen3-4B",
        "task:demo/capitals",
        "c" * 40,
        "https://arxiv.org/abs/2411.00640",
    ],
)
def test_what_is_nobodys_secret_stays(harmless: str, tmp_path: Path) -> None:
    assert scrub.scrub(harmless, tmp_path, {}) == (harmless, 0)


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "SMTP_PASSWD", "OPENAI_API_KEY", "APIKEY", "MY_CREDENTIALS",
     "proxy_password"],
)  # fmt: skip
def test_variables_that_are_named_like_secrets_are_ones(name: str, tmp_path: Path) -> None:
    env = {name: "of no shape", "EDITOR": "some words", f"{name}_SHORT": "short"}
    clean, removed = scrub.scrub("of no shape, some words, short", tmp_path, env)
    assert (clean, removed) == (f"{scrub.SECRET}, some words, short", 1)
    assert scrub.own("of no shape", env) == f"the value of the environment variable {name}"
    assert scrub.own("some words, short", env) is None


def test_what_lies_beside_the_project_is_outside_and_keys_and_lists_are_looked_at(tmp_path: Path) -> None:
    project = tmp_path / "evaluation"
    beside = f"{project}-of-alice/models/qwen"
    value = {beside: 1, "list": [beside, 2, [beside]], "beside": f"{beside} and {beside}"}
    clean, removed = scrub.scrub(value, project, {})
    outside = scrub.OUTSIDE
    assert clean == {outside: 1, "list": [outside, 2, [outside]], "beside": f"{outside} and {outside}"}
    # Equal texts are looked at once.
    assert removed == 3


def test_the_home_folder_is_ones_own_but_not_the_root_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    assert scrub.leaks("in /home/alice/models", {}) == "the home folder"
    assert scrub.leaks("in /home/alicephone/models", {}) is None
    monkeypatch.setenv("HOME", "/root")
    assert scrub.leaks("in /root/models", {}) is None


def test_a_record_with_private_things_gives_a_report_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-no-known-shape")
    private = {
        "engine_arguments": {
            "model": "/home/alice/models/qwen",
            "note": "a-token-of-no-known-shape",
            "dtype": "bfloat16",
        }
    }
    project = synthetic.write_project(tmp_path, [synthetic.Model("m", provenance=private)], synthetic.DEMO_TASKS[:1])
    built = report.build(collect.load(project.results, project.evaluations))
    assert built.removed == 2
    for text in (report_html.render(built), report_markdown.render(built), built.model_dump_json()):
        assert "alice" not in text
        assert "no-known-shape" not in text
        assert scrub.leaks(text) is None


def test_a_page_that_would_leak_is_not_written(
    project: synthetic.Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "scrub", lambda value, root: (value, 0))
    monkeypatch.setenv("SOME_SECRET", "strong-enough")
    monkeypatch.setattr(words, "title", lambda models, tasks: "strong-enough")
    out = tmp_path / "report.md"
    arguments = ["--results", str(project.results), "--markdown", str(out), "--evaluations"]
    assert report.main([*arguments, *map(str, project.evaluations)]) == 1
    said = capsys.readouterr().err
    assert "SOME_SECRET" in said
    assert "strong-enough" not in said
    assert not out.exists()


# --- the page's parts that need no browser -------------------------------------------------------------------------


def test_the_page_asks_no_host_for_anything(built: Report) -> None:
    page = report_html.render(built)
    assert "default-src 'none'" in page
    assert re.findall(r'(?:src|href)="(?!#)[^"]*"', page) == []
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)|fetch\(|XMLHttpRequest|WebSocket", page)
    assert len(page) < 300_000


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>|x"
    project = synthetic.write_project(tmp_path, MODELS[:1], [synthetic.Task("capitals", documents=12)])
    path = next(project.results.glob("tasks/*/*/result.json"))
    path.write_text(
        path.read_text(encoding="utf-8").replace('"task": "capitals"', f'"task": "{evil}"'), encoding="utf-8"
    )
    built = report.build(collect.load(project.results, project.evaluations))
    assert "<script>alert" not in report_html.render(built)
    assert "alert(1)&lt;/script>\\|x" in report_markdown.render(built)


def test_figures_share_no_ids(built: Report) -> None:
    page = report_html.render(built)
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for reference in re.findall(r'(?:url\(#|href="#)([^")]+)', page):
        assert reference in ids


def test_a_long_table_says_what_it_left_out(built: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_html, "SCORE_ROWS", 12)
    page = report_html.render(built)
    assert f"12 of {len(built.scores.rows)} scores" in page
    top = [row["top"] for row in report_html.shown_scores(built)]
    assert all(top)


def test_words_of_numbers() -> None:
    assert words.number(0.6895833) == "0.690"
    assert words.number(15.5678) == "15.57"
    assert words.number(12345.6) == "12,346"
    assert words.number(None) == "–"
    assert words.signed(-0.05, "difference") == "−0.050"
    assert words.signed(1.08, "ratio") == "×1.080"
    # What is small is not printed as nothing.
    assert [words.number(value) for value in (0.0, 0.0004, 3e-8)] == ["0.000", "0.00040", "3.0e-08"]
    assert [words.signed(value, "ratio") for value in (1.0, 1.001, 0.99968)] == ["×1.000", "×1.001", "×0.99968"]
    assert words.signed(-0.00004, "difference") == "−0.000040"
    assert words.size(3 * 2**30) == "3.00 GiB"
    assert words.size(500 * 2**20) == "500 MiB"
    assert words.duration(119.95) == "2 min 00 s"
    assert words.duration(7322) == "2 h 02 min"
    assert words.answered(ScoringPath(requests=5, one_token=4, cached=1)) == "4 one token, 1 kept earlier"
    assert pytest.approx(0.05) == compare.ALPHA

"""What cannot be evaluated is refused while the tasks are loaded, before there is an engine."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reproval import stage
from reproval.settings import TaskSettings, Unit
from reproval.tasks import TaskError, built, known_names, prepare

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
metric_list: [{{metric: exact_match}}]
"""
MORE = {
    "plain": "",
    "runs_code": "unsafe_code: true",
    "asks_for_permission": "process_results: !function metric.score",
    "images": "doc_to_image: [q]",
    "misspelled_split": "validation_split: vaildation",
    "no_yaml": "  indented: once too often",
    "metric": "metric_list: [{metric: exct_match, aggregation: mean}]",
    "aggregation": "metric_list: [{metric: exact_match, aggregation: men}]",
    "other_metric": "output_type: multiple_choice\n"
    "doc_to_choice: [b]\nmetric_list: [{metric: acc_nrm, aggregation: mean}]",
    "no_aggregation": "metric_list: [{metric: exct_match}]",
    "target": "output_type: multiple_choice\ndoc_to_choice: [b, c]\ndoc_to_target: 2\nmetric_list: [{metric: acc}]",
    "sampling": "generation_kwargs: {until: [A], max_new_tokenz: 8}",
    "until": "generation_kwargs: {until: [5]}",
    "budget": "generation_kwargs: {until: [A], thinking_token_budget: 5}",
    "empty": "",
    "cut_off": "",
    "twice": "",
    "outside": "",
    "linked": "",
}
DATA = {"empty": "", "cut_off": '{"q": "a", "a"'}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of one document, which lies beside them but for `outside` and `linked`."""
    made = tmp_path_factory.mktemp("tasks")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    data = dict.fromkeys(MORE, made / "data.jsonl")
    data |= {name: made / f"{name}.jsonl" for name in DATA}
    data |= {name: elsewhere / f"{name}.jsonl" for name in ("outside", "linked")}
    for name, more in MORE.items():
        data[name].write_text(DATA.get(name, '{"q": "a", "a": "b"}\n'))
        (made / f"{name}.yaml").write_text(TASK.format(name=name, data=data[name]) + more + "\n")
    shutil.copy(made / "twice.yaml", made / "twice_copy.yaml")
    (made / "group.yaml").write_text("group: group\ntask: [plain, {group: inner, task: [plain]}, pain]\n")
    (made / "linked.jsonl").symlink_to(data["linked"])
    (made / "metric.py").write_text("raise ValueError('set the environment variable HF_ALLOW_CODE_EVAL=1')\n")
    return made


def unit(folder: Path, task: str, *, allowed: bool = False) -> Unit:
    return Unit(suite="s", task=task, include_path=str(folder), unsafe_code=allowed, settings=TaskSettings())


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("runs_code", r"s\.tasks: runs_code: it runs code that the model writes; write unsafe_code: true"),
        ("asks_for_permission", r"s\.tasks: asks_for_permission: .* it runs code .* write unsafe_code: true"),
        ("images", r"s\.tasks: images: asks about images"),
        (
            "misspelled_split",
            r"s\.tasks: misspelled_split: lm-eval cannot load it from .*KeyError: 'vaildation'.*validation_split",
        ),
        ("metric", r"s\.tasks: metric: metric_list: 'exct_match' is no metric of lm-eval's"),
        ("aggregation", r"s\.tasks: aggregation: metric_list: 'exact_match' has an aggregation that lm-eval does not"),
        ("other_metric", r"'acc_nrm' is not computed for output_type: multiple_choice; .*; did you mean 'acc_norm'\?"),
        (
            "target",
            r"target: lm-eval cannot load it from .*target\.yaml: IndexError: .* at `.*test_choice\[test_target\]",
        ),
        ("sampling", r"generation_kwargs: 'max_new_tokenz' is nothing that vLLM knows; did you mean 'max_new_tokens'"),
        ("until", r"generation_kwargs: until is \[5\]; expected text or a list of text"),
        ("twice", r"tasks: twice: .*twice\.yaml and .*twice_copy\.yaml define it; expected one file"),
        ("no_aggregation", r"a metric of its metric_list is none of lm-eval's; correct the name"),
        ("empty", r"empty: lm-eval cannot load it from .*empty\.yaml: its data set holds no documents"),
        ("cut_off", r"cut_off: lm-eval cannot load it from .*cut_off\.yaml: DatasetGenerationError: .*JSON"),
        ("group", r"group: lm-eval cannot .*group\.yaml names 'pain', which is no task, .*did you mean 'plain'\?"),
        ("budget", r"generation_kwargs: thinking_token_budget needs a reasoning parser"),
        ("no_yaml", r"'no_yaml' is not a task of lm-eval(.|\n)*no_yaml\.yaml: .* line 10"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_with_its_name_and_the_reason(folder: Path, task: str, said: str) -> None:
    with pytest.raises(TaskError, match=said):
        prepare(unit(folder, task), None)


def test_all_names_that_lm_eval_does_not_know_are_told_at_once(folder: Path) -> None:
    with pytest.raises(TaskError, match=r"'no_such' is not a task(.|\n)*'nor_such' is not a task"):
        known_names([unit(folder, task) for task in ("no_such", "plain", "nor_such")])


def test_a_right_answer_that_is_no_choice_is_refused(tmp_path: Path) -> None:
    rows = [{"q": "a", "a": target} for target in (0, 1, 2)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = "output_type: multiple_choice\ndoc_to_choice: [b, c]\ndoc_to_target: a\nmetric_list: [{metric: acc}]\n"
    (tmp_path / "t.yaml").write_text(TASK.format(name="t", data=tmp_path / "data.jsonl") + more)
    model = SimpleNamespace(hf_chat_template=None, tokenizer=None)
    with pytest.raises(TaskError, match=r"s\.tasks: t: doc_to_target is 2 in document 2, which has 2 choices"):
        built(unit(tmp_path, "t"), None, model)


def test_what_lm_eval_cannot_ask_is_named(folder: Path) -> None:
    model = SimpleNamespace(hf_chat_template=None, tokenizer=None)
    asked = unit(folder, "plain").model_copy(update={"settings": TaskSettings(num_fewshot=7)})
    with pytest.raises(TaskError, match=r"plain: lm-eval cannot build its requests: num_fewshot is 7, and there are"):
        built(asked, None, model)


def test_a_local_file_that_is_missing_is_no_matter_of_the_network(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(TASK.format(name="t", data=tmp_path / "data.jsonl"))
    run = SimpleNamespace(run=SimpleNamespace(units=[unit(tmp_path, "t")]), seed=None, store=str(tmp_path))
    with pytest.raises(stage.StageError, match=r"t: reads .*data\.jsonl, which is not there; correct data_files"):
        stage.stage_tasks("s", run)


def test_code_that_a_model_writes_runs_where_it_may(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    assert prepare(unit(folder, "runs_code", allowed=True), None).keys() == {"runs_code"}
    # Else the metric refuses, and in a container the caller's variable is not there.
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"


def test_data_that_nobody_would_see_change_is_refused(folder: Path, tmp_path: Path) -> None:
    def staged(task: str) -> Any:
        run = SimpleNamespace(units=[unit(folder, task)])
        return stage.stage_tasks("s", SimpleNamespace(run=run, seed=None, store=str(tmp_path)))  # all that is read

    with pytest.raises(stage.StageError, match=r"s\.tasks: outside: reads .*outside\.jsonl, which is not in include"):
        staged("outside")
    # A link is followed where the content is hashed.
    for name in ("plain", "linked"):
        assert [source.task for source in staged(name).datasets] == [name]

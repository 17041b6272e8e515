"""References: the shipped ones are right, wrong ones are refused with their line, and a configuration comes of them."""

from __future__ import annotations

import math
from pathlib import Path

import jsonschema
import pytest
import yaml

from reproval import config as configuration
from reproval import reference
from reproval.problems import ConfigError
from reproval.reproduce_settings import published_settings

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "config/references").glob("*.yaml"))
PYTHIA = ROOT / "config/references/pythia-160m-five-shot.yaml"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_reference_makes_a_configuration_that_can_be_run(path: Path, tmp_path: Path) -> None:
    given = {"reference": str(path), "hardware": {"gpus": 1, "gpu_memory_gib": 79.6}}
    config = configuration.load(reference.configure(given, ROOT, tmp_path), [], ROOT, tmp_path)
    loaded = reference.load(path)
    assert set(config.models) == set(loaded.models)
    assert len(configuration.runs(config, ROOT, tmp_path, "an environment")) == len(loaded.models)
    for score in loaded.scores:
        runs = config.models[score.model].suites
        assert runs is None or score.suite in runs
        tasks = [entry if isinstance(entry, str) else entry.task for entry in config.suites[score.suite].tasks]
        assert score.task in tasks


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_published_numbers_agree_with_each_other(path: Path) -> None:
    for score in reference.load(path).scores:
        if score.n and score.stderr and score.metric.startswith("acc"):
            assert math.sqrt(score.value * (1 - score.value) / (score.n - 1)) == pytest.approx(score.stderr, rel=1e-6)
        if score.n and not score.rounded_to and score.metric != "perplexity":
            assert score.value * score.n == pytest.approx(round(score.value * score.n), abs=1e-6)
        if score.rounded_to:
            assert score.value / score.rounded_to == pytest.approx(round(score.value / score.rounded_to))


def test_the_schema_is_what_the_models_say() -> None:
    written = (ROOT / "workflow/schemas/reference.schema.yaml").read_text(encoding="utf-8")
    assert written == reference.schema_text(), "python -m reproval.reference schema > reference.schema.yaml"
    for path in SHIPPED:
        jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(written))


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("value: 0.779", "valeu: 0.779", "valeu"),
        ("task: sciq", "task: 7", "task"),
        ("suite: five-shot, task: piqa, metric: acc,", "suite: six-shot, task: piqa, metric: acc,", "not under suites"),
        ("metric: acc_norm, value: 0.773", "metric: acc, value: 0.773", "once, not twice"),
        ("  absolute: 0.02", "  absolute: 0.02\n  relative: 0.1", "either absolute or relative"),
        ("n: 1000", "n: 0", "greater than or equal to 1"),
        ("value: 0.779", "value: 77.9", "no percentage"),
        ("num_fewshot: 5\n", "num_fewshot: 3\n", "one num_fewshot for"),
    ],
)
def test_a_wrong_reference_is_refused_with_file_key_and_mend(
    tmp_path: Path, before: str, after: str, said: str
) -> None:
    text = PYTHIA.read_text(encoding="utf-8")
    assert before in text
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text.replace(before, after, 1), encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        reference.load(wrong)
    assert said in str(refused.value)
    assert str(wrong) in str(refused.value)
    assert "mend:" in str(refused.value)


def test_what_runs_comes_from_the_reference_and_where_from_the_configuration(tmp_path: Path) -> None:
    given = {
        "reference": str(PYTHIA),
        "models": {"mine": {"path": "x"}, "pythia-160m": {"path": "weights", "dtype": "float32"}},
        "suites": {"other": {"tasks": ["mmlu"]}, "five-shot": {"limit": 10}},
        "hardware": {"gpus": 0, "cpus": 3},
        "store": "elsewhere",
    }
    made = reference.configure(given, ROOT, tmp_path)
    assert made["models"] == {"pythia-160m": {"path": "weights", "dtype": "float32"}}
    assert set(made["suites"]) == {"five-shot"}
    assert made["suites"]["five-shot"]["limit"] == 10
    assert made["suites"]["five-shot"]["num_fewshot"] == 5
    assert (made["hardware"], made["store"]) == ({"gpus": 0, "cpus": 3}, "elsewhere")


def test_a_score_may_have_been_made_with_another_engine_than_the_others() -> None:
    loaded = reference.load(ROOT / "config/references/vllm-ci-gsm8k.yaml")
    engines = {score.model: published_settings(loaded, score)["engine"] for score in loaded.scores}
    assert engines == {"Qwen2.5-1.5B-Instruct": "vLLM", "Meta-Llama-3-8B-Instruct": "transformers"}
    assert {published_settings(loaded, score)["harness"] for score in loaded.scores} == {"lm-eval"}


def test_without_reference_nothing_changes_and_two_are_too_many(tmp_path: Path) -> None:
    assert reference.configure({"models": {"a": {}}}, ROOT, tmp_path) == {"models": {"a": {}}}
    with pytest.raises(ConfigError, match="one of them"):
        reference.configure({"reference": "a", "bundle": "b"}, ROOT, tmp_path)
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        reference.configure({"reference": "nowhere.yaml"}, ROOT, tmp_path)


def test_a_margin_is_absolute_or_a_share() -> None:
    share = reference.Margin(relative=0.08, because="x")
    assert share.of(0.5, "difference") == pytest.approx(0.04)
    assert share.of(60.0, "ratio") == pytest.approx(0.08)
    points = reference.Margin(absolute=0.6, because="x")
    assert points.of(0.5, "difference") == pytest.approx(0.6)
    assert points.of(60.0, "ratio") == pytest.approx(0.01)

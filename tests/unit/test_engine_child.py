"""What the engine's child makes of lm-eval's results, and what it is told."""

from __future__ import annotations

import errno
import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import synthetic
from examples import engine_settings, model_facts, run_file, task_facts

from reproval import engine, evaluate, files, provenance, scrub
from reproval.plan import make_plan
from reproval.records import EngineSettings, Facts, Hardware, ModelFacts, ModelManifest, Runner, UnitResult
from reproval.run_file import RunFile
from reproval.settings import ModelConfig
from reproval.tiers import load_tiers

# Cut from what lm-eval 0.4.13 returned for a group of two tasks.
RESULTS = {
    "results": {
        "mmlu": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "mmlu", "name": "mmlu", "sample_len": 30},
        "mmlu_a": {"acc,none": 0.25, "acc_stderr,none": "N/A", "alias": " - a", "name": "mmlu_a", "sample_len": 10},
        "gsm8k": {
            "alias": "gsm8k",
            "exact_match,strict-match": 0.75,
            "exact_match_stderr,strict-match": 0.05,
            "exact_match,flexible-extract": 0.8,
            "exact_match_stderr,flexible-extract": 0.04,
        },
    },
    "groups": {"mmlu": {"acc,none": 0.5}},
    "n-samples": {"mmlu_a": {"original": 100, "effective": 10}, "gsm8k": {"original": 1319, "effective": 1319}},
    "higher_is_better": {"mmlu": {"acc": True}, "mmlu_a": {"acc": True}, "gsm8k": {"exact_match": True}},
}


def test_every_number_of_lm_eval_is_a_score() -> None:
    scores = {(score.task, score.metric, score.filter): score for score in engine.scores_of(RESULTS)}
    assert {key: score.value for key, score in scores.items()} == {
        ("mmlu", "acc", "none"): 0.5,
        ("mmlu_a", "acc", "none"): 0.25,
        ("gsm8k", "exact_match", "strict-match"): 0.75,
        ("gsm8k", "exact_match", "flexible-extract"): 0.8,
    }
    assert scores["mmlu", "acc", "none"].group
    assert scores["mmlu", "acc", "none"].n == 30
    assert scores["mmlu_a", "acc", "none"].stderr is None
    assert scores["mmlu_a", "acc", "none"].n == 10
    assert scores["gsm8k", "exact_match", "strict-match"].stderr == 0.05


def test_a_score_that_is_no_number_is_kept_and_read_again(tmp_path: Path) -> None:
    given = {"ppl,none": math.nan, "ppl_stderr,none": math.nan, "bits,none": math.inf, "bits_stderr,none": "N/A"}
    found = engine.scores_of({"results": {"prose": given}})
    project = synthetic.write_project(tmp_path, synthetic.DEMO_MODELS[:1], synthetic.DEMO_TASKS[:1])
    path = next(project.results.glob("tasks/*/*/result.json"))
    files.write_record(path, files.read_record(path, UnitResult).model_copy(update={"scores": found}))
    json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    ppl, bits = files.read_record(path, UnitResult).scores
    assert math.isnan(ppl.value)
    assert bits.value == math.inf
    assert (ppl.stderr, bits.stderr) == (None, None)


def test_what_is_no_number_is_no_score_and_loses_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"by_class,none": {"a": 1.0}, "nothing,none": None, "text,none": "tensor(0.5)", "acc,none": 0.5}
    (score,) = engine.scores_of({"results": {"t": {"alias": "t", "name": "t"} | values}})
    assert (score.metric, score.value) == ("acc", 0.5)
    assert "t: by_class,none is no number" in capsys.readouterr().err


def test_no_secret_reaches_the_child() -> None:
    parent = {"HF_TOKEN": "hf_x", "AWS_SECRET_ACCESS_KEY": "x", "OPENAI_API_KEY": "x", "PATH": "/bin", "LANG": "C"}
    child = evaluate.child_environment(parent, run_file(batch_invariant=True), "v2")
    assert {"PATH", "LANG"} <= set(child)
    assert not {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY"} & set(child)
    assert child["HF_HUB_OFFLINE"] == "1"
    assert child["VLLM_BATCH_INVARIANT"] == "1"


KEPT_BACK = runpy.run_path(str(Path(__file__).resolve().parents[2] / "profiles/pbs/submit"))["KEPT_BACK"]


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "AWS_ACCESS_KEY_ID",
        "MY_SECRET",
        "DB_PASSWORD",
        "SMTP_PASSWD",
        "openai_api_key",
        "APIKEY",
        "CREDENTIALS",
    ],
)
def test_a_secret_is_one_by_its_name_wherever_it_could_get_out(name: str) -> None:
    value = "of no known shape"
    assert name not in evaluate.child_environment({name: value}, run_file(), "v2")
    assert provenance.engine_variables({f"VLLM_{name}": value}) == {}
    assert scrub.leaks(f"said: {value}", {name: value}) == f"the value of the environment variable {name}"
    assert KEPT_BACK.search(name)


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE", "VLLM_USE_FASTOKENS"])
def test_tokens_of_text_are_no_secrets(name: str) -> None:
    assert name in evaluate.child_environment({name: "1"}, run_file(), "v2")
    assert not KEPT_BACK.search(name)


def test_variables_of_the_caller_that_change_what_runs_stand_in_the_provenance() -> None:
    caller = {
        "VLLM_SLEEP_WHEN_IDLE": "1",
        "VLLM_CACHE_ROOT": "/home/alice/cache",
        "VLLM_TUNED_CONFIG_FOLDER": "/home/alice/tuned",
        "VLLM_API_KEY": "x",
        "VLLM_DIST_IDENT": "vllm_dist_e120a17c",  # this and the next: vLLM's own, other ones at every start
        "VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME": "vllm_mm_uWU12ISaSWOstYaR6qD8_A",
        "PATH": "/bin",
    }
    child = evaluate.child_environment(caller, run_file(batch_invariant=True), "v2")
    assert provenance.engine_variables(child) == {
        "VLLM_BATCH_INVARIANT": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_SLEEP_WHEN_IDLE": "1",
        "VLLM_TUNED_CONFIG_FOLDER": "a path",
    }
    assert "VLLM_API_KEY" not in provenance.engine_variables(caller)


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("value", ["0", "1"])
def test_only_the_configuration_makes_an_engine_batch_invariant(value: str, asked: bool) -> None:
    child = evaluate.child_environment({"VLLM_BATCH_INVARIANT": value}, run_file(batch_invariant=asked), "v2")
    assert child.get("VLLM_BATCH_INVARIANT") == ("1" if asked else None)


@pytest.mark.parametrize(("planned", "gpus", "engine_has"), [("v1", 1, "0"), ("v2", 1, None), ("v1", 0, None)])
def test_the_runner_of_the_engine_is_that_of_the_plan(planned: Runner, gpus: int, engine_has: str | None) -> None:
    run = run_file()
    run = run.model_copy(update={"hardware": run.hardware.model_copy(update={"gpus": gpus})})
    for caller in ({}, {"VLLM_USE_V2_MODEL_RUNNER": "0"}, {"VLLM_USE_V2_MODEL_RUNNER": "1"}):
        assert evaluate.child_environment(caller, run, planned).get("VLLM_USE_V2_MODEL_RUNNER") == engine_has


@pytest.mark.parametrize(
    ("model", "hardware", "words"),
    [
        (
            model_facts(model_type="gemma2"),
            {"gpus": 1, "gpu_memory_bytes": 2**34},
            "vLLM refuses dtype float16 for gemma2",
        ),
        (
            model_facts(max_position_embeddings=16),
            {"gpus": 0},
            "generates up to 32 tokens, and the model's maximum is 16",
        ),
        (model_facts(), {"gpus": 1, "gpu_memory_bytes": 2**26}, "would be needed on one GPU"),
    ],
)
def test_a_job_that_cannot_run_says_so_in_the_plan_s_words(
    tmp_path: Path, model: ModelFacts, hardware: dict[str, int], words: str
) -> None:
    tasks = [task_facts(request_type="generate_until", generation_tokens=3200)]
    run = run_file(hardware=Hardware(**hardware, host_memory_bytes=2**34, cpus=2))
    tiers = load_tiers(Path(__file__).parents[2] / "config/tiers.yaml")
    asked = ModelConfig(path="m", dtype="float16")
    plan = make_plan(run.run.name, "m", model, tasks, run.hardware, tiers, "auto", asked, None)
    facts = Facts(run=run.run.name, model="m", model_digest="1" * 64, model_facts=model, tasks=tasks)
    manifest = ModelManifest(model="m", source="local", folder="m", files=[], digest="1" * 64)
    job = evaluate.Job(run, facts, plan, manifest, tmp_path, tmp_path / "log", run.hardware.gpus)
    with pytest.raises(evaluate.EvaluateError) as raised:
        evaluate.climb(job)
    assert str(raised.value) == f"m cannot run: {plan.advice}"
    assert words in str(raised.value)


def child_task(run: RunFile | None = None, settings: EngineSettings | None = None) -> engine.ChildTask:
    """What a child is told that has no units."""
    return engine.ChildTask(
        run=run or run_file(),
        settings=settings or engine_settings(),
        model_folder="m",
        request_cache="r",
        score_levers=[],
        units=[],
        kept_tokens=0,
    )


@pytest.mark.parametrize("name", ["gpu_memory_utilization", "kv_cache_memory_bytes"])
def test_the_engine_is_told_what_the_plan_chose_and_nothing_that_it_left_open(name: str) -> None:
    chosen = {"gpu_memory_utilization": 0.6} if name == "gpu_memory_utilization" else {"kv_cache_memory_bytes": 2**30}
    settings = engine_settings(**({"kv_cache_memory_bytes": None} | chosen))
    arguments = engine.engine_arguments(child_task(settings=settings))
    assert {key: arguments[key] for key in chosen} == chosen
    assert len({"gpu_memory_utilization", "kv_cache_memory_bytes"} & set(arguments)) == 1
    assert arguments["trust_remote_code"] is False
    assert arguments["language_model_only"] is True, "of a model for images too, only what text needs"
    assert arguments["tensor_parallel_size"] == 1
    assert "distributed_executor_backend" not in arguments


def test_an_engine_may_be_silent_for_as_long_as_the_configuration_says() -> None:
    assert evaluate.deadlines("0.5").idle_s == 1800


def test_of_gpus_on_several_nodes_a_job_claims_those_of_its_own() -> None:
    assert evaluate.gpus_here(16, 8, {"RAY_ADDRESS": "10.0.0.1:6379"}) == 8
    assert evaluate.gpus_here(4, 8, {"RAY_ADDRESS": "10.0.0.1:6379"}) == 4
    assert evaluate.gpus_here(2, 8, {}) == 2
    assert evaluate.gpus_here(2, 0, {}) == 2, "NVML does not tell how many there are"


def test_fewer_gpus_than_planned_are_named_with_the_mend() -> None:
    told = r"needs 2 GPUs, and sees 1 \(CUDA_VISIBLE_DEVICES is 3\); let it see 2, or set hardware\.gpus to 1"
    with pytest.raises(evaluate.EvaluateError, match=told):
        evaluate.gpus_here(2, 1, {"CUDA_VISIBLE_DEVICES": "3"})


def test_numbers_of_gpus_mean_the_same_to_cuda_and_nvml() -> None:
    caller = {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    assert evaluate.child_environment(caller, run_file(), "v2")["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_the_engine_is_told_how_its_model_thinks() -> None:
    told = {"enable_thinking": True, "think_end_token": "</think>", "chat_template_args": {"effort": "low"}}
    thinking = run_file().run.model_copy(update={"model": ModelConfig(path="m", **told)})
    for run, expected in ((run_file(), {}), (run_file(run=thinking), told)):
        arguments = engine.engine_arguments(child_task(run=run))
        assert {key: arguments[key] for key in told if key in arguments} == expected


def test_a_ray_cluster_that_is_named_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    arguments = engine.engine_arguments(child_task(settings=engine_settings(tensor_parallel_size=16)))
    assert (arguments["distributed_executor_backend"], arguments["tensor_parallel_size"]) == ("ray", 16)


def test_why_a_job_failed_stands_in_the_log_that_snakemake_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("run", "facts", "plan", "manifest", "results", "log", "out", "trace")
    given = [f"--{name}={tmp_path / 'new' / name}" for name in names]
    monkeypatch.setattr(sys, "argv", ["evaluate", *given, "--gpus=0"])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    assert "run: cannot be read" in str(ended.value)
    assert (tmp_path / "new/log").read_text() == f"{ended.value}\n"


@pytest.mark.parametrize("writer", ["memory.write_trace", "write_record"])
def test_a_disk_that_is_full_at_the_last_is_named_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "results/m/evaluation.json")
    names = ("run", "facts", "plan", "manifest", "results", "log", "out", "trace")
    monkeypatch.setattr(sys, "argv", ["evaluate", *[f"--{name}={tmp_path / name}" for name in names], "--gpus=0"])
    monkeypatch.setattr(evaluate, "read_record", lambda *_: None)
    monkeypatch.setattr(evaluate, "evaluate", lambda _: (None, []))
    monkeypatch.setattr("reproval.evaluate.memory.write_trace", lambda *_: None)
    monkeypatch.setattr(f"reproval.evaluate.{writer}", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(SystemExit, match=r"m/evaluation\.json: No space left on device"):
        evaluate.main()


def test_a_disk_that_is_full_is_named_though_the_log_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "results/work/m/attempts.json")
    names = ("run", "facts", "plan", "manifest", "results", "out", "trace")
    given = [f"--{name}={tmp_path / name}" for name in names]
    monkeypatch.setattr(sys, "argv", ["evaluate", *given, "--gpus=0", "--log=/dev/full"])
    monkeypatch.setattr(evaluate, "read_record", lambda *_: None)
    monkeypatch.setattr(evaluate, "evaluate", lambda _: (_ for _ in ()).throw(full))
    with pytest.raises(SystemExit, match=r"work/m/attempts\.json: No space left on device; .*what is finished is kept"):
        evaluate.main()

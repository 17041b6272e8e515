"""The planner over public architectures, GPU sizes and kinds of work: its properties, its choices, its command."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from architecture_data import NAMES, facts
from hypothesis import given, settings
from hypothesis import strategies as st
from planning import ANSWERS, ASKED, CHOICES, H100, ROOT, SIZES, TIERS, gpu, planned, reason, task

from reproval import plan as command
from reproval.files import read_record, write_record
from reproval.memory_model import (
    GIB,
    predict,
    summarize,
)
from reproval.plan import make_plan, table
from reproval.plan_ladder import divides
from reproval.plan_start import requests_over
from reproval.records import EngineSettings, Facts, Hardware, ModelFacts, Plan, TaskFacts
from reproval.run_file import RunFile
from reproval.seeds import engine_seed
from reproval.settings import ModelConfig, Run
from reproval.tiers import Tiers

# --- the matrix ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("work", [CHOICES, ANSWERS], ids=["loglikelihood", "generation"])
@pytest.mark.parametrize("gib", SIZES)
@pytest.mark.parametrize("policy", ["auto", "published"])
def test_every_architecture_on_every_gpu(gib: int, work: TaskFacts, policy: str) -> None:
    hardware = gpu(gib)
    for name in NAMES:
        plan = planned(name, hardware, [work], policy)
        if not plan.fits:
            assert plan.ladder == []
            assert plan.advice
            assert "GiB" in plan.advice
            continue
        assert plan.advice is None
        first = plan.ladder[0]
        assert first.predicted.peak_bytes <= hardware.gpu_memory_bytes
        assert first.predicted.host_bytes <= hardware.host_memory_bytes
        assert len(plan.ladder) <= 10
        chosen = first.settings
        assert chosen.max_num_seqs <= chosen.max_num_batched_tokens, "vLLM refuses to start"
        cut = [lever for lever in plan.levers if lever.lever == "max_model_len"]
        if not cut:
            assert chosen.max_model_len >= min(work.longest_request_tokens, facts(name).max_position_embeddings)
        settled = {entry.setting: entry.value for entry in plan.reasons}
        for key in ("dtype", "max_model_len", "tensor_parallel_size", "max_num_batched_tokens", "enforce_eager",
                    "max_num_seqs", "submit_batch"):  # fmt: skip
            assert settled[key] == str(getattr(chosen, key)), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("policy", ["auto", "published"])
def test_a_ladder_only_goes_down(name: str, policy: str) -> None:
    for hardware in (gpu(24, 2), gpu(80)):
        plan = planned(name, hardware, policy=policy)
        peaks = [rung.predicted.peak_bytes for rung in plan.ladder]
        assert all(later < earlier for earlier, later in itertools.pairwise(peaks))
        deciding = [(r.settings.dtype, r.settings.quantization, r.settings.max_model_len) for r in plan.ladder]
        changed = [settings != deciding[0] for settings in deciding]
        assert changed == sorted(changed), "score-neutral rungs come first"
        for before, after in itertools.pairwise(plan.ladder):
            differing = {
                key
                for key, value in after.settings.model_dump().items()
                if value != getattr(before.settings, key) and key != "gpu_memory_utilization"
            }
            assert {str(lever.lever) for lever in after.levers} >= differing


def test_small_models_are_never_changed() -> None:
    for name in NAMES:
        plan = planned(name, gpu(24))
        if plan.tier != "above-13B":
            every = plan.levers + [lever for rung in plan.ladder for lever in rung.levers]
            assert not any(lever.changes_scores for lever in every)


@pytest.mark.parametrize("lever", TIERS.policies["auto"].neutral_levers)
def test_a_lever_that_the_policy_leaves_out_is_never_pulled(lever: str) -> None:
    content = yaml.safe_load((ROOT / "config" / "tiers.yaml").read_text())
    policy = content["policies"]["auto"]
    # No more requests than the fewest tokens of a step, so that they never have to follow the tokens.
    policy["start"] |= {"enforce_eager": False, "max_num_seqs": 512}
    every = Tiers.model_validate(content)
    policy["neutral_levers"].remove(lever)
    without = Tiers.model_validate(content)

    def levers(tiers: Tiers) -> set[str]:
        found: set[str] = set()
        for name, gib, scoring in itertools.product(("Qwen3-4B", "Llama-2-13b-hf"), (14, 24, 32), ("suffix", "stock")):
            hardware = gpu(gib, 2).model_copy(update={"host_memory_bytes": 16 * GIB})
            plan = planned(name, hardware, [task(requests=50_000, context=3000)], tiers=tiers, scoring=scoring)
            found |= {each.lever for each in plan.levers + [each for rung in plan.ladder for each in rung.levers]}
        return found

    assert lever in levers(every)
    assert lever not in levers(without)


# --- properties ----------------------------------------------------------------------------------------------------

WORK = st.builds(
    task,
    kind=st.sampled_from(["loglikelihood", "loglikelihood_rolling", "generate_until"]),
    requests=st.integers(1, 100_000),
    context=st.integers(1, 4000),
    continuation=st.integers(1, 100),
    generated=st.integers(0, 1000),
    longest=st.integers(1, 40_000),
)


def badness(plan: Plan) -> tuple[float, ...]:
    """Larger is worse: does not fit, changes scores, takes more GPUs, and by how much it was throttled.

    fp8 on a throttled engine is better than bitsandbytes on a free one.
    """
    if not plan.fits:
        return (1,)
    chosen = plan.ladder[0].settings
    throttled = -math.log2(chosen.max_num_batched_tokens) - math.log2(chosen.max_num_seqs) + chosen.enforce_eager
    changed = [lever.lever for lever in plan.levers if lever.changes_scores]
    method = [None, "fp8", "bitsandbytes"].index(chosen.quantization)
    return (0, len(changed), method, -chosen.max_model_len, chosen.tensor_parallel_size, throttled)


@given(
    name=st.sampled_from(NAMES), work=WORK, gib=st.floats(2, 200), more=st.floats(0.001, 200), count=st.integers(1, 8)
)
@settings(max_examples=150, deadline=None)
def test_more_memory_never_yields_a_worse_plan(name: str, work: TaskFacts, gib: float, more: float, count: int) -> None:
    small, large = (planned(name, gpu(size, count), [work]) for size in (gib, gib + more))
    assert badness(large) <= badness(small)
    if small.fits and badness(large) == badness(small):
        assert large.ladder[0].predicted.kv_cache_bytes >= small.ladder[0].predicted.kv_cache_bytes


@given(
    name=st.sampled_from(NAMES),
    work=st.lists(WORK, min_size=1, max_size=3),
    hardware=st.builds(gpu, st.floats(1, 200), st.integers(1, 8), st.sampled_from([None, "7.5", "8.0", "9.0"])),
    policy=st.sampled_from(["auto", "published"]),
    scoring=st.sampled_from(["stock", "suffix"]),
    runner=st.sampled_from(["v1", "v2"]),
)
@settings(max_examples=150, deadline=None)
def test_a_plan_that_fits_stays_below_its_budget(
    name: str, work: list[TaskFacts], hardware: Hardware, policy: str, scoring: Any, runner: Any
) -> None:
    plan = planned(name, hardware, work, policy, scoring=scoring, runner=runner)
    budget = hardware.gpu_memory_bytes * (1 - TIERS.policies[policy].free_share)
    for rung in plan.ladder:
        assert rung.predicted.peak_bytes <= budget
        parts = rung.predicted.model_dump(exclude={"peak_bytes", "host_bytes"})
        assert rung.predicted.peak_bytes == sum(parts.values())
        assert divides(facts(name), rung.settings.tensor_parallel_size)


@given(name=st.sampled_from(NAMES), work=WORK, longer=st.integers(1, 20_000), gib=st.floats(4, 100))
@settings(max_examples=150, deadline=None)
def test_a_longer_request_never_shrinks_the_prediction(name: str, work: TaskFacts, longer: int, gib: float) -> None:
    stretched = work.model_copy(update={"longest_request_tokens": work.longest_request_tokens + longer})
    hardware = gpu(gib)
    short, long = (planned(name, hardware, [each]) for each in (work, stretched))
    assert short.fits or not long.fits
    assert badness(long)[:2] >= badness(short)[:2]
    base = EngineSettings(
        dtype="bfloat16",
        max_model_len=65536,
        max_num_batched_tokens=8192,
        max_num_seqs=64,
        kv_cache_memory_bytes=GIB,
        enforce_eager=True,
        submit_batch=64,
    )
    for runner, scoring in (("v1", "stock"), ("v2", "stock"), ("v2", "suffix")):
        peaks = [
            predict(facts(name), base, summarize([each]), hardware, runner, scoring).peak_bytes  # type: ignore[arg-type]
            for each in (work, stretched)
        ]
        assert peaks[0] <= peaks[1]


@given(work=WORK, gib=st.floats(0.5, 64))
@settings(max_examples=60, deadline=None)
def test_on_a_cpu_everything_fits_into_host_memory(work: TaskFacts, gib: float) -> None:
    hardware = Hardware(gpus=0, host_memory_bytes=round(gib * GIB), cpus=2)
    plan = planned("SmolLM2-135M", hardware, [work])
    for rung in plan.ladder:
        assert rung.predicted.host_bytes <= hardware.host_memory_bytes
        assert rung.settings.enforce_eager
        assert rung.settings.gpu_memory_utilization is None
    assert plan.fits or "host memory" in (plan.advice or "")


# --- choices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hardware", "tokens", "sequences"),
    [
        (gpu(80), 16384, 1024),
        (gpu(80, name="NVIDIA A100-SXM4-80GB"), 8192, 256),
        (gpu(48, name="NVIDIA L40S"), 8192, 256),
        (Hardware(gpus=0, host_memory_bytes=16 * GIB, cpus=2), 4096, 256),
    ],
)
def test_where_a_policy_says_nothing_vllm_s_defaults_hold(hardware: Hardware, tokens: int, sequences: int) -> None:
    """As get_batch_defaults of vllm/engine/arg_utils.py has them."""
    plan = planned("Qwen3-0.6B", hardware, [CHOICES], "published")
    chosen = plan.ladder[0].settings
    assert (chosen.max_num_batched_tokens, chosen.max_num_seqs) == (tokens, sequences)
    # Whatever the work is; on a CPU, where a request takes much of the memory, no more than it needs.
    few = planned("Qwen3-0.6B", hardware, [task(requests=10)], "published").ladder[0].settings
    assert few.max_num_seqs == (sequences if hardware.gpus else 16)
    # A share of GPU memory means nothing on a CPU, where the plan gives the cache in bytes.
    given = [0.92] if hardware.gpus else []
    assert [lever.after for lever in plan.levers if lever.lever == "gpu_memory_utilization"] == [str(n) for n in given]
    assert (chosen.gpu_memory_utilization is not None) == bool(hardware.gpus)


def test_on_a_cpu_no_more_is_planned_than_vllm_s_defaults_there() -> None:
    chosen = planned("SmolLM2-135M", Hardware(gpus=0, host_memory_bytes=16 * GIB, cpus=2)).ladder[0].settings
    assert (chosen.max_num_batched_tokens, chosen.max_num_seqs) == (4096, 256)


def test_the_peak_that_a_plan_tells_of_is_the_host_s_on_a_cpu() -> None:
    for hardware in (H100, Hardware(gpus=0, host_memory_bytes=16 * GIB, cpus=2)):
        plan = planned("SmolLM2-135M", hardware)
        predicted = plan.ladder[0].predicted
        told = next(entry.value for entry in plan.reasons if entry.setting == "peak")
        assert told == str(predicted.peak_bytes if hardware.gpus else predicted.host_bytes)


@pytest.mark.parametrize(("requests", "sequences"), [(1, 16), (64, 64), (65, 128), (5000, 1024)])
def test_hardly_more_requests_may_run_at_once_than_a_task_has(requests: int, sequences: int) -> None:
    assert planned("Qwen3-4B", H100, [task(requests=requests)]).ladder[0].settings.max_num_seqs == sequences


def test_what_a_user_asks_for_goes_before_what_a_policy_begins_with() -> None:
    capped = planned("Qwen3-14B", H100, policy="published", asked=ModelConfig(path="m", max_model_len=2048))
    assert capped.ladder[0].settings.max_model_len == 2048
    content = yaml.safe_load((ROOT / "config" / "tiers.yaml").read_text())
    content["policies"]["auto"]["start"]["dtype"] = "float32"
    tiers = Tiers.model_validate(content)
    assert planned("Qwen3-4B", H100, tiers=tiers).ladder[0].settings.dtype == "float32"
    asked = planned("Qwen3-4B", H100, tiers=tiers, asked=ModelConfig(path="m", dtype="bfloat16"))
    assert asked.ladder[0].settings.dtype == "bfloat16"
    assert asked.levers == [], "the checkpoint is in bfloat16: nothing is changed"


def test_quantization_that_was_asked_for_holds_on_every_rung_and_marks_the_scores() -> None:
    plan = planned("Qwen3-4B", gpu(24), asked=ModelConfig(path="m", quantization="bitsandbytes"))
    [lever] = plan.levers
    assert (lever.lever, lever.after, lever.changes_scores) == ("quantization", "bitsandbytes", True)
    assert len(plan.ladder) > 1
    assert {rung.settings.quantization for rung in plan.ladder} == {"bitsandbytes"}
    # 70 billion parameters in one byte each do not fit, and are not put into half a byte instead.
    assert not planned("Llama-3.1-70B", gpu(48), asked=ModelConfig(path="m", quantization="fp8")).fits


def test_a_policy_that_begins_with_quantization_leaves_quantized_checkpoints_as_they_are() -> None:
    content = yaml.safe_load((ROOT / "config" / "tiers.yaml").read_text())
    content["policies"]["auto"]["start"]["quantization"] = "fp8"
    tiers = Tiers.model_validate(content)
    assert planned("Qwen3-4B", H100, tiers=tiers).ladder[0].settings.quantization == "fp8"
    stored = planned("Qwen2-7B-Instruct-AWQ", H100, tiers=tiers)
    assert stored.ladder[0].settings.quantization is None
    assert stored.levers == []
    asked = planned("Qwen3-4B", H100, tiers=tiers, asked=ModelConfig(path="m", quantization="bitsandbytes"))
    assert asked.ladder[0].settings.quantization == "bitsandbytes"


def test_long_generation_takes_graphs_and_short_work_does_not() -> None:
    long = task("generate_until", requests=20_000, context=500, continuation=0, generated=256, longest=800)
    assert not planned("Qwen3-4B", H100, [long]).ladder[0].settings.enforce_eager
    assert planned("Qwen3-4B", H100, [CHOICES]).ladder[0].settings.enforce_eager


def test_old_gpus_have_no_bfloat16() -> None:
    plan = planned("Qwen3-4B", gpu(15, capability="7.5", name="Tesla T4"))
    assert plan.ladder[0].settings.dtype == "float16"
    assert [(lever.lever, lever.changes_scores) for lever in plan.levers] == [("dtype", True)]


def test_float16_is_not_planned_for_models_that_vllm_refuses_in_it() -> None:
    old = planned("gemma-2-9b", gpu(80, capability="7.5"))
    assert old.ladder[0].settings.dtype == "float32"
    assert "vLLM refuses float16 for gemma2, and bfloat16 needs compute capability 8.0" in reason(old, "dtype")
    content = yaml.safe_load((ROOT / "config" / "tiers.yaml").read_text())
    content["policies"]["auto"]["tiers"]["7B-to-13B"] = {"score_levers": ["dtype"]}
    halved = Tiers.model_validate(content)
    assert not planned("gemma-2-9b", gpu(24, capability="7.5"), tiers=halved).fits, "nor is bfloat16 a lever there"
    stored = facts("gemma-2-9b").model_copy(update={"checkpoint_dtype": "float16"})
    new = make_plan("r", "m", stored, [CHOICES], H100, TIERS, "auto", ASKED, 1234)
    assert new.ladder[0].settings.dtype == "bfloat16"
    assert [(lever.lever, lever.before, lever.changes_scores) for lever in new.levers] == [("dtype", "float16", True)]
    for name in ("gemma-2-9b", "gemma-3-4b-it", "gemma-3-1b-it"):
        asked = planned(name, H100, asked=ModelConfig(path="m", dtype="float16"))
        assert not asked.fits
        assert "refuses dtype float16" in (asked.advice or "")
        assert "to bfloat16 or float32" in (asked.advice or "")
    assert planned("gemma-2b", H100, asked=ModelConfig(path="m", dtype="float16")).fits
    # All of vLLM's list (_FLOAT16_NOT_SUPPORTED_MODELS).
    for kind in ("gemma2", "gemma3", "gemma3_text", "glm4"):
        model = facts("Qwen3-4B").model_copy(update={"model_type": kind})
        half = ModelConfig(path="m", dtype="float16")
        assert not make_plan("r", "m", model, [CHOICES], H100, TIERS, "auto", half, 1234).fits


def test_bfloat16_is_refused_on_a_gpu_that_has_none_with_the_mend() -> None:
    """The configuration refuses it for a model; a policy may begin with it all the same."""
    content = yaml.safe_load((ROOT / "config" / "tiers.yaml").read_text())
    content["policies"]["auto"]["start"]["dtype"] = "bfloat16"
    tiers = Tiers.model_validate(content)
    for name, mend in (("Qwen3-4B", "to float16 or float32"), ("gemma-3-1b-it", "to float32, or leave it out")):
        refused = planned(name, gpu(80, capability="7.5"), tiers=tiers)
        assert not refused.fits
        assert "refuses dtype bfloat16 on a GPU of compute capability below 8.0, and this one has 7.5" in (
            refused.advice or ""
        )
        assert mend in (refused.advice or "")
        assert not planned(name, gpu(80, capability="7.5"), asked=ModelConfig(path="m", dtype="bfloat16")).fits
        for capability in ("8.0", "10.0", None):
            assert planned(name, gpu(80, capability=capability), tiers=tiers).fits
    assert planned("SmolLM2-135M", Hardware(gpus=0, host_memory_bytes=16 * GIB, cpus=2), tiers=tiers).fits


@pytest.mark.parametrize(
    ("name", "asked", "capability", "words"),
    [
        ("Qwen2-7B-Instruct-GPTQ-Int4", {"dtype": "float32"}, "9.0", "float32 with quantization gptq. Set `dtype` of"),
        ("Qwen2-7B-Instruct-AWQ", {"dtype": "float32"}, "9.0", "start, to bfloat16 or float16."),
        ("Qwen2-7B-Instruct-AWQ", {"dtype": "float32"}, "7.5", "start, to float16."),
        ("Qwen3-32B-FP8", {"dtype": "float32"}, "9.0", "float32 with quantization fp8."),
        ("Qwen3-4B", {"dtype": "float32", "quantization": "fp8"}, "9.0", "float32 with quantization fp8."),
        ("gpt-oss-20b", {"dtype": "float16"}, "9.0", "float16 with quantization mxfp4. Set `dtype` of the model, or"),
        ("gpt-oss-20b", {"dtype": "float32"}, "9.0", "start, to bfloat16."),
        ("gpt-oss-20b", {}, "7.5", "float16 with quantization mxfp4. Choose a GPU of compute capability 8.0 or more"),
        # Each mend leads to settings that run.
        (
            "gpt-oss-20b",
            {"dtype": "bfloat16"},
            "7.5",
            "this one has 7.5. Choose a GPU of compute capability 8.0 or more",
        ),
        ("Qwen2-7B-Instruct-AWQ", {"dtype": "bfloat16"}, "7.5", "start, to float16, or leave it out."),
        ("gemma-2-9b", {"dtype": "float16"}, "7.5", "start, to float32, or leave it out."),
        ("Qwen2-7B-Instruct-AWQ", {"quantization": "fp8"}, "9.0", "quantized already (awq). Delete `quantization`"),
        ("Qwen3-32B-FP8", {"quantization": "bitsandbytes"}, "9.0", "quantized already (fp8)"),
        ("Qwen2-7B-Instruct-GPTQ-Int4", {"dtype": "float16"}, "7.5", None),
        ("gpt-oss-20b", {}, "8.0", None),
        ("Qwen3-32B-FP8", {"quantization": "fp8"}, "9.0", None),
        ("Qwen3-4B", {"dtype": "float32", "quantization": "bitsandbytes"}, "9.0", None),
    ],
)
def test_pairs_of_dtype_and_quantization_that_vllm_refuses_are_not_planned(
    name: str, asked: dict[str, Any], capability: str, words: str | None
) -> None:
    plan = planned(name, gpu(80, capability=capability), asked=ModelConfig(path="m", **asked))
    assert plan.fits == (words is None)
    assert (words or "") in (plan.advice or "")


def test_float32_checkpoints_run_in_16_bit() -> None:
    plan = planned("OLMo-2-1124-13B", H100)
    assert plan.ladder[0].settings.dtype == "bfloat16"
    assert plan.levers == []
    assert "float32" in reason(plan, "dtype")
    wide = planned("OLMo-2-1124-13B", H100, asked=ModelConfig(path="m", dtype="float32"))
    assert wide.ladder[0].predicted.weights_bytes == 4 * facts("OLMo-2-1124-13B").parameters


def test_the_fewest_gpus_that_fit() -> None:
    assert planned("Llama-3.1-70B", gpu(80, 8)).ladder[0].settings.tensor_parallel_size == 2
    assert planned("Qwen3-4B", gpu(80, 8)).ladder[0].settings.tensor_parallel_size == 1
    time = planned("Llama-3.1-70B", gpu(80, 8)).time
    assert time is not None
    assert time.gpu_hours == pytest.approx(2 * (time.engine_start_s + time.work_s) / 3600, rel=0.01)
    # 40 heads: three GPUs would not do.
    assert planned("Qwen3-14B", gpu(12, 4)).ladder[0].settings.tensor_parallel_size == 4
    assert not divides(facts("Qwen3-14B"), 3)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "vocabulary", "width", "sizes"),
    [
        # phi-4: heads, KV heads and width can be divided by 5, the vocabulary cannot.
        (40, 10, 100352, 17920, [1, 2]),
        # Llama-2-13B: heads and vocabulary can be divided by 5, the width cannot.
        (40, 40, 32000, 13824, [1, 2, 4, 8]),
        # Two KV heads are copied to four and to eight GPUs.
        (16, 2, 151936, 8960, [1, 2, 4, 8]),
        # GPT-2: vLLM pads its 50,257 entries to 50,304, which 2 and 3 divide.
        (12, 12, 50257, 3072, [1, 2, 3, 4, 6]),
    ],
)
def test_a_model_is_divided_only_without_rest(
    heads: int, kv_heads: int, vocabulary: int, width: int, sizes: list[int]
) -> None:
    shapes = {"attention_heads": heads, "kv_heads": kv_heads, "vocab_size": vocabulary, "intermediate_size": width}
    model = facts("Llama-2-13b-hf").model_copy(update=shapes)
    assert [n for n in range(1, 9) if divides(model, n)] == sizes


def test_a_quantized_bitsandbytes_checkpoint_is_not_divided() -> None:
    """vLLM refuses tensor parallelism for it, so more GPUs do not help and are not advised."""
    plan = planned("Meta-Llama-3.1-8B-bnb-4bit", gpu(6.5, 4))
    assert not plan.fits
    assert "tensor parallelism" not in (plan.advice or "")
    assert planned("Meta-Llama-3-8B", gpu(6.5, 4)).fits


def test_fp8_needs_a_gpu_that_has_it() -> None:
    def method(capability: str | None) -> str | None:
        return planned("Llama-3.1-70B", gpu(80, capability=capability)).ladder[0].settings.quantization

    assert [method(capability) for capability in ("9.0", "8.9", "8.0", None)] == [
        "fp8",
        "fp8",
        "bitsandbytes",
        "bitsandbytes",
    ]


def test_the_engine_asks_for_no_more_free_memory_than_is_planned() -> None:
    """vLLM starts only if gpu_memory_utilization of the GPU is free, also where the cache is given in bytes."""
    for name in ("SmolLM2-135M", "Qwen3-4B"):
        rung = planned(name, H100).ladder[0]
        share = rung.settings.gpu_memory_utilization
        assert share is not None
        wanted = rung.predicted.peak_bytes - rung.predicted.context_bytes
        assert wanted <= share * H100.gpu_memory_bytes <= wanted + 0.001 * H100.gpu_memory_bytes


def test_a_length_that_the_user_asks_for_is_counted() -> None:
    plan = planned("Qwen3-4B", H100, asked=ModelConfig(path="m", max_model_len=1024))
    [lever] = plan.levers
    assert (lever.lever, lever.requests_cut, lever.changes_scores) == ("max_model_len", 1, True)
    assert plan.ladder[0].settings.max_model_len == 1024
    enough = planned("Qwen3-4B", H100, asked=ModelConfig(path="m", max_model_len=4096))
    assert enough.levers == []
    assert planned("Qwen3-4B", H100, asked=ModelConfig(path="m", max_model_len=3008)).levers == []
    # The longest request needs 3,001; the plan would have rounded that up to 3,008.
    [lever] = planned("Qwen3-4B", H100, asked=ModelConfig(path="m", max_model_len=3001)).levers
    assert (lever.after, lever.requests_cut, lever.changes_scores) == ("3001", 0, False)
    # A cap on requests that lm-eval makes: a loglikelihood request holds one token more than it scores.
    assert requests_over([CHOICES], 3000) == 1
    assert requests_over([CHOICES], 3001) == 0
    assert requests_over([ANSWERS], 2000) == 0


def test_a_length_cap_leaves_room_for_the_longest_answer_and_some_of_its_prompt() -> None:
    """lm-eval cuts a prompt to max_model_len - max_gen_toks tokens; where that is not above 0, vLLM refuses it."""
    answers = task("generate_until", requests=100, context=1000, continuation=0, generated=1024, longest=3000)
    published = planned("Qwen3-14B", H100, [CHOICES, answers], "published")
    assert published.ladder[0].settings.max_model_len == 1088
    [lever] = [lever for lever in published.levers if lever.lever == "max_model_len"]
    assert "1024 tokens have no room for the longest answer of 1024" in lever.reason
    asked = planned("Qwen3-4B", H100, [answers], asked=ModelConfig(path="m", max_model_len=512))
    assert asked.ladder[0].settings.max_model_len == 1088
    enough = planned("Qwen3-4B", H100, [answers], asked=ModelConfig(path="m", max_model_len=1100))
    assert enough.ladder[0].settings.max_model_len == 1100
    # With short prompts the longest request has no more than that: there is nothing to cut, and nothing is lengthened.
    short = task("generate_until", requests=100, context=5, continuation=0, generated=1024, longest=1034)
    uncut = planned("Qwen3-4B", H100, [short], asked=ModelConfig(path="m", max_model_len=512))
    assert uncut.levers == []
    assert uncut.ladder[0].settings.max_model_len == 1040
    # The plan's own cuts stop there too.
    long = task("generate_until", requests=100, context=1000, continuation=0, generated=4096, longest=30_000)
    lengths = [rung.settings.max_model_len for rung in planned("Qwen3-14B", gpu(22), [long]).ladder]
    assert lengths[0] == 30_000
    assert lengths[-1] >= 4160
    assert 7504 in lengths


def test_an_answer_longer_than_the_model_is_refused_with_the_mend() -> None:
    answers = task("generate_until", requests=100, context=100, continuation=0, generated=2048, longest=2200)
    refused = planned("pythia-6.9b", H100, [answers])
    assert not refused.fits
    assert "generates up to 2048 tokens" in (refused.advice or "")
    assert "max_gen_toks below 2048" in (refused.advice or "")


def test_requests_longer_than_the_model_are_said_to_be_cut() -> None:
    plan = planned("pythia-6.9b", H100)
    assert plan.ladder[0].settings.max_model_len == 2048
    said = "the longest request has 3001 tokens and the model's maximum is 2048: on any machine lm-eval cuts 1 requests"
    assert said in reason(plan, "max_model_len")


def test_long_texts_of_rolling_tasks_are_scored_in_windows_and_not_cut() -> None:
    texts = task("loglikelihood_rolling", requests=10, context=1, continuation=5000, longest=9000)
    plan = planned("pythia-6.9b", H100, [CHOICES, texts])
    assert "cuts 1 requests and scores 10 texts in windows" in reason(plan, "max_model_len")
    capped = planned("Qwen3-4B", H100, [texts], asked=ModelConfig(path="m", max_model_len=6000))
    [lever] = capped.levers
    assert (lever.requests_cut, lever.changes_scores) == (0, True), "other windows are other contexts"
    assert lever.reason == "asked for in the configuration; 0 of 10 requests are cut, 1 texts are scored in windows"


def test_stock_requests_are_submitted_in_batches_that_host_memory_holds() -> None:
    hardware = gpu(80).model_copy(update={"host_memory_bytes": 16 * GIB})
    long = task(requests=50_000, context=3000, longest=4000)
    plan = planned("Qwen3-4B", hardware, [long], scoring="stock")
    assert plan.ladder[0].settings.submit_batch == 2048
    assert "submit_batch" in [lever.lever for lever in plan.levers]
    assert planned("Qwen3-4B", hardware, [long]).ladder[0].settings.submit_batch == 8192
    # Generation leaves no object for every token of a prompt.
    prompts = task("generate_until", requests=50_000, context=3000, continuation=0, generated=64, longest=4000)
    assert planned("Qwen3-4B", hardware, [prompts], scoring="stock").ladder[0].settings.submit_batch == 8192


def test_a_small_model_is_planned_for_its_share_of_a_gpu_and_a_large_one_for_the_whole() -> None:
    hardware = gpu(80).model_copy(update={"jobs_per_gpu": 2})
    small, large = planned("Qwen3-0.6B", hardware), planned("Qwen3-32B", hardware)
    assert (small.jobs_per_gpu, large.jobs_per_gpu) == (2, 1)
    assert all(rung.predicted.peak_bytes <= hardware.gpu_memory_bytes // 2 for rung in small.ladder)
    assert small.ladder[0].settings.gpu_memory_utilization < 0.5  # type: ignore[operator]
    assert not any(lever.changes_scores for rung in small.ladder for lever in rung.levers)
    assert large.ladder == planned("Qwen3-32B", gpu(80)).ladder


def advised(plan: Plan, pattern: str) -> int:
    """The number that the advice of a plan that cannot run gives."""
    assert not plan.fits
    found = re.search(pattern, plan.advice or "")
    assert found, plan.advice
    return int(found[1])


def test_who_follows_the_advice_gets_a_plan() -> None:
    """And who stops short of it does not."""
    for name, work in (("SmolLM2-135M", CHOICES), ("Qwen3-4B", ANSWERS)):

        def on_cpu(gib: int, name: str = name, work: TaskFacts = work) -> Plan:
            return planned(name, Hardware(gpus=0, host_memory_bytes=gib * GIB, cpus=2), [work])

        enough = advised(on_cpu(2), r"Give the job (\d+) GiB of host memory")
        assert on_cpu(enough).fits
        assert not on_cpu(enough - 1).fits

    def beside_a_gpu(gib: int) -> Plan:
        return planned("Qwen3-4B", gpu(80).model_copy(update={"host_memory_bytes": gib * GIB}))

    enough = advised(beside_a_gpu(2), r"Give the job (\d+) GiB of host memory")
    assert beside_a_gpu(enough).fits
    assert not beside_a_gpu(enough - 1).fits
    for name, gib in (("Llama-2-13b-hf", 24), ("Llama-2-13b-hf", 9), ("Mixtral-8x7B-v0.1", 10), ("Qwen3-4B", 6)):
        content = yaml.safe_load((ROOT / "config" / "tiers.yaml").read_text())
        content["policies"]["auto"]["tiers"] = {}
        tiers = Tiers.model_validate(content)
        alone = planned(name, gpu(gib), tiers=tiers)
        enough = advised(alone, r"(\d+) such GPUs with tensor parallelism would do")
        assert planned(name, gpu(gib, enough), tiers=tiers).fits
        assert not planned(name, gpu(gib, enough - 1), tiers=tiers).fits
        for method in ("fp8", "bitsandbytes"):
            asked = planned(name, gpu(gib), tiers=tiers, asked=ModelConfig(path="m", quantization=method))
            said = (alone.advice or "").partition("quantization (")[2].partition(")")[0]
            assert asked.fits == (method in said)
    # fp8 is not advised where the GPU has none, nor quantization of what is quantized.
    assert "quantization (bitsandbytes)" in (planned("Llama-2-13b-hf", gpu(24, capability="8.0")).advice or "")
    assert "quantization" not in (planned("Qwen2-7B-Instruct-AWQ", gpu(4)).advice or "quantization")
    half = planned("Llama-2-13b-hf", gpu(12), asked=ModelConfig(path="m", quantization="fp8"))
    assert "So would quantization" not in (half.advice or "So would quantization")


def test_too_little_host_memory_is_said() -> None:
    hardware = gpu(80).model_copy(update={"host_memory_bytes": 4 * GIB})
    plan = planned("Qwen3-4B", hardware)
    assert not plan.fits
    assert "host memory" in (plan.advice or "")


def test_no_rung_takes_more_host_memory_than_there_is() -> None:
    """Every rank is another process: a rung with more GPUs needs more of the host, and the job asks for the most."""
    hardware = gpu(80, 8).model_copy(update={"host_memory_bytes": 12 * GIB})
    plan = planned("Qwen3-32B", hardware)
    assert plan.fits
    assert all(rung.predicted.host_bytes <= 12 * GIB for rung in plan.ladder)
    sizes = [rung.settings.tensor_parallel_size for rung in planned("Qwen3-32B", gpu(80, 8)).ladder]
    assert max(sizes) > max(rung.settings.tensor_parallel_size for rung in plan.ladder)


def test_golden_reasons() -> None:
    plan = planned("Llama-3.1-70B", gpu(80))
    texts = {entry.setting: f"{entry.value}: {entry.text}" for entry in plan.reasons}
    assert texts["tier"].startswith("above-13B: 70.55 billion parameters are counted in the checkpoint; policy auto")
    assert texts["tensor_parallel_size"] == "1: the fewest of 1 that fit: weights take 67.67 GiB on one GPU"
    assert texts["max_model_len"].startswith(
        "3008: the longest request has 3001 tokens, rounded up to whole blocks and to 256 at least"
    )
    [lever] = plan.levers
    assert (lever.lever, lever.before, lever.after, lever.changes_scores) == ("quantization", "None", "fp8", True)
    assert lever.reason == (
        "without a lever at least 138.36 GiB would be needed and 76.00 GiB may be planned; with those pulled, the "
        "predicted peak is 76.00 GiB"
    )
    assert texts["quantization"] == f"fp8: {lever.reason}", "not what was so before the lever was pulled"
    refused = planned("Llama-2-13b-hf", gpu(24))
    assert refused.advice == (
        "29.20 GiB would be needed on one GPU even with the most frugal score-neutral settings that the policy "
        "allows; there are 24.00 GiB on each of 1. 2 such GPUs with tensor parallelism would do. So would "
        "quantization (fp8 or bitsandbytes) on one GPU, which changes scores: set `quantization` for the model, or "
        "choose a policy whose tier allows it."
    )


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    run = Run(name="smol-000000000000", model_name="smol", model=ASKED, units=[], identity={})
    hardware = Hardware(gpus=0, host_memory_bytes=16 * GIB, cpus=2)
    fields: dict[str, Any] = {"container": None, "environment": "lock", "store": "resources", "batch_invariant": False}
    write_record(tmp_path / "run.json", RunFile(run=run, hardware=hardware, policy="auto", seed=7, **fields))
    model: ModelFacts = facts("SmolLM2-135M")
    record = Facts(run=run.name, model="smol", model_digest="0" * 64, model_facts=model, tasks=[CHOICES])
    write_record(tmp_path / "facts.json", record)
    return ["make", "--run", f"{tmp_path}/run.json", "--facts", f"{tmp_path}/facts.json",
            "--tiers", str(ROOT / "config" / "tiers.yaml"), "--out", f"{tmp_path}/plan.json"]  # fmt: skip


def test_what_the_run_asks_for_reaches_the_plan(files: list[str], tmp_path: Path) -> None:
    run = read_record(tmp_path / "run.json", RunFile)
    asked = run.run.model_copy(update={"model": ModelConfig(path="m", dtype="float32")})
    write_record(tmp_path / "run.json", run.model_copy(update={"run": asked, "seed": 8}))
    assert command.main(files) == 0
    plan = read_record(tmp_path / "plan.json", Plan)
    assert plan.policy == "auto"
    assert plan.ladder[0].settings.dtype == "float32"
    assert plan.ladder[0].settings.seed == engine_seed(8) != engine_seed(7)
    # A CPU has vLLM's V1 runner, which holds all rows of a prompt in a step: here 3,001 tokens and the rest of 4,096.
    rows = 49_152 * (12 * 3001 + 4 * 1095)
    assert plan.ladder[0].predicted.prompt_logprobs_bytes == rows
    assert command.main([*files, "--policy", "published"]) == 0
    assert read_record(tmp_path / "plan.json", Plan).policy == "published"


def test_the_plan_says_that_it_passed_over_fp8_for_want_of_the_gpus_capability() -> None:
    known = gpu(44.5)
    for hardware, method in ((known, "fp8"), (known.model_copy(update={"compute_capability": None}), "bitsandbytes")):
        (lever,) = planned("Qwen3-32B", hardware).levers
        assert lever.after == method
        assert ("hardware.compute_capability is not given" in lever.reason) == (method == "bitsandbytes")


def test_levers_that_change_no_score_are_not_marked() -> None:
    shown = table([planned("Qwen3-4B", H100, policy="published")])
    assert "enforce_eager=True" in shown
    assert "*" not in shown
    assert shown.endswith("results/runs/RUN/plan.json")


def test_repeats_of_a_model_are_one_line_of_the_table() -> None:
    plan = planned("Qwen3-4B", H100)
    once, thrice = table([plan]), table([plan] * 3)
    assert "Qwen3-4B, each of 3 " in thrice
    assert thrice.count("\n") == once.count("\n")


def test_the_table_names_tasks_whose_answers_are_drawn_though_nobody_asked() -> None:
    drawn = task("generate_until", generated=64).model_copy(update={"task": "drop", "sampled_unasked": True})
    shown = table([planned(name, H100, [task(), drawn]) for name in ("Qwen3-4B", "Qwen3-0.6B")])
    (line,) = [line for line in shown.split("\n") if "drawn at random" in line]
    assert line.startswith("Answers will be drawn at random in s/drop, and nobody asked for it")
    assert "drawn at random" not in table([planned("Qwen3-4B", H100)])


def test_a_wrong_tiers_file_ends_with_its_problem(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text("tiers: []\n")
    files[files.index("--tiers") + 1] = f"{tmp_path}/bad.yaml"
    assert command.main(files) == 2
    assert "bad.yaml" in capsys.readouterr().err
    assert not Path(files[-1]).exists()


def test_the_table_says_what_cannot_run(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(files)
    paths = [files[-1]]
    for name in ("Llama-3.1-70B", "Llama-2-13b-hf"):
        write_record(tmp_path / f"{name}.json", planned(name, gpu(48, 1) if name[6] == "3" else gpu(24)))
        paths.append(f"{tmp_path}/{name}.json")
    assert command.main(["table", *paths]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "parameters", "tier", "levers", "predicted", "peak", "estimated", "time"]
    assert lines[2].startswith("smol ")
    assert "GiB host" in lines[2]
    assert "quantization=bitsandbytes*" in lines[3]
    assert "cannot run" in lines[4]
    assert any(line.startswith("Llama-2-13b-hf cannot run. 29.20 GiB") for line in lines)
    assert lines[-3] == "* changes scores, which are marked in every result: Llama-3.1-70B"
    assert command.main(["table", "--strict", *paths]) == 1
    assert command.main(["table", "--strict", *paths[:2]]) == 0


def test_a_plan_is_a_record(files: list[str]) -> None:
    plan = planned("Qwen3-32B", gpu(48))
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    assert table([plan]).count("\n") >= 2
    json.loads(plan.model_dump_json())

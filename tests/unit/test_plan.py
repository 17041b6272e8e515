"""The planner over public architectures, GPU sizes and kinds of work; its properties; and what was measured."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from architecture_data import NAMES, facts, load, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from reproval import plan as command
from reproval.files import read_record, write_record
from reproval.memory_model import (
    CONTEXT_BYTES,
    GIB,
    activations_bytes,
    cache_bytes_per_token,
    cache_pool,
    host_bytes,
    predict,
    prompt_logprobs_bytes,
    request_cache_bytes,
    sampler_bytes,
    summarize,
)
from reproval.model_facts import facts_of
from reproval.plan import make_plan, table
from reproval.plan_ladder import divides, groups_of, neutral_steps
from reproval.plan_start import Case, requests_over
from reproval.problems import ConfigError
from reproval.records import CacheGroup, EngineSettings, Facts, Hardware, ModelFacts, Plan, TaskFacts
from reproval.run_file import RunFile
from reproval.seeds import engine_seed
from reproval.settings import ModelConfig, Run
from reproval.tiers import Policy, TierRule, Tiers, load_tiers, schema
from reproval.time_model import estimate, gpu_speed

ROOT = Path(__file__).parents[2]
TIERS = load_tiers(ROOT / "config" / "tiers.yaml")
MEASURED = yaml.safe_load((ROOT / "tests/unit/measured_peaks.yaml").read_text(encoding="utf-8"))
ASKED = ModelConfig(path="models/m")
SIZES = (24, 40, 48, 80, 141)


def task(
    kind: str = "loglikelihood",
    requests: int = 56168,
    context: int = 700,
    continuation: int = 1,
    generated: int = 0,
    longest: int = 3000,
    shared: float = 0.75,
) -> TaskFacts:
    usual = min(context + continuation + generated, longest)
    return TaskFacts.model_validate(
        {
            "suite": "s",
            "task": "t",
            "request_type": kind,
            "documents": requests,
            "requests": requests,
            "context_tokens": requests * context,
            "continuation_tokens": requests * continuation,
            "generation_tokens": requests * generated,
            "longest_request_tokens": longest,
            "lengths": {usual: requests - 1, longest: 1} if usual < longest else {longest: requests},
            "unique_prefix_tokens": round(requests * context * (1 - shared)),
            "task_hash": "0" * 64,
            **({"unit": "t"} if "unit" in TaskFacts.model_fields else {}),
        }
    )


CHOICES = task()
ANSWERS = task("generate_until", requests=1319, context=1000, continuation=0, generated=256, longest=2000)


def gpu(gib: float, count: int = 1, capability: str | None = "9.0", name: str = "NVIDIA H100 80GB HBM3") -> Hardware:
    return Hardware(
        gpus=count,
        gpu_memory_bytes=round(gib * GIB),
        gpu_name=name,
        compute_capability=capability,
        host_memory_bytes=128 * GIB,
        cpus=16,
    )


def planned(
    name: str,
    hardware: Hardware,
    tasks: list[TaskFacts] | None = None,
    policy: str = "auto",
    tiers: Tiers = TIERS,
    asked: ModelConfig = ASKED,
    **more: Any,
) -> Plan:
    return make_plan("r", name, facts(name), tasks or [CHOICES], hardware, tiers, policy, asked, 1234, **more)


def reason(plan: Plan, setting: str) -> str:
    return next(entry.text for entry in plan.reasons if entry.setting == setting)


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


# --- the order -----------------------------------------------------------------------------------------------------


def case(name: str, hardware: Hardware, policy: Policy, rule: TierRule) -> Case:
    return Case(
        facts=facts(name),
        work=summarize([CHOICES]),
        tasks=[CHOICES],
        hardware=hardware,
        policy=policy,
        rule=rule,
        start=policy.start,
        tier="above-13B",
        runner="v2",
        scoring="suffix",
    )


def test_neutral_levers_are_pulled_in_the_documented_order() -> None:
    """docs/plan.md: tokens down to 2,048, requests to 256, graphs, then tokens to 512 and requests to 16."""
    first = stock(8192).model_copy(update={"enforce_eager": False})
    steps = neutral_steps(case("Qwen3-14B", gpu(80), TIERS.policies["auto"], TierRule()), first)
    assert [(step.max_num_batched_tokens, step.max_num_seqs, step.enforce_eager) for step in steps] == [
        (8192, 1024, False),
        (4096, 1024, False),
        (2048, 1024, False),
        (2048, 512, False),
        (2048, 256, False),
        (2048, 256, True),
        (1024, 256, True),
        (512, 256, True),
        (512, 128, True),
        (512, 64, True),
        (512, 32, True),
        (512, 16, True),
    ]
    # A policy may begin anywhere. No step goes below the last ones, and none has more requests than tokens.
    odd = first.model_copy(update={"max_num_batched_tokens": 3000, "max_num_seqs": 3000})
    found = list(neutral_steps(case("Qwen3-14B", gpu(80), TIERS.policies["auto"], TierRule()), odd))
    assert [step.max_num_batched_tokens for step in found[:2]] == [3000, 2048]
    assert all(step.max_num_seqs <= step.max_num_batched_tokens for step in found)
    assert (found[-1].max_num_batched_tokens, found[-1].max_num_seqs) == (512, 16)


def test_of_several_utilizations_only_the_first_is_taken_where_it_is_no_lever_and_none_on_a_cpu() -> None:
    content = yaml.safe_load((ROOT / "config" / "tiers.yaml").read_text())
    content["policies"]["published"]["neutral_levers"].remove("gpu_memory_utilization")
    plan = planned("Meta-Llama-3-8B", H100, policy="published", tiers=Tiers.model_validate(content))
    assert [rung.settings.gpu_memory_utilization for rung in plan.ladder] == [0.8]
    host = Hardware(gpus=0, host_memory_bytes=128 * GIB, cpus=8)
    on_cpu = planned("Meta-Llama-3-8B", host, policy="published")
    assert [rung.settings.gpu_memory_utilization for rung in on_cpu.ladder] == [None]


def test_score_changing_levers_are_pulled_in_the_policy_s_order_each_on_fewer_gpus_first() -> None:
    rule = TierRule(score_levers=["max_model_len", "dtype", "kv_cache_dtype", "quantization"])
    first = stock(8192).model_copy(update={"dtype": "float32", "max_model_len": 3024})
    steps = list(groups_of(case("Qwen3-14B", gpu(24, 2), TIERS.policies["auto"], rule), first))
    assert [step.tensor_parallel_size for step in steps] == [1, 2] * 7
    # Halved in whole blocks of 16 tokens, and never below the policy's shortest length.
    assert [(s.max_model_len, s.dtype, s.kv_cache_dtype, s.quantization) for s in steps[::2]] == [
        (3024, "float32", "auto", None),
        (1520, "float32", "auto", None),
        (1024, "float32", "auto", None),
        (1024, "bfloat16", "auto", None),
        (1024, "bfloat16", "fp8", None),
        (1024, "bfloat16", "fp8", "fp8"),
        (1024, "bfloat16", "fp8", "bitsandbytes"),
    ]
    # What was chosen already is not chosen again, nor is float16 changed into bfloat16.
    chosen = first.model_copy(update={"dtype": "float16", "kv_cache_dtype": "fp8", "quantization": "fp8"})
    kept = list(groups_of(case("Qwen3-14B", gpu(24), TIERS.policies["auto"], rule), chosen))
    assert [(s.max_model_len, s.dtype, s.kv_cache_dtype, s.quantization) for s in kept] == [
        (length, "float16", "fp8", "fp8") for length in (3024, 1520, 1024)
    ]


def test_nothing_is_quantized_on_a_cpu_or_twice() -> None:
    rule = TierRule(score_levers=["quantization", "kv_cache_dtype"])
    stored = case("Meta-Llama-3.1-70B-Instruct-quantized.w4a16", gpu(24), TIERS.policies["auto"], rule)
    assert {step.quantization for step in groups_of(stored, stock(4096))} == {None}
    host = Hardware(gpus=0, host_memory_bytes=16 * GIB, cpus=2)
    assert len(list(groups_of(case("Qwen3-14B", host, TIERS.policies["auto"], rule), stock(4096)))) == 1


def test_a_ladder_has_few_and_big_steps() -> None:
    """docs/plan.md: less cache, the frugal settings, the most frugal ones, more GPUs, and last what changes scores."""
    rungs = [rung.settings for rung in planned("Qwen3-14B", gpu(80, 2)).ladder]
    assert [
        (s.tensor_parallel_size, s.quantization, s.max_model_len, s.max_num_batched_tokens, s.max_num_seqs)
        for s in rungs
    ] == [
        (1, None, 3008, 8192, 1024),
        (1, None, 3008, 8192, 1024),
        (1, None, 3008, 2048, 256),
        (1, None, 3008, 512, 16),
        (2, None, 3008, 2048, 256),
        (1, "fp8", 3008, 2048, 256),
        (2, "fp8", 3008, 2048, 256),
        (2, "bitsandbytes", 3008, 2048, 256),
        (2, "bitsandbytes", 1504, 2048, 256),
        (2, "bitsandbytes", 1024, 2048, 256),
    ]
    # 15 % less cache every time, and from the third on a quarter of the requests at once, down to 64.
    caches = [rung.kv_cache_memory_bytes or 0 for rung in rungs]
    assert all(after == pytest.approx(0.85 * before, rel=0.001) for before, after in itertools.pairwise(caches))
    assert [rung.submit_batch for rung in rungs] == [8192, 8192, 2048, 512, 128, 64, 64, 64, 64, 64]
    on_cpu = planned("SmolLM2-135M", Hardware(gpus=0, host_memory_bytes=64 * GIB, cpus=2)).ladder
    assert [(rung.settings.max_num_batched_tokens, rung.settings.max_num_seqs) for rung in on_cpu] == [
        (4096, 256),
        (4096, 256),
        (2048, 256),
        (512, 16),
    ]


@pytest.mark.parametrize("gib", [11, 12, 14, 16])
def test_no_rung_takes_back_what_the_plan_has_given_up(gib: int) -> None:
    plan = planned("Qwen3-4B", gpu(gib))
    chosen = plan.ladder[0].settings
    for rung in plan.ladder:
        assert rung.settings.max_num_batched_tokens <= chosen.max_num_batched_tokens
        assert rung.settings.max_num_seqs <= chosen.max_num_seqs


def test_a_rung_names_its_levers_and_the_requests_that_it_cuts() -> None:
    shorter = [rung for rung in planned("Qwen3-14B", gpu(80, 2)).ladder if rung.settings.max_model_len < 3008]
    for rung in shorter:
        [lever] = [each for each in rung.levers if each.lever == "max_model_len"]
        assert (lever.requests_cut, lever.changes_scores) == (1, True)
    assert len(shorter) == 2
    lower = planned("Meta-Llama-3-8B", H100, policy="published").ladder[1]
    assert [(each.lever, each.before, each.after) for each in lower.levers] == [
        ("gpu_memory_utilization", "0.8", "0.7")
    ]


# --- what was measured ---------------------------------------------------------------------------------------------


def stock(tokens: int, **more: Any) -> EngineSettings:
    return EngineSettings(
        dtype="bfloat16",
        max_model_len=8192,
        max_num_batched_tokens=tokens,
        max_num_seqs=1024,
        gpu_memory_utilization=0.92,
        enforce_eager=True,
        submit_batch=8192,
        **more,
    )


LONG_PROMPTS = task(requests=64, context=7999, longest=8000)
H100 = gpu(79.65)


@pytest.mark.parametrize(
    ("runner", "tokens", "gib"),
    [("v1", 2048, 76.2), ("v2", 16384, 74.2)],
)
def test_measured_peaks_of_qwen3_4b(runner: Any, tokens: int, gib: float) -> None:
    """NVML on an H100, lm-eval's own requests of 8,000 tokens, utilization 0.92: within 1 %."""
    found = predict(facts("Qwen3-4B"), stock(tokens), summarize([LONG_PROMPTS]), H100, runner, "stock")
    assert found.peak_bytes / GIB == pytest.approx(gib, rel=0.01)


@pytest.mark.parametrize("row", MEASURED["rows"], ids=lambda row: f"{row['model']}-{row['runner']}-{row['side']}")
def test_measured_peaks(row: dict[str, Any]) -> None:
    """NVML on an H100, tests/gpu/memory_bench.py: within 2 %."""
    work = summarize(
        [
            task(requests=row["requests"], context=7992, longest=8000),
            task("generate_until", requests=row["generations"], context=500, longest=756, generated=256),
        ]
    )
    common = {"dtype": "bfloat16", "max_model_len": 8016, "enforce_eager": True, "submit_batch": 128}
    batched = 8192 if row["side"] == "auto" else 16384
    settings = EngineSettings.model_validate(common | {"max_num_batched_tokens": batched} | row["settings"])
    scoring = "suffix" if row["side"] == "auto" else "stock"
    found = predict(facts(row["model"]), settings, work, gpu(79.6), row["runner"], scoring)
    assert found.peak_bytes / GIB == pytest.approx(row["peak_gib"], rel=0.02)


def test_measured_peaks_of_one_gpu_and_of_two() -> None:
    """NVML on H200s, docs/clusters.md: 20 of the layers of Qwen3-14B, 17.40 GiB on one GPU, 10.91 on each of two."""
    layers = [each for each in tensors("Qwen3-14B") if all(int(p) < 20 for p in each.name.split(".") if p.isdigit())]
    model = facts_of({**load("Qwen3-14B")["config"], "num_hidden_layers": 20}, layers)
    demo = [task(requests=40, context=20, longest=60), task("generate_until", 20, 20, 0, generated=16, longest=60)]
    for hardware, gpus, gib in ((gpu(139.8), 1, 17.40), (gpu(16.8, 2), 2, 10.91)):
        rung = make_plan("r", "m", model, demo, hardware, TIERS, "auto", ASKED, None).ladder[0]
        assert rung.settings.tensor_parallel_size == gpus
        assert rung.predicted.peak_bytes / GIB == pytest.approx(gib, rel=0.02)


def test_measured_host_memory_of_an_evaluation_on_a_cpu() -> None:
    """1.5 and 2.3 GiB beside weights and cache, with a 135M model; weights and cache are host memory too."""
    smol, work = facts("SmolLM2-135M"), summarize([task(requests=400, context=100, longest=200)])
    chosen = stock(4096).model_copy(update={"max_num_seqs": 256, "kv_cache_memory_bytes": GIB})
    found = predict(smol, chosen, work, Hardware(gpus=0, host_memory_bytes=24 * GIB, cpus=2), "v1", "suffix")
    assert found.peak_bytes >= 2 * 134_515_008 + GIB
    assert 2.3 <= (found.host_bytes - found.peak_bytes) / GIB <= 3


def test_the_classic_failure_is_predicted_and_planned_around() -> None:
    """Measured: V1 with 16384 batched tokens runs out of memory on 80 GB; with 2048 it runs."""
    work = summarize([LONG_PROMPTS])
    for name in ("Qwen1.5-4B", "Qwen3-4B"):
        failing = predict(facts(name), stock(16384), work, H100, "v1", "stock")
        assert failing.peak_bytes > H100.gpu_memory_bytes
        refused = planned(name, H100, [LONG_PROMPTS], "published", runner="v1", scoring="stock")
        assert not refused.fits
        assert "auto" in (refused.advice or "")
        plan = planned(name, H100, [LONG_PROMPTS], runner="v1", scoring="stock")
        assert plan.fits
        assert not any(lever.changes_scores for lever in plan.levers)
        # The failing settings, with what vLLM would make of 0.92 of the memory, are not what is planned.
        assert plan.ladder[0].predicted.peak_bytes < 0.951 * H100.gpu_memory_bytes
    # "Tried to allocate 4.53 GiB": float32 logits of one prompt.
    assert pytest.approx(4.53, abs=0.01) == 8000 * 151936 * 4 / GIB


def test_transients_of_prompt_logprobs() -> None:
    qwen = facts("Qwen3-4B")
    one = stock(16384).model_copy(update={"max_model_len": 16385})
    assert prompt_logprobs_bytes(qwen, one, "v1", 16385) / GIB == pytest.approx(23.2, abs=0.1)
    chunk = 1024 * 151936 * 2
    assert prompt_logprobs_bytes(qwen, one, "v2", 16385) == 2 * chunk
    assert prompt_logprobs_bytes(qwen, stock(1024), "v2", 8000) == chunk
    # Measured on a CPU: four requests of 2,000 tokens, 2,048 in a step, held 0.98 GiB more than before them.
    smol = facts("SmolLM2-135M")
    assert prompt_logprobs_bytes(smol, stock(2048), "v1", 1999) / GIB == pytest.approx(0.98, rel=0.06)
    # Gemma 2 soft-caps its logits: one more copy.
    assert prompt_logprobs_bytes(facts("gemma-2-9b"), one, "v2", 8000) == 3 * 1024 * 256000 * 2
    # V1 holds the rows that a prompt has in a step: no more than its tokens, and no more than the engine's length.
    short = prompt_logprobs_bytes(qwen, stock(2048), "v1", 1000)
    assert prompt_logprobs_bytes(qwen, stock(16384), "v1", 1000) == short
    whole = prompt_logprobs_bytes(qwen, stock(32768), "v1", 8191)
    assert prompt_logprobs_bytes(qwen, stock(32768), "v1", 40_000) == whole


def test_only_tasks_of_loglikelihoods_hold_prompt_logits() -> None:
    found = {
        work.request_type: predict(facts("Qwen3-4B"), stock(16384), summarize([work]), H100, "v2", "stock")
        for work in (CHOICES, ANSWERS)
    }
    assert found["loglikelihood"].prompt_logprobs_bytes == 2 * 1024 * 151936 * 2
    assert found["generate_until"].prompt_logprobs_bytes == 0


def test_sampling_with_a_temperature_copies_the_logits_as_float32() -> None:
    """V1 makes the copy always. For 1,024 requests and 151,936 tokens it is 622 MB."""
    qwen, copy = facts("Qwen3-4B"), 622_329_856
    assert sampler_bytes(qwen, stock(16384), "v2", True) - sampler_bytes(qwen, stock(16384), "v2", False) == copy
    assert sampler_bytes(qwen, stock(16384), "v1", True) == sampler_bytes(qwen, stock(16384), "v1", False) > copy


def test_a_mixture_of_experts_repeats_its_rows_for_every_expert_of_a_token() -> None:
    """Qwen3-30B-A3B: each of 8 experts has its copy of a token's 2,048 values, and a gate, an input and a product."""
    assert activations_bytes(facts("Qwen3-30B-A3B"), stock(8192)) >= 8192 * 2 * 8 * (2048 + 3 * 768)


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("name", ["Qwen3-4B", "Meta-Llama-3-8B"])
def test_a_utilization_is_filled_whatever_the_parts_are(name: str, eager: bool) -> None:
    """vLLM gives the cache what the rest leaves of its share; beyond it are the context and what no profile counts."""
    chosen = stock(8192).model_copy(update={"enforce_eager": eager})
    found = predict(facts(name), chosen, summarize([CHOICES]), H100, "v2", "stock")
    share = found.peak_bytes - found.prompt_logprobs_bytes - CONTEXT_BYTES
    assert share == math.ceil(0.92 * H100.gpu_memory_bytes)
    assert (found.cuda_graphs_bytes == 0) == eager
    # Where nothing is left there is no cache, and the weights are not taken for less than they are.
    small = predict(facts(name), chosen, summarize([CHOICES]), gpu(6), "v2", "stock")
    assert small.kv_cache_bytes == 0
    assert small.peak_bytes > small.weights_bytes > gpu(6).gpu_memory_bytes


def test_host_memory_of_the_requests_that_are_held() -> None:
    def held(scoring: Any, submitted: int = 8192, kind: str = "loglikelihood") -> float:
        """Gigabytes that 8,000 requests of 1,250 tokens take, 10 million in all."""
        work = task(kind, requests=8000, context=1250, continuation=0, longest=1250)
        chosen = stock(8192).model_copy(update={"submit_batch": submitted})
        sizes = [host_bytes(chosen, summarize([each]), scoring, True) for each in (work, task(requests=1, context=1))]
        return (sizes[0] - sizes[1]) / 1e9

    # Measured: 5.6 GB for the objects of 10 million prompt tokens that were submitted with prompt_logprobs.
    assert 5.6 <= held("stock") <= 6.2
    assert held("stock", kind="generate_until") < 1
    # A list of Python's numbers takes 36 bytes for each; lm-eval keeps all of them, suffix scoring two windows.
    assert 0.36 <= held("stock", submitted=64) < 1
    assert 2 * 0.36 <= held("suffix") < 1
    # Where there are fewer requests than may be submitted, they are all.
    few, one = (summarize([task(requests=n, context=2000)]) for n in (4, 1))
    assert host_bytes(stock(8192), few, "stock", True) - host_bytes(stock(8192), one, "stock", True) < 0.01e9
    # The texts of all requests stay, of about four characters a token.
    assert 0.04 <= held("suffix", submitted=64) < 0.1


def test_work_of_several_tasks_is_added_up() -> None:
    # 100 questions with four answers of 2 tokens; an eighth of their contexts is left once shared prefixes count once.
    choices = task(requests=400, context=500, continuation=2, shared=0.875)
    answers = task("generate_until", requests=30, context=100, continuation=0, generated=64, shared=0.0)
    work = summarize([choices, answers])
    assert work.prefill_tokens == (25_000 + 800) + 3_000
    assert (work.requests, work.generated_tokens, work.longest_answer) == (430, 1920, 64)
    assert (work.largest_task_requests, work.largest_task_tokens) == (400, 25_800)
    assert summarize([answers]).largest_task_tokens == 3_000 + 1_920
    # A record that does not say what is shared: nothing is.
    assert summarize([task(requests=400, context=500, shared=1.0)]).prefill_tokens == 200_400


def test_cache_bytes_of_a_token() -> None:
    assert cache_bytes_per_token(facts("Qwen3-4B"), "bfloat16") == 147_456
    assert cache_bytes_per_token(facts("Meta-Llama-3-8B"), "bfloat16") == 131_072
    assert cache_bytes_per_token(facts("Meta-Llama-3-8B"), "bfloat16", tp=4) == 131_072 // 4
    # More ranks than KV heads copy them, and MLA's latent is never divided.
    assert cache_bytes_per_token(facts("Meta-Llama-3-8B"), "bfloat16", tp=16) == 131_072 // 8
    assert cache_bytes_per_token(facts("DeepSeek-V3"), "bfloat16", tp=8) == 61 * 576 * 2
    assert cache_bytes_per_token(facts("Meta-Llama-3-8B"), "bfloat16", "fp8") == 131_072 // 2


@pytest.mark.parametrize(
    ("name", "mib", "tokens", "states", "attention"),
    [
        # 36 states of 1,097,728 bytes and 12 attention layers of 2,048 bytes a token: groups of 12.
        ("Qwen3-Next-80B-A3B-Instruct", 12.75, 544, 6, 1),
        # 54 states, float32, and 10 attention layers of 4,096 bytes a token: groups of 10.
        ("Nemotron-H-56B-Base-8K", 161.25, 4128, 12, 1),
        ("granite-4.0-h-tiny", 3.125, 400, 18, 1),
        # No attention: no prefix cache, so one state; a block is a page of each of the 64 layers.
        ("mamba-2.8b-hf", 23.75, 16, 1, 0),
    ],
)
def test_states_and_attention_share_blocks_of_one_size(
    name: str, mib: float, tokens: int, states: int, attention: int
) -> None:
    """Of the first two the sizes are those that vLLM's own grouping gives for these shapes."""
    chosen = stock(8192)
    pool = cache_pool(facts(name), chosen)
    assert (pool.block_bytes / 2**20, pool.state_blocks) == (mib, states)
    assert [layers.block_tokens for layers in pool.attention] == [tokens] * attention
    held = request_cache_bytes(facts(name), chosen, 3 * tokens + 1)
    assert held == pool.block_bytes * (states + 4 * attention)


@pytest.mark.parametrize(
    ("name", "length", "tokens", "mib"),
    [
        # 21 full and 21 sliding layers: two groups.
        ("gemma-2-9b", 8192, 2048, 2690.625),
        # 4 full and 22 sliding layers: seven groups of four, of which two lack a layer.
        ("gemma-3-1b-it", 8192, 2048, 140.375),
        ("gemma-3-1b-it", 3008, 8192, 82.625),
        ("gpt-oss-20b", 32768, 2048, 867.375),
        # All layers slide: one group, which keeps the window and two steps of what is longer.
        ("Mistral-7B-v0.1", 32768, 512, 642.0),
    ],
)
def test_sliding_windows_take_what_vllm_says_that_they_do(name: str, length: int, tokens: int, mib: float) -> None:
    """From vLLM's own function; tests/engine/test_cache_pool.py asks it for every architecture."""
    assert request_cache_bytes(facts(name), stock(tokens), length) / 2**20 == mib


@pytest.mark.parametrize(
    ("kinds", "block_mib", "mib"),
    [
        # gemma-3-27b: seven groups of ten layers.
        ([("full", 10, 4096, None), ("sliding", 52, 4096, 1024)], 1.25, 3047.5),
        # Less than 1.5 times as many layers of one kind: two groups, of which the smaller lacks layers.
        ([("full", 10, 2048, None), ("sliding", 14, 2048, 512)], 0.875, 700.875),
        ([("full", 10, 2048, None), ("sliding", 15, 2048, 512)], 0.625, 681.25),
        # Narrower keys and values: blocks of more tokens where they fill a page, else padded.
        ([("full", 5, 4096, None), ("sliding", 25, 2048, 1024)], 0.625, 823.125),
        ([("full", 8, 2048, None), ("sliding", 24, 1536, 1024)], 0.5, 737.5),
        ([("full", 8, 2048, None), ("sliding", 24, 896, 1024)], 0.5, 737.5),
    ],
)
def test_layers_of_several_kinds_are_grouped_as_in_vllm(
    kinds: list[tuple[str, int, int, int | None]], block_mib: float, mib: float
) -> None:
    """For 8,192 tokens in steps of 2,048, from vLLM's own functions; tests/engine/test_cache_pool.py asks them."""
    model = with_layers(*kinds)
    assert cache_pool(model, stock(2048)).block_bytes / 2**20 == block_mib
    assert request_cache_bytes(model, stock(2048), 8192) / 2**20 == mib


def with_layers(*kinds: tuple[str, int, int, int | None], state_bytes: int = 0, states: int = 0) -> ModelFacts:
    """A model of layers (kind, layers, elements of a token in a layer, window), and of layers that keep a state."""
    cache = [
        CacheGroup(kind=kind, layers=n, elements_per_token=n * each, window_tokens=window)  # type: ignore[arg-type]
        for kind, n, each, window in kinds
    ]
    if states:
        cache.append(CacheGroup(kind="state", layers=states, state_bytes=states * state_bytes))
    return facts("Qwen3-4B").model_copy(update={"cache": cache})


def test_a_block_beside_states_holds_a_multiple_of_128_tokens_of_mla() -> None:
    """Kimi-Linear-48B: a state of 2,170,880 bytes in a layer, 576 elements of a token (_align_hybrid_block_size)."""
    pool = cache_pool(with_layers(("mla", 7, 576, None), states=20, state_bytes=2_170_880), stock(8192))
    assert pool.attention[0].block_tokens == 1920


def test_fewer_layers_with_states_than_with_attention_make_groups_of_their_size() -> None:
    """As for other kinds of layers; nothing that is known has them."""
    pool = cache_pool(with_layers(("full", 24, 512, None), states=8, state_bytes=100_000), stock(8192))
    assert (pool.state_blocks, [layers.groups for layers in pool.attention]) == (2, [3])


def test_states_are_divided_among_gpus() -> None:
    one, two = (
        cache_pool(facts("mamba-2.8b-hf"), stock(8192).model_copy(update={"tensor_parallel_size": n})) for n in (1, 2)
    )
    assert one.block_bytes == 2 * two.block_bytes


def test_blocks_on_a_cpu_have_128_tokens() -> None:
    """The CPU platform's default: two hold a request of 256 tokens, one those of a step, and one is never used."""
    hardware = Hardware(gpus=0, host_memory_bytes=16 * GIB, cpus=2)
    rung = planned("SmolLM2-135M", hardware, [task(requests=1, context=20, longest=20)]).ladder[0]
    assert rung.settings.max_model_len == 256
    assert rung.predicted.kv_cache_bytes == 4 * 128 * cache_bytes_per_token(facts("SmolLM2-135M"), "bfloat16")


@pytest.mark.parametrize("policy", ["auto", "published"])
@pytest.mark.parametrize("gib", SIZES)
def test_every_model_gets_a_cache_that_vllm_starts_with(gib: int, policy: str) -> None:
    """vLLM refuses fewer blocks than a full request and one more, and with graphs fewer than max_num_seqs."""
    long = task("generate_until", requests=20_000, context=500, continuation=0, generated=256, longest=800)
    for name, work in itertools.product(NAMES, (CHOICES, ANSWERS, long)):
        for rung in planned(name, gpu(gib, 2), [work], policy).ladder:
            chosen = rung.settings
            pool = cache_pool(facts(name), chosen)
            blocks = rung.predicted.kv_cache_bytes // pool.block_bytes
            assert blocks > pool.request_blocks(chosen, chosen.max_model_len)
            assert chosen.enforce_eager or not pool.state_blocks or blocks >= chosen.max_num_seqs


@pytest.mark.parametrize("requests", [100, 3000])
def test_the_cache_is_as_large_as_the_largest_task_can_fill_and_no_larger(requests: int) -> None:
    """500 tokens and 256 new ones take 48 blocks of 16."""
    answers = task("generate_until", requests, 500, 0, generated=256, longest=756, shared=0)
    rung = planned("Qwen3-0.6B", gpu(2000), [answers, task(requests=10, longest=756)]).ladder[0]
    block = 16 * cache_bytes_per_token(facts("Qwen3-0.6B"), "bfloat16")
    assert 1 <= rung.predicted.kv_cache_bytes / (48 * requests * block) < 1.02


def test_the_cache_holds_the_states_of_those_that_run_at_once() -> None:
    """granite-4.0-h-tiny: 18 blocks of 3.125 MiB for a request's states, and 400 tokens of attention in a block."""
    answers = task("generate_until", 5000, 500, 0, generated=256, longest=756, shared=0)
    rung = planned("granite-4.0-h-tiny", gpu(2000), [answers]).ladder[0]
    blocks = rung.predicted.kv_cache_bytes / 2**20 / 3.125
    assert rung.settings.max_num_seqs == 1024
    assert 1024 * (18 + 2) <= blocks <= 1024 * (18 + 2) + 5000 * 2


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


def test_measured_throughput_is_reproduced_by_the_estimate() -> None:
    """Measured: 256 requests of 500 and 256 tokens on an H100, 6,952 tokens/s eager and 11,606 with graphs."""
    kind = task("generate_until", requests=256, context=500, continuation=0, generated=256, longest=756, shared=0)
    work = summarize([kind])
    for eager, rate in ((True, 6952), (False, 11606)):
        chosen = stock(8192).model_copy(update={"enforce_eager": eager, "max_num_seqs": 256})
        found = estimate(facts("Qwen3-4B"), work, chosen, H100)
        assert 256 * 256 / found.work_s == pytest.approx(rate, rel=0.06)


def test_measured_speed_on_two_cores_is_reproduced_by_the_estimate() -> None:
    """450 tokens/s with a 135M model; 234 short requests took 24 s, most of it neither arithmetic nor the start."""
    cores = Hardware(gpus=0, host_memory_bytes=16 * GIB, cpus=2)
    few, many = (
        summarize([task(requests=n, context=tokens, continuation=0, longest=tokens, shared=0.0)])
        for n, tokens in ((10, 4500), (234, 10))
    )
    assert 45_000 / estimate(facts("SmolLM2-135M"), few, stock(4096), cores).work_s == pytest.approx(450, rel=0.05)
    assert estimate(facts("SmolLM2-135M"), many, stock(4096), cores).work_s == pytest.approx(24, rel=0.05)
    eight = cores.model_copy(update={"cpus": 8})
    found = [estimate(facts("SmolLM2-135M"), few, stock(4096), each) for each in (cores, eight)]
    assert found[0].work_s / found[1].work_s == pytest.approx(4, rel=0.05)
    assert [time.gpu_hours for time in found] == [0, 0]
    assert found[0].engine_start_s == pytest.approx(30, rel=0.05)


def test_requests_take_a_millisecond_of_python_however_fast_the_gpu_is() -> None:
    many = summarize([task(requests=100_000, context=1, longest=2)])
    assert estimate(facts("SmolLM2-135M"), many, stock(8192), H100).work_s == pytest.approx(100, rel=0.05)


def test_measured_starts_of_an_engine() -> None:
    """On an H100 with a 4B model and dummy weights, 35 s eager and 93 s with graphs; real ones are also read."""
    eager, graphs = (
        planned("Qwen3-4B", H100, [work]).time
        for work in (CHOICES, task("generate_until", 20_000, 500, 0, generated=256, longest=800))
    )
    assert eager is not None
    assert graphs is not None
    assert graphs.engine_start_s - eager.engine_start_s == pytest.approx(93 - 35)
    assert 35 < eager.engine_start_s < 50


@pytest.mark.parametrize(
    ("name", "teraflops", "terabytes"),
    [
        ("NVIDIA B200", 2250, 8.0),
        ("NVIDIA H200", 989, 4.8),
        ("NVIDIA H100 80GB HBM3", 989, 3.35),
        ("NVIDIA A100-SXM4-80GB", 312, 2.0),
        ("NVIDIA L40S", 362, 0.864),
        ("NVIDIA L40", 181, 0.864),
        ("NVIDIA L4", 121, 0.3),
        ("NVIDIA A10", 125, 0.6),
        ("nvidia geforce rtx 4090", 165, 1.0),
        ("Tesla V100-SXM2-32GB", 125, 0.9),
        (None, 312, 2.0),
    ],
)
def test_the_speed_of_a_gpu_is_its_data_sheet_s(name: str | None, teraflops: float, terabytes: float) -> None:
    assert gpu_speed(name) == (teraflops * 1e12, terabytes * 1e12)


def test_time_of_work_goes_down_with_gpus_and_hours_count_all_of_them() -> None:
    one, two = (
        estimate(
            facts("Qwen3-32B"),
            summarize([task(requests=10_000, context=1000, longest=1001, shared=0.0)]),
            stock(8192).model_copy(update={"tensor_parallel_size": gpus}),
            H100,
        )
        for gpus in (1, 2)
    )
    assert one.work_s / two.work_s == pytest.approx(2, rel=0.02)
    assert one.engine_start_s == two.engine_start_s, "the files are read once in all"
    assert two.gpu_hours == pytest.approx(2 * (two.engine_start_s + two.work_s) / 3600, rel=0.01)


def test_a_mixture_of_experts_computes_what_a_token_meets() -> None:
    """Qwen3-30B-A3B: 3.3 of 30.5 billion parameters."""
    work = summarize([task(requests=10_000, context=1000, longest=1001, shared=0.0)])
    dense, sparse = (estimate(facts(name), work, stock(8192), H100).work_s for name in ("Qwen3-32B", "Qwen3-30B-A3B"))
    assert dense > 8 * sparse


def test_generation_takes_longer_where_the_cache_holds_few_requests() -> None:
    """A request of Qwen3-4B with 500 to 756 tokens takes 71 to 106 MiB."""
    answers = summarize([task("generate_until", 1000, 500, 0, generated=256, longest=756, shared=0)])

    def seconds(gib: float, requests: int = 1024) -> float:
        cache = {"kv_cache_memory_bytes": round(gib * GIB), "max_num_seqs": requests}
        return estimate(facts("Qwen3-4B"), answers, stock(8192).model_copy(update=cache), H100).work_s

    assert seconds(1) > 3 * seconds(4)
    assert seconds(60, requests=10) == pytest.approx(seconds(1), rel=0.25)
    assert seconds(60) < seconds(4)


def test_old_gpus_have_no_bfloat16() -> None:
    plan = planned("Qwen3-4B", gpu(32, capability="7.0", name="Tesla V100"))
    assert plan.ladder[0].settings.dtype == "float16"
    assert [(lever.lever, lever.changes_scores) for lever in plan.levers] == [("dtype", True)]


def test_float16_is_not_planned_for_models_that_vllm_refuses_in_it() -> None:
    old = planned("gemma-2-9b", gpu(80, capability="7.0"))
    assert old.ladder[0].settings.dtype == "float32"
    assert "vLLM refuses float16 for gemma2, and bfloat16 needs compute capability 8.0" in reason(old, "dtype")
    content = yaml.safe_load((ROOT / "config" / "tiers.yaml").read_text())
    content["policies"]["auto"]["tiers"]["7B-to-13B"] = {"score_levers": ["dtype"]}
    halved = Tiers.model_validate(content)
    assert not planned("gemma-2-9b", gpu(24, capability="7.0"), tiers=halved).fits, "nor is bfloat16 a lever there"
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


# --- tiers ---------------------------------------------------------------------------------------------------------


def test_size_is_counted_and_the_boundary_belongs_to_the_larger_tier() -> None:
    assert TIERS.tier_of(6_999_999_999).name == "below-7B"
    assert TIERS.tier_of(7_000_000_000).name == "7B-to-13B"
    assert TIERS.tier_of(facts("Llama-2-13b-hf").parameters).name == "7B-to-13B"
    assert TIERS.tier_of(facts("Qwen3-14B").parameters).name == "above-13B"


def test_the_published_rule_is_applied_as_written() -> None:
    small, middle, large = (
        planned(name, H100, policy="published") for name in ("Qwen3-4B", "Meta-Llama-3-8B", "Qwen3-14B")
    )
    assert [plan.ladder[0].settings.enforce_eager for plan in (small, middle, large)] == [True] * 3
    assert [plan.ladder[0].settings.gpu_memory_utilization for plan in (small, middle, large)] == [0.92, 0.8, 0.8]
    assert [plan.ladder[0].settings.max_model_len for plan in (small, middle, large)] == [3008, 3008, 1024]
    assert [lever.requests_cut for lever in large.levers if lever.lever == "max_model_len"] == [1]
    assert [rung.settings.gpu_memory_utilization for rung in middle.ladder] == [0.8, 0.7, 0.6]


def test_a_third_policy_needs_no_code() -> None:
    content = yaml.safe_load((ROOT / "config" / "tiers.yaml").read_text())
    content["policies"]["mine"] = {
        "summary": "Small steps and an 8-bit cache.",
        "neutral_levers": ["kv_cache_memory_bytes"],
        "free_share": 0.2,
        "start": {"max_num_batched_tokens": 512, "max_num_seqs": 1024, "enforce_eager": False},
        "tiers": {"below-7B": {"start": {"kv_cache_dtype": "fp8"}}},
    }
    plan = planned("Qwen3-4B", H100, policy="mine", tiers=Tiers.model_validate(content))
    chosen = plan.ladder[0].settings
    assert (chosen.max_num_batched_tokens, chosen.kv_cache_dtype, chosen.enforce_eager) == (512, "fp8", False)
    assert chosen.max_num_seqs == 512, "vLLM refuses more requests than tokens"
    assert plan.ladder[0].predicted.peak_bytes <= 0.8 * H100.gpu_memory_bytes
    assert [lever.lever for lever in plan.levers if lever.changes_scores] == ["kv_cache_dtype"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("free_share: 0.05", "fre_share: 0.05"), "did you mean free_share?"),
        (("- max_num_seqs", "- max_num_seq"), "max_num_seq"),
        (("{enforce_eager: true, gpu", "{enforce_eagr: true, gpu"), "did you mean enforce_eager?"),
        (("score_levers: [quantization, max", "score_levrs: [quantization, max"), "did you mean score_levers?"),
        (("  - name: above-13B", "  - name: above-13B\n    below_billions: 10"), "a last tier without"),
        (("    below_billions: 14", ""), "every tier but the last"),
        (("below_billions: 14", "below_billions: 6"), "each larger than the one before"),
        (("below_billions: 14", "below_billions: 7"), "each larger than the one before"),
        (("- name: 7B-to-13B", "- name: below-7B"), "different names"),
        (("      below-7B: {}", "      below-8B: {}"), "not below-8B"),
        (("  published:\n", "  published:\n    summary: twice\n"), "second time"),
        (("tiers:", "tiers: [", ), "indentation"),
    ],
)  # fmt: skip
def test_problems_of_the_tiers_file_name_the_place(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    text = (ROOT / "config" / "tiers.yaml").read_text()
    assert change[0] in text
    path = tmp_path / "tiers.yaml"
    path.write_text(text.replace(*change, 1))
    with pytest.raises(ConfigError) as caught:
        load_tiers(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean auto"):
        planned("Qwen3-4B", H100, policy="atuo")


def test_the_schema_on_disk_is_the_code_s() -> None:
    assert yaml.safe_load((ROOT / "workflow" / "schemas" / "tiers.schema.yaml").read_text()) == schema()


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


def test_levers_that_change_no_score_are_not_marked() -> None:
    shown = table([planned("Qwen3-4B", H100, policy="published")])
    assert "enforce_eager=True" in shown
    assert "*" not in shown


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
    assert lines[-1] == "* changes scores, which are marked in every result: Llama-3.1-70B"
    assert command.main(["table", "--strict", *paths]) == 1
    assert command.main(["table", "--strict", *paths[:2]]) == 0


def test_a_plan_is_a_record(files: list[str]) -> None:
    plan = planned("Qwen3-32B", gpu(48))
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    assert table([plan]).count("\n") >= 2
    json.loads(plan.model_dump_json())

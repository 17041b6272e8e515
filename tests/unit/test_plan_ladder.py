"""The order in which levers are pulled, and the rungs of a ladder: those that docs/plan.md gives."""

from __future__ import annotations

import itertools

import pytest
import yaml
from architecture_data import facts
from planning import CHOICES, H100, ROOT, TIERS, gpu, planned, stock

from reproval.memory_model import (
    GIB,
    summarize,
)
from reproval.plan_ladder import groups_of, neutral_steps
from reproval.plan_start import Case
from reproval.records import Hardware
from reproval.tiers import Policy, TierRule, Tiers


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


def test_fp8_is_no_way_to_quantize_in_float32() -> None:
    rule = TierRule(score_levers=["quantization", "dtype"])
    wide = stock(4096).model_copy(update={"dtype": "float32"})
    steps = groups_of(case("Qwen3-14B", gpu(80), TIERS.policies["auto"], rule), wide)
    assert [(step.dtype, step.quantization) for step in steps] == [
        ("float32", None),
        ("float32", "bitsandbytes"),
        ("bfloat16", "bitsandbytes"),
    ]


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

"""The parts of a predicted peak: what was measured, and what vLLM's own functions give."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import yaml
from architecture_data import NAMES, facts, load, tensors
from planning import ANSWERS, ASKED, CHOICES, H100, ROOT, SIZES, TIERS, gpu, planned, stock, task

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
from reproval.plan import make_plan
from reproval.records import CacheGroup, EngineSettings, Hardware, ModelFacts

MEASURED = yaml.safe_load((ROOT / "tests/unit/measured_peaks.yaml").read_text(encoding="utf-8"))


LONG_PROMPTS = task(requests=64, context=7999, longest=8000)


@pytest.mark.parametrize(
    ("runner", "tokens", "gib"),
    [("v1", 2048, 76.2), ("v2", 16384, 74.2)],
)
def test_measured_peaks_of_qwen3_4b(runner: Any, tokens: int, gib: float) -> None:
    """NVML on an H100, lm-eval's own requests of 8,000 tokens, utilization 0.92: within 1 %."""
    found = predict(facts("Qwen3-4B"), stock(tokens), summarize([LONG_PROMPTS]), H100, runner, "stock")
    assert found.peak_bytes / GIB == pytest.approx(gib, rel=0.01)


@pytest.mark.parametrize("row", MEASURED["rows"], ids=lambda row: f"{row['model']}-{row['side']}-{row['requests']}")
def test_measured_peaks(row: dict[str, Any]) -> None:
    """NVML on an H100, tests/gpu/memory_bench.py: within 2 %, or what the row says."""
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
    assert found.peak_bytes / GIB == pytest.approx(row["peak_gib"], rel=row.get("error", 0.02))


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

"""What a plan may try, in order; whether it fits; and the ladder of what is left when the engine fails all the same.

The order never depends on the amount of memory, so more memory never gives a later candidate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from reproval import capability
from reproval.memory_model import (
    BLOCK_TOKENS,
    MIB,
    cache_pool,
    host_bytes,
    padded_vocabulary,
    predict,
    round_up,
)
from reproval.plan_start import (
    FEWEST_SEQUENCES,
    FEWEST_SUBMITTED,
    SCORE_LEVERS,
    Case,
    changes_requests,
    gib,
    length_text,
    quantized_dtypes,
    requests_over,
)
from reproval.records import Dtype, EngineSettings, Lever, MemoryPrediction, ModelFacts, PulledLever, Rung

# Below the first of each pair, throughput suffers before memory is won; the second is the last step.
_FRUGAL_TOKENS, _FEWEST_TOKENS = 2048, 512
_FRUGAL_SEQUENCES = 256
_WORTH_A_RUNG = 0.02
"""Share of the predicted peak that a rung must free."""
_LOWER_CACHE = 0.85


@dataclass(frozen=True)
class Settled:
    settings: EngineSettings
    predicted: MemoryPrediction


def groups_of(case: Case, first: EngineSettings) -> Iterator[EngineSettings]:
    """Where each series of neutral steps begins: fewer GPUs before more, more before a change of scores."""
    for scored in _score_steps(case, first):
        for tp in _parallel_sizes(case):
            yield scored.model_copy(update={"tensor_parallel_size": tp})


def _score_steps(case: Case, first: EngineSettings) -> Iterator[EngineSettings]:
    yield first
    current = first
    for lever in case.rule.score_levers:
        if lever == "quantization" and first.quantization is None:
            for method in possible_quantizations(case, case.rule.quantizations, current.dtype):
                current = current.model_copy(update={"quantization": method})
                yield current
        if lever == "kv_cache_dtype" and first.kv_cache_dtype == "auto" and case.hardware.gpus:
            current = current.model_copy(update={"kv_cache_dtype": "fp8"})
            yield current
        if lever == "dtype" and first.dtype == "float32" and not case.lacks_bfloat16:
            current = current.model_copy(update={"dtype": "bfloat16"})
            yield current
        if lever == "max_model_len":
            shortest = max(case.rule.shortest_max_model_len, case.shortest_length)
            while current.max_model_len > shortest:
                half = max(shortest, round_up(current.max_model_len // 2, BLOCK_TOKENS))
                current = current.model_copy(update={"max_model_len": half})
                yield current


def possible_quantizations(case: Case, methods: list[str], dtype: Dtype) -> list[str]:
    """Of these ways to quantize while loading, those that the machine, the checkpoint and the dtype can take."""
    if not case.hardware.gpus or case.facts.quantization is not None:
        return []
    known = case.hardware.compute_capability
    fp8 = known is not None and not capability.lacks(known, capability.FP8)
    return [method for method in methods if (method != "fp8" or fp8) and dtype in quantized_dtypes(method)]


def _parallel_sizes(case: Case) -> list[int]:
    if not case.hardware.gpus or not case.allows("tensor_parallel_size"):
        return [1]
    return [n for n in range(1, case.hardware.gpus + 1) if divides(case.facts, n)]


def divides(facts: ModelFacts, tp: int) -> bool:
    """Whether vLLM can divide the model among so many GPUs.

    It divides heads, the padded vocabulary (VocabParallelEmbedding) and the width of the MLP or of an expert without
    rest, and KV heads are divided or copied. A checkpoint that bitsandbytes quantized cannot be divided.
    """
    if tp > 1 and facts.quantization == "bitsandbytes":
        return False
    if any(size % tp for size in (facts.attention_heads, padded_vocabulary(facts), facts.intermediate_size)):
        return False
    return facts.kv_heads % tp == 0 or tp % facts.kv_heads == 0


def neutral_steps(case: Case, first: EngineSettings) -> Iterator[EngineSettings]:
    """From the given settings to the most frugal ones, one halving at a time."""
    current = first
    yield current
    utilizations = case.start.gpu_memory_utilization
    if (
        isinstance(utilizations, list)
        and first.gpu_memory_utilization is not None
        and case.allows("gpu_memory_utilization")
    ):
        for utilization in utilizations[1:]:
            current = current.model_copy(update={"gpu_memory_utilization": utilization})
            yield current

    def halve(name: Literal["max_num_batched_tokens", "max_num_seqs"], floor: int) -> Iterator[EngineSettings]:
        nonlocal current
        while case.allows(name) and getattr(current, name) > floor:
            half = max(floor, getattr(current, name) // 2)
            current = current.model_copy(update={name: half})
            if current.max_num_seqs > current.max_num_batched_tokens:
                current = current.model_copy(update={"max_num_seqs": current.max_num_batched_tokens})
            yield current

    yield from halve("max_num_batched_tokens", _FRUGAL_TOKENS)
    yield from halve("max_num_seqs", _FRUGAL_SEQUENCES)
    if case.allows("enforce_eager") and not current.enforce_eager:
        current = current.model_copy(update={"enforce_eager": True})
        yield current
    yield from halve("max_num_batched_tokens", _FEWEST_TOKENS)
    yield from halve("max_num_seqs", FEWEST_SEQUENCES)


# --- does it fit ---------------------------------------------------------------------------------------------------


def prediction(case: Case, settings: EngineSettings) -> MemoryPrediction:
    return predict(case.facts, settings, case.work, case.hardware, case.runner, case.scoring)


def needed_cache_bytes(case: Case, settings: EngineSettings) -> int:
    """The least cache: one request of the full length, the tokens of one step, and the block that is never used.

    Where layers keep states, graphs also need a block for each request that may run at once
    (resolve_cudagraph_mode_and_sizes of vllm/config/compilation.py).
    """
    pool = cache_pool(case.facts, settings, case.block)
    in_step = min(settings.max_num_batched_tokens, case.work.largest_task_tokens)
    blocks = pool.request_blocks(settings, settings.max_model_len) + pool.attention_blocks(in_step) + 1
    if pool.state_blocks and not settings.enforce_eager:
        blocks = max(blocks, settings.max_num_seqs)
    return pool.block_bytes * blocks


def useful_cache_bytes(case: Case, settings: EngineSettings) -> int:
    """More cache than this is never filled: all requests of the largest task at once."""
    pool = cache_pool(case.facts, settings, case.block)
    requests = case.work.largest_task_requests
    # Each ends within a block, which is kept only while it runs; blocks of models with states are large.
    ends = min(settings.max_num_seqs, requests) if pool.state_blocks else requests
    attention = pool.attention_blocks(case.work.largest_task_tokens) + ends * pool.attention_blocks(1)
    return max(needed_cache_bytes(case, settings), pool.block_bytes * (ends * pool.state_blocks + attention + 1))


def without_cache_bytes(case: Case, settings: EngineSettings) -> int:
    """Predicted peak with an empty cache, on a CPU machine with what the process itself takes."""
    predicted = prediction(case, settings.model_copy(update={"kv_cache_memory_bytes": 1}))
    return (predicted.peak_bytes if case.hardware.gpus else predicted.host_bytes) - 1


def settle(case: Case, settings: EngineSettings) -> Settled | None:
    """Give a candidate its cache; None if it does not fit."""
    if case.hardware.gpus and not _host_fits(case, settings):
        return None
    least = needed_cache_bytes(case, settings)
    if settings.gpu_memory_utilization is not None:
        predicted = prediction(case, settings)
        if predicted.kv_cache_bytes < least or predicted.peak_bytes > case.budget_bytes:
            return None
        return Settled(settings, predicted)
    room = case.budget_bytes - without_cache_bytes(case, settings)
    if room < least:
        return None
    return _with_cache(case, settings, max(least, _whole(min(room, useful_cache_bytes(case, settings)))))


def _host_fits(case: Case, settings: EngineSettings) -> bool:
    """Whether a machine with GPUs has the host memory that the engine's processes and the requests take."""
    return host_bytes(settings, case.work, case.scoring, on_gpu=True) <= case.hardware.host_memory_bytes


def _whole(size: int) -> int:
    return size // MIB * MIB


def _with_cache(case: Case, settings: EngineSettings, cache: int) -> Settled:
    settings = settings.model_copy(update={"kv_cache_memory_bytes": cache})
    predicted = prediction(case, settings)
    if case.hardware.gpus:
        # vLLM refuses to start if less than this share is free, also where the cache is given in bytes.
        share = (predicted.peak_bytes - predicted.context_bytes) / case.hardware.gpu_memory_bytes
        settings = settings.model_copy(update={"gpu_memory_utilization": min(1.0, math.ceil(share * 1000) / 1000)})
    return Settled(settings, predicted)


# --- the ladder ----------------------------------------------------------------------------------------------------


def peak_bytes(case: Case, predicted: MemoryPrediction) -> int:
    return predicted.peak_bytes if case.hardware.gpus else predicted.host_bytes


def ladder_of(case: Case, plan: Settled, levers: list[PulledLever], groups: list[list[EngineSettings]]) -> list[Rung]:
    """The plan, then ever more frugal settings; the first of `groups` begins with the plan's own candidate.

    A restart costs a minute, so a rung is a big step: first a smaller cache alone, then the frugal settings, then the
    most frugal ones, then more GPUs, and last what changes scores. Every rung shrinks the cache, all but the first the
    batch of requests that is submitted too, and each has a smaller predicted peak than the one before.
    """
    rungs = [Rung(settings=plan.settings, levers=levers, predicted=plan.predicted)]
    last = plan
    worth = _WORTH_A_RUNG * peak_bytes(case, plan.predicted)
    for settings in _rung_settings(groups):
        if case.allows("submit_batch") and settings is not groups[0][0]:
            fewer = max(FEWEST_SUBMITTED, last.settings.submit_batch // 4)
            settings = settings.model_copy(update={"submit_batch": fewer})
        settled = _smaller(case, settings, last.settings.kv_cache_memory_bytes)
        if settled is None:
            continue
        freed = peak_bytes(case, last.predicted) - peak_bytes(case, settled.predicted)
        if freed < worth:
            continue
        reason = f"predicted to free {gib(freed)} more, down to {gib(peak_bytes(case, settled.predicted))}"
        levers = pulled(case, last.settings, settled.settings, reason)
        rungs.append(Rung(settings=settled.settings, levers=levers, predicted=settled.predicted))
        last = settled
    return rungs


def _rung_settings(groups: list[list[EngineSettings]]) -> Iterator[EngineSettings]:
    for number, group in enumerate(groups):
        lower = [each for each in group[1:] if each.gpu_memory_utilization != group[0].gpu_memory_utilization]
        frugal = [
            each
            for each in group
            if each.max_num_batched_tokens <= _FRUGAL_TOKENS and each.max_num_seqs <= _FRUGAL_SEQUENCES
        ]
        if number == 0:
            yield group[0]
            yield from lower
            yield from frugal[:1]
            yield group[-1]
        else:
            yield frugal[0] if frugal else group[-1]


def _smaller(case: Case, settings: EngineSettings, cache: int | None) -> Settled | None:
    """Settings with less cache than `cache`, but enough for a request; by utilization, where that rules.

    None for what does not fit: more GPUs may take more host memory than there is.
    """
    if cache is None:
        return settle(case, settings)
    if case.hardware.gpus and not _host_fits(case, settings):
        return None
    least = needed_cache_bytes(case, settings)
    less = _whole(int(cache * _LOWER_CACHE)) if case.allows("kv_cache_memory_bytes") else cache
    return _with_cache(case, settings, max(least, less))


def pulled(case: Case, before: EngineSettings, after: EngineSettings, reason: str) -> list[PulledLever]:
    """Levers in which two settings differ. A cache or utilization that only follows from others is none."""
    levers: list[PulledLever] = []
    names: list[Lever] = [
        "quantization",
        "kv_cache_dtype",
        "dtype",
        "max_model_len",
        "tensor_parallel_size",
        "max_num_batched_tokens",
        "max_num_seqs",
        "enforce_eager",
        "kv_cache_memory_bytes",
        "submit_batch",
    ]
    if before.kv_cache_memory_bytes is None and after.kv_cache_memory_bytes is None:
        names.append("gpu_memory_utilization")
    for name in names:
        old, new = getattr(before, name), getattr(after, name)
        if old == new or (name == "kv_cache_memory_bytes" and old is None):
            continue
        shorter = name == "max_model_len" and changes_requests(case.tasks, new)
        levers.append(
            PulledLever(
                lever=name,
                before=str(old),
                after=str(new),
                reason=reason + (f"; {length_text(case, new)}" if shorter else ""),
                changes_scores=name in SCORE_LEVERS and (name != "max_model_len" or shorter),
                requests_cut=requests_over(case.tasks, new) if shorter else 0,
            )
        )
    return levers

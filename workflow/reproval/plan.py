"""From facts, hardware and tiers to engine settings that fit: a pure function, with a reason for every choice.

The plan walks through one fixed list of candidates, from the settings that the policy begins with to the most
frugal ones that it allows: fewer GPUs before more, score-neutral levers before score-changing ones. The first
candidate whose predicted peak fits is the plan; those behind it are the ladder. As the list does not depend on the
amount of memory, more memory never gives a later candidate.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from reproval.files import RecordError, read_record, write_record
from reproval.memory_model import (
    BLOCK_TOKENS,
    CPU_BLOCK_TOKENS,
    GIB,
    MIB,
    STOCK_BYTES_PER_TOKEN,
    Runner,
    Scoring,
    Work,
    cache_bytes_per_token,
    host_bytes,
    predict,
    request_cache_bytes,
    round_up,
    summarize,
    weights_bytes,
)
from reproval.records import (
    Dtype,
    EngineSettings,
    Facts,
    Hardware,
    Lever,
    MemoryPrediction,
    ModelFacts,
    Plan,
    PulledLever,
    Reason,
    Rung,
    TaskFacts,
)
from reproval.settings import ModelConfig
from reproval.tiers import Policy, Start, TierRule, Tiers, load_tiers
from reproval.time_model import estimate

_SCORE_LEVERS = ("max_model_len", "quantization", "kv_cache_dtype", "dtype")
# Below these, throughput suffers before memory is won; they are the last neutral steps.
_FRUGAL_TOKENS, _FEWEST_TOKENS = 2048, 512
_FRUGAL_SEQUENCES, _FEWEST_SEQUENCES = 256, 16
_FEWEST_SUBMITTED, _MOST_SUBMITTED = 64, 8192
_WORTH_A_RUNG = 0.02
"""Share of the budget that a rung must free: a restart costs a minute."""
_LOWER_CACHE = 0.9
_FP8_CAPABILITY = 8.9
_SHORTEST_LENGTH = 256


@dataclass(frozen=True)
class _Case:
    """Everything that stays the same while candidates are tried."""

    facts: ModelFacts
    work: Work
    tasks: list[TaskFacts]
    hardware: Hardware
    policy: Policy
    rule: TierRule
    start: Start
    tier: str
    runner: Runner
    scoring: Scoring

    @property
    def memory_bytes(self) -> int:
        return self.hardware.gpu_memory_bytes if self.hardware.gpus else self.hardware.host_memory_bytes

    @property
    def budget_bytes(self) -> int:
        return math.floor(self.memory_bytes * (1 - self.policy.free_share))

    @property
    def block(self) -> int:
        return BLOCK_TOKENS if self.hardware.gpus else CPU_BLOCK_TOKENS

    def allows(self, lever: Lever) -> bool:
        return lever in self.policy.neutral_levers or lever in self.rule.score_levers


@dataclass(frozen=True)
class _Settled:
    settings: EngineSettings
    predicted: MemoryPrediction


@dataclass
class _Reasons:
    entries: list[Reason] = field(default_factory=list)

    def add(self, setting: str, value: Any, text: str) -> None:
        self.entries.append(Reason(setting=setting, value=str(value), text=text))


def make_plan(
    run: str,
    model: str,
    facts: ModelFacts,
    tasks: list[TaskFacts],
    hardware: Hardware,
    tiers: Tiers,
    policy: str,
    asked: ModelConfig,
    seed: int | None,
    scoring: Scoring = "suffix",
    runner: Runner | None = None,
) -> Plan:
    """Plan one model's evaluation.

    `asked` gives dtype, quantization and max_model_len that the user wants; they hold whatever the policy says.
    `scoring` is "suffix" where loglikelihood requests compute logits of their continuations only, "stock" for
    lm-eval's own requests. `runner` defaults to V2 on a GPU and to V1 on the CPU, which has only stock requests.
    Raises TiersError if the tiers file lacks the policy.
    """
    runner = runner or ("v2" if hardware.gpus else "v1")
    tier = tiers.tier_of(facts.parameters)
    chosen_policy = tiers.policy(policy)
    case = _Case(
        facts=facts,
        work=summarize(tasks),
        tasks=tasks,
        hardware=hardware,
        policy=chosen_policy,
        rule=chosen_policy.tiers.get(tier.name, TierRule()),
        start=chosen_policy.start_of(tier.name),
        tier=tier.name,
        runner=runner,
        scoring=scoring if runner == "v2" else "stock",
    )
    reasons = _Reasons()
    reasons.add(
        "tier",
        tier.name,
        f"{facts.parameters / 1e9:.2f} billion parameters are counted in the checkpoint; policy {policy}: "
        f"{chosen_policy.summary}",
    )
    first, given = _first_settings(case, asked, seed, reasons, policy)
    candidates = list(_candidates(case, first))
    found = next(((index, settled) for index, each in enumerate(candidates) if (settled := _settle(case, each))), None)
    common: dict[str, Any] = {
        "run": run,
        "model": model,
        "hardware": hardware,
        "policy": policy,
        "tier": tier.name,
        "parameters": facts.parameters,
    }
    if found is None:
        return Plan(**common, fits=False, advice=_advice(case, first), levers=given, reasons=reasons.entries, ladder=[])
    index, settled = found
    levers = given + _pulled(case, first, settled.settings, _need_text(case, first, settled))
    _explain(case, settled, reasons)
    return Plan(
        **common,
        fits=True,
        levers=levers,
        reasons=reasons.entries,
        ladder=_ladder(case, settled, levers, candidates[index + 1 :]),
        time=estimate(facts, case.work, settled.settings, hardware),
    )


# --- where to begin ------------------------------------------------------------------------------------------------


def _first_settings(
    case: _Case, asked: ModelConfig, seed: int | None, reasons: _Reasons, policy: str
) -> tuple[EngineSettings, list[PulledLever]]:
    """Settings before any lever is pulled for memory, and those that the user or the policy asked for anyway."""
    given: list[PulledLever] = []

    def give(lever: Lever, before: Any, after: Any, reason: str, cut: int = 0) -> None:
        changes = lever in _SCORE_LEVERS and (lever != "max_model_len" or cut > 0)
        given.append(
            PulledLever(
                lever=lever,
                before=str(before),
                after=str(after),
                reason=reason,
                changes_scores=changes,
                requests_cut=cut,
            )
        )

    by_policy = f"policy {policy} begins with it in tier {case.tier}"
    dtype = _dtype(case, asked, reasons, give, by_policy)
    quantization = asked.quantization or (case.start.quantization if case.facts.quantization is None else None)
    if quantization:
        give("quantization", None, quantization, "asked for in the configuration" if asked.quantization else by_policy)
    reasons.add(
        "quantization",
        quantization or case.facts.quantization,
        f"the checkpoint is stored as {case.facts.quantization}, which stays"
        if case.facts.quantization
        else "asked for"
        if quantization
        else f"none: the weights take {_gib(weights_bytes(case.facts, dtype, None))} in {dtype}",
    )
    length = _max_model_len(case, asked, reasons, give, by_policy)
    default_tokens, default_sequences = vllm_defaults(case.hardware)
    tokens = case.start.max_num_batched_tokens or default_tokens
    sequences = case.start.max_num_seqs or default_sequences
    if not case.hardware.gpus:
        tokens, sequences = min(tokens, default_tokens), min(sequences, default_sequences)
    if case.start.max_num_seqs or not case.hardware.gpus:
        sequences = min(sequences, max(_FEWEST_SEQUENCES, 1 << (case.work.largest_task_requests - 1).bit_length()))
    utilization = case.start.gpu_memory_utilization
    if isinstance(utilization, list):
        utilization = utilization[0]
    if not case.hardware.gpus:
        utilization = None
    if utilization is not None:
        give("gpu_memory_utilization", 0.92, utilization, by_policy)
    submit = _submit_batch(case, give)
    settings = EngineSettings(
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=case.start.kv_cache_dtype or "auto",
        max_model_len=length,
        max_num_batched_tokens=tokens,
        max_num_seqs=min(sequences, tokens),
        gpu_memory_utilization=utilization,
        enforce_eager=True,
        submit_batch=submit,
        **({} if seed is None else {"seed": seed}),
    )
    if case.start.kv_cache_dtype:
        give("kv_cache_dtype", "auto", case.start.kv_cache_dtype, by_policy)
    if case.start.enforce_eager is not None:
        if case.start.enforce_eager:
            give("enforce_eager", False, True, by_policy)
        reasons.add("enforce_eager", case.start.enforce_eager, by_policy)
        return settings.model_copy(update={"enforce_eager": case.start.enforce_eager}), given
    return settings.model_copy(update={"enforce_eager": _eager(case, settings, reasons)}), given


def vllm_defaults(hardware: Hardware) -> tuple[int, int]:
    """What `LLM()` takes as max_num_batched_tokens and max_num_seqs.

    As EngineArgs.get_batch_defaults of vllm/engine/arg_utils.py has it.
    """
    if not hardware.gpus:
        return 4096, 256
    large = hardware.gpu_memory_bytes >= 70 * GIB and "a100" not in (hardware.gpu_name or "").lower()
    return (16384, 1024) if large or hardware.gpu_memory_bytes >= 160 * GIB else (8192, 256)


def _dtype(case: _Case, asked: ModelConfig, reasons: _Reasons, give: Any, by_policy: str) -> Dtype:
    stored = case.facts.checkpoint_dtype or "bfloat16"
    wanted: Dtype | Literal["auto"] = asked.dtype if asked.dtype != "auto" else case.start.dtype or "auto"
    if wanted != "auto":
        if wanted != stored:
            give("dtype", stored, wanted, "asked for in the configuration" if asked.dtype != "auto" else by_policy)
        reasons.add("dtype", wanted, f"asked for; the checkpoint is {stored}")
        return wanted
    old = case.hardware.compute_capability
    no_bfloat16 = bool(case.hardware.gpus and old and float(old) < 8.0)
    dtype: Dtype = "bfloat16" if stored == "float32" else stored
    text = f"as the checkpoint, {stored}"
    if stored == "float32":
        text = "the checkpoint is float32, which vLLM loads in 16 bit unless asked otherwise"
    if no_bfloat16 and dtype == "bfloat16":
        dtype = "float16"
        text = f"bfloat16 needs compute capability 8.0, this GPU has {old}"
        if stored != "float32":
            give("dtype", stored, dtype, text)
    reasons.add("dtype", dtype, text)
    return dtype


def _max_model_len(case: _Case, asked: ModelConfig, reasons: _Reasons, give: Any, by_policy: str) -> int:
    longest, limit = case.work.longest_tokens, case.facts.max_position_embeddings
    wanted = min(max(round_up(longest, BLOCK_TOKENS), _SHORTEST_LENGTH), limit)
    text = (
        f"the longest request has {longest} tokens, rounded up to whole blocks and to {_SHORTEST_LENGTH} at least; "
        f"the model's maximum is {limit}"
    )
    if longest > limit:
        text = (
            f"{requests_over(case.tasks, limit)} requests are longer than the model's maximum of {limit} tokens "
            f"(the longest has {longest}); lm-eval cuts them on any machine"
        )
    cap = asked.max_model_len or case.start.max_model_len
    if cap is not None and cap < wanted:
        cut = requests_over(case.tasks, cap)
        why = "asked for in the configuration" if asked.max_model_len else by_policy
        give("max_model_len", wanted, cap, f"{why}; {cut} of {case.work.requests} requests are cut", cut)
        text, wanted = f"{why}; {text}", cap
    reasons.add("max_model_len", wanted, text)
    return wanted


def requests_over(tasks: list[TaskFacts], max_model_len: int) -> int:
    """Requests that lm-eval would cut from the left to fit."""
    return sum(
        count
        for task in tasks
        for length, count in task.lengths.items()
        if length + (task.request_type != "generate_until") > max_model_len
    )


def _submit_batch(case: _Case, give: Any) -> int:
    """Requests submitted at once: what they may hold of host memory is a quarter of it."""
    most = min(_MOST_SUBMITTED, max(_FEWEST_SUBMITTED, 1 << (max(case.work.requests, 1) - 1).bit_length()))
    if case.scoring != "stock" or not case.work.loglikelihood:
        return most
    room = case.hardware.host_memory_bytes / 4
    fit = room / (STOCK_BYTES_PER_TOKEN * max(case.work.mean_tokens, 1))
    size = max(_FEWEST_SUBMITTED, min(most, 1 << max(0, int(fit).bit_length() - 1)))
    if size < most and case.allows("submit_batch"):
        give(
            "submit_batch",
            most,
            size,
            f"{STOCK_BYTES_PER_TOKEN} bytes of host memory a prompt token, {_gib(room)} given",
        )
        return size
    return most


def _eager(case: _Case, settings: EngineSettings, reasons: _Reasons) -> bool:
    if not case.hardware.gpus:
        reasons.add(
            "enforce_eager", True, "no CUDA graphs on a CPU; without torch.compile the engine skips its warm-up"
        )
        return True
    eager, graphs = (
        estimate(case.facts, case.work, settings.model_copy(update={"enforce_eager": value}), case.hardware)
        for value in (True, False)
    )
    seconds = [time.engine_start_s + time.work_s for time in (eager, graphs)]
    reasons.add(
        "enforce_eager",
        seconds[0] <= seconds[1],
        f"estimated {seconds[0]:.0f} s eager (start {eager.engine_start_s:.0f} s) against {seconds[1]:.0f} s with "
        f"CUDA graphs (start {graphs.engine_start_s:.0f} s)",
    )
    return seconds[0] <= seconds[1]


# --- candidates ----------------------------------------------------------------------------------------------------


def _candidates(case: _Case, first: EngineSettings) -> Iterator[EngineSettings]:
    """All settings that the policy allows, in the order in which they are tried."""
    for scored in _score_steps(case, first):
        for tp in _parallel_sizes(case):
            # Pre-quantized bitsandbytes checkpoints do not run with tensor parallelism.
            if tp > 1 and case.facts.quantization == "bitsandbytes":
                continue
            yield from _neutral_steps(case, scored.model_copy(update={"tensor_parallel_size": tp}))


def _score_steps(case: _Case, first: EngineSettings) -> Iterator[EngineSettings]:
    yield first
    current = first
    for lever in case.rule.score_levers:
        if lever == "quantization" and first.quantization is None:
            for method in _quantizations(case):
                current = current.model_copy(update={"quantization": method})
                yield current
        if lever == "kv_cache_dtype" and first.kv_cache_dtype == "auto" and case.hardware.gpus:
            current = current.model_copy(update={"kv_cache_dtype": "fp8"})
            yield current
        if lever == "dtype" and first.dtype == "float32":
            current = current.model_copy(update={"dtype": "bfloat16"})
            yield current
        if lever == "max_model_len":
            while current.max_model_len > case.rule.shortest_max_model_len:
                half = max(case.rule.shortest_max_model_len, round_up(current.max_model_len // 2, BLOCK_TOKENS))
                current = current.model_copy(update={"max_model_len": half})
                yield current


def _quantizations(case: _Case) -> list[str]:
    """Methods that this machine and checkpoint can take."""
    if not case.hardware.gpus or case.facts.quantization is not None:
        return []
    capability = float(case.hardware.compute_capability or 0)
    return [method for method in case.rule.quantizations if method != "fp8" or capability >= _FP8_CAPABILITY]


def _parallel_sizes(case: _Case) -> list[int]:
    if not case.hardware.gpus or not case.allows("tensor_parallel_size"):
        return [1]
    return [n for n in range(1, case.hardware.gpus + 1) if divides(case.facts, n)]


def divides(facts: ModelFacts, tp: int) -> bool:
    """Whether vLLM can divide the model's heads among so many GPUs: KV heads are divided, or copied."""
    if facts.attention_heads % tp:
        return False
    return facts.kv_heads == 0 or facts.kv_heads % tp == 0 or tp % facts.kv_heads == 0


def _neutral_steps(case: _Case, first: EngineSettings) -> Iterator[EngineSettings]:
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
    yield from halve("max_num_seqs", _FEWEST_SEQUENCES)


# --- does it fit ---------------------------------------------------------------------------------------------------


def _predict(case: _Case, settings: EngineSettings) -> MemoryPrediction:
    return predict(case.facts, settings, case.work, case.hardware, case.runner, case.scoring)


def needed_cache_bytes(case: _Case, settings: EngineSettings) -> int:
    """The least cache: one request of the full length, and the tokens of one step, with a block to spare."""
    one = request_cache_bytes(case.facts, settings, settings.max_model_len + case.block, case.block)
    in_step = min(settings.max_num_batched_tokens, case.work.largest_task_tokens)
    return one + in_step * cache_bytes_per_token(
        case.facts, settings.dtype, settings.kv_cache_dtype, settings.tensor_parallel_size
    )


def useful_cache_bytes(case: _Case, settings: EngineSettings) -> int:
    """More cache than this is never filled: all requests of the largest task at once."""
    per_token = cache_bytes_per_token(
        case.facts, settings.dtype, settings.kv_cache_dtype, settings.tensor_parallel_size
    )
    states = sum(group.state_bytes for group in case.facts.cache) // settings.tensor_parallel_size
    running = min(settings.max_num_seqs, case.work.largest_task_requests)
    blocks = case.work.largest_task_tokens + case.work.largest_task_requests * case.block
    return max(needed_cache_bytes(case, settings), blocks * per_token + running * states)


def _without_cache(case: _Case, settings: EngineSettings) -> int:
    """Predicted peak with an empty cache, on a CPU machine with what the process itself takes."""
    predicted = _predict(case, settings.model_copy(update={"kv_cache_memory_bytes": 1}))
    return (predicted.peak_bytes if case.hardware.gpus else predicted.host_bytes) - 1


def _settle(case: _Case, settings: EngineSettings) -> _Settled | None:
    """Give a candidate its cache; None if it does not fit."""
    on_gpu = case.hardware.gpus > 0
    if on_gpu and host_bytes(settings, case.work, case.scoring, True) > case.hardware.host_memory_bytes:
        return None
    least = needed_cache_bytes(case, settings)
    if settings.gpu_memory_utilization is not None:
        predicted = _predict(case, settings)
        if predicted.kv_cache_bytes < least or predicted.peak_bytes > case.budget_bytes:
            return None
        return _Settled(settings, predicted)
    room = case.budget_bytes - _without_cache(case, settings)
    if room < least:
        return None
    return _with_cache(case, settings, max(least, _whole(min(room, useful_cache_bytes(case, settings)))))


def _whole(size: int) -> int:
    return size // MIB * MIB


def _with_cache(case: _Case, settings: EngineSettings, cache: int) -> _Settled:
    settings = settings.model_copy(update={"kv_cache_memory_bytes": cache})
    predicted = _predict(case, settings)
    if case.hardware.gpus:
        # vLLM refuses to start if less than this share is free, also where the cache is given in bytes.
        share = (predicted.peak_bytes - predicted.context_bytes) / case.hardware.gpu_memory_bytes
        settings = settings.model_copy(update={"gpu_memory_utilization": min(1.0, math.ceil(share * 1000) / 1000)})
    return _Settled(settings, predicted)


# --- the ladder ----------------------------------------------------------------------------------------------------


def _peak(case: _Case, predicted: MemoryPrediction) -> int:
    return predicted.peak_bytes if case.hardware.gpus else predicted.host_bytes


def _ladder(case: _Case, plan: _Settled, levers: list[PulledLever], rest: list[EngineSettings]) -> list[Rung]:
    """The plan, then ever more frugal settings; a rung that frees too little is left to the next."""
    rungs = [Rung(settings=plan.settings, levers=levers, predicted=plan.predicted)]
    last = plan
    worth = _WORTH_A_RUNG * case.budget_bytes

    def add(settled: _Settled) -> None:
        nonlocal last
        freed = _peak(case, last.predicted) - _peak(case, settled.predicted)
        reason = f"predicted to free {_gib(freed)} more, down to {_gib(_peak(case, settled.predicted))}"
        pulled = _pulled(case, last.settings, settled.settings, reason)
        rungs.append(Rung(settings=settled.settings, levers=pulled, predicted=settled.predicted))
        last = settled

    cache = plan.settings.kv_cache_memory_bytes
    if cache is not None and case.allows("kv_cache_memory_bytes"):
        smaller = max(needed_cache_bytes(case, plan.settings), _whole(int(cache * _LOWER_CACHE)))
        settled = _with_cache(case, plan.settings, smaller)
        if _peak(case, last.predicted) - _peak(case, settled.predicted) >= worth:
            add(settled)
    for settings in rest:
        if cache is None:
            maybe = _settle(case, settings)
        else:
            kept = max(needed_cache_bytes(case, settings), last.settings.kv_cache_memory_bytes or 0)
            maybe = _with_cache(case, settings, kept)
        if maybe and _peak(case, last.predicted) - _peak(case, maybe.predicted) >= worth:
            add(maybe)
    return rungs


def _pulled(case: _Case, before: EngineSettings, after: EngineSettings, reason: str) -> list[PulledLever]:
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
    ]
    if before.kv_cache_memory_bytes is None and after.kv_cache_memory_bytes is None:
        names.append("gpu_memory_utilization")
    for name in names:
        old, new = getattr(before, name), getattr(after, name)
        if old == new or (name == "kv_cache_memory_bytes" and old is None):
            continue
        cut = requests_over(case.tasks, new) if name == "max_model_len" else 0
        levers.append(
            PulledLever(
                lever=name,
                before=str(old),
                after=str(new),
                reason=reason + (f"; {cut} of {case.work.requests} requests are cut" if cut else ""),
                changes_scores=name in _SCORE_LEVERS and (name != "max_model_len" or cut > 0),
                requests_cut=cut,
            )
        )
    return levers


# --- words ---------------------------------------------------------------------------------------------------------


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _need_text(case: _Case, first: EngineSettings, settled: _Settled) -> str:
    needed = _without_cache(case, first) + needed_cache_bytes(case, first)
    return (
        f"to begin with, at least {_gib(needed)} would be needed and {_gib(case.budget_bytes)} may be planned; "
        f"so it is {_gib(_peak(case, settled.predicted))}"
    )


def _explain(case: _Case, settled: _Settled, reasons: _Reasons) -> None:
    settings, predicted = settled.settings, settled.predicted
    where = "one GPU" if case.hardware.gpus else "the host"
    reasons.add(
        "tensor_parallel_size",
        settings.tensor_parallel_size,
        f"the fewest of {max(case.hardware.gpus, 1)} that fit: weights take {_gib(predicted.weights_bytes)} on {where}",
    )
    reasons.add(
        "max_num_batched_tokens",
        settings.max_num_batched_tokens,
        f"a step then holds {_gib(predicted.activations_bytes)} of activations and "
        f"{_gib(predicted.prompt_logprobs_bytes)} of prompt logits that vLLM's own profile does not count",
    )
    reasons.add(
        "max_num_seqs",
        settings.max_num_seqs,
        f"the largest task has {case.work.largest_task_requests} requests; sampling for so many takes "
        f"{_gib(predicted.sampler_bytes)}",
    )
    one = request_cache_bytes(case.facts, settings, settings.max_model_len, case.block)
    held = (
        f"{_gib(predicted.kv_cache_bytes)} of cache; one request of {settings.max_model_len} tokens takes {_gib(one)}"
    )
    if settings.kv_cache_memory_bytes is not None:
        useful = useful_cache_bytes(case, settings)
        bound = (
            "all requests of the largest task fit"
            if predicted.kv_cache_bytes >= _whole(useful)
            else f"the largest task could use {_gib(useful)}"
        )
        reasons.add("kv_cache_memory_bytes", settings.kv_cache_memory_bytes, f"{held}, {bound}")
    else:
        reasons.add("gpu_memory_utilization", settings.gpu_memory_utilization, f"vLLM makes of it {held}")
    reasons.add(
        "submit_batch",
        settings.submit_batch,
        f"{case.work.requests} requests of {case.work.mean_tokens:.0f} tokens in the mean; host memory is predicted at "
        f"{_gib(predicted.host_bytes)} of {_gib(case.hardware.host_memory_bytes)}",
    )
    peak = _peak(case, predicted)
    reasons.add(
        "peak",
        peak,
        f"{_gib(peak)} of {_gib(case.memory_bytes)} on {where}; {_gib(case.memory_bytes - peak)} stay free for "
        f"fragmentation and for what the prediction misses ({case.policy.free_share:.0%} at least)",
    )


def _advice(case: _Case, first: EngineSettings) -> str:
    """What would make it fit, with numbers, from the most frugal neutral settings."""
    frugal = list(_neutral_steps(case, first))[-1]
    sentences = []
    least = _without_cache(case, frugal) + needed_cache_bytes(case, frugal)
    share = 1 - case.policy.free_share
    machine = f"{_gib(case.memory_bytes)} on {'each GPU' if case.hardware.gpus else 'the host'}"
    sentences.append(
        f"{_gib(least / share)} would be needed on one {'GPU' if case.hardware.gpus else 'host'} even with the most "
        f"frugal score-neutral settings that the policy allows; there are {machine}."
    )
    if not case.hardware.gpus:
        sentences.append(f"Give the job {math.ceil(least / share / GIB)} GiB of host memory.")
        return " ".join(sentences)
    host = host_bytes(frugal, case.work, case.scoring, True)
    if host > case.hardware.host_memory_bytes:
        return (
            f"{_gib(host)} of host memory would be needed, there are {_gib(case.hardware.host_memory_bytes)}. "
            f"Give the job {math.ceil(host / GIB)} GiB of host memory."
        )

    def fits(tp: int, quantization: str | None) -> bool:
        settings = frugal.model_copy(update={"tensor_parallel_size": tp, "quantization": quantization})
        return _without_cache(case, settings) + needed_cache_bytes(case, settings) <= case.budget_bytes

    enough = next((n for n in range(2, 65) if divides(case.facts, n) and fits(n, frugal.quantization)), None)
    if enough:
        sentences.append(f"{enough} such GPUs with tensor parallelism would do.")
    if case.facts.quantization is None and frugal.quantization is None:
        methods = [name for name in ("fp8", "bitsandbytes") if fits(1, name)]
        if methods:
            sentences.append(
                f"So would quantization ({' or '.join(methods)}) on one GPU, which changes scores: set "
                "`quantization` for the model, or choose a policy whose tier allows it."
            )
    return " ".join(sentences)


# --- the command ---------------------------------------------------------------------------------------------------


def table(plans: list[Plan]) -> str:
    """What `snakemake plan` prints: a line for each model, and below it what cannot run and what would help."""
    head = ("model", "parameters", "tier", "levers", "predicted peak", "estimated time")
    rows = [head, *(_row(plan) for plan in plans)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    for plan in plans:
        if not plan.fits:
            lines += ["", f"{plan.model} cannot run on this hardware. {plan.advice}"]
    marked = [plan.model for plan in plans if any(lever.changes_scores for lever in plan.levers)]
    if marked:
        lines += ["", f"* changes scores, which are marked in every result: {', '.join(marked)}"]
    return "\n".join(lines)


def _row(plan: Plan) -> tuple[str, ...]:
    levers = ", ".join(
        f"{lever.lever}={lever.after}{'*' if lever.changes_scores else ''}"
        + (f" ({lever.requests_cut} cut)" if lever.requests_cut else "")
        for lever in plan.levers
    )
    size = f"{plan.parameters / 1e9:.2f}B"
    if not plan.fits:
        return plan.model, size, plan.tier, levers or "none", "does not fit", "-"
    predicted, settings = plan.ladder[0].predicted, plan.ladder[0].settings
    if plan.hardware.gpus:
        peak = f"{predicted.peak_bytes / GIB:.1f} of {plan.hardware.gpu_memory_bytes / GIB:.1f} GiB"
        if settings.tensor_parallel_size > 1:
            peak += f" on each of {settings.tensor_parallel_size} GPUs"
    else:
        peak = f"{predicted.host_bytes / GIB:.1f} of {plan.hardware.host_memory_bytes / GIB:.1f} GiB host"
    if plan.time is None:
        return plan.model, size, plan.tier, levers or "none", peak, "-"
    hours = (plan.time.engine_start_s + plan.time.work_s) / 3600
    time = f"{plan.time.gpu_hours:.2f} GPU hours" if plan.hardware.gpus else f"{hours:.2f} hours"
    return plan.model, size, plan.tier, levers or "none", peak, time


def _write_if_changed(path: Path, plan: Plan) -> None:
    """Leave an equal plan untouched: its time stamp decides what Snakemake runs again."""
    try:
        if read_record(path, Plan) == plan:
            return
    except RecordError:
        pass  # Missing, cut off, or of another version: it is written anew.
    write_record(path, plan)


def main(arguments: list[str] | None = None) -> int:
    from reproval.run_file import RunFile

    parser = argparse.ArgumentParser(prog="python -m reproval.plan", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="Plan one run.")
    make.add_argument(
        "--run", "--run-json", type=Path, required=True, help="The run's file: model, hardware, policy, seed."
    )
    make.add_argument("--facts", type=Path, required=True)
    make.add_argument("--tiers", type=Path, required=True)
    make.add_argument("--policy", help="Instead of the run's own.")
    make.add_argument("--out", type=Path, required=True)
    show = commands.add_parser("table", help="Print plans as a table.")
    show.add_argument("--strict", action="store_true", help="Exit with 1 if a model cannot run.")
    show.add_argument("plans", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    if options.command == "table":
        plans = [read_record(path, Plan) for path in options.plans]
        print(table(plans))
        return int(options.strict and not all(plan.fits for plan in plans))
    entry = read_record(options.run, RunFile)
    facts = read_record(options.facts, Facts)
    plan = make_plan(
        run=entry.run.name,
        model=entry.run.model_name,
        facts=facts.model_facts,
        tasks=facts.tasks,
        hardware=entry.hardware,
        tiers=load_tiers(options.tiers),
        policy=options.policy or entry.policy,
        asked=entry.run.model,
        seed=entry.seed,
    )
    _write_if_changed(options.out, plan)
    return 0


if __name__ == "__main__":
    sys.exit(main())

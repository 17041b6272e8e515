"""Where a plan begins: the settings that the user and the policy ask for, before any lever is pulled for memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from reproval import capability
from reproval.memory_model import (
    BLOCK_TOKENS,
    CPU_BLOCK_TOKENS,
    GIB,
    STOCK_BYTES_PER_TOKEN,
    Scoring,
    Work,
    round_up,
    weights_bytes,
)
from reproval.records import (
    Dtype,
    EngineSettings,
    Hardware,
    Lever,
    ModelFacts,
    PulledLever,
    Reason,
    Runner,
    ScoreLever,
    TaskFacts,
)
from reproval.settings import ModelConfig
from reproval.tiers import Policy, Start, TierRule
from reproval.time_model import estimate

SCORE_LEVERS: tuple[ScoreLever, ...] = get_args(ScoreLever)
FEWEST_SEQUENCES = 16
FEWEST_SUBMITTED, MOST_SUBMITTED = 64, 8192
_SHORTEST_LENGTH = 256
_NO_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4")
"""Model types that vLLM refuses in float16 (_FLOAT16_NOT_SUPPORTED_MODELS of vllm/config/model.py)."""
_QUANTIZED_DTYPES: dict[str, tuple[Dtype, ...]] = {
    "fp8": ("bfloat16", "float16"),
    "gptq": ("bfloat16", "float16"),
    "awq": ("bfloat16", "float16"),
    "mxfp4": ("bfloat16",),
}
"""What vLLM computes in with these methods (get_supported_act_dtypes of vllm/model_executor/layers/quantization)."""
_LEAST_CONTEXT = 64
"""Tokens of a prompt that a length cap leaves beside the longest answer."""


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


@dataclass(frozen=True)
class Case:
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
    jobs_per_gpu: int = 1

    @property
    def memory_bytes(self) -> int:
        if self.hardware.gpus:
            return self.hardware.gpu_memory_bytes // self.jobs_per_gpu
        return self.hardware.host_memory_bytes

    @property
    def budget_bytes(self) -> int:
        return math.floor(self.memory_bytes * (1 - self.policy.free_share))

    @property
    def block(self) -> int:
        return BLOCK_TOKENS if self.hardware.gpus else CPU_BLOCK_TOKENS

    @property
    def shortest_length(self) -> int:
        """No length cap goes below this: room for the longest answer and some of its prompt.

        lm-eval cuts a prompt to its last max_model_len - max_gen_toks tokens (truncate_tokens), and where that is 0 or
        less it keeps too much, which the engine refuses.
        """
        return round_up(self.work.longest_answer + _LEAST_CONTEXT, BLOCK_TOKENS) if self.work.longest_answer else 1

    @property
    def lacks_bfloat16(self) -> bool:
        """Whether vLLM refuses bfloat16 here (check_if_supports_dtype of vllm/platforms/cuda.py)."""
        return self.hardware.gpus > 0 and capability.lacks(self.hardware.compute_capability, capability.BFLOAT16)

    def allows(self, lever: Lever) -> bool:
        return lever in self.policy.neutral_levers or lever in self.rule.score_levers


@dataclass
class Reasons:
    entries: list[Reason] = field(default_factory=list)

    def add(self, setting: str, value: Any, text: str) -> None:
        self.entries.append(Reason(setting=setting, value=str(value), text=text))


def first_settings(
    case: Case, asked: ModelConfig, seed: int | None, reasons: Reasons, policy: str
) -> tuple[EngineSettings, list[PulledLever]]:
    """Settings before any lever is pulled for memory, and those that the user or the policy asked for anyway."""
    given: list[PulledLever] = []

    def give(lever: Lever, before: Any, after: Any, reason: str, cut: int = 0) -> None:
        changes = lever in SCORE_LEVERS and (lever != "max_model_len" or changes_requests(case.tasks, after))
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
        else f"none: the weights take {gib(weights_bytes(case.facts, dtype, None))} in {dtype}",
    )
    length = _max_model_len(case, asked, reasons, give, by_policy)
    default_tokens, default_sequences = vllm_defaults(case.hardware)
    tokens = case.start.max_num_batched_tokens or default_tokens
    sequences = case.start.max_num_seqs or default_sequences
    if not case.hardware.gpus:
        tokens, sequences = min(tokens, default_tokens), min(sequences, default_sequences)
    if case.start.max_num_seqs or not case.hardware.gpus:
        sequences = min(sequences, max(FEWEST_SEQUENCES, 1 << (case.work.largest_task_requests - 1).bit_length()))
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


def _dtype(case: Case, asked: ModelConfig, reasons: Reasons, give: Any, by_policy: str) -> Dtype:
    stored = case.facts.checkpoint_dtype or "bfloat16"
    wanted: Dtype | Literal["auto"] = asked.dtype if asked.dtype != "auto" else case.start.dtype or "auto"
    if wanted != "auto":
        if wanted != stored:
            give("dtype", stored, wanted, "asked for in the configuration" if asked.dtype != "auto" else by_policy)
        reasons.add("dtype", wanted, f"asked for; the checkpoint is {stored}")
        return wanted
    dtype: Dtype = "bfloat16" if stored == "float32" else stored
    text = f"as the checkpoint, {stored}"
    if stored == "float32":
        text = "the checkpoint is float32, which vLLM loads in 16 bit unless asked otherwise"
    if case.lacks_bfloat16 and dtype == "bfloat16":
        dtype = "float16"
        text = f"bfloat16 needs compute capability 8.0, this GPU has {case.hardware.compute_capability}"
    if dtype == "float16" and case.facts.model_type in _NO_FLOAT16:
        refused = f"vLLM refuses float16 for {case.facts.model_type}"
        dtype, text = ("float32", f"{refused}, and {text}") if case.lacks_bfloat16 else ("bfloat16", refused)
    if dtype != stored and stored != "float32":
        give("dtype", stored, dtype, text)
    reasons.add("dtype", dtype, text)
    return dtype


def _max_model_len(case: Case, asked: ModelConfig, reasons: Reasons, give: Any, by_policy: str) -> int:
    longest, limit = case.work.longest_tokens, case.facts.max_position_embeddings
    wanted = min(max(round_up(longest, BLOCK_TOKENS), _SHORTEST_LENGTH), limit)
    text = (
        f"the longest request has {longest} tokens, rounded up to whole blocks and to {_SHORTEST_LENGTH} at least; "
        f"the model's maximum is {limit}"
    )
    if longest > limit:
        text = (
            f"the longest request has {longest} tokens and the model's maximum is {limit}: on any machine lm-eval cuts "
            f"{requests_over(case.tasks, limit)} requests and scores {texts_over(case.tasks, limit)} texts in windows"
        )
    cap = asked.max_model_len or case.start.max_model_len
    if cap is not None and max(cap, case.shortest_length) < wanted:
        why = "asked for in the configuration" if asked.max_model_len else by_policy
        if cap < case.shortest_length:
            why += (
                f", but {cap} tokens have no room for the longest answer of {case.work.longest_answer} and "
                f"{_LEAST_CONTEXT} of its prompt; lower max_gen_toks for a shorter length"
            )
            cap = case.shortest_length
        cut = requests_over(case.tasks, cap)
        give("max_model_len", wanted, cap, f"{why}; {length_text(case, cap)}", cut)
        text, wanted = f"{why}; {text}", cap
    reasons.add("max_model_len", wanted, text)
    return wanted


def quantized_dtypes(method: str | None) -> tuple[Dtype, ...]:
    """What vLLM computes in where weights are quantized so; every dtype where nothing is known against it."""
    return _QUANTIZED_DTYPES.get(method or "", get_args(Dtype))


def refusal(case: Case, dtype: Dtype, quantization: str | None = None) -> str | None:
    """Why no settings with these two can run the work, and the mend; None if nothing is known against them."""
    stored = case.facts.quantization
    if quantization and stored and quantization != stored:
        return (
            f"vLLM refuses to quantize with {quantization} a checkpoint that is quantized already ({stored}). Delete "
            "`quantization` of the model: the checkpoint's own is used by itself."
        )
    method = quantization or stored
    wrong = {"float16"} if case.facts.model_type in _NO_FLOAT16 else set()
    wrong |= {"bfloat16"} if case.lacks_bfloat16 else set()
    left = [each for each in sorted(quantized_dtypes(method)) if each not in wrong]
    mend = (
        f"Set `dtype` of the model, or of the policy's start, to {' or '.join(left)}"
        if left
        else "Choose a GPU of compute capability 8.0 or more, or a checkpoint that is not quantized so"
    )
    or_none = ", or leave it out." if left else "."
    if dtype == "float16" and case.facts.model_type in _NO_FLOAT16:
        return (
            f"vLLM refuses dtype float16 for {case.facts.model_type} models, which are numerically unstable in it. "
            f"{mend}{or_none}"
        )
    if dtype == "bfloat16" and case.lacks_bfloat16:
        return (
            "vLLM refuses dtype bfloat16 on a GPU of compute capability below 8.0, and this one has "
            f"{case.hardware.compute_capability}. {mend}{or_none}"
        )
    if dtype not in quantized_dtypes(method):
        return f"vLLM refuses dtype {dtype} with quantization {method}. {mend}."
    answer, limit = case.work.longest_answer, case.facts.max_position_embeddings
    if answer >= limit:
        return (
            f"A task generates up to {answer} tokens, and the model's maximum is {limit} for prompt and answer "
            f"together. Set max_gen_toks below {limit} under `generation` of the suite or in the task."
        )
    return None


def requests_over(tasks: list[TaskFacts], max_model_len: int) -> int:
    """Requests that lm-eval would cut from the left to fit."""
    return _over([task for task in tasks if task.request_type != "loglikelihood_rolling"], max_model_len)


def texts_over(tasks: list[TaskFacts], max_model_len: int) -> int:
    """Texts of rolling tasks that are scored in several windows; nothing of them is cut."""
    return _over([task for task in tasks if task.request_type == "loglikelihood_rolling"], max_model_len)


def changes_requests(tasks: list[TaskFacts], max_model_len: int) -> bool:
    """Whether so short a length changes what is asked of the model: prompts that are cut, or windows."""
    return _over(tasks, max_model_len) > 0


def _over(tasks: list[TaskFacts], max_model_len: int) -> int:
    return sum(
        count
        for task in tasks
        for length, count in task.lengths.items()
        if length + (task.request_type != "generate_until") > max_model_len
    )


def length_text(case: Case, max_model_len: int) -> str:
    """What a length does to the requests, in words."""
    text = f"{requests_over(case.tasks, max_model_len)} of {case.work.requests} requests are cut"
    texts = texts_over(case.tasks, max_model_len)
    return f"{text}, {texts} texts are scored in windows" if texts else text


def _submit_batch(case: Case, give: Any) -> int:
    """Requests submitted at once: what they may hold of host memory is a quarter of it."""
    most = min(MOST_SUBMITTED, max(FEWEST_SUBMITTED, 1 << (max(case.work.requests, 1) - 1).bit_length()))
    if case.scoring != "stock" or not case.work.loglikelihood:
        return most
    room = case.hardware.host_memory_bytes / 4
    fit = room / (STOCK_BYTES_PER_TOKEN * max(case.work.mean_tokens, 1))
    size = max(FEWEST_SUBMITTED, min(most, 1 << max(0, int(fit).bit_length() - 1)))
    if size < most and case.allows("submit_batch"):
        give(
            "submit_batch",
            most,
            size,
            f"{STOCK_BYTES_PER_TOKEN} bytes of host memory a prompt token, {gib(room)} given",
        )
        return size
    return most


def _eager(case: Case, settings: EngineSettings, reasons: Reasons) -> bool:
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

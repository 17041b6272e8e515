"""How many bytes an engine start needs, part by part: the formulas that the plan is made of.

Pure arithmetic on facts, with no engine and no GPU. docs/plan.md gives every formula with its source and says which
constants were measured and which are assumed. Sources named here are files of vLLM 0.32.0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from reproval.records import (
    CacheGroup,
    Dtype,
    EngineSettings,
    Hardware,
    MemoryPrediction,
    ModelFacts,
    Runner,
    TaskFacts,
)

Scoring = Literal["stock", "suffix"]

MIB, GIB = 1024**2, 1024**3

BLOCK_TOKENS = 16
"""Tokens of one KV block on a GPU; a request holds whole blocks."""
CPU_BLOCK_TOKENS = 128
"""The CPU platform's default (platforms/cpu.py)."""
_MLA_BLOCK_TOKENS = 128
STEPS_IN_FLIGHT = 2
"""Steps whose tokens are scheduled and not yet settled: with asynchronous scheduling, the default on a GPU, the next is
made while one runs (max_concurrent_batches of config/vllm.py). On a CPU there is one, which is neglected."""
LOGIT_ROWS_PER_CHUNK = 1024
"""CHUNK_SIZE of v1/worker/gpu/sample/prompt_logprob.py."""
VOCABULARY_PADDING = 64
CONTEXT_BYTES = 512 * MIB
"""CUDA context of one process, about 0.5 GiB; it comes before vLLM's first look at the memory."""
KERNELS_BYTES = 224 * MIB
"""Code of kernels, which CUDA loads when they are first used, so within vLLM's budget. Two failures on an H200 told of
744 and 749 MiB beside PyTorch's memory, context included (tests/unit/engine_logs)."""
NCCL_BYTES = 1280 * MIB
"""NCCL buffers and the custom all-reduce workspace of one rank when there is more than one: measured with two H200s."""
GRAPHS_BASE_BYTES = 256 * MIB
GRAPHS_BYTES_PER_LAYER = 12 * MIB
"""Assumed: captured decode graphs grow with layers; vLLM takes a measured estimate of its own at start."""
ENGINE_HOST_BYTES = 6 * GIB
"""Assumed: Python, CUDA libraries and pinned buffers of the parent and one worker on a GPU machine."""
ENGINE_HOST_BYTES_CPU = 2560 * MIB
"""The same for the CPU build, without weights and cache: 1.5 and 2.3 GiB measured in evaluations of a 135M model."""
STOCK_BYTES_PER_TOKEN = 560
"""Host bytes per submitted prompt token of a request with prompt_logprobs (measured: 5.6 GB per 10 million)."""
TOKENIZED_BYTES_PER_TOKEN = 40
"""Assumed: a Python int in a list, an 8-byte pointer and a 28-byte object, and its copy on the way to the engine."""
TEXT_BYTES_PER_TOKEN = 5
"""Assumed: the text of a prompt, which lm-eval keeps for every request."""

_ITEM_BYTES: dict[str, float] = {"float32": 4, "float16": 2, "bfloat16": 2}
# Of safetensors' storage dtypes, those that are loaded in the plan's dtype; the rest stay as they are stored.
_CAST_ON_LOAD = {"F64", "F32", "F16", "BF16"}
_QUANTIZED_BYTES = {"fp8": 1.0, "bitsandbytes": 0.5 + 4 / 64}
"""Bytes per linear parameter. NF4 keeps one float32 absmax for 64 values (bitsandbytes without double quantization)."""


@dataclass(frozen=True)
class Work:
    """What all tasks of a run together ask of an engine."""

    requests: int
    longest_tokens: int
    prompt_tokens: int
    prefill_tokens: int
    generated_tokens: int
    longest_answer: int
    """The largest `max_gen_toks` of a task."""
    largest_task_tokens: int
    largest_task_requests: int
    loglikelihood: bool

    @property
    def mean_tokens(self) -> float:
        return (self.prompt_tokens + self.generated_tokens) / max(self.requests, 1)


def summarize(tasks: Iterable[TaskFacts]) -> Work:
    """Add up tasks. Prefill counts a prefix that requests share once, as the prefix cache does."""
    tasks = list(tasks)

    def prefilled(task: TaskFacts) -> int:
        context = min(task.unique_prefix_tokens, task.context_tokens) or task.context_tokens
        return context + task.continuation_tokens

    return Work(
        requests=sum(task.requests for task in tasks),
        # A loglikelihood request holds one token more than it scores: lm-eval keeps max_length - 1 of its input.
        longest_tokens=max(
            (task.longest_request_tokens + (task.request_type != "generate_until") for task in tasks), default=1
        ),
        prompt_tokens=sum(task.context_tokens + task.continuation_tokens for task in tasks),
        prefill_tokens=sum(prefilled(task) for task in tasks),
        generated_tokens=sum(task.generation_tokens for task in tasks),
        # All requests of a task have the same.
        longest_answer=max((-(-task.generation_tokens // max(task.requests, 1)) for task in tasks), default=0),
        largest_task_tokens=max((prefilled(task) + task.generation_tokens for task in tasks), default=1),
        largest_task_requests=max((task.requests for task in tasks), default=1),
        loglikelihood=any(task.request_type != "generate_until" for task in tasks),
    )


def item_bytes(dtype: Dtype) -> int:
    """Bytes of one element."""
    return int(_ITEM_BYTES[dtype])


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def padded_vocabulary(facts: ModelFacts) -> int:
    return round_up(facts.vocab_size, VOCABULARY_PADDING)


def weights_bytes(facts: ModelFacts, dtype: Dtype, quantization: str | None, tensor_parallel_size: int = 1) -> int:
    """Bytes of the weights on one GPU.

    A checkpoint that is already quantized keeps what it stores; only its 16- and 32-bit tensors take `dtype`, and
    scales that bitsandbytes quantized a second time become float32 (_dequantize_dq of vllm-bnb-plugin's loader). Else
    `quantization` (fp8 or bitsandbytes) shrinks the linear layers, and embeddings, an untied lm_head and norms stay
    in `dtype`. Norms are not divided by tensor parallelism, which is neglected.
    """
    item = item_bytes(dtype)
    parameters = facts.parameters - facts.tower_parameters
    if facts.quantization is not None:
        total: float = sum(
            tensor.elements * item if tensor.dtype in _CAST_ON_LOAD else tensor.size_bytes for tensor in facts.tensors
        )
        total += 3 * facts.nested_absmax_elements
    elif quantization is None:
        total = parameters * item
    else:
        rest = parameters - facts.linear_parameters
        total = facts.linear_parameters * _QUANTIZED_BYTES[quantization] + rest * item
    return math.ceil(total / tensor_parallel_size)


def cache_item_bytes(dtype: Dtype, kv_cache_dtype: str) -> int:
    return 1 if kv_cache_dtype.startswith("fp8") else item_bytes(dtype)


def cache_bytes_per_token(facts: ModelFacts, dtype: Dtype, kv_cache_dtype: str = "auto", tp: int = 1) -> int:
    """KV bytes that one more token of a short request costs on one GPU, all layers together."""
    return sum(
        group.elements_per_token * cache_item_bytes(dtype, kv_cache_dtype) // _cache_split(facts, group, tp)
        for group in facts.cache
    )


def _cache_split(facts: ModelFacts, group: CacheGroup, tp: int) -> int:
    # MLA's latent has no heads to divide; fewer KV heads than ranks are copied to each rank.
    return 1 if group.kind == "mla" else min(tp, facts.kv_heads) if group.kind != "state" else tp


def request_cache_bytes(facts: ModelFacts, settings: EngineSettings, tokens: int, block: int = BLOCK_TOKENS) -> int:
    """KV bytes that one request of `tokens` may hold on one GPU, in whole blocks of `cache_pool`."""
    pool = cache_pool(facts, settings, block)
    return pool.block_bytes * pool.request_blocks(settings, tokens)


@dataclass(frozen=True)
class AttentionLayers:
    """Attention layers of one kind: the groups that they are put into, and the tokens of a block of one group."""

    groups: int
    block_tokens: int
    window_tokens: int | None

    def blocks(self, tokens: int) -> int:
        """Blocks that so many tokens take, all groups together."""
        return self.groups * -(-tokens // self.block_tokens)

    def request_blocks(self, settings: EngineSettings, tokens: int) -> int:
        """Blocks that one request of `tokens` may hold.

        Sliding windows keep the window and what the steps in flight may add, and begin anywhere in a block
        (SlidingWindowSpec.max_admission_blocks_per_request of v1/kv_cache_interface.py).
        """
        if self.window_tokens is None:
            return self.blocks(tokens)
        in_flight = STEPS_IN_FLIGHT * settings.max_num_batched_tokens
        return self.blocks(min(self.window_tokens - 1 + in_flight, tokens)) + self.groups


@dataclass(frozen=True)
class CachePool:
    """The cache of one GPU as vLLM lays it out: blocks of one size, which all groups of layers take from one pool."""

    block_bytes: int
    state_blocks: int
    """Blocks that the states of one request take."""
    attention: tuple[AttentionLayers, ...]

    def request_blocks(self, settings: EngineSettings, tokens: int) -> int:
        """Blocks that one request of `tokens` may hold."""
        return self.state_blocks + sum(layers.request_blocks(settings, tokens) for layers in self.attention)

    def attention_blocks(self, tokens: int) -> int:
        """Blocks that so many tokens take while nothing has left a window."""
        return sum(layers.blocks(tokens) for layers in self.attention)


def cache_pool(facts: ModelFacts, settings: EngineSettings, block: int = BLOCK_TOKENS) -> CachePool:
    """How vLLM lays out the cache of one GPU, in blocks of `block` tokens or, where layers keep a state, of more.

    Layers of one kind are a group, a block of which is a page of each layer. Where there are several kinds, they are
    put into groups of one size (_get_kv_cache_groups_uniform_page_size of v1/core/kv_cache_utils.py), and pages get one
    size: a smaller one has more tokens, if so many fill the largest, or is padded (unify_kv_cache_spec_page_size).

    Beside attention, prefix caching is on, for which a request holds two states (MambaSpec.max_memory_usage_bytes with
    mamba_cache_mode `align`); without attention it is off, and one state is held (is_prefix_caching_supported of
    config/model.py). An attention block then has as many tokens as fill the page of a state, which is padded to it
    (_align_hybrid_block_size of platforms/interface.py).
    """
    item = cache_item_bytes(settings.dtype, settings.kv_cache_dtype)
    tp = settings.tensor_parallel_size
    states = [group for group in facts.cache if group.kind == "state"]
    attention = [group for group in facts.cache if group.kind != "state" and group.layers]
    page = max((-(-group.state_bytes // (group.layers * tp)) for group in states), default=0)
    layers = sum(group.layers for group in states)
    if not attention:
        return CachePool(page * layers, 1, ())
    per_token = [
        -(-group.elements_per_token * item // (group.layers * _cache_split(facts, group, tp))) for group in attention
    ]
    widest = max(per_token)
    if states:
        # Kernels for MLA need blocks of a multiple of 128 tokens.
        step = max(block, _MLA_BLOCK_TOKENS) if any(group.kind == "mla" for group in attention) else block
        block = step * -(-page // (step * widest))
    counts = [group.layers for group in attention] + [layers] * bool(states)
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    return CachePool(
        block_bytes=block * widest * size,
        state_blocks=2 * -(-layers // size),
        attention=tuple(
            AttentionLayers(
                groups=-(-group.layers // size),
                block_tokens=block * (widest // own if widest % own == 0 else 1),
                window_tokens=group.window_tokens,
            )
            for group, own in zip(attention, per_token, strict=True)
        ),
    )


def prompt_logprobs_bytes(facts: ModelFacts, settings: EngineSettings, runner: Runner, longest_tokens: int) -> int:
    """Transient of prompt logprobs in one step, which no profile of vLLM counts.

    V2 (v1/worker/gpu/sample/prompt_logprob.py): logits of at most 1,024 rows at a time, of all rows that the step
    computes. The chunk before is still referenced while the next is made, so a step of more than 1,024 rows holds
    two; soft-capping makes one copy more. Requests that score given ids need no more than that.
    V1 (v1/worker/gpu_model_runner.py): all rows of a request in a step, logits and their float32 copies, while those
    of the request before are not yet released: V x (10 T_i + 4 T_(i-1)) bytes for a 16-bit dtype.
    """
    item = item_bytes(settings.dtype)
    vocabulary = padded_vocabulary(facts)
    step = settings.max_num_batched_tokens
    if runner == "v1":
        longest = min(longest_tokens, settings.max_model_len - 1)
        first = min(step, longest)
        second = min(step - first, longest)
        return vocabulary * ((item + 8) * first + 4 * second)
    copies = (1 if step <= LOGIT_ROWS_PER_CHUNK else 2) + facts.soft_caps_logits
    return copies * min(step, LOGIT_ROWS_PER_CHUNK) * vocabulary * item


def activations_bytes(facts: ModelFacts, settings: EngineSettings) -> int:
    """Peak of the activations of one forward pass over B = max_num_batched_tokens tokens on one GPU.

    Two residual streams, and the larger of attention's and the MLP's tensors. A mixture of experts repeats its rows
    for every expert of a token. Assumed from the shapes; vLLM measures it in its profile run.
    """
    item = item_bytes(settings.dtype)
    tp = settings.tensor_parallel_size
    attention = (2 * facts.attention_heads + 2 * facts.kv_heads) * facts.head_dim // tp
    mlp = 3 * facts.intermediate_size // tp
    if facts.experts:
        mlp = max(facts.experts_per_token, 1) * (mlp + facts.hidden_size)
    return settings.max_num_batched_tokens * item * (2 * facts.hidden_size + max(attention, mlp))


def sampler_bytes(facts: ModelFacts, settings: EngineSettings, runner: Runner, generates: bool) -> int:
    """State and transient of sampling for max_num_seqs requests.

    V2 keeps a count of 4 bytes and a bit for each request and vocabulary entry (PenaltiesState of
    v1/worker/gpu/sample/penalties.py). In a step there are the logits and, where a temperature or penalty changes
    them, a float32 copy; V1 always makes the copy.
    """
    cells = settings.max_num_seqs * padded_vocabulary(facts)
    state = cells * 4 + cells // 8 if runner == "v2" else 0
    return state + cells * (item_bytes(settings.dtype) + (4 if generates or runner == "v1" else 0))


def host_bytes(settings: EngineSettings, work: Work, scoring: Scoring, on_gpu: bool) -> int:
    """Resident memory of the process tree beside weights and cache: the engine, texts, tokens and answers.

    `suffix` encodes a window of requests ahead of the one in the engine and keeps a pair of numbers of each answer;
    `stock` encodes all requests and keeps an object for every prompt token of those that were submitted.
    """
    in_flight = min(settings.submit_batch, max(work.requests, 1)) * work.mean_tokens
    held = work.prompt_tokens * TEXT_BYTES_PER_TOKEN
    if scoring == "stock":
        held += work.prompt_tokens * TOKENIZED_BYTES_PER_TOKEN
        held += math.ceil(in_flight * STOCK_BYTES_PER_TOKEN) if work.loglikelihood else 0
    else:
        held += math.ceil(2 * in_flight * TOKENIZED_BYTES_PER_TOKEN)
    base = ENGINE_HOST_BYTES if on_gpu else ENGINE_HOST_BYTES_CPU
    # Another rank is another process, with about half of what parent and first rank take.
    return base * (settings.tensor_parallel_size + 1) // 2 + held


def predict(
    facts: ModelFacts,
    settings: EngineSettings,
    work: Work,
    hardware: Hardware,
    runner: Runner,
    scoring: Scoring,
) -> MemoryPrediction:
    """The parts and their sum on one GPU (on a CPU machine: in host memory).

    The parts do not all peak at the same moment; the sum is what the caching allocator may hold reserved. With
    `kv_cache_memory_bytes` the cache is that; else it is what vLLM makes of `gpu_memory_utilization`
    (Worker.determine_available_memory of v1/worker/gpu_worker.py), 0 where nothing is left.
    """
    on_gpu = hardware.gpus > 0
    tp = settings.tensor_parallel_size
    weights = weights_bytes(facts, settings.dtype, settings.quantization, tp)
    activations = activations_bytes(facts, settings)
    sampler = sampler_bytes(facts, settings, runner, work.generated_tokens > 0)
    graphs = 0 if settings.enforce_eager else GRAPHS_BASE_BYTES + GRAPHS_BYTES_PER_LAYER * facts.layers
    kernels = KERNELS_BYTES if on_gpu else 0
    context = (CONTEXT_BYTES + kernels + (NCCL_BYTES if tp > 1 else 0)) if on_gpu else 0
    transient = prompt_logprobs_bytes(facts, settings, runner, work.longest_tokens) * work.loglikelihood
    if settings.kv_cache_memory_bytes is not None:
        cache = settings.kv_cache_memory_bytes
    else:
        requested = math.ceil(hardware.gpu_memory_bytes * (settings.gpu_memory_utilization or 0))
        cache = max(0, requested - weights - activations - sampler - graphs - kernels)
    peak = weights + cache + activations + transient + sampler + graphs + context
    host = host_bytes(settings, work, scoring, on_gpu)
    return MemoryPrediction(
        weights_bytes=weights,
        kv_cache_bytes=cache,
        activations_bytes=activations,
        prompt_logprobs_bytes=transient,
        sampler_bytes=sampler,
        cuda_graphs_bytes=graphs,
        context_bytes=context,
        peak_bytes=peak,
        host_bytes=host if on_gpu else host + peak,
    )

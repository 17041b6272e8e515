"""How long an evaluation will take, by one table of constants: to choose graphs or eager, and to plan GPU hours.

docs/plan.md says where each constant comes from. The numbers are estimates; a result never depends on them.
"""

from __future__ import annotations

import math

from reproval.memory_model import Work, cache_bytes_per_token, request_cache_bytes, weights_bytes
from reproval.records import EngineSettings, Hardware, ModelFacts, TimeEstimate

# Dense 16-bit floating point operations and memory bandwidth of one GPU, by a part of its name (vendors' data sheets);
# a name within another comes after it.
_GPUS: list[tuple[str, float, float]] = [
    ("B200", 2250e12, 8.0e12),
    ("H200", 989e12, 4.8e12),
    ("H100", 989e12, 3.35e12),
    ("A100", 312e12, 2.0e12),
    ("L40S", 362e12, 0.864e12),
    ("L40", 181e12, 0.864e12),
    ("A10", 125e12, 0.6e12),
    ("L4", 121e12, 0.3e12),
    ("4090", 165e12, 1.0e12),
    ("T4", 65e12, 0.3e12),
]
_UNKNOWN_GPU = (312e12, 2.0e12)
"""Assumed for a GPU that is not in the table: an A100."""
_CPU_CORE = (120e9, 10e9)
"""Operations and bytes a second of one CPU core. The first is such that 450 tokens/s come out for 135 million
parameters on two cores, as measured with prompt logprobs on a busy machine; the second is assumed."""

START_EAGER_S = 35.0
GRAPHS_START_S_PER_LAYER = 2.2
"""Measured on H100s with dummy weights: 35 s with the imports, and with graphs 1.6 to 2.9 s a layer more (28 to 42
layers), most of it torch.compile."""
START_CPU_S = 30.0
"""Measured on two cores, eager and with the cache given in bytes, which spares the warm-up of 37 s."""
READ_BYTES_PER_S = 1e9
"""Assumed: weights from the store."""
PREFILL_EFFICIENCY = 0.5
BANDWIDTH_EFFICIENCY = 0.7
"""Shares of peak operations in prefill and of peak bandwidth in decode: assumed, and together fitted to one
measurement with graphs, 11,606 tokens/s on an H100 (256 requests, 500 tokens in, 256 out, Qwen3-4B)."""
REQUEST_S, REQUEST_CPU_S = 1e-3, 0.08
"""Least for one request: 1 ms of Python measured beside a GPU; on two CPU cores, of the 24 s that 234 short requests
to a 135M model were measured to take, what arithmetic does not explain."""
HOST_TOKEN_S = 50e-6
EAGER_LAYER_S, EAGER_EXPERTS_LAYER_S = 0.75e-3, 2.2e-3
"""What the host needs for a step of decoding: for each request that is running, and eager for each layer to launch its
kernels, those of a mixture of experts being more. Fitted to 31 measurements on H100s (docs/plan.md)."""


def estimate(facts: ModelFacts, work: Work, settings: EngineSettings, hardware: Hardware) -> TimeEstimate:
    """Engine start and work in seconds. Prefill is bound by arithmetic, decode by memory or by the host."""
    tp = settings.tensor_parallel_size
    if hardware.gpus:
        operations, bandwidth = gpu_speed(hardware.gpu_name)
        start = START_EAGER_S + (0 if settings.enforce_eager else GRAPHS_START_S_PER_LAYER * facts.layers)
    else:
        operations, bandwidth = (rate * hardware.cpus for rate in _CPU_CORE)
        start = START_CPU_S
    weights = weights_bytes(facts, settings.dtype, settings.quantization, tp)
    start += weights * tp / READ_BYTES_PER_S
    active = active_parameters(facts)
    prefill = 2 * active * work.prefill_tokens / (operations * PREFILL_EFFICIENCY * tp)
    decode = _decode_s(facts, work, settings, weights, bandwidth * BANDWIDTH_EFFICIENCY, hardware.gpus > 0)
    seconds = prefill + decode + work.requests * (REQUEST_S if hardware.gpus else REQUEST_CPU_S)
    return TimeEstimate(
        engine_start_s=round(start, 1),
        work_s=round(seconds, 1),
        gpu_hours=round((start + seconds) / 3600 * tp, 3) if hardware.gpus else 0.0,
    )


def gpu_speed(name: str | None) -> tuple[float, float]:
    """Peak operations and bytes a second of a GPU by its name."""
    known = (name or "").upper()
    return next(((flops, rate) for part, flops, rate in _GPUS if part in known), _UNKNOWN_GPU)


def active_parameters(facts: ModelFacts) -> int:
    """Parameters that one token meets: all but the experts that it is not sent to, and towers for images and sound."""
    idle = facts.tower_parameters
    if facts.experts:
        idle += facts.expert_parameters * (facts.experts - facts.experts_per_token) // facts.experts
    return facts.parameters - idle


def _decode_s(
    facts: ModelFacts, work: Work, settings: EngineSettings, weights: int, bytes_per_s: float, on_gpu: bool
) -> float:
    if not work.generated_tokens:
        return 0.0
    # On its way a request holds its prompt and, in the mean, half of what it will generate.
    tokens = max(16, math.ceil(work.mean_tokens - work.generated_tokens / work.requests / 2))
    each = request_cache_bytes(facts, settings, tokens)
    room = settings.kv_cache_memory_bytes or 0
    running = max(
        1, min(settings.max_num_seqs, work.requests, room // each if each and room else settings.max_num_seqs)
    )
    per_token = cache_bytes_per_token(facts, settings.dtype, settings.kv_cache_dtype, settings.tensor_parallel_size)
    step = (weights + running * tokens * per_token) / bytes_per_s
    # The host prepares a step while the GPU works on the one before. On a CPU it is the kernels that take long.
    if on_gpu:
        layer = EAGER_EXPERTS_LAYER_S if facts.experts else EAGER_LAYER_S
        step = max(step, HOST_TOKEN_S * running + (layer * facts.layers if settings.enforce_eager else 0))
    return work.generated_tokens / running * step

"""The cache as the plan lays it out is the cache as vLLM lays it out."""

from __future__ import annotations

from typing import Any

import pytest
from demo_project import MODEL
from unit.architecture_data import NAMES, facts

from reproval.memory_model import BLOCK_TOKENS, cache_bytes_per_token, cache_pool, request_cache_bytes
from reproval.records import CacheGroup, EngineSettings, ModelFacts

pytestmark = pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="needs the demo's model: make model")


def groups(*kinds: tuple[str, int, int, int | None]) -> ModelFacts:
    """A model of layers (kind, layers, elements of a token in a layer, window)."""
    return facts("Qwen3-4B").model_copy(
        update={
            "cache": [
                CacheGroup.model_validate(
                    {"kind": kind, "layers": n, "elements_per_token": n * each, "window_tokens": window}
                )
                for kind, n, each, window in kinds
            ]
        }
    )


WITHOUT_STATES = {
    name: facts(name) for name in NAMES if not any(group.kind in ("state", "mla") for group in facts(name).cache)
}
LARGER = {
    "gemma-3-12b": groups(("full", 8, 4096, None), ("sliding", 40, 4096, 1024)),
    "gemma-3-27b": groups(("full", 10, 4096, None), ("sliding", 52, 4096, 1024)),
    "as many and a few more": groups(("full", 10, 2048, None), ("sliding", 14, 2048, 512)),
    "half as many again": groups(("full", 10, 2048, None), ("sliding", 15, 2048, 512)),
    "narrower windows": groups(("full", 5, 4096, None), ("sliding", 25, 2048, 1024)),
    "widths that do not divide": groups(("full", 8, 2048, None), ("sliding", 24, 1536, 1024)),
    "less than half as wide": groups(("full", 8, 2048, None), ("sliding", 24, 896, 1024)),
}


@pytest.fixture(scope="module")
def config() -> Any:
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    from vllm.engine.arg_utils import EngineArgs

    made = EngineArgs(model=str(MODEL), max_model_len=2048, enforce_eager=True).create_engine_config()
    # As on a GPU; the layout is what attention without a preference of its own gets there.
    made.scheduler_config.async_scheduling = True
    made.cache_config.kv_cache_layout = "LBNHC"
    return made


def layers(model: ModelFacts) -> dict[str, Any]:
    """What vLLM's attention layers of these shapes ask of its cache."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    specs: dict[str, Any] = {}
    for group in model.cache:
        # Keys and values of one head are as many elements as those of several.
        shape: dict[str, Any] = {
            "block_size": BLOCK_TOKENS,
            "num_kv_heads": 1,
            "head_size": group.elements_per_token // group.layers // 2,
            "dtype": torch.bfloat16,
        }
        for index in range(group.layers):
            specs[f"{group.kind}.{index}"] = (
                SlidingWindowSpec(sliding_window=group.window_tokens, **shape)
                if group.kind == "sliding"
                else FullAttentionSpec(**shape)
            )
    return specs


@pytest.mark.parametrize(("length", "tokens"), [(3008, 8192), (8192, 2048), (32768, 2048), (32768, 512)])
@pytest.mark.parametrize("name", [*WITHOUT_STATES, *LARGER])
def test_blocks_and_the_least_cache_are_vllm_s(config: Any, name: str, length: int, tokens: int) -> None:
    from vllm.v1.core import kv_cache_utils

    model = (WITHOUT_STATES | LARGER)[name]
    config.model_config.max_model_len = length
    config.scheduler_config.max_num_batched_tokens = tokens
    settings = EngineSettings(
        dtype="bfloat16",
        max_model_len=length,
        max_num_batched_tokens=tokens,
        max_num_seqs=64,
        kv_cache_memory_bytes=1,
        enforce_eager=True,
        submit_batch=64,
    )
    pool = cache_pool(model, settings)
    one = request_cache_bytes(model, settings, length)
    made = kv_cache_utils.get_kv_cache_groups(config, layers(model))
    assert pool.block_bytes == kv_cache_utils._pool_bytes_per_block(config, made)
    assert one == kv_cache_utils._max_memory_usage_bytes_from_groups(config, made)
    # The engine starts with one block more than a request, and with nothing less.
    (cache,) = kv_cache_utils.get_kv_cache_configs(config, [layers(model)], [one + pool.block_bytes])
    assert cache.num_blocks == one // pool.block_bytes + 1
    with pytest.raises(ValueError, match="To serve at least one request"):
        kv_cache_utils.get_kv_cache_configs(config, [layers(model)], [one + pool.block_bytes - 1])
    assert pool.block_bytes * pool.attention_blocks(BLOCK_TOKENS) >= BLOCK_TOKENS * cache_bytes_per_token(
        model, "bfloat16"
    )

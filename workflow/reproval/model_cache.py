"""How the layers of a model keep state for the tokens that they have seen, and how much of it."""

from __future__ import annotations

from collections import Counter

from reproval.model_config import (
    Config,
    attention_heads,
    declared_dtype,
    first,
    head_dim,
    hidden_size,
    kv_heads,
    layer_count,
)
from reproval.records import CacheGroup


def cache_groups(text: Config) -> list[CacheGroup]:
    """How the layers keep state, one group for each way that occurs. Sizes in elements, before tensor parallelism.

    Attention: 2 x kv_heads x head_dim a token and layer. MLA: kv_lora_rank + qk_rope_head_dim (vLLM keeps the latent
    once). Mamba and linear attention: a fixed number of bytes for each sequence, as in
    vllm/model_executor/layers/mamba/mamba_utils.py.
    """
    kinds = Counter(layer_kinds(text))
    per_layer = 2 * kv_heads(text) * head_dim(text)
    groups = []
    if kinds["mla"]:
        latent = int(text["kv_lora_rank"]) + int(text.get("qk_rope_head_dim") or 0)
        groups.append(CacheGroup(kind="mla", layers=kinds["mla"], elements_per_token=kinds["mla"] * latent))
    if blocks := text.get("block_configs"):
        # DeciLM (Llama-Nemotron): every layer has its own number of heads to a KV head, or no attention at all.
        sharing = [int(block["attention"]["n_heads_in_group"] or 0) for block in blocks]
        elements = sum(2 * (attention_heads(text) // n) * head_dim(text) for n in sharing if n)
        return [CacheGroup(kind="full", layers=sum(map(bool, sharing)), elements_per_token=elements)]
    if kinds["full"]:
        wide = per_layer
        if text.get("global_head_dim"):
            wide = 2 * int(text.get("num_global_key_value_heads") or kv_heads(text)) * int(text["global_head_dim"])
        groups.append(CacheGroup(kind="full", layers=kinds["full"], elements_per_token=kinds["full"] * wide))
    if kinds["sliding"]:
        if text.get("swa_num_key_value_heads"):
            per_layer = 2 * int(text["swa_num_key_value_heads"]) * int(text["swa_head_dim"])
        groups.append(
            CacheGroup(
                kind="sliding",
                layers=kinds["sliding"],
                elements_per_token=kinds["sliding"] * per_layer,
                window_tokens=int(text["sliding_window"]),
            )
        )
    if kinds["state"]:
        groups.append(
            CacheGroup(kind="state", layers=kinds["state"], state_bytes=kinds["state"] * _layer_state_bytes(text))
        )
    return groups


def layer_kinds(text: Config) -> list[str]:
    """For each layer: full, mla, sliding, state or none. A layer with both attention and Mamba is named twice."""
    layers = layer_count(text)
    model_type = text.get("model_type")
    attention = "mla" if text.get("kv_lora_rank") and model_type in _MLA_TYPES else "full"
    names = text.get("layer_types") or text.get("layers_block_type")
    if model_type in ("mamba", "mamba2", "falcon_mamba"):
        return ["state"] * layers
    if model_type == "longcat_flash":
        # Two attentions in each (FlashDecoderLayer of vllm/model_executor/models/longcat_flash.py).
        return [attention] * 2 * layers
    if model_type == "falcon_h1":
        return ["full", "state"] * layers
    if pattern := text.get("hybrid_override_pattern"):
        return [{"*": attention, "M": "state"}.get(letter, "none") for letter in pattern]
    if isinstance(names, list) and names:
        # Gemma 3n's last layers read the cache of earlier ones.
        own = names[: len(names) - int(text.get("num_kv_shared_layers") or 0)]
        kinds = [_NAMED_KINDS.get(name, attention) for name in own]
        if not text.get("sliding_window"):
            # Layers that are to slide over no window keep all.
            kinds = [attention if kind == "sliding" else kind for kind in kinds]
        return kinds + ["state" for name in own if name == "hybrid"]
    if sliding := text.get("hybrid_layer_pattern"):
        return ["sliding" if slides else attention for slides in sliding]
    if linear := text.get("linear_attn_config"):
        return ["state" if index + 1 in linear["kda_layers"] else attention for index in range(layers)]
    if text.get("attn_layer_period"):
        period, offset = int(text["attn_layer_period"]), int(text.get("attn_layer_offset") or 0)
        return [attention if index % period == offset else "state" for index in range(layers)]
    if (indices := text.get("attn_layer_indices")) is not None:
        return [attention if index in indices else "state" for index in range(layers)]
    if text.get("full_attention_interval"):
        interval = int(text["full_attention_interval"])
        return [attention if (index + 1) % interval == 0 else "state" for index in range(layers)]
    if text.get("sliding_window") and text.get("use_sliding_window", True):
        if text.get("use_sliding_window"):
            first = int(text.get("max_window_layers") or 0)
            return ["full" if index < first else "sliding" for index in range(layers)]
        # Every n-th layer is full; configurations older than layer_types leave n to the model's code.
        interval = int(text.get("sliding_window_pattern") or _FULL_EVERY.get(str(model_type), 0))
        return ["full" if interval and (index + 1) % interval == 0 else "sliding" for index in range(layers)]
    return [attention] * layers


# Types whose latent vLLM caches (is_deepseek_mla of transformers_utils/model_arch_config_convertor.py); others with a
# kv_lora_rank, such as MiniCPM3, keep full keys and values.
_MLA_TYPES = {
    "axk1", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "deepseek_v41",
    "dots3_note", "glm4_moe_lite", "glm5_next", "glm5_next_text", "glm_moe_dsa", "hy_v4", "kimi_k2", "kimi_linear",
    "longcat_flash", "pangu_ultra_moe",
}  # fmt: skip
_FULL_EVERY = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4}
_NAMED_KINDS = {
    "sliding_attention": "sliding",
    # vLLM keeps all of it: it turns the hybrid cache off for these models (VllmConfig.__post_init__, config/vllm.py).
    "chunked_attention": "full",
    "linear_attention": "state",
    "mamba": "state",
    "mamba2": "state",
    "conv": "state",
    "moe": "none",
    "mlp": "none",
}


def _layer_state_bytes(text: Config) -> int:
    """Bytes that one layer keeps for one sequence: the convolution's last inputs and the recurrent state."""
    convolution_item = 4 if declared_dtype(text) == "float32" else 2
    recurrent = text.get("mamba_ssm_cache_dtype") or text.get("mamba_ssm_dtype")
    if recurrent is None and text.get("model_type") == "nemotron_h":
        # The default of its class (DEFAULT_MAMBA_SSM_CACHE_DTYPE of vllm/model_executor/models/config.py).
        recurrent = "float32"
    recurrent_item = 4 if recurrent == "float32" else convolution_item
    hidden = hidden_size(text)
    if text.get("linear_num_value_heads"):
        keys = int(text["linear_num_key_heads"]) * int(text["linear_key_head_dim"])
        values = int(text["linear_num_value_heads"]) * int(text["linear_value_head_dim"])
        kept = int(text.get("linear_conv_kernel_dim") or 4) - 1
        return (2 * keys + values) * kept * convolution_item + values * int(
            text["linear_key_head_dim"]
        ) * recurrent_item
    if text.get("conv_L_cache"):
        return hidden * (int(text["conv_L_cache"]) - 1) * convolution_item
    if linear := text.get("linear_attn_config"):
        inner = int(linear["num_heads"]) * int(linear["head_dim"])
        kept = int(linear["short_conv_kernel_size"]) - 1
        return 3 * inner * kept * convolution_item + inner * int(linear["head_dim"]) * 4
    state = int(first(text, "mamba_d_state", "ssm_state_size", "state_size", default=16))
    kept = int(first(text, "mamba_d_conv", "conv_kernel", "d_conv", default=4)) - 1
    heads = first(text, "mamba_n_heads", "mamba_num_heads", "num_heads")
    if heads is None or text.get("model_type") in ("jamba", "mamba", "falcon_mamba"):
        inner = int(first(text, "mamba_expand", "expand", default=2)) * hidden
        if text.get("model_type") in ("mamba", "falcon_mamba"):
            inner = int(text.get("intermediate_size") or inner)
        return inner * kept * convolution_item + inner * state * recurrent_item
    width = first(text, "mamba_d_head", "mamba_head_dim")
    if width in (None, "auto"):
        width = text.get("head_dim") if text.get("model_type") == "mamba2" else None
    inner = int(first(text, "mamba_expand", "expand", default=2)) * hidden
    if width:
        inner = int(heads) * int(width)
    if text.get("mamba_d_ssm"):
        inner = int(text["mamba_d_ssm"])
    groups = int(first(text, "mamba_n_groups", "n_groups", default=1))
    return (inner + 2 * groups * state) * kept * convolution_item + inner * state * recurrent_item

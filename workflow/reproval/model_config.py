"""What config.json says of a language model, under the many names that architectures have for the same thing.

Pure functions of a configuration, of which `text_config` is the part that describes the language model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from reproval.model_tensors import Tensor
from reproval.records import Dtype

Config = Mapping[str, Any]

DTYPES: dict[str, Dtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors' names of the types that an engine computes in, and ours."""


def text_config(config: Config) -> Config:
    """The part of a configuration that describes the language model; multimodal models nest it."""
    for key in ("text_config", "llm_config", "language_config", "thinker_config"):
        inner = config.get(key)
        if isinstance(inner, dict) and inner:
            # vLLM reads what the inner part lacks from the outer one's defaults, never the other way round.
            return text_config({"model_type": config.get("model_type"), **inner})
    return config


# What a nested configuration may leave out, because the class in transformers fills it in.
_CLASS_DEFAULTS: dict[str, dict[str, int]] = {
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
    },
    "falcon": {"max_position_embeddings": 2048},
    "llama": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "mistral": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def completed(text: Config, tensors: Iterable[Tensor]) -> Config:
    """A text configuration with its class's defaults, and the vocabulary of the embedding if it names none."""
    complete = {**_CLASS_DEFAULTS.get(str(text.get("model_type")), {}), **text}
    if first(text, "vocab_size", "n_vocab") is None:
        embedding = next((each for each in tensors if each.name.endswith("embed_tokens.weight")), None)
        if embedding is not None:
            complete["vocab_size"], complete["hidden_size"] = embedding.shape
    return complete


def layer_count(text: Config) -> int:
    if text.get("model_type") == "longcat_flash" and text.get("num_layers"):
        # Its num_hidden_layers counts attentions, of which a layer has two.
        return int(text["num_layers"])
    count = first(text, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    if count is None:
        return len(text.get("hybrid_override_pattern") or text.get("layers_block_type") or ())
    return int(count)


def hidden_size(text: Config) -> int:
    return int(first(text, "hidden_size", "n_embd", "n_embed", "d_model", "model_dim", default=0))


def vocab_size(text: Config) -> int:
    return int(first(text, "vocab_size", "n_vocab", default=0))


def attention_heads(text: Config) -> int:
    return int(first(text, "num_attention_heads", "n_head", "n_heads", default=0))


def kv_heads(text: Config) -> int:
    """Key and value heads; an architecture that does not speak of them has one for every head."""
    if text.get("multi_query") and not text.get("new_decoder_architecture"):
        return 1
    attention = text.get("attn_config")
    if isinstance(attention, dict) and attention.get("kv_n_heads"):
        return int(attention["kv_n_heads"])
    given = first(
        text, "num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "num_attention_groups"
    )
    return int(given or attention_heads(text))


def head_dim(text: Config) -> int:
    """Explicit where the configuration gives it, else hidden size / heads. MLA: the query's, both its parts."""
    if text.get("kv_lora_rank") and text.get("qk_nope_head_dim"):
        return int(text["qk_nope_head_dim"]) + int(text.get("qk_rope_head_dim") or 0)
    explicit = first(text, "head_dim", "attention_head_dim", "kv_channels")
    heads = attention_heads(text)
    return int(explicit) if explicit else hidden_size(text) // heads if heads else 0


def experts(text: Config) -> int:
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
    return int(_largest(first(text, *names, default=0)))


def experts_per_token(text: Config) -> int:
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "moe_k")
    return int(_largest(first(text, *names, default=0))) if experts(text) else 0


def quantization_method(quantization: Config) -> str | None:
    method = quantization.get("quant_method") or quantization.get("quant_algo")
    if method:
        return str(method).lower()
    return "bitsandbytes" if quantization.get("load_in_4bit") or quantization.get("load_in_8bit") else None


def packed_bits(quantization: Config) -> int | None:
    """Bits of one packed weight, None where weights are stored one to an element."""
    method = quantization_method(quantization) or ""
    if method in ("mxfp4", "nvfp4") or quantization.get("load_in_4bit"):
        return 4
    for key in ("bits", "w_bit"):
        if quantization.get(key):
            return int(quantization[key])
    for group in (quantization.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        if weights.get("num_bits"):
            return int(weights["num_bits"])
    return None


def declared_dtype(config: Config) -> Dtype | None:
    value = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return cast(Dtype, value) if value in DTYPES.values() else None


def intermediate_size(text: Config) -> int:
    """The widest MLP of a layer; for a mixture of experts, of one expert."""
    sizes = first(text, "moe_intermediate_size", "intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "d_ff")
    return int(_largest(sizes) or 4 * hidden_size(text))


def _largest(value: Any) -> Any:
    """Of what a configuration may give for each layer, or for text and images apart, the largest."""
    return max(value, default=0) if isinstance(value, list) else value


# derive_max_model_len_and_key of vllm/transformers_utils/model_arch_config_convertor.py.
_LENGTHS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_target_positions",
    "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip


def longest_sequence(text: Config) -> int:
    """The length that vLLM refuses to exceed, times the factor of its rotary scaling where vLLM takes that.

    Of several names the smallest counts, and model_max_length before all. A model without positions (Mamba, ALiBi),
    for which vLLM takes what it is asked for, gets 2^20.
    """
    value = text.get("model_max_length") or min(
        (text[key] for key in _LENGTHS if text.get(key) is not None), default=None
    )
    return int(value * _rotary_factor(text)) if value else 2**20


# Their max_position_embeddings is already what scaling reaches.
_SCALED_ALREADY = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")


def _rotary_factor(text: Config) -> float:
    """As _get_and_verify_max_len of vllm/config/model.py: linear, dynamic and the like stretch the maximum."""
    scaling = text.get("rope_parameters") or text.get("rope_scaling")
    if not isinstance(scaling, dict) or "gemma3" in str(text.get("model_type")):
        return 1.0
    # A newer configuration may have one set of parameters for each type of layer.
    nested = [part for part in scaling.values() if isinstance(part, dict)]
    factor = 1.0
    for part in nested or [scaling]:
        if (part.get("rope_type") or part.get("type")) not in _SCALED_ALREADY:
            factor = part.get("factor") or factor
    return float(factor)


def first(config: Config, *keys: str, default: Any = None) -> Any:
    """The value of the first of these keys that has one."""
    for key in keys:
        if config.get(key) is not None:
            return config[key]
    return default

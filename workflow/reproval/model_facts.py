"""What a checkpoint is, from config.json and the headers of its safetensors files. No weights are read.

safetensors: 8 bytes little-endian give the length of a JSON header, which gives every tensor's dtype, shape and place
(https://huggingface.co/docs/safetensors). Pure functions work on a configuration and a list of tensors; only
`read_model` and what it calls touch files.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from reproval.records import CacheGroup, Dtype, ModelFacts, TensorTotal

Config = Mapping[str, Any]

ITEM_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
}  # fmt: skip
"""safetensors' names of storage dtypes."""

_DTYPES: dict[str, Dtype] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# The format allows more, but no real header comes near; a damaged length would else ask for gigabytes.
_LONGEST_HEADER = 100_000_000


class ModelError(Exception):
    """A checkpoint cannot be read; the message names the file, what was found, and the mend."""


class Tensor(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


# --- reading -------------------------------------------------------------------------------------------------------


def read_model(folder: Path) -> ModelFacts:
    """Facts of a local checkpoint. Raises ModelError."""
    config = _read_json(folder / "config.json")
    modelopt = folder / "hf_quant_config.json"
    if modelopt.exists() and "quantization_config" not in config:
        # NVIDIA's quantizer writes a file of its own beside config.json.
        config = {**config, "quantization_config": _read_json(modelopt).get("quantization")}
    return facts_of(config, read_tensors(folder))


def read_tensors(folder: Path) -> list[Tensor]:
    """All tensors of a folder's safetensors files: those of the index if there is one. Raises ModelError."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(_read_json(index)["weight_map"].values()))
        except (KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index}: has no weight_map; download the checkpoint again") from error
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        if "model.safetensors" in names:
            # Some checkpoints carry a second copy beside it (consolidated.safetensors).
            names = ["model.safetensors"]
    if not names:
        raise ModelError(f"{folder}: has no *.safetensors file; other weight formats are not planned for")
    return [tensor for name in names for tensor in read_header(folder / name)]


def read_header(path: Path) -> list[Tensor]:
    """Tensors that one safetensors file declares. Raises ModelError for a header that cannot be true."""
    damaged = f"{path}: damaged safetensors file"
    mend = "download it again"
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(8)
            if len(head) < 8:
                raise ModelError(f"{damaged}: {size} bytes, shorter than a header's length; {mend}")
            (length,) = struct.unpack("<Q", head)
            if length > min(size - 8, _LONGEST_HEADER):
                raise ModelError(f"{damaged}: header of {length} bytes in a file of {size} bytes; {mend}")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); {mend}") from error
    except ValueError as error:
        raise ModelError(f"{damaged}: its header is not JSON ({error}); {mend}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{damaged}: its header is not an object; {mend}")
    tensors = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            tensor = Tensor(name, entry["dtype"], tuple(int(n) for n in entry["shape"]))
            begin, end = entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{damaged}: tensor {name} lacks dtype, shape or data_offsets; {mend}") from error
        if end > size - 8 - length:
            raise ModelError(f"{damaged}: tensor {name} ends {end - (size - 8 - length)} bytes behind the file; {mend}")
        if tensor.dtype in ITEM_BITS and (end - begin) * 8 != tensor.elements * ITEM_BITS[tensor.dtype]:
            raise ModelError(f"{damaged}: tensor {name} has {end - begin} bytes for {tensor.shape} of {tensor.dtype}")
        tensors.append(tensor)
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); is this the folder of a model?") from error
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: is not a JSON object; download it again")
    return content


# --- facts ---------------------------------------------------------------------------------------------------------


def facts_of(config: Config, tensors: Iterable[Tensor]) -> ModelFacts:
    """Facts from a configuration and the tensors of a checkpoint. Pure. Raises ModelError."""
    tensors = list(tensors)
    text = _completed(text_config(config), tensors)
    quantization = config.get("quantization_config") or text.get("quantization_config") or {}
    kept = _loaded(text, tensors)
    tied = is_tied(config, text, kept)
    if tied:
        kept = [tensor for tensor in kept if not _HEAD.search(tensor.name)]
    bits = _packed_bits(quantization)
    logical = {tensor.name: _logical_elements(tensor, bits, bool(quantization)) for tensor in kept}

    by_dtype: Counter[str] = Counter()
    for tensor in kept:
        by_dtype[tensor.dtype] += logical[tensor.name]
    heads = int(_first(text, *_HEADS, default=0))
    hidden = int(_first(text, *_HIDDEN, default=0))
    experts = _first(
        text, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts", default=0
    )
    layers = layer_count(text)
    vocabulary = int(_first(text, "vocab_size", "n_vocab", default=0))
    if not (layers and hidden and vocabulary):
        raise ModelError(
            "config.json: number of layers, hidden size or vocabulary size not found; this architecture is not known"
        )
    return ModelFacts(
        architecture=(config.get("architectures") or text.get("architectures") or ["unknown"])[0],
        model_type=str(config.get("model_type") or text.get("model_type") or "unknown"),
        parameters=sum(logical.values()),
        checkpoint_bytes=sum(_stored_bytes(tensor) for tensor in kept),
        tensors=_totals(kept),
        linear_parameters=sum(n for name, n in logical.items() if _is_linear(name)),
        checkpoint_dtype=_checkpoint_dtype(config, text, by_dtype),
        quantization=_method(quantization),
        layers=layers,
        hidden_size=hidden,
        intermediate_size=_intermediate_size(text, hidden),
        attention_heads=heads,
        kv_heads=kv_heads(text, heads),
        head_dim=head_dim(text, heads, hidden),
        vocab_size=vocabulary,
        max_position_embeddings=_longest_sequence(text),
        tied_embeddings=tied,
        experts=int(experts or 0),
        experts_per_token=int(
            _first(
                text,
                "num_experts_per_tok",
                "num_experts_per_token",
                "moe_topk",
                "moe_top_k",
                "top_k_experts",
                default=0,
            )
            if experts
            else 0
        ),
        expert_parameters=sum(n for name, n in logical.items() if experts and _EXPERT.search(name)),
        nested_absmax_elements=_nested_absmax_elements(kept),
        soft_caps_logits=bool(text.get("final_logit_softcapping")),
        cache=cache_groups(text),
    )


def text_config(config: Config) -> Config:
    """The part of a configuration that describes the language model; multimodal models nest it."""
    for key in ("text_config", "llm_config", "language_config", "thinker_config"):
        inner = config.get(key)
        if isinstance(inner, dict) and inner:
            # vLLM reads what the inner part lacks from the outer one's defaults, never the other way round.
            return text_config({"model_type": config.get("model_type"), **inner})
    return config


_HIDDEN = ("hidden_size", "n_embd", "n_embed", "d_model", "model_dim")
_HEADS = ("num_attention_heads", "n_head", "n_heads")

# What a nested configuration may leave out, because the class in transformers fills it in.
_CLASS_DEFAULTS: dict[str, dict[str, int]] = {
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
    },
    "llama": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "mistral": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def _completed(text: Config, tensors: Iterable[Tensor]) -> Config:
    """A text configuration with its class's defaults, and the vocabulary of the embedding if it names none."""
    complete = {**_CLASS_DEFAULTS.get(str(text.get("model_type")), {}), **text}
    if _first(text, "vocab_size", "n_vocab", default=None) is None:
        embedding = next((each for each in tensors if each.name.endswith("embed_tokens.weight")), None)
        if embedding is not None:
            complete["vocab_size"], complete["hidden_size"] = embedding.shape
    return complete


def layer_count(text: Config) -> int:
    count = _first(text, "num_hidden_layers", "n_layer", "n_layers", "num_layers", default=None)
    if count is None:
        pattern = text.get("hybrid_override_pattern") or text.get("layers_block_type") or ()
        return len(pattern)
    return int(count)


def kv_heads(text: Config, heads: int) -> int:
    """Key and value heads; an architecture that does not speak of them has one for every head."""
    if text.get("multi_query") and not text.get("new_decoder_architecture"):
        return 1
    attention = text.get("attn_config")
    if isinstance(attention, dict) and attention.get("kv_n_heads"):
        return int(attention["kv_n_heads"])
    return int(
        _first(text, "num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", default=None) or heads
    )


def head_dim(text: Config, heads: int, hidden: int) -> int:
    """Explicit where the configuration gives it, else hidden size / heads. MLA: the query's, both its parts."""
    if text.get("kv_lora_rank") and text.get("qk_nope_head_dim"):
        return int(text["qk_nope_head_dim"]) + int(text.get("qk_rope_head_dim") or 0)
    explicit = _first(text, "head_dim", "attention_head_dim", "kv_channels", default=None)
    return int(explicit) if explicit else hidden // heads if heads else 0


def is_tied(config: Config, text: Config, tensors: Iterable[Tensor]) -> bool:
    """Whether input and output embeddings are one tensor, also where the checkpoint stores a copy of it."""
    for part in (config, text):
        if part.get("tie_word_embeddings") is not None:
            return bool(part["tie_word_embeddings"])
    if not any(_HEAD.search(tensor.name) for tensor in tensors):
        return True
    return text.get("model_type") in _TIED_BY_DEFAULT


# Types whose configuration class in transformers ties unless config.json says otherwise.
_TIED_BY_DEFAULT = {"falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "bloom", "opt", "mpt", "cohere"}
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_layer)\.weight$")


# --- the cache -----------------------------------------------------------------------------------------------------


def cache_groups(text: Config) -> list[CacheGroup]:
    """How the layers keep state, one group for each way that occurs. Sizes in elements, before tensor parallelism.

    Attention: 2 x kv_heads x head_dim a token and layer. MLA: kv_lora_rank + qk_rope_head_dim (vLLM keeps the latent
    once). Mamba and linear attention: a fixed number of bytes for each sequence, as in
    vllm/model_executor/layers/mamba/mamba_utils.py.
    """
    kinds = Counter(layer_kinds(text))
    heads = int(_first(text, *_HEADS, default=0))
    hidden = int(_first(text, *_HIDDEN, default=0))
    per_layer = 2 * kv_heads(text, heads) * head_dim(text, heads, hidden)
    groups = []
    if kinds["mla"]:
        latent = int(text["kv_lora_rank"]) + int(text.get("qk_rope_head_dim") or 0)
        groups.append(CacheGroup(kind="mla", layers=kinds["mla"], elements_per_token=kinds["mla"] * latent))
    if blocks := text.get("block_configs"):
        # DeciLM (Llama-Nemotron): every layer has its own number of heads to a KV head, or no attention at all.
        sharing = [int(block["attention"]["n_heads_in_group"] or 0) for block in blocks]
        elements = sum(2 * (heads // n) * head_dim(text, heads, hidden) for n in sharing if n)
        return [CacheGroup(kind="full", layers=sum(map(bool, sharing)), elements_per_token=elements)]
    if kinds["full"]:
        wide = per_layer
        if text.get("global_head_dim"):
            wide = (
                2 * int(text.get("num_global_key_value_heads") or kv_heads(text, heads)) * int(text["global_head_dim"])
            )
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
    if model_type == "falcon_h1":
        return ["full", "state"] * layers
    if pattern := text.get("hybrid_override_pattern"):
        return [{"*": attention, "M": "state"}.get(letter, "none") for letter in pattern]
    if isinstance(names, list) and names:
        # Gemma 3n's last layers read the cache of earlier ones.
        own = names[: len(names) - int(text.get("num_kv_shared_layers") or 0)]
        kinds = [_NAMED_KINDS.get(name, attention) for name in own]
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
    convolution_item = 4 if _config_dtype(text) == "float32" else 2
    recurrent = text.get("mamba_ssm_cache_dtype") or text.get("mamba_ssm_dtype")
    if recurrent is None and text.get("model_type") == "nemotron_h":
        # The default of its class (DEFAULT_MAMBA_SSM_CACHE_DTYPE of vllm/model_executor/models/config.py).
        recurrent = "float32"
    recurrent_item = 4 if recurrent == "float32" else convolution_item
    hidden = int(_first(text, *_HIDDEN, default=0))
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
    state = int(_first(text, "mamba_d_state", "ssm_state_size", "state_size", default=16))
    kept = int(_first(text, "mamba_d_conv", "conv_kernel", "d_conv", default=4)) - 1
    heads = _first(text, "mamba_n_heads", "mamba_num_heads", "num_heads", default=None)
    if heads is None or text.get("model_type") in ("jamba", "mamba", "falcon_mamba"):
        inner = int(_first(text, "mamba_expand", "expand", default=2)) * hidden
        if text.get("model_type") in ("mamba", "falcon_mamba"):
            inner = int(text.get("intermediate_size") or inner)
        return inner * kept * convolution_item + inner * state * recurrent_item
    width = _first(text, "mamba_d_head", "mamba_head_dim", default=None)
    if width in (None, "auto"):
        width = text.get("head_dim") if text.get("model_type") == "mamba2" else None
    inner = int(_first(text, "mamba_expand", "expand", default=2)) * hidden
    if width:
        inner = int(heads) * int(width)
    if text.get("mamba_d_ssm"):
        inner = int(text["mamba_d_ssm"])
    groups = int(_first(text, "mamba_n_groups", "n_groups", default=1))
    return (inner + 2 * groups * state) * kept * convolution_item + inner * state * recurrent_item


# --- tensors -------------------------------------------------------------------------------------------------------

# Buffers that older checkpoints store and no engine loads.
_BUFFER = re.compile(r"(rotary_emb\.inv_freq|attn\.masked_bias|attention\.masked_bias|\.rope\.freqs)$")
# Scales and the like, which a quantized checkpoint stores beside its weights: no parameters of the model.
_AUXILIARY = re.compile(
    r"(\.(scales|qzeros|g_idx|weight_scale|weight_scale_inv|weight_scale_2|weight_zero_point|weight_shape|weight_g_idx"
    r"|weight_global_scale|input_global_scale|input_scale|output_scale|activation_scale|k_scale|v_scale|absmax|quant_map"
    r"|nested_absmax|nested_quant_map|SCB|weight_format|quant_state\.\w+)|_scales?|_scale_inv)$"
)
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|wpe|word_embeddings\w*|embed_in|embed_out|embed_positions|position_embeddings|embeddings"
    r"|embedding|tok_embeddings|lm_head|output_layer)(\.|$)"
)
_NOT_LINEAR = re.compile(
    r"(norm|mlp\.gate\.|moe\.gate\.|patch_embed|layernorm|ln_\w+|conv1d|A_log|\.D$|dt_bias|\.bias|_bias|rotary|sinks|router)"
)

_EXPERT = re.compile(r"\.experts\.|block_sparse_moe\.(input|output)_linear")


def _loaded(text: Config, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tensors that an engine keeps in memory: no stored masks and frequencies, no layers for speculative decoding."""
    layers = layer_count(text)

    def skipped(tensor: Tensor) -> bool:
        if _BUFFER.search(tensor.name):
            return True
        if len(tensor.shape) == 4 and re.search(r"\.(attn|attention)\.bias$", tensor.name):
            return True
        if re.match(r"(model\.)?mtp\.", tensor.name):
            return True
        layer = re.match(r"model\.layers\.(\d+)\.", tensor.name)
        return bool(layer and text.get("num_nextn_predict_layers") and int(layer[1]) >= layers)

    seen: dict[str, Tensor] = {}
    for tensor in tensors:
        if not skipped(tensor):
            seen.setdefault(tensor.name, tensor)
    return list(seen.values())


def _stored_bytes(tensor: Tensor) -> int:
    if tensor.dtype not in ITEM_BITS:
        raise ModelError(f"tensor {tensor.name}: storage dtype {tensor.dtype!r} is not known")
    return -(-tensor.elements * ITEM_BITS[tensor.dtype] // 8)


def _logical_elements(tensor: Tensor, bits: int | None, quantized: bool) -> int:
    """Parameters that a tensor stands for: packed ones unpacked, scales none."""
    if quantized and _AUXILIARY.search(tensor.name):
        return 0
    if not bits or not quantized:
        return tensor.elements
    packed_name = re.search(r"(\.qweight|\.weight_packed|_blocks)$", tensor.name)
    packed_weight = tensor.dtype == "U8" and tensor.name.endswith(("weight", "proj"))
    if packed_name or packed_weight:
        return tensor.elements * ITEM_BITS[tensor.dtype] // bits
    return tensor.elements


def _is_linear(name: str) -> bool:
    return not (_EMBEDDING.search(name) or _NOT_LINEAR.search(name))


def _nested_absmax_elements(tensors: list[Tensor]) -> int:
    """Elements of byte-sized scales that have scales of their own (a tensor .nested_absmax beside .absmax)."""
    names = {tensor.name for tensor in tensors}
    return sum(
        tensor.elements
        for tensor in tensors
        if tensor.dtype == "U8"
        and tensor.name.endswith(".absmax")
        and tensor.name.removesuffix("absmax") + "nested_absmax" in names
    )


def _totals(tensors: Iterable[Tensor]) -> list[TensorTotal]:
    groups: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return [
        TensorTotal(
            dtype=dtype,
            tensors=len(group),
            elements=sum(tensor.elements for tensor in group),
            size_bytes=sum(_stored_bytes(tensor) for tensor in group),
        )
        for dtype, group in sorted(groups.items())
    ]


def _method(quantization: Config) -> str | None:
    method = quantization.get("quant_method") or quantization.get("quant_algo")
    if method:
        return str(method).lower()
    return "bitsandbytes" if quantization.get("load_in_4bit") or quantization.get("load_in_8bit") else None


def _packed_bits(quantization: Config) -> int | None:
    """Bits of one packed weight, None where weights are stored one to an element."""
    method = _method(quantization) or ""
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


def _checkpoint_dtype(config: Config, text: Config, by_dtype: Mapping[str, int]) -> Dtype | None:
    declared = _config_dtype(text) or _config_dtype(config)
    if declared:
        return declared
    plain = {name: count for name, count in by_dtype.items() if name in _DTYPES}
    return _DTYPES[max(plain, key=lambda name: plain[name])] if plain else None


def _config_dtype(config: Config) -> Dtype | None:
    value = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return cast(Dtype, value) if value in _DTYPES.values() else None


def _intermediate_size(text: Config, hidden: int) -> int:
    """The widest MLP of a layer; for a mixture of experts, of one expert."""
    sizes = _first(
        text,
        "moe_intermediate_size",
        "intermediate_size",
        "ffn_hidden_size",
        "n_inner",
        "ffn_dim",
        "d_ff",
        default=None,
    )
    if isinstance(sizes, list):
        sizes = max(sizes)
    return int(sizes or 4 * hidden)


def _longest_sequence(text: Config) -> int:
    """max_position_embeddings under its several names, times the factor of its rotary scaling where vLLM takes that.

    A model without positions (Mamba, ALiBi) gets 2^20.
    """
    value = _first(text, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx", default=None)
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


def _first(config: Config, *keys: str, default: Any) -> Any:
    for key in keys:
        if config.get(key) is not None:
            return config[key]
    return default

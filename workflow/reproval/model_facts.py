"""What a checkpoint is, from config.json and the headers of its safetensors files. No weights are read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from reproval import model_config
from reproval.model_cache import cache_groups
from reproval.model_config import DTYPES, Config, text_config
from reproval.model_tensors import (
    ModelError,
    Tensor,
    is_expert,
    is_linear,
    is_tower,
    loaded,
    logical_elements,
    nested_absmax_elements,
    read_json,
    stored_bytes,
    totals,
)
from reproval.records import Dtype, ModelFacts


def read_config(folder: Path) -> Config:
    """config.json of a local checkpoint. Raises ModelError."""
    config = read_json(folder / "config.json")
    modelopt = folder / "hf_quant_config.json"
    if modelopt.exists() and "quantization_config" not in config:
        # NVIDIA's quantizer writes a file of its own beside config.json.
        config = {**config, "quantization_config": read_json(modelopt).get("quantization")}
    return config


def facts_of(config: Config, tensors: Iterable[Tensor]) -> ModelFacts:
    """Facts from a configuration and the tensors of a checkpoint. Pure. Raises ModelError."""
    try:
        return _facts_of(config, list(tensors))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        # Of hundreds of architectures, some key has a form that no other has.
        raise ModelError(
            f"config.json: a value could not be understood: {type(error).__name__}: {error}; expected the keys as the "
            f"class of model_type {config.get('model_type')!r} in transformers has them; correct them, or copy "
            "config.json from where the weights come from"
        ) from error


def _facts_of(config: Config, tensors: list[Tensor]) -> ModelFacts:
    text = model_config.completed(text_config(config), tensors)
    quantization = config.get("quantization_config") or text.get("quantization_config") or {}
    layers, experts = model_config.layer_count(text), model_config.experts(text)
    hidden, vocabulary = model_config.hidden_size(text), model_config.vocab_size(text)
    kept = loaded(tensors, layers, bool(text.get("num_nextn_predict_layers")))
    tied = is_tied(config, text, kept)
    if tied:
        kept = [tensor for tensor in kept if not _HEAD.search(tensor.name)]
    bits = model_config.packed_bits(quantization)
    logical = {tensor.name: logical_elements(tensor, bits, bool(quantization)) for tensor in kept}
    parameters = sum(logical.values())
    if "vision_config" in config or "audio_config" in config:
        kept = [tensor for tensor in kept if not is_tower(tensor.name)]
        logical = {tensor.name: logical[tensor.name] for tensor in kept}
    by_dtype: Counter[str] = Counter()
    for tensor in kept:
        by_dtype[tensor.dtype] += logical[tensor.name]
    if not (layers and hidden and vocabulary):
        raise ModelError(
            "config.json: number of layers, hidden size or vocabulary size not found; this architecture is not known"
        )
    return ModelFacts(
        architecture=(config.get("architectures") or text.get("architectures") or ["unknown"])[0],
        model_type=str(config.get("model_type") or text.get("model_type") or "unknown"),
        parameters=parameters,
        tower_parameters=parameters - sum(logical.values()),
        checkpoint_bytes=sum(stored_bytes(tensor) for tensor in kept),
        tensors=totals(kept),
        linear_parameters=sum(n for name, n in logical.items() if is_linear(name)),
        checkpoint_dtype=_checkpoint_dtype(config, text, by_dtype),
        quantization=model_config.quantization_method(quantization),
        layers=layers,
        hidden_size=hidden,
        intermediate_size=model_config.intermediate_size(text),
        attention_heads=model_config.attention_heads(text),
        kv_heads=model_config.kv_heads(text),
        head_dim=model_config.head_dim(text),
        vocab_size=vocabulary,
        max_position_embeddings=model_config.longest_sequence(text),
        tied_embeddings=tied,
        experts=experts,
        experts_per_token=model_config.experts_per_token(text),
        expert_parameters=sum(n for name, n in logical.items() if experts and is_expert(name)),
        nested_absmax_elements=nested_absmax_elements(kept),
        soft_caps_logits=bool(text.get("final_logit_softcapping")),
        cache=cache_groups(text),
    )


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


def _checkpoint_dtype(config: Config, text: Config, by_dtype: Mapping[str, int]) -> Dtype | None:
    declared = model_config.declared_dtype(text) or model_config.declared_dtype(config)
    if declared:
        return declared
    plain = {name: count for name, count in by_dtype.items() if name in DTYPES}
    return DTYPES[max(plain, key=lambda name: plain[name])] if plain else None

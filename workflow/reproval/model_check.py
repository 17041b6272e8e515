"""Whether config.json can be that of the tensors beside it. Pure functions of both; no weights are read.

vLLM builds the model that config.json describes and copies into it what fits. Of a tensor that is larger than its
place it takes the first rows, and a place that no tensor fills keeps what was in memory: scores then come out, of a
model that nobody trained. (Seen with vLLM 0.32.0 and SmolLM2-135M: narrower MLP, fewer heads, another head size, biases
or an output layer that are not there. Of layers, vocabulary and hidden size it says something, though not always what,
and only with the GPU in its hands.)

Whatever the architecture, the numbers of layers and experts and the size of the embedding are compared, and what a
known key explains is left alone. The shapes within a layer follow from config.json only where a model type has no
exceptions: `_PLAIN`. A configuration that leaves a number to its class says nothing that could be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from reproval.model_config import Config, head_dim, text_config
from reproval.model_tensors import ModelError, Tensor
from reproval.problems import Problem, listing

# The stored dtypes in which a tensor has the shape that the model gives it; others are packed.
_WHOLE = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8"}
_LAYER = re.compile(r"^((?:.*?\.)?)(?:layers|h|blocks)\.(\d+)\.(.+)$")
_EMBEDDING = re.compile(r"^((?:.*\.)?)(?:embed_tokens|tok_embeddings|wte|word_embeddings|embed_in|embeddings)\.weight$")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_VOCABULARY = ("vocab_size", "n_vocab")
_HIDDEN = ("hidden_size", "n_embd", "n_embed", "d_model", "model_dim")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
# Keys by which the embedding of a few architectures is larger, or narrower, than the model.
_OTHER_ROWS = ("padded_vocab_size", "embedding_size", "pad_vocab_size_multiple")
_OTHER_COLUMNS = ("word_embed_proj_dim", "embedding_size")

# Types whose layers are all alike: self_attn with q, k, v and o, and an MLP of gate, up and down, or experts.
_PLAIN = {
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "olmo",
    "olmo2", "olmoe", "granite", "smollm3",
}  # fmt: skip
# Of these the class in transformers says what the size of a head is, where config.json does not.
_OWN_HEAD_DIM = {"qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"}
_UNTIED_BY_DEFAULT = {
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "olmo", "olmo2", "olmoe", "granite",
}  # fmt: skip


class _Stack(NamedTuple):
    """The layers of the language model, and its embedding."""

    prefix: str
    layers: dict[int, dict[str, Tensor]]
    embedding: Tensor


class _Wrong(NamedTuple):
    key: str
    found: str
    expected: str


def check(config: Config, tensors: Iterable[Tensor], file: str) -> None:
    """Raise ModelError unless the configuration, which was read from `file`, can be that of these tensors."""
    mend = "copy config.json from where the weights come from, or correct the key"
    if wrong := list(contradictions(config, list(tensors))):
        problems = [Problem(file, each.key, each.found, each.expected, mend) for each in wrong]
        raise ModelError(
            "config.json is not that of the tensors beside it: vLLM would fail, or score another model\n"
            + "\n".join(map(str, problems))
        )


def known_tokens(tensors: Iterable[Tensor], vocabulary: int) -> int:
    """How many tokens the model has an embedding for; `vocabulary` where no tensor tells."""
    rows = [tensor.shape[0] for tensor in tensors if _EMBEDDING.match(tensor.name) and len(tensor.shape) == 2]
    return max(rows, default=vocabulary)


def contradictions(config: Config, tensors: list[Tensor]) -> Iterator[_Wrong]:
    """What a configuration says that cannot be true of the tensors."""
    text = text_config(config)
    stack = _stack(tensors)
    if stack is None or config.get("is_encoder_decoder"):
        return
    yield from _number_of_layers(config, text, stack)
    yield from _embedding(config, text, stack)
    yield from _number_of_experts(text, stack)
    if text.get("model_type") in _PLAIN and not text.get("block_configs"):
        yield from _attention(text, stack)
        yield from _mlp(text, stack)
        yield from _biases(text, stack)
        yield from _output_layer(config, text, stack, tensors)
        yield from _gaps(config, text, stack)


def _stack(tensors: list[Tensor]) -> _Stack | None:
    """The one place with layers and an embedding; None where there is none, or more than one (speech beside text)."""
    layers: dict[str, dict[int, dict[str, Tensor]]] = {}
    embeddings: dict[str, Tensor] = {}
    for tensor in tensors:
        if found := _LAYER.match(tensor.name):
            layers.setdefault(found[1], {}).setdefault(int(found[2]), {})[found[3]] = tensor
        elif found := _EMBEDDING.match(tensor.name):
            embeddings[found[1]] = tensor
    both = [prefix for prefix in embeddings if prefix in layers and "mtp" not in prefix]
    return _Stack(both[0], layers[both[0]], embeddings[both[0]]) if len(both) == 1 else None


def _given(config: Config, keys: Iterable[str]) -> tuple[str, int] | None:
    """The first of these keys that has a value, if that is a whole number."""
    key = next((key for key in keys if config.get(key) is not None), None)
    return (key, config[key]) if key is not None and type(config[key]) is int else None


def _number_of_layers(config: Config, text: Config, stack: _Stack) -> Iterator[_Wrong]:
    given = _given(text, _LAYERS)
    if given is None:
        return
    key, declared = given
    held = f"layers {min(stack.layers)} to {max(stack.layers)}"
    # Layers for speculative decoding come behind the others.
    drafts = any(value and re.search(r"nextn|mtp", name) for part in (config, text) for name, value in part.items())
    if max(stack.layers) >= declared and not drafts:
        yield _Wrong(key, str(declared), f"{max(stack.layers) + 1}: the tensors are {held}")
    absent = [str(number) for number in range(declared) if number not in stack.layers]
    if absent and not text.get("block_configs"):
        yield _Wrong(key, str(declared), f"tensors for each layer; there are {held}, and none of {listing(absent, 6)}")


def _embedding(config: Config, text: Config, stack: _Stack) -> Iterator[_Wrong]:
    name, dtype, shape = stack.embedding
    if dtype not in _WHOLE or len(shape) != 2 or str(text.get("model_type")).startswith("plamo"):
        return
    for keys, others, size in ((_VOCABULARY, _OTHER_ROWS, shape[0]), (_HIDDEN, _OTHER_COLUMNS, shape[1])):
        given = _given(text, keys)
        explained = any(part.get(key) is not None for part in (config, text) for key in others)
        if given and given[1] != size and not explained:
            yield _Wrong(given[0], str(given[1]), f"{size}: {name} is {_times(shape)}")


def _number_of_experts(text: Config, stack: _Stack) -> Iterator[_Wrong]:
    names = {f".{name}" for layer in stack.layers.values() for name in layer}
    found = {int(match[1]) for name in names if (match := _EXPERT.search(name))}
    given = _given(text, _EXPERTS)
    counts = {text.get(key) for key in _EXPERTS}
    if found and given and max(found) + 1 not in counts:
        yield _Wrong(given[0], str(given[1]), f"{max(found) + 1}: the tensors are of experts 0 to {max(found)}")


def _attention(text: Config, stack: _Stack) -> Iterator[_Wrong]:
    heads, hidden = _given(text, ("num_attention_heads",)), _given(text, _HIDDEN)
    if not (heads and hidden) or (text.get("head_dim") is None and text.get("model_type") in _OWN_HEAD_DIM):
        return
    dim = head_dim(text)
    for names, key in ((("q_proj",), "num_attention_heads"), (("k_proj", "v_proj"), "num_key_value_heads")):
        given = _given(text, (key,))
        tensors = (f"self_attn.{name}.weight" for name in names)
        if given and (other := _first_other(stack, tensors, given[1] * dim)):
            by = f"{key}: {given[1]} x head_dim: {dim}" + ("" if text.get("head_dim") else " (hidden_size / heads)")
            yield _Wrong(f"{key}, head_dim", f"{by} = {given[1] * dim}", f"{other.shape[0]}: {_is(stack, other)}")


def _mlp(text: Config, stack: _Stack) -> Iterator[_Wrong]:
    experts = ("moe_intermediate_size", "intermediate_size")
    for names, keys in (
        (("mlp.gate_proj.weight", "mlp.up_proj.weight"), ("intermediate_size",)),
        (("mlp.experts.0.gate_proj.weight", "block_sparse_moe.experts.0.w1.weight"), experts),
    ):
        given = _given(text, keys)
        if given and (other := _first_other(stack, names, given[1])):
            yield _Wrong(given[0], str(given[1]), f"{other.shape[0]}: {_is(stack, other)}")


def _biases(text: Config, stack: _Stack) -> Iterator[_Wrong]:
    kind = text.get("model_type")
    if kind in ("qwen2", "qwen2_moe") and text.get("qkv_bias") is not False:
        yield from _missing(stack, "self_attn.q_proj", "model_type", str(kind))
    if text.get("attention_bias") is True:
        yield from _missing(stack, "self_attn.q_proj", "attention_bias", "true")
    if text.get("mlp_bias") is True and kind == "llama":
        yield from _missing(stack, "mlp.gate_proj", "mlp_bias", "true")


def _missing(stack: _Stack, module: str, key: str, found: str) -> Iterator[_Wrong]:
    layer = stack.layers[min(stack.layers)]
    if any(name.startswith(f"{module}.") for name in layer) and f"{module}.bias" not in layer:
        yield _Wrong(key, found, f"a configuration without biases: there is no tensor {module}.bias")


def _output_layer(config: Config, text: Config, stack: _Stack, tensors: list[Tensor]) -> Iterator[_Wrong]:
    said = [part["tie_word_embeddings"] for part in (config, text) if part.get("tie_word_embeddings") is not None]
    tied = any(said) if said else text.get("model_type") not in _UNTIED_BY_DEFAULT
    if not tied and not any("lm_head" in tensor.name for tensor in tensors):
        found = "false" if said else f"nothing, which means false for {text.get('model_type')}"
        yield _Wrong("tie_word_embeddings", found, f"true: no tensor lm_head, so {stack.embedding.name} has to serve")


def _gaps(config: Config, text: Config, stack: _Stack) -> Iterator[_Wrong]:
    """A weight that one layer lacks and another has: of a shard that was lost, or a merge that went wrong."""
    if config.get("quantization_config") or text.get("quantization_config"):
        return
    # In a mixture of experts some layers may have a plain MLP.
    alike = "self_attn." if _given(text, _EXPERTS) else ("self_attn.", "mlp.")
    names = {name for layer in stack.layers.values() for name in layer if re.fullmatch(r"\w+\.\w+_proj\.weight", name)}
    for number, layer in sorted(stack.layers.items()):
        if absent := sorted(name for name in names - layer.keys() if name.startswith(alike)):
            yield _Wrong("", f"no tensor {stack.prefix}layers.{number}.{absent[0]}", "it, as other layers have one")
            return


def _first_other(stack: _Stack, names: Iterable[str], rows: int) -> Tensor | None:
    """The first whole tensor of these names in any layer with another number of rows."""
    wanted = list(names)
    for number in sorted(stack.layers):
        for name in wanted:
            tensor = stack.layers[number].get(name)
            if tensor and tensor.dtype in _WHOLE and len(tensor.shape) == 2 and tensor.shape[0] != rows:
                return tensor
    return None


def _is(stack: _Stack, tensor: Tensor) -> str:
    return f"{tensor.name} is {_times(tensor.shape)}"


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))

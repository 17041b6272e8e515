"""A config.json that is not that of the tensors beside it, and those that only look so."""

from __future__ import annotations

import re
from typing import Any

import pytest
from architecture_data import NAMES, load, tensors

from reproval.model_check import check, contradictions
from reproval.model_tensors import ModelError, Tensor

SMALL = "SmolLM2-135M"


def wrong(name: str, listed: list[Tensor] | None = None, **changes: Any) -> dict[str, str]:
    """Key and expectation of every contradiction of an architecture whose configuration is changed; None removes."""
    config = {key: value for key, value in {**load(name)["config"], **changes}.items() if value is not None}
    return {each.key: each.expected for each in contradictions(config, tensors(name) if listed is None else listed)}


@pytest.mark.parametrize("name", NAMES)
def test_no_published_checkpoint_is_refused(name: str) -> None:
    assert wrong(name) == {}


@pytest.mark.parametrize(
    ("changes", "key", "expected"),
    [
        # vLLM refuses these once it has the GPU; of the embedding with an AssertionError that says nothing.
        ({"num_hidden_layers": 20}, "num_hidden_layers", "30: the tensors are layers 0 to 29"),
        ({"num_hidden_layers": 32}, "num_hidden_layers", "layers 0 to 29, and none of 30, 31"),
        ({"vocab_size": 49000}, "vocab_size", "49152: model.embed_tokens.weight is 49152 x 576"),
        ({"vocab_size": 49280}, "vocab_size", "49152"),
        ({"hidden_size": 1152}, "hidden_size", "576"),
        ({"num_key_value_heads": 9}, "num_key_value_heads, head_dim", "192: model.layers.0.self_attn.k_proj.weight"),
        # With these it runs, and answers with nonsense or nothing.
        ({"intermediate_size": 1024}, "intermediate_size", "1536: model.layers.0.mlp.gate_proj.weight is 1536 x 576"),
        ({"num_attention_heads": 3, "head_dim": 64}, "num_attention_heads, head_dim", "576"),
        ({"num_attention_heads": 9, "head_dim": 32}, "num_attention_heads, head_dim", "576"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings", "true: no tensor lm_head"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings", "true: no tensor lm_head"),
        ({"attention_bias": True}, "attention_bias", "without biases: there is no tensor self_attn.q_proj.bias"),
        ({"mlp_bias": True}, "mlp_bias", "mlp.gate_proj.bias"),
        ({"model_type": "qwen2"}, "model_type", "self_attn.q_proj.bias"),
    ],
)
def test_what_contradicts_the_tensors(changes: dict[str, Any], key: str, expected: str) -> None:
    found = wrong(SMALL, **changes)
    assert expected in found[key], found


@pytest.mark.parametrize(
    ("name", "changes", "key"),
    [
        ("Qwen3-30B-A3B", {"num_experts": 64}, "num_experts"),
        ("Qwen3-30B-A3B", {"moe_intermediate_size": 512}, "moe_intermediate_size"),
        ("Mixtral-8x7B-v0.1", {"num_local_experts": 16}, "num_local_experts"),
        ("Mixtral-8x7B-v0.1", {"intermediate_size": 7168}, "intermediate_size"),
        ("DeepSeek-V2-Lite", {"n_routed_experts": 66}, "n_routed_experts"),
        ("Qwen3-32B-FP8", {"num_attention_heads": 32}, "num_attention_heads, head_dim"),
        ("Qwen3-32B-FP8", {"num_hidden_layers": 65}, "num_hidden_layers"),
        ("Qwen2-7B-Instruct-AWQ", {"num_hidden_layers": 27}, "num_hidden_layers"),
        ("Meta-Llama-3.1-8B-bnb-4bit", {"vocab_size": 128000}, "vocab_size"),
        ("gpt2", {"n_layer": 11}, "n_layer"),
        ("gpt2", {"n_embd": 1024}, "n_embd"),
        ("falcon-7b", {"num_hidden_layers": 33}, "num_hidden_layers"),
    ],
)
def test_other_architectures(name: str, changes: dict[str, Any], key: str) -> None:
    assert list(wrong(name, **changes)) == [key]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        # Layers that predict further tokens, also where the key that counts them is another one.
        ("DeepSeek-V3", {"num_nextn_predict_layers": None, "num_mtp_modules": 1}),
        # What the class of the configuration fills in says nothing.
        (SMALL, {"num_attention_heads": None, "num_key_value_heads": None, "intermediate_size": None}),
        ("gemma-2b", {"head_dim": None}),
        ("Qwen3-0.6B", {"head_dim": None}),
        ("gemma-2b", {"tie_word_embeddings": None}),
        # Embeddings of another size than the model's, by a key that says so.
        ("gpt2", {"padded_vocab_size": 50257, "vocab_size": 50000}),
        ("opt-6.7b", {"word_embed_proj_dim": 4096, "hidden_size": 8192}),
        # Packed tensors have other shapes.
        ("Qwen2-7B-Instruct-GPTQ-Int4", {"num_attention_heads": 14}),
        ("Llama-2-13b-hf", {"is_encoder_decoder": True, "num_hidden_layers": 12}),
        # Every layer has its own widths.
        ("Llama-3.1-70B", {"block_configs": [{}], "intermediate_size": 1024}),
    ],
)
def test_what_only_looks_like_a_contradiction(name: str, changes: dict[str, Any]) -> None:
    assert wrong(name, **changes) == {}


def test_a_vision_tower_s_layers_are_not_the_model_s() -> None:
    assert list(wrong("gemma-3-4b-it", text_config={"num_hidden_layers": 27, "model_type": "gemma3_text"})) == [
        "num_hidden_layers"
    ]


def test_two_language_models_in_one_checkpoint_are_left_alone() -> None:
    talker = [Tensor(f"talker.{name}", *rest) for name, *rest in tensors(SMALL)]
    assert wrong(SMALL, tensors(SMALL) + talker, num_hidden_layers=7) == {}


def test_a_weight_that_one_layer_lacks() -> None:
    lost = [tensor for tensor in tensors(SMALL) if tensor.name != "model.layers.7.mlp.up_proj.weight"]
    (found,) = contradictions(load(SMALL)["config"], lost)
    assert found.found == "no tensor model.layers.7.mlp.up_proj.weight"


def test_the_message_names_file_key_found_expected_and_mend() -> None:
    config = {**load(SMALL)["config"], "vocab_size": 49000, "intermediate_size": 1024}
    with pytest.raises(ModelError) as caught:
        check(config, tensors(SMALL), "checkpoints/final/config.json")
    text = str(caught.value)
    assert "vLLM would fail, or score another model" in text
    for key in ("vocab_size", "intermediate_size"):
        assert re.search(rf"checkpoints/final/config\.json: {key}\n  found: .*\n  expected: .*\n  mend: ", text), text

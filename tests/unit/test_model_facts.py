"""Facts of checkpoints: public ones by their configuration and tensors, and headers of real files on disk."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from architecture_data import NAMES, facts, load, tensors

from reproval.folders import FolderError, check_model_folder
from reproval.memory_model import GIB, cache_bytes_per_token, weights_bytes
from reproval.model_cache import cache_groups, layer_kinds
from reproval.model_config import text_config
from reproval.model_facts import facts_of, is_tied, read_config
from reproval.model_tensors import ModelError, Tensor, read_header, read_tensors
from reproval.records import ModelFacts
from reproval.time_model import active_parameters


@pytest.mark.parametrize("name", NAMES)
def test_published_sizes(name: str) -> None:
    """Parameters as published (the file says where), and cache bytes worked out by hand."""
    expected, found = load(name), facts(name)
    assert found.parameters == expected["parameters"], expected["parameters_source"]
    assert cache_bytes_per_token(found, "bfloat16") == expected["cache_bytes_per_token"]
    assert sum(group.state_bytes for group in found.cache) == expected.get("state_bytes", 0)
    windows = [group.window_tokens for group in found.cache if group.kind == "sliding"]
    assert windows == ([expected["window"]] if "window" in expected else [])


def test_enough_architectures() -> None:
    assert len({facts(name).architecture for name in NAMES}) >= 20


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen3-30B-A3B", 3.3),  # model card
        ("Mixtral-8x7B-v0.1", 12.9),  # announcement, mistral.ai, 2023-12-11
        ("DeepSeek-V3", 37),  # arXiv:2412.19437
        ("OLMoE-1B-7B-0924", 1.3),  # arXiv:2409.02060
        ("Jamba-v0.1", 12),  # arXiv:2403.19887
        ("Qwen3-4B", 4.02),  # dense: all of them
        (
            "gemma-3-4b-it",
            0.675 + 3.209,
        ),  # embedding and the rest, without the vision encoder; arXiv:2503.19786, table 1
    ],
)
def test_active_parameters(name: str, billions: float) -> None:
    assert active_parameters(facts(name)) / 1e9 == pytest.approx(billions, rel=0.03)


def test_towers_for_images_count_for_the_size_and_take_no_memory() -> None:
    found = facts("gemma-3-4b-it")
    assert found.tower_parameters / 1e9 == pytest.approx(0.417, rel=0.01), "arXiv:2503.19786, table 1"
    text = found.parameters - found.tower_parameters
    assert weights_bytes(found, "bfloat16", None) == found.checkpoint_bytes == 2 * text
    assert weights_bytes(found, "bfloat16", "fp8") < 2 * text
    content = load("gemma-3-4b-it")
    alone = {key: value for key, value in content["config"].items() if key != "vision_config"}
    assert facts_of(alone, tensors("gemma-3-4b-it")).tower_parameters == 0, "names alone are no reason"


def test_a_maximum_that_a_nested_configuration_leaves_out_is_its_class_s() -> None:
    assert facts("gemma-3-4b-it").max_position_embeddings == 131072


def test_what_a_configuration_does_not_say() -> None:
    assert facts("gpt2").intermediate_size == 3072, "four times the hidden size"
    assert facts("mamba-2.8b-hf").max_position_embeddings == 2**20, "no positions, so no end of them"
    several = facts_of(SHAPES | {"intermediate_size": [16, 64, 32]}, [])
    assert several.intermediate_size == 64, "Gemma 3n has one for each layer; the widest takes the most"


def test_layers_of_hybrids() -> None:
    assert [(g.kind, g.layers) for g in facts("gemma-3-4b-it").cache] == [("full", 5), ("sliding", 29)]
    assert [(g.kind, g.layers) for g in facts("gpt-oss-20b").cache] == [("full", 12), ("sliding", 12)]
    assert [(g.kind, g.layers) for g in facts("Jamba-v0.1").cache] == [("full", 4), ("state", 28)]
    assert [(g.kind, g.layers) for g in facts("Nemotron-H-56B-Base-8K").cache] == [("full", 10), ("state", 54)]
    assert [g.kind for g in facts("mamba-2.8b-hf").cache] == ["state"]


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        ({"num_hidden_layers": 2, "sliding_window": 64, "use_sliding_window": False}, ["full", "full"]),
        # Llama 4: vLLM turns its hybrid cache off.
        ({"num_hidden_layers": 2, "layer_types": ["chunked_attention", "full_attention"]}, ["full", "full"]),
        (
            {"num_hidden_layers": 3, "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2},
            ["full", "full", "sliding"],
        ),
        (
            {"num_hidden_layers": 4, "hybrid_layer_pattern": [0, 1, 1, 0], "sliding_window": 8},
            "full sliding sliding full",
        ),
        (
            {
                "model_type": "kimi_linear",
                "num_hidden_layers": 2,
                "linear_attn_config": {"kda_layers": [1]},
                "kv_lora_rank": 8,
            },
            ["state", "mla"],
        ),
        # MiniCPM3 has the latent's key, but vLLM caches its full keys and values.
        ({"model_type": "minicpm3", "num_hidden_layers": 2, "kv_lora_rank": 256}, ["full"] * 2),
        ({"model_type": "deepseek_v3", "num_hidden_layers": 2, "kv_lora_rank": 512}, ["mla"] * 2),
        ({"num_hidden_layers": 3, "attn_layer_indices": [1]}, ["state", "full", "state"]),
        ({"num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"]}, ["state", "full", "state"]),
        ({"num_hidden_layers": 2, "model_type": "falcon_h1"}, ["full", "state"] * 2),
        ({"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3, "num_kv_shared_layers": 1}, ["full", "full"]),
        ({"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, ["state", "full"]),
        # Jamba: every second layer, from the second on; Qwen3-Next: every fourth.
        ({"num_hidden_layers": 5, "attn_layer_period": 2, "attn_layer_offset": 1}, "state full state full state"),
        ({"num_hidden_layers": 5, "full_attention_interval": 4}, "state state state full state"),
        ({"num_hidden_layers": 3, "sliding_window": 8, "sliding_window_pattern": 3}, "sliding sliding full"),
        ({"num_hidden_layers": 3, "sliding_window": 8, "model_type": "gemma2"}, "sliding full sliding"),
        (
            {"num_hidden_layers": 5, "sliding_window": 8, "model_type": "cohere2"},
            "sliding sliding sliding full sliding",
        ),
        ({"layers_block_type": ["mamba", "moe", "attention", "mlp"]}, "state none full none"),
        ({"num_hidden_layers": 2, "model_type": "mamba2"}, ["state"] * 2),
        ({"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}, ["state", "full"]),
        # A window that is not there; with one, the same layers slide.
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": None}, ["full", "full"]),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}, ["sliding", "full"]),
        # LongCat-Flash: two attentions a layer, which num_hidden_layers counts where it is given.
        (
            {"model_type": "longcat_flash", "num_layers": 2, "num_hidden_layers": 4, "kv_lora_rank": 512},
            ["mla"] * 4,
        ),
    ],
)
def test_layer_kinds(config: dict[str, Any], kinds: list[str] | str) -> None:
    assert layer_kinds(config) == (kinds.split() if isinstance(kinds, str) else kinds)


def test_heads_that_differ_from_layer_to_layer() -> None:
    config = {
        "model_type": "nemotron-nas",
        "num_hidden_layers": 3,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "vocab_size": 10,
        "block_configs": [{"attention": {"n_heads_in_group": n}} for n in (8, None, 2)],
    }
    found = facts_of(config, [Tensor("model.embed_tokens.weight", "BF16", (10, 64))])
    assert [(g.kind, g.layers, g.elements_per_token) for g in found.cache] == [("full", 2, 2 * 8 * (1 + 4))]


@pytest.mark.parametrize(
    ("config", "per_layer"),
    [
        # Falcon-7B: one head of keys and values, although it has 71 of queries.
        ({"n_layer": 1, "hidden_size": 4544, "n_head": 71, "multi_query": True}, 2 * 64),
        # Falcon-40B: eight, under either name of its configuration.
        (
            {"num_hidden_layers": 1, "hidden_size": 8192, "num_attention_heads": 128, "multi_query": True,
             "new_decoder_architecture": True, "num_kv_heads": 8},
            2 * 8 * 64,
        ),
        ({"n_layer": 1, "hidden_size": 8192, "n_head": 128, "n_head_kv": 8}, 2 * 8 * 64),
        # DBRX.
        ({"n_layers": 1, "d_model": 6144, "n_heads": 48, "attn_config": {"kv_n_heads": 8}}, 2 * 8 * 128),
        # ChatGLM2-6B.
        (
            {"num_layers": 1, "hidden_size": 4096, "num_attention_heads": 32, "multi_query_group_num": 2,
             "kv_channels": 128},
            2 * 2 * 128,
        ),
        # Step-3.5.
        (
            {"num_hidden_layers": 1, "hidden_size": 4096, "num_attention_heads": 64, "num_attention_groups": 8,
             "head_dim": 128},
            2 * 8 * 128,
        ),
        # MiniCPM3: the heads of queries and keys are their two parts.
        (
            {"model_type": "minicpm3", "num_hidden_layers": 1, "hidden_size": 2560, "num_attention_heads": 40,
             "num_key_value_heads": 40, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32},
            2 * 40 * 96,
        ),
    ],
)  # fmt: skip
def test_key_value_heads_under_their_several_names(config: dict[str, Any], per_layer: int) -> None:
    assert [group.elements_per_token for group in cache_groups(config)] == [per_layer]


@pytest.mark.parametrize(
    ("config", "experts", "chosen"),
    [
        # ERNIE-4.5: its own name; its sibling for images has one number for text and one for images.
        ({"moe_num_experts": 64, "moe_k": 6}, 64, 6),
        ({"moe_num_experts": [64, 64], "moe_k": 6}, 64, 6),
        # HunYuan: one for each layer.
        ({"num_experts": 64, "moe_topk": [8, 8, 4]}, 64, 8),
        ({"moe_k": 6}, 0, 0),
    ],
)
def test_experts_under_their_several_names_and_forms(config: dict[str, Any], experts: int, chosen: int) -> None:
    found = facts_of(SHAPES | config, [])
    assert (found.experts, found.experts_per_token) == (experts, chosen)


def test_layers_of_two_kinds_may_have_heads_of_their_own() -> None:
    common = {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4,
              "head_dim": 16, "sliding_window": 32}  # fmt: skip
    kinds = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}
    wide = cache_groups(common | kinds | {"global_head_dim": 48, "num_global_key_value_heads": 2})
    assert [group.elements_per_token for group in wide] == [2 * 2 * 48, 2 * 2 * 4 * 16]
    pattern = {"hybrid_layer_pattern": [0, 1, 1], "swa_num_key_value_heads": 8, "swa_head_dim": 12}
    assert [group.elements_per_token for group in cache_groups(common | pattern)] == [2 * 4 * 16, 2 * 2 * 8 * 12]


@pytest.mark.parametrize(
    ("outer", "inner", "head", "tied"),
    [
        ({"tie_word_embeddings": True}, {}, "lm_head.weight", True),
        ({"tie_word_embeddings": False}, {"model_type": "gemma"}, None, False),
        ({}, {"tie_word_embeddings": True}, "lm_head.weight", True),
        ({}, {"tie_word_embeddings": False}, None, False),
        # Nobody says: what is stored does, but for types that tie all the same.
        ({}, {}, None, True),
        ({}, {}, "lm_head.weight", False),
        ({}, {}, "gpt_neox.embed_out.weight", False),
        ({}, {}, "transformer.output_layer.weight", False),
        ({}, {"model_type": "gemma"}, "lm_head.weight", True),
    ],
)
def test_who_says_that_embeddings_are_tied(
    outer: dict[str, Any], inner: dict[str, Any], head: str | None, tied: bool
) -> None:
    stored = [Tensor(name, "BF16", (2, 2)) for name in ("model.embed_tokens.weight", head) if name]
    assert is_tied(outer, inner, stored) == tied


@pytest.mark.parametrize(
    "nest",
    [
        lambda text: {"text_config": text},
        lambda text: {"llm_config": text},
        lambda text: {"language_config": text},
        # Qwen's omni models nest twice.
        lambda text: {"thinker_config": {"model_type": "qwen3_omni_moe_thinker", "text_config": text}},
    ],
)
def test_the_language_model_is_found_where_a_multimodal_configuration_has_it(nest: Any) -> None:
    text = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 128, "num_attention_heads": 4,
            "quantization_config": {"quant_method": "fp8"}}  # fmt: skip
    outer = {"model_type": "outer", "hidden_size": 9, "num_hidden_layers": 1, "vocab_size": 1, **nest(text)}
    found = facts_of(outer, [Tensor("language_model.model.embed_tokens.weight", "BF16", (128, 64))])
    assert (found.layers, found.hidden_size, found.vocab_size, found.model_type) == (2, 64, 128, "outer")
    assert text_config(outer)["model_type"], "which decides how its layers keep state"
    assert found.quantization == "fp8"


def test_layers_that_only_a_pattern_counts() -> None:
    pattern = {"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-"}
    assert layer_kinds(pattern) == ["state", "none", "state", "full", "none"]
    found = facts_of(pattern | {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 128, "mamba_num_heads": 4,
                                "mamba_head_dim": 16}, [])  # fmt: skip
    assert found.layers == 5


@pytest.mark.parametrize(
    ("config", "state_bytes"),
    [
        # LFM2-1.2B: the last two inputs of a convolution.
        ({"layer_types": ["conv"], "hidden_size": 2048, "conv_L_cache": 3}, 2 * 2048 * 2),
        # Kimi-Linear-48B: three inputs of queries, keys and values each, and a float32 state.
        (
            {"linear_attn_config": {"kda_layers": [1], "num_heads": 32, "head_dim": 128, "short_conv_kernel_size": 4}},
            3 * 3 * 4096 * 2 + 32 * 128 * 128 * 4,
        ),
        # Mamba with a width of its own.
        (
            {"model_type": "mamba", "hidden_size": 2560, "intermediate_size": 5000, "state_size": 16, "conv_kernel": 4},
            5000 * 3 * 2 + 5000 * 16 * 2,
        ),
        # Falcon-H1-0.5B: the width is given, and the heads divide it.
        (
            {"model_type": "falcon_h1", "hidden_size": 1024, "num_attention_heads": 8, "mamba_d_ssm": 1536,
             "mamba_n_heads": 24, "mamba_d_head": "auto", "mamba_d_state": 128, "mamba_n_groups": 1},
            (1536 + 2 * 128) * 3 * 2 + 24 * 64 * 128 * 2,
        ),
        # The same in float32.
        (
            {"model_type": "falcon_h1", "hidden_size": 1024, "num_attention_heads": 8, "mamba_d_ssm": 1536,
             "mamba_n_heads": 24, "mamba_d_state": 128, "mamba_n_groups": 1, "torch_dtype": "float32"},
            (1536 + 2 * 128) * 3 * 4 + 24 * 64 * 128 * 4,
        ),
    ],
)  # fmt: skip
def test_the_state_of_a_layer(config: dict[str, Any], state_bytes: int) -> None:
    """By the shapes of MambaStateShapeCalculator (vllm/model_executor/layers/mamba/mamba_utils.py), in 16 bit."""
    groups = cache_groups({"num_hidden_layers": 1, **config})
    assert [group.state_bytes for group in groups if group.kind == "state"] == [state_bytes]


def test_a_tensor_that_two_files_have_counts_once() -> None:
    twice = [*tensors("Qwen3-0.6B"), *tensors("Qwen3-0.6B")[:5]]
    assert facts_of(load("Qwen3-0.6B")["config"], twice) == facts("Qwen3-0.6B")


def test_scales_that_were_quantized_a_second_time_are_loaded_as_float32() -> None:
    """One byte for 64 weights becomes four: 6,979,321,856 weights in linear layers."""
    twice = facts("Meta-Llama-3.1-8B-bnb-4bit")
    assert twice.nested_absmax_elements == 6_979_321_856 // 64
    stored = twice.model_copy(update={"nested_absmax_elements": 0})
    more = weights_bytes(twice, "bfloat16", None) - weights_bytes(stored, "bfloat16", None)
    assert more == 3 * 6_979_321_856 // 64
    assert facts("Qwen2-7B-Instruct-AWQ").nested_absmax_elements == 0
    # That is what quantizing the 16-bit checkpoint of the same shapes while loading makes.
    made = weights_bytes(facts("Meta-Llama-3-8B"), "bfloat16", "bitsandbytes")
    assert made == pytest.approx(weights_bytes(twice, "bfloat16", None), rel=0.001)


def test_weights_in_memory() -> None:
    # Measured on an H100: 7.56 GiB in bfloat16 and 4.19 GiB with fp8.
    qwen = facts("Qwen3-4B")
    assert weights_bytes(qwen, "bfloat16", None) / GIB == pytest.approx(7.56, rel=0.02)
    assert weights_bytes(qwen, "bfloat16", "fp8") / GIB == pytest.approx(4.19, rel=0.03)
    assert weights_bytes(qwen, "bfloat16", None, 2) == math.ceil(weights_bytes(qwen, "bfloat16", None) / 2)
    # A float32 checkpoint takes half of its files when it is loaded in 16 bit.
    olmo = facts("OLMo-2-1124-13B")
    assert olmo.checkpoint_dtype == "float32"
    assert weights_bytes(olmo, "bfloat16", None) * 2 == olmo.checkpoint_bytes == weights_bytes(olmo, "float32", None)
    # What is quantized already takes what it stores, whatever is asked for.
    for name, method, gigabytes in [
        ("Qwen2-7B-Instruct-AWQ", "awq", 5.6),
        ("Qwen2-7B-Instruct-GPTQ-Int4", "gptq", 5.6),
        ("Meta-Llama-3.1-70B-Instruct-quantized.w4a16", "compressed-tensors", 39.5),
        ("Meta-Llama-3.1-8B-bnb-4bit", "bitsandbytes", 6.03),
        ("Qwen3-32B-FP8", "fp8", 34.3),
        ("gpt-oss-20b", "mxfp4", 13.8),
    ]:
        assert facts(name).quantization == method
        assert weights_bytes(facts(name), "bfloat16", None) / 1e9 == pytest.approx(gigabytes, rel=0.01)
    # Its 16-bit tensors, 1,558,406,144 elements of embeddings, norms and scales, are cast all the same.
    fp8 = facts("Qwen3-32B-FP8")
    assert weights_bytes(fp8, "float32", None) - weights_bytes(fp8, "bfloat16", None) == 2 * 1_558_406_144


def test_tied_embeddings_count_once() -> None:
    stored, counted = tensors("Qwen3-0.6B"), facts("Qwen3-0.6B")
    assert sum(tensor.elements for tensor in stored) == 751_632_384
    assert counted.tied_embeddings
    assert counted.checkpoint_bytes == 2 * 596_049_920
    untied = facts_of({**load("Qwen3-0.6B")["config"], "tie_word_embeddings": False}, stored)
    assert untied.parameters == 751_632_384


def test_embeddings_are_not_quantized() -> None:
    llama = facts("Meta-Llama-3-8B")
    assert llama.parameters - llama.linear_parameters == 2 * 128256 * 4096 + (2 * 32 + 1) * 4096


def test_soft_capping_is_seen() -> None:
    assert facts("gemma-2-9b").soft_caps_logits
    assert not facts("gemma-3-1b-it").soft_caps_logits


def test_nested_configuration_is_found() -> None:
    assert text_config(load("gemma-3-4b-it")["config"])["hidden_size"] == 2560
    assert facts("gemma-3-4b-it").vocab_size == 262208


def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(ModelError, match="not known"):
        facts_of({"model_type": "new"}, [Tensor("w", "BF16", (2, 2))])


@pytest.mark.parametrize(
    "form",
    [
        {"sliding_window": 8, "sliding_window_pattern": "LLLG"},
        {"num_key_value_heads": [2]},
        {"block_configs": [{}]},
        {"linear_attn_config": [1]},
    ],
)
def test_a_value_that_is_not_understood_is_no_traceback(form: dict[str, Any]) -> None:
    with pytest.raises(
        ModelError, match=r"config\.json: a value could not be understood: \w+Error: .*model_type 'new'"
    ):
        facts_of(SHAPES | form | {"model_type": "new"}, [])


@pytest.mark.parametrize(
    ("lengths", "longest"),
    [
        ({"n_positions": 512, "max_position_embeddings": 1024}, 512),
        ({"seq_length": 512, "max_seq_len": 256, "seq_len": 1024}, 256),
        ({"max_sequence_length": 512}, 512),
        ({"max_seq_length": 512}, 512),
        # Command-R: it goes before a smaller one.
        ({"max_position_embeddings": 8192, "model_max_length": 131072}, 131072),
        # Not among vLLM's names.
        ({"n_ctx": 512}, 2**20),
        # Falcon-7B names none: its class has one.
        ({"model_type": "falcon"}, 2048),
        ({"model_type": "falcon", "max_position_embeddings": 8192}, 8192),
    ],
)
def test_the_longest_sequence_is_that_of_vllm_s_rule(lengths: dict[str, Any], longest: int) -> None:
    assert facts_of(SHAPES | lengths, []).max_position_embeddings == longest


SHAPES = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 16}


def test_an_unknown_storage_dtype_is_refused() -> None:
    with pytest.raises(ModelError, match="tensor w: storage dtype 'F6' is not known"):
        facts_of(SHAPES, [Tensor("w", "F6", (2, 2))])


def test_scales_are_parameters_where_nothing_is_quantized() -> None:
    tensors = [Tensor("model.embed_tokens.weight", "BF16", (16, 8)), Tensor("model.layers.0.layer_scale", "BF16", (8,))]
    assert facts_of(SHAPES, tensors).parameters == 16 * 8 + 8
    assert facts_of(SHAPES | {"quantization_config": {"quant_method": "fp8"}}, tensors).parameters == 16 * 8


@pytest.mark.parametrize("key", ["bits", "w_bit"])
def test_packed_weights_are_unpacked_under_either_name_of_their_bits(key: str) -> None:
    config = SHAPES | {"quantization_config": {"quant_method": "awq", key: 4}}
    assert facts_of(config, [Tensor("model.layers.0.mlp.up_proj.qweight", "I32", (8, 2))]).parameters == 8 * 16


def test_the_dtype_is_the_language_model_s_own_then_the_configuration_s_then_that_of_most_weights() -> None:
    weights = [Tensor("model.embed_tokens.weight", "F16", (16, 8)), Tensor("model.norm.weight", "F32", (8,))]

    def dtype(outer: dict[str, Any], inner: dict[str, Any]) -> str | None:
        return facts_of(outer | {"text_config": SHAPES | inner}, weights).checkpoint_dtype

    assert dtype({"torch_dtype": "float32"}, {"dtype": "bfloat16"}) == "bfloat16"
    assert dtype({"torch_dtype": "torch.float32"}, {}) == "float32"
    assert dtype({}, {}) == "float16"


# --- files ---------------------------------------------------------------------------------------------------------

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8,
          "num_attention_heads": 2, "vocab_size": 16, "intermediate_size": 8, "tie_word_embeddings": False}  # fmt: skip


def write_safetensors(path: Path, entries: dict[str, tuple[str, list[int], int]]) -> None:
    """A safetensors file of zeros. `entries`: name -> dtype, shape, bytes."""
    header, place = {}, 0
    for name, (dtype, shape, size) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(place))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write_safetensors(tmp_path / "model-1.safetensors", {"model.embed_tokens.weight": ("BF16", [16, 8], 256)})
    write_safetensors(tmp_path / "model-2.safetensors", {"lm_head.weight": ("BF16", [16, 8], 256)})
    weight_map = {"model.embed_tokens.weight": "model-1.safetensors", "lm_head.weight": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def read_model(folder: Path) -> ModelFacts:
    return facts_of(read_config(folder), read_tensors(folder))


def test_shards_of_the_index_and_no_other_file(checkpoint: Path) -> None:
    write_safetensors(checkpoint / "consolidated.safetensors", {"again": ("BF16", [16, 8], 256)})
    found = read_model(checkpoint)
    assert (found.parameters, found.checkpoint_bytes, found.checkpoint_dtype) == (256, 512, "bfloat16")


def test_one_file_without_index(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").unlink()
    assert read_model(checkpoint).parameters == 256


@pytest.mark.parametrize(
    ("again", "told"),
    [
        ("model.safetensors", "model-2.safetensors and model.safetensors both hold lm_head.weight"),
        ("consolidated.safetensors", "remove consolidated.safetensors"),
    ],
)
def test_weights_that_lie_there_twice_are_refused_where_no_index_tells_which_count(
    checkpoint: Path, again: str, told: str
) -> None:
    """vLLM loads both, one over the other."""
    write_safetensors(checkpoint / again, {"lm_head.weight": ("BF16", [16, 8], 256)})
    assert read_model(checkpoint).parameters == 256
    (checkpoint / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=told):
        read_model(checkpoint)


def test_quantization_in_a_file_beside_the_configuration(checkpoint: Path) -> None:
    (checkpoint / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    write_safetensors(
        checkpoint / "model-2.safetensors",
        {"lm_head.weight": ("BF16", [16, 8], 256), "model.layers.0.mlp.up_proj.weight": ("U8", [8, 4], 32),
         "model.layers.0.mlp.up_proj.weight_scale": ("F8_E4M3", [8, 1], 8)},
    )  # fmt: skip
    found = read_model(checkpoint)
    assert found.quantization == "nvfp4"
    assert found.parameters == 256 + 64


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    (checkpoint / "model-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-2\.safetensors: cannot be read"):
        read_model(checkpoint)


def test_no_weights_at_all(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ModelError, match=r"has no \*\.safetensors file"):
        read_model(tmp_path)


@pytest.mark.parametrize("content", [None, "", "[1]", "{"])
def test_damaged_configuration(checkpoint: Path, content: str | None) -> None:
    path = checkpoint / "config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_model(checkpoint)


def _header(text: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + body


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, shorter"),
        (b"1234567", "7 bytes, shorter"),
        (_header(b"{}", length=2**60), "header of 1152921504606846976 bytes in a file of 10 bytes"),
        (_header(b'{"a"'), "not JSON"),
        (_header(b"\xff\xfe{}"), "not JSON"),
        (_header(b"[]"), "not an object"),
        (_header(b'{"a": {"dtype": "BF16"}}'), "tensor a lacks"),
        (_header(b'{"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}', b"1234"), "ends 4 bytes behind"),
        (_header(b'{"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 4]}}', b"1234"), "has 4 bytes for"),
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("dtype", ["F7", ["BF16"], None])
def test_a_storage_dtype_that_is_none_is_named(checkpoint: Path, dtype: Any) -> None:
    header = json.dumps({"lm_head.weight": {"dtype": dtype, "shape": [2], "data_offsets": [0, 4]}})
    (checkpoint / "model-2.safetensors").write_bytes(_header(header.encode(), b"1234"))
    with pytest.raises(ModelError, match=r"tensor lm_head\.weight: storage dtype .* is not known"):
        read_model(checkpoint)


@pytest.mark.parametrize("place", [["0", "4"], [None, None], [0, None], "04", {"0": 0, "4": 4}, [-4, 0], [4, 0], [4]])
def test_a_tensor_without_a_place_is_no_fault_of_the_program(tmp_path: Path, place: Any) -> None:
    path = tmp_path / "model.safetensors"
    entry = {"dtype": "BF16", "shape": [2], "data_offsets": place}
    path.write_bytes(_header(json.dumps({"a": entry}).encode(), b"1234"))
    with pytest.raises(ModelError, match="tensor a lacks dtype, shape or data_offsets"):
        read_header(path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(FolderError, match=r"model\.safetensors"):
        check_model_folder(tmp_path)


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        # LLaMA-2-7B-32K.
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, 32768),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 8192),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0}}}, 16384),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 4096),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 4096),
        ({"rope_scaling": {"type": "su", "long_factor": [1.0], "short_factor": [1.0]}}, 4096),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, 4096),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "model_type": "gemma3_text"}, 4096),
        ({"rope_scaling": None}, 4096),
    ],
)
def test_rotary_scaling_stretches_the_maximum_as_in_vllm(scaling: dict[str, Any], longest: int) -> None:
    config = load("Llama-2-13b-hf")["config"] | {"max_position_embeddings": 4096} | scaling
    assert facts_of(config, tensors("Llama-2-13b-hf")).max_position_embeddings == longest

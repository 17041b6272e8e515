"""From llama.cpp's tensors to transformers'."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reproval import demo_model


def test_unpermute_undoes_what_llama_cpp_did() -> None:
    heads, head_dim, hidden = 3, 8, 5
    original = np.arange(heads * head_dim * hidden).reshape(heads * head_dim, hidden)
    # LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py
    stored = original.reshape(heads, 2, head_dim // 2, hidden).swapaxes(1, 2).reshape(original.shape)
    assert not np.array_equal(stored, original)
    np.testing.assert_array_equal(demo_model.unpermute(stored, heads), original)


@pytest.mark.parametrize(
    ("gguf", "safetensors"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.29.attn_k.weight", "model.layers.29.self_attn.k_proj.weight"),
        ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
    ],
)
def test_tensor_names(gguf: str, safetensors: str) -> None:
    assert demo_model.tensor_name(gguf) == safetensors


def test_a_missing_package_is_told_with_the_mend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo_model.main([str(tmp_path / "model"), "--package", str(tmp_path)]) == 1
    assert "envs/install demo" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

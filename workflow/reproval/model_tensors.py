"""The tensors of a checkpoint: read from the headers of its safetensors files, and what they stand for.

safetensors: 8 bytes little-endian give the length of a JSON header, which gives every tensor's dtype, shape and place
(https://huggingface.co/docs/safetensors). No weights are read.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from reproval.folders import LONGEST_HEADER_BYTES, unread_weights
from reproval.records import TensorTotal

HEADERS = ".headers"
"""Folder beside a model's files with the headers of weights that are still on the Hub: NAME.json for each file NAME."""

ITEM_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
}  # fmt: skip
"""safetensors' names of storage dtypes."""


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


def read_tensors(folder: Path) -> list[Tensor]:
    """All tensors of a folder's safetensors files: those of the index if there is one. Raises ModelError.

    Of a file that is still on the Hub its header is enough.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index}: has no weight_map; download the checkpoint again") from error
    else:
        awaited = (path.stem for path in (folder / HEADERS).glob("*.safetensors.json"))
        names = sorted({*(path.name for path in folder.glob("*.safetensors")), *awaited})
        if again := sorted(unread_weights(names)):
            raise ModelError(
                f"{folder}: holds its weights twice and no {index.name}, so vLLM would load {', '.join(names)}; remove "
                f"{', '.join(again)}, or name a folder of links to the other files"
            )
    if not names:
        raise ModelError(f"{folder}: has no *.safetensors file; other weight formats are not planned for")
    found = [(name, tensor) for name in names for tensor in _tensors_of(folder, name)]
    if not index.exists():
        _refuse_twice(folder, found)
    return [tensor for _, tensor in found]


def _refuse_twice(folder: Path, found: list[tuple[str, Tensor]]) -> None:
    """Raise ModelError for a tensor in two files: without an index vLLM loads both, one over the other."""
    places: dict[str, str] = {}
    for name, tensor in found:
        if (other := places.setdefault(tensor.name, name)) != name:
            raise ModelError(
                f"{folder}: {other} and {name} both hold {tensor.name}, and no model.safetensors.index.json says which "
                "counts; remove the one that is not the model, or download the index too"
            )


def _tensors_of(folder: Path, name: str) -> list[Tensor]:
    awaited = folder / HEADERS / f"{name}.json"
    if awaited.exists() and not (folder / name).exists():
        return declared(read_json(awaited), awaited)
    return read_header(folder / name)


MEND = "download it again"


def read_header(path: Path) -> list[Tensor]:
    """Tensors that one safetensors file declares. Raises ModelError for a header that cannot be true."""
    damaged, mend = _damaged(path), MEND
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(8)
            if len(head) < 8:
                raise ModelError(f"{damaged}: {size} bytes, shorter than a header's length; {mend}")
            (length,) = struct.unpack("<Q", head)
            if length > min(size - 8, LONGEST_HEADER_BYTES):
                raise ModelError(f"{damaged}: header of {length} bytes in a file of {size} bytes; {mend}")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); {mend}") from error
    except ValueError as error:
        raise ModelError(f"{damaged}: its header is not JSON ({error}); {mend}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{damaged}: its header is not an object; {mend}")
    return declared(header, path, size - 8 - length)


def _damaged(path: Path) -> str:
    return f"{path}: damaged safetensors file"


def declared(header: dict[str, Any], path: Path, data_bytes: float = math.inf) -> list[Tensor]:
    """Tensors of a header that was read from `path`, behind which so many bytes follow. Raises ModelError."""
    damaged, mend = _damaged(path), MEND
    tensors = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            tensor = Tensor(name, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
            begin, end = entry["data_offsets"]
            if not 0 <= begin <= end:
                raise ValueError(f"data_offsets {begin} to {end}")
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{damaged}: tensor {name} lacks dtype, shape or data_offsets; {mend}") from error
        if end > data_bytes:
            raise ModelError(f"{damaged}: tensor {name} ends {end - data_bytes} bytes behind the file; {mend}")
        if tensor.dtype in ITEM_BITS and (end - begin) * 8 != tensor.elements * ITEM_BITS[tensor.dtype]:
            raise ModelError(f"{damaged}: tensor {name} has {end - begin} bytes for {tensor.shape} of {tensor.dtype}")
        tensors.append(tensor)
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); is this the folder of a model?") from error
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: is not a JSON object; download it again")
    return content


# --- what they stand for -------------------------------------------------------------------------------------------

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


def loaded(tensors: Iterable[Tensor], layers: int, speculative: bool) -> list[Tensor]:
    """Tensors that an engine keeps in memory: no stored masks and frequencies, no layers for speculative decoding.

    Those follow the `layers` of a model that has such at all, and are its module `mtp` in others.
    """

    def skipped(tensor: Tensor) -> bool:
        if _BUFFER.search(tensor.name):
            return True
        if len(tensor.shape) == 4 and re.search(r"\.(attn|attention)\.bias$", tensor.name):
            return True
        if re.match(r"(model\.)?mtp\.", tensor.name):
            return True
        layer = re.match(r"model\.layers\.(\d+)\.", tensor.name)
        return speculative and layer is not None and int(layer[1]) >= layers

    seen: dict[str, Tensor] = {}
    for tensor in tensors:
        if not skipped(tensor):
            seen.setdefault(tensor.name, tensor)
    return list(seen.values())


# What vLLM's models of images and sound build within `_mark_tower_model`, by its usual names. A tower by another name
# is counted as if it were loaded.
_TOWER = re.compile(
    r"(model\.)?(vision_tower|vision_model|vision_encoder|visual|audio_tower|multi_modal_projector|embed_vision"
    r"|embed_audio|vision_language_adapter|pre_mm_projector_norm|patch_merger)\."
)


def is_tower(name: str) -> bool:
    """Whether a tensor of a model that also takes images or sound is of no use for text."""
    return _TOWER.match(name) is not None


def stored_bytes(tensor: Tensor) -> int:
    if tensor.dtype not in ITEM_BITS:
        raise ModelError(f"tensor {tensor.name}: storage dtype {tensor.dtype!r} is not known")
    return -(-tensor.elements * ITEM_BITS[tensor.dtype] // 8)


def logical_elements(tensor: Tensor, bits: int | None, quantized: bool) -> int:
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


def is_linear(name: str) -> bool:
    return not (_EMBEDDING.search(name) or _NOT_LINEAR.search(name))


def is_expert(name: str) -> bool:
    return _EXPERT.search(name) is not None


def nested_absmax_elements(tensors: list[Tensor]) -> int:
    """Elements of byte-sized scales that have scales of their own (a tensor .nested_absmax beside .absmax)."""
    names = {tensor.name for tensor in tensors}
    return sum(
        tensor.elements
        for tensor in tensors
        if tensor.dtype == "U8"
        and tensor.name.endswith(".absmax")
        and tensor.name.removesuffix("absmax") + "nested_absmax" in names
    )


def totals(tensors: Iterable[Tensor]) -> list[TensorTotal]:
    groups: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return [
        TensorTotal(
            dtype=dtype,
            tensors=len(group),
            elements=sum(tensor.elements for tensor in group),
            size_bytes=sum(stored_bytes(tensor) for tensor in group),
        )
        for dtype, group in sorted(groups.items())
    ]

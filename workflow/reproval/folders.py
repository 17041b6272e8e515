"""Local folders of models and tasks: what is wrong with them, and an identity that does not depend on where they lie.

The identity of a model is read at every start of Snakemake, so it must not read hundreds of gigabytes. `stage` takes
the SHA-256 of every byte later; results are kept under that one.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn

from reproval.files import sha256_file, sha256_json

SMALL_BYTES = 16 * 1024**2
# Of a large file: this many samples, evenly spaced, so that new weights of the same shape are another model.
SAMPLES, SAMPLE_BYTES = 32, 4096
# safetensors refuses a longer header.
LONGEST_HEADER_BYTES = 100_000_000

TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class FolderError(Exception):
    """A local folder cannot be used. `found`, `expected` and `mend` are sentences for people."""

    def __init__(self, found: str, expected: str, mend: str) -> None:
        super().__init__(found)
        self.found, self.expected, self.mend = found, expected, mend


def resolve(path: str, workdir: Path, base: Path | None = None) -> Path:
    """Where a path of the configuration leads: from `workdir`, or from `base` if it is only there.

    Nothing is expanded (no ~, no $VARIABLE): in a container they would mean another place.
    """
    here = workdir / path
    if base is not None and kind_of(here) is None and kind_of(base / path) is not None:
        return base / path
    return here


def unexpanded(path: str) -> str | None:
    """The mend for a path that hopes to be expanded; None for any other."""
    if path.startswith("~") or "$" in path:
        return "write the whole path: ~ and $VARIABLES are not expanded, as they differ inside a container"
    return None


def kind_of(path: Path) -> Literal["folder", "file"] | None:
    """What is at a path; None also where it cannot be looked at, or where the path is none (too long, a NUL)."""
    try:
        return "folder" if stat.S_ISDIR(path.stat().st_mode) else "file"
    except (OSError, ValueError):
        return None


def walk(folder: Path) -> Iterator[Path]:
    """Regular files below a folder by name, without hidden ones and compiled Python; links to files are followed.

    Raises OSError for what cannot be read, a broken link included.
    """

    def stop(error: OSError) -> NoReturn:
        raise error

    for root, folders, files in os.walk(folder, onerror=stop):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(files):
            path = Path(root, name)
            if not name.startswith(".") and path.suffix != ".pyc" and stat.S_ISREG(path.stat().st_mode):
                yield path


def tree_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of all files of a folder of tasks. Raises OSError."""
    return sha256_json(sorted([path.relative_to(folder).as_posix(), sha256_file(path)] for path in walk(folder)))


def model_digest(folder: Path) -> str:
    """SHA-256 over names, sizes and contents of a model's files; of files of 16 MiB and more the safetensors header
    and evenly spaced samples stand for the content. Raises OSError.
    """
    return sha256_json(
        sorted([path.relative_to(folder).as_posix(), path.stat().st_size, _content(path)] for path in walk(folder))
    )


def sampled(folder: Path) -> list[Path]:
    """The files of a model that `model_digest` does not read whole. Raises OSError."""
    return [path for path in walk(folder) if path.stat().st_size >= SMALL_BYTES]


def _content(path: Path) -> str:
    size = path.stat().st_size
    if size < SMALL_BYTES:
        return sha256_file(path)
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        if path.suffix == ".safetensors":
            length = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(min(length, LONGEST_HEADER_BYTES)))
        for sample in range(SAMPLES):
            stream.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def check_model_folder(folder: Path) -> None:
    """Raise FolderError unless the folder holds config.json, a tokenizer, and whole safetensors files."""
    if kind_of(folder) is None:
        raise FolderError("nothing there", "an existing folder", "correct the path, or download the model to it")
    if kind_of(folder) == "file":
        raise FolderError("a file", "a folder with config.json, tokenizer and safetensors", "name the folder it is in")
    try:
        names = sorted(entry.name for entry in folder.iterdir())
        check_config(folder, names)
        _check_weights(folder, names)
        check_tokenizer(names)
        for _ in walk(folder):
            pass  # A link that leads nowhere, or a folder that may not be read.
    except OSError as error:
        raise FolderError(
            f"{Path(str(error.filename or folder)).name} cannot be read ({error.strerror})",
            "files that you may read",
            "correct the permissions or the broken link",
        ) from error


def _there(names: list[str], what: str) -> str:
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return f"{what}; there: {shown or 'nothing'}"


def check_tokenizer(names: list[str]) -> None:
    """Raise FolderError unless one of the names is a tokenizer's."""
    if not any(name in TOKENIZERS or name.endswith(".tiktoken") for name in names):
        raise FolderError(
            _there(names, "no tokenizer"),
            f"one of {', '.join(TOKENIZERS)} or *.tiktoken",
            "copy the tokenizer's files into the folder (tokenizer.save_pretrained writes them)",
        )


def check_config(folder: Path, names: list[str]) -> None:
    """Raise FolderError unless the folder holds the config.json of a whole model. Raises OSError.

    `names` are its files, of which weights may still be to come.
    """
    expected = "a config.json of a transformers model"
    weights = [name for name in names if name.endswith(".safetensors")]
    if "adapter_config.json" in names and all(name.startswith("adapter_") for name in weights):
        raise FolderError(
            "an adapter (adapter_config.json) without the model that it changes",
            "a whole model",
            "merge them: peft's model.merge_and_unload().save_pretrained(FOLDER), and the tokenizer's save_pretrained",
        )
    if "config.json" not in names:
        nested = next((name for name in names if kind_of(folder / name / "config.json") == "file"), None)
        raise FolderError(
            _there(names, "no config.json"),
            expected,
            f"name the folder {nested} inside it" if nested else "name the folder that save_pretrained wrote",
        )
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise FolderError("a config.json that is not a JSON object", expected, "copy the file again")


def model_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, empty if it cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def unread_weights(names: Iterable[str]) -> set[str]:
    """Safetensors files of a model that are not to be read; `names` are its files' paths within its folder.

    Those in folders below are other versions of it (gpt-oss has `original/`), and vLLM does not look there. Those named
    `consolidated*` hold the weights again in Mistral's own layout. Left to itself vLLM takes these, and Mistral's
    configuration and tokenizer with them (`is_mistral_model_repo`, vllm/transformers_utils/repo_utils.py); facts and
    requests are of the other ones.
    """
    weights = {name for name in names if name.endswith(".safetensors")}
    here = {name for name in weights if "/" not in name}
    again = {name for name in here if name.startswith("consolidated")}
    return weights - ((here - again) or here)


def _check_weights(folder: Path, names: list[str]) -> None:
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights:
        other = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".gguf", ".ckpt"))]
        raise FolderError(
            _there(names, "no safetensors"),
            "weights in one or more *.safetensors files",
            "convert them: load with transformers, then model.save_pretrained(FOLDER)"
            if other
            else "download the weights too",
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            wanted = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise FolderError(
                f"{index.name} without a weight_map", "the index that belongs to the shards", "copy the file again"
            ) from None
        missing = sorted(str(name) for name in wanted if name not in names)
        if missing:
            raise FolderError(
                f"{len(missing)} of {len(wanted)} shards missing, the first {missing[0]}",
                f"every file that {index.name} names",
                "download the rest",
            )
    for name in weights:
        _check_safetensors(folder / name)


def _check_safetensors(path: Path) -> None:
    """A cut-off download and a Git LFS pointer are found now, not when a GPU is held."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        if LFS_POINTER.startswith(start) and start:
            raise FolderError(
                f"{path.name} is a Git LFS pointer, not the weights", "the weights themselves", "run `git lfs pull`"
            )
        length = int.from_bytes(start, "little")
        header = stream.read(length) if 0 < length <= LONGEST_HEADER_BYTES else b""
    try:
        tensors = json.loads(header)
        ends = (entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__")
        whole = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise FolderError(
            f"{path.name} ({size} bytes) without a safetensors header", "a safetensors file", "download it again"
        ) from None
    if whole != size:
        raise FolderError(f"{path.name} has {size} bytes", f"{whole} bytes by its own header", "download it again")

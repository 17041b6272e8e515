"""Large files of the Hub, resumed where they broke.

huggingface_hub goes on after a broken connection inside one call, and since 2.0 throws away what had come when the call
ends. A job that is cut off in the hundredth gigabyte should not begin again, so what has come stays in a file of ours.
It is complete when its SHA-256 is the Hub's.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from reproval.files import NO_LOCKS, atomic, sha256_file
from reproval.model_tensors import HEADERS
from reproval.records import StoredFile

LARGE_BYTES = 10 * 2**20
"""The client writes pieces of this size; of a smaller file nothing is kept."""
AT_ONCE = 4
PARTS = ".parts"


class DownloadError(Exception):
    """A file could not be had, or is not what was promised."""


def fetch(repository: str, commit: str, wanted: Sequence[StoredFile], folder: Path) -> None:
    """Download these files into `folder`, each whole or not at all; those that are there already are left alone.

    Raises DownloadError, OSError and the client's own errors, with what has come kept in FOLDER/.parts.
    """
    missing = [file for file in wanted if not _is_there(folder / file.path, file)]
    if not missing:
        return
    parts = folder / PARTS
    parts.mkdir(parents=True, exist_ok=True)
    needed = sum(file.size_bytes - _come(parts, file) for file in missing)
    free = shutil.disk_usage(parts).free
    if needed > free:
        raise DownloadError(f"{folder}: {needed / 2**30:.1f} GiB are to come, and its disk has {free / 2**30:.1f} GiB")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for done in [pool.submit(_fetch_one, repository, commit, file, folder) for file in missing]:
            done.result()
    if not any(parts.iterdir()):
        parts.rmdir()


def fetch_headers(repository: str, commit: str, names: Sequence[str], folder: Path) -> None:
    """Read the headers of these safetensors files by range requests, into FOLDER/.headers, but of those that are there.

    Raises DownloadError, OSError and the client's own errors.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    def header(name: str) -> None:
        path = folder / HEADERS / f"{name}.json"
        if path.exists() or (folder / name).exists():
            return
        try:
            found = HfApi().parse_safetensors_file_metadata(repository, name, revision=commit)
        except SafetensorsParsingError as error:
            raise DownloadError(f"{name}: its header cannot be read: {error}") from error
        tensors = {
            tensor: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
            for tensor, info in found.tensors.items()
        }
        with atomic(path) as stream:
            json.dump(tensors, stream)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(header, names))


def _is_there(path: Path, file: StoredFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size_bytes


def _part(parts: Path, file: StoredFile) -> Path:
    return parts / f"{file.sha256}.part"


def _come(parts: Path, file: StoredFile) -> int:
    path = _part(parts, file)
    return path.stat().st_size if path.exists() else 0


def _fetch_one(repository: str, commit: str, file: StoredFile, folder: Path) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    part = _part(folder / PARTS, file)
    with part.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DownloadError(f"{part}: another process downloads it now; wait for its end") from error
        except OSError as error:
            # Without locks (Lustre without `flock`) nobody can be seen; the SHA-256 tells at the end.
            if error.errno not in NO_LOCKS:
                raise
        if stream.tell() > file.size_bytes:
            stream.truncate(0)
        if stream.tell() < file.size_bytes:
            url = hf_hub_url(repository, file.path, revision=commit)
            where = get_hf_file_metadata(url).location
            headers = build_hf_headers()
            if urlsplit(where).netloc != urlsplit(url).netloc:
                headers.pop("authorization", None)  # the token is for the Hub alone
            http_get(where, stream, resume_size=stream.tell(), headers=headers, expected_size=file.size_bytes)
    if sha256_file(part) != file.sha256:
        part.unlink()
        raise DownloadError(f"{folder / file.path}: what came is not what the Hub promised (SHA-256 differs)")
    (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
    part.replace(folder / file.path)

"""The stage `stage`: everything that needs the network, fetched once into the store and written down.

A model comes from the Hub at a commit, or lies in a local folder that is left where it is. Of a Hub's model the
manifest comes first, with the headers of large weights and what the Hub promises of them: so much is enough to plan.
The weights themselves are a second step. Data sets are fetched by letting lm-eval load every task with the caches
inside the store. Afterwards nothing needs the network.
"""

from __future__ import annotations

import argparse
import fcntl
import glob
import hashlib
import os
import re
import sys
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reproval import download
from reproval.files import NO_LOCKS, RecordError, atomic, mend_of, read_record, sha256_file, sha256_json, write_record
from reproval.folders import FolderError, check_config, check_tokenizer, unread_weights, walk
from reproval.records import DatasetSource, ModelManifest, StoredFile, TaskManifest
from reproval.run_file import RunFile, first_of_suite, of_model
from reproval.settings import ModelConfig
from reproval.store import message, troubles

# What an engine and a tokenizer read. Other formats of the same weights (.bin, .pth, .gguf, .onnx) stay on the Hub.
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
PYTHON_FILES = ["*.py"]
WEIGHTS = ".safetensors"
# Variables that huggingface_hub reads a token from.
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# A hidden copy of the manifest beside the files that it describes.
KEPT = ".manifest.json"


class StageError(Exception):
    """Something could not be fetched, or what was fetched is not what the Hub has."""


class Unreachable(StageError):
    """The Hub does not answer, or does not let this caller in."""


def digest_of(files: list[StoredFile]) -> str:
    """The identity of a set of files: independent of where they lie and of their times."""
    return sha256_json(sorted([entry.path, entry.sha256] for entry in files))


def list_files(folder: Path, patterns: list[str], but: Collection[str] = ()) -> list[StoredFile]:
    """Size and SHA-256 of every file below `folder` whose name matches, hidden ones left out. Reads every byte."""
    return [
        StoredFile(path=name, size_bytes=path.stat().st_size, sha256=sha256_file(path))
        for path in walk(folder)
        if any(path.match(pattern) for pattern in patterns)
        if (name := path.relative_to(folder).as_posix()) not in but
    ]


def stage_model(name: str, model: ModelConfig, store: Path) -> ModelManifest:
    """Fetch a model into STORE/models/NAME-COMMIT12, all but large weights, or take a local folder as it is.

    The manifest has the large weights too, by what the Hub says of them; `stage_weights` fetches them.
    Raises StageError: the Hub cannot be reached, the repository needs a token, a file differs from the Hub's SHA-256,
    the repository is not of a whole model.
    """
    patterns = MODEL_FILES + (PYTHON_FILES if model.trust_remote_code else [])
    revision: str | None = None
    promised: dict[str, str | None] = {}
    awaited: list[StoredFile] = []
    if model.path is not None:
        folder = Path(model.path)
    else:
        try:
            folder, revision, promised, awaited = fetch_model(name, model, store, patterns)
        except Unreachable as error:
            return kept_model(name, model, store, error)
    unread = unread_weights(path.relative_to(folder).as_posix() for path in walk(folder))
    files = list_files(folder, patterns, unread | {file.path for file in awaited})
    for entry in files:
        path = folder / entry.path
        if not _is_promised(path, entry, promised.get(entry.path)):
            path.unlink()
            raise StageError(
                f"{path}: is not what the Hub has (its hash differs) and was removed; run `snakemake stage` again"
            )
    files += awaited
    if model.path is None:
        _check_whole(name, model, folder, files)
    if not any(entry.path.endswith(WEIGHTS) for entry in files):
        raise StageError(f"models.{name}: {folder} holds no .safetensors file; convert the checkpoint to safetensors")
    manifest = ModelManifest(
        model=name,
        source="local" if model.path is not None else "hub",
        hub_id=model.hub,
        revision=revision,
        folder=str(folder),
        files=files,
        digest=digest_of(files),
    )
    if model.path is None:
        write_record(folder / KEPT, manifest)
    return manifest


def _check_whole(name: str, model: ModelConfig, folder: Path, files: list[StoredFile]) -> None:
    """Raise StageError unless these files of a Hub's repository are a model's, which a local folder is asked before.

    Code of a checkpoint may bring a tokenizer whose files have names of their own.
    """
    names = sorted(entry.path for entry in files if "/" not in entry.path)
    try:
        check_config(folder, names)
        if not model.trust_remote_code:
            check_tokenizer(names)
    except FolderError as error:
        raise StageError(
            f"models.{name}: {model.hub}: found {error.found}; expected {error.expected}; name a repository that has "
            f"it, or make a local folder and give it as `path`: {error.mend}"
        ) from error


def kept_model(name: str, model: ModelConfig, store: Path, unreachable: Unreachable) -> ModelManifest:
    """What was staged of this commit before, all but weights checked byte for byte; raises StageError otherwise.

    A cluster without network asks for a manifest again when this workflow is newer than the manifest.
    """
    try:
        manifest = read_record(store / "models" / f"{name}-{(model.revision or '')[:12]}" / KEPT, ModelManifest)
    except RecordError:
        raise unreachable from None
    if (manifest.hub_id, manifest.revision) != (model.hub, model.revision):
        raise unreachable
    others = [entry for entry in manifest.files if not entry.path.endswith(WEIGHTS)]
    if wrong := troubles(Path(manifest.folder), others, deep=True):
        raise StageError(f"{unreachable}; and {message(wrong)}") from unreachable
    print(f"models.{name}: not fetched again; {manifest.folder} is as it was staged before")
    return manifest


def stage_weights(manifest: ModelManifest) -> None:
    """Fetch the weights that a manifest promises, and read every byte of those that were there before.

    Raises StageError: the Hub cannot be reached, or a file is not what it promised.
    """
    folder, name = Path(manifest.folder), manifest.model
    weights = [entry for entry in manifest.files if entry.path.endswith(WEIGHTS)]
    missing = [entry for entry in weights if not (folder / entry.path).exists()]
    if wrong := troubles(folder, [entry for entry in weights if entry not in missing], deep=True):
        raise StageError("\n  ".join([f"models.{name}: remove these files and run `snakemake stage` again:", *wrong]))
    if not missing:
        return
    assert manifest.hub_id is not None
    assert manifest.revision is not None
    with _alone(folder):
        # Whoever had the lock before may have fetched them, for this model or for another of its commit.
        missing = [entry for entry in missing if not (folder / entry.path).exists() and not _shared(folder, entry)]
        if missing:
            with _reaching(name, manifest.hub_id, manifest.revision):
                fetch_files(manifest.hub_id, manifest.revision, missing, folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until nobody else fetches weights of this folder's commit: the second then links what the first fetched.

    Where there can be no lock each fetches for itself; that costs time and room, and nothing else.
    """
    path = folder.parent / f".{_commit(folder)}.lock"
    try:
        stream = path.open("a")
    except PermissionError:  # another user's lock, in a store that several share
        yield
        return
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: waiting for another job that fetches the same commit", flush=True)
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


def _commit(folder: Path) -> str:
    """The part of a folder's name that models of one commit have in common."""
    return folder.name.rpartition("-")[2]


def _shared(folder: Path, file: StoredFile) -> bool:
    """Link a file of the same commit that another model of the store has, such as one with other settings."""
    for other in sorted(folder.parent.glob(f"*-{_commit(folder)}/{glob.escape(file.path)}")):
        if other.stat().st_size == file.size_bytes and sha256_file(other) == file.sha256:
            try:
                os.link(other, folder / file.path)
            except OSError:  # no hard links here
                return False
            return True
    return False


def fetch_model(
    name: str, model: ModelConfig, store: Path, patterns: list[str]
) -> tuple[Path, str, dict[str, str | None], list[StoredFile]]:
    """Download from the Hub; return the folder, the resolved commit, and the hash that the Hub gives, by file.

    Of large weights it fetches the headers alone; they are the last that is returned. Raises StageError.
    """
    from huggingface_hub import HfApi, snapshot_download

    assert model.hub is not None
    # HfApi reads the token itself; it never enters an argument or a record.
    if model.gated and not any(os.environ.get(variable) for variable in TOKENS):
        raise Unreachable(f"models.{name}: {model.hub} is gated; put a token that may read it into HF_TOKEN")
    with _reaching(name, model.hub, str(model.revision)):
        info = HfApi().model_info(model.hub, revision=model.revision, files_metadata=True)
        assert info.sha is not None
        folder = store / "models" / f"{name}-{info.sha[:12]}"
        unread = unread_weights(entry.rfilename for entry in info.siblings or [])
        large = [
            StoredFile(path=entry.rfilename, size_bytes=entry.lfs.size, sha256=entry.lfs.sha256)
            for entry in info.siblings or []
            if entry.lfs is not None and entry.lfs.size >= download.LARGE_BYTES
            if any(Path(entry.rfilename).match(pattern) for pattern in patterns) and entry.rfilename not in unread
        ]
        awaited = [file for file in large if file.path.endswith(WEIGHTS)]
        download.fetch_headers(model.hub, info.sha, [file.path for file in awaited], folder)
        fetch_files(model.hub, info.sha, [file for file in large if file not in awaited], folder)
        others = [glob.escape(path) for path in (*unread, *(file.path for file in large))]
        snapshot_download(
            model.hub, revision=info.sha, local_dir=folder, allow_patterns=patterns, ignore_patterns=others
        )
    promised = {
        entry.rfilename: entry.lfs.sha256 if entry.lfs is not None else entry.blob_id for entry in info.siblings or []
    }
    return folder, info.sha, promised, awaited


def fetch_files(hub: str, commit: str, files: list[StoredFile], folder: Path) -> None:
    """Fetch these files, and compare their content with what is promised. Raises StageError and the client's errors.

    What is larger than the client takes by HTTP, it fetches by its own protocol, hf_xet.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import MAX_HTTP_DOWNLOAD_SIZE

    ours = [file for file in files if download.LARGE_BYTES <= file.size_bytes <= MAX_HTTP_DOWNLOAD_SIZE]
    download.fetch(hub, commit, ours, folder)
    if theirs := [file for file in files if file not in ours]:
        names = [glob.escape(file.path) for file in theirs]
        snapshot_download(hub, revision=commit, local_dir=folder, allow_patterns=names)
        if wrong := troubles(folder, theirs, deep=True):
            raise StageError(f"{hub}: not what the Hub promised: {'; '.join(wrong)}; remove it and stage again")


@contextmanager
def _reaching(name: str, hub: str, revision: str) -> Iterator[None]:
    """Errors of the network as ours."""
    from httpx2 import HTTPError  # what huggingface_hub lets through when no connection can be made

    try:
        yield
    except download.DownloadError as error:
        raise StageError(f"models.{name}: {error}; run `snakemake stage` again") from error
    # hf_xet says with a RuntimeError that a download failed; a login page in place of an answer is no JSON.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise Unreachable(
            f"models.{name}: {hub} at {revision} could not be fetched: {_first_line(error)}; "
            "what has come is kept: run `snakemake stage` again where the network is, with HF_TOKEN set if the "
            "repository is gated"
        ) from error


def _is_promised(path: Path, entry: StoredFile, promised: str | None) -> bool:
    """Whether a file is the Hub's: by its SHA-256, which the Hub has of large files, or by Git's own hash of others."""
    if promised is None:
        return True
    if len(promised) == 64:
        return promised == entry.sha256
    data = path.read_bytes()
    return promised == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def stage_tasks(suite: str, run: RunFile) -> TaskManifest:
    """Load every task of a suite once, so that its data set is in the cache. Raises tasks.TaskError, StageError."""
    from reproval.tasks import known_names, prepare

    units = [unit for unit in run.run.units if unit.suite == suite]
    known_names(units)
    datasets: dict[str, DatasetSource] = {}
    cached: set[Path] = set()
    for unit in units:
        try:
            tasks = prepare(unit, run.seed)
        except OSError as error:
            at = f"suites.{suite}.tasks: {unit.task}"
            if missing := re.search(r"Unable to find '(/[^']*)'", str(error)):
                raise StageError(
                    f"{at}: reads {missing[1]}, which is not there; correct data_files in its task file (a relative "
                    "path begins at the working directory)"
                ) from error
            raise StageError(
                f"{at}: its data set could not be fetched: {_first_line(error)}; "
                "run `snakemake stage` where the network is"
            ) from error
        inside = {path.resolve() for path in walk(Path(unit.include_path))} if unit.include_path else set()
        for name, task in tasks.items():
            # The content of the folder's files is part of the results' key.
            if outside := next((path for path in local_files(task) if path.resolve() not in inside), None):
                raise StageError(
                    f"suites.{suite}.tasks: {name}: reads {outside}, which is not in include_path "
                    f"({unit.include_path}), so that nobody would see it change; put the file, or a link to it, there"
                )
            datasets[name] = _dataset_source(name, task)
            cached |= _cache_folders(task)
    folders = {unit.include_path for unit in units if unit.include_path}
    files = [
        entry
        for folder in sorted(folders)
        for entry in list_files(Path(folder), ["*.yaml", "*.yml", "*.py", "*.json*"])
    ]
    sources = sorted(datasets.values(), key=lambda source: source.task)
    return TaskManifest(
        suite=suite,
        datasets=sources,
        task_files=files,
        files=_stored(cached, Path(run.store)),
        digest=sha256_json([[source.model_dump() for source in sources], digest_of(files)]),
    )


def local_files(task: Any) -> list[Path]:
    """Files of this machine that a task's data set is made of, as far as its configuration names them."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as READERS

    if callable(task.config.custom_dataset) or not task.DATASET_PATH:
        return []
    kwargs = task.config.dataset_kwargs or {}
    folder = Path(task.DATASET_PATH)
    if task.DATASET_PATH not in READERS and not folder.is_dir():
        return []
    base = Path(kwargs.get("data_dir") or (folder if folder.is_dir() else ""))
    named = kwargs.get("data_files") or ([] if base == Path() else ["**"])
    groups = list(named.values()) if isinstance(named, dict) else [named]
    patterns = [name for group in groups for name in ([group] if isinstance(group, str) else group)]
    return [
        Path(found)
        for pattern in patterns
        if "://" not in pattern
        for found in sorted(glob.glob(str(base / pattern), recursive=True))  # noqa: PTH207  Path.glob takes no absolute one
        if Path(found).is_file()
    ]


def _dataset_source(name: str, task: Any) -> DatasetSource:
    """Where a task's documents come from, and the Hub's commit where it can be read from the cache."""
    if callable(task.config.custom_dataset):
        return DatasetSource(task=name, path=None)
    revision = (task.config.dataset_kwargs or {}).get("revision")
    for split in (task.dataset or {}).values():
        # The Hub's commit is part of each URL that `datasets` fetched: hf://datasets/NAME@COMMIT/FILE.
        for url in split.info.download_checksums or {}:
            if url.startswith("hf://") and "@" in url:
                revision = url.split("@", 1)[1].split("/", 1)[0]
    return DatasetSource(task=name, path=task.DATASET_PATH, name=task.DATASET_NAME, revision=revision)


def _cache_folders(task: Any) -> set[Path]:
    """Folders in which `datasets` keeps the tables of a task's splits, with what describes them."""
    splits = (task.dataset or {}).values() if not callable(task.config.custom_dataset) else []
    return {Path(part["filename"]).parent for split in splits for part in getattr(split, "cache_files", None) or []}


def _stored(folders: set[Path], store: Path) -> list[StoredFile]:
    """Every file of these folders, relative to the store. What lies elsewhere is not the store's to promise."""
    root = store.resolve()
    return [
        StoredFile(
            path=path.resolve().relative_to(root).as_posix(), size_bytes=path.stat().st_size, sha256=sha256_file(path)
        )
        for folder in sorted(folders)
        if folder.resolve().is_relative_to(root)
        for path in walk(folder)
        # Made by other tasks out of the same data set.
        if not path.name.startswith("cache-") and path.suffix != ".lock"
    ]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    weights = commands.add_parser("weights", help="what a manifest of a Hub's model promises")
    weights.add_argument("--manifest", type=Path, required=True)
    weights.add_argument("--out", type=Path, required=True)
    for name in ("model", "tasks"):
        command = commands.add_parser(name)
        command.add_argument("--snapshot", type=Path, required=True)
        command.add_argument("--key", required=True, help="Of the manifest, as run_file.py makes it.")
        command.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    from reproval.tasks import TaskError

    try:
        if options.command == "model":
            run = of_model(options.snapshot, options.key)
            write_record(options.out, stage_model(run.run.model_name, run.run.model, Path(run.store)))
        elif options.command == "weights":
            stage_weights(read_record(options.manifest, ModelManifest))
            with atomic(options.out) as stream:
                stream.write("complete\n")
        else:
            if nltk := os.environ.get("NLTK_DATA"):
                # For what tasks such as ifeval fetch. nltk passes over a folder that is not there.
                Path(nltk).mkdir(parents=True, exist_ok=True)
            suite = options.key.rpartition("-")[0]
            write_record(options.out, stage_tasks(suite, first_of_suite(options.snapshot, options.key)))
    except (StageError, TaskError, RecordError) as error:
        if isinstance(error, TaskError) and error.__cause__:
            traceback.print_exception(error.__cause__)
        sys.exit(f"reproval stage: {error}")
    except OSError as error:
        traceback.print_exc()
        sys.exit(f"reproval stage: {mend_of(error, options.out)}: what has come is kept")


if __name__ == "__main__":
    main()

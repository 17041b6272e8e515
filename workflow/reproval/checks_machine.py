"""What a configuration must say of the machine, and of the image that evaluations run in."""

from __future__ import annotations

import re
from pathlib import Path

from reproval import capability
from reproval.folders import kind_of, resolve, unexpanded
from reproval.problems import Report, show
from reproval.settings import HardwareConfig
from reproval.strictyaml import KeyPath

DIGEST = re.compile(r"(docker|oras)://(?P<name>[^\s@]+)@sha256:[0-9a-f]{64}")


def check_hardware(report: Report) -> None:
    """Report a GPU that is not described, and one that cannot do what is asked of it."""
    hardware = report.section(("hardware",))
    gpus = hardware.get("gpus", HardwareConfig.model_fields["gpus"].default)
    if gpus and hardware.get("gpu_memory_gib") is None:
        report.add(
            ("hardware", "gpu_memory_gib"),
            found=f"nothing, with gpus: {gpus}",
            expected="the memory of one GPU in GiB: the plan is made before a GPU is asked for",
            mend="divide what `nvidia-smi --query-gpu=memory.total --format=csv` shows in MiB by 1024",
            reads=[("hardware", "gpu_memory_gib"), ("hardware", "gpus")],
        )
    if gpus and capability.lacks(hardware.get("compute_capability"), capability.OLDEST):
        report.add(
            ("hardware", "compute_capability"),
            found=show(hardware["compute_capability"]),
            expected="7.5 or more: the engine's PyTorch (envs/gpu.txt) is built with CUDA 13, which has no code for "
            "older GPUs",
            mend="choose another GPU",
            reads=[("hardware", "compute_capability")],
        )
    if report.section(()).get("batch_invariant") is not True:
        return
    if not gpus:
        report.add(
            ("batch_invariant",),
            found="true with hardware.gpus: 0",
            expected="a GPU: vLLM's CPU build has no batch-invariant kernels",
            mend="delete batch_invariant",
            reads=[("hardware", "gpus")],
        )
    elif capability.lacks(hardware.get("compute_capability"), capability.BATCH_INVARIANT):
        report.add(
            ("batch_invariant",),
            found=f"true with hardware.compute_capability: {show(hardware['compute_capability'])}",
            expected="compute capability 8.0 or more",
            mend="delete batch_invariant, or choose another GPU",
            reads=[("hardware", "compute_capability")],
        )


def check_container(report: Report, workdir: Path) -> None:
    """Report an image that is not there, or that may be another tomorrow."""
    container = report.section(("container",))
    image, key = container.get("image"), ("container", "image")
    if not isinstance(image, str) or not image:
        return
    digest_of_sif = container.get("sif_sha256")
    if image.endswith((".sif", ".simg")) and "://" not in image:
        if kind_of(resolve(image, workdir)) != "file":
            report.add(
                key,
                found=f"{show(image)}: no such file",
                expected="an existing .sif file",
                mend=unexpanded(image) or "correct the path (relative to the working directory), or build the image",
            )
        if digest_of_sif is None:
            report.add(
                ("container", "sif_sha256"),
                found="nothing",
                expected="the file's SHA-256: Snakemake does not notice when a .sif is replaced",
                mend=f"add sif_sha256: with the first column of `sha256sum {image}`",
                reads=[("container", "sif_sha256")],
            )
        return
    if digest_of_sif is not None:
        report.add(
            ("container", "sif_sha256"),
            found=f"sif_sha256 for {show(image)}",
            expected="sif_sha256 only for a .sif file; an image has its digest in its name",
            mend="delete sif_sha256",
        )
    _image(report, key, image)


def _image(report: Report, key: KeyPath, image: str) -> None:
    expected = "docker://NAME@sha256:DIGEST, oras://NAME@sha256:DIGEST, or a .sif file"
    match = DIGEST.fullmatch(image)
    if match and ":" not in match["name"].rpartition("/")[2]:
        return
    scheme, _, rest = image.rpartition("://")
    name, _, digest = rest.partition("@")
    if match:
        untagged = f"{scheme}://{name.rpartition(':')[0]}@{digest}"
        report.add(
            key,
            found=f"{show(image)}: a tag and a digest",
            expected=expected + "; Apptainer refuses both together",
            mend=f"write {untagged}",
        )
    elif scheme in ("", "docker", "oras") and re.fullmatch(r"[\w./:-]+", name) and not name.startswith(("/", ".")):
        tag = name if ":" in name.rpartition("/")[2] else f"{name}:latest"
        report.add(
            key,
            found=f"{show(image)}: a tag, which may be another image tomorrow" if not digest else show(image),
            expected=expected,
            mend=f"write {scheme or 'docker'}://{tag.rpartition(':')[0]}@ and what "
            f"`skopeo inspect --format '{{{{.Digest}}}}' docker://{tag}` or `crane digest {tag}` prints",
        )
    else:
        report.add(
            key,
            found=show(image),
            expected=expected,
            mend="pull it into a .sif file with `apptainer pull`, and name that with its sif_sha256",
        )

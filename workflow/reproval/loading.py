"""What the engine is told of a model's files: which of them to read, and how. Beyond that it changes no score.

vLLM 0.32 maps safetensors files into memory and reads them page by page; on NFS and Lustre it first reads them whole
into the page cache ("prefetch"), if they fit 90 % of the free memory (weight_utils.safetensors_weights_iterator). Other
network file systems are as slow at small reads, and there it has to be asked for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from reproval.folders import unread_weights

NETWORK = {
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "fuse.ceph",
    "fuse.glusterfs",
    "fuse.juicefs",
    "fuse.mfs",
    "fuse.sshfs",
    "fuse.weka",
    "gpfs",
    "orangefs",
    "panfs",
    "pvfs2",
    "smb3",
    "virtiofs",
    "wekafs",
}
"""Types in /proc/mounts; nfs, nfs4 and lustre are not among them, because vLLM knows these by itself."""
FITS = 0.9
"""vLLM's own bound: what is prefetched beyond the memory pushes itself out again."""


def strategy(file_system: str | None, checkpoint_bytes: int, free_bytes: int) -> Literal["prefetch"] | None:
    """vLLM's `safetensors_load_strategy`; None leaves the choice to vLLM. Pure."""
    return "prefetch" if file_system in NETWORK and checkpoint_bytes <= FITS * free_bytes else None


def file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> str | None:
    """Type of the file system that a path is on: of the longest mount point above it; None if it cannot be told."""
    place = path.resolve()
    try:
        lines = [line.split() for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return None
    # A space in a mount point is written \040.
    found = [(Path(words[1].replace("\\040", " ")), words[2]) for words in lines if len(words) > 2]
    above = [
        (len(point.parts), number, kind) for number, (point, kind) in enumerate(found) if place.is_relative_to(point)
    ]
    return max(above)[2] if above else None


def arguments(folder: Path) -> dict[str, str]:
    """Arguments of lm-eval's vLLM model for the files in `folder`."""
    unread = unread_weights(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.name not in unread)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    chosen = strategy(file_system(folder), weights, free)
    told: dict[str, str] = {"safetensors_load_strategy": chosen} if chosen else {}
    if any(Path(name).name.startswith("consolidated") for name in unread):
        told |= dict.fromkeys(("config_format", "load_format", "tokenizer_mode"), "hf")
    return told

"""What differs between two builds of an image, down to files: `containers/images compare OLD.oci.tar NEW.oci.tar`."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Of a member of a layer, by the names of tarfile.TarInfo.
FIELDS = ("type", "mode", "uid", "gid", "uname", "gname", "size", "mtime", "linkname", "devmajor", "devminor")


class Archive:
    """An OCI archive with one image."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self.tar = tar
        index = self._json("index.json")
        self.digest = str(index["manifests"][0]["digest"])
        self.manifest = self._json(self._blob(self.digest))
        config = self._json(self._blob(self.manifest["config"]["digest"]))
        history, files = config.pop("history"), config.pop("rootfs")
        self.settings = dict(_flat(config))
        steps = [entry.get("created_by", "") for entry in history if not entry.get("empty_layer")]
        digests = [layer["digest"] for layer in self.manifest["layers"]]
        self.layers = list(zip(steps, digests, files["diff_ids"], strict=True))

    def _blob(self, digest: str) -> str:
        return f"blobs/{digest.replace(':', '/')}"

    def _json(self, name: str) -> Any:
        member = self.tar.extractfile(name)
        assert member is not None
        return json.load(member)

    def members(self, digest: str) -> dict[str, dict[str, object]]:
        """Path -> fields and SHA-256 of the content, in the layer's order."""
        found: dict[str, dict[str, object]] = {}
        with tarfile.open(fileobj=self.tar.extractfile(self._blob(digest))) as layer:
            for member in layer:
                content = layer.extractfile(member) if member.isfile() else None
                sha256 = hashlib.file_digest(content, "sha256").hexdigest() if content else None
                found[member.name] = {field: getattr(member, field) for field in FIELDS} | {"content": sha256}
        return found


def differences(old: Path, new: Path) -> Iterator[str]:
    """Sentences; none if both are the same image to the byte."""
    with tarfile.open(old) as first, tarfile.open(new) as second:
        yield from _differences(Archive(first), Archive(second))


def _differences(a: Archive, b: Archive) -> Iterator[str]:
    if a.digest == b.digest:
        return
    for name in sorted(a.settings.keys() | b.settings.keys()):
        x, y = a.settings.get(name), b.settings.get(name)
        if x != y:
            yield f"configuration: {name}: {x} and {y}"
    if len(a.layers) != len(b.layers):
        yield f"{len(a.layers)} layers and {len(b.layers)}"
        return
    for number, ((step, first, unpacked_x), (_, second, unpacked_y)) in enumerate(
        zip(a.layers, b.layers, strict=True), 1
    ):
        name = f"layer {number} ({' '.join(step.split())[:60]})"
        if first == second:
            continue
        if unpacked_x == unpacked_y:
            yield f"{name}: the same, compressed in another way"
            continue
        left, right = a.members(first), b.members(second)
        some = list(differing(left, right))
        yield f"{name}: {len(some)} of {len(left.keys() | right.keys())} files differ"
        yield from (f"  {line}" for line in some)
        if not some:
            yield "  the same files in another order" if list(left) != list(right) else "  only the tar's own headers"


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of nested dictionaries, each by the names that lead to it."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{name} {key}".strip())


def differing(left: dict[str, dict[str, object]], right: dict[str, dict[str, object]]) -> Iterator[str]:
    for path in sorted(left.keys() | right.keys()):
        x, y = left.get(path), right.get(path)
        if x is None or y is None:
            yield f"{path}: only in the {'second' if x is None else 'first'}"
        elif x != y:
            yield f"{path}: " + ", ".join(
                key if key == "content" else f"{key} {x[key]!r} and {y[key]!r}" for key in x if x[key] != y[key]
            )

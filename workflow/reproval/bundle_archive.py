"""The archive of a bundle: a ZIP file that is the same byte by byte for the same files, and is unpacked whole or not.

It compresses nothing, so that its size bounds what comes out of it, and SHA256SUMS names every file with its hash.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from reproval.files import atomic, sha256_file

SUMS = "SHA256SUMS"
# ZIP without its extension for larger archives.
LARGEST_BYTES = 2**32 - 2**20
MOST_FILES = 60_000
# The earliest time that ZIP can hold.
EPOCH = (1980, 1, 1, 0, 0, 0)

Content = bytes | Path


class BundleError(Exception):
    """A bundle cannot be made, or is not what was made. Names the file, what was found, and the mend."""


# --- writing --------------------------------------------------------------------------------------------------------


def write_archive(path: Path, contents: Mapping[str, Content]) -> None:
    """Write a ZIP of these members, sorted, stored, with fixed times and rights: equal members, equal bytes.

    Raises BundleError if they are too many or too large for a plain ZIP, OSError.
    """
    total = sum(len(c) if isinstance(c, bytes) else c.stat().st_size for c in contents.values())
    if total > LARGEST_BYTES or len(contents) > MOST_FILES:
        raise BundleError(
            f"{len(contents)} files of {total} bytes; a bundle holds {MOST_FILES} files of {LARGEST_BYTES} bytes "
            "together. Bundle fewer models or suites at once"
        )
    with atomic(path, "wb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED, allowZip64=False) as archive:
        for name in sorted(contents):
            info = zipfile.ZipInfo(name, EPOCH)
            info.create_system = 3
            info.external_attr = 0o100644 << 16
            content = contents[name]
            if isinstance(content, bytes):
                archive.writestr(info, content)
            else:
                info.file_size = content.stat().st_size
                with content.open("rb") as source, archive.open(info, "w") as target:
                    shutil.copyfileobj(source, target, 2**20)


def sums(hashes: Mapping[str, str]) -> bytes:
    """The content of SHA256SUMS for name -> SHA-256."""
    return "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode()


def _listed(written: bytes) -> dict[str, str]:
    """Name -> SHA-256 of a SHA256SUMS. Only a line feed ends a line: a name may hold U+2028."""
    lines = [line.partition("  ") for line in written.decode("utf-8").split("\n") if line]
    return {name: sha256 for sha256, _, name in lines}


# --- reading --------------------------------------------------------------------------------------------------------


def unpack(path: Path, folder: Path) -> None:
    """Check every byte of a bundle while unpacking it into `folder`, which must not exist; nothing is left on failure.

    Raises BundleError naming the first thing that is wrong: a name that would leave the folder, a link, something
    compressed, a file more, fewer or other than SHA256SUMS says, or a byte of the archive around the files.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
    try:
        _unpack(path, part / "files")
        write_archive(part / "again.zip", {p.relative_to(part / "files").as_posix(): p for p in _all(part / "files")})
        _compare(path, part / "again.zip")
        (part / "files").rename(folder)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, UnicodeError, ValueError) as error:
        raise BundleError(f"{path}: not a bundle as reproval writes it ({error}); copy it again") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _unpack(path: Path, folder: Path) -> None:
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        names = [info.filename for info in infos]
        if len(infos) > MOST_FILES or sum(info.file_size for info in infos) > min(size, LARGEST_BYTES):
            raise BundleError(f"{path}: {len(infos)} files that claim more bytes than the archive has; do not use it")
        if reason := unsafe_name(names):
            raise BundleError(f"{path}: {reason}; do not use it")
        for info in infos:
            if reason := _unsafe(info):
                raise BundleError(f"{path}: {info.filename!r}: {reason}; do not use it")
        hashes = {}
        for info in infos:
            target = folder / info.filename
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with archive.open(info) as source, target.open("xb") as stream:
                    shutil.copyfileobj(source, stream, 2**20)
            except zipfile.BadZipFile as error:
                raise BundleError(
                    f"{path}: {info.filename}: changed after it was bundled ({error}); copy it again"
                ) from None
            hashes[info.filename] = sha256_file(target)
    if SUMS not in hashes:
        raise BundleError(f"{path}: no {SUMS}: not a bundle of reproval")
    del hashes[SUMS]
    listed = (folder / SUMS).read_bytes()
    claimed = _listed(listed)
    for name in sorted(hashes.keys() | claimed.keys()):
        if name not in hashes:
            raise BundleError(f"{path}: {name}: named in {SUMS}, but not there; copy it again")
        if claimed.get(name) != hashes[name]:
            raise BundleError(
                f"{path}: {name}: SHA-256: expected {claimed.get(name, 'none')} by {SUMS}, found {hashes[name]}: "
                "changed after it was bundled; copy it again"
            )
    if listed != sums(hashes):
        raise BundleError(f"{path}: {SUMS}: changed after it was bundled; copy it again")


def unsafe_name(names: Iterable[str]) -> str | None:
    """Why files of these names may not be in an archive, with the name; None if they may."""
    seen: dict[str, str] = {}
    for name in names:
        parts = name.split("/")
        if name.startswith("/") or "\\" in name or ":" in parts[0] or any(part in ("", ".", "..") for part in parts):
            return f"{name!r}: a name that leads out of the folder"
        # Surrogates stand for bytes that are no UTF-8, which ZIP cannot hold.
        if len(name) > 400 or any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in name):
            return f"{name!r}: a name that no bundle has"
        if name.casefold() in seen:
            return f"{seen[name.casefold()]!r} and {name!r}: two files of one name where case does not count"
        seen[name.casefold()] = name
    return None


def _unsafe(info: zipfile.ZipInfo) -> str | None:
    """Why a member may not be unpacked, whatever its name, or None."""
    kind = info.external_attr >> 28
    if info.orig_filename != info.filename:
        return "a name that no bundle has"
    if kind not in (0, 8) or info.is_dir():
        return "a link or something else that is not a file"
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
        return "compressed or encrypted, which no bundle is"
    return None


def _compare(given: Path, again: Path) -> None:
    """Raise BundleError where an archive differs from the one that its own files make: what surrounds the files."""
    with given.open("rb") as a, again.open("rb") as b:
        offset = 0
        while True:
            x, y = a.read(2**20), b.read(2**20)
            if x != y:
                at = offset + next(
                    (i for i, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), min(len(x), len(y))
                )
                with zipfile.ZipFile(given) as archive:
                    before = [info.filename for info in archive.infolist() if info.header_offset <= at]
                raise BundleError(
                    f"{given}: byte {at}, in the archive's own entry for {before[-1] if before else 'its first file'}: "
                    "changed after it was bundled; copy it again"
                )
            if not x:
                return
            offset += len(x)


def unpacked(path: Path, store: Path) -> Path:
    """The folder of a bundle's files below the store: unpacked and checked once, then found by its SHA-256.

    Raises BundleError, OSError.
    """
    folder = store / "bundles" / sha256_file(path)[:16]
    if not folder.exists():
        unpack(path, folder)
    return folder


def check_folder(folder: Path) -> None:
    """Raise BundleError if a file of an unpacked bundle is not the one that was unpacked."""
    for name, sha256 in _listed((folder / SUMS).read_bytes()).items():
        try:
            same = sha256_file(folder / name) == sha256
        except OSError:
            same = False
        if not same:
            raise BundleError(f"{folder / name}: not as it was in the bundle; delete {folder}, and start again")

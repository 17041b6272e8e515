"""Names of a configuration, each of which becomes a folder on whatever file system it is, and paths for rules."""

from __future__ import annotations

from collections.abc import Iterator

from reproval.problems import Report, show
from reproval.strictyaml import KeyPath

# Windows, which a shared folder or WSL brings in, opens a device under these names whatever the suffix.
DEVICES = {"con", "prn", "aux", "nul", *(f"{kind}{number}" for kind in ("com", "lpt") for number in range(10))}


def check_names(report: Report, section: str) -> None:
    """Report names of a section that are no names of folders, or the same folder where case does not count."""
    names = [name for name in report.names(section) if isinstance(name, str)]
    for name in names:
        check_folder_name(report, (section, name), name)
    for first, second in _same_but_for_case(names):
        report.add(
            (section, second),
            found=f"{second} beside {first}",
            expected="names that differ in more than upper and lower case, since each becomes a folder",
            mend="rename one of them",
        )


def _same_but_for_case(names: list[str]) -> Iterator[tuple[str, str]]:
    first: dict[str, str] = {}
    for name in names:
        if first.setdefault(name.casefold(), name) != name:
            yield first[name.casefold()], name


def check_folder_name(report: Report, path: KeyPath, name: str) -> None:
    """Report a name that some file systems do not take."""
    if name.split(".")[0].casefold() in DEVICES or name.endswith("."):
        report.add(
            path,
            found=show(name),
            expected="a name that every file system takes for a folder",
            mend="do not end it with a dot" if name.endswith(".") else f"choose another name, such as {name}-1",
        )


def has_braces(report: Report, at: KeyPath, path: str) -> bool:
    """Whether a path that rules have among their files has braces, which is reported."""
    if not set("{}") & set(path):
        return False
    report.add(
        at,
        found=show(path),
        expected="a path without braces, which Snakemake takes for wildcards",
        mend="rename it, or reach it by a link of another name",
    )
    return True

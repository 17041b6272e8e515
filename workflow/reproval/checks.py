"""What a configuration must satisfy beyond the types of its keys: rules between keys, and between keys and files.

Every check reads the merged configuration through a `Report`, which keeps it silent about what is reported already.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from reproval.checks_machine import check_container, check_hardware
from reproval.checks_models import check_model
from reproval.checks_names import check_names, has_braces
from reproval.checks_suites import check_suite
from reproval.folders import FolderError, kind_of, resolve, unexpanded
from reproval.problems import SECRET, ConfigError, Report, listing, nearest, show
from reproval.settings import Config
from reproval.strictyaml import KeyPath, YamlError, read
from reproval.tiers import load_tiers


def check(report: Report, base: Path, workdir: Path) -> None:
    """Add to the report what is wrong. Reads the files that the configuration names; raises nothing."""
    _numbers(report)
    for section in ("models", "suites"):
        check_names(report, section)
    folders: dict[Path, FolderError | None] = {}
    for name in report.names("models"):
        check_model(report, ("models", name), workdir, folders)
    for name in report.names("suites"):
        check_suite(report, ("suites", name), base, workdir)
    check_hardware(report)
    check_container(report, workdir)
    _tiers(report, base, workdir)
    _store(report, workdir)


def _leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield (*path, key), key
            yield from _leaves(entry, (*path, key))
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _leaves(entry, (*path, index))
    else:
        yield path, value


def secrets(report: Report) -> None:
    """Add every key and value that looks like an access token. To be called first: nothing else is said of it."""
    for path, value in _leaves(report.merged):
        if isinstance(value, str) and SECRET.search(value):
            report.add(
                path,
                found="what looks like an access token (not shown)",
                expected="no secret in a configuration: it is copied into results, reports and bundles",
                mend="delete it here, revoke it if the file was shared, and set HF_TOKEN in the environment instead",
                fault=True,
            )


def _numbers(report: Report) -> None:
    for path, value in _leaves(report.merged):
        if isinstance(value, float) and not math.isfinite(value):
            report.add(
                path, found=show(value), expected="a finite number", mend="write a number", reads=[path], fault=True
            )
        written = report.written(path) or ""
        if type(value) in (int, float) and re.fullmatch(r"[-+]?(0[0-9_]+|.*:.*)", written):
            report.add(
                path,
                found=f"{written}, which YAML reads as {show(value)}: a 0 in front means octal, a colon base 60",
                expected="a decimal number",
                mend=f"write {show(value)}, or the number that was meant",
                reads=[path],
            )


def _tiers(report: Report, base: Path, workdir: Path) -> None:
    top = report.section(())
    name = top.get("tiers", Config.model_fields["tiers"].default)
    policy = top.get("policy", Config.model_fields["policy"].default)
    if not isinstance(name, str) or not isinstance(policy, str):
        return
    if has_braces(report, ("tiers",), name):
        return
    file, expected = resolve(name, workdir, base), "a file with `tiers` and `policies`, as config/tiers.yaml"
    reads: list[KeyPath] = [("tiers",)]
    try:
        data = read(file).data
    except (OSError, ValueError) as error:
        mend = unexpanded(name) or "correct the path, or delete tiers for the file that comes with the workflow"
        found = f"{show(name)}: {getattr(error, 'strerror', error)}"
        report.add(("tiers",), found=found, expected=expected, mend=mend, reads=reads)
        return
    except YamlError as error:
        found = f"{show(name)}, line {error.line}: {error.found}"
        report.add(("tiers",), found=found, expected=expected, mend=error.mend, reads=reads)
        return
    policies = data.get("policies") if isinstance(data, Mapping) else None
    if not isinstance(policies, Mapping) or not policies:
        found = f"{show(name)} without policies"
        report.add(("tiers",), found=found, expected=expected, mend="name a file that has them", reads=reads)
    elif policy not in policies:
        near = nearest(policy, map(str, policies))
        report.add(
            ("policy",),
            found=show(policy),
            expected=f"a policy of {name}: {listing(map(str, policies))}",
            mend=f"write {near}" if near else "choose one of them, or add it to that file",
            reads=[*reads, ("policy",)],
        )
    else:
        try:
            load_tiers(file)
        except ConfigError as error:
            for problem in error.problems:
                found = f"{problem.place}: {problem.key}: {problem.found}"
                report.add(("tiers",), found=found, expected=problem.expected, mend=problem.mend, reads=reads)


def _store(report: Report, workdir: Path) -> None:
    store = report.section(()).get("store")
    if not isinstance(store, str) or has_braces(report, ("store",), store):
        return
    if unexpanded(store) is not None or kind_of(resolve(store, workdir)) == "file":
        report.add(
            ("store",),
            found=show(store) + ("" if unexpanded(store) else ": a file"),
            expected="a folder, which may still be missing",
            mend=unexpanded(store) or "name another path",
        )

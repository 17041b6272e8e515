"""`snakemake doctor`: the traps that cost GPU hours, looked for where Snakemake starts and where evaluations run.

doctor_facts.py looks, doctor_checks.py judges; here is what they are told, and the table. docs/doctor.md lists the
checks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reproval import store
from reproval.doctor_checks import Asked, Finding, examine
from reproval.doctor_facts import Gathered, gather
from reproval.files import RecordError, read_record, write_record
from reproval.records import Record
from reproval.run_file import RunFile, every, model_key
from reproval.text_table import text_table
from reproval.words import count

PLACES = {"head": "here", "node": "node", "engine": "engine"}


class Findings(Record):
    """What was found where Snakemake was started, and printed there."""

    kind: Literal["doctor-findings"] = "doctor-findings"
    findings: list[Finding]


@dataclass(frozen=True)
class Staged:
    """Manifests that the configuration needs, and what is wrong with their files."""

    manifests: int
    missing: Sequence[str] = ()
    wrong: Sequence[str] = ()


def look_at_store(runs: Sequence[RunFile], images: Sequence[Path], deep: bool) -> Staged:
    """Compare the store with every manifest that the runs need."""
    folder = Path(runs[0].store)
    every_one = [*store.manifests(runs), *images]
    there = [path for path in every_one if path.is_file()]
    missing = [str(path) for path in [*every_one, *store.weights_notes(runs)] if not path.is_file()]
    wrong = [line for path in there for line in store.of_manifest(path, folder, deep, changed=True)]
    return Staged(len(every_one), missing, wrong)


def store_finding(staged: Staged, deep: bool) -> Finding:
    """Whether all is there that the configuration needs."""
    how = "content" if deep else "sizes, and content of small files; --config doctor=deep reads all"
    if staged.wrong:
        more = f" (and {len(staged.wrong) - 1} more)" if len(staged.wrong) > 1 else ""
        return Finding("head", "store complete", "problem", f"{staged.wrong[0]}{more}", store.MEND)
    if staged.missing:
        found = f"{len(staged.missing):,} missing of what `stage` leaves, the first {staged.missing[0]}"
        return Finding("head", "store complete", "warning", found, "snakemake stage, where the network is")
    return Finding("head", "store complete", "ok", f"{staged.manifests:,} manifests, compared by {how}")


def table(findings: Sequence[Finding], shown: Sequence[Finding] = ()) -> str:
    """One line a check; below, what to do about each that is not ok, also of those whose lines were `shown` before."""
    rows = [(PLACES[one.where], one.check, one.status, _short(one.found)) for one in findings]
    findings = [*shown, *findings]
    text = [text_table(("where", "check", "", "found"), rows)]
    todo = [one for one in findings if one.status in ("problem", "warning")]
    for one in sorted(todo, key=lambda one: one.status != "problem"):
        text += ["", f"{one.status}: {one.check} ({PLACES[one.where]}): {one.found}", f"  mend: {one.mend}"]
    counts = {status: sum(one.status == status for one in findings) for status in ("problem", "warning", "ok")}
    unchecked = len(findings) - sum(counts.values())
    said = f"{count(counts['problem'], 'problem')}, {count(counts['warning'], 'warning')}, {counts['ok']} ok"
    text += ["", f"{said}, {unchecked} not checked"]
    return "\n".join(text)


def _short(text: str, most: int = 90) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def read(path: Path) -> Gathered | str:
    """What was gathered, or why nothing was: the text that the rule left instead."""
    try:
        return read_record(path, Gathered)
    except RecordError:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it ended without a word"


def look_here(
    runs: Sequence[RunFile],
    results: Path,
    images: Sequence[Path],
    deep: bool,
    gpu_model: str | None,
    partition: str | None,
) -> Findings:
    """Everything that can be seen where Snakemake was started."""
    staged = look_at_store(runs, images, deep)
    gated = [run for run in runs if run.run.model.gated]
    asked = Asked(
        hardware=runs[0].hardware,
        container=bool(images),
        gated=[run.run.model_name for run in gated],
        unstaged=[run.run.model_name for run in gated if any(model_key(run.run) in path for path in staged.missing)],
        gpu_model=gpu_model,
        partition=partition,
    )
    seen = gather("head", results, Path(runs[0].store))
    return Findings(findings=[store_finding(staged, deep), *examine(seen, asked)])


def look_at(path: Path, asked: Asked) -> list[Finding]:
    """What is to be said of the facts that a job left, or of its last words."""
    seen = read(path)
    if isinstance(seen, Gathered):
        return examine(seen, asked)
    mend = "start it by hand with the command in the log: nothing else can be checked where the engine runs"
    return [Finding("engine", "engine's Python starts", "problem", seen, mend)]


def main() -> None:
    """Judge what was found and print it; `nodes`, which comes last, ends with 1 if there is a problem anywhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    here = commands.add_parser("here", help="Look around, print, and leave the findings.")
    here.add_argument("--results", type=Path, required=True)
    here.add_argument("--images", type=Path, nargs="*", default=[], help="Records of the images that jobs run in.")
    here.add_argument("--gpu-model")
    here.add_argument("--partition")
    here.add_argument("--deep", action="store_true", help="Read every byte of the store.")
    here.add_argument("--out", type=Path, required=True)
    nodes = commands.add_parser("nodes", help="Print what a job found, and end.")
    nodes.add_argument("--container", action="store_true", help="Jobs run in one.")
    nodes.add_argument("--found", type=Path, required=True, help="What `here` left.")
    nodes.add_argument("facts", type=Path, nargs="+", help="What doctor_facts.py wrote, or why it could not.")
    for command in (here, nodes):
        command.add_argument("--snapshot", type=Path, required=True)
    options = parser.parse_args()
    runs = list(every(options.snapshot))
    if options.command == "here":
        found = look_here(runs, options.results, options.images, options.deep, options.gpu_model, options.partition)
        print(table(found.findings), flush=True)
        write_record(options.out, found)
        return
    shown = read_record(options.found, Findings).findings
    asked = Asked(hardware=runs[0].hardware, container=options.container)
    findings = [one for path in options.facts for one in look_at(path, asked)]
    print(table(findings, shown))
    # So that the next doctor looks again.
    for path in (options.found, *options.facts):
        path.unlink(missing_ok=True)
    sys.exit(int(any(one.status == "problem" for one in [*shown, *findings])))


if __name__ == "__main__":
    main()

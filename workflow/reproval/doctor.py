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

from reproval import store
from reproval.doctor_checks import Asked, Finding, examine
from reproval.doctor_facts import Gathered
from reproval.files import RecordError, read_record
from reproval.run_file import RunFile, every, model_key
from reproval.text_table import text_table
from reproval.words import count

PLACES = {"head": "here", "node": "node", "engine": "engine"}


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
    missing = [str(path) for path in every_one if not path.is_file()]
    there = [path for path in every_one if path.is_file()]
    wrong = [line for path in there for line in store.of_manifest(path, folder, deep, changed=True)]
    return Staged(len(every_one), missing, wrong)


def store_finding(staged: Staged, deep: bool) -> Finding:
    """Whether all is there that the configuration needs."""
    how = "content" if deep else "sizes, and content of small files; --config doctor=deep reads all"
    if staged.wrong:
        more = f" (and {len(staged.wrong) - 1} more)" if len(staged.wrong) > 1 else ""
        return Finding("head", "store complete", "problem", f"{staged.wrong[0]}{more}", store.MEND)
    if staged.missing:
        found = f"{len(staged.missing):,} of {staged.manifests:,} manifests missing, the first {staged.missing[0]}"
        return Finding("head", "store complete", "warning", found, "snakemake stage, where the network is")
    return Finding("head", "store complete", "ok", f"{staged.manifests:,} manifests, compared by {how}")


def table(findings: Sequence[Finding]) -> str:
    """One line a check; below, what to do about each that is not ok."""
    rows = [(PLACES[one.where], one.check, one.status, _short(one.found)) for one in findings]
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


def main() -> None:
    """Judge what was found, print it, and end with 1 if there is a problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snapshot", type=Path, required=True)
    parser.add_argument("--images", type=Path, nargs="*", default=[], help="Records of the images that jobs run in.")
    parser.add_argument("--gpu-model")
    parser.add_argument("--partition")
    parser.add_argument("--deep", action="store_true", help="Read every byte of the store.")
    parser.add_argument("facts", type=Path, nargs="+", help="What doctor_facts.py wrote, or why it could not.")
    options = parser.parse_args()
    runs = list(every(options.snapshot))
    staged = look_at_store(runs, options.images, options.deep)
    gated = [run for run in runs if run.run.model.gated]
    asked = Asked(
        hardware=runs[0].hardware,
        container=bool(options.images),
        gated=[run.run.model_name for run in gated],
        unstaged=[run.run.model_name for run in gated if any(model_key(run.run) in path for path in staged.missing)],
        gpu_model=options.gpu_model or None,
        partition=options.partition or None,
    )
    findings = [store_finding(staged, options.deep)]
    for path in options.facts:
        seen = read(path)
        if isinstance(seen, Gathered):
            findings += examine(seen, asked)
        else:
            mend = "start it by hand with the command in the log: nothing else can be checked where the engine runs"
            findings.append(Finding("engine", "engine's Python starts", "problem", seen, mend))
    print(table(findings))
    # So that the next doctor looks again.
    for path in options.facts:
        path.unlink(missing_ok=True)
    sys.exit(int(any(one.status == "problem" for one in findings)))


if __name__ == "__main__":
    main()

"""The closing summary of `make test`: what each part of the tests came to, and what was skipped, with the reason.

    python tests/summary.py JUNIT.xml ...

Exits with 1 if a part failed or left no result.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree


def summary(path: Path) -> tuple[list[str], bool]:
    """Lines that say what one pytest run came to, and whether all is well."""
    try:
        suites = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        return [f"{path.stem}: did not finish ({error})"], False
    cases = list(suites.iter("testcase"))
    seconds = sum(float(suite.get("time", 0)) for suite in suites.iter("testsuite"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    reasons = Counter(
        skipped.get("message", "no reason given") for case in cases if (skipped := case.find("skipped")) is not None
    )
    passed = len(cases) - len(bad) - reasons.total()
    lines = [f"{path.stem}: {passed} passed, {len(bad)} failed, {reasons.total()} skipped, in {seconds:.0f} s"]
    lines += [f"  failed:  {case.get('classname')}::{case.get('name')}" for case in bad]
    lines += [f"  skipped: {count} x {reason}" for reason, count in reasons.most_common()]
    if not passed:
        lines.append("  nothing passed, which is a failure: all of it cannot be absent")
    return lines, not bad and passed > 0


def main(paths: list[str]) -> int:
    parts = [summary(Path(path)) for path in paths]
    print("\nSummary")
    for lines, _ in parts:
        print("\n".join(lines))
    return 0 if all(well for _, well in parts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

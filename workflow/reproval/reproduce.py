"""The stage `reproduce`: a run beside a published value, or beside another run, and a verdict for every score.

    python -m reproval.reproduce compare A B      two results folders or bundles; A is the reference, B is judged

Settings and prompts are compared before scores, so that a verdict comes with the first thing that was not the same.
What a verdict means, and how it is reached, is in verdict.py. Exit code: 0 if every score is identical or reproduced,
1 if one differs, 3 if none differs and one is inconclusive; 2 if nothing could be judged.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from reproval import bundle_archive, reference
from reproval.bundle_archive import BundleError
from reproval.collect import ModelData, load
from reproval.files import RecordError, atomic, read_record, write_record
from reproval.problems import ConfigError
from reproval.records import Evaluation
from reproval.reproduce_content import Reproduction
from reproval.reproduce_judge import DEFAULT_MARGIN, NothingToJudge, judge_published, judge_runs
from reproval.reproduce_words import table_markdown, table_text


def newest(results: Path) -> list[Path]:
    """Evaluations below a results folder: of every model and repeat the newest. Raises RecordError if there is none."""
    found: dict[tuple[str, int], tuple[str, Path]] = {}
    for path in sorted(results.glob("runs/*/evaluation.json")):
        evaluation = read_record(path, Evaluation)
        key = (evaluation.model, evaluation.repeat)
        found[key] = max(found.get(key, ("", path)), (evaluation.begin, path))
    if not found:
        raise RecordError(f"{results}: no runs/*/evaluation.json; name a results folder or a bundle")
    return [path for _, path in found.values()]


def _side(path: Path, scratch: Path) -> tuple[Path, list[ModelData]]:
    """The results folder and runs of a results folder, a project's folder, or a bundle."""
    if path.is_file():
        bundle_archive.unpack(path, scratch)
        path = scratch
    results = path if (path / "runs").is_dir() else path / "results"
    return results, load(results, newest(results))


def _judged(options: argparse.Namespace) -> Reproduction:
    if options.command == "compare":
        with tempfile.TemporaryDirectory() as scratch:
            a, b = _side(options.a, Path(scratch) / "a"), _side(options.b, Path(scratch) / "b")
            return judge_runs(f"{options.b} against {options.a}", str(options.a), a, b, options.margin)
    models = load(options.results, options.evaluations)
    if options.reference is not None:
        return judge_published(reference.load(options.reference), models, options.margin)
    bundle_archive.check_folder(options.bundle)
    theirs = options.bundle / "results"
    return judge_runs(
        f"Run again from {options.title or options.bundle.name}",
        options.title or str(options.bundle),
        (theirs, load(theirs, newest(theirs))),
        (options.results, models),
        options.margin,
    )


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0, such as {DEFAULT_MARGIN}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reproval.reproduce", fromfile_prefix_chars="@", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    judge = commands.add_parser("judge", help="judge evaluations against a reference or an unpacked bundle")
    against = judge.add_mutually_exclusive_group(required=True)
    against.add_argument("--reference", type=Path)
    against.add_argument("--bundle", type=Path, help="the folder of an unpacked bundle")
    judge.add_argument("--title", help="what to call the bundle")
    judge.add_argument("--results", type=Path, required=True)
    judge.add_argument("--evaluations", type=Path, nargs="+", required=True)
    compare = commands.add_parser("compare", help="judge run B against run A: results folders or bundles")
    compare.add_argument("a", type=Path, metavar="A")
    compare.add_argument("b", type=Path, metavar="B")
    for command in (judge, compare):
        command.add_argument("--margin", type=_positive, help="largest difference that counts as none")
        command.add_argument("--json", type=Path)
        command.add_argument("--markdown", type=Path)
    show = commands.add_parser("show", help="print verdicts; the exit code is theirs")
    show.add_argument("json", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.command == "show":
            reproduction = read_record(options.json, Reproduction)
        else:
            reproduction = _judged(options)
            if options.json is not None:
                write_record(options.json, reproduction)
            if options.markdown is not None:
                with atomic(options.markdown) as stream:
                    stream.write(table_markdown(reproduction))
    except (RecordError, BundleError, ConfigError, NothingToJudge, OSError) as error:
        print(f"reproval.reproduce: {error}", file=sys.stderr)
        return 2
    except Exception:
        # Python's own exit code for it is 1, which is that of "differs".
        traceback.print_exc()
        return 2
    if options.command == "judge":
        # What it found is shown by the rule that comes after it, so that it stays when that one fails.
        return 0
    print(table_text(reproduction), end="")
    return reproduction.exit_code


if __name__ == "__main__":
    sys.exit(main())

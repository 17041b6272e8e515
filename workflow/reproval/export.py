"""The same records in the formats of others, below results/exports/: `python -m reproval.export FORMAT`.

every-eval-ever is for publishing, mlflow and wandb for the tracker that a group has. The RO-Crate is the bundle, and
made by bundle.py. Nothing is computed here that the report does not have. Every file is searched for secrets and for
paths of this machine before the folder takes its name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from reproval import collect, export_every_eval_ever, export_trackers, manifests, scrub
from reproval.files import RecordError
from reproval.keep import new_folder

FORMATS = ("every-eval-ever", "mlflow", "wandb")
INSTALL = "envs/install export"


class ExportError(Exception):
    """An export cannot be made. Names what is missing or would be told, and the mend."""


def refuse_leaks(folder: Path, outside: Iterable[Path]) -> None:
    """Raise ExportError if a file below `folder` holds a secret, the home folder, or one of the paths `outside`.

    Samples are searched for this user's own secrets only: questions and answers may hold anything that looks like one.
    """
    paths = [str(path.resolve()) for path in outside]
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        text = path.read_bytes().decode("utf-8", errors="replace")
        told = scrub.own(text) if path.name.endswith("_samples.jsonl") else scrub.leaks(text)
        told = told or next(("a path of this machine" for name in paths if f"{name}/" in text), None)
        if told:
            raise ExportError(
                f"{path.relative_to(folder)}: would show {told}; take it out of the configuration or the task that it "
                "comes from, and evaluate again"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reproval.export", fromfile_prefix_chars="@", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument(
        "--results", type=Path, required=True, help="folder that the evaluations' units are relative to"
    )
    parser.add_argument("--evaluations", type=Path, nargs="+", required=True, help="evaluation.json of every model")
    parser.add_argument("--manifests", type=Path, nargs="*", default=[], help="manifests of models and suites")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; one of this name is replaced")
    parser.add_argument("--organization", default="unknown", help="who evaluated")
    parser.add_argument("--organization-url")
    parser.add_argument("--relationship", default="other", choices=export_every_eval_ever.RELATIONSHIPS)
    parser.add_argument("--samples", action="store_true", help="questions and answers too")
    options = parser.parse_args(arguments)
    project = Path.cwd()
    try:
        staged = manifests.read(options.manifests)
        models = collect.load(options.results, options.evaluations)
        with new_folder(options.out) as folder:
            if options.format == "every-eval-ever":
                source = export_every_eval_ever.Source(
                    options.organization, options.organization_url, options.relationship
                )
                samples = options.results if options.samples else None
                export_every_eval_ever.write(folder, models, staged, source, project, samples)
            else:
                runs = [export_trackers.tracked(model, staged, project) for model in models]
                write = {"mlflow": export_trackers.write_mlflow, "wandb": export_trackers.write_wandb}
                write[options.format](runs, folder, options.out)
            refuse_leaks(folder, [project, folder])
    except ModuleNotFoundError as error:
        print(f"reproval.export: {options.format} needs the package {error.name}: {INSTALL}", file=sys.stderr)
        return 1
    except (ExportError, RecordError, OSError) as error:
        print(f"reproval.export: {error}", file=sys.stderr)
        return 1
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The stage `facts`: what a plan needs to know of one model and its tasks, without an engine or a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path

from reproval.files import read_record, write_record
from reproval.model_facts import read_model
from reproval.records import Facts, ModelManifest, TaskFacts
from reproval.run_file import RunFile
from reproval.task_facts import encoder, unit_facts


def make_facts(run: RunFile, manifest: ModelManifest) -> Facts:
    """Read the model's headers and tokenize every request of its units, from the store alone."""
    model = encoder(manifest.folder, run.run.model.trust_remote_code)
    tasks: list[TaskFacts] = []
    for unit in run.run.units:
        tasks += unit_facts(unit, run.seed, model)
    return Facts(
        run=run.run.name,
        model=run.run.model_name,
        model_digest=manifest.digest,
        model_facts=read_model(Path(manifest.folder)),
        tasks=tasks,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    facts = make_facts(read_record(options.run, RunFile), read_record(options.manifest, ModelManifest))
    write_record(options.out, facts)


if __name__ == "__main__":
    main()

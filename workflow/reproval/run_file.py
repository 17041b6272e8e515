"""What the jobs of one model are told: the Run and the parts of the configuration that it needs.

The Snakefile puts all runs of a configuration into one content-addressed snapshot; a rule takes one run out of it.
Snakemake compares the content of small inputs, so a change to one model reruns nothing of another.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pydantic import Field, TypeAdapter

from reproval.files import atomic, sha256_bytes, write_record
from reproval.records import Hardware, Record
from reproval.settings import Config, ContainerConfig, Run

GIB = 1024**3


class RunFile(Record):
    """One model's evaluation, complete: every stage after `stage` takes its choices from here."""

    run: Run
    hardware: Hardware
    policy: str
    seed: int | None
    batch_invariant: bool
    container: ContainerConfig | None
    environment: str = Field(description="Lock or image that the engine runs from, as in the run's identity.")
    store: str


def run_file(run: Run, config: Config, environment: str) -> RunFile:
    """Join a run with what it needs of the configuration. Pure."""
    asked = config.hardware
    return RunFile(
        run=run,
        hardware=Hardware(
            gpus=asked.gpus,
            gpu_memory_bytes=round((asked.gpu_memory_gib or 0) * GIB),
            gpu_name=asked.gpu_name,
            compute_capability=asked.compute_capability,
            host_memory_bytes=round(asked.host_memory_gib * GIB),
            cpus=asked.cpus,
            jobs_per_gpu=asked.jobs_per_gpu,
        ),
        policy=config.policy,
        seed=config.seed,
        batch_invariant=config.batch_invariant,
        container=config.container,
        environment=environment,
        store=config.store,
    )


_SNAPSHOT = TypeAdapter(dict[str, RunFile])


def write_snapshot(folder: Path, runs: list[RunFile]) -> Path:
    """Write all runs to FOLDER/HASH.json unless it is there already; return its path. Raises OSError."""
    data = _SNAPSHOT.dump_json({entry.run.name: entry for entry in runs})
    path = folder / f"{sha256_bytes(data)[:16]}.json"
    if not path.exists():
        with atomic(path, "wb") as stream:
            stream.write(data)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Take one run out of a snapshot of the configuration.")
    parser.add_argument("--snapshot", type=Path, required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    entry = _SNAPSHOT.validate_json(options.snapshot.read_bytes())[options.run]
    write_record(options.out, entry)


if __name__ == "__main__":
    main()

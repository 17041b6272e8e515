"""What the jobs of one model are told: the Run and the parts of the configuration that it needs.

The Snakefile puts all runs of a configuration into one content-addressed snapshot; a rule takes one run out of it.
Snakemake compares the content of small inputs, so a change to one model reruns nothing of another.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field

from reproval.files import atomic, sha256_bytes, sha256_json, write_record
from reproval.records import Hardware, Record
from reproval.seeds import Seed, shifted
from reproval.settings import Config, ContainerConfig, Run

GIB = 1024**3


class RunFile(Record):
    """One model's evaluation, complete: every stage after `stage` takes its choices from here.

    What only says how a job is run (`silence_limit_h`, `local_copy`) is not here: a change would run every job again.
    """

    run: Run
    hardware: Hardware
    policy: str
    seed: Seed = Field(description="The run's own: the configuration's, or lm-eval's four, plus the repeat.")
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
        seed=shifted(config.seed, run.repeat),
        batch_invariant=config.batch_invariant,
        container=config.container,
        environment=environment,
        store=config.store,
    )


def model_key(run: Run) -> str:
    """Names a model's manifest by which files it consists of."""
    files = {key: run.identity["model"].get(key) for key in ("hub", "revision", "folder", "trust_remote_code")}
    return f"{run.model_name}-{sha256_json(files)[:12]}"


def suite_keys(run: Run) -> list[str]:
    """Name the manifests of a run's suites by what their tasks are."""
    suites: dict[str, list[object]] = {}
    for unit in run.identity["units"]:
        suites.setdefault(unit["suite"], []).append(unit)
    return sorted(f"{suite}-{sha256_json(units)[:12]}" for suite, units in suites.items())


def write_snapshot(folder: Path, runs: list[RunFile]) -> Path:
    """Write all runs to FOLDER/HASH.jsonl unless it is there already; return its path. Raises OSError.

    A line is a run's name, a tab, and its record: with thousands of runs, a job that takes out one reads no other.
    """
    data = "".join(f"{entry.run.name}\t{entry.model_dump_json()}\n" for entry in runs).encode()
    return _by_content(folder, "jsonl", data)


def write_list(folder: Path, lines: Sequence[str], kind: str = "list") -> Path:
    """Write lines to FOLDER/HASH.KIND unless it is there already; return its path. Raises OSError.

    A command takes names as @FILE: with some thousand models they are longer than Linux lets one argument be (128 KiB),
    and a command of Snakemake's is one argument of bash.
    """
    return _by_content(folder, kind, "".join(f"{line}\n" for line in lines).encode())


def _by_content(folder: Path, kind: str, data: bytes) -> Path:
    path = folder / f"{sha256_bytes(data)[:16]}.{kind}"
    if not path.exists():
        with atomic(path, "wb") as stream:
            stream.write(data)
    return path


def _lines(snapshot: Path) -> Iterator[tuple[str, str]]:
    with snapshot.open(encoding="utf-8") as stream:
        for line in stream:
            name, _, text = line.partition("\t")
            yield name, text


def every(snapshot: Path) -> Iterator[RunFile]:
    """All runs of a snapshot, in the order of the configuration. Raises OSError."""
    return (RunFile.model_validate_json(text) for _, text in _lines(snapshot))


def from_snapshot(snapshot: Path, run: str) -> RunFile:
    """The run of that name. Raises OSError, and KeyError for a name that is not there."""
    for name, text in _lines(snapshot):
        if name == run:
            return RunFile.model_validate_json(text)
    raise KeyError(run)


def first_of_suite(snapshot: Path, key: str) -> RunFile:
    """The first run with the suite of that key; the suite is the same in all of them. Raises OSError, KeyError."""
    for _, text in _lines(snapshot):
        entry = RunFile.model_validate_json(text)
        if key in suite_keys(entry.run):
            return entry
    raise KeyError(key)


def of_model(snapshot: Path, key: str) -> RunFile:
    """The run with the model of that key. Raises OSError, KeyError."""
    for name, text in _lines(snapshot):
        if name.startswith(key.rpartition("-")[0] + "-"):
            entry = RunFile.model_validate_json(text)
            if model_key(entry.run) == key:
                return entry
    raise KeyError(key)


def main() -> None:
    parser = argparse.ArgumentParser(description="Take one run out of a snapshot of the configuration.")
    parser.add_argument("--snapshot", type=Path, required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    write_record(options.out, from_snapshot(options.snapshot, options.run))


if __name__ == "__main__":
    main()

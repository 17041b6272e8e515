"""Batch-invariant evaluations of one model, at different batch settings and interrupted, compared bit for bit.

    python tests/gpu/batch_invariant.py --model FOLDER --mmlu DATA/mmlu --gpu-memory-gib 79.6

Evaluation jobs of the demo's suite, and of MMLU 5-shot where --mmlu names it: as planned; with small batches; killed by
SIGKILL once half of its requests are done, and started again; and, to compare, without batch-invariant mode at the two
batch settings. They run side by side on the one GPU, which a small model leaves room for. Printed: which scores and
samples differ. Exit code 1 if any differ in batch-invariant mode. `--cpu` rehearses on the CPU engine, which has no
such mode: there the exit code means nothing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jobs
import local_mmlu

SMALL = {"max_num_batched_tokens": 512, "max_num_seqs": 16, "submit_batch": 64}


def smaller(plan: dict[str, Any]) -> None:
    for rung in plan["ladder"]:
        rung["settings"] |= SMALL


def as_planned(plan: dict[str, Any]) -> None:
    pass


def finish(options: argparse.Namespace, run: Path, into: Path, change: Any) -> None:
    """Run a job to its end. Raises RuntimeError if it fails."""
    process = jobs.job(options, run, into, change)
    _, said = process.communicate(timeout=options.limit)
    if process.returncode:
        log = (into / "engine.log").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"{into.name}: {said[-2000:]}\n{log[-4000:]}")


def kill_half_way(options: argparse.Namespace, run: Path, into: Path, total: int) -> int:
    """SIGKILL the job and its engine once half of its requests are kept; how many were."""
    process = jobs.job(options, run, into, as_planned)
    end = time.monotonic() + options.limit
    kept = 0
    while kept < total // 2 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
        kept = sum(path.read_bytes().count(b"\n") - 1 for path in into.glob("results/requests/**/*.jsonl"))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(3)  # Its guardian ends the engine.
    return kept


def outcome(into: Path) -> dict[str, Any]:
    """Scores by unit and metric, and each sample's answers, of a finished job."""
    found: dict[str, Any] = {}
    for path in sorted((into / "results").glob("tasks/*/*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for score in result["scores"]:
            found[f"{score['task']} {score['metric']} {score['filter']}"] = (score["value"], score["stderr"])
        with gzip.open(path.with_name("samples.jsonl.gz"), "rt", encoding="utf-8") as stream:
            for line in stream:
                row = json.loads(line)
                found[f"{row['task']} sample {row['doc_id']} {row['filter']}"] = row["resps"]
    return found


def differing(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    return [name for name in left.keys() | right.keys() if left.get(name) != right.get(name)]


def kill_and_finish(options: argparse.Namespace, run: Path, into: Path) -> int:
    """How many requests were kept when the job was killed; it is finished then."""
    facts = json.loads((run / "facts.json").read_text(encoding="utf-8"))
    kept = kill_half_way(options, run, into, sum(task["requests"] for task in facts["tasks"]))
    finish(options, run, into, as_planned)
    return kept


def compared(options: argparse.Namespace, folder: Path, suites: dict[str, Any], invariant: bool) -> bool:
    """Run the jobs of one mode side by side, and print what differs; whether anything does."""
    folder.mkdir()
    run = jobs.planned(options, folder, suites, batch_invariant=invariant and not options.cpu)
    with ThreadPoolExecutor() as pool:
        ended = [
            pool.submit(finish, options, run, folder / "planned", as_planned),
            pool.submit(finish, options, run, folder / "small", smaller),
        ]
        kept = kill_and_finish(options, run, folder / "killed") if invariant else None
        for job in ended:
            job.result()
    whole = outcome(folder / "planned")
    others = {"small batches": outcome(folder / "small")}
    if kept is not None:
        others[f"killed with {kept} requests kept"] = outcome(folder / "killed")
    found = {name: differing(whole, other) for name, other in others.items()}
    for name, names in found.items():
        scores = [each for each in names if " sample " not in each]
        print(
            f"batch invariant {invariant}: {name}: of {len(whole)} scores and samples {len(names)} differ, "
            f"{len(scores)} of them scores {scores[:4]}",
            flush=True,
        )
    return any(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs.add_arguments(parser)
    parser.add_argument("--mmlu", type=Path, help="folder with test/ and dev/ of JSON lines")
    parser.add_argument("--questions", type=int, default=30, help="of each subject of MMLU")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="batch-invariant-") as temporary:
        suites = jobs.demo()
        if options.mmlu:
            tasks = Path(temporary) / "tasks"
            tasks.mkdir()
            local_mmlu.write(tasks, options.mmlu.resolve())
            suites["mmlu"] = {"include_path": str(tasks), "tasks": [local_mmlu.GROUP], "num_fewshot": 5}
            suites["mmlu"]["limit"] = options.questions
        with ThreadPoolExecutor() as pool:
            modes = {
                mode: pool.submit(compared, options, Path(temporary) / str(mode), suites, mode)
                for mode in (True, False)
            }
            failed = modes[True].result()
            modes[False].result()
    sys.exit(failed)


if __name__ == "__main__":
    main()

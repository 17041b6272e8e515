"""How long the tables and the report of many scores take: `python tests/bench_report.py [SCORES] [FOLDER]`.

Twenty models on groups of subtasks, every subtask with its samples, by the two commands that the workflow runs. The
times are printed, and compared with nothing. In FOLDER what is measured is kept, and measured again the next time.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq

sys.path += [str(Path(__file__).resolve().parents[1] / folder) for folder in ("workflow", "tests/unit")]

import synthetic

WORKFLOW = Path(__file__).resolve().parents[1] / "workflow"
MODELS = 20
SUBTASKS = 83  # with the group and two metrics each: 168 scores a group
DOCUMENTS = 20
WRITTEN = ("scores.csv", "scores.parquet", "report.json", "report.md", "report.html")


def write(root: Path, scores: int) -> None:
    groups = -(-scores // (MODELS * 2 * (SUBTASKS + 1)))
    models = [synthetic.Model(f"model-{i:02d}", 0.45 + 0.02 * i) for i in range(MODELS)]
    tasks = [synthetic.Task(f"group{i:02d}", "group", DOCUMENTS, SUBTASKS) for i in range(groups)]
    synthetic.write_project(root, models, tasks)


def run(root: Path, module: str, **files: str) -> float:
    """One stage as its rule runs it: seconds, printed with those of the processor and the highest memory."""
    evaluations = sorted(str(path) for path in (root / "results/runs").glob("*/evaluation.json"))
    outputs = [text for name, file in files.items() for text in (f"--{name}", str(root / file))]
    inputs = ["--results", str(root / "results"), "--evaluations", *evaluations]
    command = [sys.executable, "-m", module, *outputs, *inputs]
    environment = os.environ | {"PYTHONPATH": str(WORKFLOW)}
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    memory = after.ru_maxrss / 1024
    print(f"{module:20} {wall:6.1f} s, of all cores {busy:6.1f} s, at most {memory:5.0f} MiB", flush=True)
    return wall


def main() -> None:
    scores = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(temporary)
        if not (root / "results").exists():
            write(root, scores)
        wall = run(root, "reproval.collect", csv="scores.csv", parquet="scores.parquet")
        wall += run(root, "reproval.report", json="report.json", markdown="report.md", html="report.html")
        count = pq.read_metadata(root / "scores.parquet").num_rows
        samples = sum(path.stat().st_size for path in root.rglob("samples.jsonl.gz")) / 1e6
        print(f"{'together':20} {wall:6.1f} s for {count:,} scores, {samples:.0f} MB of samples")
        for name in WRITTEN:
            print(f"{name:20} {(root / name).stat().st_size / 1e6:6.1f} MB")


if __name__ == "__main__":
    main()

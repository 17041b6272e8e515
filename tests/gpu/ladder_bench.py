"""Every class of memory failure, provoked for real on a GPU, and the rung that answers it.

    python tests/gpu/ladder_bench.py --model FOLDER --gpu-memory-gib 79.6 --logs logs/

The demo's suite and some long texts are planned by the workflow; each case then puts a first rung with one bad setting
before the planned one, and may start a neighbour that takes the GPU's memory at a moment of the engine's log. The
evaluation job runs on that plan as it would on any other. Printed for each case: the classes of the failed attempts,
the rungs, and whether the job ended with all its results. Logs of the failed attempts go to --logs. `--cpu` rehearses
what needs no neighbour.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jobs
import yaml

sys.path[:0] = [str(jobs.REPO / "workflow")]
from reproval import failures
from reproval.records import EngineSettings, FailureClass

MIB, GIB = 2**20, 2**30
NEIGHBOUR = """
import sys, time, torch
leave, seconds = int(sys.argv[1]), float(sys.argv[2])
torch.empty(1, device="cuda")
held = []
print("ready", flush=True)
sys.stdin.readline()
end = time.monotonic() + seconds
while time.monotonic() < end:
    size = torch.cuda.mem_get_info()[0] - leave
    while size > 2**24:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            break
        except torch.OutOfMemoryError:
            size //= 2
    time.sleep(0.005)
"""


@dataclass(frozen=True)
class Case:
    """`first`: settings of the bad rung that differ from the plan's; `then`: those of the next one.

    `at`: texts of the log, in this order, after which a neighbour takes all but `leave` bytes for `seconds`; without a
    text it does so before the engine starts, and with None there is no neighbour.
    """

    expected: FailureClass
    first: dict[str, Any]
    at: tuple[str, ...] | None = None
    leave: int = 0
    seconds: float = 10.0
    then: dict[str, Any] = field(default_factory=dict)


CASES = {
    "kv_below_one_request": Case("kv_below_one_request", {"kv_cache_memory_bytes": 4 * MIB}),
    "no_kv_room": Case(
        "no_kv_room", {"kv_cache_memory_bytes": 60 * GIB, "gpu_memory_utilization": 0.1}, (), 40 * GIB, 45.0
    ),
    "gpu_busy": Case("gpu_busy", {"gpu_memory_utilization": 0.9}, (), 20 * GIB, 45.0),
    "weights_too_big": Case(
        "weights_too_big",
        # What is left holds a CUDA context (about 500 MiB) and the runner's own buffers, and not the weights (270 MiB).
        {"gpu_memory_utilization": 0.0001, "kv_cache_memory_bytes": GIB, "max_num_seqs": 16},
        (),
        700 * MIB,
        45.0,
        then={"quantization": "fp8"},
    ),
    "graph_capture": Case("graph_capture", {"enforce_eager": False}, ("KV cache size:", "Capturing CUDA graphs")),
    # Rows of a long prompt are memory that the profile run did not take, and it leaves the allocator little. The long
    # texts come last, about 12 s after the engine is up: the neighbour stays until then.
    "running": Case(
        "running",
        {"max_num_batched_tokens": 2048, "max_num_seqs": 16},
        ("init engine (profile",),
        seconds=45.0,
        then={"max_num_batched_tokens": 1024, "max_num_seqs": 16},
    ),
}


def long_texts(folder: Path) -> dict[str, Any]:
    """A suite of one task, whose perplexity is of texts of some thousand tokens."""
    folder.mkdir()
    rows = [{"text": " ".join(str(n) for n in range(start, start + 1000))} for start in range(0, 8000, 1000)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": "long_texts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "texts.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
        "metadata": {"version": 1.0},
    }
    (folder / "long_texts.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return {"include_path": str(folder), "tasks": ["long_texts"]}


def provoked(plan: dict[str, Any], case: Case, on_cpu: bool) -> None:
    """Give the plan the case's rungs: the bad one, then the planned one with what answers it.

    Raises ValueError if it is no answer to the class that is expected.
    """
    bad, answer = copy.deepcopy(plan["ladder"][0]), copy.deepcopy(plan["ladder"][0])
    bad["settings"] |= case.first
    answer["settings"] |= case.then
    plan["ladder"] = [bad, answer]
    before, after = (EngineSettings.model_validate(rung["settings"]) for rung in (bad, answer))
    if case.expected != "gpu_busy" and not failures.answers(case.expected, before, after, on_cpu=on_cpu):
        raise ValueError(f"the second rung is no answer to {case.expected}: {before!r}, {after!r}")


class Neighbour(threading.Thread):
    """Another process on the GPU, which takes its memory once the log holds the case's texts."""

    def __init__(self, case: Case, log: Path) -> None:
        super().__init__(daemon=True)
        self.texts = [text.encode() for text in case.at or ()]
        self.log = log
        self.ended = threading.Event()
        self.process = subprocess.Popen(
            [sys.executable, "-c", NEIGHBOUR, str(case.leave), str(case.seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        self.process.stdout.readline()  # CUDA is initialized: from now on memory is taken in milliseconds.

    def reached(self) -> bool:
        with suppress(OSError):
            rest = self.log.read_bytes()
            for text in self.texts:
                _, found, rest = rest.partition(text)
                if not found:
                    return False
            return True
        return not self.texts

    def run(self) -> None:
        while not self.reached():
            if self.ended.wait(0.005):
                return
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.ended.set()
        self.process.kill()
        self.process.wait()


def attempt(name: str, case: Case, run: Path, results: Path, options: argparse.Namespace) -> dict[str, Any]:
    log = results / "engine.log"
    neighbour = None if case.at is None else Neighbour(case, log)
    if neighbour:
        neighbour.start()
    begin = time.monotonic()
    try:
        process = jobs.job(options, run, results, lambda plan: provoked(plan, case, options.cpu))
        try:
            _, said = process.communicate(timeout=options.limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=60)
    finally:
        if neighbour:
            neighbour.end()
    (history,) = results.glob("results/work/*/attempts.json")
    attempts = json.loads(history.read_text(encoding="utf-8"))["attempts"]
    if options.logs:
        options.logs.mkdir(parents=True, exist_ok=True)
        shutil.copy(log, options.logs / f"{name}.log")
    return {
        "case": name,
        "expected": case.expected,
        "attempts": [{key: each[key] for key in ("rung", "outcome", "failure", "message")} for each in attempts],
        "finished": process.returncode == 0,
        "seconds": round(time.monotonic() - begin, 1),
        "said": said[-2000:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs.add_arguments(parser)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--logs", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="ladder-") as temporary:
        folder = Path(temporary)
        suites = jobs.demo("demo_opposites", "demo_prose") | {"long": long_texts(folder / "tasks")}
        run = jobs.planned(options, folder, suites)
        for name in options.cases.split(","):
            row = attempt(name, CASES[name], run, folder / "provoked" / name, options)
            rows.append(row)
            told = " -> ".join(f"rung {a['rung']} {a['failure'] or a['outcome']}" for a in row["attempts"])
            right = row["finished"] and row["attempts"][0]["failure"] == row["expected"]
            print(f"{'ok ' if right else 'NOT'} {name:22} {row['seconds']:6.1f} s  {told}", flush=True)
            if not right:
                print(row["said"], [a["message"] for a in row["attempts"]], flush=True)
            if options.out:
                options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

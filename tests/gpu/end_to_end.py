"""The whole command: `lm_eval` with its own vLLM model against `snakemake collect`, on MMLU 5-shot from local files.

    python tests/gpu/end_to_end.py --model FOLDER --mmlu DATA/mmlu --questions 30 --gpu-memory-gib 79.6

Both start from nothing kept: imports, tokenizing, the engine's start and, on our side, facts, plan and tables are in
the time. `--questions` are the first of each of the 57 subjects; 0 is all of them. The stock command gets the settings
of our plan that decide a score (dtype, length), and is ended once it has saved its results. Prints both times, the part
of ours that the evaluation job took, and the largest difference of a subject's accuracy. `--cpu` rehearses on the CPU
engine.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import jobs
import local_mmlu


def timed(command: list[str], folder: Path, log: Path, limit: float, written: str | None = None) -> float:
    """Seconds of a command, until it ends or has left a file `written` (a pattern below `folder`); it is ended then.

    The end of its log is shown if it fails or takes too long. Raises CalledProcessError, TimeoutExpired.
    """
    begin = time.perf_counter()
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=folder, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while process.poll() is None and not (written and any(folder.glob(written))):
            if time.perf_counter() - begin > limit:
                print(log.read_text(encoding="utf-8", errors="replace")[-1000:], flush=True)
                raise subprocess.TimeoutExpired(command, limit)
            time.sleep(0.1)
        seconds = time.perf_counter() - begin
        time.sleep(1)  # The file is whole.
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.wait() > 0:
        print(log.read_text(encoding="utf-8", errors="replace")[-6000:], flush=True)
        raise subprocess.CalledProcessError(process.returncode, command)
    return seconds


def ours(options: argparse.Namespace, folder: Path, tasks: Path) -> tuple[float, dict[str, float], dict[str, Any]]:
    """(seconds, accuracy by task, the evaluation record) of the workflow."""
    suite = {"tasks": [local_mmlu.GROUP], "include_path": str(tasks), "num_fewshot": 5}
    if options.questions:
        suite["limit"] = options.questions
    command = [*jobs.snakemake(options, folder, {"mmlu": suite}), "collect"]
    seconds = timed(command, folder, folder / "ours.log", options.limit)
    with (folder / "results/scores.csv").open(encoding="utf-8", newline="") as stream:
        scores = {row["task"]: float(row["value"]) for row in csv.DictReader(stream) if row["metric"] == "acc"}
    (evaluation,) = folder.glob("results/runs/*/evaluation.json")
    return seconds, scores, json.loads(evaluation.read_text(encoding="utf-8"))


def stock(
    options: argparse.Namespace, folder: Path, tasks: Path, settings: dict[str, Any]
) -> tuple[float, dict[str, float]]:
    """(seconds, accuracy by task) of lm-eval's own command."""
    arguments = {
        "pretrained": options.model.resolve(),
        "dtype": settings["dtype"],
        "max_model_len": settings["max_model_len"],
        "enforce_eager": True,
    }
    if options.cpu:
        arguments["kv_cache_memory_bytes"] = settings["kv_cache_memory_bytes"]
    command = [*shlex.split(options.lm_eval), "run", "--model", "vllm", "--tasks", local_mmlu.GROUP]
    command += ["--num_fewshot", "5", "--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--include_path", str(tasks), "--batch_size", "auto", "--output_path", str(folder / "stock")]
    command += ["--limit", str(options.questions)] if options.questions else []
    # On a GPU lm-eval may not end by itself once it has saved: its engine's process stays.
    seconds = timed(command, folder, folder / "stock.log", options.limit, "stock/**/results_*.json")
    (path,) = (folder / "stock").rglob("results_*.json")
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    return seconds, {task: values["acc,none"] for task, values in results.items() if "acc,none" in values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs.add_arguments(parser)
    parser.add_argument("--mmlu", type=Path, required=True, help="folder with test/ and dev/ of JSON lines")
    parser.add_argument("--questions", type=int, default=30, help="of each subject; 0 is all")
    parser.add_argument("--lm-eval", default="lm_eval", help="the command that starts lm-eval, in the engine's Python")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="end-to-end-") as temporary:
        folder = Path(temporary)
        (folder / "tasks").mkdir()
        local_mmlu.write(folder / "tasks", options.mmlu.resolve())
        seconds, scores, evaluation = ours(options, folder, folder / "tasks")
        settings = evaluation["attempts"][-1]["settings"]
        print(f"ours: {seconds:.1f} s, of which the evaluation job {evaluation['duration_s']:.1f} s", flush=True)
        stock_s, stock_scores = stock(options, folder, folder / "tasks", settings)
        difference = max(abs(scores[task] - value) for task, value in stock_scores.items())
        print(
            f"stock: {stock_s:.1f} s, ratio {stock_s / seconds:.2f}; {len(stock_scores)} accuracies, largest "
            f"difference {difference:.4f}"
        )


if __name__ == "__main__":
    main()

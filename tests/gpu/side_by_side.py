"""Several models at once on the GPUs of one machine: which GPU each engine took, and whether the scores stayed.

    python tests/gpu/side_by_side.py --model FOLDER --gpus 2 --jobs-per-gpu 2 --models 5

The demo's suite for as many names of one model, by one Snakemake; GPUs are shared as the plan allows. While it runs,
NVML is asked which processes compute where. Printed: the most engines at once on each GPU, the seconds beside the sum
of the jobs' own, and every score that is not the same for all. Exit code 1 if a GPU had more engines than it may, or
if no two jobs ran at the same time.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jobs


def engines(nvml: Any, gpus: int) -> list[set[int]]:
    """Processes that compute, by GPU."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(gpus)]
    return [{process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)} for handle in handles]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs.add_arguments(parser)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--jobs-per-gpu", type=int, default=2)
    parser.add_argument("--models", type=int, default=4)
    options = parser.parse_args()
    import pynvml

    pynvml.nvmlInit()
    with tempfile.TemporaryDirectory(prefix="side-by-side-") as temporary:
        folder = Path(temporary)
        hardware = {
            "gpus": options.gpus,
            "gpu_memory_gib": options.gpu_memory_gib,
            "compute_capability": "9.0",
            "host_memory_gib": 64,
            "cpus": options.cpus,
            "jobs_per_gpu": options.jobs_per_gpu,
        }
        models = {f"model{n}": {"path": str(options.model.resolve())} for n in range(options.models)}
        command = jobs.snakemake(options, folder, jobs.demo(), models=models, hardware=hardware)
        begin = time.monotonic()
        with (folder / "snakemake.log").open("wb") as stream:
            process = subprocess.Popen([*command, "collect"], stdout=stream, stderr=subprocess.STDOUT)
        most: list[set[int]] = [set() for _ in range(options.gpus)]
        seen: list[set[int]] = [set() for _ in range(options.gpus)]
        together = 0
        while process.poll() is None and time.monotonic() - begin < options.limit:
            now = engines(pynvml, options.gpus)
            most = [max(pair, key=len) for pair in zip(most, now, strict=True)]
            seen = [past | pids for past, pids in zip(seen, now, strict=True)]
            together = max(together, len(set().union(*now)))
            time.sleep(0.2)
        seconds = time.monotonic() - begin
        if process.poll() is None or process.returncode:
            process.terminate()
            process.wait()
            logs = [folder / "snakemake.log", *folder.glob("logs/evaluate/*.log")]
            sys.exit("\n".join(f"{path}:\n{path.read_text(errors='replace')[-3000:]}" for path in logs))
        records = [json.loads(path.read_text()) for path in folder.glob("results/runs/*/evaluation.json")]
        with (folder / "results/scores.csv").open(encoding="utf-8", newline="") as table:
            scores: dict[tuple[str, str], set[str]] = {}
            for row in csv.DictReader(table):
                scores.setdefault((row["task"], row["metric"]), set()).add(row["value"])
    print(f"{len(records)} jobs in {seconds:.1f} s, their own times {sum(r['duration_s'] for r in records):.1f} s")
    print(f"attempts: {[len(record['attempts']) for record in records]}")
    for index, pids in enumerate(most):
        print(f"GPU {index}: {len(seen[index])} engines in all, at most {len(pids)} at once")
    print(f"at most {together} engines at once on the machine")
    different = {name: sorted(values) for name, values in scores.items() if len(values) > 1}
    print(f"{len(different)} of {len(scores)} scores differ between the names of the model: {different}")
    sys.exit(any(len(pids) > options.jobs_per_gpu for pids in most) or together < 2)


if __name__ == "__main__":
    main()

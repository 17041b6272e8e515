"""What a dry run of many models costs: `python tests/bench_dryrun.py [MODELS] [TASKS] [--local] [--target TARGET]`.

Models from the Hub by commit, or, with --local, tiny folders of their own, and TASKS tasks in suites of ten. Time and
the peak of memory of Snakemake are printed beside those of ten models, and compared with nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

BASE = Path(__file__).resolve().parents[1]
SUITE_TASKS = 10


def write_model(folder: Path, number: int) -> None:
    """A model of one tensor, another one for each number."""
    folder.mkdir(parents=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "number": number}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


def write_project(folder: Path, models: int, tasks: int, local: bool) -> None:
    """A working directory with config.yaml."""
    folder.mkdir()
    entries = {}
    for number in range(models):
        name = f"model-{number:04d}"
        if local:
            write_model(folder / "models" / name, number)
            entries[name] = {"path": f"models/{name}"}
        else:
            commit = hashlib.sha1(name.encode()).hexdigest()
            entries[name] = {"hub": f"organization/{name}", "revision": commit}
    names = [f"task_{number:04d}" for number in range(tasks)]
    suites = {
        f"suite-{begin // SUITE_TASKS:03d}": {"num_fewshot": 5, "tasks": names[begin : begin + SUITE_TASKS]}
        for begin in range(0, tasks, SUITE_TASKS)
    }
    config = {"models": entries, "suites": suites, "hardware": {"host_memory_gib": 8}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def dry_run(folder: Path, target: str) -> tuple[float, float, float]:
    """Seconds, seconds of CPU and peak resident memory in GiB of a dry run."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(BASE / "Snakefile"), "--cores", "2"]
    command += ["--configfile", "config.yaml", "--dry-run", "--", target]
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if status != 0:
        sys.exit(f"the dry run failed:\n{printed[-4000:]}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=int, nargs="?", default=1000)
    parser.add_argument("tasks", type=int, nargs="?", default=100)
    parser.add_argument("--local", action="store_true")
    parser.add_argument("--target", default="all")
    options = parser.parse_args()
    print(f"{'models':>8} {'tasks':>8} {'time':>10} {'of CPU':>10} {'peak memory':>14}")
    few = None
    with tempfile.TemporaryDirectory() as temporary:
        for models in (10, options.models):
            folder = Path(temporary, str(models))
            write_project(folder, models, options.tasks, options.local)
            seconds, busy, peak = dry_run(folder, options.target)
            ratio = f"   {busy / few[0]:.1f} x the time of CPU, {peak / few[1]:.1f} x the memory" if few else ""
            few = few or (busy, peak)
            print(f"{models:8,} {options.tasks:8,} {seconds:8.1f} s {busy:8.1f} s {peak:10.2f} GiB{ratio}", flush=True)


if __name__ == "__main__":
    main()

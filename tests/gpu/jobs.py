"""What the scripts here share: the workflow up to its plans, and evaluation jobs on plans that were changed by hand.

On a machine with the engine in its own Python, `.env/gpu/bin/python` of the checkout has to be that Python.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).resolve().parents[2]
DEMO_TASKS = ("demo_opposites", "demo_endings", "demo_counting", "demo_prose")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="folder of a real model")
    parser.add_argument("--gpu-memory-gib", type=float, default=79.6)
    parser.add_argument("--cpus", type=int, default=8)
    parser.add_argument("--cpu", action="store_true", help="the CPU engine, to rehearse")
    parser.add_argument("--limit", type=float, default=200, help="seconds for one job")
    parser.add_argument("--snakemake", default="snakemake", help="the command that starts Snakemake")


def demo(*tasks: str) -> dict[str, Any]:
    """The suites of a configuration: the demo's tasks, or these of them."""
    return {"demo": {"include_path": str(REPO / "config/demo/tasks"), "tasks": list(tasks or DEMO_TASKS)}}


def snakemake(options: argparse.Namespace, folder: Path, suites: dict[str, Any], **more: Any) -> list[str]:
    """Write a configuration of one model for one GPU into `folder`; the command, without a target."""
    hardware: dict[str, Any] = {"gpus": 0, "host_memory_gib": 8, "cpus": 2}
    if not options.cpu:
        hardware = {
            "gpus": 1,
            "gpu_memory_gib": options.gpu_memory_gib,
            "compute_capability": "9.0",
            "host_memory_gib": 64,
            "cpus": options.cpus,
        }
    config = {"models": {"model": {"path": str(options.model.resolve())}}, "suites": suites, "hardware": hardware}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config | more), encoding="utf-8")
    command = [*shlex.split(options.snakemake), "--cores", str(options.cpus), "--configfile", str(path)]
    return [*command, "--directory", str(folder), "--snakefile", str(REPO / "Snakefile")]


def planned(options: argparse.Namespace, folder: Path, suites: dict[str, Any], **more: Any) -> Path:
    """The run's folder, with run.json, facts.json and plan.json. Raises CalledProcessError."""
    subprocess.run([*snakemake(options, folder, suites, **more), "plan"], check=True, stdout=sys.stderr)
    (run,) = (folder / "results/runs").iterdir()
    return run


def job(
    options: argparse.Namespace, run: Path, into: Path, change: Callable[[dict[str, Any]], None], gpus: int = 1
) -> subprocess.Popen[str]:
    """Start the evaluation job of a planned run, on its plan as `change` leaves it and with its results in `into`."""
    into.mkdir(parents=True, exist_ok=True)
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    change(plan)
    (into / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    folder = run.parents[2]
    (manifest,) = (folder / "resources/manifests/models").glob("*.json")
    paths = {
        "run": run / "run.json",
        "facts": run / "facts.json",
        "plan": into / "plan.json",
        "manifest": manifest,
        "results": into / "results",
        "log": into / "engine.log",
        "out": into / "evaluation.json",
        "trace": into / "memory.parquet",
    }
    command = [str(REPO / "envs/python"), "cpu" if options.cpu else "gpu", "-m", "reproval.evaluate"]
    command += ["--gpus", "0" if options.cpu else str(gpus)]
    command += [part for key, path in paths.items() for part in (f"--{key}", str(path))]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPO / "workflow")},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

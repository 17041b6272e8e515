"""The profiles that a user copies: each is understood by Snakemake and its plugin, and those that bring scripts hand
jobs over as their scheduler wants them. Slurm itself is in tests/system."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import BASE, Snakemake, environment

PROFILES = {"slurm": "slurm", "lsf": "lsf", "pbs": "cluster_generic", "kubernetes": "cluster_generic"}
CONFIG = """
models:
  tiny: {path: model}
suites:
  core:
    tasks: [arc_easy]
hardware: {host_memory_gib: 8, cpus: 2}
container: {image: "docker://registry.example/reproval@sha256:%s"}
"""

# Fails once, as a job that ran out of memory does.
WORKFLOW = """
rule evaluate:
    output: "done"
    threads: 2
    resources:
        nodes=1,
        gpu=2,
        mem_mb=lambda wildcards, attempt: 5000 * attempt,
        runtime=lambda wildcards, attempt: 30 * attempt,
    shell: "echo once >> tried; [ $(wc -l < tried) = 2 ] && echo {resources.mem_mb} > {output}"
"""

# Stand-ins for a scheduler's commands: each notes what it was called with, and jobs run at once.
QSUB = """
import json, os, subprocess, sys
from pathlib import Path
calls = Path("calls.json")
known = json.loads(calls.read_text()) if calls.exists() else []
code = subprocess.run(["bash", sys.argv[-1]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
calls.write_text(json.dumps([*known, {"words": sys.argv[1:], "code": code, "env": dict(os.environ)}]))
print(f"{len(known)}.server")
"""
QSTAT = """
import json, sys
from pathlib import Path
assert sys.argv[1:-1] == ["-x", "-f"], sys.argv
code = json.loads(Path("calls.json").read_text())[int(sys.argv[-1].partition(".")[0])]["code"]
print(f"Job Id: {sys.argv[-1]}\\n    Job_Name = reproval\\n    job_state = F\\n    Exit_status = {code}")
"""
KUBECTL = """
import json, subprocess, sys
from pathlib import Path
calls = Path("calls.json")
known = json.loads(calls.read_text()) if calls.exists() else []
if sys.argv[1:] == ["create", "-f", "-"]:
    manifest = json.load(sys.stdin)
    command = manifest["spec"]["template"]["spec"]["containers"][0]["command"]
    code = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
    calls.write_text(json.dumps([*known, {"manifest": manifest, "code": code}]))
else:
    get, job, name, n, namespace, *rest = sys.argv[1:]
    assert (get, job, n, namespace, rest) == ("get", "job", "-n", "default", ["-o", "json"]), sys.argv
    (made,) = (call for call in known if call["manifest"]["metadata"]["name"] == name)
    conditions = [{"type": "Failed" if made["code"] else "Complete", "status": "True"}]
    print(json.dumps({"status": {"conditions": conditions}}))
"""


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_is_understood_by_snakemake_and_its_plugin(
    profile: str, tmp_path: Path, snakemake: Snakemake
) -> None:
    plugin = f"snakemake_executor_plugin_{PROFILES[profile]}"
    if importlib.util.find_spec(plugin) is None:
        pytest.skip(f"needs {plugin.replace('_', '-')}, which the lock of the controller does not carry")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").write_text("{}")
    (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (tmp_path / "config.yaml").write_text(CONFIG % ("0" * 64))
    done = snakemake(tmp_path, "--profile", str(BASE / "profiles" / profile), "--configfile", "config.yaml", "-n")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("rule evaluate:") == 1
    # Only counting the requests and evaluating are jobs for the cluster.
    (asked,) = [line for line in done.stdout.splitlines() if "gpu=<TBD>" in line]
    # Slurm's plugin makes --nodes=1 of it: GPUs of several nodes are of no use.
    assert "nodes=1" in asked


def run_through(tmp_path: Path, profile: str, commands: dict[str, str]) -> list[dict[str, Any]]:
    """Run WORKFLOW with a copy of a profile and stand-ins for its scheduler; what they were called with."""
    copied = tmp_path / "profiles/mine"
    shutil.copytree(BASE / "profiles" / profile, copied)
    settings = yaml.safe_load((copied / "config.yaml").read_text())
    # No Apptainer here, and no file system that is slow to show files.
    settings.pop("software-deployment-method", None)
    settings |= {"latency-wait": 5, "seconds-between-status-checks": 1}
    settings["default-resources"] |= {"project": "mine"}
    settings["set-resources"] = {"evaluate": {"queue": "gpu"}}
    (copied / "config.yaml").write_text(yaml.safe_dump(settings))
    commands_folder = tmp_path / "bin"
    commands_folder.mkdir()
    for name, source in commands.items():
        (commands_folder / name).write_text(f"#!{sys.executable}\n{source}")
        (commands_folder / name).chmod(0o755)
    (tmp_path / "Snakefile").write_text(WORKFLOW)
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--profile", "profiles/mine"],
        cwd=tmp_path,
        env=environment() | {"PATH": f"{commands_folder}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "done").read_text().strip() == "10000"
    return list(json.loads((tmp_path / "calls.json").read_text()))


def test_a_job_for_pbs_asks_for_its_resources_and_for_more_at_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "BASH_FUNC_module%%", "OF_THE_CALLER"):
        monkeypatch.setenv(name, "() { something; }")
    calls = run_through(tmp_path, "pbs", {"qsub": QSUB, "qstat": QSTAT})
    assert [call["code"] == 0 for call in calls] == [False, True]
    for attempt, call in enumerate(calls, start=1):
        said = " ".join(call["words"])
        chunk = f"select=1:ncpus=2:mem={5000 * attempt}mb:ngpus=2"
        for wanted in ("-q gpu", "-A mine", f"-l {chunk}", f"-l walltime={1800 * attempt}"):
            assert wanted in said
        # The server would keep them.
        assert not {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "BASH_FUNC_module%%"} & set(call["env"])
        assert "OF_THE_CALLER" in call["env"]


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ("    job_state = F\n    Exit_status = 0\n", "success"),
        ("    job_state = F\n    Exit_status = -29\n", "failed"),
        ("    job_state = F\n    comment = deleted before it began\n", "failed"),
        ("    job_state = R\n    Variable_List = X=005,F=() {\n\tjob_state = F}\n", "running"),
        # A variable of the job may hold anything.
        ("    job_state = F\n    Variable_List = F=() {\n\tExit_status = 0}\n", "failed"),
        ("    Job_Name = \xff\n", "running"),
        ("", "running"),
    ],
)
def test_what_pbs_says_of_a_job_becomes_one_word(said: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "said").write_bytes(said.encode("latin-1"))
    (tmp_path / "qstat").write_text(f"#!/bin/sh\ncat {tmp_path}/said\n")
    (tmp_path / "qstat").chmod(0o755)
    asked = subprocess.run(
        [str(BASE / "profiles/pbs/status"), "7.server"],
        env=environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert (asked.stdout, asked.returncode) == (f"{word}\n", 0), asked.stderr


def test_a_pod_asks_for_its_resources_and_for_more_at_the_next_attempt(tmp_path: Path) -> None:
    calls = run_through(tmp_path, "kubernetes", {"kubectl": KUBECTL})
    assert [call["code"] == 0 for call in calls] == [False, True]
    for attempt, call in enumerate(calls, start=1):
        spec = call["manifest"]["spec"]
        wanted = {"cpu": "2", "memory": f"{5000 * attempt}Mi", "nvidia.com/gpu": "2"}
        assert spec["template"]["spec"]["containers"][0]["resources"] == {"requests": wanted, "limits": wanted}
        # The job's own deadline would count the time in the queue.
        assert spec["template"]["spec"]["activeDeadlineSeconds"] == 1800 * attempt
        assert "activeDeadlineSeconds" not in spec


@pytest.mark.skipif(importlib.util.find_spec("kubernetes") is None, reason="needs the Python client of Kubernetes")
def test_the_pod_is_one_that_the_api_knows() -> None:
    import kubernetes

    class Answer:
        data = (BASE / "profiles/kubernetes/job.json").read_text()

    client = kubernetes.client.ApiClient()
    made = client.deserialize(Answer, "V1Job")
    assert client.sanitize_for_serialization(made) == json.loads(Answer.data)


FORGOTTEN = {
    "pbs": ("qstat", "qstat: Unknown Job Id 7.server"),
    "kubernetes": ("kubectl", 'Error from server (NotFound): jobs.batch "7" not found'),
}


@pytest.mark.parametrize("profile", FORGOTTEN)
def test_a_job_that_the_scheduler_has_forgotten_has_failed(profile: str, tmp_path: Path) -> None:
    name, words = FORGOTTEN[profile]
    (tmp_path / name).write_text(f"#!/bin/sh\necho '{words}' >&2; exit 1\n")
    (tmp_path / name).chmod(0o755)
    asked = subprocess.run(
        [str(BASE / "profiles" / profile / "status"), "default/7"],
        env=environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert asked.stdout == "failed\n"

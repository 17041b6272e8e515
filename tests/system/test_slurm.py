"""The demo's model evaluated through a real Slurm of one node, with a copy of profiles/slurm as a user makes it.

The engine is the real one, in a thin image in which this machine's own files appear: one task of one model, half a
minute a job. A job waits as long as a file `slow` is there, for what has to happen while it runs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from machine import BASE, CPU_PYTHON, DEMO_MODEL, LAB, PROBE_TASK, Lab, is_debian_12_with_root, lab

from reproval.files import read_record, write_record
from reproval.records import Evaluation, Facts, Plan

__all__ = ["lab"]

CONTROLLER = BASE / ".env/controller/bin/snakemake"
PROBE = """
import json, os, sys, time
from pathlib import Path
import datasets

def load(**_):
    if Path(sys.argv[0]).stem == "engine":
        Path("seen.json").write_text(json.dumps(dict(os.environ)))
        while Path("slow").exists():
            time.sleep(0.2)
    rows = [{"word": "up", "choices": [" down", " left"], "answer": 0}]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows * 2)})
"""


def until(condition: Callable[[], Any], what: str, limit_s: float = 300) -> Any:
    """What `condition` gives once it is true."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.5)
    raise AssertionError(f"not within {limit_s} s: {what}")


@pytest.fixture(scope="session")
def slurm(lab: Lab) -> Iterator[Lab]:
    if not is_debian_12_with_root():
        pytest.skip("installs Slurm, which it does only as root on Debian 12")
    for needed, how in (
        (CPU_PYTHON, "envs/install cpu"),
        (CONTROLLER, "envs/install controller"),
        (DEMO_MODEL / "config.json", "make model"),
    ):
        if not needed.exists():
            pytest.skip(f"needs {needed.relative_to(BASE)}: {how}")
    lab.run(LAB / "slurm", "start")
    yield lab
    lab.run(LAB / "slurm", "stop")


class Project:
    """A working directory with its own copy of the profile."""

    def __init__(self, folder: Path, lab: Lab) -> None:
        self.folder, self.lab = folder, lab

    def command(self, *arguments: str) -> list[str]:
        # As the README has it: nothing of the caller's Python reaches Snakemake, here or on a node.
        clean = ["env", "-u", "PYTHONPATH", "-u", "PYTHONHOME", str(CONTROLLER)]
        return [*clean, "--snakefile", str(BASE / "Snakefile"), "--configfile", "config.yaml", *arguments]

    def environment(self) -> dict[str, str]:
        return self.lab.environment | {"PYTHONPATH": str(self.folder / "modules-of-the-caller")}

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Snakemake in a session of its own, as a terminal gives it, with its output in snakemake.log."""
        with (self.folder / "snakemake.log").open("w") as log:
            return subprocess.Popen(
                self.command("--profile", "profiles/mine", *arguments),
                cwd=self.folder,
                env=self.environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def output(self) -> str:
        return (self.folder / "snakemake.log").read_text()

    @property
    def plan(self) -> Path:
        (path,) = self.folder.glob("results/runs/*/plan.json")
        return path

    @property
    def target(self) -> str:
        return str(self.plan.with_name("evaluation.json").relative_to(self.folder))

    def evaluation(self) -> Evaluation:
        return read_record(self.folder / self.target, Evaluation)

    def results(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("results/tasks/*/*/result.json"))]

    def running_job(self) -> str:
        """The number of the job whose engine waits for `slow` to go."""
        seen = self.folder / "seen.json"
        until(seen.exists, f"an engine that runs; {self.output()}")
        time.sleep(1)
        job = str(json.loads(seen.read_text())["SLURM_JOB_ID"])
        seen.unlink()
        return job


def jobs(*, comment: str = "rule_evaluate", duplicates: bool = False) -> list[dict[str, str]]:
    """What Slurm's accounting knows of jobs that ended, oldest first; a job gets its comment at its end."""
    names = ["JobID", "JobIDRaw", "State", "ReqTRES", "TimelimitRaw", "Comment", "WorkDir", "SubmitLine"]
    flags = ["-X", "-P", "-n", *(["-D"] if duplicates else [])]
    listed = subprocess.run(
        ["sacct", *flags, "-S", "now-1days", "-o", ",".join(names)], capture_output=True, text=True, check=True
    )
    rows = [dict(zip(names, line.split("|"), strict=True)) for line in listed.stdout.splitlines()]
    return [row for row in rows if row["Comment"].startswith(comment)]


def jobs_of(project: Project, **options: Any) -> list[dict[str, str]]:
    return [row for row in jobs(**options) if row["WorkDir"] == str(project.folder)]


def requested(job: dict[str, str]) -> dict[str, str]:
    return dict(entry.split("=", 1) for entry in job["ReqTRES"].split(","))


def state(job: str) -> str:
    return subprocess.run(["squeue", "-h", "-t", "all", "-j", job, "-o", "%T"], capture_output=True, text=True).stdout


def engines(folder: Path) -> list[str]:
    """Processes that work in this folder, by their command: Snakemake, supervisor, engine."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").readlink() == folder:
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def planned(slurm: Lab, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Staged and planned, with the requests counted by a job; the tests go on in copies of it."""
    folder = tmp_path_factory.mktemp("planned")
    (folder / "tasks").mkdir()
    (folder / "tasks/probe.py").write_text(PROBE)
    (folder / "tasks/probe.yaml").write_text(PROBE_TASK)
    poisoned = folder / "modules-of-the-caller"
    poisoned.mkdir()
    (poisoned / "yaml.py").write_text("raise RuntimeError('a module of the caller')")
    # Where it stays as the folder is copied: another path would be another image to stage.
    sif = tmp_path_factory.mktemp("image") / "thin.sif"
    binds = slurm.run(LAB / "thin-image", sif, CPU_PYTHON.parents[1])
    digest = slurm.run("sha256sum", sif).split()[0]
    config = {
        "models": {"smollm2": {"path": str(DEMO_MODEL), "dtype": "bfloat16"}},
        "suites": {"core": {"include_path": "tasks", "tasks": ["probe"]}},
        "hardware": {"gpus": 0, "host_memory_gib": 8, "cpus": 2},
        "container": {"image": str(sif), "sif_sha256": digest},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    profile = yaml.safe_load((BASE / "profiles/slurm/config.yaml").read_text())
    # What a site sets, and what would make a test wait.
    profile["default-resources"] |= {"slurm_account": "lab", "slurm_partition": "main"}
    profile |= {"apptainer-args": binds, "latency-wait": 5, "seconds-between-status-checks": 2}
    profile |= {"slurm-init-seconds-before-status-checks": 2, "precommand": ". /etc/profile && touch prepared"}
    (folder / "profiles/mine").mkdir(parents=True)
    (folder / "profiles/mine/config.yaml").write_text(yaml.safe_dump(profile))
    project = Project(folder, slurm)
    project.run("--profile", "profiles/mine", "plan")
    return project


@pytest.fixture
def project(planned: Project, tmp_path: Path) -> Iterator[Project]:
    folder = tmp_path / "project"
    shutil.copytree(planned.folder, folder, symlinks=True)
    made = Project(folder, planned.lab)
    yield made
    for job in jobs_of(made):
        subprocess.run(["scancel", job["JobIDRaw"]], capture_output=True)
    until(lambda: not engines(folder), "the end of what the test left running", 60)


def test_only_counting_requests_and_evaluating_are_jobs(planned: Project) -> None:
    (facts,) = jobs_of(planned, comment="rule_")
    assert facts["Comment"].startswith("rule_find_facts")
    assert facts["State"] == "COMPLETED"
    assert "gres/gpu" not in facts["ReqTRES"]
    assert (planned.folder / "prepared").exists()


def test_a_job_has_the_resources_of_its_plan_and_gives_the_scores_of_a_run_without_slurm(
    project: Project, planned: Project, tmp_path: Path
) -> None:
    direct = Project(tmp_path / "direct", planned.lab)
    shutil.copytree(planned.folder, direct.folder, symlinks=True)
    binds = yaml.safe_load((direct.folder / "profiles/mine/config.yaml").read_text())["apptainer-args"]
    direct.run("--cores", "2", "--use-singularity", f"--singularity-args={binds}", "--", direct.target)
    # A CPU plan asks for no GPU. Two pretended ones, for which the limit has to be raised, show that a job sees all of
    # what it asked for.
    two = ["--resources", "gpu=2", "--set-resources", "evaluate:gpu=2"]
    project.run("--profile", "profiles/mine", *two, "--", project.target)

    (job,) = jobs_of(project)
    plan = read_record(project.plan, Plan)
    predicted = max(rung.predicted.host_bytes for rung in plan.ladder)
    assert requested(job)["cpu"] == "2"
    assert requested(job)["gres/gpu"] == "2"
    assert predicted / 2**20 < int(requested(job)["mem"].removesuffix("M")) <= 8192
    assert int(job["TimelimitRaw"]) >= 15
    # Slurm may spread GPUs over nodes, where one engine cannot use them.
    assert "--nodes=1" in job["SubmitLine"]
    seen = json.loads((project.folder / "seen.json").read_text())
    assert seen["CUDA_VISIBLE_DEVICES"] == "0,1"
    ((result,), (alone,)) = project.results(), direct.results()
    assert result["scores"] == alone["scores"]
    assert result["samples_sha256"] == alone["samples_sha256"]
    assert result["provenance"]["slurm_job"] == job["JobIDRaw"]
    assert result["provenance"]["container"]["network"] == "off"
    assert alone["provenance"]["slurm_job"] is None


def test_a_job_that_needed_more_memory_is_submitted_again_with_more(project: Project) -> None:
    plan = read_record(project.plan, Plan)
    # Predictions that are far too low: 1.1 GiB with the margin.
    rungs = [
        rung.model_copy(update={"predicted": rung.predicted.model_copy(update={"host_bytes": 2**27})})
        for rung in plan.ladder
    ]
    write_record(project.plan, plan.model_copy(update={"ladder": rungs}))
    said = project.run("--profile", "profiles/mine", "--retries", "3", "--", project.target)
    assert "exceeded memory limit" in said
    tried = jobs_of(project)
    assert len(tried) > 1
    # With cgroups it would be OUT_OF_MEMORY; the accounting, which stands in for them, ends a job without saying why.
    assert tried[0]["State"] == "FAILED"
    assert tried[-1]["State"] == "COMPLETED"
    memory = [int(requested(job)["mem"].removesuffix("M")) for job in tried]
    assert memory == sorted(set(memory))
    assert [int(job["TimelimitRaw"]) for job in tried] == sorted({int(job["TimelimitRaw"]) for job in tried})


def test_a_job_that_ran_out_of_time_is_submitted_again_with_more(project: Project) -> None:
    (project.folder / "slow").touch()
    running = project.start("--", project.target)
    job = project.running_job()
    subprocess.run(["scontrol", "update", f"JobId={job}", "TimeLimit=1"], check=True)
    until(lambda: "TIMEOUT" in state(job), "the end of the job's time", 150)
    (project.folder / "slow").unlink()
    assert running.wait(300) == 0, project.output()
    _, second = jobs_of(project)
    assert second["State"] == "COMPLETED"
    assert int(second["TimelimitRaw"]) >= 30
    # The first one's engine was told to end, and said so.
    assert [attempt.outcome for attempt in project.evaluation().attempts] == ["interrupted", "finished"]


def test_ctrl_c_cancels_the_jobs_and_leaves_no_engine(project: Project) -> None:
    (project.folder / "slow").touch()
    running = project.start("--", project.target)
    job = project.running_job()
    assert any("reproval.engine" in command for command in engines(project.folder))
    os.killpg(running.pid, signal.SIGINT)
    assert running.wait(90) != 0
    (cancelled,) = jobs_of(project)
    assert cancelled["JobIDRaw"] == job
    assert cancelled["State"].startswith("CANCELLED")
    until(lambda: not engines(project.folder), "no process of the job's", 60)
    # The next call goes on without being told to unlock or to rerun anything.
    (project.folder / "slow").unlink()
    project.run("--profile", "profiles/mine", "--", project.target)
    assert project.evaluation().attempts[-1].outcome == "finished"


def test_a_job_that_slurm_queues_again_goes_on_under_its_number(project: Project) -> None:
    (project.folder / "slow").touch()
    running = project.start("--", project.target)
    job = project.running_job()
    subprocess.run(["scontrol", "requeue", job], check=True)
    # Slurm would let it wait for two minutes.
    until(lambda: "PENDING" in state(job), "the job in the queue again", 60)
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)
    (project.folder / "slow").unlink()
    assert running.wait(300) == 0, project.output()
    first, second = jobs_of(project, duplicates=True)
    assert first["JobIDRaw"] == second["JobIDRaw"] == job
    assert (first["State"], second["State"]) == ("REQUEUED", "COMPLETED")
    assert project.evaluation().attempts[-1].outcome == "finished"


def test_a_job_that_somebody_cancelled_is_submitted_again(project: Project) -> None:
    (project.folder / "slow").touch()
    running = project.start("--", project.target)
    job = project.running_job()
    subprocess.run(["scancel", job], check=True)
    assert project.running_job() != job
    (project.folder / "slow").unlink()
    assert running.wait(300) == 0, project.output()
    assert [row["State"] for row in jobs_of(project)] == ["CANCELLED by 0", "COMPLETED"]


def test_twenty_models_are_submitted_as_array_jobs(project: Project) -> None:
    """Eighteen have kept results already, those of another name of the same model; two start the engine."""
    names = [f"m{number:02}" for number in range(20)]
    project.run("--profile", "profiles/mine", "--", project.target)
    ((kept,),) = [list(project.folder.glob("results/tasks/smollm2/*"))]
    for name in names[:18]:
        shutil.copytree(kept, project.folder / "results/tasks" / name / kept.name)
    config = json.loads((project.folder / "config.yaml").read_text())
    config["models"] = dict.fromkeys(names, config["models"]["smollm2"])
    (project.folder / "config.yaml").write_text(json.dumps(config))
    # One model's requests are counted; the others have the same.
    facts = read_record(project.plan.with_name("facts.json"), Facts)
    project.run("--profile", "profiles/mine", "stage")
    for run in project.folder.glob("results/runs/m*"):
        name = run.name.partition("-")[0]
        write_record(run / "facts.json", facts.model_copy(update={"run": run.name, "model": name}))
    project.run("--profile", "profiles/mine", "plan")
    before = len(jobs_of(project))

    targets = [
        str(run.relative_to(project.folder) / "evaluation.json") for run in project.folder.glob("results/runs/m*")
    ]
    project.run("--profile", "profiles/mine", "--slurm-array-jobs", "evaluate", "--", *targets)

    submitted = jobs_of(project)[before:]
    assert len(submitted) == 20
    assert {job["State"] for job in submitted} == {"COMPLETED"}
    # An evaluation is ready when its own files have been looked at, and those ready at one moment are one array.
    assert 1 <= len({job["JobID"].partition("_")[0] for job in submitted}) < 20
    evaluations = [read_record(project.folder / target, Evaluation) for target in targets]
    assert sorted(evaluation.model for evaluation in evaluations) == names
    assert sum(bool(evaluation.attempts) for evaluation in evaluations) == 2
    assert len({json.dumps(result["scores"]) for result in project.results()}) == 1

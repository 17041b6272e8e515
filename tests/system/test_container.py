"""The demo's evaluation under a real Apptainer, its image pulled by digest from a registry.

With REPROVAL_SYSTEM_TESTS=1 a thin image is used, in which this machine's own files appear, so that it takes two
minutes. With REPROVAL_SYSTEM_TESTS=full the CPU image is also built from the Dockerfile and its lock, which takes a
quarter of an hour and 10 GB, and the whole demo runs in it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from machine import BASE, CPU_PYTHON, DEMO_MODEL, LAB, PROBE_TASK, Lab, lab

__all__ = ["lab"]

# Runs inside each job, as a task's data set is loaded: notes what the job can see and do.
PROBE = """
import json, os, socket, sys
from pathlib import Path
import datasets

def writable(path):
    try:
        Path(path, "probe").write_text("")
        Path(path, "probe").unlink()
        return True
    except OSError:
        return False

def load(**_):
    stage = Path(sys.argv[0]).stem
    parent = Path(f"/proc/{os.getppid()}/environ").read_bytes().decode().split("\\0")
    seen = {
        "environment": dict(os.environ) | dict(entry.partition("=")[::2] for entry in parent),
        "interfaces": [name for _, name in socket.if_nameindex()],
        "home": os.path.expanduser("~"),
        "writable": {name: writable(path) for name, path in PLACES.items()},
        "there": {name: Path(path).exists() for name, path in PLACES.items()},
        "path": sys.path,
    }
    Path(f"probe-{stage}.json").write_text(json.dumps(seen))
    rows = [{"word": "up", "choices": [" down", " left"], "answer": 0}]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows * 2)})
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a model that lies elsewhere, and a task that looks around in its job."""
    for needed, how in ((CPU_PYTHON, "envs/install cpu"), (DEMO_MODEL / "config.json", "make model")):
        if not needed.exists():
            pytest.skip(f"needs {needed.relative_to(BASE)}: {how}")
    folder = tmp_path_factory.mktemp("project")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (folder / "models").symlink_to(DEMO_MODEL.parent)
    (elsewhere / "private").mkdir()
    tasks = folder / "tasks"
    tasks.mkdir()
    places = {
        "models": "resources/models",
        "hub": "resources/huggingface/hub",
        "cache": "resources/cache",
        "workflow": str(BASE),
        "elsewhere": str(elsewhere / "private"),
    }
    (folder / "resources/models").mkdir(parents=True)
    (tasks / "probe.py").write_text(f"PLACES = {places!r}\n{PROBE}")
    (tasks / "probe.yaml").write_text(PROBE_TASK)
    return folder


@pytest.fixture(scope="module")
def thin(lab: Lab, project: Path) -> tuple[str, str]:
    """A thin image in the registry: its reference by digest, and what it needs bound."""
    sif = lab.folder / "thin.sif"
    binds = lab.run(LAB / "thin-image", sif, CPU_PYTHON.parents[1])
    lab.run("apptainer", "push", str(sif), f"oras://127.0.0.1:{lab.port}/reproval:thin")
    return f"oras://127.0.0.1:{lab.port}/reproval@{lab.digest('reproval', 'thin')}", binds


def configure(folder: Path, container: dict[str, str], **more: Any) -> None:
    config = {
        "models": {"smollm2": {"path": "models/SmolLM2-135M-Instruct", "dtype": "bfloat16"}},
        "suites": {"core": {"include_path": "tasks", "tasks": ["probe"]}},
        "hardware": {"gpus": 0, "host_memory_gib": 8, "cpus": 2},
        "container": container,
    } | more
    (folder / "config.yaml").write_text(json.dumps(config))


def snakemake(lab: Lab, folder: Path, binds: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    caller = {
        "HF_TOKEN": "hf_of_the_caller",
        "PYTHONPATH": "/of/the/caller",
        "https_proxy": "http://user:password@127.0.0.1:9",
        "NO_PROXY": "127.0.0.1",
        "HF_DATASETS_CACHE": "/of/the/caller/datasets",
        "HF_HUB_CACHE": "/of/the/caller/hub",
        "REQUESTS_CA_BUNDLE": "/of/the/caller/missing.pem",
    }
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(BASE / "Snakefile"), "--cores", "2"]
    command += ["--configfile", "config.yaml", "--use-singularity", f"--singularity-args={binds}", *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env=lab.environment | caller | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )


def provenance(folder: Path) -> dict[str, Any]:
    (result,) = folder.glob("results/**/result.json")
    return dict(json.loads(result.read_text())["provenance"])


@pytest.fixture(scope="module")
def done(lab: Lab, project: Path, thin: tuple[str, str]) -> Path:
    """The working directory after `stage` with the registry, and everything else without it."""
    configure(project, {"image": thin[0]})
    staged = snakemake(lab, project, thin[1], "--", "stage")
    assert staged.returncode == 0, staged.stdout
    lab.run(LAB / "registry", "stop")
    try:
        finished = snakemake(lab, project, thin[1])
    finally:
        lab.run(LAB / "registry", "start")
    assert finished.returncode == 0, finished.stdout
    assert (project / "results/report.html").exists()
    return project


def seen(folder: Path, stage: str) -> dict[str, Any]:
    return dict(json.loads((folder / f"probe-{stage}.json").read_text()))


def test_the_result_names_image_file_and_runtime(done: Path, thin: tuple[str, str]) -> None:
    (sif,) = (done / "resources/images").glob("*.sif")
    digest = subprocess.run(["sha256sum", sif], capture_output=True, text=True, check=True).stdout.split()[0]
    version = subprocess.run(["apptainer", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    assert provenance(done)["container"] == {
        "image": thin[0],
        "digest": thin[0].partition("@")[2],
        "sif_sha256": digest,
        "runtime": version,
        "network": "off",
    }


@pytest.mark.parametrize("stage", ["facts", "engine"])
def test_a_job_sees_no_network_and_nothing_of_the_caller(done: Path, stage: str) -> None:
    inside = seen(done, stage)
    assert inside["interfaces"] == ["lo"]
    environment = inside["environment"]
    text = json.dumps(environment)
    for secret in ("hf_of_the_caller", "password", "/of/the/caller"):
        assert secret not in text
    assert environment["OMP_NUM_THREADS"]
    assert inside["home"] == str(done)
    assert not any("/of/the/caller" in entry or ".local" in entry for entry in inside["path"])


@pytest.mark.parametrize("stage", ["facts", "engine"])
def test_a_job_reads_the_store_and_writes_only_caches_and_results(done: Path, stage: str) -> None:
    inside = seen(done, stage)
    assert inside["writable"] == {"models": False, "hub": False, "cache": True, "workflow": False, "elsewhere": False}
    assert not inside["there"]["elsewhere"]


def test_stage_has_the_network_the_token_and_the_proxy(done: Path) -> None:
    inside = seen(done, "stage")
    assert inside["interfaces"] == [name for _, name in socket.if_nameindex()]
    assert inside["environment"]["HF_TOKEN"] == "hf_of_the_caller"
    assert inside["environment"]["https_proxy"]
    # Nor are the caller's caches taken for the store, or a file that is not there for certificates.
    caches = done.resolve() / "resources/huggingface"
    assert inside["environment"]["HF_DATASETS_CACHE"] == str(caches / "datasets")
    assert inside["environment"]["HF_HUB_CACHE"] == str(caches / "hub")
    assert "REQUESTS_CA_BUNDLE" not in inside["environment"]
    assert inside["writable"]["hub"]


def test_no_secret_is_written_anywhere(done: Path) -> None:
    for path in done.rglob("*"):
        if path.is_file() and not path.name.startswith("probe-") and path.suffix != ".sif":
            content = path.read_bytes()
            assert b"hf_of_the_caller" not in content, path
            assert b"user:password" not in content, path


def test_a_second_run_has_nothing_to_do_and_another_image_is_another_run(
    done: Path, lab: Lab, thin: tuple[str, str]
) -> None:
    again = snakemake(lab, done, thin[1], "-n")
    assert "Nothing to be done" in again.stdout
    other = thin[0].replace(thin[0].partition("sha256:")[2], "0" * 64)
    configure(done, {"image": other})
    changed = snakemake(lab, done, thin[1], "-n")
    configure(done, {"image": thin[0]})
    assert "rule evaluate" in changed.stdout
    assert "rule stage_image" in changed.stdout


def test_an_image_that_was_replaced_is_not_run(done: Path, lab: Lab, thin: tuple[str, str]) -> None:
    (sif,) = (done / "resources/images").glob("*.sif")
    whole, times = sif.read_bytes(), sif.stat()
    with sif.open("ab") as stream:
        stream.write(b"\0")
    # As Snakemake sees it, nothing has changed.
    os.utime(sif, ns=(times.st_atime_ns, times.st_mtime_ns))
    try:
        next(done.glob("results/runs/*/facts.json")).unlink()
        refused = snakemake(lab, done, thin[1], "--", "facts")
    finally:
        sif.write_bytes(whole)
        os.utime(sif, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert refused.returncode != 0
    assert "was replaced or damaged" in refused.stdout


def test_a_moved_project_keeps_its_image_without_the_registry(
    tmp_path: Path, done: Path, lab: Lab, thin: tuple[str, str]
) -> None:
    moved = shutil.copytree(done, tmp_path / "moved", symlinks=True)
    (record,) = (path.relative_to(moved) for path in moved.glob("resources/images/*.json"))
    lab.run(LAB / "registry", "stop")
    try:
        planned = snakemake(lab, moved, thin[1], "-n", "--", "stage")
        forced = snakemake(lab, moved, thin[1], "--forcerun", "stage_image", "--", str(record))
    finally:
        lab.run(LAB / "registry", "start")
    assert planned.returncode == 0, planned.stdout
    assert "rule stage_image" not in planned.stdout
    assert forced.returncode == 0, forced.stdout
    assert (moved / record).with_suffix(".sif").is_file()


def test_a_job_reads_a_copy_on_its_node_and_removes_it(
    tmp_path: Path, lab: Lab, project: Path, thin: tuple[str, str]
) -> None:
    scratch, folder = tmp_path / "scratch", tmp_path / "project"
    folder.mkdir()
    for name in ("models", "tasks"):
        (folder / name).symlink_to(project / name)
    configure(folder, {"image": thin[0]}, local_copy=str(scratch))
    # As on a head node, which lacks that folder.
    staged = snakemake(lab, folder, thin[1], "--", "stage")
    assert staged.returncode == 0, staged.stdout
    scratch.mkdir()
    finished = snakemake(lab, folder, thin[1])
    assert finished.returncode == 0, finished.stdout
    (log,) = (folder / "logs/evaluate").glob("*.log")
    assert f"load model {scratch}/reproval-models-" in log.read_text()
    assert not [path for path in scratch.rglob("*") if path.is_file() and path.stat().st_size]


def test_what_links_and_dots_lead_to_is_there_and_the_network_where_it_is_asked_for(
    tmp_path: Path, lab: Lab, project: Path, thin: tuple[str, str]
) -> None:
    """A snapshot of the Hub's cache beside the project, and parts of the store on another disk."""
    blobs, snapshot = (tmp_path / "hub/models--x" / name for name in ("blobs", "snapshots/c0ffee"))
    for made in (blobs, snapshot, tmp_path / "project/resources"):
        made.mkdir(parents=True)
    for number, path in enumerate(sorted(DEMO_MODEL.iterdir())):
        if path.is_file():
            shutil.copyfile(path, blobs / str(number))
            (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    folder = tmp_path / "project"
    (folder / "tasks").symlink_to(project / "tasks")
    for name in ("models", "huggingface"):
        (tmp_path / "disk" / name).mkdir(parents=True)
        (folder / "resources" / name).symlink_to(tmp_path / "disk" / name)
    path = "../hub/models--x/snapshots/c0ffee"
    configure(folder, {"image": thin[0]}, models={"smollm2": {"path": path, "dtype": "bfloat16"}})
    finished = snakemake(lab, folder, f"{thin[1]} --net=false --network=")
    assert finished.returncode == 0, finished.stdout
    assert provenance(folder)["container"]["network"] == "on"
    # Read-only behind the links as well.
    writable = seen(folder, "engine")["writable"]
    assert (writable["models"], writable["hub"], writable["cache"]) == (False, False, True)


def test_a_sif_with_another_hash_than_named_is_refused(
    tmp_path: Path, project: Path, lab: Lab, thin: tuple[str, str]
) -> None:
    for name in ("models", "tasks"):
        (tmp_path / name).symlink_to(project / name)
    configure(tmp_path, {"image": str(lab.folder / "thin.sif"), "sif_sha256": "0" * 64})
    refused = snakemake(lab, tmp_path, thin[1], "--", "stage")
    assert refused.returncode != 0
    assert "was named" in refused.stdout


def test_where_snakemake_is_started_needs_no_apptainer(tmp_path: Path, project: Path) -> None:
    """As on a cluster's head node; the jobs find it where they run."""
    for name in ("models", "tasks"):
        (tmp_path / name).symlink_to(project / name)
    configure(tmp_path, {"image": "docker://registry.example/reproval@sha256:" + "0" * 64})
    bare = tmp_path / "bin"
    bare.mkdir()
    for name in ("bash", "git", "which"):
        (bare / name).symlink_to(shutil.which(name) or name)
    planned = snakemake(Lab(tmp_path, 0), tmp_path, "", "-n", PATH=str(bare))
    assert planned.returncode == 0, planned.stdout
    assert "rule evaluate" in planned.stdout


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose lock for GPUs holds a few small packages, so that the Dockerfile can be built in a minute."""
    folder = tmp_path_factory.mktemp("small")
    for name in ("containers", "envs", "workflow"):
        shutil.copytree(BASE / name, folder / name)
    shutil.copyfile(BASE / "envs/pytest.txt", folder / "envs/gpu.txt")
    (folder / ".env").mkdir()
    for name in ("controller", "uv", "syft"):
        if (BASE / ".env" / name).exists():
            (folder / ".env" / name).symlink_to(BASE / ".env" / name)
    return folder


@pytest.mark.parametrize("tool", ["buildah", "podman", "docker", "apptainer"])
def test_the_dockerfile_builds_with_whichever_tool_is_there(tool: str, lab: Lab, small: Path, tmp_path: Path) -> None:
    base = lab.run(LAB / "base-image", f"127.0.0.1:{lab.port}/base")
    answers = {"docker": ["docker", "info"]}.get(tool, [tool, "--version"])
    if shutil.which(tool) is None or subprocess.run(answers, capture_output=True).returncode != 0:
        pytest.skip(f"{tool} is not here")
    with tempfile.NamedTemporaryFile(dir="/tmp", prefix="reproval-canary-") as canary:
        recipe = f'. {LAB}/lib.sh; . {LAB}/buildah-env.sh; exec "$0" "$@"'
        lab.run("bash", "-c", recipe, small / "containers/build", "gpu", "--tool", tool, "--base", base, timeout=900)
        assert Path(canary.name).exists()
    made = small / ".env/images"
    record = json.loads((made / "gpu.json").read_text())
    assert record["built_from"]["tool"] == tool
    listed = json.loads((made / "gpu.cdx.json").read_text())
    assert listed["metadata"]["component"]["version"] == (record["digest"] or record["sif_sha256"])
    assert "pkg:pypi/pytest@" in json.dumps(listed["components"])
    look = (
        "import os, pytest, sys; print(sys.prefix, os.listdir('/var/tmp'), os.environ['TRITON_CACHE_DIR'],"
        " os.environ['NVIDIA_DRIVER_CAPABILITIES'])"
    )
    inside = ["apptainer", "exec", "--containall", str(made / "gpu.sif")]
    assert lab.run(*inside, "python3", "-c", look).splitlines()[-1] == (
        "/opt/reproval/.env/gpu [] /tmp/reproval-cache/triton compute,utility"
    )
    # Python reads what was compiled beforehand, of its own library too.
    chatter = subprocess.run([*inside, "python3", "-v", "-c", ""], capture_output=True, text=True).stderr
    assert "code object from" in chatter
    assert not [line for line in chatter.splitlines() if "code object from" in line and line.endswith(".py'")]
    lab.run(
        *inside, "sh", "-c", "! command -v g++ && echo 'int main(void) { return 0; }' | gcc -x c - -o /tmp/a && /tmp/a"
    )


@pytest.mark.skipif(
    os.environ.get("REPROVAL_SYSTEM_TESTS") != "full",
    reason="builds the CPU image (a quarter of an hour, 10 GB): REPROVAL_SYSTEM_TESTS=full",
)
@pytest.mark.timeout(3600)
def test_the_demo_runs_in_the_image_of_the_dockerfile(tmp_path: Path, lab: Lab, project: Path) -> None:
    base = lab.run(LAB / "base-image", f"127.0.0.1:{lab.port}/base")
    name = f"127.0.0.1:{lab.port}/reproval-cpu"
    recipe = f'. {LAB}/lib.sh; . {LAB}/buildah-env.sh; exec "$0" "$@"'
    release = [str(BASE / "containers/release"), "cpu", name, "--base", base, "--insecure", "--out", str(tmp_path)]
    published = lab.run("bash", "-c", recipe, *release, timeout=2400).splitlines()[-1]
    assert published.startswith(f"docker://{name}@sha256:")
    listed = json.loads((tmp_path / "cpu.cdx.json").read_text())
    assert f"docker://{name}@{listed['metadata']['component']['version']}" == published
    folder = tmp_path / "demo"
    (folder / "resources").mkdir(parents=True)
    (folder / "resources/demo").symlink_to(DEMO_MODEL.parent)
    demo = (BASE / "config/demo/config.yaml").read_text(encoding="utf-8")
    (folder / "config.yaml").write_text(f"{demo}\ncontainer:\n  image: {shlex.quote(published)}\n")
    finished = snakemake(lab, folder, "")
    assert finished.returncode == 0, finished.stdout
    results = [json.loads(path.read_text()) for path in folder.glob("results/**/result.json")]
    assert len(results) == 8
    for result in results:
        made = result["provenance"]
        assert made["container"]["digest"] == published.partition("@")[2]
        assert made["container"]["network"] == "off"
        assert made["lock"].startswith("cpu sha256:")

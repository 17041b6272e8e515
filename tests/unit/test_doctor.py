"""Every trap that `snakemake doctor` looks for, found in made-up facts; and what it finds out on this machine."""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from examples import UNIT, run_file
from test_memory import Nvml

from reproval import doctor, doctor_facts, store
from reproval.doctor_checks import CHECKS, Asked, examine
from reproval.doctor_facts import Gathered, GpuSeen, Role, Space, gather
from reproval.files import sha256_file, write_record
from reproval.records import Hardware, ImageManifest, ModelManifest, StoredFile, TaskManifest
from reproval.run_file import RunFile, write_snapshot
from reproval.settings import ModelConfig, Run

GIB = 2**30
ROOM = Space(path="/somewhere", free_bytes=500 * GIB, total_bytes=1000 * GIB)
H100 = GpuSeen(name="NVIDIA H100 80GB HBM3", memory_bytes=round(79.6 * GIB), used_bytes=2**28, compute_capability="9.0")
HARDWARE = Hardware(
    gpus=2,
    gpu_memory_bytes=round(79.6 * GIB),
    compute_capability="9.0",
    host_memory_bytes=96 * GIB,
    cpus=8,
)


def seen(role: Role = "engine", **changes: Any) -> Gathered:
    """A healthy node of a cluster."""
    fields: dict[str, Any] = {
        "role": role,
        "node": "node17",
        "time_s": 0.0,
        "clock_skew_s": 0.01,
        "driver": "580.95.05",
        "driver_cuda": "13.0",
        "engine_cuda": "13.0",
        "engine": "0.32.0",
        "gpus": [H100, H100],
        "caches": {"TRITON_CACHE_DIR": ROOM},
        "temporary": ROOM,
        "shared_memory": ROOM,
        "store": ROOM,
        "results": ROOM,
        "ipc_folder": "/tmp",
        "open_files": 65536,
        "apptainer": "apptainer version 1.4.5",
        "userns": True,
        "squashfuse": True,
        "cpus": 8,
        "memory_bytes": 96 * GIB,
        "memory_limited": True,
        "tokens": [],
        "partitions": ["cpu (null)", "gpu gpu:h100:4(S:0-1)"],
    }
    return Gathered(**(fields | changes))


def asked(**changes: Any) -> Asked:
    fields: dict[str, Any] = {"hardware": HARDWARE, "container": True, "partition": "gpu", "gpu_model": "h100"}
    return Asked(**(fields | changes))


@pytest.mark.parametrize("role", ["head", "node", "engine"])
def test_a_healthy_cluster_has_nothing_to_mend(role: Role) -> None:
    findings = examine(seen(role), asked())
    assert {one.status for one in findings} == {"ok"}, [one for one in findings if one.status != "ok"]


def small(**changes: Any) -> Space:
    return ROOM.model_copy(update={"free_bytes": 2**20} | changes)


@pytest.mark.parametrize(
    ("role", "check", "facts", "status", "said"),
    [
        ("engine", "driver and CUDA", {"driver": "550.54", "driver_cuda": "12.4"}, "problem", "580 or newer"),
        ("engine", "driver and CUDA", {"driver": "550.54", "driver_cuda": "12.4"}, "problem", "cuda-compat-13-0"),
        ("engine", "driver and CUDA", {"driver_cuda": "12.4", "compat": True}, "warning", "forward compatibility"),
        ("engine", "driver and CUDA", {"driver_cuda": "13.0", "engine_cuda": "13.2"}, "ok", "CUDA 13.2"),
        ("engine", "driver and CUDA", {"driver_cuda": "14.1"}, "ok", "CUDA 14.1"),
        ("engine", "driver and CUDA", {"engine_cuda": None}, "problem", "without CUDA"),
        ("engine", "driver and CUDA", {"driver": None, "nvml": "NVML Shared Library Not Found"}, "problem", "NVML"),
        (
            "engine",
            "libcuda (--nv)",
            {"libcuda": "no such file", "container": True},
            "problem",
            "--nv did not bring it",
        ),
        ("engine", "libcuda (--nv)", {"libcuda": "no such file"}, "problem", "install the NVIDIA driver"),
        ("engine", "libcuda (--nv)", {"libcuda": "cuInit returned 803"}, "problem", "reboot"),
        ("engine", "GPUs", {"gpus": []}, "problem", "CUDA_VISIBLE_DEVICES"),
        ("engine", "GPUs", {"gpus": [H100]}, "problem", "hardware.gpus is 2"),
        (
            "engine",
            "GPUs",
            {"gpus": [H100.model_copy(update={"memory_bytes": 40 * GIB})] * 2},
            "problem",
            "gpu_memory_gib to 40.0",
        ),
        (
            "engine",
            "GPUs",
            {"gpus": [H100.model_copy(update={"memory_bytes": 140 * GIB})] * 2},
            "warning",
            "could be 140.0",
        ),
        ("engine", "GPUs", {"gpus": [H100.model_copy(update={"compute_capability": "8.0"})] * 2}, "warning", '"8.0"'),
        ("engine", "GPUs", {"gpus": [H100, H100.model_copy(update={"compute_capability": "7.0"})]}, "problem", "7.5"),
        ("engine", "GPUs", {"gpus": [H100.model_copy(update={"mig": True})] * 2}, "warning", "MIG"),
        (
            "engine",
            "GPUs are free",
            {"gpus": [H100, H100.model_copy(update={"used_bytes": 30 * GIB})]},
            "problem",
            "30.0 GiB in use",
        ),
        ("engine", "GPUs are free", {"holders": ["python (4711)"]}, "problem", "python (4711)"),
        ("engine", "GPUs are free", {"gpus": []}, "not checked", "no GPU"),
        ("engine", "GPUs are free", {"gpus": [H100.model_copy(update={"exclusive": True})]}, "warning", "exclusive"),
        (
            "engine",
            "compile caches",
            {"caches": {"TRITON_CACHE_DIR": small(trouble="Read-only file system")}},
            "problem",
            "TRITON_CACHE_DIR",
        ),
        ("engine", "compile caches", {"caches": {}}, "not checked", "no variable"),
        ("engine", "socket names", {"ipc_folder": "/scratch/" + "x" * 62}, "problem", "108 bytes, 107"),
        ("engine", "socket names", {"ipc_folder": "/scratch/" + "x" * 61}, "ok", "107 of 107"),
        ("engine", "socket names", {"ipc_trouble": "Operation not supported"}, "problem", "local disk"),
        (
            "engine",
            "/dev/shm",
            {"shared_memory": small(path="/dev/shm", free_bytes=64 * 2**20)},
            "warning",
            "--shm-size",
        ),
        ("engine", "temporary files", {"temporary": small()}, "warning", "TMPDIR"),
        (
            "engine",
            "temporary files",
            {"temporary": small(trouble="Permission denied")},
            "problem",
            "Permission denied",
        ),
        ("engine", "temporary files", {"temporary": small(free_bytes=None)}, "not checked", "unknown"),
        (
            "node",
            "temporary files",
            {"temporary": small(free_bytes=9 * GIB), "squashfuse": False},
            "warning",
            "30.0 GiB",
        ),
        ("engine", "open files", {"open_files": 1024}, "warning", "ulimit -n"),
        ("engine", "other packages", {"user_site": True}, "problem", "PYTHONNOUSERSITE"),
        ("engine", "other packages", {"foreign_paths": ["/opt/site/python"]}, "problem", "/opt/site/python"),
        ("node", "Apptainer", {"apptainer": None}, "problem", "install Apptainer"),
        ("head", "Apptainer", {"apptainer": None}, "warning", "install Apptainer"),
        ("node", "Apptainer", {"apptainer": "apptainer version 1.0.3"}, "warning", "1.1 or newer"),
        ("node", "Apptainer", {"userns": False}, "problem", "max_user_namespaces"),
        ("node", "Apptainer", {"userns": False, "setuid": True}, "ok", "setuid"),
        ("node", "Apptainer", {"userns": None}, "not checked", "unshare"),
        ("node", "Apptainer", {"squashfuse": False}, "warning", "squashfuse"),
        ("node", "host memory", {"memory_bytes": 64 * GIB}, "problem", "host_memory_gib is 96"),
        ("node", "host memory", {"memory_bytes": None}, "not checked", "neither"),
        ("node", "CPUs", {"cpus": 2}, "warning", "hardware.cpus is 8"),
        ("node", "clock", {"clock_skew_s": -90.0}, "problem", "-90.0 s"),
        ("node", "clock", {"clock_skew_s": None}, "not checked", "nothing could be written"),
        ("head", "store", {"store": small()}, "warning", "larger disk"),
        ("node", "store", {"store": small(trouble="No such file or directory")}, "problem", "mount"),
        ("head", "results", {"results": small()}, "warning", "--directory"),
        ("head", "Slurm's GPUs", {"partitions": None}, "problem", "sinfo"),
        ("head", "Slurm's GPUs", {"partitions": ["gpu gpu:a100:4"]}, "problem", "there: a100"),
        ("head", "Slurm's GPUs", {"partitions": ["cpu (null)"]}, "problem", "no partition gpu; there: cpu"),
        ("head", "Slurm's GPUs", {"partitions": ["gpu (null)"]}, "problem", "no GPU"),
    ],
)
def test_a_trap_is_found_and_its_mend_named(
    role: Role, check: str, facts: dict[str, Any], status: str, said: str
) -> None:
    (found,) = [one for one in examine(seen(role, **facts), asked()) if one.check == check]
    assert found.status == status
    assert said in f"{found.found} {found.mend}"
    assert bool(found.mend) == (status in ("problem", "warning"))


@pytest.mark.parametrize(
    ("changes", "facts", "status", "said"),
    [
        ({"gated": ["llama"], "unstaged": ["llama"]}, {}, "problem", "HF_TOKEN"),
        ({"gated": ["llama"], "unstaged": ["llama"]}, {"tokens": ["HF_TOKEN"]}, "ok", "HF_TOKEN set"),
        ({"gated": ["llama"]}, {}, "ok", "in the store"),
    ],
)
def test_a_token_is_missed_only_by_models_that_are_still_to_come(
    changes: dict[str, Any], facts: dict[str, Any], status: str, said: str
) -> None:
    (found,) = [one for one in examine(seen("head", **facts), asked(**changes)) if one.check == "tokens"]
    assert (found.status, said in f"{found.found} {found.mend}") == (status, True)


def test_two_kinds_of_gpus_need_one_to_be_named() -> None:
    there = seen("head", partitions=["gpu gpu:a100:4,gpu:h100:2"])
    (found,) = [one for one in examine(there, asked(gpu_model=None)) if one.check == "Slurm's GPUs"]
    assert (found.status, found.found) == ("warning", "no gpu_model; there: a100, h100")
    (found,) = [one for one in examine(there, asked(gpu_model="h100")) if one.check == "Slurm's GPUs"]
    assert found.status == "ok"


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"partition": "cpu,gpu"}, "ok", "h100"),
        ({"partition": "gpu,gpu-long"}, "problem", "no partition gpu-long; there: cpu, gpu"),
        ({"partition": None}, "ok", "h100"),
        ({"gpu_model": "nvidia_a100-sxm4-80gb"}, "problem", "leave gpu_model out"),
    ],
)
def test_what_slurm_is_asked_for_is_there(changes: dict[str, Any], status: str, said: str) -> None:
    (found,) = [one for one in examine(seen("head"), asked(**changes)) if one.check == "Slurm's GPUs"]
    assert (found.status, said in f"{found.found} {found.mend}") == (status, True)


def test_what_cannot_be_checked_without_a_gpu_is_never_ok() -> None:
    hardware = Hardware(gpus=0, host_memory_bytes=GIB, cpus=1)
    findings = examine(seen(gpus=[], driver=None, libcuda="none", nvml="none"), asked(hardware=hardware))
    about = [one for one in findings if one.check in ("driver and CUDA", "libcuda (--nv)", "GPUs", "GPUs are free")]
    assert [(one.status, one.found) for one in about] == [("not checked", "hardware.gpus is 0")] * 4


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_table_names_every_check_and_says_what_to_do() -> None:
    findings = [one for role in ("head", "node", "engine") for one in examine(seen(role, cpus=1), asked())]
    findings += examine(seen(driver_cuda="12.4"), asked())
    text = doctor.table(findings)
    for name in CHECKS:
        assert name in text
    assert text.index("problem: driver and CUDA") < text.index("warning: CPUs")
    assert "mend: hardware.cpus is 8" in text
    assert text.endswith("1 problem, 1 warning, 31 ok, 0 not checked")


def test_an_engine_that_does_not_start_is_told_by_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text("INFO: something\nFATAL: could not create user namespace\n")
    assert doctor.read(tmp_path / "engine.json") == "FATAL: could not create user namespace"
    write_record(tmp_path / "node.json", seen("node"))
    assert doctor.read(tmp_path / "node.json") == seen("node")


def test_what_was_shown_before_is_counted_and_its_mend_told_again() -> None:
    shown = examine(seen("head", partitions=None), asked())
    text = doctor.table(examine(seen(), asked()), shown)
    assert "clock" not in text
    assert "problem: Slurm's GPUs (here): no sinfo on PATH" in text
    assert "1 problem, 0 warnings" in text


# --- the store -------------------------------------------------------------------------------------------------------


def stored(folder: Path, *names: str) -> list[StoredFile]:
    return [
        StoredFile(path=name, size_bytes=(folder / name).stat().st_size, sha256=sha256_file(folder / name))
        for name in names
    ]


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    """A store with one model, one suite and one image, and their manifests."""
    for name in ("models/m/config.json", "huggingface/datasets/arc/a.arrow", "images/i.sif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"content of " + name.encode())
    large = tmp_path / "models/m/model.safetensors"
    large.write_bytes(bytes(store.SMALL_BYTES))
    model = ModelManifest(
        model="m",
        source="local",
        folder=str(tmp_path / "models/m"),
        files=stored(tmp_path / "models/m", "config.json", "model.safetensors"),
        digest="0" * 64,
    )
    suite = TaskManifest(
        suite="core",
        datasets=[],
        task_files=[],
        files=stored(tmp_path, "huggingface/datasets/arc/a.arrow"),
        digest="0" * 64,
    )
    sif = tmp_path / "images/i.sif"
    image = ImageManifest(
        image="i", digest=None, sif="i.sif", sif_sha256=sha256_file(sif), sif_bytes=sif.stat().st_size, runtime=None
    )
    for kind, record in (("models", model), ("suites", suite), ("images", image)):
        write_record(
            tmp_path / "manifests" / kind / "x.json" if kind != "images" else tmp_path / "images/x.json", record
        )
    return tmp_path


def manifests(folder: Path) -> list[Path]:
    return [folder / "manifests/models/x.json", folder / "manifests/suites/x.json", folder / "images/x.json"]


def wrong(folder: Path, deep: bool = False) -> list[str]:
    return [line for path in manifests(folder) for line in store.of_manifest(path, folder, deep)]


def test_a_whole_store_has_nothing_wrong(staged: Path) -> None:
    assert wrong(staged) == []
    assert wrong(staged, deep=True) == []


@pytest.mark.parametrize(
    "name", ["models/m/config.json", "models/m/model.safetensors", "huggingface/datasets/arc/a.arrow", "images/i.sif"]
)
def test_a_file_that_is_gone_cut_off_or_changed_is_named(staged: Path, name: str) -> None:
    path = staged / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert wrong(staged) == [f"{path}: has {len(whole) - 1:,} bytes, and was staged with {len(whole):,}"]
    path.write_bytes(whole + b"!")
    assert wrong(staged) == [f"{path}: has {len(whole) + 1:,} bytes, and was staged with {len(whole):,}"]
    path.write_bytes(b"!" + whole[1:])
    assert wrong(staged, deep=True) == [f"{path}: its content is not what was staged (SHA-256 differs)"]
    # Of what is large only `deep` reads the content, and `stage` where the file is younger than its manifest.
    large = name == "models/m/model.safetensors"
    assert bool(wrong(staged)) == (not large)
    os.utime(path, (2e9, 2e9))
    changed = [line for manifest in manifests(staged) for line in store.of_manifest(manifest, staged, changed=True)]
    assert changed == wrong(staged, deep=True)
    path.unlink()
    assert wrong(staged) == [f"{path}: missing"]


def test_a_manifest_that_is_missing_or_broken_is_named(staged: Path) -> None:
    first, second, _ = manifests(staged)
    first.unlink()
    second.write_text("{")
    assert [str(path) in line for path, line in zip((first, second), wrong(staged), strict=True)] == [True, True]


def test_a_store_that_cannot_be_looked_at_is_not_taken_for_a_whole_one(staged: Path) -> None:
    """Here a file lies where a folder should, as when a mount is missing."""
    folder = staged / "models/m"
    shutil.rmtree(folder)
    folder.write_text("")
    assert wrong(staged) == [
        f"{folder / name}: cannot be read (Not a directory)" for name in ("config.json", "model.safetensors")
    ]


def run(model: str, seed: int, folder: str = "/data/store") -> RunFile:
    identity = {"model": {"folder": f"models/{model}"}, "units": [{"suite": "core", "task": "arc"}]}
    asked = Run(
        name=f"{model}-{seed:012}", model_name=model, model=ModelConfig(path="m"), units=[UNIT], identity=identity
    )
    return run_file(run=asked, seed=seed, store=folder)


def test_what_an_evaluation_needs_is_every_model_and_suite_of_its_runs_once() -> None:
    """Two models, of which the first is evaluated twice, and one suite."""
    found = [str(path) for path in store.manifests([run("a", 1), run("a", 2), run("b", 1)])]
    assert [re.sub(r"-[0-9a-f]{12}", "", path) for path in found] == [
        "/data/store/manifests/models/a.json",
        "/data/store/manifests/models/b.json",
        "/data/store/manifests/suites/core.json",
    ]


def test_no_evaluation_begins_unless_all_that_it_needs_is_there(
    staged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "complete.txt"
    names = manifests(staged)
    monkeypatch.setattr(
        sys, "argv", ["store", "check", "--store", str(staged), "--out", str(out), *map(str, reversed(names))]
    )
    last = staged / "models/m/config.json"
    whole = last.read_bytes()
    last.unlink()
    with pytest.raises(SystemExit, match=r"(?s)not as it was staged.*config\.json: missing.*snakemake stage"):
        store.main()
    assert not out.exists()
    last.write_bytes(whole)
    store.main()
    assert out.exists()


def test_staging_again_reads_what_changed_since_and_looks_at_the_images(
    staged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = run("m", 1, str(staged))
    for old, new in zip(manifests(staged), store.manifests([asked]), strict=False):
        old.rename(new)
    snapshot = write_snapshot(tmp_path, [asked])
    image = staged / "images/x.json"
    monkeypatch.setattr(sys, "argv", ["store", "show", "--snapshot", str(snapshot), "--images", str(image)])
    store.main()
    assert "is complete: 3 manifests" in capsys.readouterr().out
    large = staged / "models/m/model.safetensors"
    large.write_bytes(b"!" + large.read_bytes()[1:])
    os.utime(large, (2e9, 2e9))
    (staged / "images/i.sif").unlink()
    with pytest.raises(SystemExit, match=r"(?s)model.safetensors: its content.*i\.sif: missing"):
        store.main()


# --- what is gathered ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["head", "node", "engine"])
def test_facts_are_gathered_here_and_leave_nothing_behind(tmp_path: Path, role: Role) -> None:
    env = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "HF_TOKEN": "hf_secret"}
    found = gather(role, tmp_path / "results", tmp_path / "store", env)
    assert found.memory_bytes is not None
    assert found.cpus == len(os.sched_getaffinity(0))
    assert abs(found.clock_skew_s or 0.0) < 60
    assert found.store.trouble is None
    assert "hf_secret" not in found.model_dump_json()
    assert found.tokens == (["HF_TOKEN"] if role == "head" else [])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert {one.check for one in examine(found, asked())} == {
        name for name, (_, roles) in CHECKS.items() if role in roles
    }


class TwoGpus(Nvml):
    """All that is asked about a GPU, of the machine that test_memory.py has."""

    NVML_COMPUTEMODE_DEFAULT = 0

    def __getattr__(self, name: str) -> Any:
        return {
            "nvmlDeviceGetName": lambda handle: f"GPU {handle}",
            "nvmlDeviceGetCudaComputeCapability": lambda handle: (9, 0),
            "nvmlDeviceGetMigMode": lambda handle: (0, 0),
            "nvmlDeviceGetComputeMode": lambda handle: 0,
            "nvmlSystemGetCudaDriverVersion": lambda: 13000,
            "nvmlSystemGetDriverVersion": lambda: "580.1",
        }[name]

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> SimpleNamespace:
        return SimpleNamespace(total=80 * GIB, used=0)


def test_gpus_are_those_that_cuda_sees_by_whatever_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", TwoGpus())
    found = gather("engine", tmp_path / "results", tmp_path / "store", {"CUDA_VISIBLE_DEVICES": "GPU-bb"})
    assert [gpu.name for gpu in found.gpus] == ["GPU 1"]
    assert (found.driver, found.driver_cuda, found.nvml) == ("580.1", "13.0", None)
    assert len(found.holders) == 1


def test_a_socket_is_tried_for_real(tmp_path: Path) -> None:
    assert doctor_facts.ipc_trouble(Path("/tmp")) is None
    long = tmp_path / ("x" * 100)
    long.mkdir()
    assert doctor_facts.ipc_trouble(long) is not None
    # The limit that the check goes by is the system's.
    with socket.socket(socket.AF_UNIX) as test, pytest.raises(OSError, match="too long"):
        test.bind("/tmp/" + "x" * 103)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert doctor_facts.space(tmp_path / "file" / "below").trouble == "Not a directory"
    assert doctor_facts.space(tmp_path / "not" / "yet").trouble is None


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/job/step\n", {"job/memory.max": "1000\n", "job/step/memory.max": "max\n"}, 1000),
        ("0::/job/step\n", {"job/memory.max": "max\n"}, None),
        ("0::/outside\n", {"memory.max": "77\n"}, 77),
        ("9:memory:/slurm/job\n", {"memory/slurm/job/memory.limit_in_bytes": "500\n"}, 500),
        ("9:memory:/slurm\n", {"memory/slurm/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ("", {}, None),
    ],
)
def test_the_limit_of_a_job_is_that_of_its_control_group(
    tmp_path: Path, groups: str, files: dict[str, str], limit: int | None
) -> None:
    (tmp_path / "cgroup").write_text(groups)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    assert doctor_facts.control_group_bytes(tmp_path / "cgroup", tmp_path / "fs") == limit

"""A copy on the node's disk: whole and checked, shared by the jobs of the node, and gone after the last of them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reproval import loading, local_copy
from reproval.files import sha256_file, write_record
from reproval.local_copy import LocalCopyError, copied
from reproval.records import ModelManifest, StoredFile

BASE = Path(__file__).resolve().parents[2]


@pytest.fixture
def manifest(tmp_path: Path) -> ModelManifest:
    folder = tmp_path / "store"
    (folder / "sub").mkdir(parents=True)
    files = []
    for name, data in {"config.json": b"{}", "model.safetensors": bytes(3 * 2**20), "sub/vocab.txt": b"a b"}.items():
        (folder / name).write_bytes(data)
        files.append(StoredFile(path=name, size_bytes=len(data), sha256=sha256_file(folder / name)))
    return ModelManifest(model="m", source="local", folder=str(folder), files=files, digest="ab" * 32)


def left(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_nothing_is_copied_unless_asked(manifest: ModelManifest) -> None:
    with copied(manifest, None) as folder:
        assert folder == manifest.folder


def test_the_copy_is_whole_and_goes_with_the_job(manifest: ModelManifest, tmp_path: Path) -> None:
    disk = tmp_path / "scratch"
    with copied(manifest, str(disk)) as folder:
        assert Path(folder).is_relative_to(disk)
        for entry in manifest.files:
            assert sha256_file(Path(folder) / entry.path) == entry.sha256
    assert left(disk) == []
    with copied(manifest, str(disk)) as again:
        assert again == folder, "the compile cache depends on the name"
    with pytest.raises(RuntimeError, match="engine"), copied(manifest, str(disk)):
        raise RuntimeError("the engine failed")
    assert left(disk) == []


def test_tmpdir_is_where_python_looks(manifest: ModelManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "node"))
    assert local_copy.root("$TMPDIR") == tmp_path / "node" / f"reproval-models-{os.getuid()}"


def test_two_jobs_share_one_copy(manifest: ModelManifest, tmp_path: Path) -> None:
    disk = tmp_path / "scratch"
    with copied(manifest, str(disk)) as first:
        stamp = (Path(first) / "model.safetensors").stat().st_mtime_ns
        with copied(manifest, str(disk)) as second:
            assert second == first
            assert (Path(second) / "model.safetensors").stat().st_mtime_ns == stamp
        assert (Path(first) / "model.safetensors").exists(), "the first job still reads it"
    assert left(disk) == []


def test_a_damaged_file_is_named_and_no_copy_stays(manifest: ModelManifest, tmp_path: Path) -> None:
    weights = Path(manifest.folder) / "model.safetensors"
    weights.write_bytes(b"!" + bytes(3 * 2**20 - 1))
    refused = pytest.raises(LocalCopyError, match=r"store/model.safetensors: its content")
    with refused, copied(manifest, str(tmp_path / "scratch")):
        pass
    assert left(tmp_path / "scratch") == []


def test_without_room_it_is_refused(manifest: ModelManifest, tmp_path: Path) -> None:
    huge = [manifest.files[0].model_copy(update={"size_bytes": 2**60})]
    too_large = manifest.model_copy(update={"files": huge})
    with pytest.raises(LocalCopyError, match="GiB free"), copied(too_large, str(tmp_path / "scratch")):
        pass
    assert left(tmp_path / "scratch") == []


def test_a_folder_that_cannot_be_made_is_told(manifest: ModelManifest, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalCopyError, match="Not a directory"), copied(manifest, str(tmp_path / "file")):
        pass


JOB = """
import sys, time
from pathlib import Path
from reproval.files import read_record
from reproval.local_copy import copied
from reproval.records import ModelManifest
with copied(read_record(Path(sys.argv[1]), ModelManifest), sys.argv[2]) as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_job_leaves_is_removed_by_the_next(manifest: ModelManifest, tmp_path: Path) -> None:
    disk = tmp_path / "scratch"
    write_record(tmp_path / "manifest.json", manifest)
    job = subprocess.Popen(
        [sys.executable, "-c", JOB, str(tmp_path / "manifest.json"), str(disk)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(BASE / "workflow")},
        text=True,
    )
    assert job.stdout is not None
    held = Path(job.stdout.readline().strip())
    other = manifest.model_copy(update={"digest": "cd" * 32})
    with copied(other, str(disk)):
        assert (held / "model.safetensors").exists(), "a copy that is held is nobody's to remove"
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert (held / "model.safetensors").exists()
    with copied(other, str(disk)):
        assert not held.exists()
    assert left(disk) == []


def test_jobs_that_begin_and_end_at_once_never_lose_their_copy(manifest: ModelManifest, tmp_path: Path) -> None:
    write_record(tmp_path / "manifest.json", manifest)
    code = """
import sys
from pathlib import Path
from reproval.files import read_record, sha256_file
from reproval.local_copy import copied
from reproval.records import ModelManifest
manifest = read_record(Path(sys.argv[1]), ModelManifest)
for _ in range(40):
    with copied(manifest, sys.argv[2]) as folder:
        for entry in manifest.files:
            assert sha256_file(Path(folder) / entry.path) == entry.sha256
"""
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "manifest.json"), str(tmp_path / "scratch")],
            env=os.environ | {"PYTHONPATH": str(BASE / "workflow")},
        )
        for _ in range(3)
    ]
    end = time.monotonic() + 60
    assert [job.wait(end - time.monotonic()) for job in jobs] == [0, 0, 0]
    assert left(tmp_path / "scratch") == []


# --- how weights are read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "weights", "free", "chosen"),
    [
        ("gpfs", 10, 100, "prefetch"),
        ("beegfs", 91, 100, None),
        ("nfs4", 10, 100, None),  # vLLM does it by itself
        ("lustre", 10, 100, None),
        ("ext4", 10, 100, None),
        (None, 10, 100, None),
    ],
)
def test_weights_are_prefetched_where_small_reads_are_slow(
    kind: str | None, weights: int, free: int, chosen: str | None
) -> None:
    assert loading.strategy(kind, weights, free) == chosen


def test_the_file_system_is_that_of_the_longest_mount_point(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/a / ext4 rw 0 0\nserver /data gpfs rw 0 0\n/dev/b /data/local xfs rw 0 0\ns /a\\040b nfs4 rw 0 0\n"
        "other /data lustre rw 0 0\n"
    )
    for path, kind in {
        "/data/m": "lustre",  # mounted later, over the other
        "/data/local/m": "xfs",
        "/database/m": "ext4",
        "/a b/m": "nfs4",
    }.items():
        assert loading.file_system(Path(path), mounts) == kind
    assert loading.file_system(Path("/"), tmp_path / "none") is None


def test_an_error_of_the_evaluation_is_no_error_of_the_copy(manifest: ModelManifest, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="results"), copied(manifest, str(tmp_path / "scratch")):
        raise FileNotFoundError("results/child.json")
    assert left(tmp_path / "scratch") == []


def test_a_disk_without_locks_is_named(
    manifest: ModelManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", no_locks)
    refused = pytest.raises(LocalCopyError, match=r"scratch.*without locks; choose")
    with refused, copied(manifest, str(tmp_path / "scratch")):
        pass


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOSYS, "Function not implemented")

"""Models get into the store whole, at a commit, or not at all. The Hub here is a server on loopback."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from examples import run_file
from loopback_hub import COMMIT, Hub, serving

from reproval import download, stage, store
from reproval.files import read_record, write_record
from reproval.model_tensors import Tensor, read_tensors
from reproval.records import ModelManifest, StoredFile
from reproval.run_file import RunFile, model_key, write_snapshot
from reproval.settings import ModelConfig

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": b"\x02\0\0\0\0\0\0\0{}",
    "pytorch_model.bin": b"the same weights again",
    "modeling.py": b"raise SystemExit",
}
BASE = Path(__file__).resolve().parents[2]


def weights(name: str, size: int, sha256: str = "0" * 64) -> StoredFile:
    return StoredFile(path=name, size_bytes=size, sha256=sha256)


@pytest.fixture
def hub() -> Iterator[str]:
    with serving(FILES) as address:
        yield address


def run(
    folder: Path, endpoint: str, model: dict[str, Any], weights: bool = True, name: str = "m", **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python -m reproval.stage model` as the rule calls it, and then `weights`."""
    entry = run_file()
    identity = {"model": model, "units": []}
    update = {"name": f"{name}-{0:012}", "model_name": name, "model": ModelConfig(**model), "identity": identity}
    asked = entry.run.model_copy(update=update)
    changed = RunFile(**(dict(entry) | {"run": asked, "store": str(folder / "store")}))
    snapshot = write_snapshot(folder, [changed])
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    clean |= {"PYTHONPATH": str(BASE / "workflow"), "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home")}
    clean |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}

    def stage(*told: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "reproval.stage", *told]
        return subprocess.run(command, cwd=folder, env=clean | environment, capture_output=True, text=True, timeout=120)

    done = stage("model", "--snapshot", str(snapshot), "--key", model_key(asked), "--out", "manifest.json")
    if done.returncode or not weights:
        return done
    return stage("weights", "--manifest", "manifest.json", "--out", "manifest.weights")


def test_a_hub_model_is_stored_at_its_commit_without_what_nobody_reads(tmp_path: Path, hub: str) -> None:
    done = run(tmp_path, hub, {"hub": "org/m", "revision": COMMIT})
    assert done.returncode == 0, done.stderr
    manifest = read_record(tmp_path / "manifest.json", ModelManifest)
    assert manifest.revision == COMMIT
    assert {entry.path for entry in manifest.files} == {"config.json", "tokenizer.json", "model.safetensors"}
    for entry in manifest.files:
        assert (Path(manifest.folder) / entry.path).read_bytes() == FILES[entry.path]
        assert entry.sha256 == hashlib.sha256(FILES[entry.path]).hexdigest()


@pytest.mark.parametrize("again", ["consolidated.safetensors", "original/model.safetensors"])
def test_weights_are_not_fetched_in_a_second_layout(tmp_path: Path, hub: str, again: str) -> None:
    for name, data in {again: b"other bytes", "params.json": b"{}"}.items():
        Hub.files[name] = Hub.promised[name] = data
    done = run(tmp_path, hub, {"hub": "org/m", "revision": COMMIT})
    assert done.returncode == 0, done.stderr
    manifest = read_record(tmp_path / "manifest.json", ModelManifest)
    assert {entry.path for entry in manifest.files} == {*FILES, "params.json"} - {"pytorch_model.bin", "modeling.py"}
    assert not (tmp_path / manifest.folder / again).exists()


def test_code_of_a_checkpoint_is_fetched_only_if_it_is_asked_for(tmp_path: Path, hub: str) -> None:
    done = run(tmp_path, hub, {"hub": "org/m", "revision": COMMIT, "trust_remote_code": True})
    assert done.returncode == 0, done.stderr
    assert "modeling.py" in {entry.path for entry in read_record(tmp_path / "manifest.json", ModelManifest).files}


def test_a_branch_is_written_down_as_the_commit_that_it_was(tmp_path: Path, hub: str) -> None:
    done = run(tmp_path, hub, {"hub": "org/m", "revision": "main", "allow_floating": True})
    assert done.returncode == 0, done.stderr
    assert read_record(tmp_path / "manifest.json", ModelManifest).revision == COMMIT


def test_a_file_that_is_not_the_hubs_is_refused_and_removed(tmp_path: Path, hub: str) -> None:
    Hub.files["model.safetensors"] = b"\x02\0\0\0\0\0\0\0[]"
    done = run(tmp_path, hub, {"hub": "org/m", "revision": COMMIT})
    assert done.returncode != 0
    assert "model.safetensors" in done.stderr
    assert not list((tmp_path / "store").rglob("model.safetensors"))
    assert not (tmp_path / "manifest.json").exists()


def test_a_small_file_that_is_not_the_hubs_is_refused_too(tmp_path: Path, hub: str) -> None:
    Hub.files["config.json"] = b"[]"
    done = run(tmp_path, hub, {"hub": "org/m", "revision": COMMIT})
    assert done.returncode != 0
    assert "config.json" in done.stderr


MIB = 2**20
# The Hub's client keeps what has come in pieces of 10 MiB.
DATA = bytes(range(256)) * (35 * 4096)
HEADER = json.dumps({"w": {"dtype": "U8", "shape": [len(DATA)], "data_offsets": [0, len(DATA)]}}).encode()
LARGE = len(HEADER).to_bytes(8, "little") + HEADER + DATA


def test_a_plan_needs_no_more_of_large_weights_than_their_headers(tmp_path: Path, hub: str) -> None:
    Hub.files["model.safetensors"] = Hub.promised["model.safetensors"] = LARGE
    model = {"hub": "org/m", "revision": COMMIT}
    done = run(tmp_path, hub, model, weights=False)
    assert done.returncode == 0, done.stderr
    assert [wanted for name, wanted in Hub.asked if name == "model.safetensors"] == ["bytes=0-100000"]
    manifest = read_record(tmp_path / "manifest.json", ModelManifest)
    promised = next(entry for entry in manifest.files if entry.path == "model.safetensors")
    assert (promised.size_bytes, promised.sha256) == (len(LARGE), hashlib.sha256(LARGE).hexdigest())
    folder = tmp_path / manifest.folder
    assert not (folder / "model.safetensors").exists()
    assert read_tensors(folder) == [Tensor("w", "U8", (len(DATA),))]
    planned = (tmp_path / "manifest.json").read_bytes()
    assert run(tmp_path, hub, model).returncode == 0
    assert (folder / "model.safetensors").read_bytes() == LARGE
    assert read_tensors(folder) == [Tensor("w", "U8", (len(DATA),))]
    assert (tmp_path / "manifest.json").read_bytes() == planned, "what was planned would be planned again"


def test_two_models_of_one_commit_have_one_copy_of_the_weights(tmp_path: Path, hub: str) -> None:
    Hub.files["model.safetensors"] = Hub.promised["model.safetensors"] = LARGE
    model = {"hub": "org/m", "revision": COMMIT}
    assert run(tmp_path, hub, model).returncode == 0
    first = next((tmp_path / "store").rglob("model.safetensors"))
    for content, fetched in ((LARGE, False), (LARGE[:-1] + b"!", True)):
        first.write_bytes(content)
        assert run(tmp_path, hub, model, name="other").returncode == 0
        (second,) = {*(tmp_path / "store").rglob("model.safetensors")} - {first}
        assert second.read_bytes() == LARGE, "what is damaged there is not taken from there"
        assert second.samefile(first) != fetched
        second.unlink()


def test_until_weights_have_come_only_they_may_be_missing(
    tmp_path: Path, hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hub.files["model.safetensors"] = Hub.promised["model.safetensors"] = LARGE
    assert run(tmp_path, hub, {"hub": "org/m", "revision": COMMIT}, weights=False).returncode == 0
    monkeypatch.chdir(tmp_path)
    manifest = tmp_path / "models/m.json"
    manifest.parent.mkdir()
    shutil.copy("manifest.json", manifest)
    assert store.of_manifest(manifest, tmp_path / "store") == []
    manifest.with_suffix(store.WEIGHTS_NOTE).touch()
    (wrong,) = store.of_manifest(manifest, tmp_path / "store")
    assert wrong.endswith("model.safetensors: missing")
    manifest.with_suffix(store.WEIGHTS_NOTE).unlink()
    next(tmp_path.rglob("tokenizer.json")).unlink()
    (wrong,) = store.of_manifest(manifest, tmp_path / "store")
    assert wrong.endswith("tokenizer.json: missing")


def test_weights_whose_header_is_none_are_refused_before_they_are_fetched(tmp_path: Path, hub: str) -> None:
    Hub.files["model.safetensors"] = Hub.promised["model.safetensors"] = DATA
    done = run(tmp_path, hub, {"hub": "org/m", "revision": COMMIT})
    assert done.returncode != 0
    assert "models.m: model.safetensors: its header cannot be read" in done.stderr
    assert not (tmp_path / "manifest.json").exists()


def test_large_weights_that_were_damaged_in_the_store_are_named(tmp_path: Path, hub: str) -> None:
    Hub.files["model.safetensors"] = Hub.promised["model.safetensors"] = LARGE
    model = {"hub": "org/m", "revision": COMMIT}
    assert run(tmp_path, hub, model).returncode == 0
    weights = next((tmp_path / "store").rglob("model.safetensors"))
    weights.write_bytes(LARGE[:-1] + b"!")
    damaged = run(tmp_path, hub, model)
    assert damaged.returncode != 0
    assert "remove these files and run `snakemake stage` again" in damaged.stderr
    assert f"{weights.relative_to(tmp_path)}: its content is not what was staged" in damaged.stderr
    weights.unlink()
    assert run(tmp_path, hub, model).returncode == 0
    assert weights.read_bytes() == LARGE


def test_a_connection_that_breaks_is_resumed_where_it_broke(tmp_path: Path, hub: str) -> None:
    Hub.files["model.safetensors"] = Hub.promised["model.safetensors"] = LARGE
    Hub.breaks["model.safetensors"] = 12 * MIB
    done = run(tmp_path, hub, {"hub": "org/m", "revision": COMMIT})
    assert done.returncode == 0, done.stderr
    ranges = [wanted for name, wanted in Hub.asked if name == "model.safetensors"]
    begins = [int(wanted.removeprefix("bytes=").rstrip("-")) for wanted in ranges[1:] if wanted]
    assert begins == [10 * MIB, 20 * MIB, 30 * MIB], "what had come was fetched again"
    manifest = read_record(tmp_path / "manifest.json", ModelManifest)
    assert (Path(manifest.folder) / "model.safetensors").read_bytes() == LARGE


def test_a_download_that_failed_goes_on_in_the_next_run(tmp_path: Path, hub: str) -> None:
    Hub.files["model.safetensors"] = Hub.promised["model.safetensors"] = LARGE
    Hub.reaches["model.safetensors"] = 12 * MIB
    failed = run(tmp_path, hub, {"hub": "org/m", "revision": COMMIT})
    assert failed.returncode != 0
    assert "Traceback" not in failed.stderr
    assert "run `snakemake stage` again" in failed.stderr
    assert not (tmp_path / "manifest.weights").exists()
    assert not list((tmp_path / "store").rglob("model.safetensors"))
    Hub.reaches.clear()
    Hub.asked.clear()
    done = run(tmp_path, hub, {"hub": "org/m", "revision": COMMIT})
    assert done.returncode == 0, done.stderr
    ((_, wanted),) = [asked for asked in Hub.asked if asked[0] == "model.safetensors"]
    assert wanted is not None
    assert int(wanted.removeprefix("bytes=").rstrip("-")) == 10 * MIB


def test_what_came_is_kept_only_if_it_is_what_was_promised(tmp_path: Path, hub: str) -> None:
    Hub.promised["model.safetensors"] = LARGE
    Hub.files["model.safetensors"] = LARGE[:-1] + b"!"
    done = run(tmp_path, hub, {"hub": "org/m", "revision": COMMIT})
    assert done.returncode != 0
    assert "model.safetensors: what came is not what the Hub promised" in done.stderr
    assert not list((tmp_path / "store").rglob("*.safetensors"))
    assert not list((tmp_path / "store").rglob("*.part"))


def test_a_disk_without_room_is_told_before_the_download(tmp_path: Path) -> None:
    size = 10 * shutil.disk_usage(tmp_path).free
    with pytest.raises(download.DownloadError, match="GiB are to come"):
        download.fetch("org/m", COMMIT, [weights("model.safetensors", size)], tmp_path / "m")


def test_a_file_that_was_damaged_in_the_store_is_named_and_fetched_again(tmp_path: Path, hub: str) -> None:
    done = run(tmp_path, hub, {"hub": "org/m", "revision": COMMIT})
    assert done.returncode == 0, done.stderr
    weights = Path(read_record(tmp_path / "manifest.json", ModelManifest).folder) / "model.safetensors"
    times = weights.stat()
    weights.write_bytes(b"\x02\0\0\0\0\0\0\0[]")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    again = run(tmp_path, hub, {"hub": "org/m", "revision": COMMIT})
    assert again.returncode != 0
    assert str(weights) in again.stderr
    mended = run(tmp_path, hub, {"hub": "org/m", "revision": COMMIT})
    assert mended.returncode == 0, mended.stderr
    assert weights.read_bytes() == FILES["model.safetensors"]


def test_a_gated_model_needs_its_token_and_the_token_is_nowhere(tmp_path: Path, hub: str) -> None:
    Hub.token = "hf_" + "x" * 30
    model = {"hub": "org/m", "revision": COMMIT, "gated": True}
    without = run(tmp_path, hub, model)
    assert without.returncode != 0
    assert "HF_TOKEN" in without.stderr
    done = run(tmp_path, hub, model, HF_TOKEN=Hub.token)
    assert done.returncode == 0, done.stderr
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(Hub.token.encode() in data for data in [*written, done.stdout.encode(), done.stderr.encode()])


def test_without_the_network_the_message_says_what_to_do(tmp_path: Path) -> None:
    done = run(tmp_path, "http://127.0.0.1:9", {"hub": "org/m", "revision": COMMIT})
    assert done.returncode != 0
    assert "models.m: org/m" in done.stderr
    assert "where the network is" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_the_network_a_model_that_is_whole_is_staged_still(tmp_path: Path, hub: str) -> None:
    model = {"hub": "org/m", "revision": COMMIT}
    assert run(tmp_path, hub, model).returncode == 0
    first = (tmp_path / "manifest.json").read_bytes()
    (tmp_path / "manifest.json").unlink()
    again = run(tmp_path, "http://127.0.0.1:9", model)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "manifest.json").read_bytes() == first
    weights = next((tmp_path / "store").rglob("model.safetensors"))
    weights.write_bytes(b"\x02\0\0\0\0\0\0\0[]")
    damaged = run(tmp_path, "http://127.0.0.1:9", model)
    assert damaged.returncode != 0
    assert f"{weights}: its content is not what was staged" in damaged.stderr


def test_a_local_folder_stays_where_it_is_and_is_measured(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    (folder / "consolidated.safetensors").write_bytes(b"the same in Mistral's layout, which is not read")
    manifest = stage.stage_model("m", ModelConfig(path=str(folder)), tmp_path / "store")
    assert manifest.source == "local"
    assert {entry.path for entry in manifest.files} == {"config.json", "tokenizer.json", "model.safetensors"}
    before = manifest.digest
    (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0[]")
    assert stage.stage_model("m", ModelConfig(path=str(folder)), tmp_path / "store").digest != before
    assert not (tmp_path / "store").exists()


def test_on_a_file_system_without_locks_it_is_downloaded_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"weights"
    wanted = weights("model.safetensors", len(data), hashlib.sha256(data).hexdigest())
    part = tmp_path / download.PARTS / f"{wanted.sha256}.part"
    part.parent.mkdir()
    part.write_bytes(data)

    def refuse(number: int) -> None:
        def flock(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("fcntl.flock", flock)

    refuse(errno.EWOULDBLOCK)
    with pytest.raises(download.DownloadError, match="another process"):
        download.fetch("org/m", COMMIT, [wanted], tmp_path)
    refuse(errno.ENOSYS)
    download.fetch("org/m", COMMIT, [wanted], tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == data


def test_a_gated_model_that_is_whole_stays_staged_without_a_token(tmp_path: Path, hub: str) -> None:
    gated = {"hub": "org/m", "revision": COMMIT, "gated": True}
    refused = run(tmp_path, hub, gated)
    assert refused.returncode != 0
    assert "into HF_TOKEN" in refused.stderr
    # The older name of the variable is read as well.
    done = run(tmp_path, hub, gated, HUGGING_FACE_HUB_TOKEN="hf_any")
    assert done.returncode == 0, done.stderr
    (tmp_path / "manifest.json").unlink()
    again = run(tmp_path, hub, gated)
    assert again.returncode == 0, again.stderr
    assert read_record(tmp_path / "manifest.json", ModelManifest).revision == COMMIT


def test_what_is_too_large_for_http_is_left_to_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"a.safetensors": 20 * MIB, "b.safetensors": 50 * 10**9, "c.safetensors": 50 * 10**9 + 1}
    ours, theirs = [], []
    monkeypatch.setattr(download, "fetch", lambda _, __, wanted, ___: ours.extend(file.path for file in wanted))
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, allow_patterns, **__: theirs.extend(allow_patterns)
    )
    # The client does not say what it got, so it is compared with the promise here.
    with pytest.raises(stage.StageError, match=r"not what the Hub promised: .*c\.safetensors: missing"):
        stage.fetch_files("org/m", COMMIT, [weights(name, size) for name, size in sizes.items()], tmp_path)
    assert (ours, theirs) == (["a.safetensors", "b.safetensors"], ["c.safetensors"])


LOGIN_PAGE = json.JSONDecodeError("Expecting value", "<html>", 0)


@pytest.mark.parametrize("raised", [RuntimeError("Task error: CAS Client Error"), LOGIN_PAGE, OSError("no route")])
def test_whatever_a_client_raises_the_hub_was_not_reached(
    tmp_path: Path, hub: str, monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    model = {"hub": "org/m", "revision": COMMIT}
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    with pytest.raises(stage.Unreachable, match=rf"models\.m: org/m at {COMMIT} could not be fetched: "):
        stage.stage_model("m", ModelConfig(**model), tmp_path / "store")
    assert run(tmp_path, hub, model).returncode == 0
    kept = stage.stage_model("m", ModelConfig(**model), tmp_path / "store")
    assert kept == read_record(tmp_path / "manifest.json", ModelManifest)


def test_what_is_not_the_networks_fault_is_not_called_so() -> None:
    told = stage.StageError("not what the Hub promised")
    with pytest.raises(stage.StageError) as caught, stage._reaching("m", "org/m", COMMIT):
        raise told
    assert caught.value is told


def test_a_file_that_cannot_be_written_is_told_with_its_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    local = ModelManifest(model="m", source="local", folder=str(tmp_path), files=[], digest="0" * 64)
    write_record(tmp_path / "m.json", local)
    out = tmp_path / "m.json/m.weights"
    monkeypatch.setattr(sys, "argv", ["stage", "weights", "--manifest", str(tmp_path / "m.json"), "--out", str(out)])
    with pytest.raises(SystemExit) as stopped:
        stage.main()
    message = str(stopped.value)
    assert message.startswith(f"reproval stage: {tmp_path}/m.json")
    assert "mend that (make room, permit it), and start again" in message


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    ("gone", "there", "said"),
    [
        (
            ("config.json", "model.safetensors"),
            ("adapter_config.json", "adapter_model.safetensors"),
            "found an adapter (adapter_config.json) without the model that it changes; expected a whole model; ",
        ),
        (("config.json",), (), "found no config.json; there: model.safetensors, tokenizer.json; expected "),
        (("tokenizer.json",), (), "found no tokenizer; there: config.json, model.safetensors; expected "),
    ],
)
def test_a_repository_that_is_no_whole_model_is_refused(
    tmp_path: Path, hub: str, gone: tuple[str, ...], there: tuple[str, ...], said: str, large: bool
) -> None:
    for name in gone:
        del Hub.files[name], Hub.promised[name]
    for name in there:
        Hub.files[name] = Hub.promised[name] = b"{}"
    for name in [name for name in Hub.files if name.endswith(".safetensors")]:
        Hub.files[name] = Hub.promised[name] = LARGE if large else FILES["model.safetensors"]
    done = run(tmp_path, hub, {"hub": "org/m", "revision": COMMIT}, weights=False)
    assert done.returncode != 0
    assert f"reproval stage: models.m: org/m: {said}" in done.stderr
    assert "and give it as `path`: " in done.stderr
    assert not (tmp_path / "manifest.json").exists()


def test_code_of_a_checkpoint_may_bring_its_own_tokenizer(tmp_path: Path, hub: str) -> None:
    del Hub.files["tokenizer.json"], Hub.promised["tokenizer.json"]
    Hub.files["tiktoken.model"] = Hub.promised["tiktoken.model"] = b"as Kimi's"
    done = run(tmp_path, hub, {"hub": "org/m", "revision": COMMIT, "trust_remote_code": True})
    assert done.returncode == 0, done.stderr


def two_models_at_once(store: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stage the weights of two models of one commit at the same time; return the folders that were downloaded to."""
    data = b"weights"
    entry = weights("model.safetensors", len(data), hashlib.sha256(data).hexdigest())
    fetched = []

    def slowly(_: str, __: str, files: list[StoredFile], folder: Path) -> None:
        fetched.append(folder.name)
        time.sleep(0.3)
        for file in files:
            (folder / file.path).write_bytes(data)

    monkeypatch.setattr(stage, "fetch_files", slowly)
    manifests = []
    for name in ("a", "b"):
        folder = store / "models" / f"{name}-{COMMIT[:12]}"
        folder.mkdir(parents=True)
        made = {"source": "hub", "hub_id": "org/m", "revision": COMMIT, "digest": "0" * 64}
        manifests.append(ModelManifest(model=name, folder=str(folder), files=[entry], **made))
    threads = [threading.Thread(target=stage.stage_weights, args=[manifest]) for manifest in manifests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [Path(each.folder, entry.path).read_bytes() for each in manifests] == [data, data]
    return fetched


def test_two_jobs_that_want_one_commit_fetch_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(two_models_at_once(tmp_path, monkeypatch)) == 1
    first, second = tmp_path.rglob("model.safetensors")
    assert first.samefile(second)


@pytest.mark.parametrize("without", ["locks", "the right to open another user's"])
def test_two_jobs_that_cannot_wait_fetch_each_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    opened = Path.open

    def closed(path: Path, *arguments: Any, **more: Any) -> Any:
        if path.suffix == ".lock":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **more)

    if without == "locks":
        monkeypatch.setattr("fcntl.flock", refuse)
    else:
        monkeypatch.setattr(Path, "open", closed)
    assert sorted(two_models_at_once(tmp_path, monkeypatch)) == [f"{name}-{COMMIT[:12]}" for name in "ab"]

"""Models get into the store whole, at a commit, or not at all. The Hub here is a server on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from examples import run_file

from reproval import stage
from reproval.files import read_record
from reproval.records import ModelManifest
from reproval.run_file import RunFile, model_key, write_snapshot
from reproval.settings import ModelConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": b"\x02\0\0\0\0\0\0\0{}",
    "pytorch_model.bin": b"the same weights again",
    "modeling.py": b"raise SystemExit",
}
BASE = Path(__file__).resolve().parents[2]


class Hub(BaseHTTPRequestHandler):
    """Just enough of the Hugging Face Hub: one model at one commit, gated if TOKEN is set."""

    files: ClassVar[dict[str, bytes]] = {}
    promised: ClassVar[dict[str, bytes]] = {}
    token: ClassVar[str | None] = None

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.token and self.headers.get("Authorization") != f"Bearer {self.token}":
            self.answer(401, X_Error_Code="GatedRepo", X_Error_Message="Access to model org/m is restricted.")
        elif path.startswith("/api/models/org/m/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                | {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1}}
                for name, data in self.promised.items()
            ]
            self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        elif path.startswith("/api/models/org/m"):
            siblings = [
                {
                    "rfilename": name,
                    "size": len(data),
                    "blobId": hashlib.sha1(data).hexdigest(),
                    "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1},
                }
                for name, data in self.promised.items()
            ]
            info = {"_id": "1", "id": "org/m", "sha": COMMIT, "private": False, "siblings": siblings, "tags": []}
            self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        elif path.startswith(f"/org/m/resolve/{COMMIT}/") and (name := path.rsplit("/", 1)[1]) in self.files:
            data = self.files[name]
            self.answer(200, data, ETag=f'"{hashlib.sha256(self.promised[name]).hexdigest()}"', X_Repo_Commit=COMMIT)
        else:
            self.answer(404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.files, Hub.promised, Hub.token = dict(FILES), dict(FILES), None
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run(folder: Path, endpoint: str, model: dict[str, Any], **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m reproval.stage model` as the rule calls it."""
    entry = run_file()
    asked = entry.run.model_copy(update={"model": ModelConfig(**model), "identity": {"model": model, "units": []}})
    changed = RunFile(**(dict(entry) | {"run": asked, "store": str(folder / "store")}))
    snapshot = write_snapshot(folder, [changed])
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    told = ["--snapshot", str(snapshot), "--key", model_key(asked), "--out", "manifest.json"]
    return subprocess.run(
        [sys.executable, "-m", "reproval.stage", "model", *told],
        cwd=folder,
        env=clean
        | {"PYTHONPATH": str(BASE / "workflow"), "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home")}
        | {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_hub_model_is_stored_at_its_commit_without_what_nobody_reads(tmp_path: Path, hub: str) -> None:
    done = run(tmp_path, hub, {"hub": "org/m", "revision": COMMIT})
    assert done.returncode == 0, done.stderr
    manifest = read_record(tmp_path / "manifest.json", ModelManifest)
    assert manifest.revision == COMMIT
    assert {entry.path for entry in manifest.files} == {"config.json", "tokenizer.json", "model.safetensors"}
    for entry in manifest.files:
        assert (Path(manifest.folder) / entry.path).read_bytes() == FILES[entry.path]
        assert entry.sha256 == hashlib.sha256(FILES[entry.path]).hexdigest()


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


def test_a_local_folder_stays_where_it_is_and_is_measured(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    manifest = stage.stage_model("m", ModelConfig(path=str(folder)), tmp_path / "store")
    assert manifest.source == "local"
    before = manifest.digest
    (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0[]")
    assert stage.stage_model("m", ModelConfig(path=str(folder)), tmp_path / "store").digest != before
    assert not (tmp_path / "store").exists()

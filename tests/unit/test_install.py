"""The installer looks where pip would look, and nothing of the caller's Python gets into what it makes."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest

ENVS = Path(__file__).parents[2] / "envs"
sys.path.insert(0, str(ENVS))

import install  # noqa: E402  (envs/ is no package)


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/wheels"


@pytest.fixture
def empty_server() -> Iterator[str]:
    """Answers 404 to everything."""

    class NotFound(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/simple"
    server.shutdown()
    server.server_close()


def test_a_mirror_that_pip_is_configured_for_is_used(tmp_path: Path, empty_server: str) -> None:
    pip = {
        "index-url": "https://mirror.example/simple",
        "extra-index-url": f"\n{empty_server}\n",
        "find-links": f"{tmp_path}",
        "trusted-host": "mirror.example",
        "cert": "/etc/ours.pem",
    }
    made = install.uv_environment(pip, {})
    assert made["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
    assert made["UV_INDEX"] == empty_server
    assert made["UV_FIND_LINKS"] == str(tmp_path)
    assert made["UV_INSECURE_HOST"] == "mirror.example"
    assert made["SSL_CERT_FILE"] == "/etc/ours.pem"


def test_what_the_caller_says_to_uv_about_sources_wins() -> None:
    caller = {"UV_CACHE_DIR": "/big/disk", "UV_DEFAULT_INDEX": "https://uv.example"}
    made = install.uv_environment({"index-url": "https://pip.example"}, caller)
    assert (made["UV_CACHE_DIR"], made["UV_DEFAULT_INDEX"]) == ("/big/disk", "https://uv.example")


def test_nothing_of_the_callers_python_gets_in() -> None:
    caller = {
        "PYTHONPATH": "/x",
        "VIRTUAL_ENV": "/y",
        "UV_SYSTEM_PYTHON": "1",
        "UV_NO_VERIFY_HASHES": "1",
        "HOME": "/h",
    }
    made = install.uv_environment({}, caller)
    assert not {"PYTHONPATH", "VIRTUAL_ENV", "UV_SYSTEM_PYTHON", "UV_NO_VERIFY_HASHES"} & set(made)
    assert made["HOME"] == "/h"


def test_sources_that_are_not_there_are_passed_over(
    silent_server: str, empty_server: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "SOURCE_TIMEOUT_S", 0.3)
    made = install.uv_environment({"find-links": f"/no/such/folder {silent_server} {empty_server}"}, {})
    assert "UV_FIND_LINKS" not in made
    told = capfd.readouterr().err
    assert all(source in told for source in ("/no/such/folder", silent_server, empty_server))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of envs/ with an environment `uv` that claims to be complete."""
    shutil.copytree(ENVS, tmp_path / "envs", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(install, "ENVS", tmp_path / "envs")
    monkeypatch.setattr(install, "HOME", tmp_path / ".env")
    python = tmp_path / ".env" / "uv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (tmp_path / ".env" / "uv" / install.STAMP).write_text(json.dumps(install.stamp_of("uv")), encoding="utf-8")
    return tmp_path


def test_an_environment_is_used_as_long_as_it_is_whole(elsewhere: Path) -> None:
    assert install.up_to_date("uv")


@pytest.mark.parametrize("harm", ["lock changed", "no stamp", "half a stamp", "Python gone"])
def test_an_environment_that_is_not_whole_is_made_anew(elsewhere: Path, harm: str) -> None:
    stamp = elsewhere / ".env" / "uv" / install.STAMP
    if harm == "lock changed":
        with (elsewhere / "envs" / "uv.txt").open("a") as stream:
            stream.write("# newer\n")
    elif harm == "no stamp":
        stamp.unlink()
    elif harm == "half a stamp":
        stamp.write_text(stamp.read_text()[:20])
    else:
        (elsewhere / ".env" / "uv" / "bin" / "python").unlink()
    assert not install.up_to_date("uv")


def test_an_unknown_name_is_answered_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert install.main(["cpuu"]) == 2
    assert "controller" in capsys.readouterr().err


def test_a_wheel_of_a_local_folder_leaves_no_note_of_its_time(tmp_path: Path) -> None:
    kept, other = (tmp_path / f"lib/python3.11/site-packages/{name}-1.dist-info" for name in ("a", "b"))
    for folder in (kept, other):
        folder.mkdir(parents=True)
        lines = [f"{folder.name}/{name},sha256=x,1\n" for name in ("METADATA", "uv_cache.json", "RECORD")]
        (folder / "RECORD").write_text("".join(lines))
    (kept / "uv_cache.json").write_text('{"timestamp": 1}')
    install.forget_times(tmp_path)
    assert not (kept / "uv_cache.json").exists()
    assert (kept / "RECORD").read_text() == "a-1.dist-info/METADATA,sha256=x,1\na-1.dist-info/RECORD,sha256=x,1\n"
    assert "uv_cache" in (other / "RECORD").read_text()

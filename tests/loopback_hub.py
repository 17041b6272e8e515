"""Just enough of the Hugging Face Hub on loopback: one model, org/m, at one commit."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """`files` is what it sends, `promised` what its hashes are of; gated if `token` is set.

    Files of LFS end in .safetensors. Of a file named in `breaks` it sends so many bytes at a time and then drops the
    connection; of one in `reaches` none beyond so many.
    """

    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]] = {}
    promised: ClassVar[dict[str, bytes]] = {}
    token: ClassVar[str | None] = None
    breaks: ClassVar[dict[str, int]] = {}
    reaches: ClassVar[dict[str, int]] = {}
    asked: ClassVar[list[tuple[str, str | None]]] = []

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", send: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:send])
            if send is not None:
                self.wfile.flush()
                self.connection.shutdown(2)
                self.close_connection = True

    def entry(self, name: str, data: bytes, key: str) -> dict[str, Any]:
        lfs = {"sha256": hashlib.sha256(data).hexdigest(), "oid": hashlib.sha256(data).hexdigest()}
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        large = {"lfs": lfs | {"size": len(data), "pointerSize": 1}} if name.endswith(".safetensors") else {}
        return {key: name, "size": len(data), "blobId": blob, "oid": blob} | large

    def etag(self, name: str) -> str:
        entry = self.entry(name, self.promised[name], "path")
        return str(entry["lfs"]["sha256"] if "lfs" in entry else entry["blobId"])

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.token and self.headers.get("Authorization") != f"Bearer {self.token}":
            self.answer(401, X_Error_Code="GatedRepo", X_Error_Message="Access to model org/m is restricted.")
        elif path.startswith("/api/models/org/m/tree/"):
            tree = [{"type": "file"} | self.entry(name, data, "path") for name, data in self.promised.items()]
            self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        elif path.startswith("/api/models/org/m"):
            siblings = [self.entry(name, data, "rfilename") for name, data in self.promised.items()]
            info = {"_id": "1", "id": "org/m", "sha": COMMIT, "private": False, "siblings": siblings, "tags": []}
            self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        elif path.startswith(f"/org/m/resolve/{COMMIT}/") and (name := path.rsplit("/", 1)[1]) in self.files:
            self.file(name)
        else:
            self.answer(404, X_Error_Code="EntryNotFound")

    def file(self, name: str) -> None:
        data, wanted = self.files[name], self.headers.get("Range")
        first, _, last = wanted.removeprefix("bytes=").partition("-") if wanted else ("0", "", "")
        begin, end = int(first), min(int(last or len(data)) + 1, len(data))
        send = self.breaks.get(name)
        if name in self.reaches:
            send = max(self.reaches[name] - begin, 0)
        about = {"ETag": f'"{self.etag(name)}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if self.command == "GET":
            self.asked.append((name, wanted))
        if wanted is not None:
            about["Content_Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
            self.answer(206, data[begin:end], send, **about)
        else:
            self.answer(200, data, send, **about)

    do_HEAD = do_GET


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[str]:
    """A Hub with these files; yields its address, for HF_ENDPOINT."""
    Hub.files, Hub.promised, Hub.token, Hub.asked = dict(files), dict(files), None, []
    Hub.breaks, Hub.reaches = {}, {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()

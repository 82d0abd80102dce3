"""A fake Hub that takes what `hf upload` sends: it refuses binaries in git and takes them as large files."""

from __future__ import annotations

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

LARGE = 10 * 2**20


class Hub:
    """files: path → content of what was committed; created: what repositories were asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.blobs: dict[str, bytes] = {}

    def answer(self, method: str, path: str, body: bytes, host: str) -> tuple[int, dict]:
        if path.endswith("/repos/create"):
            self.created.append(json.loads(body))
            return 200, {"url": f"{host}/spaces/me/facesnap", "name": "me/facesnap"}
        if path.endswith("/validate-yaml"):
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/whoami-v2"):
            return 200, {"name": "me", "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        if path.endswith("/preupload/main"):
            told = [
                {"path": f["path"], "uploadMode": self._mode(f), "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return 200, {"files": told}
        if path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            put = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{host}/blob/{o['oid']}"}}}
                for o in asked
            ]
            return 200, {"transfer": "basic", "objects": put}
        if path.startswith("/blob/"):
            self.blobs[path.removeprefix("/blob/")] = body
            return 200, {}
        if path.endswith("/commit/main"):
            return self._commit([json.loads(line) for line in body.decode().splitlines()], host)
        if method == "GET" and "/api/spaces/" in path:
            return 200, {
                "id": "me/facesnap",
                "sha": "0" * 40,
                "siblings": [],
                "private": False,
                "tags": [],
                "downloads": 0,
            }
        return 404, {"error": f"{method} {path}"}

    @staticmethod
    def _mode(file: dict) -> str:
        sample = base64.b64decode(file.get("sample", ""))
        binary = b"\0" in sample or file["path"].endswith((".onnx", ".safetensors", ".npz"))  # as its .gitattributes
        return "lfs" if file["size"] > LARGE or binary else "regular"

    def _commit(self, lines: list[dict], host: str) -> tuple[int, dict]:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                if b"\0" in content:
                    return 400, {"error": f"{value['path']} is a binary: use large files"}
                self.files[value["path"]] = content
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.blobs[value["oid"]]
        made = "1" * 40
        return 200, {"commitUrl": f"{host}/spaces/me/facesnap/commit/{made}", "commitOid": made, "success": True}


@contextmanager
def serving(hub: Hub):
    """Gives the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            length = self.headers.get("Content-Length")
            body = self.rfile.read(int(length)) if length else self._chunks()
            host = f"http://{self.headers['Host']}"
            status, told = hub.answer(self.command, urlparse(self.path).path, body, host)
            data = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _chunks(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return b""
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        do_GET = do_POST = do_PUT = do_HEAD = _any

        def log_message(self, *given) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()

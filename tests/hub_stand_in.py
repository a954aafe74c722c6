"""A stand-in for the Hugging Face hub on loopback: what an upload asks of it, one user, repositories in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stand_in_token"
USER = "ada"


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Hub:
    """What it holds, and every request it got as `METHOD path`."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)  # by SHA-256: what came by Git LFS
    refuses: dict[str, int] = field(default_factory=dict)  # status by beginning of `METHOD path`
    opens_everything: bool = False  # a mirror that knows no private repositories


@contextmanager
def hub_on_loopback() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle("GET")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_PUT(self) -> None:
        self._handle("PUT")

    def _handle(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        line = f"{method} {path}"
        self.hub.requests.append(line)
        refused = next((status for start, status in self.hub.refuses.items() if line.startswith(start)), None)
        if method == "PUT":  # to where the hub said: signed by its address, without a token
            self.hub.large[path.rpartition("/")[2]] = body
            return self._answer(200, {})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials"})
        if refused is not None:
            return self._answer(refused, {"error": "no"})
        return self._answer(*self._of(path, body))

    def _of(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if path == "/api/whoami-v2":
            return 200, {"name": USER, "type": "user", "orgs": [{"name": "lab"}]}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"objects": [self._upload_of(one) for one in json.loads(body)["objects"]]}
        name, _, rest = path.removeprefix("/api/models/").partition("/preupload/")
        if rest:
            return 200, {"files": [_mode(one) for one in json.loads(body)["files"]]}
        name, _, rest = name.partition("/commit/")
        if name not in self.hub.repos:
            return 404, {"error": "Repository not found"}
        return self._commit(name, body) if rest else (200, self._info(name))

    def _create(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if name in self.hub.repos:
            return 409, {"error": "You already created this model repo"}
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos[name] = Repo(private and not self.hub.opens_everything)
        return 200, {"url": f"{self.hub.url}/{name}"}

    def _info(self, name: str) -> dict[str, Any]:
        repo = self.hub.repos[name]
        return {"id": name, "private": repo.private, "siblings": [{"rfilename": path} for path in repo.files]}

    def _upload_of(self, one: dict[str, Any]) -> dict[str, Any]:
        return {**one, "actions": {"upload": {"href": f"{self.hub.url}/put/{one['oid']}", "header": {}}}}

    def _commit(self, name: str, body: bytes) -> tuple[int, dict[str, Any]]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.hub.repos[name].files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                data = self.hub.large[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                self.hub.repos[name].files[value["path"]] = data
        return 200, {"commitUrl": f"{self.hub.url}/{name}/commit/1", "commitOid": "1" * 40, "success": True}

    def _answer(self, status: int, document: dict[str, Any]) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _mode(one: dict[str, Any]) -> dict[str, Any]:
    large = one["path"].endswith((".safetensors", ".gguf"))
    return {"path": one["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": None}

"""The parts of the hub's HTTP API that a push and a download use, on 127.0.0.1, with repositories in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".onnx", ".data")
"""What goes through LFS."""


@dataclass
class Hub:
    """files: repository -> branch -> path -> contents. refuse: status to answer everything with, 0 for none."""

    files: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    commits: list[dict[str, str]] = field(default_factory=list)
    private: dict[str, bool] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refuse: int = 0
    url: str = ""


def git_oid(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@contextmanager
def fake_hub() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        return None

    def _answer(self, data: object = None, status: int = 200, raw: bytes | None = None, **headers: str) -> None:
        body = raw if raw is not None else json.dumps(data).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.refuse:
            self._answer({"error": "refused"}, self.hub.refuse)
        elif self.headers.get("Authorization") is None and not path.startswith("/upload/"):
            self._answer({"error": "who are you?"}, 401)
        else:
            self._route(path.strip("/").split("/"), body)

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def _route(self, parts: list[str], body: bytes) -> None:
        hub = self.hub
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in hub.files:
                return self._answer({"error": "exists", "url": f"{hub.url}/{name}"}, 409)
            hub.files[name] = {"main": {}}
            hub.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            return self._answer({"url": f"{hub.url}/{name}", "name": name})
        if parts == ["api", "validate-yaml"]:
            return self._answer({"errors": [], "warnings": []})
        if parts[0] == "upload":
            hub.stored[parts[1]] = body
            return self._answer({})
        if parts[:2] == ["api", "models"]:
            return self._model("/".join(parts[2:4]), parts[4:], body)
        if parts[2:] == ["info", "lfs", "objects", "batch"] and parts[1].endswith(".git"):
            return self._batch(json.loads(body))
        if parts[2] == "resolve":
            return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self._answer({"error": f"no route {parts}"}, 404)

    def _model(self, name: str, rest: list[str], body: bytes) -> None:
        hub = self.hub
        if name not in hub.files:
            return self._answer({"error": "no such repository"}, 404, X_Error_Code="RepoNotFound")
        branches = hub.files[name]
        if rest[:1] == ["branch"]:
            branches.setdefault("/".join(rest[1:]), dict(branches["main"]))
            return self._answer({})
        if rest[:1] == ["preupload"]:
            there, files = branches[rest[1]], json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": self._oid(file["path"], there.get(file["path"])),
                }
                for file in files
            ]
            return self._answer({"files": modes})
        if rest[:1] == ["commit"]:
            lines = [json.loads(line) for line in body.splitlines()]
            target = branches[rest[1]]
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    hub.commits.append({"repository": name, "branch": rest[1], "summary": value["summary"]})
                elif line["key"] == "file":
                    target[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    target[value["path"]] = hub.stored[value["oid"]]
            url = f"{hub.url}/{name}/commit/{self._sha()}"
            return self._answer({"commitUrl": url, "commitOid": self._sha(), "pullRequestUrl": None, "success": True})
        branch = rest[1] if rest[:1] == ["revision"] else "main"
        branch = "main" if branch == self._sha() else branch
        siblings = [{"rfilename": path} for path in branches[branch]]
        return self._answer({"id": name, "sha": self._sha(), "siblings": siblings, "private": hub.private[name]})

    def _sha(self) -> str:
        return hashlib.sha1(str(len(self.hub.commits)).encode()).hexdigest()

    def _oid(self, path: str, data: bytes | None) -> str | None:
        if data is None:
            return None
        return hashlib.sha256(data).hexdigest() if path.endswith(LARGE) else git_oid(data)

    def _batch(self, asked: dict) -> None:
        objects = []
        for one in asked["objects"]:
            found = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.stored:
                found["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}"}}
            objects.append(found)
        self._answer({"transfer": "basic", "objects": objects})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        branches = self.hub.files.get(name, {})
        data = branches.get("main" if revision == self._sha() else revision, {}).get(path)
        if data is None:
            return self._answer({"error": "no such file"}, 404, X_Error_Code="EntryNotFound")
        return self._answer(raw=data, ETag=f'"{self._oid(path, data)}"', X_Repo_Commit=self._sha())

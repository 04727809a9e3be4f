"""A hub on 127.0.0.1: the part of the Hugging Face Hub's HTTP API that uploads and downloads of models use.

It keeps what it is sent (branches of commits, LFS objects by sha256) and checks as the Hub does: the token, the owner,
that an LFS object has the sha256 and size it was announced with and is there when a commit names it, that a model
card's front matter is YAML. Weights and ONNX files are LFS, everything else is in the commit. It does not speak Xet:
clients need HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_right"
OWNER = "me"
LFS_SUFFIXES = (".safetensors", ".onnx", ".data", ".bin")
Files = dict[str, bytes]


@dataclass
class Commit:
    oid: str
    message: str
    files: Files


@dataclass
class Repository:
    private: bool
    branches: dict[str, list[Commit]]

    def at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.oid == revision), None)


@dataclass
class FakeHub:
    """url: for HF_ENDPOINT. requests: method and path of everything it was asked. fails: path pattern -> status.

    Repositories of `OWNER` may be written with `TOKEN`; those of others exist only if a test puts them there.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: Files = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    announced: dict[str, int] = field(default_factory=dict)
    fails: dict[str, int] = field(default_factory=dict)

    def make(self, repo_id: str, private: bool = False, **files: bytes) -> Repository:
        first = Commit(_oid(repo_id), "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n", **files})
        self.repositories[repo_id] = Repository(private, {"main": [first]})
        return self.repositories[repo_id]

    def files(self, repo_id: str, revision: str = "main") -> Files:
        commit = self.repositories[repo_id].at(revision)
        assert commit is not None
        return commit.files

    def pushes(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """Commits after the first, which the hub makes itself."""
        return self.repositories[repo_id].branches[revision][1:]


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A running hub, in a thread of its own."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.code = status, code
        super().__init__(message)


def _oid(*parts: object) -> str:
    return hashlib.sha1(repr(parts).encode()).hexdigest()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _front_matter(card: str) -> dict[str, Any] | None:
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    try:
        return dict(yaml.safe_load(match.group(1))) if match else None
    except (yaml.YAMLError, TypeError, ValueError):
        return None


def _is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        return None

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self.query, self.body = parse_qs(parts.query), self._read_body()
        self.hub.requests.append(f"{self.command} {parts.path}")
        try:
            for pattern, status in self.hub.fails.items():
                if re.search(pattern, parts.path):
                    raise _Refused(status, "as the test wants it")
            for method, pattern, handler in ROUTES:
                if self.command in method and (match := re.fullmatch(pattern, parts.path)):
                    self._check_token(upload=self.command == "PUT")
                    handler(self, *map(unquote, match.groups()))
                    return
            raise _Refused(404, f"no route for {self.command} {parts.path}")
        except _Refused as refused:
            headers = {"X-Error-Message": str(refused), **({"X-Error-Code": refused.code} if refused.code else {})}
            self._send(refused.status, json.dumps({"error": str(refused)}).encode(), headers)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, data: Any, status: int = 200) -> None:
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _check_token(self, upload: bool) -> None:
        """The upload addresses of LFS objects are signed themselves and take no token."""
        given = self.headers.get("Authorization")
        if not upload and given != f"Bearer {TOKEN}":
            raise _Refused(401, "Invalid credentials in Authorization header")

    def _repository(self, repo_id: str) -> Repository:
        if repo_id not in self.hub.repositories:
            raise _Refused(404, "Repository not found", "RepoNotFound")
        return self.hub.repositories[repo_id]

    def _commit_at(self, repo_id: str, revision: str) -> Commit:
        commit = self._repository(repo_id).at(revision)
        if commit is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # --- uploads

    def create(self) -> None:
        wanted = json.loads(self.body)
        repo_id = f"{wanted['organization'] or OWNER}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{repo_id}"}
        if not repo_id.startswith(f"{OWNER}/"):
            raise _Refused(403, "You don't have the rights to create a model under this namespace")
        if repo_id in self.hub.repositories:
            self._json({"error": "You already created this model repo", **url}, 409)
            return
        self.hub.make(repo_id, wanted.get("visibility") == "private" or wanted.get("private") is True)
        self._json(url)

    def branch(self, repo_id: str, name: str) -> None:
        branches = self._repository(repo_id).branches
        branches[name] = list(branches["main"])
        self._json({})

    def validate_yaml(self) -> None:
        sound = _front_matter(json.loads(self.body)["content"]) is not None
        self._json({"errors": [] if sound else [{"message": "front matter"}], "warnings": []}, 200 if sound else 400)

    def preupload(self, repo_id: str, revision: str) -> None:
        files = self._commit_at(repo_id, revision).files
        answers = []
        for wanted in json.loads(self.body)["files"]:
            path = wanted["path"]
            mode, oid = ("lfs", _sha256) if _is_lfs(path) else ("regular", _git_oid)
            there = {"oid": oid(files[path])} if path in files else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **there})
        self._json({"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        self._repository(repo_id)
        objects = json.loads(self.body)["objects"]
        self.hub.announced.update({wanted["oid"]: wanted["size"] for wanted in objects})
        for wanted in objects:
            if wanted["oid"] not in self.hub.objects:
                wanted["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if _sha256(self.body) != oid or self.hub.announced.get(oid) != len(self.body):
            raise _Refused(422, "sha256 or size is not what was announced")
        self.hub.objects[oid] = self.body
        self._send(200, b"")

    def commit(self, repo_id: str, revision: str) -> None:
        repository, parent = self._repository(repo_id), self._commit_at(repo_id, revision)
        as_pull_request = "create_pr" in self.query
        if not as_pull_request and not repo_id.startswith(f"{OWNER}/"):
            raise _Refused(403, "Forbidden: you must use a write token")
        lines = [json.loads(line) for line in self.body.splitlines()]
        files, (header, *operations) = dict(parent.files), lines
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile" and value["oid"] in self.hub.objects:
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif kind == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise _Refused(400, f"cannot {kind} {value['path']}")
        made = Commit(_oid(parent.oid, sorted(files.items()), len(lines)), header["value"]["summary"], files)
        branch = "refs/pr/1" if as_pull_request else revision
        repository.branches.setdefault(branch, list(repository.branches[revision])).append(made)
        answer = {"commitOid": made.oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{made.oid}"}
        self._json({**answer, "pullRequestUrl": f"{self.hub.url}/{repo_id}/discussions/1" if as_pull_request else None})

    # --- downloads

    def info(self, repo_id: str, revision: str = "main") -> None:
        commit, private = self._commit_at(repo_id, revision), self._repository(repo_id).private
        card = _front_matter(commit.files.get("README.md", b"").decode())
        self._json({"id": repo_id, "private": private, "sha": commit.oid, "siblings": [], "tags": [], "cardData": card})

    def tree(self, repo_id: str, revision: str) -> None:
        entries: list[dict[str, Any]] = []
        for path, content in self._commit_at(repo_id, revision).files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
            if _is_lfs(path):
                entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self._json(entries)

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        commit = self._commit_at(repo_id, revision)
        if path not in commit.files:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        content = commit.files[path]
        etag = _sha256(content) if _is_lfs(path) else _git_oid(content)
        self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit.oid})


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


REPO = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", f"/api/models/{REPO}/branch/([^/]+)", _Handler.branch),
    ("POST", f"/api/models/{REPO}/preupload/([^/]+)", _Handler.preupload),
    ("POST", f"/{REPO}.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/([0-9a-f]{64})", _Handler.lfs_put),
    ("POST", f"/api/models/{REPO}/commit/([^/]+)", _Handler.commit),
    ("GET", f"/api/models/{REPO}", _Handler.info),
    ("GET", f"/api/models/{REPO}/revision/([^/]+)", _Handler.info),
    ("GET", f"/api/models/{REPO}/tree/([^/]+)", _Handler.tree),
    ("GET HEAD", f"/{REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]

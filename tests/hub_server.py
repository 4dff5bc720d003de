"""A Hub in this process, on 127.0.0.1: what the real client, ``huggingface_hub``, asks for when it lists, downloads and
uploads models.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]
NOT_FOUND = {"RepoNotFound": 404, "RevisionNotFound": 404, "EntryNotFound": 404, "GatedRepo": 403}


class Repo:
    """Commits by branch; every commit is a whole tree."""

    def __init__(self, private: bool = False, gated: bool = False) -> None:
        self.private, self.gated = private, gated
        self.commits: dict[str, Files] = {}
        self.branches: dict[str, str] = {}
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, branch: str, tree: Files) -> str:
        sha = secrets.token_hex(20)
        self.commits[sha], self.branches[branch] = tree, sha
        return sha

    def files(self, branch: str = "main") -> Files:
        return {name: one for name, one in self.commits[self.branches[branch]].items() if name[0] != "."}


class Hub:
    def __init__(self, url: str) -> None:
        self.url = url
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.sent = 0  # bytes of files
        self.uploads: list[str] = []  # objects that came whole
        self.changes: list[str] = []  # requests that change something
        self.accepts: Callable[[], bool] = lambda: True  # the next object; else its connection breaks
        self.lock = threading.Lock()

    def add(self, name: str, files: Files, **kind: bool) -> Repo:
        self.repos[name] = repo = Repo(**kind)
        repo.commit("main", files)
        return repo


@contextmanager
def hub() -> Iterator[Hub]:
    with _Server(("127.0.0.1", 0), _Handler) as server:
        _Handler.hub = served = Hub(f"http://127.0.0.1:{server.server_address[1]}")
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield served
        server.shutdown()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that went away
            super().handle_error(request, client_address)


class _Refused(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command in ("POST", "PUT"):
            self.hub.changes.append(path)
        for command, pattern, answer in ROUTES:
            if self.command in command.split() and (found := re.fullmatch(pattern, path)):
                try:
                    answer(self, body, *found.groups())
                except _Refused as refused:
                    code = str(refused)
                    self._send(NOT_FOUND[code], b"{}", {"X-Error-Code": code})
                return
        self._send(501, b"{}", {"X-Error-Message": f"{self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _repo(self, name: str) -> Repo:
        if name not in self.hub.repos:
            raise _Refused("RepoNotFound")
        return self.hub.repos[name]

    def _tree(self, name: str, revision: str | None) -> tuple[str, Files]:
        repo = self._repo(name)
        sha = repo.branches.get(revision or "main", revision or "")
        if sha not in repo.commits:
            raise _Refused("RevisionNotFound")
        return sha, repo.commits[sha]

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        there = name in self.hub.repos
        if not there:
            self.hub.repos[name] = Repo(bool(asked.get("private")) or asked.get("visibility") == "private")
        self._json({"url": f"{self.hub.url}/{name}", "id": name, "name": name}, 409 if there else 200)

    def branch(self, _: bytes, name: str, branch: str) -> None:
        repo = self._repo(name)
        there = branch in repo.branches
        repo.branches.setdefault(branch, repo.branches["main"])
        self._json({}, 409 if there else 200)

    def info(self, _: bytes, name: str, revision: str | None) -> None:
        sha, tree = self._tree(name, revision)
        siblings = [{"rfilename": file, "size": len(one)} for file, one in tree.items()]
        import yaml  # comes with the client

        front = tree.get("README.md", b"").split(b"---\n")
        card = yaml.safe_load(front[1]) if len(front) > 2 else None
        private = self._repo(name).private
        self._json({"id": name, "sha": sha, "private": private, "siblings": siblings, "cardData": card})

    def tree(self, _: bytes, name: str, revision: str) -> None:
        _, tree = self._tree(name, revision)
        self._json([{"type": "file", "path": file, "size": len(one), **_ids(file, one)} for file, one in tree.items()])

    def resolve(self, _: bytes, name: str, revision: str, file: str) -> None:
        sha, tree = self._tree(name, revision)
        if self._repo(name).gated:
            raise _Refused("GatedRepo")
        if file not in tree:
            raise _Refused("EntryNotFound")
        data = tree[file]
        headers = {"ETag": f'"{_ids(file, data)["etag"]}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        status = 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(asked[1]), int(asked[2] or len(data) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
            data, status = data[start:stop], 206
        self.hub.sent += len(data) if self.command == "GET" else 0
        self._send(status, data, headers)

    def validate(self, body: bytes) -> None:
        wrong = b"license: wrong" in body
        self._json({"errors": [{"message": "no such license"}] * wrong, "warnings": []}, 400 if wrong else 200)

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        _, tree = self._tree(name, revision)
        self._json(
            {
                "files": [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        "oid": _ids(one["path"], tree[one["path"]])["etag"] if one["path"] in tree else None,
                    }
                    for one in json.loads(body)["files"]
                ]
            }
        )

    def batch(self, body: bytes, name: str) -> None:
        answer = []
        for one in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/objects/{one['oid']}"}}
            answer.append(one | ({} if one["oid"] in self.hub.objects else {"actions": upload}))
        self._json({"transfer": "basic", "objects": answer})

    def put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        with self.hub.lock:
            if not self.hub.accepts():
                self.close_connection = True
                return
            self.hub.objects[oid] = body
            self.hub.uploads.append(oid)
        self._json({})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        _, tree = self._tree(name, revision)
        tree, repo = dict(tree), self._repo(name)
        for line in map(json.loads, body.splitlines()):
            value: dict[str, Any] = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        number = next(n for n in itertools.count(1) if f"refs/pr/{n}" not in repo.branches)
        pr = "create_pr=1" in self.path
        sha = repo.commit(f"refs/pr/{number}" if pr else revision, tree)
        done = {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True}
        self._json(done | ({"pullRequestUrl": f"{self.hub.url}/{name}/discussions/{number}"} if pr else {}))


def _ids(file: str, data: bytes) -> dict[str, Any]:
    """What git and the Hub call a file: SHA-256 for large files, git's SHA-1 for the others."""
    git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    if not file.endswith(".safetensors"):
        return {"oid": git, "etag": git}
    sha = hashlib.sha256(data).hexdigest()
    return {"oid": git, "etag": sha, "lfs": {"oid": sha, "size": len(data), "pointerSize": 134}}


_NAME = "([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"/api/models/{_NAME}/branch/(.+)", _Handler.branch),
    ("POST", f"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", f"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/objects/([0-9a-f]{64})", _Handler.put),
    ("GET", f"/api/models/{_NAME}(?:/revision/(.+))?", _Handler.info),
    ("GET", f"/api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    ("GET HEAD", f"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]

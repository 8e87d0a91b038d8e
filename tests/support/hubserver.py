"""A small Hugging Face Hub on this machine: as much of its HTTP API as huggingface_hub and datasets need for reading.

Repositories are dictionaries of files. Each state of one is a commit, named by the digest of its content; branches
point to commits.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

__all__ = ["Hub", "Repo", "running_hub"]

TOKEN = "hf_of_the_test"


@dataclass
class Repo:
    """One repository."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def push(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Make the branch hold exactly these files; return the commit."""
        content = b"".join(name.encode() + b"\0" + data + b"\0" for name, data in sorted(files.items()))
        commit = hashlib.sha1(content).hexdigest()
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass
class Hub:
    """The repositories by `model/owner/name` or `dataset/owner/name`, and what was asked for."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    failing: int = 0
    """So many of the next requests are answered with 503."""

    def model(self, name: str) -> Repo:
        return self.repos.setdefault(f"model/{name}", Repo())

    def dataset(self, name: str) -> Repo:
        return self.repos.setdefault(f"dataset/{name}", Repo())


def _described(path: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return {"type": "file", "oid": blob, "size": len(data), "path": path}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None: ...

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = urlsplit(self.path)
        self.hub.requests.append(f"{self.command} {self.path}")
        if self.hub.failing:
            self.hub.failing -= 1
            self._send(503, b"busy")
            return
        parts = [unquote(part) for part in address.path.strip("/").split("/")]
        if parts[0] == "api" and len(parts) >= 4:
            self._api(parts[1].removesuffix("s"), "/".join(parts[2:4]), parts[4:], body)
            return
        kind = "dataset" if parts[0] == "datasets" else "model"
        parts = parts[1:] if kind == "dataset" else parts
        if len(parts) > 4 and parts[2] == "resolve":
            self._file(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._send(404, b"{}")

    def _repo(self, kind: str, name: str) -> Repo | None:
        repo = self.hub.repos.get(f"{kind}/{name}")
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            self._send(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
            return None
        if repo is None or (repo.private and given is None):
            self._send(401 if given is None else 404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        return repo

    def _commit(self, repo: Repo, revision: str) -> str | None:
        commit = repo.resolve(revision)
        if commit is None:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        return commit

    def _api(self, kind: str, name: str, rest: list[str], body: bytes) -> None:
        repo = self._repo(kind, name)
        if repo is None:
            return
        verb = rest[0] if rest else "revision"
        commit = self._commit(repo, rest[1] if len(rest) > 1 else "main")
        if commit is None:
            return
        files = repo.commits[commit]
        if verb == "revision":
            siblings = [{"rfilename": path} for path in sorted(files)]
            facts = {
                "id": name,
                "sha": commit,
                "private": repo.private,
                "gated": repo.gated,
                "tags": [],
                "downloads": 0,
            }
            self._json({**facts, "likes": 0, "siblings": siblings})
        elif verb == "tree":
            self._tree(files, "/".join(rest[2:]))
        elif verb == "paths-info":
            wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
            found = [_described(path, files[path]) for path in wanted if path in files]
            folders = [path for path in wanted if any(name.startswith(f"{path}/") for name in files)]
            self._json([*found, *({"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in folders)])
        else:
            self._send(404, b"{}")

    def _tree(self, files: Mapping[str, bytes], folder: str) -> None:
        inside = {path: data for path, data in files.items() if not folder or path.startswith(f"{folder}/")}
        if not inside:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        recursive = "recursive=true" in self.path.lower()
        found: dict[str, dict[str, Any]] = {}
        for path, data in sorted(inside.items()):
            below = path[len(folder) + 1 :] if folder else path
            steps = below.split("/")
            for depth in range(1, len(steps)):
                name = "/".join(([folder] if folder else []) + steps[:depth])
                if recursive or depth == 1:
                    found[name] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
            if recursive or len(steps) == 1:
                found[path] = _described(path, data)
        self._json(list(found.values()))

    def _file(self, kind: str, name: str, revision: str, path: str) -> None:
        repo = self._repo(kind, name)
        if repo is None:
            return
        if repo.gated and self.headers.get("Authorization") is None:
            self._send(401, b"{}", {"X-Error-Code": "GatedRepo"})
            return
        commit = self._commit(repo, revision)
        if commit is None:
            return
        data = repo.commits[commit].get(path)
        headers = {"X-Repo-Commit": commit}
        if data is None:
            self._send(404, b"{}", {**headers, "X-Error-Code": "EntryNotFound"})
            return
        headers["ETag"] = f'"{_described(path, data)["oid"]}"'
        headers["Accept-Ranges"] = "bytes"
        wanted = self.headers.get("Range")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or len(data)), len(data) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            self._send(206, data[start:stop], headers)
            return
        self._send(200, data, headers)

    def _json(self, document: Any) -> None:
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve an empty Hub on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()

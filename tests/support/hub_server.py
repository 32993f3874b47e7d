"""A server on 127.0.0.1 that answers as the Hugging Face hub does to huggingface_hub 1.33, files on a second host."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

TOKEN = "hf_secret"


@dataclass
class Hub:
    """Repositories, what is asked of them, and how they fail.

    Args:
        files: repository -> commit -> path -> bytes.
        refs: repository -> branch or tag -> commit.
        private, gated: repositories that need TOKEN.
        break_after: bytes after which the next downloads of weights end, one entry each.
        asked: method, path and Range of every request; "cdn" requests with their Authorization.
    """

    files: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    break_after: list[int] = field(default_factory=list)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    cdn_authorization: list[str | None] = field(default_factory=list)
    address: str = ""
    cdn_address: str = ""

    def add(self, repository: str, commit: str, files: dict[str, bytes], *, branch: str = "main") -> None:
        self.files.setdefault(repository, {})[commit] = files
        self.refs.setdefault(repository, {})[branch] = commit

    def downloaded(self) -> set[str]:
        """Names of the files whose bytes were asked for."""
        return {path.rpartition("/")[2] for method, path, _ in self.asked if method == "GET" and "/resolve/" in path}

    @contextmanager
    def serving(self) -> Iterator[Hub]:
        main, cdn = (ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, part)) for part in (_Main, _Cdn))
        self.address = f"http://127.0.0.1:{main.server_port}"
        self.cdn_address = f"http://localhost:{cdn.server_port}"  # another host's name, so that no token may go there
        threads = [Thread(target=server.serve_forever, daemon=True) for server in (main, cdn)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            for server in (main, cdn):
                server.shutdown()
                server.server_close()


def _handler(hub: Hub, part: type[BaseHTTPRequestHandler]) -> type[BaseHTTPRequestHandler]:
    return type("Handler", (part,), {"hub": hub})


class _Base(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        raise NotImplementedError

    def send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, *, upto: int | None = None):
        """`upto`: the connection ends after so many bytes of the body."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:upto])
        if upto is not None:
            self.close_connection = True

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message or code})


class _Main(_Base):
    def answer(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.asked.append((self.command, path, self.headers.get("Range", "")))
        api = re.fullmatch(r"/api/models/(?P<name>[^/]+/[^/]+)/(?P<kind>revision|tree)/(?P<revision>[^/]+)", path)
        file = re.fullmatch(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", path)
        if (match := api or file) is None:
            return self.refuse(404)
        name, revision = match["name"], match["revision"]
        authorization, token = self.headers.get("Authorization"), f"Bearer {TOKEN}"
        if authorization not in (None, token):
            return self.refuse(401, message="Invalid credentials in Authorization header")
        if name not in hub.files or (name in hub.private and authorization != token):
            return self.refuse(401 if authorization is None else 404, "RepoNotFound")
        commit = hub.refs[name].get(revision, revision)
        if commit not in hub.files[name]:
            return self.refuse(404, "RevisionNotFound")
        if file is None:
            return self.describe(match["kind"], name, commit)
        if name in hub.gated and authorization != token:
            return self.refuse(403, "GatedRepo")
        self.file(name, commit, match["file"])

    def describe(self, kind: str, name: str, commit: str) -> None:
        files = self.hub.files[name][commit]
        siblings = [{"rfilename": path} for path in files]
        answer = {"id": name, "modelId": name, "sha": commit, "private": False, "tags": [], "siblings": siblings}
        tree = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in files.items()
        ]
        self.send(
            200, json.dumps(answer if kind == "revision" else tree).encode(), {"Content-Type": "application/json"}
        )

    def file(self, name: str, commit: str, path: str) -> None:
        data = self.hub.files[name][commit].get(path)
        if data is None:
            return self.refuse(404, "EntryNotFound")
        etag, headers = f'"{hashlib.sha256(data).hexdigest()}"', {"X-Repo-Commit": commit}
        if path.endswith(".safetensors"):  # large files lie elsewhere
            location = f"{self.hub.cdn_address}/{name}/{commit}/{path}"
            linked = {"X-Linked-Etag": etag, "X-Linked-Size": str(len(data)), "Location": location}
            return self.send(302, b"", {**headers, **linked})
        self.send(200, data, {**headers, "ETag": etag})


class _Cdn(_Base):
    def answer(self) -> None:
        hub = self.hub
        owner, repository, commit, path = self.path.strip("/").split("/", 3)
        data, wanted = hub.files[f"{owner}/{repository}"][commit][path], self.headers.get("Range", "")
        hub.asked.append((self.command, self.path, wanted))
        hub.cdn_authorization.append(self.headers.get("Authorization"))
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if wanted else {}
        upto = hub.break_after.pop(0) if hub.break_after and self.command == "GET" else None
        self.send(206 if wanted else 200, data[start:], headers, upto=upto)

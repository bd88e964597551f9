"""A server on a thread that behaves like the model hub and like GitHub's releases, faults at will."""

import hashlib
import json
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def redirect_of(path: str) -> str:
    """Where a redirect leads: as on the hub and on GitHub, to a path that says nothing of the file's name."""
    return f"/files/{hashlib.sha256(path.encode()).hexdigest()}"


@dataclass(frozen=True)
class Fault:
    """What becomes of one request for bytes: a status instead, an end after `cut` bytes, other bytes, no ranges.

    `hold` keeps the rest back until it is set, `begun` is set once the first half has been sent.
    """

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    spoil: bool = False
    whole: bool = False
    etag: str | None = None
    careless: bool = False
    """Takes no notice of If-Range."""
    hold: threading.Event | None = None
    begun: threading.Event | None = None


@dataclass
class Hub:
    """Its files by path, and the requests for their bytes that came, in order."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[Mapping[str, str]] = field(default_factory=list)
    digests: bool = True
    """Whether redirects name the SHA-256 and the commit, as those of the hub do, and those of a plain mirror do not."""
    token: str | None = None
    """What requests for files of the hub must come with, if anything."""
    refusal: str = "GatedRepo"
    """The hub's own code for why a request without the token is refused."""
    lengths: bool = True

    def put(self, path: str, content: bytes) -> str:
        """Have that file; its URL."""
        self.files[path] = content
        return self.url + path

    def put_repository(
        self, name: str, folder: Path, *, revision: str = "main", licence: str | None = None, api: bool = True
    ) -> str:
        """Have the files of `folder` as a repository; its commit. Without `api` they are what a plain mirror has."""
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        sha = hashlib.sha1(b"".join(files.values()), usedforsecurity=False).hexdigest()
        for file, content in files.items():
            self.put(f"/{name}/resolve/{sha if api else revision}/{file}", content)
        if api:
            siblings = [{"rfilename": file} for file in [*files, ".gitattributes", "runs/events.pt"]]
            answer = {"id": name, "sha": sha, "siblings": siblings, "cardData": {"license": licence}}
            self.put(f"/api/models/{name}/revision/{revision}", json.dumps(answer).encode())
        return sha


class QuietServer(ThreadingHTTPServer):
    """Says nothing of callers that hang up: tests do."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving_hub() -> Iterator[Hub]:
    """A hub without files, on a free port."""
    server = QuietServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.hub = hub  # type: ignore[attr-defined]  # how handlers of this library find what is theirs
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        with suppress(ConnectionError):
            self._get(self.server.hub)  # type: ignore[attr-defined]

    def do_HEAD(self) -> None:
        """Redirects alone: to the bytes, on what is another host to its callers, they get them."""
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        pass

    def _get(self, hub: Hub) -> None:
        path = self.path.partition("?")[0]
        content = next((content for name, content in hub.files.items() if redirect_of(name) == path), None)
        if content is not None:
            assert "Authorization" not in self.headers  # which is for the hub alone
            hub.requests.append(dict(self.headers))
            self._send(hub, content, hub.faults.pop(0) if hub.faults else Fault())
        elif path.startswith("/files/"):
            self._answer(404)
        elif hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._answer(401, {"X-Error-Code": hub.refusal})
        elif path in hub.files:
            content = hub.files[path]
            headers = {"Location": f"{hub.url.replace('127.0.0.1', 'localhost')}{redirect_of(path)}?Signature=secret"}
            if "/resolve/" in path and hub.digests:
                headers["X-Repo-Commit"] = "c0ffee"
                headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
                headers["X-Linked-Size"] = str(len(content))
            self._answer(302, headers)
        else:
            self._answer(404)

    def _answer(self, status: int, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, hub: Hub, content: bytes, fault: Fault) -> None:
        if fault.status:
            self._answer(fault.status, fault.headers)
            return
        etag = fault.etag or f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'
        start, status, headers = 0, 200, {"ETag": etag}
        requested = self.headers.get("Range", "")
        if requested and not fault.whole and (fault.careless or self.headers.get("If-Range", etag) == etag):
            start = int(requested.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self._answer(416, {"Content-Range": f"bytes */{len(content)}"})
                return
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if fault.spoil:
            body = bytes([body[0] ^ 1]) + body[1:]
        if hub.lengths:
            headers["Content-Length"] = str(len(body))
        else:
            headers |= {"Connection": "close"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self._write(body if fault.cut is None else body[: fault.cut], fault)
        if fault.cut is not None or not hub.lengths:
            self.close_connection = True

    def _write(self, body: bytes, fault: Fault) -> None:
        half = len(body) // 2
        self.wfile.write(body[:half])
        self.wfile.flush()
        if fault.begun:
            fault.begun.set()
        if fault.hold:
            fault.hold.wait(60)
        self.wfile.write(body[half:])

"""A server that follows the script of a test, over a real socket, and a clock that moves only when it sleeps."""

import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from io import BytesIO
from typing import Any
from urllib.parse import parse_qs, urlsplit

from multipart import MultipartParser, parse_options_header

from pvt_client.exchange import Clock

BAD = b"not an image"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
PREDICTED = {
    "model": "m",
    "version": "1",
    "results": [
        {"filename": None, "width": 2, "height": 3, "predictions": [{"class_id": 7, "label": "7", "score": 0.9}]}
    ],
}


def response(status: int, body: bytes, content_type: str = "application/json", **headers: str) -> bytes:
    lines = {"Content-Type": content_type, "Content-Length": str(len(body))}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status} Whatever\r\n{head}\r\n".encode() + body


def predicted(*results: dict[str, Any]) -> bytes:
    return response(200, json.dumps(PREDICTED | ({"results": results} if results else {})).encode())


def problem_fields(status: int, kind: str) -> dict[str, Any]:
    urn = f"urn:pvt-serve:problem:{kind}"
    return {"type": urn, "title": kind, "status": status, "detail": "d", "request_id": "r"}


def refused(status: int, kind: str = "queue-full", **headers: str) -> bytes:
    return response(status, json.dumps(problem_fields(status, kind)).encode(), "application/problem+json", **headers)


@dataclass
class Received:
    """A request as the server received it."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        return {name: values[-1] for name, values in parse_qs(urlsplit(self.target).query).items()}

    @property
    def images(self) -> list[bytes]:
        """The bytes of each image."""
        content_type, options = parse_options_header(self.headers.get("content-type", ""))
        if content_type != "multipart/form-data":
            return [self.body]
        return [
            part.raw
            for part in MultipartParser(BytesIO(self.body), options["boundary"], spool_limit=10**9, memory_limit=10**9)
        ]


Behaviour = bytes | Callable[[socket.socket, Received], None]


def sized(connection: socket.socket, received: Received) -> None:
    """The size of each image in bytes, as its width; the height is how many images the request has."""
    entries: list[dict[str, Any]] = [
        {"filename": None, "width": len(data), "height": len(received.images), "predictions": []}
        if data != BAD
        else {"filename": None, "error": problem_fields(422, "invalid-image")}
        for data in received.images
    ]
    if len(entries) == 1 and "error" in entries[0]:
        connection.sendall(refused(422, "invalid-image"))
    else:
        connection.sendall(predicted(*entries))


def cut(connection: socket.socket, _: Received) -> None:
    """Hang up without a response."""
    connection.shutdown(socket.SHUT_RDWR)


def silent(connection: socket.socket, _: Received) -> None:
    """Never respond; ends when the client hangs up."""
    connection.recv(1)


def dripping(connection: socket.socket, _: Received) -> None:
    """A response without end, a block at a time."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000000000000\r\n\r\n")
    with suppress(OSError):
        while True:
            connection.sendall(b" " * 65536)


@dataclass
class Scripted:
    """Follows `behaviours` one after the other, the last one for good, and records the requests."""

    behaviours: list[Behaviour]
    url: str = ""
    requests: list[Received] = field(default_factory=list)
    connections: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError), connection.makefile("rb") as stream:
            while (received := _read(stream)) is not None:
                with self.lock:
                    self.requests.append(received)
                    behaviour = self.behaviours.pop(0) if len(self.behaviours) > 1 else self.behaviours[0]
                if callable(behaviour):
                    behaviour(connection, received)
                else:
                    connection.sendall(behaviour)


def _read(stream: Any) -> Received | None:
    first = stream.readline().decode().split()
    if len(first) < 2:
        return None
    headers = {}
    while line := stream.readline().decode().strip():
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return Received(first[0], first[1], headers, stream.read(int(headers.get("content-length", 0))))


@contextmanager
def scripted(*behaviours: Behaviour, port: int = 0) -> Iterator[Scripted]:
    """A server that treats the n-th request as the n-th of `behaviours` says."""
    server = Scripted(list(behaviours))
    open_connections: list[socket.socket] = []
    threads: list[threading.Thread] = []
    with socket.create_server(("127.0.0.1", port)) as listener:
        server.url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    server.connections += 1
                    open_connections.append(connection)
                    threads.append(threading.Thread(target=server.serve, args=(connection,)))
                    threads[-1].start()

        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield server
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            acceptor.join(10)
            for connection in open_connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(10)


@dataclass
class FakeTime:
    """Moves only by `sleep`, and by `tick` seconds each time it is read; the jitter is always 0.5."""

    tick: float = 0.0
    seconds: float = 1000.0
    slept: list[float] = field(default_factory=list)
    on_sleep: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        self.seconds += self.tick
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.seconds += seconds
        self.on_sleep()

    async def sleep_async(self, seconds: float) -> None:
        self.sleep(seconds)

    @property
    def clock(self) -> Clock:
        return Clock(
            monotonic=self.monotonic,
            sleep=self.sleep,
            sleep_async=self.sleep_async,
            now=lambda: NOW + timedelta(seconds=self.seconds - 1000),
            random=lambda: 0.5,
        )


def queries(requests: Sequence[Received], name: str) -> list[str | None]:
    return [each.query.get(name) for each in requests]

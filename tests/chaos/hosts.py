"""Hosts of images for tests on a real server: one that hangs, and one that answers."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Condition, Thread


class Host:
    """Accepts connections and gives each to `answer`, or holds it without a word."""

    def __init__(self, address: str, port: int, answer: Callable[[bytes], bytes] | None) -> None:
        """`answer` gets a request's head. `port` 0: a free one."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, port), family=family, backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        self.address = address
        self.place = f"{address}:{self.port}"
        self._answer = answer
        self._connections: list[socket.socket] = []
        self._changed = Condition()
        self.thread = Thread(target=self._serve)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            with self._changed:
                self._connections.append(connection)
                self._changed.notify_all()
            if self._answer:
                with suppress(OSError), connection:
                    connection.sendall(self._answer(connection.recv(65_536)))

    @property
    def connections(self) -> int:
        """How many there have been."""
        with self._changed:
            return len(self._connections)

    def wait_for(self, count: int, seconds: float = 10) -> None:
        """Return when there have been as many connections."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._connections) >= count, seconds), len(self._connections)

    def close(self) -> None:
        """Close every connection."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            connection.close()


@contextmanager
def host(address: str = "127.0.0.1", port: int = 0, answer: Callable[[bytes], bytes] | None = None) -> Iterator[Host]:
    """One that listens; without `answer` it hangs."""
    each = Host(address, port, answer)
    each.thread.start()
    try:
        yield each
    finally:
        each.close()
        each.thread.join()


def response(body: bytes = b"", status: str = "200 OK", **headers: str) -> bytes:
    """An HTTP response."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode() + body

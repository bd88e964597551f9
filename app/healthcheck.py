"""`python -m app.healthcheck`: 0 if the service of the same environment is ready, else 1 and the reason.

Container health checks run it every few seconds, so it imports nothing of the service and takes some 50 ms. It follows
PVT_HOST, a Unix socket too, and PVT_PORT, and it uses no proxy.
"""

import os
import socket
import sys
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException
from ipaddress import ip_address
from typing import Final

PATH: Final = "/health/ready"
TIMEOUT_SECONDS: Final = 4.0
OK: Final = 200
DEFAULT_PORT: Final = "8000"
_UNIX_PREFIX = "unix:"
_LOOPBACK = {4: ("127.0.0.1",), 6: ("127.0.0.1", "::1")}  # what an address that stands for all includes, by family


class _UnixConnection(HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def connections(host: str, port: str) -> Sequence[HTTPConnection]:
    """The connections to try one after another, for PVT_HOST and PVT_PORT; raises ValueError if `port` is none."""
    if host.startswith(_UNIX_PREFIX):
        return [_UnixConnection(host.removeprefix(_UNIX_PREFIX))]
    if not port.isascii() or not port.isdecimal() or not int(port):
        raise ValueError(f"PVT_PORT={port} names no port; a health check needs the port's number")
    host = host.removeprefix("[").removesuffix("]")
    hosts: Sequence[str] = [host]
    try:
        if (address := ip_address(host)).is_unspecified:
            hosts = _LOOPBACK[address.version]
    except ValueError:
        pass  # a name
    return [HTTPConnection(each, int(port), timeout=TIMEOUT_SECONDS) for each in hosts]


def main() -> int:
    """Ask once; see the module."""
    reason = ""
    try:
        port = os.environ.get("PVT_PORT", DEFAULT_PORT)
        if "://" in port:  # Kubernetes sets it so for a service named pvt; see app/settings.py
            port = DEFAULT_PORT
        for connection in connections(os.environ.get("PVT_HOST", "127.0.0.1"), port):
            try:
                connection.request("GET", PATH)
                response = connection.getresponse()
                if response.status == OK:
                    return 0
                reason = f"{PATH} answered {response.status}: {response.read(1000).decode('utf-8', 'replace')}"
            except (OSError, HTTPException) as error:
                reason = reason or f"not reached: {error}"
            finally:
                connection.close()
    except ValueError as error:
        reason = str(error)
    print(reason, file=sys.stderr)  # noqa: T201  the container engine shows it
    return 1


if __name__ == "__main__":
    sys.exit(main())

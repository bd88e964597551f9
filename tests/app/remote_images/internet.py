"""A make-believe internet for tests of fetching: names with addresses, connections that answer from a script."""

import asyncio
import ssl
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_address, ip_network
from typing import Any

import httpcore
from prometheus_client import CollectorRegistry

from app.addresses import Address, HostRule, Reach
from app.bodies import Link
from app.remote_images.fetching import Fetcher
from service.errors import ServiceError

PUBLIC, OTHER, PRIVATE = "93.184.216.34", "8.8.8.8", "10.0.0.7"


def answer(body: bytes = b"image", status: str = "200 OK", **headers: str) -> list[bytes]:
    told = {"Content-Length": str(len(body)), **{name.replace("_", "-"): value for name, value in headers.items()}}
    head = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in told.items()), "", ""]
    return ["\r\n".join(head).encode(), body]


def redirect(location: str, status: str = "302 Found") -> list[bytes]:
    return answer(b"never read", status, Location=location)


class Stream(httpcore.AsyncMockStream):
    """One connection: gives what is scripted, keeps what it was sent and whom TLS was for."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        super().__init__([])
        self.pieces = iter(pieces)
        self.sent = b""
        self.server_name: str | None = None
        self.context: ssl.SSLContext | None = None

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002, ASYNC109
        await asyncio.sleep(0)
        return next(self.pieces, b"")

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002, ASYNC109
        self.sent += buffer

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002, ASYNC109
    ) -> httpcore.AsyncNetworkStream:
        self.server_name, self.context = server_hostname, ssl_context
        return self


class Internet(httpcore.AsyncNetworkBackend):
    """Names and their addresses, a list for each time they are asked for; what each connection answers."""

    def __init__(self, names: Mapping[str, Sequence[str]], answers: Sequence[Iterable[bytes]] = ()) -> None:
        self.names = names
        self.answers = iter(answers)
        self.asked: list[str] = []
        self.connected: list[tuple[str, int]] = []
        self.streams: list[Stream] = []
        self.dead: set[str] = set()

    async def resolve(self, host: str, port: int) -> list[Address]:  # noqa: ARG002
        self.asked.append(host)
        return [ip_address(each) for each in self.names.get(host, ())]

    async def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> httpcore.AsyncNetworkStream:
        self.connected.append((host, port))
        if host in self.dead:
            raise httpcore.ConnectError("refused")
        self.streams.append(Stream(next(self.answers)))
        return self.streams[-1]


def fetcher(
    internet: Internet, *hosts: str, private: str | None = None, max_bytes: int = 1000, seconds: float = 30
) -> Fetcher:
    """One that knows no other network than `internet`."""
    reach = Reach([HostRule.parse(host) for host in hosts], [ip_network(private)] if private else [])
    return Fetcher(
        reach, CollectorRegistry(), max_bytes=max_bytes, seconds=seconds, resolve=internet.resolve, backend=internet
    )


async def fetch(
    internet: Internet, *urls: str, hosts: Sequence[str] = ("example.org", "*.example.org"), **options: Any
) -> list[bytes | ServiceError]:
    """What each of `urls` gave, all sent in one request."""
    async with fetcher(internet, *hosts, **options) as each:
        return [got.data for got in await each.fetched([Link(url) for url in urls], "id")]

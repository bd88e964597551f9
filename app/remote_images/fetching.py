"""Images by URL: fetched within limits, and only from where PVT_URL_HOSTS allows.

Against server-side request forgery a name is resolved once, then checked, then connected to.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from ipaddress import ip_address
from pathlib import PurePosixPath
from time import perf_counter
from typing import Any, NamedTuple

import httpcore
import httpx
import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram

from app.bodies import Link, Upload
from app.problems import ImageTimedOut, ImageUnreachable, ImageUrlRefused
from app.remote_images.addresses import DEFAULT_PORTS, Address, Reach, host_name
from service.errors import ImageTooLarge, ServiceError
from service.memory import Reservation

log = structlog.get_logger(component="fetch")

Resolve = Callable[[str, int], Awaitable[Sequence[Address]]]

REDIRECTS = 3
CONNECTIONS, PER_REQUEST = 32, 8  # at a time
_RESOLVERS = 8  # threads; a name server that never answers holds one of them until the C library gives up
_ATTEMPTS = 3  # addresses of one host
_CONNECT_SECONDS = 5.0
_HEAD_BYTES, _HEAD_CHUNK = 32_768, 2048
_REDIRECT = frozenset({301, 302, 303, 307, 308})
# Each chunk costs time of the event loop, however small it is, so the number of tiny chunks is bounded.
_FREE_CHUNKS, _LEAST_MEAN_CHUNK = 1024, 512


class NotReachable(Exception):
    """The name has no address, or one that must not be connected to; which of them is for the log alone."""


class HeadLimited(httpcore.AsyncNetworkStream):
    """A connection that reads a bounded number of bytes, and in small chunks, until `end_head` is called.

    h11 bounds one head, but not how many informational ones precede it, and parses all that one chunk holds in one turn
    of the event loop.
    """

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream
        self._left: int | None = _HEAD_BYTES

    def end_head(self) -> None:
        """From now on a body is read, without this limit."""
        self._left = None

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109  httpcore's
        """Raises RemoteProtocolError when the head has no end."""
        if self._left is None:
            return await self._stream.read(max_bytes, timeout)
        chunk = await self._stream.read(min(max_bytes, _HEAD_CHUNK), timeout)
        self._left -= len(chunk)
        if self._left < 0:
            raise httpcore.RemoteProtocolError("the response's head has no end")
        return chunk

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109  httpcore's
        """Write to the connection."""
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        """Close the connection."""
        await self._stream.aclose()

    async def start_tls(self, *args: Any, **options: Any) -> httpcore.AsyncNetworkStream:  # noqa: ANN401  httpcore's
        """The same connection, within TLS."""
        return HeadLimited(await self._stream.start_tls(*args, **options))


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Opens httpcore's connections, and only to addresses that `reach` allows.

    Names, certificates and the `Host` header stay the URL's: the layers above the connection handle them.
    """

    def __init__(self, reach: Reach, resolve: Resolve, backend: httpcore.AsyncNetworkBackend) -> None:
        self._reach = reach
        self._resolve = resolve
        self._backend = backend

    async def connect_tcp(self, host: str, port: int, *args: Any, **options: Any) -> httpcore.AsyncNetworkStream:  # noqa: ANN401  httpcore's
        """Resolve, check every address, connect to the first that accepts; raises NotReachable.

        One address that is not allowed is enough: a name with a public and a private one is how filters are got around.
        """
        addresses = await self._resolve(host, port)
        if not addresses:
            raise NotReachable("it has no address")
        if not all(self._reach.reaches(host, port, address) for address in addresses):
            raise NotReachable("it has an address that is not public")
        for address in addresses[:_ATTEMPTS]:
            try:
                return HeadLimited(await self._backend.connect_tcp(str(address), port, *args, **options))
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


async def _resolved(threads: ThreadPoolExecutor, host: str, port: int) -> list[Address]:
    """The addresses of `host` by the system's resolver, best first; none where it has none."""
    lookup = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    try:
        found = await asyncio.get_running_loop().run_in_executor(threads, lookup)
    except (OSError, UnicodeError):
        return []
    return [ip_address(str(each[4][0])) for each in found]


class _Target(NamedTuple):
    """A URL that may be fetched, its host in the one spelling that was checked."""

    url: httpx.URL
    host: str
    port: int


@dataclass(slots=True)
class _Budget:
    """Bytes that the images of one request may still have, of `limit` for all together. Mutable.

    `held` is the memory that is reserved for them, where it is counted.
    """

    limit: int
    left: int
    held: Reservation | None = None

    def take(self, count: int) -> None:
        """Raises ImageTooLarge when there are not as many left, and MemoryExhausted when they do not fit."""
        self.require(count)
        if self.held:
            self.held.grow(count)
        self.left -= count

    def give_back(self, count: int) -> None:
        """Do not count so many, since they were discarded."""
        self.left += count
        if self.held:
            self.held.shrink(count)

    def require(self, count: int) -> None:
        """The same, without taking them."""
        if self.left < count:
            raise ImageTooLarge(
                f"the images that the request fetches are larger than {self.limit / 1e6:g} MB in all, which "
                "PVT_MAX_BODY_MB allows"
            )


class Fetcher(AbstractAsyncContextManager["Fetcher"]):
    """The images of one request have `max_bytes` in all, each one `seconds`."""

    def __init__(
        self,
        reach: Reach,
        registry: CollectorRegistry,
        *,
        max_bytes: int,
        seconds: float,
        resolve: Resolve | None = None,
        backend: httpcore.AsyncNetworkBackend | None = None,
    ) -> None:
        """`resolve` and `backend` are the system's resolver and network if absent."""
        self._reach = reach
        self._fetches = Counter("pvt_url_fetches", "Images requested by URL.", ["outcome"], registry=registry)
        self._fetch_seconds = Histogram("pvt_url_fetch_seconds", "Seconds that fetching one took.", registry=registry)
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._threads = ThreadPoolExecutor(_RESOLVERS, thread_name_prefix="pvt-resolve")
        self._turns = asyncio.Semaphore(CONNECTIONS)
        self._ssl_context = httpx.create_ssl_context() if reach.rules else None
        self._backend = CheckedBackend(
            reach, resolve or partial(_resolved, self._threads), backend or httpcore.AnyIOBackend()
        )

    async def __aexit__(self, *_: object) -> None:
        """Do not wait for the threads: one may hang."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def fetched(
        self, sent: Sequence[Upload | Link], request_id: str, held: Reservation | None = None
    ) -> list[Upload]:
        """`sent`, with each link replaced by the image's bytes, or by the error of fetching it. `held` grows."""
        budget, turns = _Budget(self._max_bytes, self._max_bytes, held), asyncio.Semaphore(PER_REQUEST)

        async def one(each: Upload | Link) -> Upload:
            if isinstance(each, Upload):
                return each
            async with turns, self._turns:
                return await self._fetch(each, budget, request_id)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(each)) for each in sent]
        return [task.result() for task in tasks]

    async def _fetch(self, link: Link, budget: _Budget, request_id: str) -> Upload:
        """The image at `link`, or the error of fetching it; counted and logged."""
        start, name, details = perf_counter(), None, dict[str, object]()
        data: bytes | ServiceError
        try:
            target = self._target(link.url)
            details["host"], name = target.host, PurePosixPath(target.url.path).name or None
            data = await self._within_time(target, budget)
            outcome, details["bytes"] = "fetched", len(data)
        except ServiceError as error:
            data, outcome = error, type(error).__name__
            if cause := error.__cause__:
                # Its message only where that can't contain what a client or a server sent.
                known = isinstance(cause, NotReachable | httpcore.NetworkError)
                details["cause"] = str(cause) if known else type(cause).__name__
        seconds = perf_counter() - start
        self._fetches.labels(outcome).inc()
        self._fetch_seconds.observe(seconds)
        log.info("image_by_url", request_id=request_id, outcome=outcome, ms=round(seconds * 1000, 2), **details)
        return Upload(name, data)

    def _target(self, url: str, base: httpx.URL | None = None) -> _Target:
        """`url`, which may be relative to `base`, if it is one that may be fetched.

        Raises ImageUrlRefused, whose message names no host: a redirect may lead to a secret one.
        """
        if not self._reach.rules:
            raise ImageUrlRefused("images by URL are off; PVT_URL_HOSTS is to name the hosts that they may come from")
        try:
            parsed = base.join(url) if base else httpx.URL(url)
        except (httpx.InvalidURL, ValueError) as error:  # `join` lets some of the standard library's through
            raise ImageUrlRefused("the URL is malformed") from error
        if parsed.scheme not in DEFAULT_PORTS:
            raise ImageUrlRefused("the URL is neither http:// nor https://")
        if parsed.userinfo:
            raise ImageUrlRefused("the URL carries credentials")
        if not (host := host_name(parsed.raw_host.decode("ascii"))):
            raise ImageUrlRefused("the URL's host is neither a name nor an address in its usual form")
        port = DEFAULT_PORTS[parsed.scheme] if parsed.port is None else parsed.port
        if not self._reach.allows(host, port, parsed.scheme):
            raise ImageUrlRefused("the URL's host and port are none that PVT_URL_HOSTS allows")
        return _Target(parsed, host, port)

    async def _within_time(self, target: _Target, budget: _Budget) -> bytes:
        """The bytes at the end of the redirects; every way in which a network fails becomes one of two errors."""
        host = target.host
        try:
            async with asyncio.timeout(self._seconds):
                for _ in range(REDIRECTS + 1):
                    response = await self._get(target, budget)
                    if isinstance(response, bytes):
                        return response
                    target = self._redirected(target, response)
                raise ImageUnreachable(f"the URL redirects more than {REDIRECTS} times")
        except (TimeoutError, httpcore.TimeoutException) as error:
            raise ImageTimedOut(
                f"the URL's host {host} did not send the image within the {self._seconds:g} s of PVT_URL_TIMEOUT_MS"
            ) from error
        except (NotReachable, httpcore.NetworkError) as error:
            # One message for a name that does not exist, is not public, or does not listen: it must reveal nothing.
            raise ImageUnreachable(f"the URL's host {host} can't be reached at a public address") from error
        except (httpcore.ProtocolError, httpcore.UnsupportedProtocol) as error:
            raise ImageUnreachable(f"the URL's host {host} does not speak HTTP as it should") from error

    def _redirected(self, target: _Target, location: str) -> _Target:
        """Where `location` leads, checked like a URL that a client sends."""
        try:
            following = self._target(location, target.url)
        except ImageUrlRefused as error:
            raise ImageUrlRefused(f"the URL redirects to where it may not: {error}") from error
        if (target.url.scheme, following.url.scheme) == ("https", "http"):
            raise ImageUrlRefused("the URL redirects from https to http")
        return following

    async def _get(self, target: _Target, budget: _Budget) -> bytes | str:
        """The body of the response, or where it redirects to."""
        url, host, port = target.url, target.host, target.port
        address = httpcore.URL(scheme=url.raw_scheme, host=host, port=port, target=url.raw_path)
        authority = f"[{host}]" if ":" in host else host
        headers: dict[bytes | str, bytes | str] = {
            "Host": authority if port == DEFAULT_PORTS[url.scheme] else f"{authority}:{port}",
            "Accept": "image/*, */*;q=0.1",
            "Accept-Encoding": "identity",
            "User-Agent": f"pvt-serve/{version('pvt-serve')}",
        }
        # A pool for each request: a shared one may never get a connection back from a request that is cancelled.
        pool = httpcore.AsyncConnectionPool(self._ssl_context, network_backend=self._backend, max_connections=1)
        request = pool.stream("GET", address, headers=headers, extensions={"timeout": {"connect": _CONNECT_SECONDS}})
        async with pool, request as response:
            if isinstance(stream := response.extensions["network_stream"], HeadLimited):
                stream.end_head()
            fields = {name.lower().decode("latin-1"): value.decode("latin-1") for name, value in response.headers}
            if response.status in _REDIRECT and "location" in fields:
                return fields["location"]
            if response.status != 200:  # noqa: PLR2004  OK
                raise ImageUnreachable(f"the URL's host {host} answered {response.status}")
            if fields.get("content-encoding", "identity").lower() != "identity":
                raise ImageUnreachable(f"the URL's host {host} responds with a content encoding that was not requested")
            return await _body(response, fields.get("content-length", ""), budget)


async def _body(response: httpcore.Response, announced: str, budget: _Budget) -> bytes:
    if announced.isdecimal():
        budget.require(int(announced))
    body, chunks = bytearray(), 0
    try:
        async for chunk in response.aiter_stream():
            budget.take(len(chunk))
            body += chunk
            chunks += 1
            if chunks > _FREE_CHUNKS + len(body) / _LEAST_MEAN_CHUNK:
                raise ImageUnreachable("the URL's host sends the image in too many tiny chunks")  # noqa: TRY301  counted
    except BaseException:
        budget.give_back(len(body))
        raise
    return bytes(body)

"""Images by URL: fetched within limits, and only from where PVT_URL_HOSTS allows."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import PurePosixPath
from time import perf_counter
from types import TracebackType
from typing import Self

import httpcore
import httpx
import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram

from app.bodies import Link, Upload
from app.problems import ImageTimedOut, ImageUnreachable, ImageUrlRefused
from app.remote_images.addresses import DEFAULT_PORTS, Reach, host_name
from app.remote_images.connections import CheckedBackend, HeadLimited, NotReachable, Resolve, Resolver
from service.errors import ImageTooLarge, ServiceError

log = structlog.get_logger(component="fetch")

REDIRECTS = 3
CONNECTIONS, PER_REQUEST = 32, 8  # at a time
_CONNECT_SECONDS = 5.0
_REDIRECT = frozenset({301, 302, 303, 307, 308})
# Each chunk costs time of the event loop, however small it is, so the number of tiny chunks is bounded.
_FREE_CHUNKS, _LEAST_MEAN_CHUNK = 1024, 512


@dataclass(frozen=True, slots=True)
class _Target:
    """A URL that may be fetched, its host in the one spelling that was checked."""

    url: httpx.URL
    host: str
    port: int

    @property
    def core(self) -> httpcore.URL:
        """The same for httpcore."""
        return httpcore.URL(scheme=self.url.raw_scheme, host=self.host, port=self.port, target=self.url.raw_path)

    @property
    def authority(self) -> str:
        """The `Host` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.url.scheme] else f"{host}:{self.port}"


@dataclass(slots=True)
class _Budget:
    """Bytes that the images of one request may still have, of `limit` for all together. Mutable."""

    limit: int
    left: int

    def take(self, count: int) -> None:
        """Raises ImageTooLarge when there are not as many left."""
        self.left -= count
        if self.left < 0:
            raise self.exceeded()

    def exceeded(self) -> ImageTooLarge:
        """The error for the client."""
        return ImageTooLarge(
            f"the images that the request fetches are larger than {self.limit / 1e6:g} MB in all, which "
            "PVT_MAX_BODY_MB allows"
        )


class Fetcher:
    """Use as an async context manager. The images of one request have `max_bytes` in all, each one `seconds`."""

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
        self._resolver = Resolver()
        self._turns = asyncio.Semaphore(CONNECTIONS)
        self._ssl_context = httpx.create_ssl_context() if reach.rules else None
        self._backend = CheckedBackend(reach, resolve or self._resolver, backend or httpcore.AnyIOBackend())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resolver.close()

    async def fetched(self, sent: Sequence[Upload | Link], request_id: str) -> list[Upload]:
        """`sent`, with each link replaced by the image's bytes, or by the error of fetching it."""
        budget, turns = _Budget(self._max_bytes, self._max_bytes), asyncio.Semaphore(PER_REQUEST)

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
        start, host, name, cause = perf_counter(), None, None, None
        data: bytes | ServiceError
        try:
            target = self._target(link.url)
            host, name = target.host, PurePosixPath(target.url.path).name or None
            data = await self._within_time(target, budget)
        except ServiceError as error:
            data, cause = error, _cause(error)
        seconds = perf_counter() - start
        outcome = "fetched" if isinstance(data, bytes) else type(data).__name__
        self._fetches.labels(outcome).inc()
        self._fetch_seconds.observe(seconds)
        size = len(data) if isinstance(data, bytes) else None
        fields = {"host": host, "outcome": outcome, "bytes": size, "cause": cause, "ms": round(seconds * 1000, 2)}
        log.info(
            "image_by_url", request_id=request_id, **{key: each for key, each in fields.items() if each is not None}
        )
        return Upload(name, data)

    def _target(self, url: str | httpx.URL) -> _Target:
        """`url`, if it is one that may be fetched.

        Raises:
            ImageUrlRefused: it is not. The message names no host: a redirect may lead to a secret one.
        """
        if not self._reach.rules:
            raise ImageUrlRefused("images by URL are off; PVT_URL_HOSTS is to name the hosts that they may come from")
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
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
                return await self._follow(target, budget)
        except (TimeoutError, httpcore.TimeoutException) as error:
            raise ImageTimedOut(
                f"the URL's host {host} did not send the image within the {self._seconds:g} s of PVT_URL_TIMEOUT_MS"
            ) from error
        except (NotReachable, httpcore.NetworkError) as error:
            # One message for a name that does not exist, is not public, or does not listen: it must reveal nothing.
            raise ImageUnreachable(f"the URL's host {host} can't be reached at a public address") from error
        except (httpcore.ProtocolError, httpcore.UnsupportedProtocol) as error:
            raise ImageUnreachable(f"the URL's host {host} does not speak HTTP as it should") from error

    async def _follow(self, first: _Target, budget: _Budget) -> bytes:
        target = first
        for _ in range(REDIRECTS + 1):
            response = await self._get(target, budget)
            if isinstance(response, bytes):
                return response
            target = self._redirected(target, response)
        raise ImageUnreachable(f"the URL redirects more than {REDIRECTS} times")

    def _redirected(self, target: _Target, location: str) -> _Target:
        """Where `location` leads, checked like a URL that a client sends."""
        try:
            following = self._target(target.url.join(location))
        except (httpx.InvalidURL, ValueError) as error:  # `join` lets some of the standard library's through
            raise ImageUrlRefused("the URL redirects to where it may not: the URL is malformed") from error
        except ImageUrlRefused as error:
            raise ImageUrlRefused(f"the URL redirects to where it may not: {error}") from error
        if (target.url.scheme, following.url.scheme) == ("https", "http"):
            raise ImageUrlRefused("the URL redirects from https to http")
        return following

    async def _get(self, target: _Target, budget: _Budget) -> bytes | str:
        """The body of the response, or where it redirects to."""
        headers: dict[bytes | str, bytes | str] = {
            "Host": target.authority,
            "Accept": "image/*, */*;q=0.1",
            "Accept-Encoding": "identity",
            "User-Agent": f"pvt-serve/{version('pvt-serve')}",
        }
        timeout = {"connect": _CONNECT_SECONDS, "read": self._seconds, "write": self._seconds, "pool": self._seconds}
        # A pool for each request: a shared one may never get a connection back from a request that is cancelled.
        pool = httpcore.AsyncConnectionPool(self._ssl_context, network_backend=self._backend, max_connections=1)
        send = partial(pool.stream, "GET", target.core, headers=headers, extensions={"timeout": timeout})
        async with pool, send() as response:
            if isinstance(stream := response.extensions["network_stream"], HeadLimited):
                stream.end_head()
            fields = {name.lower().decode("latin-1"): value.decode("latin-1") for name, value in response.headers}
            if response.status in _REDIRECT and "location" in fields:
                return fields["location"]
            if response.status != 200:  # noqa: PLR2004  OK
                raise ImageUnreachable(f"the URL's host {target.host} answered {response.status}")
            if fields.get("content-encoding", "identity").lower() != "identity":
                raise ImageUnreachable(
                    f"the URL's host {target.host} responds with a content encoding that was not requested"
                )
            return await _body(response, fields.get("content-length", ""), budget)


async def _body(response: httpcore.Response, announced: str, budget: _Budget) -> bytes:
    if announced.isdecimal() and int(announced) > budget.left:
        raise budget.exceeded()
    body, chunks = bytearray(), 0
    try:
        async for chunk in response.aiter_stream():
            body += chunk
            chunks += 1
            budget.take(len(chunk))
            _refuse_tiny_chunks(chunks, len(body))
    except BaseException:
        budget.left += len(body)  # what is discarded does not count
        raise
    return bytes(body)


def _refuse_tiny_chunks(chunks: int, size: int) -> None:
    if chunks > _FREE_CHUNKS + size / _LEAST_MEAN_CHUNK:
        raise ImageUnreachable("the URL's host sends the image in too many tiny chunks")


def _cause(error: ServiceError) -> str | None:
    """Why the network failed, for the log; its message only where that can't contain what a client or a server sent."""
    cause = error.__cause__
    if isinstance(cause, NotReachable | httpcore.NetworkError):
        return str(cause)
    return None if cause is None else type(cause).__name__

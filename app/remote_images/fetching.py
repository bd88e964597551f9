"""Images by URL: fetched within limits, and only from where PVT_URL_HOSTS allows.

Against server-side request forgery a name is resolved once, then checked, then connected to.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from importlib.metadata import version
from ipaddress import IPv6Address
from math import inf
from pathlib import PurePosixPath
from time import perf_counter
from typing import Any, NamedTuple

import httpcore
import httpx
import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram

from app.addresses import DEFAULT_PORTS, Address, Reach, host_name, plain
from app.bodies import Link, Upload
from app.problems import ImageHostBusy, ImageTimedOut, ImageUnreachable, ImageUrlRefused
from app.remote_images.resolving import Resolver
from app.remote_images.shares import Key, Share, Shares, ShareTaken
from service.errors import ImageTooLarge, ServiceError
from service.memory import Reservation

log = structlog.get_logger(component="fetch")

Resolve = Callable[[str, int], Awaitable[Sequence[Address]]]

REDIRECTS = 3
CONNECTIONS, LOOKUPS, PER_REQUEST = 64, 256, 16  # at a time
# A host has half of all at most. The names of one domain, and those at one address, have more together than one of
# them; a client has more than a few hosts that hang.
_SHARES = {"host": Share(1, 1), "domain": Share(2, 8), "address": Share(2, 4), "client": Share(4, 128)}
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
    """Opens httpcore's connections, and only to `addresses`, which were checked.

    Names, certificates and the `Host` header stay the URL's: the layers above the connection handle them.
    """

    def __init__(self, addresses: Sequence[Address], backend: httpcore.AsyncNetworkBackend) -> None:
        self._addresses = addresses
        self._backend = backend

    async def connect_tcp(self, host: str, port: int, *args: Any, **options: Any) -> httpcore.AsyncNetworkStream:  # noqa: ANN401, ARG002  httpcore's
        """Connect to the first address that accepts."""
        for address in self._addresses:
            try:
                return HeadLimited(await self._backend.connect_tcp(str(address), port, *args, **options))
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


class _Target(NamedTuple):
    """A URL that may be fetched, its host in the one spelling that was checked."""

    url: httpx.URL
    host: str
    port: int

    def keys(self, client: str) -> list[Key]:
        """Who shares the places with others, before its address is known."""
        return [Key("host", f"{self.host}:{self.port}"), *([Key("client", client)] if client else [])]

    def domain(self) -> Key:
        """The last two labels: whoever owns them can make any number of names."""
        return Key("domain", ".".join(self.host.split(".")[-2:]))


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


@dataclass(frozen=True, slots=True)
class _Request:
    """What the images of one request have in common. `silent`: hosts that let an image of it run out of time."""

    id: str
    client: str
    budget: _Budget
    turns: Shares = field(default_factory=lambda: Shares(PER_REQUEST, _SHARES, room=inf))
    silent: set[tuple[str, int]] = field(default_factory=set)


class Fetcher(AbstractAsyncContextManager["Fetcher"]):
    """The images of one request have `max_bytes` in all, each one `seconds`; half of them at most go to waiting.

    Lookups and connections have places, and so has each request. A host that hangs holds its share of them and no more.
    """

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
        self._seconds, self._wait_seconds = seconds, seconds / 2
        self._lookups, self._connections = Shares(LOOKUPS, _SHARES), Shares(CONNECTIONS, _SHARES)
        self._ssl_context = httpx.create_ssl_context() if reach.rules else None
        self._resolver = Resolver()
        self._resolve = resolve or self._resolver
        self._backend = backend or httpcore.AnyIOBackend()

    async def __aexit__(self, *_: object) -> None:
        await self._resolver.close()

    async def fetched(
        self, sent: Sequence[Upload | Link], request_id: str, client: str = "", held: Reservation | None = None
    ) -> list[Upload]:
        """`sent`, with each link replaced by the image's bytes, or by the error of fetching it.

        `client` is who asks, with a share of its own; empty: nobody in particular. `held` grows by what is fetched.
        """
        request = _Request(request_id, client, _Budget(self._max_bytes, self._max_bytes, held))

        async def one(each: Upload | Link) -> Upload:
            return each if isinstance(each, Upload) else await self._fetch(each, request)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(each)) for each in sent]
        return [task.result() for task in tasks]

    async def _fetch(self, link: Link, request: _Request) -> Upload:
        """The image at `link`, or the error of fetching it; counted and logged."""
        start, name, details = perf_counter(), None, dict[str, object]()
        data: bytes | ServiceError
        try:
            target = self._target(link.url)
            details["host"], name = target.host, PurePosixPath(target.url.path).name or None
            async with request.turns.place(target.keys("")):
                start = perf_counter()
                data = await self._in_turn(target, request)
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
        log.info("image_by_url", request_id=request.id, outcome=outcome, ms=round(seconds * 1000, 2), **details)
        return Upload(name, data)

    async def _in_turn(self, target: _Target, request: _Request) -> bytes:
        """The image, unless its host let another one of the request run out of time: the rest would take as long."""
        host, place = target.host, (target.host, target.port)
        if place in request.silent:
            raise ImageTimedOut(
                f"the URL's host {host} did not send another image of this request within the {self._seconds:g} s of "
                "PVT_URL_TIMEOUT_MS, so this one was not requested"
            )
        try:
            return await self._within_time(target, request)
        except ImageTimedOut:
            request.silent.add(place)
            raise

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

    async def _within_time(self, target: _Target, request: _Request) -> bytes:
        """The bytes at the end of the redirects; every way in which a network fails becomes one of three errors."""
        host = target.host
        try:
            async with asyncio.timeout(self._seconds):
                for _ in range(REDIRECTS + 1):
                    response = await self._response(target, request)
                    if isinstance(response, bytes):
                        return response
                    target = self._redirected(target, response)
                raise ImageUnreachable(f"the URL redirects more than {REDIRECTS} times")
        except ShareTaken as error:
            whose = "this client" if error.key.kind == "client" else f"the URL's host {host}"
            raise ImageHostBusy(
                f"{whose} has as many images under way as it may have, and none arrived within "
                f"{self._wait_seconds:g} s (half of PVT_URL_TIMEOUT_MS); send this one again later",
                retry_after_seconds=self._seconds,
            ) from error
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

    async def _response(self, target: _Target, request: _Request) -> bytes | str:
        """What `_get` returns, with a place for the lookup and one for the connection; raises ShareTaken."""
        keys = target.keys(request.client)
        async with self._lookups.place([*keys, target.domain()], self._wait_seconds):
            addresses = await self._checked(target)
        async with self._connections.place([*keys, *_networks(addresses, target.port)], self._wait_seconds):
            return await self._get(target, addresses, request.budget)

    async def _checked(self, target: _Target) -> Sequence[Address]:
        """The addresses to connect to, every one of the host's checked; raises NotReachable.

        One address that is not allowed is enough: a name with a public and a private one is how filters are got around.
        """
        addresses = await self._resolve(target.host, target.port)
        if not addresses:
            raise NotReachable("it has no address")
        if not all(self._reach.reaches(target.host, target.port, address) for address in addresses):
            raise NotReachable("it has an address that is not public")
        return addresses[:_ATTEMPTS]

    async def _get(self, target: _Target, addresses: Sequence[Address], budget: _Budget) -> bytes | str:
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
        backend = CheckedBackend(addresses, self._backend)
        pool = httpcore.AsyncConnectionPool(self._ssl_context, network_backend=backend, max_connections=1)
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


def _networks(addresses: Sequence[Address], port: int) -> list[Key]:
    """Keys of `addresses`, each once: of IPv6 the /64, any address of which one machine can have."""
    networks = (
        IPv6Address(int(each) >> 64 << 64) if isinstance(each, IPv6Address) else each for each in map(plain, addresses)
    )
    return [*dict.fromkeys(Key("address", f"{network} {port}") for network in networks)]


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

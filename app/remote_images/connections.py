"""Connections to checked addresses only (SSRF protection): a name is resolved once, then checked, then used."""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ipaddress import ip_address

import httpcore

from app.remote_images.addresses import Address, Reach

Resolve = Callable[[str, int], Awaitable[Sequence[Address]]]

RESOLVERS = 8  # threads; a name server that never answers holds one of them until the C library gives up
_ATTEMPTS = 3  # addresses of one host
_HEAD_BYTES, _HEAD_CHUNK = 32_768, 2048


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
        """From now on a body is read."""
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

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109  httpcore's
    ) -> httpcore.AsyncNetworkStream:
        """The same connection, within TLS."""
        return HeadLimited(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> object:
        """Information about the connection."""
        return self._stream.get_extra_info(info)


class Resolver:
    """The system's resolver, on its own threads."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(RESOLVERS, thread_name_prefix="pvt-resolve")

    async def __call__(self, host: str, port: int) -> list[Address]:
        """The addresses of `host`, best first; none where it has none."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(
                self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            )
        except (OSError, UnicodeError):
            return []
        return [ip_address(str(each[4][0])) for each in found]

    def close(self) -> None:
        """Do not wait for the threads: one may hang."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Opens httpcore's connections, and only to addresses that `reach` allows.

    Names, certificates and the `Host` header stay the URL's: the layers above the connection handle them.
    """

    def __init__(self, reach: Reach, resolve: Resolve, backend: httpcore.AsyncNetworkBackend) -> None:
        self._reach = reach
        self._resolve = resolve
        self._backend = backend

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Resolve, check every address, connect to the first that accepts.

        Raises:
            NotReachable: there is no address, or one of them is not allowed: a name with a public and a private address
                is how filters are got around.
        """
        addresses = await self._resolve(host, port)
        if not addresses:
            raise NotReachable("it has no address")
        if not all(self._reach.reaches(host, port, address) for address in addresses):
            raise NotReachable("it has an address that is not public")
        *others, last = map(str, addresses[:_ATTEMPTS])
        for address in others:
            with suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return HeadLimited(
                    await self._backend.connect_tcp(address, port, timeout, local_address, socket_options)
                )
        return HeadLimited(await self._backend.connect_tcp(last, port, timeout, local_address, socket_options))

    async def sleep(self, seconds: float) -> None:
        """For retries, of which there are none."""
        await self._backend.sleep(seconds)

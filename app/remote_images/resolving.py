"""Addresses of names, by c-ares: a lookup is a question on a socket and holds no thread, however long it hangs."""

import asyncio
import socket
from ipaddress import ip_address

import aiodns

from app.addresses import Address

_SECONDS, _TRIES = 2.0, 2  # for each of them; glibc's own would be 5 and 2


class Resolver:
    """Asks the name servers of /etc/resolv.conf, after /etc/hosts."""

    def __init__(self) -> None:
        self._dns: aiodns.DNSResolver | None = None  # with the first lookup: it belongs to an event loop

    async def __call__(self, host: str, port: int) -> list[Address]:
        """The addresses of `host`, best first; none where it has none, or nobody answers."""
        try:
            return [ip_address(host)]
        except ValueError:
            pass
        if not self._dns:
            self._dns = aiodns.DNSResolver(loop=asyncio.get_running_loop(), timeout=_SECONDS, tries=_TRIES)
        try:
            found = await self._dns.getaddrinfo(host, port=port, family=socket.AF_UNSPEC, type=socket.SOCK_STREAM)
        except aiodns.error.DNSError:
            return []
        return [ip_address(_text(each.addr[0])) for each in found.nodes]

    async def close(self) -> None:
        """Give up what is being looked up."""
        if self._dns:
            await self._dns.close()


def _text(address: str | bytes) -> str:
    return address.decode("ascii") if isinstance(address, bytes) else address

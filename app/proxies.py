"""What the proxies in front say of a request: who sent it, over which scheme, to which host, below which path.

Only proxies that PVT_TRUSTED_PROXIES names are believed (decision 80).
"""

import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final
from urllib.parse import quote
from urllib.request import parse_http_list

from multipart import parse_options_header
from starlette.types import Scope

from app.settings import PREFIX_PATH, UNIX, Settings

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MAX_FORWARDED_BYTES = 4_096  # of the headers of proxies; more is no chain of proxies
MAX_PROXIES = 32  # in a row that are trusted
_HOST: Final = re.compile(r"[A-Za-z0-9._~-]{1,255}(:[0-9]{1,5})?|\[[0-9A-Fa-f:.%]{2,64}\](:[0-9]{1,5})?")
_SCHEMES: Final = {"http", "https"}
_FRONT: Final = {b"forwarded", b"x-forwarded-proto", b"x-forwarded-host", b"x-forwarded-prefix"}


@lru_cache(maxsize=4096)
def address_of(text: str) -> Address | None:
    """An address, with or without a port, brackets and zone; IPv4 written as IPv6 as what it is."""
    host = (
        text.partition("]")[0][1:] if text.startswith("[") else text.partition(":")[0] if text.count(":") == 1 else text
    )
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return (address.ipv4_mapped if isinstance(address, IPv6Address) else None) or address


class Proxies:
    """The proxies that are trusted, and where the service is below them: PVT_ROOT_PATH, or what they say."""

    def __init__(self, settings: Settings, endpoints: Collection[str] = ()) -> None:
        """`endpoints`: the first segments of the paths that the service has."""
        self._networks = [each for each in settings.trusted_proxies if each != UNIX]
        self._trusts_unix = UNIX in settings.trusted_proxies
        self._root_path = settings.root_path
        self._endpoints = endpoints
        self.are_there = bool(settings.trusted_proxies or settings.root_path)

    def trusts(self, address: Address | None) -> bool:
        """Whether `address`, None for a Unix socket, is that of a trusted proxy."""
        if address is None:
            return self._trusts_unix
        return any(address in network for network in self._networks)

    def client(self, peer: str, forwarded_for: Sequence[bytes], forwarded: Sequence[bytes]) -> str:
        """The client's address as trusted proxies wrote it.

        A proxy writes one of the two headers and passes on the other as its client sent it. Where both are present and
        disagree, nobody can tell which is the proxy's: the client then counts as the proxy itself.
        """
        found = {
            self._last_untrusted(peer, read(b",".join(values).decode("latin-1")))
            for values, read in ((forwarded_for, _items), (forwarded, _forwarded_for))
            if values and sum(map(len, values)) <= MAX_FORWARDED_BYTES
        }
        return found.pop() if len(found) == 1 else peer

    def _last_untrusted(self, peer: str, hops: Sequence[str]) -> str:
        """The last of `hops` that is no trusted proxy. What is no address ends the chain: its writer is the client."""
        last = peer
        for hop in hops[: -MAX_PROXIES - 1 : -1]:
            if (address := address_of(hop)) is None:
                break
            last = hop
            if not self.trusts(address):
                break
        return last

    def place(self, scope: Scope) -> None:
        """Set scheme and root path of `scope` as the client has them, and `host` of its state if a proxy says so.

        As ASGI has it, the path then begins with the root path, whether the proxy has removed that or not. A path that
        begins like one of the endpoints can only be one of which it was removed.
        """
        prefix = self._root_path
        peer = scope["client"][0] if scope.get("client") else ""
        if self.trusts(address_of(peer)) and (said := _said(scope["headers"])):
            scheme, host, below = said
            scope["scheme"] = scheme or scope.get("scheme", "http")
            if host:
                scope["state"]["host"] = host
            prefix = below or prefix
        mounted, path = scope.get("root_path", ""), scope["path"]
        if not prefix or f"{mounted}/".startswith(f"{prefix}/") or not path.startswith("/"):
            return
        if prefix.split("/")[1] not in self._endpoints and f"{path}/".startswith(f"{prefix}/"):
            path = path.removeprefix(prefix)
        scope["root_path"] = prefix + mounted
        # `location /images { proxy_pass http://service/; }` of nginx removes the path and leaves two slashes.
        scope["path"] = f"{prefix}/{path.lstrip('/')}"
        scope["raw_path"] = quote(scope["path"]).encode()


def base_url(scope: Scope) -> str:
    """Where clients reach the service, without a slash at the end; `http://localhost` where no sound host is named."""
    named = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
    host = scope["state"].get("host", named)
    return f"{scope['scheme']}://{host if _HOST.fullmatch(host) else 'localhost'}{scope.get('root_path', '')}"


def _said(headers: Sequence[tuple[bytes, bytes]]) -> tuple[str, str, str] | None:
    """Scheme, host and prefix by the outermost proxy, each "" where none is said, or two headers disagree."""
    values: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        if name in _FRONT:
            values.setdefault(name, []).append(value)
    if not values:
        return None
    texts = {
        name: b",".join(each).decode("latin-1")
        for name, each in values.items()
        if sum(map(len, each)) <= MAX_FORWARDED_BYTES
    }
    first: Mapping[str, str] = next(iter(_elements(texts.get(b"forwarded", ""))), {})
    scheme = _agreed(_first(texts.get(b"x-forwarded-proto", "")), first.get("proto", "")).lower()
    host = _agreed(_first(texts.get(b"x-forwarded-host", "")), first.get("host", ""))
    below = "".join(each.rstrip("/") for each in _items(texts.get(b"x-forwarded-prefix", "")))
    return (
        scheme if scheme in _SCHEMES else "",
        host if _HOST.fullmatch(host) else "",
        below if PREFIX_PATH.fullmatch(below) else "",
    )


def _agreed(one: str, other: str) -> str:
    return (one or other) if not (one and other) or one.lower() == other.lower() else ""


def _first(value: str) -> str:
    return _items(value)[0]


def _items(value: str) -> list[str]:
    return [each.strip() for each in value.split(",")]


def _elements(value: str) -> list[dict[str, str]]:
    """The elements of `Forwarded` (RFC 7239)."""
    return [parse_options_header(f"element;{element}")[1] for element in parse_http_list(value)]


def _forwarded_for(value: str) -> list[str]:
    """The `for` of each element; "" where one has none."""
    return [element.get("for", "") for element in _elements(value)]

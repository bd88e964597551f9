"""Which hosts and addresses this service may fetch images from. Pure decisions, without resolving or connecting."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Self

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

DEFAULT_PORTS = {"http": 80, "https": 443}
ANY = "*"
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*")
_NUMERIC_END = re.compile(r"(.*\.)?(\d+|0x[0-9a-f]*)")  # what some resolvers take for an IPv4 address
_ENTRY = re.compile(r"(?P<host>\[[^\]]+\]|[^:\[\]]+)(:(?P<port>[1-9][0-9]{0,4}))?")

# What IANA's special-purpose registries, of either family, exclude from the public internet. Written out, since what
# the standard library calls global has changed between its patch releases.
_NOT_PUBLIC_V4 = [
    IPv4Network(each)
    for each in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16"),
        *("192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3"),
    )
]
_PUBLIC_V6 = IPv6Network("2000::/3")
# Protocol assignments with Teredo among them, documentation, 6to4, AS112, documentation again.
_NOT_PUBLIC_V6 = [
    IPv6Network(each) for each in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20")
]
_NAT64 = IPv6Network("64:ff9b::/96")


def plain(address: Address) -> Address:
    """The IPv4 address inside a mapped or NAT64 one, which is where its packets go; any other address itself."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped:
            return address.ipv4_mapped
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def is_public(address: Address) -> bool:
    """Whether `address` is of the public internet: not private, local, shared, multicast, reserved or tunnelled."""
    address = plain(address)
    if not address.is_global:
        return False
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_V4)
    return address in _PUBLIC_V6 and not any(address in network for network in _NOT_PUBLIC_V6)


def host_name(host: str) -> str | None:
    """`host` in its one spelling: lower case, no dot at its end, an address as `ipaddress` writes it.

    None when it is neither a name nor an address in its usual form, such as `127.1`, `0x7f.1` or `2130706433`.
    """
    host = host.lower().removesuffix(".")
    try:
        address = ip_address(host)
    except ValueError:
        return host if _NAME.fullmatch(host) and not _NUMERIC_END.fullmatch(host) else None
    scoped = isinstance(address, IPv6Address) and address.scope_id is not None
    return None if scoped else str(address)


@dataclass(frozen=True, slots=True)
class HostRule:
    """One entry of the allow-list. `host`: a name, an address, `*.` and a name, or `*`; no `port`: the scheme's own."""

    host: str
    port: int | None = None

    @classmethod
    def parse(cls, entry: str) -> Self:
        """From `host`, `host:port`, `*.example.org` or `*`, an IPv6 address in brackets; raises ValueError."""
        if not (match := _ENTRY.fullmatch(entry)):
            raise ValueError(f"{entry!r} is no host; write example.org, example.org:8443, *.example.org or *")
        host, port = match["host"], match["port"]
        suffix = host.removeprefix("*.") if host != ANY else ""
        known = ANY if host == ANY else host_name(suffix[1:-1] if suffix.startswith("[") else suffix)
        if known is None or (port and int(port) > 65535):  # noqa: PLR2004  the highest port
            raise ValueError(f"{entry!r} is no host; names beyond ASCII are written as xn--...")
        return cls(f"*.{known}" if host.startswith("*.") else known, int(port) if port else None)

    def matches(self, host: str, port: int, scheme: str) -> bool:
        """Whether it allows `host`, in the spelling of `host_name`, at `port`."""
        if port != (self.port or DEFAULT_PORTS[scheme]):
            return False
        if self.host.startswith("*."):
            return host.endswith(self.host[1:])
        return self.host in (ANY, host)


@dataclass(frozen=True, slots=True)
class Reach:
    """Where images may come from: `rules` say which hosts, `private` which addresses that are not public ones."""

    rules: Sequence[HostRule] = ()
    private: Sequence[Network] = ()

    def allows(self, host: str, port: int, scheme: str) -> bool:
        """Whether some rule allows the host."""
        return any(rule.matches(host, port, scheme) for rule in self.rules)

    def reaches(self, host: str, port: int, address: Address) -> bool:
        """Whether a connection for `host` may go to `address`.

        A private one is allowed only for a host that a rule names: with `*` a client could send a name that has one.
        """
        if is_public(address):
            return True
        named = [rule for rule in self.rules if rule.host != ANY]
        return any(rule.matches(host, port, scheme) for rule in named for scheme in DEFAULT_PORTS) and any(
            plain(address) in network for network in self.private
        )

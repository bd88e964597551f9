"""Who sends a request, by its key or its address; how much each may send, and what each key has used."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from hashlib import sha256
from ipaddress import IPv6Network
from math import inf
from time import monotonic
from typing import Final, Literal

from prometheus_client import CollectorRegistry, Counter
from pydantic import SecretStr
from starlette.types import Scope

from app.problems import ClientLimitExceeded
from app.proxies import Proxies, address_of
from app.settings import Settings, encodings

Role = Literal["", "api", "management"]

MAX_CLIENTS = 16_384  # that are remembered, some 5 MB; who was silent for longest is forgotten first
PREFIX_BITS = 64  # of an IPv6 address: what one subscriber has
NO_SOCKET: Final = "unix"
MEAN_WEIGHT = 0.2  # of the newest request in a client's mean


class Directory:
    """Names those who send requests; it keeps the digests of the keys, not the keys."""

    def __init__(self, settings: Settings) -> None:
        self._keys: dict[bytes, tuple[str, Role]] = {}
        self._add(settings.api_keys, "api")
        self._add(settings.management_keys, "management")
        self._proxies = Proxies(settings)

    def _add(self, keys: Iterable[SecretStr], role: Role) -> None:
        for key in keys:
            secret = key.get_secret_value()
            for form in encodings(secret):
                self._keys[sha256(form).digest()] = key_name(secret), role

    def names(self) -> set[str]:
        """The names of all keys."""
        return {name for name, _ in self._keys.values()}

    def identify(self, scope: Scope) -> tuple[str, Role]:
        """Who sends the request of `scope`, and what for it has a key.

        The name is `key:` and 8 hex digits of the key's SHA-256, if the service has such a key. Otherwise it is `ip:`
        and an IPv4 address or the /64 network of an IPv6 address; behind a trusted proxy the one that its header names.
        """
        authorization, forwarded_for, forwarded = _said(scope)
        if authorization and self._keys:
            scheme, _, secret = authorization.partition(b" ")
            found = self._keys.get(sha256(secret.strip(b" \t")).digest())
            if found and scheme.lower() == b"bearer":
                return found
        return f"ip:{self._address(scope, forwarded_for, forwarded)}", ""

    def address(self, scope: Scope) -> str:
        """The address from which the request of `scope` comes, whatever key it has; as in `identify`."""
        return self._address(scope, *_said(scope)[1:])

    def _address(self, scope: Scope, forwarded_for: list[bytes], forwarded: list[bytes]) -> str:
        peer = scope["client"][0] if scope.get("client") else ""
        if (forwarded_for or forwarded) and self._proxies.trusts(address_of(peer)):
            return _network(self._proxies.client(peer, forwarded_for, forwarded))
        return _network(peer)


def _said(scope: Scope) -> tuple[bytes, list[bytes], list[bytes]]:
    """The values of `Authorization`, `X-Forwarded-For` and `Forwarded`."""
    authorization = b""
    forwarded_for: list[bytes] = []
    forwarded: list[bytes] = []
    for name, value in scope["headers"]:
        if name == b"authorization":
            authorization = authorization or value
        elif name == b"x-forwarded-for":
            forwarded_for.append(value)
        elif name == b"forwarded":
            forwarded.append(value)
    return authorization, forwarded_for, forwarded


def key_name(key: str) -> str:
    """The name of a key in log lines and metrics, from which nobody can tell a long random key."""
    return f"key:{sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


@lru_cache(maxsize=4096)
def _network(text: str) -> str:
    """What of an address one client has."""
    address = address_of(text)
    if address is None:
        return NO_SOCKET
    return str(address) if address.version == 4 else str(IPv6Network((address, PREFIX_BITS), strict=False))  # noqa: PLR2004


class Allowance:
    """A rate with a burst, by the generic cell rate algorithm: all it keeps is when the allowance is whole again."""

    __slots__ = ("_whole_at",)

    def __init__(self) -> None:
        self._whole_at = -inf

    def wait_seconds(self, now: float, rate: float, burst: float) -> float:
        """How long until one more is allowed, 0 if it is now."""
        return max(0.0, self._whole_at - now - (burst - 1) / rate)

    def take(self, now: float, rate: float, count: float = 1) -> None:
        """Take `count`, even more than is left: what follows waits for it."""
        self._whole_at = max(self._whole_at, now) + count / rate


class _Client:
    """What is remembered of one client: its allowance, when its requests under way began, and how long they take."""

    __slots__ = ("allowance", "mean_seconds", "started")

    def __init__(self) -> None:
        self.allowance = Allowance()
        self.started: dict[object, float] = {}
        self.mean_seconds: float | None = None

    def until_one_ends(self, now: float) -> float:
        """When its oldest request is likely to end: after the mean, or, without one, after as long as it took yet."""
        ran = now - next(iter(self.started.values()))
        return ran if self.mean_seconds is None else max(0.0, self.mean_seconds - ran)


class ClientLimits:
    """PVT_CLIENT_RATE, PVT_CLIENT_BURST and PVT_CLIENT_CONCURRENCY, for each client by itself, in bounded memory."""

    def __init__(self, settings: Settings, registry: CollectorRegistry) -> None:
        self._rate = settings.client_rate
        self._burst = settings.client_burst or max(1.0, self._rate)
        self._concurrency = settings.client_concurrency
        self.refusals = Counter(
            "pvt_client_refusals", "Requests beyond a client's limit, by the limit.", ["limit"], registry=registry
        )
        # Mutable state: clients with requests under way, of which each has a connection; and others, the latest last.
        self._active: dict[str, _Client] = {}
        self._idle: OrderedDict[str, _Client] = OrderedDict()

    @property
    def are_set(self) -> bool:
        """Whether there is any limit."""
        return bool(self._rate or self._concurrency)

    @contextmanager
    def admitted(self, name: str, scope: Scope) -> Iterator[None]:
        """A request of the client `name`, under way for as long as the context lasts.

        It counts as one image until its end, and then as the images that it had.

        Raises:
            ClientLimitExceeded: the client has sent too much, or has too many requests under way.
        """
        start, token = monotonic(), object()
        client = self._active.get(name) or self._idle.pop(name, None) or _Client()
        try:
            self._check(name, client, start)
            self._active[name] = client
            client.started[token] = start
            if self._rate:
                client.allowance.take(start, self._rate)
            yield
        finally:
            if client.started.pop(token, None) is not None:
                self._end(client, monotonic() - start, scope["state"].get("images", 1))
            if not client.started:
                self._active.pop(name, None)
                self._idle[name] = client
                if len(self._idle) > MAX_CLIENTS:
                    self._idle.popitem(last=False)

    def _end(self, client: _Client, seconds: float, images: int) -> None:
        mean = client.mean_seconds
        client.mean_seconds = seconds if mean is None else mean + MEAN_WEIGHT * (seconds - mean)
        if self._rate and images > 1:
            client.allowance.take(monotonic(), self._rate, images - 1)

    def _check(self, name: str, client: _Client, now: float) -> None:
        """Raises ClientLimitExceeded."""
        if self._rate and (wait := client.allowance.wait_seconds(now, self._rate, self._burst)):
            self.refusals.labels("rate").inc()
            raise ClientLimitExceeded(
                f"{name} has sent more than the {self._rate:g} images a second, {self._burst:g} at once, that "
                "PVT_CLIENT_RATE and PVT_CLIENT_BURST allow each client; send less at a time",
                wait,
            )
        if 0 < self._concurrency <= len(client.started):
            self.refusals.labels("concurrency").inc()
            raise ClientLimitExceeded(
                f"{name} has {self._concurrency} requests under way, as many as PVT_CLIENT_CONCURRENCY allows each "
                "client; wait for one to end",
                client.until_one_ends(now),
            )


class KeyUsage:
    """What each key has used. Addresses are no labels: there is no end of them."""

    def __init__(self, names: Iterable[str], registry: CollectorRegistry) -> None:
        requests = Counter("pvt_key_requests", "Requests with a key, by its id.", ["key"], registry=registry)
        images = Counter("pvt_key_images", "Images of requests with a key.", ["key"], registry=registry)
        sizes = Counter(
            "pvt_key_bytes", "Bytes of bodies with a key: received and sent.", ["key", "direction"], registry=registry
        )
        seconds = Counter("pvt_key_seconds", "Seconds that requests with a key took.", ["key"], registry=registry)
        self._series = {
            name: (requests.labels(key), images.labels(key), sizes.labels(key, "received"), sizes.labels(key, "sent"),
                   seconds.labels(key))
            for name in names
            for key in [name.removeprefix("key:")]
        }  # fmt: skip

    def __contains__(self, name: str) -> bool:
        return name in self._series

    def record(self, name: str, *amounts: float) -> None:
        """Count one request of the key `name`: its images, the bytes received and sent, its seconds."""
        requests, *others = self._series[name]
        requests.inc()
        for series, amount in zip(others, amounts, strict=True):
            series.inc(amount)


class Clients:
    """All who send requests: their names, their limits, the usage of keys."""

    def __init__(self, settings: Settings, registry: CollectorRegistry) -> None:
        directory = Directory(settings)
        self.identify, self.address = directory.identify, directory.address
        self.limits = ClientLimits(settings, registry)
        self.usage = KeyUsage(directory.names(), registry)

"""From a call to its result, attempt after attempt: when to try again and how long to wait is decided here.

Nothing here does I/O: `Exchange.steps` is a generator, and the clients carry out its steps and send the outcomes back.
"""

import asyncio
import json
import random
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import count
from typing import Any, Generic, NamedTuple, TypeVar

import httpx

from pvt_client import errors
from pvt_client.calls import JSON, Call
from pvt_client.errors import ConnectionFailed, ConnectionLost, InvalidUrl, Problem, PvtError, TimedOut
from pvt_client.results import Answer

T = TypeVar("T")
NO_RESPONSE = (httpx.HTTPError, httpx.InvalidURL, TimeoutError)
"""What an attempt without a response ends with."""
_ERROR, _TOO_MANY, _UNAVAILABLE = 400, 429, 503
_IDLE_SECONDS = 4.0  # less than the 5 after which many servers and proxies close an idle connection
_FOREIGN = "pvt-serve does not answer so: check the URL, and what stands before the service"
_UNIX = "unix:"  # before the path of a socket
_LAST_PORT = 65535
_PLAIN = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"}  # OpenSSL's reasons where an HTTP response begins
_SHOWN = 200  # characters of a response that is not understood


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """How often to try and how long to wait between; times are seconds.

    The n-th wait is drawn from `first * 2^n * (0.5 to 1)`, at most `longest`. Where the service names a time, the wait
    is that time and up to `first` more, so that clients that were refused together do not return together.
    """

    attempts: int = 5
    """In all, the first one included; 1 never tries again."""
    first: float = 0.1
    longest: float = 10.0

    def wait(self, error: PvtError, *, attempt: int, remaining: float | None, draw: float) -> float | None:
        """The seconds to wait after attempt number `attempt` (from 1) failed with `error`; None to give up.

        `remaining` is what is left of the timeout, None without one; `draw` is the jitter, from 0 to 1.
        """
        if attempt >= self.attempts or not _is_safe(error):
            return None
        wait = min(self.first * 2 ** (attempt - 1), self.longest) * (0.5 + draw / 2)
        if isinstance(error, Problem) and error.retry_after is not None:
            wait = error.retry_after + self.first * draw
        return wait if remaining is None or wait < remaining else None


def _is_safe(error: PvtError) -> bool:
    """Whether the service can't have begun, so that another attempt does not do the work twice."""
    if isinstance(error, Problem):
        return error.status == _TOO_MANY or (error.status == _UNAVAILABLE and error.retry_after is not None)
    return isinstance(error, ConnectionFailed) and not isinstance(error, ConnectionLost)


def retry_after(header: str | None, now: datetime) -> float | None:
    """The seconds of a `Retry-After`, which is in seconds or an HTTP date; None if it is neither."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        when = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - now).total_seconds())


@dataclass(frozen=True, slots=True)
class Clock:
    """Where time and jitter come from, and how to wait; tests replace it."""

    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    sleep_async: Callable[[float], Awaitable[None]] = asyncio.sleep
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    random: Callable[[], float] = random.random


class Attempt(NamedTuple):
    """Wait, then send `request` once; its response, or the error in place of one, is the outcome.

    `seconds` is what is then left of the timeout, and `deadline` when that ends on the clock; None without a timeout.
    """

    request: Mapping[str, Any]
    wait: float
    seconds: float | None
    deadline: float | None


@dataclass(frozen=True, slots=True)
class Result(Generic[T]):
    """What the response of a call means; the last step."""

    value: T


class Response(NamedTuple):
    """The parts of a response that are read."""

    status: int
    headers: Mapping[str, str]
    body: bytes


Outcome = Response | PvtError


@dataclass(eq=False, repr=False)
class Exchange:
    """What both clients have: how they are constructed, and how calls are made."""

    url: str = "http://127.0.0.1:8000"
    _: KW_ONLY
    api_key: str | None = None
    timeout: float | None = 60.0
    retries: Retries | None = None
    images_per_request: int = 16
    """The most that the methods for many images send in a request; fewer where the service does not answer soon."""
    clock: Clock = field(default_factory=Clock)

    def steps(self, call: Call[T]) -> Generator[Attempt | Result[T], Outcome]:
        """Send `call`, and again where that is safe and in time.

        Raises:
            PvtError: the error of the last attempt.
        """
        clock, retries, wait = self.clock, self.retries or Retries(), 0.0
        deadline = None if self.timeout is None else clock.monotonic() + self.timeout
        for attempt in count(1):
            seconds = None if deadline is None else deadline - clock.monotonic() - wait
            if seconds is not None and seconds <= 0:
                raise self._timed_out()
            outcome = yield Attempt(call.request(seconds), wait, seconds, deadline)
            result = self._read(call, outcome) if isinstance(outcome, Response) else outcome
            if isinstance(result, Result):
                yield result
                return
            remaining = None if deadline is None else deadline - clock.monotonic()
            next_wait = retries.wait(result, attempt=attempt, remaining=remaining, draw=clock.random())
            if next_wait is None:
                raise result
            wait = next_wait

    def _read(self, call: Call[T], response: Response) -> Result[T] | Problem:
        """The result, or the error that a response of status 400 or more means, from the service or from a proxy."""
        status, headers, body = response
        try:
            if status < _ERROR or status == call.accepted:
                return Result(_completed(call.read(json.loads(body) if call.accept == JSON else body), headers))
            is_problem = headers.get("content-type", "").startswith("application/problem+json")
            fields = json.loads(body) if is_problem else None
            fields = fields if isinstance(fields, dict) else {"detail": f"{_excerpt(body)}; {_FOREIGN}"}
            wait = retry_after(headers.get("retry-after"), self.clock.now())
            return errors.problem(fields, status, headers.get("x-request-id"), wait)
        except (LookupError, TypeError, ValueError) as error:
            raise errors.UnexpectedResponse(
                f"this client does not understand the response ({error!r}): {_excerpt(body)}; is the URL right?"
            ) from error

    def _timed_out(self) -> TimedOut:
        within = "" if self.timeout is None else f" within {self.timeout:g} s; allow more with `timeout`"
        return TimedOut(f"no response from {self._address()}{within}")

    def _base_url(self) -> str:
        return self.url if "://" in self.url else f"http://{self.url}"

    def _address(self) -> str:
        """What an error calls the service: never the name and password that a URL may have."""
        if self.url.startswith(_UNIX):
            return self.url
        url = httpx.URL(self._base_url())
        return f"{url.scheme}://{url.netloc.decode()}"

    def failure(self, error: Exception) -> PvtError:
        """The error of this package for one of NO_RESPONSE."""
        reason = str(error) or type(error).__name__
        failure: PvtError
        match error:
            case httpx.ConnectError() | httpx.ConnectTimeout() | httpx.PoolTimeout():
                failure = ConnectionFailed(f"{self._address()} was not reached: {reason}{_advice(error)}")
            case httpx.TimeoutException() | TimeoutError():
                failure = self._timed_out()
            case httpx.UnsupportedProtocol() | httpx.InvalidURL():
                failure = InvalidUrl(f"not the address of a service: {reason}")
            case httpx.RemoteProtocolError() if "illegal" in reason:
                failure = ConnectionLost(f"{self._address()} did not respond with HTTP: {reason}; does it speak https?")
            case _:
                failure = ConnectionLost(
                    f"the connection to {self._address()} broke before the response was complete: {reason}"
                )
        failure.__cause__ = error
        return failure

    def http_settings(self, transport: Callable[..., object]) -> dict[str, Any]:
        """The arguments that both kinds of httpx client take; `http://` may be left out of `url`.

        `transport` makes one that connects to a Unix socket, for `unix:/path`.

        Raises:
            InvalidUrl: no service can have that address.
        """
        headers = {"User-Agent": "pvt-client"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        encoded = httpx.Headers(headers, encoding="utf-8")  # a key may have any letters
        # The caller bounds the number of connections; idle ones are all kept.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_IDLE_SECONDS)
        if self.url.startswith(_UNIX):
            unix = transport(uds=self.url.removeprefix(_UNIX), limits=limits, verify=False)
            return {"base_url": "http://localhost", "headers": encoded, "transport": unix}
        base_url = self._base_url()
        try:
            parsed = httpx.URL(base_url)
        except httpx.InvalidURL as error:
            raise InvalidUrl(f"{self.url!r} is not the address of a service: {error}") from error
        if parsed.scheme not in {"http", "https"} or not parsed.host or (parsed.port or 0) > _LAST_PORT:
            raise InvalidUrl(
                f"{self.url!r} is not the address of a service; http://host:port or unix:/path is expected"
            )
        # httpx reads certificates at once, which takes longer than a request; without TLS there is nothing to verify.
        verify = not base_url.startswith("http://")
        return {"base_url": base_url, "headers": encoded, "limits": limits, "verify": verify}


def _completed(result: Any, headers: Mapping[str, str]) -> Any:  # noqa: ANN401  of any call
    """`result`, or each of a list, with the request's id and its times, where it is of a kind that has them."""
    if isinstance(result, list):
        return [_completed(each, headers) for each in result]
    if not isinstance(result, Answer):
        return result
    times = server_timing(headers.get("server-timing", ""))
    return replace(result, request_id=headers.get("x-request-id"), timing_ms=times)


def server_timing(header: str) -> dict[str, float]:
    """The durations in a `Server-Timing` header, in milliseconds, by name; what has none is left out.

    Source: https://www.w3.org/TR/server-timing/
    """
    found: dict[str, float] = {}
    for entry in header.split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            with suppress(ValueError):
                if key.strip().lower() == "dur":
                    found.setdefault(name, float(value.strip().strip('"')))
    return found


def _excerpt(body: bytes) -> str:
    return body[: 4 * _SHOWN].decode("utf-8", "replace")[:_SHOWN].strip() or "an empty body"


def _advice(error: BaseException) -> str:
    """What to do about a connection that did not open, by the errors below `error`."""
    below: list[BaseException] = [error]
    for each in below:  # grows
        inner = each.exceptions if isinstance(each, BaseExceptionGroup) else ()
        below += [cause for cause in (each.__cause__ or each.__context__, *inner) if cause and cause not in below]
    kinds = tuple(map(type, below))
    if any(issubclass(kind, ConnectionRefusedError) for kind in kinds):
        return "; is the service running? Start it with `pvt-serve serve`, or give its URL"
    if any(issubclass(kind, FileNotFoundError) for kind in kinds):
        return "; no such socket: start the service with PVT_HOST=unix:/path, or give its path"
    if any(issubclass(kind, socket.gaierror) for kind in kinds):
        return "; no such host: check the name in the URL"
    if any(isinstance(each, ssl.SSLError) and each.reason in _PLAIN for each in below):
        return "; it speaks plain HTTP: write http:// in place of https://"
    if any(issubclass(kind, httpx.ConnectTimeout) for kind in kinds):
        return "; nobody answers there: check the address, and what firewalls let through"
    return ""

"""From a call to its result, attempt after attempt: when to try again and how long to wait is decided here.

Nothing here does I/O: `Exchange.steps` is a generator, and the clients carry out its steps and send the outcomes back.
"""

import random
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import count
from typing import Any, TypeVar

import httpx

from pvt_client.calls import Call
from pvt_client.errors import ConnectionFailed, ConnectionLost, InvalidUrl, Problem, PvtError, TimedOut
from pvt_client.results import Response, read_refusal, understanding

T = TypeVar("T")
_ERROR, _TOO_MANY, _UNAVAILABLE = 400, 429, 503
_MS = 1000
_LONGEST_MS = 3_600_000  # the most that the service takes
_IDLE_SECONDS = 4.0  # less than the 5 after which the service closes an idle connection
_LAST_PORT = 65535
_CONNECT_SECONDS = 5.0  # then another attempt, if there is time


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
    match error:
        case ConnectionLost():
            return False
        case ConnectionFailed():
            return True
        case Problem(status=status, retry_after=seconds):
            return status == _TOO_MANY or (status == _UNAVAILABLE and seconds is not None)
    return False


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
    """Where time and jitter come from; tests replace it."""

    monotonic: Callable[[], float] = time.monotonic
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    random: Callable[[], float] = random.random


@dataclass(frozen=True, slots=True)
class Attempt:
    """Send the call once; its response, or the error in place of one, is the outcome.

    `seconds` is what is left of the timeout, and `deadline` when that ends on the clock; None without a timeout.
    """

    call: Call[Any]
    seconds: float | None
    deadline: float | None

    def request(self, client: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        """The request, for the base URL and with the headers of `client`."""
        call, parameters = self.call, dict(self.call.parameters)
        if call.timed and self.seconds is not None:
            parameters["timeout_ms"] = str(min(max(1, int(self.seconds * _MS)), _LONGEST_MS))
        content, files = call.content()
        connect = _CONNECT_SECONDS if self.seconds is None else min(_CONNECT_SECONDS, self.seconds)
        return client.build_request(
            call.method,
            call.path,
            params=parameters,
            headers=call.headers(),
            content=content,
            files=files or None,
            timeout=httpx.Timeout(self.seconds, connect=connect),
        )


Outcome = Response | PvtError
# An attempt to make, or seconds to wait; after a wait the outcome is None.
Steps = Generator[Attempt | float, Outcome | None, T]


@dataclass(frozen=True, slots=True)
class Exchange:
    """How calls are made: `timeout` is in seconds for all attempts of one call together, None for no limit."""

    retries: Retries
    clock: Clock
    timeout: float | None

    def steps(self, call: Call[T]) -> Steps[T]:
        """Send `call`, and again where that is safe and in time; returns what its response means.

        Raises:
            PvtError: the error of the last attempt.
        """
        clock = self.clock
        deadline = None if self.timeout is None else clock.monotonic() + self.timeout
        for attempt in count(1):
            remaining = None if deadline is None else deadline - clock.monotonic()
            if remaining is not None and remaining <= 0:
                break
            outcome = yield Attempt(call, remaining, deadline)
            if isinstance(outcome, Response):
                with understanding(outcome):
                    if outcome.status < _ERROR or outcome.status in call.accepted:
                        return call.read(outcome)
                    outcome = read_refusal(outcome, retry_after(outcome.headers.get("retry-after"), clock.now()))
            assert outcome is not None  # noqa: S101  every attempt has an outcome
            if isinstance(outcome, Problem) and (result := call.recover(outcome)) is not None:
                return result
            remaining = None if deadline is None else deadline - clock.monotonic()
            wait = self.retries.wait(outcome, attempt=attempt, remaining=remaining, draw=clock.random())
            if wait is None:
                raise outcome
            yield wait
        raise self.timed_out()

    def is_late(self, attempt: Attempt) -> bool:
        """Whether the deadline has passed while `attempt` is still under way."""
        return attempt.deadline is not None and self.clock.monotonic() > attempt.deadline

    def timed_out(self) -> TimedOut:
        """The error of a call that took longer than the timeout."""
        return TimedOut("no response" if self.timeout is None else f"no response within {self.timeout:g} s")

    def translated(self, error: httpx.HTTPError | httpx.InvalidURL) -> PvtError:
        """The error of this package for one of httpx's, which an attempt without a response ended with."""
        reason = str(error) or type(error).__name__
        failure: PvtError
        match error:
            case httpx.ConnectError() | httpx.ConnectTimeout() | httpx.PoolTimeout():
                failure = ConnectionFailed(f"the service was not reached: {reason}")
            case httpx.TimeoutException():
                failure = self.timed_out()
            case httpx.UnsupportedProtocol() | httpx.InvalidURL():
                failure = InvalidUrl(f"not the address of a service: {reason}")
            case _:
                failure = ConnectionLost(f"the connection broke before the response was complete: {reason}")
        failure.__cause__ = error
        return failure


def http_settings(url: str, api_key: str | None) -> dict[str, Any]:
    """The arguments that both kinds of httpx client take for a service at `url`; `http://` may be left out.

    Raises:
        InvalidUrl: no service can have that address.
    """
    headers = {"User-Agent": "pvt-client"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    # The caller bounds the number of connections; idle ones are all kept.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_IDLE_SECONDS)
    base_url = url if "://" in url else f"http://{url}"
    try:
        parsed = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise InvalidUrl(f"{url!r} is not the address of a service: {error}") from error
    if parsed.scheme not in {"http", "https"} or not parsed.host or (parsed.port or 0) > _LAST_PORT:
        raise InvalidUrl(f"{url!r} is not the address of a service; http://host:port is expected")
    # httpx reads certificates at once, which takes longer than a request; without TLS there is nothing to verify.
    verify = not base_url.startswith("http://")
    return {"base_url": base_url, "headers": headers, "limits": limits, "verify": verify}

"""The course of a call, attempt after attempt, without I/O: the clients carry out its steps and tell what came."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

import httpx

from pvt_client import answers
from pvt_client.answers import Answer
from pvt_client.calls import Call
from pvt_client.errors import ConnectionFailed, ConnectionLost, InvalidUrl, Problem, PvtError, TimedOut
from pvt_client.retries import Clock, Retries, retry_after, wait_before_retry

T = TypeVar("T")
_ERROR = 400
_MS = 1000
_LONGEST_MS = 3_600_000  # the most that the service takes
_IDLE_SECONDS = 4.0  # less than the 5 after which the service closes an idle connection
_LAST_PORT = 65535
_CONNECT_SECONDS = 5.0  # then again, if there is time


@dataclass(frozen=True, slots=True)
class Send:
    """Send the call; its answer, or the error instead of one, is what the exchange goes on with.

    `seconds` is what is left of the timeout, None without one.
    """

    call: Call[Any]
    seconds: float | None
    deadline: float | None
    """The same on the clock."""

    def request(self, client: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        """The request, for the base URL and with the headers of `client`."""
        call, parameters = self.call, dict(self.call.parameters)
        if call.timed and self.seconds is not None:
            parameters["timeout_ms"] = str(min(max(1, int(self.seconds * _MS)), _LONGEST_MS))
        content, files = call.content()
        return client.build_request(
            call.method,
            call.path,
            params=parameters,
            headers=call.headers(),
            content=content,
            files=files or None,
            timeout=httpx.Timeout(self.seconds, connect=_least(_CONNECT_SECONDS, self.seconds)),
        )


@dataclass(frozen=True, slots=True)
class Wait:
    """Do nothing for `seconds`."""

    seconds: float


Steps = Generator[Send | Wait, Answer | PvtError | None, T]


@dataclass(frozen=True, slots=True)
class Course:
    """How calls run: `timeout` is in seconds and for all attempts of one call together, None for none."""

    retries: Retries
    clock: Clock
    timeout: float | None

    def steps(self, call: Call[T]) -> Steps[T]:
        """Send `call`, and again where that is safe and in time; returns what its answer means.

        Raises:
            PvtError: what the last attempt failed with.
        """
        clock = self.clock
        deadline = None if self.timeout is None else clock.monotonic() + self.timeout
        attempt = 0
        while True:
            attempt += 1
            remaining = None if deadline is None else deadline - clock.monotonic()
            if remaining is not None and remaining <= 0:
                raise timed_out(self.timeout)
            came = yield Send(call, remaining, deadline)
            outcome = self._outcome(call, came)
            if not isinstance(outcome, _Failure):
                return outcome
            if isinstance(outcome.error, Problem) and (answer := call.recover(outcome.error)) is not None:
                return answer
            remaining = None if deadline is None else deadline - clock.monotonic()
            wait = wait_before_retry(
                outcome.error, self.retries, attempt=attempt, remaining=remaining, draw=clock.random()
            )
            if wait is None:
                raise outcome.error
            yield Wait(wait)

    def is_late(self, step: Send) -> bool:
        """Whether the deadline has passed while `step` is still being carried out."""
        return step.deadline is not None and self.clock.monotonic() > step.deadline

    def _outcome(self, call: Call[T], came: Answer | PvtError | None) -> "T | _Failure":
        assert came is not None  # noqa: S101  a Send is answered
        if isinstance(came, PvtError):
            return _Failure(came)
        if came.status < _ERROR or came.status in call.accepted:
            return call.read(came)
        return _Failure(answers.refusal(came, retry_after(came.headers.get("retry-after"), self.clock.now())))


@dataclass(frozen=True, slots=True)
class _Failure:
    error: PvtError


class Settings(TypedDict):
    """What both kinds of httpx client are made with."""

    base_url: str
    headers: dict[str, str]
    limits: httpx.Limits
    verify: bool


def settings(url: str, api_key: str | None) -> Settings:
    """Those for a service at `url`; `http://` may be left out.

    Raises:
        InvalidUrl: there can be none.
    """
    headers = {"User-Agent": "pvt-client"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    # The number of connections is up to whoever makes the calls; those that are idle are kept, whatever their number.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_IDLE_SECONDS)
    base_url = url if "://" in url else f"http://{url}"
    try:
        parsed = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise InvalidUrl(f"{url!r} is no address of a service: {error}") from error
    if parsed.scheme not in {"http", "https"} or not parsed.host or (parsed.port or 0) > _LAST_PORT:
        raise InvalidUrl(f"{url!r} is no address of a service; http://host:port is expected")
    # Certificates are read at once, which takes longer than a request; without TLS there is nothing to verify.
    return Settings(base_url=base_url, headers=headers, limits=limits, verify=not base_url.startswith("http://"))


def _least(seconds: float, limit: float | None) -> float:
    return seconds if limit is None else min(seconds, limit)


def error_of(error: httpx.HTTPError | httpx.InvalidURL, timeout: float | None) -> PvtError:
    """What an attempt failed with, when it got no answer."""
    told = str(error) or type(error).__name__
    failure: PvtError
    match error:
        case httpx.ConnectError() | httpx.ConnectTimeout() | httpx.PoolTimeout():
            failure = ConnectionFailed(f"the service was not reached: {told}")
        case httpx.TimeoutException():
            failure = timed_out(timeout)
        case httpx.UnsupportedProtocol() | httpx.InvalidURL():
            failure = InvalidUrl(f"no address of a service: {told}")
        case _:
            failure = ConnectionLost(f"the connection broke before the answer was there: {told}")
    failure.__cause__ = error
    return failure


def timed_out(timeout: float | None) -> TimedOut:
    """The error for a `timeout`, in seconds, that has passed."""
    return TimedOut("no answer" if timeout is None else f"no answer within {timeout:g} s")

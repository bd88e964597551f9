"""When to try again, and how long to wait before: decided here, done elsewhere."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from pvt_client.errors import ConnectionFailed, ConnectionLost, Problem, PvtError

TOO_MANY, UNAVAILABLE = 429, 503


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """How often and how patiently; times are seconds.

    The n-th wait is drawn from `first * 2^n * (0.5 to 1)`, at most `longest`; where the service names a time, that
    time and up to `first` more, so that callers who were refused together do not come back together.
    """

    attempts: int = 5
    """In all, the first one included; 1 never tries again."""
    first: float = 0.1
    longest: float = 10.0


@dataclass(frozen=True, slots=True)
class Clock:
    """What tells the time and draws the jitter; tests give their own."""

    monotonic: Callable[[], float] = time.monotonic
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    random: Callable[[], float] = random.random


def retry_after(header: str | None, now: datetime) -> float | None:
    """The seconds that a `Retry-After` asks to wait, given as seconds or as an HTTP date; None if it is neither."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        when = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - now).total_seconds())


def is_safe(error: PvtError) -> bool:
    """Whether the service can have done nothing yet, so that asking again asks once."""
    match error:
        case ConnectionLost():
            return False
        case ConnectionFailed():
            return True
        case Problem(status=status, retry_after=seconds):
            return status == TOO_MANY or (status == UNAVAILABLE and seconds is not None)
    return False


def wait_before_retry(
    error: PvtError, retries: Retries, *, attempt: int, remaining: float | None, draw: float
) -> float | None:
    """The seconds to wait after attempt number `attempt` (from 1) failed with `error`; None to give up.

    `remaining` is what is left of the timeout, None without one; `draw` is the jitter, from 0 to 1.
    """
    if attempt >= retries.attempts or not is_safe(error):
        return None
    wait = min(retries.first * 2 ** (attempt - 1), retries.longest) * (0.5 + draw / 2)
    if isinstance(error, Problem) and error.retry_after is not None:
        wait = error.retry_after + retries.first * draw
    return wait if remaining is None or wait < remaining else None

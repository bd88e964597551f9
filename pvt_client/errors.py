"""Every error of the client.

- PvtError
  - ImageUnreadable, InvalidUrl, ModelChanged, TimedOut, UnexpectedResponse
  - ConnectionFailed
    - ConnectionLost
  - Problem: the service refused (RFC 9457)
    - InvalidRequest 422
      - InvalidImage 422
    - ImageTooLarge 413, Unauthorized 401, Forbidden 403, ModelNotFound 404, NotAcceptable 406
    - UnsupportedMediaType 415, QueueFull 429, ModelUnavailable 503
    - DeadlineExceeded 504, a TimedOut too
    - ServiceFailed, any other status
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class PvtError(Exception):
    """Base of all; `str()` is a sentence to show."""


class ImageUnreadable(PvtError):
    """The image can't be read, or the client can't send it; the message names it."""


class InvalidUrl(PvtError):
    """No service can have that address; the message says why."""


class ConnectionFailed(PvtError):
    """The service was not reached; nothing was sent."""


class ConnectionLost(ConnectionFailed):
    """The connection broke before the response was complete; the service may have done the work."""


class ModelChanged(PvtError):
    """Vectors that were to be stacked are of several models or versions; the message names them."""


class TimedOut(PvtError):
    """No response within the client's `timeout`."""


class UnexpectedResponse(PvtError):
    """The response is not one of this service; is the URL right?"""


_BY_STATUS: dict[int, type["Problem"]] = {}


@dataclass(eq=False, kw_only=True)
class Problem(PvtError):
    """An RFC 9457 problem. `retry_after` is in seconds, None where the service named none."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str | None = None
    retry_after: float | None = None

    def __post_init__(self) -> None:
        super().__init__(f"{self.title} ({self.status}): {self.detail}")

    def __init_subclass__(cls, of_status: int | None = None) -> None:
        if of_status is not None:
            _BY_STATUS[of_status] = cls


class InvalidRequest(Problem, of_status=422):
    """A parameter is wrong; the detail names it and its range."""


class InvalidImage(InvalidRequest):
    """The bytes are not an image that the service can decode; the detail says why."""


class ImageTooLarge(Problem, of_status=413):
    """An image or the body exceeds a limit, which the detail names."""


class Unauthorized(Problem, of_status=401):
    """The service requires an API key, and this one is not valid."""


class Forbidden(Problem, of_status=403):
    """The endpoint is switched off; the detail names the setting."""


class ModelNotFound(Problem, of_status=404):
    """No such model, and the detail names similar ones; or no such path."""


class NotAcceptable(Problem, of_status=406):
    """The endpoint can't respond in the requested form."""


class UnsupportedMediaType(Problem, of_status=415):
    """The endpoint can't read the form that was sent."""


class QueueFull(Problem, of_status=429):
    """Too many images were waiting already, at every attempt."""


class ModelUnavailable(Problem, of_status=503):
    """The model is not available now, or the service is shutting down; the detail says why."""


class DeadlineExceeded(Problem, TimedOut, of_status=504):
    """The service did not finish in the time it was given."""


class ServiceFailed(Problem):
    """An unexpected error of the service, or of a proxy in front of it."""


def problem(
    fields: Mapping[str, Any], status: int = 0, request_id: str | None = None, retry_after: float | None = None
) -> Problem:
    """The error that `fields` of RFC 9457 describe; the other arguments hold where they say nothing.

    Raises:
        TypeError, ValueError: a field is of another type.
    """
    kind, status = str(fields.get("type", "about:blank")), int(fields.get("status", status))
    of_image = kind.endswith(":invalid-image")
    return (InvalidImage if of_image else _BY_STATUS.get(status, ServiceFailed))(
        type=kind,
        title=str(fields.get("title", f"HTTP {status}")),
        status=status,
        detail=str(fields.get("detail", "")),
        request_id=fields.get("request_id") or request_id,
        retry_after=retry_after,
    )


# Errors of one image, after which the next may succeed. Every other error would meet all requests.
OF_ONE_IMAGE = (ConnectionLost, ImageUnreadable, InvalidImage, ImageTooLarge, TimedOut, QueueFull, ServiceFailed)

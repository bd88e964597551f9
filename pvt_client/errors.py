"""Every error of the client.

- PvtError
  - ImageUnreadable, InvalidUrl, TimedOut, UnexpectedResponse
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


class TimedOut(PvtError):
    """No response within the client's `timeout`."""


class UnexpectedResponse(PvtError):
    """The response is not one of this service; is the URL right?"""


class Problem(PvtError):
    """An RFC 9457 problem. `retry_after` is in seconds, None where the service named none."""

    def __init__(
        self,
        *,
        type: str,  # noqa: A002  the standard's own name
        title: str,
        status: int,
        detail: str,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{title} ({status}): {detail}")
        self.type, self.title, self.status, self.detail = type, title, status, detail
        self.request_id, self.retry_after = request_id, retry_after


class InvalidRequest(Problem):
    """A parameter is wrong; the detail names it and its range."""


class InvalidImage(InvalidRequest):
    """The bytes are not an image that the service can decode; the detail says why."""


class ImageTooLarge(Problem):
    """An image or the body exceeds a limit, which the detail names."""


class Unauthorized(Problem):
    """The service requires an API key, and this one is not valid."""


class Forbidden(Problem):
    """The endpoint is switched off; the detail names the setting."""


class ModelNotFound(Problem):
    """No such model, and the detail names similar ones; or no such path."""


class NotAcceptable(Problem):
    """The endpoint can't respond in the requested form."""


class UnsupportedMediaType(Problem):
    """The endpoint can't read the form that was sent."""


class QueueFull(Problem):
    """Too many images were waiting already, at every attempt."""


class ModelUnavailable(Problem):
    """The model is not available now, or the service is shutting down; the detail says why."""


class DeadlineExceeded(Problem, TimedOut):
    """The service did not finish in the time it was given."""


class ServiceFailed(Problem):
    """An unexpected error of the service, or of a proxy in front of it."""


_BY_STATUS: Mapping[int, type[Problem]] = {
    401: Unauthorized,
    403: Forbidden,
    404: ModelNotFound,
    406: NotAcceptable,
    413: ImageTooLarge,
    415: UnsupportedMediaType,
    422: InvalidRequest,
    429: QueueFull,
    503: ModelUnavailable,
    504: DeadlineExceeded,
}


def problem_class(status: int, type_: str) -> type[Problem]:
    """The class of a problem of that `status` and `type`."""
    if type_.endswith(":invalid-image"):
        return InvalidImage
    return _BY_STATUS.get(status, ServiceFailed)


# Errors of one image, after which the next may succeed. Every other error would meet all requests.
OF_ONE_IMAGE = (ConnectionLost, ImageUnreadable, InvalidImage, ImageTooLarge, TimedOut, QueueFull, ServiceFailed)

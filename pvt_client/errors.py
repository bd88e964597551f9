"""Everything a client can fail with.

- PvtError
  - ImageUnreadable       the picture can't be read here, so nothing was sent
  - InvalidUrl            the address is none that a service can have
  - ConnectionFailed      the service was not reached, at none of the attempts
    - ConnectionLost      the connection broke when it may have begun to work, so it was not asked again
  - TimedOut              no answer within the client's `timeout`
  - UnexpectedAnswer      an answer that is not this service's
  - Problem               the service said no (RFC 9457): type, title, status, detail, request_id
    - InvalidRequest        422: a parameter
      - InvalidImage        422: the bytes are no picture that can be decoded
    - ImageTooLarge         413: a picture or the body exceeds a limit
    - Unauthorized          401: no valid API key
    - Forbidden             403: switched off
    - ModelNotFound         404: no such model, or no such endpoint
    - NotAcceptable         406: not in the form asked for
    - UnsupportedMediaType  415: not in the form sent
    - QueueFull             429: too much waits already
    - ModelUnavailable      503: its weights are missing or broken, or the service is shutting down
    - DeadlineExceeded      504: not answered within the time that the service was given; a TimedOut too
    - ServiceFailed         any other; the service's log has it under `request_id`
"""

from collections.abc import Mapping


class PvtError(Exception):
    """Base of all; `str()` is a sentence to show."""


class ImageUnreadable(PvtError):
    """The picture can't be read or is nothing that the client can send; the message names it."""


class InvalidUrl(PvtError):
    """The address is none that a service can have; the message says why."""


class ConnectionFailed(PvtError):
    """The service was not reached; nothing was sent."""


class ConnectionLost(ConnectionFailed):
    """The connection broke before the answer was there; the service may have worked on it."""


class TimedOut(PvtError):
    """No answer within the client's `timeout`."""


class UnexpectedAnswer(PvtError):
    """The answer is not what this service gives; is the URL right?"""


class Problem(PvtError):
    """An RFC 9457 problem. `retry_after` is in seconds, None where the service gave none."""

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
    """The bytes are no picture that the service decodes; the detail says why."""


class ImageTooLarge(Problem):
    """A picture or the body exceeds a limit, which the detail names."""


class Unauthorized(Problem):
    """The service requires an API key, and this one is none."""


class Forbidden(Problem):
    """The endpoint is switched off; the detail names the setting."""


class ModelNotFound(Problem):
    """No such model; the detail names near ones. Also a path that the service does not have."""


class NotAcceptable(Problem):
    """The endpoint does not answer in the form asked for."""


class UnsupportedMediaType(Problem):
    """The endpoint does not read the form that was sent."""


class QueueFull(Problem):
    """Too much waits already, and did so at every attempt."""


class ModelUnavailable(Problem):
    """The model can't be had now, or the service is shutting down; the detail gives the reason."""


class DeadlineExceeded(Problem, TimedOut):
    """The service gave up when the time it was given had passed."""


class ServiceFailed(Problem):
    """An error that nobody foresaw, in the service or in a proxy before it."""


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


def kind_of(status: int, type_: str) -> type[Problem]:
    """The class of a problem of that `status` and `type`."""
    if type_.endswith(":invalid-image"):
        return InvalidImage
    return _BY_STATUS.get(status, ServiceFailed)


# What one picture can fail with while the next may pass; of the rest each concerns every request.
OF_ONE_IMAGE = (ConnectionLost, ImageUnreadable, InvalidImage, ImageTooLarge, TimedOut, QueueFull, ServiceFailed)

"""What is wrong with a request before the application sees it; app.protocol refuses it and closes the connection."""

from service.errors import ServiceError


class MalformedRequest(ServiceError):
    """What came over the connection is no HTTP/1.1 request, or one that can be read in two ways."""


class HeadTooLarge(ServiceError):
    """A request's head, or what its chunks bring along beside their data, exceeds 64 KiB."""


class UnsupportedRequest(ServiceError):
    """The request is a CONNECT, or has a transfer coding other than chunked."""


class UnsupportedVersion(ServiceError):
    """The request is of a version of HTTP other than 1.0 and 1.1."""

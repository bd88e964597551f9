"""The forms that other protocols give an error, for the paths under which clients of theirs look for it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_UNPROCESSABLE, _BAD_REQUEST = 422, 400
_OPENAI_KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
                 404: "not_found_error", 413: "invalid_request_error", 415: "invalid_request_error",
                 429: "rate_limit_error"}  # fmt: skip


class Translated(NamedTuple):
    """An error in another protocol's form."""

    status: int
    body: dict[str, Any]


def translated(path: str, status: int, kind: str, detail: str) -> Translated | None:
    """The problem of this `kind` as clients of the protocol under `path` expect it; None where ours is spoken."""
    dialect = _DIALECTS.get(path[1:].partition("/")[0])
    if dialect is None:
        return None
    status = _BAD_REQUEST if status == _UNPROCESSABLE else status  # neither protocol knows 422
    return Translated(status, dialect(status, kind, detail))


def _open_inference(_: int, __: str, detail: str) -> dict[str, Any]:
    return {"error": detail}


def _openai(status: int, kind: str, detail: str) -> dict[str, Any]:
    code = kind.rpartition(":")[2].replace("-", "_")
    name = _OPENAI_KINDS.get(status, "server_error")
    return {"error": {"message": detail, "type": name, "param": None, "code": code}}


_DIALECTS: Mapping[str, Callable[[int, str, str], dict[str, Any]]] = {"v2": _open_inference, "v1": _openai}

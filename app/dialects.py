"""The forms that other protocols give an error, for the paths under which clients of theirs look for it."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

_UNPROCESSABLE, _BAD_REQUEST = 422, 400
_OPENAI_KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
                 404: "not_found_error", 413: "invalid_request_error", 415: "invalid_request_error",
                 429: "rate_limit_error"}  # fmt: skip
_OPENAI_PARAMETER = re.compile(r"(input|model|encoding_format|dimensions|user)\b[^:]{0,100}:")


class OpenInferenceError(BaseModel):
    """An error as the Open Inference Protocol has it."""

    error: str


class OpenAiReason(BaseModel):
    """What went wrong; `param` names the field of the request, where it is one's."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAiError(BaseModel):
    """An error as OpenAI has it."""

    error: OpenAiReason


class Dialect(NamedTuple):
    """A protocol's form of an error: its schema, and what makes it of a status, a problem's type and its detail."""

    model: type[BaseModel]
    make: Callable[[int, str, str], dict[str, Any]]


class Translated(NamedTuple):
    """An error in another protocol's form."""

    status: int
    body: dict[str, Any]


def translated(path: str, status: int, kind: str, detail: str) -> Translated | None:
    """The problem of this `kind` as clients of the protocol under `path` expect it; None where ours is spoken."""
    dialect = DIALECTS.get("/" + path[1:].partition("/")[0])
    if dialect is None:
        return None
    status = _BAD_REQUEST if status == _UNPROCESSABLE else status  # neither protocol knows 422
    return Translated(status, dialect.make(status, kind, detail))


def _open_inference(_: int, __: str, detail: str) -> dict[str, Any]:
    return {"error": detail}


def _openai(status: int, kind: str, detail: str) -> dict[str, Any]:
    code = kind.rpartition(":")[2].replace("-", "_")
    named = _OPENAI_PARAMETER.match(detail)
    param = "model" if code == "model_not_found" else named and named[1]
    name = _OPENAI_KINDS.get(status, "server_error")
    return {"error": {"message": detail, "type": name, "param": param, "code": code}}


DIALECTS: Mapping[str, Dialect] = {
    "/v2": Dialect(OpenInferenceError, _open_inference),
    "/v1": Dialect(OpenAiError, _openai),
}

"""Bodies in JSON."""

from typing import Any

import orjson

from service.errors import InvalidRequest

# The parser holds the interpreter's lock, and with it the event loop, for as long as it takes, even on a thread:
# 40 ns for each number. No request has need of so many values; the tensors of `/v2` are parsed in pieces, apart.
MAX_COMMAS = 20_000


def loads(body: bytes) -> Any:  # noqa: ANN401  whatever JSON holds
    """The value that `body` holds.

    Raises:
        InvalidRequest: it is no JSON, or holds so many values that reading it would hold up everybody else.
    """
    if len(body) > MAX_COMMAS and (commas := body.count(b",")) > MAX_COMMAS:
        raise InvalidRequest(f"the body's JSON holds {commas} commas, so many values; {MAX_COMMAS} are allowed")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is no JSON: {error}") from error

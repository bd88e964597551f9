import pytest
from starlette.requests import Request

from app.dependencies import max_wait_seconds


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ([], None),
        (["respond-async"], 0.0),
        (["Respond-Async; foo=bar"], 0.0),
        (["wait=10"], 10.0),
        (["respond-async, wait=10"], 10.0),
        (["respond-async", 'wait = "3"'], 3.0),
        (["wait=soon, handling=lenient"], None),
        (["wait=-1"], None),
        (["wait=99999999999999"], None),
        ([""], None),
    ],
)
async def test_what_a_request_prefers_is_read_as_the_standard_says(headers: list[str], seconds: float | None) -> None:
    raw = [(b"prefer", value.encode()) for value in headers]

    assert await max_wait_seconds(Request({"type": "http", "headers": raw})) == seconds

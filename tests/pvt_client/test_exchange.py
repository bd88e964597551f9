import socket
from contextlib import ExitStack
from datetime import timedelta
from email.utils import format_datetime

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvt_client import (
    ConnectionFailed,
    ConnectionLost,
    DeadlineExceeded,
    InvalidUrl,
    Problem,
    QueueFull,
    Retries,
    TimedOut,
)
from pvt_client.errors import problem
from pvt_client.exchange import Exchange, retry_after
from tests.pvt_client.conftest import CallMethod
from tests.pvt_client.scripted import (
    NOW,
    FakeTime,
    Scripted,
    cut,
    dripping,
    predicted,
    queries,
    refused,
    response,
    scripted,
    silent,
)

IMAGE = b"image"


def test_a_full_queue_is_tried_again_after_the_seconds_it_names(call: CallMethod) -> None:
    time = FakeTime()
    with scripted(refused(429, Retry_After="2"), refused(429, Retry_After="1"), predicted()) as server:
        assert call(server.url, "predict", IMAGE, time=time).best.label == "7"

    assert time.slept == pytest.approx([2.05, 1.05])  # and half the jitter of 0.1
    assert [each.body for each in server.requests] == [IMAGE] * 3


def test_a_retry_after_may_be_a_date(call: CallMethod) -> None:
    time = FakeTime()
    date = format_datetime(NOW + timedelta(seconds=7), usegmt=True)
    with scripted(refused(503, "shutting-down", Retry_After=date), predicted()) as server:
        call(server.url, "predict", IMAGE, time=time)

    assert time.slept == pytest.approx([7.05])


@pytest.mark.parametrize("status", [400, 401, 403, 404, 406, 413, 415, 422, 500, 502, 503, 504])
def test_what_another_attempt_would_not_mend_is_tried_once(call: CallMethod, status: int) -> None:
    time = FakeTime()
    with scripted(refused(status, "whatever"), predicted()) as server, pytest.raises(Problem) as caught:
        call(server.url, "predict", IMAGE, time=time)

    assert (caught.value.status, len(server.requests), time.slept) == (status, 1, [])


def test_a_retry_after_on_another_4xx_is_not_obeyed(call: CallMethod) -> None:
    with scripted(refused(413, Retry_After="1"), predicted()) as server, pytest.raises(Problem):
        call(server.url, "predict", IMAGE)

    assert len(server.requests) == 1


def test_a_refused_connection_is_tried_again_until_the_service_is_there(call: CallMethod) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started: list[Scripted] = []
    with ExitStack() as stack:

        def start() -> None:
            if len(time.slept) == 3:
                started.append(stack.enter_context(scripted(predicted(), port=port)))

        time = FakeTime(on_sleep=start)

        assert call(f"http://127.0.0.1:{port}", "predict", IMAGE, time=time).best.label == "7"

    assert time.slept == pytest.approx([0.075, 0.15, 0.3])
    assert len(started[0].requests) == 1


def test_a_service_that_is_never_there_fails_after_five_attempts(call: CallMethod) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    time = FakeTime()

    with pytest.raises(ConnectionFailed) as caught:
        call(f"127.0.0.1:{port}", "health", time=time)

    assert (type(caught.value), len(time.slept)) == (ConnectionFailed, 4)


@pytest.mark.parametrize(
    ("url", "error", "advice"),
    [
        ("http://127.0.0.1:{port}", ConnectionFailed, "http://127.0.0.1:{port} was not reached: "),
        ("127.0.0.1:{port}", ConnectionFailed, "; is the service running? Start it with `pvt-serve serve`"),
        ("http://me:secret@127.0.0.1:{port}/below", ConnectionFailed, "http://127.0.0.1:{port} was not reached: "),
        ("http://no-such-host.invalid:8000", ConnectionFailed, "; no such host: check the name in the URL"),
        ("ftp://127.0.0.1", InvalidUrl, "http://host:port or unix:/path is expected"),
        ("http://", InvalidUrl, "http://host:port or unix:/path is expected"),
        ("127.0.0.1:99999", InvalidUrl, "http://host:port or unix:/path is expected"),
    ],
)
def test_a_service_that_is_not_there_is_named_with_what_to_do(
    call: CallMethod, url: str, error: type[Exception], advice: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    with pytest.raises(error) as caught:
        call(url.format(port=port), "health", client={"retries": Retries(attempts=1)})

    assert advice.format(port=port) in str(caught.value)
    assert "secret" not in str(caught.value)


def test_tls_to_a_service_without_it_is_told_to_write_http(call: CallMethod, service_url: str) -> None:
    with pytest.raises(ConnectionFailed, match="it speaks plain HTTP: write http:// in place of https://"):
        call(service_url.replace("http:", "https:"), "health", client={"retries": Retries(attempts=1)})


def test_http_to_a_service_with_tls_is_asked_about_https(call: CallMethod) -> None:
    with scripted(b"\x15\x03\x03\0\2\2\x46") as server, pytest.raises(ConnectionLost, match="does it speak https"):
        call(server.url, "predict", IMAGE)


def test_a_socket_that_is_not_there_is_told_what_makes_one() -> None:
    error = httpx.ConnectError("[Errno 2] No such file or directory")
    error.__cause__ = FileNotFoundError(2, "No such file or directory")

    assert str(Exchange("unix:/run/pvt.sock").failure(error)) == (
        "unix:/run/pvt.sock was not reached: [Errno 2] No such file or directory; no such socket: start the service "
        "with PVT_HOST=unix:/path, or give its path"
    )


def test_a_connection_that_nobody_takes_is_told_where_to_look() -> None:
    error = Exchange("10.1.2.3").failure(httpx.ConnectTimeout("timed out"))

    assert str(error).startswith("http://10.1.2.3 was not reached: timed out; nobody answers there: check the address")


def test_a_connection_that_is_cut_after_the_request_is_not_tried_again(call: CallMethod) -> None:
    time = FakeTime()
    with scripted(cut, predicted()) as server, pytest.raises(ConnectionLost):
        call(server.url, "predict", IMAGE, time=time)

    assert (len(server.requests), time.slept) == (1, [])


def test_a_response_that_is_cut_short_is_a_lost_connection(call: CallMethod) -> None:
    def half(connection: socket.socket, _: object) -> None:
        connection.sendall(predicted()[:-5])
        connection.shutdown(socket.SHUT_RDWR)

    with scripted(half, predicted()) as server, pytest.raises(ConnectionLost):
        call(server.url, "predict", IMAGE)

    assert len(server.requests) == 1


def test_a_wait_that_would_outlast_the_timeout_is_not_begun(call: CallMethod) -> None:
    time = FakeTime()
    with scripted(refused(429, Retry_After="5"), predicted()) as server, pytest.raises(QueueFull) as caught:
        call(server.url, "predict", IMAGE, time=time, client={"timeout": 4})

    assert (caught.value.retry_after, len(server.requests), time.slept) == (5, 1, [])


def test_the_service_is_sent_what_is_left_of_the_timeout(call: CallMethod) -> None:
    with scripted(refused(429, Retry_After="2"), predicted()) as server:
        call(server.url, "predict", IMAGE, client={"timeout": 4})

    assert queries(server.requests, "timeout_ms") == ["4000", "1950"]


def test_without_a_timeout_the_service_s_own_holds(call: CallMethod) -> None:
    with scripted(predicted()) as server:
        call(server.url, "predict", IMAGE, client={"timeout": None})

    assert queries(server.requests, "timeout_ms") == [None]


def test_one_attempt_means_one(call: CallMethod) -> None:
    with scripted(refused(429, Retry_After="0"), predicted()) as server, pytest.raises(QueueFull):
        call(server.url, "predict", IMAGE, client={"retries": Retries(attempts=1)})

    assert len(server.requests) == 1


def test_a_service_that_does_not_respond_times_out_and_is_not_tried_again(call: CallMethod) -> None:
    with scripted(silent, predicted()) as server, pytest.raises(TimedOut):
        call(server.url, "predict", IMAGE, client={"timeout": 0.05})

    assert len(server.requests) == 1


def test_the_timeout_is_for_all_of_a_response_that_never_ends(call: CallMethod) -> None:
    with scripted(dripping) as server, pytest.raises(TimedOut):
        call(server.url, "predict", IMAGE, time=FakeTime(tick=0.01), client={"timeout": 0.2})


def test_the_service_s_own_deadline_is_a_timeout_too(call: CallMethod) -> None:
    with scripted(refused(504, "deadline-exceeded")) as server, pytest.raises(TimedOut) as caught:
        call(server.url, "predict", IMAGE)

    assert isinstance(caught.value, DeadlineExceeded)


def test_the_refusal_of_a_proxy_shows_its_page(call: CallMethod) -> None:
    with scripted(response(502, b"<html>bad gateway", "text/html")) as server, pytest.raises(Problem) as caught:
        call(server.url, "predict", IMAGE)

    assert str(caught.value) == (
        "HTTP 502 (502): <html>bad gateway; pvt-serve does not answer so: check the URL, and what stands before the "
        "service"
    )


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("0", 0), (" 3 ", 3), ("Thu, 01 Jan 2026 00:01:00 GMT", 60), ("Wed, 31 Dec 2025 00:00:00 GMT", 0), ("soon", None),
     ("-1", None), ("1.5", None), ("", None), (None, None)],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date_and_else_nothing(header: str | None, seconds: float | None) -> None:
    assert retry_after(header, NOW) == seconds


@given(
    attempt=st.integers(1, 20),
    remaining=st.none() | st.floats(0.001, 100),
    draw=st.floats(0, 1),
    status=st.sampled_from([422, 429, 500, 503]),
    named=st.none() | st.floats(0, 100),
)
def test_every_wait_ends_before_the_timeout_and_never_before_the_time_named(
    attempt: int, remaining: float | None, draw: float, status: int, named: float | None
) -> None:
    error = problem({}, status, retry_after=named)

    wait = Retries(attempts=10).wait(error, attempt=attempt, remaining=remaining, draw=draw)

    if wait is not None:
        assert attempt < 10
        assert status == 429 or (status == 503 and named is not None)
        assert remaining is None or wait < remaining
        assert wait >= (named or 0)
        assert wait <= (10 if named is None else named + 0.1)

import asyncio
from collections.abc import AsyncIterator, Iterable
from itertools import chain, repeat
from typing import Any

import httpcore
import pytest
import structlog

from app.bodies import Link
from app.problems import ImageTimedOut, ImageUnreachable
from app.remote_images.fetching import CONNECTIONS, PER_REQUEST, _body, _Budget
from service.errors import ImageTooLarge
from tests.app.remote_images.internet import PRIVATE, PUBLIC, Internet, Stream, answer, fetch, fetcher


@pytest.mark.parametrize(
    "response",
    [
        answer(b"x" * 1001),
        [b"HTTP/1.1 200 OK\r\n\r\n", *[b"x" * 300] * 9],
        chain([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"], repeat(b"64\r\n" + b"x" * 100 + b"\r\n")),
        [b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n"],
    ],
    ids=["announced", "until closed", "endless", "huge"],
)
async def test_a_body_larger_than_allowed_is_given_up(response: Iterable[bytes]) -> None:
    internet = Internet({"example.org": [PUBLIC]}, [response])

    (error,) = await fetch(internet, "http://example.org/")

    assert isinstance(error, ImageTooLarge)
    assert "PVT_MAX_BODY_MB" in str(error)


async def test_the_images_of_one_request_share_one_limit() -> None:
    internet = Internet({"example.org": [PUBLIC]}, [answer(b"x" * 600), answer(b"x" * 600)])

    got = await fetch(internet, "http://example.org/1", "http://example.org/2")

    assert sorted(type(each).__name__ for each in got) == ["ImageTooLarge", "bytes"]


async def test_what_is_given_up_counts_for_nobody() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(9):
            yield b"x" * 300

    budget = _Budget(1000, 1000)

    with pytest.raises(ImageTooLarge):
        await _body(httpcore.Response(200, content=pieces()), "", budget)

    assert budget.left == 1000


async def test_tiny_chunks_are_given_up() -> None:
    tiny_chunks = chain([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"], repeat(b"1\r\nx\r\n" * 100))
    internet = Internet({"example.org": [PUBLIC]}, [tiny_chunks])

    (error,) = await fetch(internet, "http://example.org/", max_bytes=1_000_000)

    assert str(error) == "the URL's host sends the image in too many tiny chunks"


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (answer(b"secret", "404 Not Found"), "example.org answered 404"),
        (answer(b"secret", "206 Partial Content"), "example.org answered 206"),
        (answer(b"secret", "302 Found"), "example.org answered 302"),
        (answer(b"secret", Content_Encoding="gzip"), "content encoding"),
        ([b"SSH-2.0-OpenSSH_9.6\r\n"], "does not speak HTTP"),
        ([], "does not speak HTTP"),
        (repeat(b"HTTP/1.1 100 Continue\r\n\r\n" * 100), "does not speak HTTP"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nsec"], "does not speak HTTP"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nsecret"], "does not speak HTTP"),
        ([b"HTTP/1.1 200 OK\r\n", *[b"X-Secret: secret\r\n" * 100] * 100], "does not speak HTTP"),
    ],
)
async def test_an_answer_without_an_image_is_told_without_what_it_said(response: Iterable[bytes], reason: str) -> None:
    internet = Internet({"example.org": [PUBLIC]}, [response])

    (error,) = await fetch(internet, "http://example.org/")

    assert isinstance(error, ImageUnreachable)
    assert reason in str(error)
    assert "secret" not in str(error).lower()
    assert PUBLIC not in str(error)


@pytest.mark.parametrize("hangs", ["resolve", "connect", "body"])
async def test_what_takes_too_long_is_given_up(hangs: str) -> None:
    async def forever(*_: object, **__: object) -> Any:
        await asyncio.Event().wait()

    internet = Internet({"example.org": [PUBLIC]}, [answer()])
    if hangs == "resolve":
        internet.resolve = forever  # type: ignore[method-assign]
    elif hangs == "connect":
        internet.connect_tcp = forever  # type: ignore[method-assign]
    else:
        stream = Stream([])
        stream.read = forever  # type: ignore[method-assign]

        async def connected(*_: object, **__: object) -> httpcore.AsyncNetworkStream:
            return stream

        internet.connect_tcp = connected  # type: ignore[method-assign]

    (error,) = await fetch(internet, "http://example.org/", seconds=0.01)

    assert isinstance(error, ImageTimedOut)
    assert "PVT_URL_TIMEOUT_MS" in str(error)


async def test_several_are_fetched_at_once_but_not_all() -> None:
    internet = Internet({"example.org": [PUBLIC]})
    under_way, most, full = 0, 0, asyncio.Event()

    class Waiting(Stream):
        async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            if under_way == PER_REQUEST // 2:
                full.set()
            await full.wait()
            under_way -= 1
            return await super().read(max_bytes, timeout)

    async def connect(*_: object, **__: object) -> httpcore.AsyncNetworkStream:
        return Waiting([b"".join(answer())])

    internet.connect_tcp = connect  # type: ignore[method-assign]

    got = await fetch(internet, *[f"http://example.org/{i}" for i in range(3 * PER_REQUEST)])

    assert got == [b"image"] * 3 * PER_REQUEST
    assert most == PER_REQUEST // 2  # of one host; the rest is for others


async def test_the_log_has_the_host_alone_and_why_it_failed() -> None:
    internet = Internet({"example.org": [PRIVATE]})

    with structlog.testing.capture_logs() as lines:
        await fetch(internet, "http://example.org/path/cat.png?token=secret", "http://user:secret@example.org/")

    first, second = (
        sorted(lines, key=lambda line: str(line.get("host")))[::-1] if lines[0].get("host") is None else lines
    )
    assert (first["event"], first["host"], first["outcome"]) == ("image_by_url", "example.org", "ImageUnreachable")
    assert first["cause"] == "it has an address that is not public"
    assert (second["outcome"], second.get("host")) == ("ImageUrlRefused", None)
    assert "secret" not in str(lines)
    assert PRIVATE not in str(lines)


async def test_a_cancelled_request_leaves_no_connection_open() -> None:
    internet = Internet({"example.org": [PUBLIC]})
    began = asyncio.Event()

    class Hanging(Stream):
        closed = False

        async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002, ASYNC109
            began.set()
            await asyncio.Event().wait()
            raise AssertionError

        async def aclose(self) -> None:
            self.closed = True

    stream = Hanging([])

    async def connect(*_: object, **__: object) -> httpcore.AsyncNetworkStream:
        return stream

    internet.connect_tcp = connect  # type: ignore[method-assign]
    async with fetcher(internet, "example.org") as each:
        task = asyncio.create_task(each.fetched([Link("http://example.org/")], "id"))
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert stream.closed


async def test_requests_cancelled_at_any_moment_take_no_connection_along() -> None:
    internet = Internet({"example.org": [PUBLIC]}, [answer()] * 10_000)
    link = Link("http://example.org/")

    async with fetcher(internet, "example.org", seconds=5) as each:
        for turns in range(12):
            tasks = [asyncio.create_task(each.fetched([link], "id")) for _ in range(CONNECTIONS)]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        (upload,) = await each.fetched([link], "id")

    assert upload.data == b"image"

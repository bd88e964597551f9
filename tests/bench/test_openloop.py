"""Tests of the open-loop generator, against servers in the same event loop."""

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bench.bodies import Body
from bench.generator import Call, drive
from bench.openloop import arrivals, open_loop, percentile, summary

BODY = Body("image/jpeg", b"image")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


class Fake:
    """Answers each request with `answer`, but holds back from the `stall`th on until `until` requests have come."""

    def __init__(self, answer: bytes = OK, stall: int = 0, until: int = 0) -> None:
        self.answer, self.stall, self.until = answer, stall, until
        self.requests: list[bytes] = []
        self.connections = 0
        self.released = asyncio.Event()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.requests.append(head + await reader.readexactly(len(BODY.data)))
                if len(self.requests) >= self.until:
                    self.released.set()
                if self.until and len(self.requests) >= self.stall:
                    await self.released.wait()
                writer.write(self.answer)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self.handle, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/predict"


async def test_a_stall_is_charged_to_every_request_that_it_delayed() -> None:
    """Coordinated omission: a client that waits for an answer before it sends again would measure one slow request."""
    times = arrivals(200, 0.2, uniform=True)
    fake = Fake(stall=10, until=len(times))  # it answers again only when all are there, which a closed loop never is

    async with fake.serving() as url:
        start = asyncio.get_running_loop().time()
        calls = await drive(url, [BODY], times, start)

    last = calls[-1].intended
    delayed = [call for call in calls[10:] if call.finished and call.finished - call.intended >= last - call.intended]
    assert len(delayed) == len(times) - 10
    assert summary(calls, 200, 0, 0).answered == len(times)


async def test_latency_counts_from_the_intended_time_when_the_generator_itself_is_late() -> None:
    async with Fake().serving() as url:
        calls = await drive(url, [BODY], [0.0, 0.5], asyncio.get_running_loop().time() - 2)

    result = summary(calls, 2, 0, 0)
    assert result.p50_ms >= 1500
    assert result.lag_ms >= 1500


async def test_requests_are_whole_and_connections_are_used_again() -> None:
    async with (fake := Fake()).serving() as url:
        calls = await drive(url, [BODY], [0.0, 0.2], asyncio.get_running_loop().time())

    assert fake.requests[0].startswith(b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:")
    assert fake.requests[0].endswith(b"Content-Type: image/jpeg\r\nContent-Length: 5\r\n\r\nimage")
    assert [call.status for call in calls] == [200, 200]
    assert fake.connections == 1


async def test_the_query_of_the_url_is_sent() -> None:
    fake = Fake()
    async with fake.serving() as url:
        await drive(f"{url}?timeout_ms=200&size=96", [BODY], [0.0], asyncio.get_running_loop().time())

    assert fake.requests[0].startswith(b"POST /predict?timeout_ms=200&size=96 HTTP/1.1\r\n")


def test_a_folder_without_bodies_is_named(tmp_path: Path) -> None:
    (tmp_path / "digit.png").touch()

    with pytest.raises(subprocess.CalledProcessError) as failure:
        open_loop("http://127.0.0.1:1", tmp_path, "image/png", rate=1, seconds=1, seed=0)

    assert failure.value.stderr.strip() == f"{tmp_path} has no file that ends in .body; name another --suffix"


async def test_refused_broken_and_unanswered_requests_are_told_apart() -> None:
    now = asyncio.get_running_loop().time()
    async with Fake(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n").serving() as url:
        refused = await drive(url, [BODY], [0.0], now)
    broken = await drive(url, [BODY], [0.0], now)
    async with (fake := Fake(stall=1, until=2)).serving() as url:
        unanswered = await drive(url, [BODY], [0.0], now, drain_seconds=0.0)
        fake.released.set()

    result = summary([*refused, *broken, *unanswered], 1, now + 5, 0.1)

    assert (result.sent, result.refused, result.broken, result.unanswered, result.failed) == (3, 1, 1, 1, 3)
    assert result.p50_ms == pytest.approx(5000)


def test_uniform_arrivals_are_evenly_spaced() -> None:
    assert arrivals(4, 1, uniform=True) == [0, 0.25, 0.5, 0.75]


def test_poisson_arrivals_ascend_have_the_rate_and_are_the_same_for_the_same_seed() -> None:
    times = arrivals(100, 20, seed=3)

    assert times == sorted(times) == arrivals(100, 20, seed=3) != arrivals(100, 20, seed=4)
    assert 1800 < len(times) < 2200
    assert max(times) < 20


def test_percentiles_are_values_that_occurred() -> None:
    values = list(range(100, 0, -1))

    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1)) == (50, 99, 100)
    assert (percentile([7], 0.99), percentile([], 0.5)) == (7, 0)


def test_the_summary_keeps_good_answers_apart() -> None:
    calls = [Call(b"", 1.0, finished=1.25, status=200), Call(b"", 1.0, finished=1.001, status=503)]

    result = summary(calls, 2, 9, 0.5)

    assert (result.p99_ms, result.answered, result.refused, result.generator_cpu) == (250, 1, 1, 0.5)

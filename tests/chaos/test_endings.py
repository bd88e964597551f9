"""SIGTERM while clients do all they can: what was accepted is answered to its last byte, and the end comes in time."""

import signal
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.app.conftest import png
from tests.app.processes import LIGHT, Server, serving

MAPS = {"stages": "1,2,3,4", "size": "512", "timeout_ms": "100000"}  # some 11 MB of JSON for one image
NUMPY = {"Accept": "application/x-npz"}  # is written at once, JSON in chunks
FILES = [("image", png())] * 3
INFERRED = 'pvt_stage_seconds_count{model="pvt_v2_b0.digits",stage="infer"}'


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(**LIGHT) as server:
        yield server


def begin_upload(server: Server, path: str, kind: str, part: bytes, length: int = 100) -> socket.socket:
    """A connection over which the beginning of a body has been sent."""
    url = httpx.URL(server.url)
    connection = socket.create_connection((url.host, url.port), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n"
    connection.sendall(head.encode() + part)
    return connection


def answers(connections: Sequence[socket.socket]) -> list[bytes]:
    """What has come over each, in lower case."""
    found = []
    for connection in connections:
        with connection:
            found.append(connection.recv(65_536).lower())
    return found


def metric(server: Server, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@pytest.mark.parametrize(("headers", "workers"), [({}, "1"), (NUMPY, "2")])
def test_an_answer_that_is_being_sent_is_sent_to_its_end(headers: dict[str, str], workers: str) -> None:
    url = "/features"
    with (
        serving(**LIGHT, workers=workers) as server,
        httpx.stream("POST", server.url + url, params=MAPS, files=FILES, headers=headers, timeout=100) as response,
    ):
        chunks = response.iter_raw(65_536)
        received = len(next(chunks))
        server.process.send_signal(signal.SIGTERM)
        server.event("draining")
        for chunk in chunks:  # slowly: for longer than all that an idle connection is given
            received += len(chunk)
            if received < 2_000_000:
                time.sleep(0.1)

        assert server.process.wait(30) == 0
    assert received > 10e6  # and whole: httpx raises where the last chunk is missing


def test_an_answer_that_is_being_encoded_is_sent_to_its_end(server: Server) -> None:
    with ThreadPoolExecutor() as threads:
        call = threads.submit(httpx.post, f"{server.url}/features", params=MAPS, files=FILES, timeout=100)
        while metric(server, INFERRED) < len(FILES):
            pass

        assert server.stop() == 0
    assert call.result().status_code == 200
    assert len(call.result().json()["results"]) == len(FILES)


def test_uploads_that_do_not_end_are_answered_503_long_before_the_limit(server: Server) -> None:
    kinds = {
        "/predict": "image/png",
        "/v2/models/pvt_v2_b0.digits/infer": "application/json",
        "/v1/embeddings": "application/json",
    }
    connections = [begin_upload(server, path, kind, part) for path, kind in kinds.items() for part in (b"", b"{")]
    httpx.get(f"{server.url}/health")  # what came before this has been read when it is answered
    start = time.monotonic()

    assert server.stop() == 0
    assert time.monotonic() - start < 20  # PVT_SHUTDOWN_SECONDS is 25
    for answer in answers(connections):
        assert answer.startswith(b"http/1.1 503")
        assert b"connection: close" in answer
        assert b"retry-after: 1" in answer


def test_answers_that_nobody_reads_do_not_keep_it_from_ending_within_the_limit() -> None:
    with (
        serving(**LIGHT, shutdown_seconds="2") as server,
        httpx.stream("POST", f"{server.url}/features", params=MAPS, files=FILES, timeout=100),
    ):
        start = time.monotonic()

        assert server.stop() == 0
        assert 2 < time.monotonic() - start < 15  # by PVT_CLIENT_TIMEOUT_SECONDS it would end after 20


def test_thirty_connections_of_mixed_chaos_lose_nothing_and_get_no_wrong_label(digits: Path) -> None:
    """Each answer is right or a refusal that is documented; without one, the client gave up or was not accepted."""
    with serving(**LIGHT, timeout_ms="60000") as server, ThreadPoolExecutor(30) as threads:
        chaos = Chaos(server, digits)
        calls = [threads.submit(chaos.run, number) for number in range(30)]
        while chaos.right < 20:
            server.event("request")
        start = time.monotonic()
        code = server.stop()
        seconds = time.monotonic() - start
        for call in calls:
            call.result()

    assert code == 0
    assert seconds < 28
    assert chaos.wrong == []


class Chaos:
    """Thirty clients, each of one of five kinds."""

    def __init__(self, server: Server, digits: Path) -> None:
        self._server = server
        self._seven = (digits / "seven.png").read_bytes()
        self.right = 0
        self.wrong: list[str] = []

    def run(self, number: int) -> None:
        """Send requests of a kind until the server accepts no more."""
        kinds = self.predict, self.features, self.bad_image, self.hang_up, self.slow_upload
        try:
            while True:
                kinds[number % len(kinds)]()
        except (httpx.ConnectError, ConnectionRefusedError):
            pass  # it was not accepted
        except Exception as error:  # noqa: BLE001  a client's thread must not end in silence
            self.wrong.append(f"{kinds[number % len(kinds)].__name__}: {error!r}")

    def _check(self, response: httpx.Response, *expected: int) -> bool:
        if response.status_code not in (*expected, 429, 503):
            self.wrong.append(f"{response.request.url}: {response.status_code} {response.text[:200]}")
        return response.status_code == expected[0]

    def predict(self) -> None:
        response = httpx.post(f"{self._server.url}/predict", files={"image": self._seven}, timeout=60)
        if self._check(response, 200):
            self.right += 1
            label = response.json()["results"][0]["predictions"][0]["label"]
            if label != "7":
                self.wrong.append(f"label {label}")

    def features(self) -> None:
        params = {"stages": "1,2"}
        response = httpx.post(f"{self._server.url}/features", params=params, files={"image": self._seven}, timeout=60)
        if self._check(response, 200) and len(response.json()["results"]) != 1:
            self.wrong.append("features without results")

    def bad_image(self) -> None:
        self._check(httpx.post(f"{self._server.url}/predict", files={"image": self._seven[:300]}, timeout=60), 422)

    def hang_up(self) -> None:
        with begin_upload(self._server, "/predict", "image/png", self._seven, len(self._seven)):
            pass

    def slow_upload(self) -> None:
        half = len(self._seven) // 2
        with begin_upload(self._server, "/predict", "image/png", self._seven[:half], len(self._seven)) as connection:
            time.sleep(0.3)  # what makes it slow
            connection.sendall(self._seven[half:])
            answer = connection.recv(65_536)
        status = answer.split(b" ")[1:2]
        if status not in ([b"200"], [b"429"], [b"503"]):
            self.wrong.append(f"slow upload: {answer[:200]!r}")

"""One client's work beside another's on a real server: large images, floods, deadlines that can't be met."""

import io
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from time import monotonic, sleep
from typing import Self
from urllib.parse import urlsplit

import pytest
from PIL import Image

from tests.app.processes import Server, serving

GREEDY, POLITE = "127.0.0.1", "127.0.0.2"
LARGE = 7000  # pixels on a side: 49 megapixels, in 6 kB


def png(side: int, mode: str = "L") -> bytes:
    out = io.BytesIO()
    Image.new(mode, (side, side)).save(out, "PNG")
    return out.getvalue()


SMALL, LARGE_PNG = png(64), png(LARGE, "1")


def form(image: bytes, count: int) -> tuple[bytes, dict[str, str]]:
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n%b\r\n' % image
    return part * count + b"--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}


class Client:
    """One open connection from an address of its own."""

    def __init__(self, server: Server, address: str) -> None:
        url = urlsplit(server.url)
        self._connection = HTTPConnection(url.hostname or "", url.port, timeout=60, source_address=(address, 0))
        self._connection.connect()

    def post(
        self, body: bytes = SMALL, headers: dict[str, str] | None = None, query: str = ""
    ) -> tuple[int, float, int]:
        """Status, seconds, and what Retry-After says."""
        start = monotonic()
        self._connection.request("POST", f"/predict{query}", body, headers or {"Content-Type": "image/png"})
        response = self._connection.getresponse()
        response.read()
        return response.status, monotonic() - start, int(response.headers.get("Retry-After") or 0)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Flood:
    """Connections of one address that send again at once, whatever they are told, until the context ends."""

    def __init__(self, server: Server, connections: int, send: Callable[[Client], tuple[int, float, int]]) -> None:
        self._clients = [Client(server, GREEDY) for _ in range(connections)]
        self._send, self._over = send, threading.Event()
        self._answered = threading.Semaphore(0)
        self.statuses = Counter[int]()
        self._threads = [threading.Thread(target=self._go, args=(each,)) for each in self._clients]

    def _go(self, client: Client) -> None:
        while not self._over.is_set():
            status, *_ = self._send(client)
            self.statuses[status] += 1
            self._answered.release()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def wait_for(self, answers: int) -> None:
        for _ in range(answers):
            assert self._answered.acquire(timeout=60)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)
        for client in self._clients:
            client.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(read_log=False, queue_size="32", max_images="16") as made:
        warm_up(made)
        yield made


def warm_up(server: Server) -> None:
    with Client(server, POLITE) as client:
        for _ in range(5):
            assert client.post()[0] == 200


def post_form(server: Server, body: bytes, headers: dict[str, str]) -> tuple[int, float, int]:
    with Client(server, GREEDY) as client:
        return client.post(body, headers)


def seconds_of(client: Client, count: int) -> list[float]:
    """Of so many small images, one after the other, of which none is refused."""
    answers = [client.post() for _ in range(count)]
    assert {status for status, *_ in answers} == {200}
    return sorted(seconds for _, seconds, _ in answers)


@pytest.mark.parametrize("address", [POLITE, GREEDY])
def test_forms_of_large_images_neither_delay_nor_refuse_small_ones(server: Server, address: str) -> None:
    body, headers = form(LARGE_PNG, 8)
    with Client(server, address) as client, ThreadPoolExecutor(4) as pool:
        forms = [pool.submit(post_form, server, body, headers) for _ in range(4)]
        small = seconds_of(client, 20)
        statuses = Counter(each.result()[0] for each in forms)

    slowest = max(each.result()[1] for each in forms)
    assert statuses[200] >= 1
    assert small[10] < slowest / 4, (small, slowest)


def test_retry_after_of_large_images_counts_their_decoding(server: Server) -> None:
    """Of two forms at once there is room for one; the other is told when that one has been decoded."""
    body, headers = form(LARGE_PNG, 8)
    post_form(server, body, headers)  # so that the speed has been measured
    with ThreadPoolExecutor(2) as pool:
        forms = [pool.submit(post_form, server, body, headers) for _ in range(2)]
        refused, taken = sorted((each.result() for each in forms), reverse=True)

    left = taken[1] - refused[1]
    assert (refused[0], taken[0]) == (429, 200)
    assert left / 3 - 1 <= refused[2] <= 3 * left + 2


def test_who_obeys_retry_after_gets_in_beside_many_who_do_not(server: Server) -> None:
    with Client(server, POLITE) as polite, Flood(server, 64, Client.post) as flood:
        flood.wait_for(64)
        refused = 0
        for _ in range(10):
            while (answer := polite.post())[0] == 429:
                refused += 1
                assert refused < 3
                sleep(answer[2])
            assert answer[0] == 200

    assert flood.statuses[429] > 0


def test_a_connection_goes_on_after_an_upload_that_was_refused_unread(server: Server) -> None:
    upload, full = SMALL + bytes(2_000_000), form(SMALL, 16)  # two of which fill the queue
    with Client(server, GREEDY) as client:
        statuses = Counter[int]()
        with Flood(server, 64, lambda each: each.post(*full)) as flood:
            flood.wait_for(64)
            for _ in range(10):
                statuses[client.post(upload)[0]] += 1

        assert client.post()[0] == 200

    assert {*statuses} <= {200, 429}
    assert statuses[429] > 0


def test_answers_in_time_do_not_collapse_under_overload() -> None:
    """A wide bound: the threads that send take the server's cores, the more the sooner they are refused."""
    rates = {}
    with serving(read_log=False) as fresh:
        warm_up(fresh)
        for connections in (60, 240):
            with Flood(fresh, connections, lambda client: client.post(query="?timeout_ms=200")) as flood:
                flood.wait_for(2 * connections)
                before, start = flood.statuses[200], monotonic()
                while monotonic() - start < 4:
                    flood.wait_for(20)
                rates[connections] = (flood.statuses[200] - before) / (monotonic() - start)

    assert rates[240] >= 0.2 * rates[60], rates

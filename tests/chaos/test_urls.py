"""A host that hangs, a domain that hangs, a name server that hangs: images from elsewhere are fetched meanwhile."""

import asyncio
import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.app.processes import ROOT, Server, serving
from tests.chaos.hosts import Host, host, response
from tests.chaos.namespace import in_namespace, name_server, with_resolver
from tests.service.stores import add_model

SEVEN = (ROOT / "docs" / "digits" / "seven.png").read_bytes()
SOON = 5.0  # seconds; what hangs would take the 10 of PVT_URL_TIMEOUT_MS
PUBLIC, PUBLIC_HANGING = "93.184.216.34", ("8.8.8.8", "9.9.9.9")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    add_model(root)
    return root


@contextmanager
def tiny(store: Path, hosts: str, prefix: Sequence[str] = (), **settings: str) -> Iterator[Server]:
    """A server with a tiny model, which may fetch from `hosts`."""
    tiny_model = {"default_model": "pvt_v2_b0.tiny", "backend": "torch", "max_batch_size": "1", "url_hosts": hosts}
    environment = {f"PVT_{name.upper()}": value for name, value in {**tiny_model, **settings}.items()}
    with serving(read_log=False, prefix=prefix, environment=environment, model_store=str(store)) as server:
        yield server


def images(*urls: str) -> dict[str, Any]:
    return {"images": [{"url": url} for url in urls]}


@contextmanager
def asking(url: str, bodies: Sequence[dict[str, Any]]) -> Iterator[None]:
    """All of `bodies` asked for at once, each on a connection of its own; hung up at the end."""
    address = urlsplit(url)
    with ExitStack() as stack:
        for body in bodies:
            sent = json.dumps(body).encode()
            head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(sent)}"
            connection = stack.enter_context(socket.create_connection((address.hostname or "", address.port or 0)))
            connection.sendall(f"{head}\r\n\r\n".encode() + sent)
        yield


def predict(server: Server, *urls: str) -> httpx.Response:
    return httpx.post(f"{server.url}/predict", json=images(*urls), timeout=60)


def fetched_soon(server: Server, url: str) -> None:
    """The image at `url` is answered while everything else hangs."""
    start = perf_counter()
    answer = predict(server, url)

    assert answer.status_code == 200, answer.text
    assert perf_counter() - start < SOON


@contextmanager
def local(store: Path, hanging: int, **settings: str) -> Iterator[tuple[Server, Host, list[Host]]]:
    """A server, a host on this machine that answers, and some that hang."""
    with ExitStack() as stack:
        good = stack.enter_context(host("127.0.0.2", answer=lambda _: response(SEVEN)))
        bad = [stack.enter_context(host(f"127.0.0.{3 + number}")) for number in range(hanging)]
        places = ",".join(each.place for each in (good, *bad))
        networks = {"url_private_networks": "127.0.0.0/8"}
        yield stack.enter_context(tiny(store, places, **networks, **settings)), good, bad


@pytest.mark.parametrize("hanging", [1, 12])
def test_hosts_that_hang_leave_places_to_one_that_answers(store: Path, hanging: int) -> None:
    with local(store, hanging) as (server, good, bad):
        predict(server, f"http://{good.place}/")
        with asking(server.url, [images(f"http://{each.place}/") for each in bad for _ in range(100)]):
            for each in bad:
                each.wait_for(1)
            for _ in range(5):
                fetched_soon(server, f"http://{good.place}/")


async def test_who_waits_for_a_host_that_hangs_learns_of_it_in_bounded_time(store: Path) -> None:
    with local(store, 1, url_timeout_ms="3000") as (server, _, (bad,)):
        async with httpx.AsyncClient(
            base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=None)
        ) as client:
            start = perf_counter()
            answers = await asyncio.gather(
                *(client.post("/predict", json=images(f"http://{bad.place}/")) for _ in range(100))
            )

    assert perf_counter() - start < 15  # 100 images, 8 at a time, would take 39 s
    assert {answer.status_code for answer in answers} == {503, 504}
    busy = [answer for answer in answers if answer.status_code == 503]
    assert len(busy) >= 60
    for answer in busy:
        assert answer.headers["Retry-After"] == "3"
        assert answer.json()["type"] == "urn:pvt-serve:problem:image-host-busy"
        assert "the URL's host 127.0.0.3 has as many images under way as it may have" in answer.json()["detail"]


def test_the_images_of_a_host_that_hangs_cost_the_others_of_their_request_nothing(store: Path) -> None:
    with local(store, 1, url_timeout_ms="2000") as (server, good, (bad,)):
        hanging = [f"http://{bad.place}/{number}" for number in range(60)]
        start = perf_counter()
        answer = predict(server, *hanging, *[f"http://{good.place}/"] * 3)
        seconds = perf_counter() - start

    *failed, first, second, third = answer.json()["results"]
    assert seconds < 10  # 60 images, 8 at a time, would take 16 s
    assert {each["error"]["status"] for each in failed} == {504}
    assert all("127.0.0.3" in each["error"]["detail"] for each in failed)
    assert all(each["predictions"] for each in (first, second, third))


def _names(name: str) -> Sequence[str] | None:
    if name.endswith(".silent.net"):
        return None
    if name.endswith(".wildcard.net"):
        return PUBLIC_HANGING[:1]
    if name.startswith("one-of-many-domains-"):
        return PUBLIC_HANGING[1:]
    return [PUBLIC] if name == "good.org" else []


NAMES = {"silent": "{}.silent.net", "wildcard": "{}.wildcard.net", "domains": "one-of-many-domains-{}.net"}


@pytest.mark.parametrize("kind", NAMES)
def test_many_names_that_hang_leave_places_to_one_that_answers(store: Path, tmp_path: Path, kind: str) -> None:
    hanging = [images(f"http://{NAMES[kind].format(number)}/") for number in range(400)]

    def work() -> None:
        with (
            name_server(_names),
            host(PUBLIC, 80, lambda _: response(SEVEN)),
            host(PUBLIC_HANGING[0], 80) as first,
            host(PUBLIC_HANGING[1], 80) as second,
            tiny(store, "*", with_resolver(tmp_path)) as server,
        ):
            predict(server, "http://good.org/")
            with asking(server.url, hanging):
                if wait_for := {"wildcard": first, "domains": second}.get(kind):
                    wait_for.wait_for(32)
                for _ in range(5):
                    fetched_soon(server, "http://good.org/")

    in_namespace(work, [PUBLIC, *PUBLIC_HANGING])

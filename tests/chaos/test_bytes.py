"""Bytes that clients make the service hold: uploads that stop, answers that nobody reads, and what should be freed."""

import base64
import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from io import BytesIO
from time import monotonic

import httpx
import psutil
import pytest
from PIL import Image

from tests.app.processes import Server, serving
from tests.chaos.cgroup import memory_limit

MB = 1_000_000
BODY = 32 * MB
GREEDY = "/features?stages=1,2,3,4&size=256"
WITHOUT_COLLECTION = (
    "-c",
    "import gc, sys; gc.disable(); from app import __main__ as app; sys.exit(app.main(app.Starting()))",
)
QUICK = {"PVT_BACKEND": "torch", "PVT_INSTANCES": "1", "PVT_MAX_BATCH_SIZE": "1"}


def png(colour: int = 200, side: int = 64) -> bytes:
    buffer = BytesIO()
    Image.new("L", (side, side), colour).save(buffer, "png")
    return buffer.getvalue()


def connected(server: Server) -> socket.socket:
    url = httpx.URL(server.url)
    return socket.create_connection((url.host, url.port or 80), timeout=30)


def head(path: str, length: int, content_type: str = "image/png") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n\r\n".encode()
    )


def form(images: Sequence[bytes]) -> tuple[bytes, str]:
    request = httpx.Request("POST", "http://x", files=[("image", (f"{i}.png", each)) for i, each in enumerate(images)])
    return request.read(), request.headers["content-type"]


def rss(server: Server) -> int:
    return int(psutil.Process(server.process.pid).memory_info().rss)


def reserved(server: Server, what: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    name = f'pvt_memory_reserved_bytes{{what="{what}"}}'
    return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0.0)


def wait_until_free(server: Server, what: str) -> None:
    end = monotonic() + 10
    while reserved(server, what) and monotonic() < end:
        pass
    assert reserved(server, what) == 0


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(read_log=False, timeout_ms="120000") as server:
        assert httpx.post(f"{server.url}/predict", files={"image": png()}, timeout=60).status_code == 200
        yield server


def test_uploads_that_stop_hold_no_more_than_their_share_and_small_ones_go_on() -> None:
    """A hundred clients send 31 of 32 MB and stop: those beyond the share get 503 at once."""
    with memory_limit(1000 * MB) as group, serving(read_log=False, prefix=group.prefix, environment=QUICK) as server:
        assert httpx.post(f"{server.url}/predict", files={"image": png()}, timeout=60).status_code == 200
        with ExitStack() as stack:
            statuses = [stopped_upload(stack, server) for _ in range(40)]
            small = [httpx.post(f"{server.url}/predict", files={"image": png()}, timeout=30) for _ in range(5)]
            held = reserved(server, "bodies")

        assert statuses.count(b"503") >= 20
        assert {*statuses} == {b"503", b""}
        assert [each.status_code for each in small] == [200] * 5
        assert 100 * MB < held < 500 * MB
        assert group.killed() == 0
        wait_until_free(server, "bodies")


def stopped_upload(stack: ExitStack, server: Server) -> bytes:
    """Send 31 of 32 MB; the status of the response, if there is one."""
    connection = stack.enter_context(closing(connected(server)))
    connection.settimeout(0.2)
    answer = b""
    connection.sendall(head("/predict", BODY))
    chunk = bytes(MB)
    for _ in range(31):
        connection.settimeout(5)
        connection.sendall(chunk)
        connection.settimeout(0.001)
        try:
            answer += connection.recv(65_536)
        except TimeoutError:
            continue
        break
    return answer[9:12]


@pytest.mark.parametrize(("path", "content_type"), [
    ("/predict", "image/png"), ("/predict", "multipart/form-data; boundary=x"), ("/predict", "application/json"),
    ("/v2/models/pvt_v2_b0.digits/infer", "application/octet-stream"), ("/v1/embeddings", "application/json"),
])  # fmt: skip
def test_a_body_that_finds_no_room_is_refused_before_it_is_sent(path: str, content_type: str, busy: Server) -> None:
    with closing(connected(busy)) as connection:
        connection.sendall(head(path, 30 * MB, content_type))
        response = b""
        while not response.endswith(b"}"):
            response += connection.recv(65_536)

    assert response.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 2" in response.lower()
    assert b"30.0 MB for bodies do not fit into memory now" in response


def test_the_connection_of_a_refused_body_goes_on(busy: Server) -> None:
    """The rest of the body is read and dropped, so a client that sends it all before it reads finds its response."""
    with httpx.Client(timeout=30) as client:
        refused = client.post(f"{busy.url}/predict", content=bytes(30 * MB), headers={"Content-Type": "image/png"})
        small = client.post(f"{busy.url}/predict", files={"image": png()})

    assert refused.status_code == 503
    assert refused.json()["type"] == "urn:pvt-serve:problem:memory-exhausted"
    assert small.status_code == 200


@pytest.fixture(scope="module")
def busy() -> Iterator[Server]:
    """A server whose memory for bodies is nearly taken."""
    with serving(read_log=False, memory_mb="900", environment=QUICK) as server, ExitStack() as stack:
        assert httpx.post(f"{server.url}/predict", files={"image": png()}, timeout=60).status_code == 200
        assert b"503" in (stopped_upload(stack, server) for _ in range(40))  # until one finds no room
        yield server


def test_answers_nobody_reads_are_bounded_and_others_go_on() -> None:
    """Sixteen clients request 80 MB each, of arrays of 34 MB, and read nothing of it."""
    body, content_type = form([png(i) for i in range(32)])
    with (
        memory_limit(1800 * MB) as group,
        serving(
            read_log=False,
            prefix=group.prefix,
            memory_mb="1400",
            queue_size="1000",
            timeout_ms="120000",
            max_batch_size="1",  # which batches pay differs from start to start, and with it what the model takes
        ) as server,
    ):
        whole = httpx.post(server.url + GREEDY, content=body, headers={"Content-Type": content_type}, timeout=120)
        assert len(whole.content) > 70 * MB
        with ExitStack() as stack:
            connections = [stack.enter_context(closing(connected(server))) for _ in range(16)]
            for connection in connections:
                connection.settimeout(60)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.sendall(head(GREEDY, len(body), content_type) + body)
            begun = [connection.recv(12) for connection in connections]
            small = httpx.post(f"{server.url}/predict", files={"image": png()}, timeout=30)
            held = reserved(server, "answers")

        assert {*begun} == {b"HTTP/1.1 200", b"HTTP/1.1 503"}
        assert small.status_code == 200
        assert 35 * MB < held < 500 * MB
        assert group.killed() == 0
        wait_until_free(server, "answers")


@pytest.mark.parametrize("accept", ["application/json", "application/x-npz", "application/vnd.safetensors"])
def test_a_large_answer_is_whole_and_never_in_memory_whole(accept: str, server: Server) -> None:
    body, content_type = form([png(i) for i in range(32)])
    headers = {"Content-Type": content_type, "Accept": accept}
    httpx.post(server.url + GREEDY, content=body, headers=headers, timeout=120)  # compiles the graph
    before, most, length = rss(server), 0, 0
    with httpx.stream("POST", server.url + GREEDY, content=body, headers=headers, timeout=120) as response:
        assert response.status_code == 200
        for chunk in response.iter_raw():
            length += len(chunk)
            most = max(most, rss(server))

    assert length > 30 * MB
    assert most - before < 100 * MB  # the maps take 34
    wait_until_free(server, "answers")


@pytest.mark.parametrize("form_of_body", ["raw", "multipart", "json", "corrupt", "v2"])
def test_what_was_uploaded_is_freed_without_garbage_collection(form_of_body: str, uncollected: Server) -> None:
    """Ten uploads of 32 MB one after another: no reference cycle keeps their bytes."""
    upload(uncollected, form_of_body)
    before = rss(uncollected)
    for _ in range(10):
        upload(uncollected, form_of_body)

    assert rss(uncollected) - before < 100 * MB


@pytest.fixture(scope="module")
def uncollected() -> Iterator[Server]:
    with serving(read_log=False, command=WITHOUT_COLLECTION, environment=QUICK) as server:
        assert httpx.post(f"{server.url}/predict", files={"image": png()}, timeout=60).status_code == 200
        yield server


def test_an_upload_that_its_client_gives_up_is_freed_too(uncollected: Server) -> None:
    before = rss(uncollected)
    for _ in range(10):
        with closing(connected(uncollected)) as connection:
            connection.sendall(head("/predict", BODY) + bytes(31 * MB))
    wait_until_free(uncollected, "bodies")

    assert rss(uncollected) - before < 100 * MB


def upload(server: Server, form_of_body: str) -> None:
    path, image = "/predict", png() + bytes(31 * MB)
    status, headers = 200, {"Content-Type": "image/png"}
    if form_of_body == "corrupt":
        image, status = bytes(31 * MB), 422
    if form_of_body == "multipart":
        image, headers["Content-Type"] = form([image])
    if form_of_body == "json":
        text = base64.b64encode(png() + bytes(23 * MB)).decode()
        image, headers["Content-Type"] = f'{{"images": ["{text}"]}}'.encode(), "application/json"
    if form_of_body == "v2":
        tensor = {"name": "encoded", "datatype": "BYTES", "shape": [1]}
        message = {"inputs": [tensor | {"parameters": {"binary_data_size": 4 + len(image)}}]}
        start = json.dumps(message).encode()
        image = start + len(image).to_bytes(4, "little") + image
        path, headers = "/v2/models/pvt_v2_b0.digits/infer", {"Inference-Header-Content-Length": str(len(start))}
    response = httpx.post(server.url + path, content=image, headers=headers, timeout=60)
    assert response.status_code == status, response.text

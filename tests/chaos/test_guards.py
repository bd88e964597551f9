"""What holds against hostile requests goes on holding, on a real server: URLs that lead inside, made-up `/v2` bodies.

Requests made up from the OpenAPI document are in `tests/app/test_schema_requests.py`.
"""

import asyncio
import json
import random
import signal
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from itertools import chain, count
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import httpx
import pytest

from bench.soak import two_models
from bench.soak_load import MANAGEMENT_KEY, MODEL, Load, Tally
from tests.app.processes import ROOT, Server, serving
from tests.chaos.hosts import host, response
from tests.chaos.namespace import in_namespace, name_server, with_resolver
from tests.service.stores import add_model

SEVEN = (ROOT / "docs" / "digits" / "seven.png").read_bytes()
TINY = "pvt_v2_b0.tiny"
PUBLIC = "93.184.216.34"
INSIDE = ("10.0.0.7", "100.64.0.1", "127.0.0.1", "127.8.8.8", "169.254.169.254", "172.16.0.1", "192.168.1.1")
INSIDE_V6 = ("::1", "fd00::7", "2001:db8::7")
SECRET = b"inside"
REFUSED = {422, 502, 504}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Those of a service whose model is quickly loaded."""
    root = tmp_path_factory.mktemp("store")
    add_model(root)
    return {"PVT_MODEL_STORE": str(root), "PVT_DEFAULT_MODEL": TINY, "PVT_BACKEND": "torch", "PVT_MAX_BATCH_SIZE": "1"}


async def test_mixed_chaos_and_sigterm_lose_nothing_and_answer_nothing_wrongly(tmp_path: Path) -> None:
    """32 callers of every kind: good, bad, slow, hanging up, loading and unloading; then the signal amid them."""
    environment = {
        "PVT_MODEL_STORE": str(two_models(tmp_path / "store")),
        "PVT_DEFAULT_MODEL": MODEL,
        "PVT_BACKEND": "torch",
        "PVT_MAX_BATCH_SIZE": "4",
        "PVT_MANAGEMENT_KEYS": MANAGEMENT_KEY,
    }
    tally = Tally()
    with serving(read_log=False, environment=environment) as server:
        async with AsyncExitStack() as stack:
            loads = [await stack.enter_async_context(Load(server.url, tally, reloads=1)) for _ in range(4)]
            for load in loads:
                await load.warm()
            server.process.send_signal(signal.SIGTERM)
            for load in loads:
                load.end()

        assert await asyncio.to_thread(server.process.wait, 30) == 0
    lost = [each for each in tally.wrong if "ConnectError" not in each and "ConnectionRefusedError" not in each]
    assert lost == [], "\n".join(lost)
    assert tally.good["predictions"] > 20


def spellings(address: str) -> list[str]:
    """Ways to write the IPv4 address `address` as a URL's host, most of which some parser or resolver takes."""
    a, b, c, d = map(int, address.split("."))
    number = struct.unpack("!I", bytes([a, b, c, d]))[0]
    high, low = number >> 16, number & 0xFFFF
    fullwidth = address.translate({ord(str(digit)): chr(0xFF10 + digit) for digit in range(10)})
    return [
        *(address, f"{address}.", f"{number}", f"{number:#x}", f"0{number:o}", f"{a}.{(b << 16) + (c << 8) + d}"),
        *(
            f"{a:#x}.{b:#x}.{c:#x}.{d:#x}",
            f"0{a:o}.0{b:o}.0{c:o}.0{d:o}",
            f"{a:#04x}.{b}.{c}.{d}",
            f"{a}.{b}.{c << 8 | d}",
        ),
        *(f"[::ffff:{address}]", f"[::ffff:{high:x}:{low:x}]", f"[::{address}]", f"[64:ff9b::{high:x}:{low:x}]"),
        *(f"[2002:{high:x}:{low:x}::1]", f"[::ffff:0:{address}]", f"[64:ff9b:1::{high:x}:{low:x}]"),
        *(fullwidth, address.replace(".", "\u3002"), "".join(f"%{ord(each):02x}" for each in address)),
        *(f"{a + 256}.{b}.{c}.{d}", f"{number + (1 << 32)}", f"00000{a}.{b}.{c}.{d}"),
    ]


SCHEMES = ("ftp", "gopher", "dict", "ldap", "tftp", "ws", "unix", "sftp", "jar:http")
ODD = [
    *(f"{scheme}://127.0.0.1/" for scheme in SCHEMES),
    *(
        "file:///etc/passwd",
        "file://127.0.0.1/etc/passwd",
        "data:image/png;base64,aWW",
        "//127.0.0.1/",
        "127.0.0.1",
        "",
    ),
    *("javascript:1", "http:127.0.0.1", "http:/127.0.0.1/", "http:///127.0.0.1/", "http://", "https://"),
    *("\thttp://[::1]/", "http://good.org@127.0.0.1/", "http://good.org:80@127.0.0.1:80/", "http://me:a@good.org/"),
    *("http://127.0.0.1\\@good.org/", "http://good.org\\@127.0.0.1/", "http://@good.org@127.0.0.1/"),
    *(
        "http://127.0.0.1 @good.org",
        "http://127.0.0.1;good.org/",
        "http://127.0.0.1%00.good.org/",
        "http://good.org%2f/",
    ),
    *("http://127.0.0.1%23.good.org/", "http://good.org%2f@127.0.0.1/", "http://[::1]@good.org/"),
    *(f"http://good.org:{port}/" for port in ("22", "443", "6379", "8080", "0", "-1", "65536", "65616", "+80x")),
    *(
        "http://localhost/",
        "http://LOCALHOST./",
        "http://ip6-localhost/",
        "http://[::]/",
        "http://0/",
        "http://0.0.0.0/",
    ),
    *("http://[::1%25lo]/", "http://[fe80::1%lo]/", "http://[0:0:0:0:0:0:0:1]/", "http://[::1]:80/", "http://[1]/"),
    *("http://inside.evil.net/", "http://both.evil.net/", "http://mapped.evil.net/", "http://nat64.evil.net/"),
    *("http://six.evil.net/", "http://6to4.evil.net/", "http://one.evil.net/", "http://nothing.evil.net/"),
    "http://zero.net/",
]
NAMES: dict[str, Sequence[str]] = {
    "good.org": [PUBLIC],
    "inside.evil.net": INSIDE[:1],
    "both.evil.net": [PUBLIC, "10.0.0.7"],
    "mapped.evil.net": ["::ffff:127.0.0.1"],
    "nat64.evil.net": ["64:ff9b::7f00:1"],
    "6to4.evil.net": ["2002:7f00:1::"],
    "six.evil.net": [PUBLIC, "fd00::7"],
    "one.evil.net": ["::1"],
    "zero.net": ["0.0.0.0"],  # noqa: S104  an answer of a name server
}


def tricks() -> list[str]:
    """URLs that lead, or are to lead, to an address inside, or to what is no web server; also by redirects."""
    hosts = [*chain.from_iterable(map(spellings, INSIDE)), *(f"[{each}]" for each in INSIDE_V6)]
    direct = [*(f"http://{each}/" for each in hosts), *ODD]
    return [
        *direct,
        *(f"http://good.org/to/{quote(each, safe='')}" for each in direct),
    ]


def _public(head: bytes) -> bytes:
    """A web site that redirects `/to/URL` to that URL, and has an image everywhere else."""
    path = head.split()[1].decode()
    if not path.startswith("/to/"):
        return response(SEVEN)
    location = unquote(path.removeprefix("/to/")).encode()
    return response(b"", "302 Found").replace(b"\r\n\r\n", b"\r\nLocation: " + location + b"\r\n\r\n")


def test_no_url_leads_inside(settings: dict[str, str], tmp_path: Path) -> None:
    """With any host allowed: literal addresses in every spelling, names, redirects, and names that change."""
    turns = count()

    def names(name: str) -> Sequence[str]:
        if name == "rebinding.evil.net":  # both questions of a lookup get one turn
            return [PUBLIC] if next(turns) // 2 % 2 == 0 else ["127.0.0.1"]
        return NAMES.get(name, [])

    def work() -> None:
        with ExitStack() as stack:
            stack.enter_context(name_server(names))
            inside = [stack.enter_context(host(each, 80, lambda _: response(SECRET))) for each in (*INSIDE, *INSIDE_V6)]
            inside += [stack.enter_context(host(PUBLIC, port, lambda _: response(SECRET))) for port in (22, 6379, 8080)]
            public = stack.enter_context(host(PUBLIC, 80, _public))
            server = stack.enter_context(
                serving(read_log=False, prefix=with_resolver(tmp_path), environment=settings, url_hosts="*")
            )
            for each in inside:  # they can be reached, and notice it
                socket.create_connection((each.address, each.port)).close()
                each.wait_for(1)
            urls = tricks()
            _refuses(server, urls)
            _rebinds(server)
            assert public.connections > len(urls) / 2  # the redirects were followed that far
            assert [each.place for each in inside if each.connections > 1] == []

    assert len(tricks()) >= 300
    in_namespace(work, [PUBLIC, *(f"{each}/32" for each in INSIDE if not each.startswith("127.")), *INSIDE_V6[1:]])


def _refuses(server: Server, urls: Sequence[str]) -> None:
    for start in range(0, len(urls), 50):
        sent = urls[start : start + 50]
        answer = httpx.post(f"{server.url}/predict", json={"images": [{"url": url} for url in sent]}, timeout=60)

        assert answer.status_code == 200
        assert SECRET.decode() not in answer.text.replace("inside.evil.net", "")
        for url, result in zip(sent, answer.json()["results"], strict=True):
            redirect = url.startswith("http://good.org/to/")  # some lead to a path of the same host, as URLs are joined
            refused = result.get("error", {}).get("status") in REFUSED
            assert refused or (redirect and "predictions" in result), (url, result)


def _rebinds(server: Server) -> None:
    body = {"images": [{"url": "http://rebinding.evil.net/"}]}
    statuses = [httpx.post(f"{server.url}/predict", json=body, timeout=60).status_code for _ in range(20)]

    assert set(statuses) == {200, 502}


def _json_body(**changed: Any) -> bytes:
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [7] * 3072, **changed}
    return json.dumps({"id": "a", "inputs": [tensor]}).encode()


def _binary_body() -> tuple[bytes, bytes]:
    """The JSON of a request with binary data, and the data."""
    parameters = {"binary_data_size": 3072}
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "parameters": parameters}
    return json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode(), bytes(3072)


VALUES: list[object] = [
    None,
    True,
    -1,
    0,
    2**63,
    1e308,
    "",
    "images",
    "UINT8",
    "BYTES",
    "FP64",
    [],
    [[]],
    [-1],
    [2**40, 2**40],
    {},
    "é\0",
]


def _mutated(draw: random.Random) -> tuple[bytes, dict[str, str]]:
    """A body and headers like those of `/v2` that went wrong somewhere."""
    kind = draw.randrange(4)
    if kind == 0:  # another value for a field
        return _json_body(
            **{draw.choice(["name", "datatype", "shape", "data", "parameters", "x"]): draw.choice(VALUES)}
        ), {}
    if kind == 1:  # bytes of the JSON changed, removed, doubled
        body = bytearray(_json_body(shape=[1, 1, 1, 3], data=[1, 2, 3]))
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(body))
            body[at : at + draw.randrange(3)] = draw.choice(
                [b"", b"[", b"]", b"{", b'"', b",", b"\\", b"9" * 30, b"\xff"]
            )
        return bytes(body), {}
    head, data = _binary_body()
    if kind == 2:  # a length that is not the JSON's
        length = draw.choice([-1, 0, 1, len(head) - 1, len(head) + 1, len(head) + len(data) + 1, 10**30, "x", ""])
        return head + data, {"Inference-Header-Content-Length": str(length)}
    size = draw.choice([-1, 0, 1, 3071, 3073, 10**18, 10**30])
    head = head.replace(b'"binary_data_size": 3072', f'"binary_data_size": {size}'.encode())
    return head + data[: draw.randrange(4000)], {"Inference-Header-Content-Length": str(len(head))}


@pytest.fixture
def server(settings: dict[str, str]) -> Iterator[Server]:
    with serving(read_log=False, environment=settings) as each:
        yield each


def test_made_up_bodies_of_v2_get_errors_of_the_protocol_and_harm_nothing(server: Server) -> None:
    draw = random.Random(13)  # noqa: S311  repeatable, not secret
    with httpx.Client(base_url=server.url, timeout=60) as client:
        path = f"/v2/models/{TINY}/infer"
        first = client.post(path, content=_json_body())
        assert first.status_code == 200, first.text

        for _ in range(1500):
            body, headers = _mutated(draw)
            answer = client.post(path, content=body, headers=headers)

            assert answer.status_code in {200, 400, 413}, (answer.status_code, answer.text, body[:300], headers)
            if answer.status_code != 200:
                assert answer.json()["error"]

        assert client.post(path, content=_json_body()).json()["outputs"] == first.json()["outputs"]
        assert client.get("/health").status_code == 200

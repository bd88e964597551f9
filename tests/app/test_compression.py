"""Bodies with `Content-Encoding`, made by the commands and libraries of others."""

import gzip
import json
import subprocess
import zlib
from collections.abc import Callable

import brotli
import pytest
from backports import zstd
from starlette.testclient import TestClient

from app.bodies import EXAMPLE
from tests.app.conftest import MakeClient, png


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


def gzip_command(data: bytes) -> bytes:
    return subprocess.run(["gzip", "-9c"], input=data, capture_output=True, check=True).stdout


CODERS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "gzip's own command": ("gzip", gzip_command),
    "x-gzip": ("X-GZIP", gzip.compress),
    "zlib": ("deflate", zlib.compress),
    "raw deflate": ("deflate", raw_deflate),
    "br": ("br", brotli.compress),
    "zstd": ("zstd", zstd.compress),
}
STRICT = {name: coder for name, coder in CODERS.items() if name != "gzip's own command"}


def jpeg_json(count: int = 1) -> bytes:
    return json.dumps({"images": [EXAMPLE] * count}).encode()


@pytest.mark.parametrize("name", CODERS)
def test_a_compressed_image_form_or_json_is_answered_as_the_plain_one(client: TestClient, name: str) -> None:
    coding, encode = CODERS[name]
    form = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + png() + b"\r\n--b--\r\n"
    for body, kind in (
        (png(), "image/png"),
        (form, "multipart/form-data; boundary=b"),
        (jpeg_json(20), "application/json"),
    ):
        plain = client.post("/predict", content=body, headers={"Content-Type": kind})
        packed = client.post(
            "/predict", content=encode(body), headers={"Content-Type": kind, "Content-Encoding": coding}
        )

        assert packed.status_code == plain.status_code == 200
        assert packed.json() == plain.json()


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v2/repository/index"])
@pytest.mark.parametrize("name", STRICT)
def test_other_protocols_read_it_too(client: TestClient, name: str, path: str) -> None:
    coding, encode = CODERS[name]
    body = json.dumps({"input": f"data:image/png;base64,{EXAMPLE}"} if path == "/v1/embeddings" else {}).encode()

    plain = client.post(path, content=body)
    packed = client.post(path, content=encode(body), headers={"Content-Type": "image/png", "Content-Encoding": coding})

    assert packed.status_code == plain.status_code == 200
    assert packed.json() == plain.json()


def test_codings_on_top_of_each_other_are_undone_in_turn(client: TestClient) -> None:
    body = zstd.compress(brotli.compress(gzip.compress(png())))
    headers = [("Content-Type", "image/png"), ("Content-Encoding", "gzip, identity"), ("Content-Encoding", "br,zstd")]

    assert client.post("/predict", content=body, headers=headers).status_code == 200
    too_many = client.post(
        "/predict", content=body, headers={**dict(headers[:1]), "Content-Encoding": ", ".join(["gzip"] * 5)}
    )
    assert too_many.status_code == 415


def test_members_and_frames_behind_each_other_are_one_body(client: TestClient) -> None:
    image = png()
    for coding, encode in (("gzip", gzip.compress), ("zstd", zstd.compress)):
        body = encode(image[:50]) + encode(image[50:])
        headers = {"Content-Type": "image/png", "Content-Encoding": coding}

        assert client.post("/predict", content=body, headers=headers).status_code == 200
        many = client.post("/predict", content=encode(b"") * 2000, headers=headers)
        assert many.status_code == 422


@pytest.mark.parametrize("coding", ["compress", "gzip, lzma", "snappy", "aws-chunked", "utf-8"])
def test_another_coding_is_refused_with_those_that_are_read(client: TestClient, coding: str) -> None:
    response = client.post("/predict", content=png(), headers={"Content-Type": "image/png", "Content-Encoding": coding})

    assert response.status_code == 415
    assert response.headers["Accept-Encoding"] == "gzip, deflate, br, zstd"
    assert "send gzip, deflate, br, zstd, or the body as it is" in response.json()["detail"]
    assert response.json()["type"].endswith(":unsupported-content-encoding")


@pytest.mark.parametrize("name", STRICT)
@pytest.mark.parametrize("damage", ["garbage", "cut", "followed"])
def test_broken_content_is_said_to_be(client: TestClient, name: str, damage: str) -> None:
    coding, encode = CODERS[name]
    body = {"garbage": b"\xff\xd8 no such thing", "cut": encode(png())[:-5], "followed": encode(png()) + b"more"}[
        damage
    ]
    headers = {"Content-Type": "image/png", "Content-Encoding": coding}

    response = client.post("/predict", content=body, headers=headers)

    assert response.status_code == 422
    assert coding.lower().removeprefix("x-") in response.json()["detail"]


@pytest.mark.parametrize("name", STRICT)
def test_what_expands_beyond_the_limit_is_refused(make_client: MakeClient, name: str) -> None:
    coding, encode = CODERS[name]
    client = make_client(max_body_mb=0.5)
    bomb = encode(bytes(100_000_000))
    twice = gzip.compress(bomb)
    headers = {"Content-Type": "image/png"}

    assert client.post("/predict", content=bomb, headers={**headers, "Content-Encoding": coding}).status_code == 413
    response = client.post("/predict", content=twice, headers={**headers, "Content-Encoding": f"{coding}, gzip"})

    assert response.status_code == 413
    assert "PVT_MAX_BODY_MB" in response.json()["detail"]


def test_the_target_of_an_alias_may_be_compressed_too(make_client: MakeClient) -> None:
    """Within the limit of bodies, and with the words of the other endpoints."""
    client = make_client(management_keys=("boss",), max_body_mb=0.001)

    def put(body: bytes, coding: str) -> tuple[int, str]:
        headers = {"Authorization": "Bearer boss", "Content-Encoding": coding}
        response = client.put("/aliases/best", content=body, headers=headers)
        return response.status_code, response.json()["detail"]

    unknown = put(gzip.compress(b'{"model": "pvt_v2_b0.none"}'), "gzip")
    bomb = put(zstd.compress(b" " * 1_000_000), "zstd")
    other = put(b"{}", "compress")

    assert (unknown[0], "pvt_v2_b0.none" in unknown[1]) == (404, True)
    assert (bomb[0], "PVT_MAX_BODY_MB" in bomb[1]) == (413, True)
    assert (other[0], "content encoding 'compress'" in other[1]) == (415, True)

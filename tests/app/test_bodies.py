import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.bodies import EXAMPLE
from tests.app.conftest import MakeClient, png
from tests.app.test_forms import form


@pytest.fixture
def small(make_client: MakeClient) -> TestClient:
    """A service that takes bodies of up to 10 kB."""
    return make_client(max_body_mb=0.01)


def test_a_body_that_announces_too_much_is_refused_unread(small: TestClient) -> None:
    response = small.post("/predict", content=b"x" * 10_001, headers={"Content-Type": "image/png"})

    assert response.status_code == 413
    assert "larger than 0.01 MB, which PVT_MAX_BODY_MB allows" in response.json()["detail"]
    assert response.headers["Connection"] == "close"


def test_a_body_that_turns_out_too_large_is_refused(small: TestClient) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(11):
            yield b"x" * 1000

    response = small.post("/predict", content=chunks(), headers={"Content-Type": "image/png"})

    assert response.status_code == 413


TYPES = (
    "", "text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "application/binary", "binary/octet-stream",
    "image/", "image/*", "*/*", "IMAGE/PNG", "image/jpg; charset=binary", "nonsense", "image/png, image/png",
    "multipart/form-data", "multipart/form-data; boundary=other", "multipart/mixed; boundary=other",
    "application/json", "application/octet-stream", "text/html",
)  # fmt: skip


@pytest.mark.parametrize("content_type", TYPES)
@pytest.mark.parametrize("kind", ["raw", "JSON", "form", "indented JSON with a byte order mark"])
def test_a_body_that_begins_as_one_of_the_three_forms_is_read_whatever_its_content_type(
    client: TestClient, digits: Path, content_type: str, kind: str
) -> None:
    data = (digits / "seven.png").read_bytes()
    base64_image = base64.b64encode(data).decode()
    body = {
        "raw": data,
        "JSON": json.dumps({"images": [base64_image]}).encode(),
        "indented JSON with a byte order mark": json.dumps({"images": [base64_image]}, indent=4).encode("utf-8-sig"),
        "form": form(("image", "seven.png", data), boundary="xYz'()+_,-./:=?9"),
    }[kind]

    response = client.post("/predict", content=body, headers={"Content-Type": content_type})

    assert response.status_code == 200, response.text
    assert response.json()["results"][0]["predictions"][0]["label"] == "7"


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded", "nonsense", "a" * 500])
@pytest.mark.parametrize("body", [b"hello", b"image=iVBORw0KGgo", b"--", b"-- no form\n", b"\xff" * 200, b"\0"])
def test_a_body_of_no_form_is_told_what_to_type(client: TestClient, content_type: str, body: bytes) -> None:
    response = client.post("/predict", content=body, headers={"Content-Type": content_type})

    assert response.status_code == 415
    detail = response.json()["detail"]
    assert "multipart/form-data with a file field 'image' (curl -F image=@FILE)" in detail
    assert repr(content_type[:100] or "(none)") in detail


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded"])
def test_a_request_without_a_body_is_told_what_to_type(client: TestClient, content_type: str) -> None:
    response = client.post("/predict", headers={"Content-Type": content_type})

    assert response.status_code == 422
    assert response.json()["detail"].startswith("the request carries no image; send ")
    assert "curl --data-binary @FILE" in response.json()["detail"]


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/pdf"])
def test_a_file_of_another_kind_is_named_whatever_its_content_type(client: TestClient, content_type: str) -> None:
    response = client.post("/predict", content=b"%PDF-1.7\n", headers={"Content-Type": content_type})

    assert response.status_code == 422
    assert "PDF; render its page" in response.json()["detail"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("{", "the body is no JSON"),
        ("[]", "the body must be an object with a list of images"),
        ("{}", "the body must be an object with a list of images"),
        ('{"images": "abc"}', "the body must be an object with a list of images"),
        ('{"images": [1]}', "images.0 is no image"),
        ('{"images": [{}]}', "images.0 is no image"),
        ('{"images": ["", {"url": 1}]}', "images.1 is no image"),
        ('{"images": [{"url": "http://x", "headers": {}}]}', 'send a string, base64 or a data: URL, or {"url": "https'),
        ('{"images": [], "model": "x"}', "unknown field 'model'; parameters go in the query"),
        ('{"images": []}', "the request carries no image"),
        ('{"images": ["%%%"]}', "not valid base64, nor a data: URL"),
        ('{"images": ["data:image/png;base64,%"]}', "not valid base64, nor a data: URL"),
        ('{"images": ["http://example.org/cat.png"]}', "not valid base64, nor a data: URL"),
    ],
)
def test_a_wrong_json_body_says_what_is_wrong(client: TestClient, body: str, reason: str) -> None:
    response = client.post("/predict", content=body, headers={"Content-Type": "application/json"})

    assert response.status_code == 422
    assert reason in response.json()["detail"]


@pytest.mark.parametrize(
    "path",
    ["/v1/embeddings", "/v1/models/pvt_v2_b0.digits:predict", "/v2/models/pvt_v2_b0.digits/infer"],
)
@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"", "the request has no body"),
        (png(), "the body is a file's bytes"),
        (form(("image", "a.png", png())), "the body is a form"),
        (base64.b64encode(png()), "the body is a file's bytes"),
    ],
)
def test_an_endpoint_of_json_says_what_a_body_is_instead(client: TestClient, path: str, body: bytes, what: str) -> None:
    response = client.post(path, content=body)

    assert response.status_code == 400
    assert f"{what}, and this endpoint reads JSON" in response.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/predict", {"images": [EXAMPLE] * 3}),
        ("/v1/embeddings", {"input": [f"data:image/png;base64,{EXAMPLE}"] * 3}),
        ("/v1/models/pvt_v2_b0.digits:predict", {"instances": [EXAMPLE] * 3}),
        (
            "/v2/models/pvt_v2_b0.digits/infer",
            {"inputs": [{"name": "encoded", "datatype": "BYTES", "shape": [3], "data": [EXAMPLE] * 3}]},
        ),
    ],
)
def test_too_many_images_are_that_problem_in_every_protocol(
    make_client: MakeClient, path: str, body: object, capsys: pytest.CaptureFixture[str]
) -> None:
    response = make_client(max_images=2).post(path, json=body)

    assert response.status_code == (422 if path == "/predict" else 400)
    assert "PVT_MAX_IMAGES" in response.text
    line = capsys.readouterr().out  # the log has the problem of each protocol
    assert "Too many images" in line
    assert f"status={response.status_code}" in line
    if path == "/v1/embeddings":
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("too_many_images", "input")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "multipart body is broken"),
        (b"garbage", "multipart body is broken"),
        (b'--B\r\nContent-Disposition: form-data; name="image"\r\n\r\nabc', "multipart body is broken"),
        (b"--B\r\nContent-Type: image/png\r\n\r\nabc\r\n--B--\r\n", "broken"),
        (b"--B--\r\n", "the form has no file; send at least one in the field 'image': curl -F image=@FILE"),
        (b'--B\r\nContent-Disposition: form-data; name="file"\r\n\r\nabc\r\n--B--\r\n', "unknown form field 'file'"),
    ],
)
def test_a_wrong_form_says_what_is_wrong(client: TestClient, body: bytes, reason: str) -> None:
    response = client.post("/predict", content=body, headers={"Content-Type": "multipart/form-data; boundary=B"})

    assert response.status_code == 422
    assert reason in response.json()["detail"]


def test_file_names_in_any_script_come_back(client: TestClient) -> None:
    response = client.post("/predict", files={"image": ("été 数字.png", png())})

    assert response.json()["results"][0]["filename"] == "été 数字.png"


@pytest.mark.parametrize(
    "body",
    [
        '{"images": [' + "1," * 999_999 + "1]}",
        '{"images": [' + '"-",' * 999_999 + '"-"]}',
        '{"images": [], ' + ", ".join(f'"k{i}": 0' for i in range(100_000)) + "}",
        '{"' + "x" * 1_000_000 + '": 0, "images": []}',
        '{"images":' * 100_000,
    ],
    ids=["numbers", "strings", "fields", "long field", "deep"],
)
def test_a_large_wrong_json_body_gets_a_short_answer(client: TestClient, body: str) -> None:
    response = client.post("/predict", content=body, headers={"Content-Type": "application/json"})

    assert response.status_code == 422
    assert len(response.content) < 1000


def test_a_long_query_of_unknown_parameters_gets_a_short_answer(client: TestClient) -> None:
    response = client.post("/predict?" + "&".join(f"k{i}=1" for i in range(2000)), content=png())

    assert response.status_code == 422
    assert response.json()["detail"].endswith("; and 1995 more")


def test_the_schemas_example_is_an_image(client: TestClient) -> None:
    response = client.post("/predict", json={"images": [EXAMPLE]})

    assert "predictions" in response.json()["results"][0]

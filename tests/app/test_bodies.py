from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from app.bodies import EXAMPLE
from tests.app.conftest import MakeClient, png


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


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "", "image/", "nonsense"])
def test_another_content_type_is_told_the_three_that_are_read(client: TestClient, content_type: str) -> None:
    response = client.post("/predict", content=png(), headers={"Content-Type": content_type})

    assert response.status_code == 415
    assert "multipart/form-data with a file field 'image'" in response.json()["detail"]


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
    ("body", "reason"),
    [
        (b"", "multipart body is broken"),
        (b"garbage", "multipart body is broken"),
        (b'--B\r\nContent-Disposition: form-data; name="image"\r\n\r\nabc', "multipart body is broken"),
        (b"--B\r\nContent-Type: image/png\r\n\r\nabc\r\n--B--\r\n", "broken"),
        (b"--B--\r\n", "the form has no file"),
        (b'--B\r\nContent-Disposition: form-data; name="file"\r\n\r\nabc\r\n--B--\r\n', "unknown form field 'file'"),
    ],
)
def test_a_wrong_form_says_what_is_wrong(client: TestClient, body: bytes, reason: str) -> None:
    response = client.post("/predict", content=body, headers={"Content-Type": "multipart/form-data; boundary=B"})

    assert response.status_code == 422
    assert reason in response.json()["detail"]


def test_a_form_without_a_boundary_is_refused(client: TestClient) -> None:
    response = client.post("/predict", content=b"x", headers={"Content-Type": "multipart/form-data"})

    assert response.status_code == 422


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


def test_a_file_name_that_is_no_unicode_is_said_in_words(client: TestClient) -> None:
    head = b'--B\r\nContent-Disposition: form-data; name="image"; filename="\xff\xfe"\r\n\r\n'

    response = client.post("/predict", content=head + png() + b"\r\n--B--\r\n",
                           headers={"Content-Type": "multipart/form-data; boundary=B"})  # fmt: skip

    assert response.status_code == 422
    assert response.json()["detail"] == "the multipart body is broken: Segment header failed to decode"


def test_the_schemas_example_is_an_image(client: TestClient) -> None:
    response = client.post("/predict", json={"images": [EXAMPLE]})

    assert "predictions" in response.json()["results"][0]

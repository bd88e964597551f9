import base64
import re
import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from starlette.testclient import TestClient

from app.routes.images import PredictResponse
from service.errors import QueueFull
from tests.app.conftest import MakeClient, png
from training.digits import render, split


# At 224, where an image takes the most, every third: `python -m bench.accuracy` posts them all at each size.
@pytest.mark.parametrize(("size", "step"), [("64", 1), ("128", 2), ("224", 3)])
def test_ninety_eight_of_a_hundred_held_out_digits_are_read_through_http(
    client: TestClient, size: str, step: int
) -> None:
    pixels, labels = (each[::step] for each in split().held_out)

    found = [
        each["predictions"][0]["class_id"]
        for start in range(0, len(labels), 60)
        for each in client.post(
            "/predict",
            params={"size": size, "top_k": 1, "timeout_ms": 120_000},
            files=[("image", ("digit.png", posted(image))) for image in pixels[start : start + 60]],
        ).json()["results"]
    ]

    assert len(found) == len(labels) >= 120
    assert (np.array(found) == labels).mean() >= 0.98


def posted(pixels: NDArray[np.float64]) -> bytes:
    buffer = BytesIO()
    render(pixels).save(buffer, "png")
    return buffer.getvalue()


def test_a_file_in_a_form_is_answered_with_its_name_and_size(client: TestClient, digits: Path) -> None:
    response = client.post("/predict", files={"image": ("seven.png", (digits / "seven.png").read_bytes())})

    assert response.status_code == 200
    body = response.json()
    assert (body["model"], body["version"]) == ("pvt_v2_b0.digits", "1")
    (result,) = body["results"]
    assert (result["filename"], result["width"], result["height"]) == ("seven.png", 64, 64)
    best = result["predictions"][0]
    assert (best["class_id"], best["label"]) == (7, "7")
    assert len(result["predictions"]) == 5
    assert 0.5 < best["score"] <= 1


@pytest.mark.parametrize("content_type", ["image/png", "application/octet-stream", "image/x-whatever; charset=binary"])
def test_the_bytes_alone_are_answered(client: TestClient, digits: Path, content_type: str) -> None:
    data = (digits / "three.png").read_bytes()

    response = client.post("/predict", content=data, headers={"Content-Type": content_type})

    assert response.json()["results"][0]["predictions"][0]["label"] == "3"


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "data:;base64,"])
def test_base64_in_json_is_answered(client: TestClient, digits: Path, prefix: str) -> None:
    text = prefix + base64.b64encode((digits / "three.png").read_bytes()).decode()

    response = client.post("/predict", json={"images": [text]})

    assert response.json()["results"][0]["predictions"][0]["label"] == "3"


def test_a_large_json_body_is_answered_too(client: TestClient, digits: Path) -> None:
    text = base64.b64encode((digits / "three.png").read_bytes()).decode()

    response = client.post("/predict", content=f'{{"images": {" " * 100_000} ["{text}"]}}',
                           headers={"Content-Type": "application/json"})  # fmt: skip

    assert response.json()["results"][0]["predictions"][0]["label"] == "3"


def test_several_images_are_answered_in_their_order(client: TestClient, digits: Path) -> None:
    names = ["nine", "two", "two", "zero", "five"]

    response = client.post("/predict", files=[("image", (n, (digits / f"{n}.png").read_bytes())) for n in names])

    results = response.json()["results"]
    assert [result["filename"] for result in results] == names
    assert [result["predictions"][0]["label"] for result in results] == ["9", "2", "2", "0", "5"]


def test_a_bad_image_among_several_is_an_error_in_its_place(client: TestClient) -> None:
    files = [("image", ("a.png", png())), ("image", ("b.txt", b"no image")), ("image", ("c.png", png()))]

    response = client.post("/predict", files=files, headers={"X-Request-ID": "mine"})

    first, second, third = response.json()["results"]
    assert response.status_code == 200
    assert "predictions" in first
    assert "predictions" in third
    assert second["filename"] == "b.txt"
    assert second["error"]["type"] == "urn:pvt-serve:problem:invalid-image"
    assert (second["error"]["status"], second["error"]["request_id"]) == (422, "mine")


def test_a_header_that_lies_about_its_pixels_takes_no_time_from_the_others(client: TestClient) -> None:
    """How long an image may take is estimated by its pixels, and by those of images that were decoded before."""
    lying = png()[:16] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + png()[24:]
    files = [("image", png()), ("image", lying), ("image", png())]
    client.post("/predict", files=files[:1])

    results = client.post("/predict", files=files).json()["results"]

    assert ["predictions" in each for each in results] == [True, False, True]


@pytest.mark.parametrize("images", [[png()], [png(), b"no image", png()]])
def test_the_answer_is_what_the_schema_says(client: TestClient, images: list[bytes]) -> None:
    files = [("image", (f"{number} \N{SNOWMAN}.png", image)) for number, image in enumerate(images)]

    answer = client.post("/predict", files=files, params={"top_k": 1000})

    whole = PredictResponse.model_validate_json(answer.content)
    assert whole.model_dump(mode="json", exclude_unset=True) == answer.json()
    assert len(answer.json()["results"]) == len(images)


def test_broken_base64_among_several_is_an_error_in_its_place(client: TestClient) -> None:
    good = base64.b64encode(png()).decode()

    results = client.post("/predict", json={"images": [good, "%%%"]}).json()["results"]

    assert "predictions" in results[0]
    assert "not valid base64, nor a data: URL" in results[1]["error"]["detail"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "empty"),
        (b"no image", "not a supported image"),
        (png()[:60], "truncated"),
    ],
)
def test_one_bad_image_is_the_response(client: TestClient, body: bytes, reason: str) -> None:
    response = client.post("/predict", content=body, headers={"Content-Type": "image/png"})

    assert response.status_code == 422
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.json()["title"] == "Invalid image"
    assert reason in response.json()["detail"]


def test_top_k_bounds_the_classes(client: TestClient) -> None:
    def count(top_k: int) -> int:
        response = client.post(f"/predict?top_k={top_k}", content=png(), headers={"Content-Type": "image/png"})
        return len(response.json()["results"][0]["predictions"])

    assert [count(k) for k in (1, 10, 1000)] == [1, 10, 10]


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("top_k=0", "top_k: must be from 1 to 1000"),
        ("top_k=1001", "top_k: must be from 1 to 1000"),
        ("top_k=many", "top_k: Input should be a valid integer"),
        ("timeout_ms=0", "timeout_ms"),
        ("topk=3", "query topk: no such name; did you mean 'top_k'? there are model, size,"),
    ],
)
def test_a_wrong_parameter_is_named(client: TestClient, query: str, named: str) -> None:
    response = client.post(f"/predict?{query}", content=png(), headers={"Content-Type": "image/png"})

    assert response.status_code == 422
    assert named in response.json()["detail"]


def test_an_unknown_model_is_not_found(client: TestClient) -> None:
    response = client.post("/predict?model=pvt_v2_b0.digit", files={"image": png()})

    assert response.status_code == 404
    assert "did you mean 'pvt_v2_b0.digits'" in response.json()["detail"]


def test_a_variant_alone_finds_its_model(client: TestClient) -> None:
    response = client.post("/predict?model=pvt_v2_b0", files={"image": png()})

    assert response.json()["model"] == "pvt_v2_b0.digits"


def test_published_weights_that_are_not_here_are_unavailable(client: TestClient) -> None:
    response = client.post("/predict?model=pvt_v2_b2", files={"image": png()})

    assert response.status_code == 503
    assert response.json()["type"] == "urn:pvt-serve:problem:weights-unavailable"


def test_a_request_that_can_not_be_answered_in_time_is_504(client: TestClient) -> None:
    images = [("image", png(size=(3000, 3000)))] * 20

    response = client.post("/predict?timeout_ms=1", files=images)

    assert response.status_code == 504
    assert "no answer within 1 ms" in response.json()["detail"]


def test_the_answer_says_where_its_time_went(client: TestClient) -> None:
    response = client.post("/predict", files={"image": png()})

    parts = dict(re.findall(r"(\w+);dur=([\d.]+)", response.headers["Server-Timing"]))
    assert list(parts) == ["read", "wait", "decode", "queue", "infer", "encode", "total"]
    assert sum(float(ms) for name, ms in parts.items() if name != "total") <= float(parts["total"])


def test_the_answer_says_how_long_it_waited_for_the_model(make_client: MakeClient) -> None:
    client = make_client()

    cold, warm = (client.post("/predict", files={"image": png()}).headers["Server-Timing"] for _ in range(2))

    parts = {name: float(ms) for name, ms in re.findall(r"(\w+);dur=([\d.]+)", cold)}
    assert parts["load"] > 0.8 * parts["total"]
    assert "load" not in warm


def test_too_many_images_name_their_setting(make_client: MakeClient) -> None:
    client = make_client(max_images=2)

    response = client.post("/predict", files=[("image", png())] * 3)

    assert (response.status_code, response.json()["type"]) == (422, "urn:pvt-serve:problem:too-many-images")
    assert "more than 2 images in one request, which PVT_MAX_IMAGES allows" in response.json()["detail"]


def test_an_image_with_too_many_pixels_names_its_setting(make_client: MakeClient) -> None:
    client = make_client(max_image_megapixels=0.01)

    response = client.post("/predict", content=png(size=(200, 100)), headers={"Content-Type": "image/png"})

    assert response.status_code == 413
    assert "PVT_MAX_IMAGE_MEGAPIXELS" in response.json()["detail"]


def test_a_full_queue_is_429_with_a_time_to_come_back(make_client: MakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise QueueFull("the queue is full", retry_after_seconds=2.3)

    monkeypatch.setattr("service.scheduling.scheduler.Scheduler.reserve", full)

    response = make_client().post("/predict", files={"image": png()})

    assert response.status_code == 429
    assert response.headers["Retry-After"] == "3"


def test_more_images_than_the_queue_ever_takes_are_refused_for_good(make_client: MakeClient) -> None:
    response = make_client(queue_size=2).post("/predict", files=[("image", png())] * 3)

    assert response.status_code == 422
    assert "PVT_QUEUE_SIZE allows 2" in response.json()["detail"]


def test_both_backends_answer_over_http(make_client: MakeClient, digits: Path) -> None:
    client = make_client(backend="torch")

    response = client.post("/predict", files={"image": (digits / "four.png").read_bytes()})

    assert response.json()["results"][0]["predictions"][0]["label"] == "4"
    assert client.get("/models/pvt_v2_b0.digits").json()["backend"] == "torch"

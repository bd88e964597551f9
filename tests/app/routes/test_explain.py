import json
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from app.routes.images import ExplainResponse, ImageExplanation
from service.scheduling.scheduler import Scheduler
from tests.app.conftest import MakeClient, png

DIGITS = "0123456789"


def post(client: TestClient, *images: bytes, accept: str = "application/json", **query: Any) -> Any:
    files = [("image", (f"{i}.png", each)) for i, each in enumerate(images)]
    return client.post("/explain", files=files, params=query, headers={"Accept": accept})


def test_the_mean_of_the_map_and_the_bias_are_the_logit_at_any_size(make_client: MakeClient, digits: Path) -> None:
    client = make_client(backend="torch", precision="float32")
    images = [(digits / f"{name}.png").read_bytes() for name in ("seven", "two")]
    for size, shape in (("64", (2, 2)), ("96", (3, 3)), ("64x128", (2, 4))):
        body = ExplainResponse.model_validate(post(client, *images, size=size).json())

        assert body.size == tuple(32 * side for side in shape)
        for result in body.results:
            assert isinstance(result, ImageExplanation)
            heat = np.array(result.map)
            assert abs(heat.mean() + result.bias - result.logit) < 1e-4
            assert heat.shape == shape


def test_the_likeliest_class_is_explained_and_any_other_on_demand(client: TestClient, digits: Path) -> None:
    image = (digits / "seven.png").read_bytes()
    (likeliest,) = post(client, image).json()["results"]
    (other,) = post(client, image, class_id=3).json()["results"]

    assert (likeliest["class_id"], likeliest["label"], likeliest["filename"]) == (7, "7", "0.png")
    assert (other["class_id"], other["label"]) == (3, "3")
    assert likeliest["score"] > 0.5 > other["score"]
    assert likeliest["map"] != other["map"]


def test_npy_holds_the_maps_of_all_images(client: TestClient, digits: Path) -> None:
    images = [(digits / f"{name}.png").read_bytes() for name in ("one", "two", "three")]
    given = np.load(BytesIO(post(client, *images, accept="application/x-npy").content))
    told = post(client, *images).json()["results"]

    assert given.shape == (3, 4, 4)
    np.testing.assert_array_equal(given, np.array([each["map"] for each in told], np.float32))


def test_a_png_of_the_image_as_the_model_saw_it_is_the_default(client: TestClient, digits: Path) -> None:
    image = (digits / "seven.png").read_bytes()
    response = post(client, image, accept="*/*", alpha=0, size=64)

    assert response.headers["content-type"] == "image/png"
    shown = np.asarray(Image.open(BytesIO(response.content)))
    np.testing.assert_array_equal(shown, np.asarray(Image.open(BytesIO(image)).convert("RGB")))  # 64 x 64 as it is


@pytest.fixture
def explaining(model_store: Path, tmp_path: Path) -> Path:
    """A store with the embedded model, whose card has a size to explain at that is not its own."""
    shutil.copytree(model_store, tmp_path, dirs_exist_ok=True)
    card = tmp_path / "pvt_v2_b0.digits" / "1" / "card.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"explain_size": [64, 128]}))
    return tmp_path


def test_without_a_size_the_input_is_as_large_as_the_card_says_and_only_to_explain(
    make_client: MakeClient, explaining: Path, digits: Path
) -> None:
    client = make_client(model_store=explaining, backend="torch", precision="float32", max_batch_size=1)
    image = (digits / "two.png").read_bytes()
    sizes: list[dict[str, Any]] = [{}, {"size": "64x128"}, {"size": 64}]

    (default, named, own) = (post(client, image, **query).json() for query in sizes)
    others = [
        client.post(path, files={"image": image}, params=query)
        for path, query in (("/predict", {"top_k": 1}), ("/features", {"stages": 4}))
    ]
    card = client.get("/models/pvt_v2_b0.digits").json()

    assert (card["input_size"], card["explain_size"]) == ([64, 64], [64, 128])
    assert (default["size"], own["size"]) == ([64, 128], [64, 64])
    assert np.shape(default["results"][0]["map"]) == (2, 4)
    assert default["results"] == named["results"]
    (predicted,), (features,) = (response.json()["results"] for response in others)
    assert predicted["predictions"][0]["score"] == pytest.approx(own["results"][0]["score"], abs=1e-5)
    assert features["stages"]["4"]["shape"] == [256, 2, 2]


def test_what_waits_at_another_size_refuses_no_explanation(
    make_client: MakeClient, explaining: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes: list[object] = []
    monkeypatch.setattr(Scheduler, "refusal", lambda _, lane, *__, **___: lanes.append(lane))
    client = make_client(model_store=explaining, backend="torch", precision="float32", max_batch_size=1)

    for path in ("/predict", "/explain", "/explain", "/predict"):  # the first of each knows no queue
        client.post(path, files={"image": png()})

    of_explain, of_predict = lanes
    assert of_explain is not of_predict


def test_a_card_does_not_get_past_the_largest_side(make_client: MakeClient, explaining: Path) -> None:
    client = make_client(
        model_store=explaining, backend="torch", precision="float32", max_batch_size=1, max_input_side=96
    )

    assert post(client, png()).json()["size"] == [64, 64]


def test_several_images_can_not_be_one_png(client: TestClient) -> None:
    response = post(client, png(), b"never looked at", accept="image/png")

    assert response.status_code == 422
    assert (
        "image/png shows one image and the request has 2; send one, or accept application/json"
        in response.json()["detail"]
    )


def test_a_class_out_of_range_is_told_the_range(client: TestClient) -> None:
    for accept in ("image/png", "application/json", "application/x-npy"):
        response = post(client, png(), class_id=10, accept=accept)
        assert response.status_code == 422
        assert response.json()["detail"] == "class_id 10: 'pvt_v2_b0.digits' has the classes 0 to 9"
    assert post(client, png(), class_id=-1).status_code == 422
    for alpha, told in (("1.5", "must be from 0 to 1"), ("-0.1", "must be from 0 to 1"), ("nan", "a finite number"),
                        ("inf", "a finite number")):  # fmt: skip
        detail = post(client, png(), alpha=alpha).json()["detail"]
        assert detail.startswith("query alpha: ")
        assert told in detail


def test_a_bad_image_fails_alone_in_json_and_alone_it_is_the_response(client: TestClient) -> None:
    good, bad = post(client, png(), b"none").json()["results"]

    assert "map" in good
    assert bad["error"]["status"] == 422
    for accept in ("image/png", "application/json", "application/x-npy"):
        assert post(client, b"none", accept=accept).status_code == 422


def test_the_crop_lies_in_the_upright_image(client: TestClient) -> None:
    (found,) = post(client, png(size=(600, 300))).json()["results"]

    assert (found["width"], found["height"]) == (600, 300)
    crop = found["crop"]
    assert [crop[side] for side in ("left", "top", "right", "bottom")] == pytest.approx([150, 0, 450, 300], abs=5)


def test_a_png_is_enlarged_to_the_side_that_is_wanted(make_client: MakeClient, digits: Path) -> None:
    client = make_client(backend="torch", precision="float32", max_batch_size=1)
    image = (digits / "seven.png").read_bytes()

    stamp, large = (Image.open(BytesIO(post(client, image, accept="image/png", size="64x128", **query).content))
                    for query in ({}, {"output_size": 512}))  # fmt: skip

    assert (stamp.size, large.size) == ((128, 64), (512, 256))
    back = np.asarray(large.resize(stamp.size, Image.Resampling.BOX), float)
    assert np.abs(back - np.asarray(stamp, float)).mean() < 6
    response = post(client, image, accept="image/png", output_size=5000)
    assert (response.status_code, response.json()["detail"]) == (422, "query output_size: must be from 1 to 2048")


def test_a_png_comes_first_in_the_docs_as_it_does_without_an_accept(client: TestClient) -> None:
    responses = client.get("/openapi.json").json()["paths"]["/explain"]["post"]["responses"]

    assert next(iter(responses["200"]["content"])) == "image/png"

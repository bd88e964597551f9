"""Against the service itself, in a process of its own."""

from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from pvt_client import InvalidImage, InvalidRequest, ModelNotFound, Prediction, TimedOut
from tests.pvt_client.conftest import CallMethod


def test_an_image_in_every_form_is_the_same_digit(call: CallMethod, service_url: str, digits: Path) -> None:
    path = digits / "seven.png"
    with path.open("rb") as file, Image.open(path) as image:
        forms: list[Any] = [path, str(path), path.read_bytes(), file, image, np.asarray(image)]
        found = [call(service_url, "predict", form, top_k=1) for form in forms]

    assert {each.best.label for each in found} == {"7"}
    assert {each.best.score for each in found} == {found[0].best.score}
    assert (found[0].filename, found[0].width, found[0].model) == ("seven.png", 64, "pvt_v2_b0.digits")


def test_several_in_one_request_keep_their_order_and_errors(call: CallMethod, service_url: str, digits: Path) -> None:
    one, bad, two = call(service_url, "predict", [digits / "one.png", b"not an image", digits / "two.png"])

    assert (one.best.label, type(bad), two.best.label) == ("1", InvalidImage, "2")
    assert bad.request_id


def test_many_digits_are_what_they_are_called(call: CallMethod, service_url: str, digits: Path) -> None:
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    found = call(service_url, "predict_many", (digits / f"{name}.png" for name in names), concurrency=3)

    assert [result.best.label for _, result in found if isinstance(result, Prediction)] == [*"0123456789"]


def test_models_and_health_are_reported(call: CallMethod, service_url: str) -> None:
    model, *_ = call(service_url, "models")

    assert model == call(service_url, "model", "pvt_v2_b0")
    assert (model.default, model.details["num_classes"]) == (True, 10)
    assert call(service_url, "health").ready


def test_refusals_are_typed(call: CallMethod, service_url: str, digits: Path) -> None:
    image = digits / "one.png"
    with pytest.raises(InvalidRequest, match="top_k") as caught:
        call(service_url, "predict", image, top_k=0)
    with pytest.raises(ModelNotFound):
        call(service_url, "model", "../secret")
    with pytest.raises(InvalidImage):
        call(service_url, "predict", b"")
    with pytest.raises(TimedOut):
        call(service_url, "predict", image, client={"timeout": 0.0001})

    error = caught.value
    assert (error.type, error.title, error.status) == ("urn:pvt-serve:problem:invalid-request", "Invalid request", 422)
    assert error.request_id


def test_features_are_the_arrays_of_the_json_form(call: CallMethod, service_url: str, digits: Path) -> None:
    image = digits / "one.png"
    features = call(service_url, "features", image, stages=[1, 4], pool="none")
    parsed = httpx.post(
        f"{service_url}/features", params={"stages": "1,4"}, content=image.read_bytes(),
        headers={"Content-Type": "image/png"},
    ).json()["results"][0]  # fmt: skip

    assert np.array_equal(features.embedding, np.array(parsed["embedding"], np.float32))
    for number, stage in features.stages.items():
        data = parsed["stages"][str(number)]
        assert np.array_equal(stage, np.array(data["data"], np.float32).reshape(data["shape"]))
    assert (features.model, features.version) == ("pvt_v2_b0.digits", "1")


def test_features_of_several_are_stacked_and_one_bad_image_fails_them(
    call: CallMethod, service_url: str, digits: Path
) -> None:
    options: dict[str, Any] = {"stages": [3], "pool": "avg", "normalize": True, "dtype": "float16", "size": (64, 96)}
    features = call(service_url, "features", [digits / "one.png", digits / "two.png"], **options)

    assert (features.embedding.shape, features.stages[3].shape) == ((2, 256), (2, 160))
    assert features.embedding.dtype == np.float16
    assert np.linalg.norm(features.embedding.astype(np.float32), axis=1) == pytest.approx(np.ones(2), abs=1e-3)
    with pytest.raises(InvalidRequest, match="image 2"):
        call(service_url, "features", [digits / "one.png", b"not an image"])


def test_the_mean_of_an_explanation_and_its_bias_are_the_logit(
    call: CallMethod, service_url: str, digits: Path
) -> None:
    found = call(service_url, "explain_map", digits / "one.png", class_id=7)
    png = call(service_url, "explain", digits / "one.png", class_id=7, alpha=0.3)

    assert float(found.map.mean() + found.bias) == pytest.approx(found.logit, abs=1e-4)
    assert (found.label, found.filename, found.map.shape) == ("7", "one.png", (2, 2))
    with Image.open(BytesIO(png)) as image:
        assert (image.format, image.size) == ("PNG", (64, 64))

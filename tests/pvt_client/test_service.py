"""Against the service itself, in a process of its own."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from pvt_client import (
    ImageTooLarge,
    InvalidImage,
    InvalidRequest,
    ModelNotFound,
    Prediction,
    PvtError,
    Retries,
    TimedOut,
)
from tests.app.processes import serving
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
    assert found.crop == (0, 0, 64, 64)
    png = call(service_url, "explain", digits / "one.png", class_id=7, alpha=0.3)

    assert float(found.map.mean() + found.bias) == pytest.approx(found.logit, abs=1e-4)
    assert (found.label, found.filename, found.map.shape) == ("7", "one.png", (4, 4))
    with Image.open(BytesIO(png)) as image:
        assert (image.format, image.size) == ("PNG", (128, 128))


NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def narrow_url() -> Iterator[str]:
    """A service that takes three images or 20 kB in a request, and four images in its queue."""
    with serving(
        read_log=False, backend="torch", instances="1", max_batch_size="1", max_images="3", max_body_mb="0.02",
        queue_size="4",
    ) as server:  # fmt: skip
        yield server.url


@pytest.mark.parametrize("method", ["predict_many", "features_many", "embedding_many"])
def test_a_service_with_low_limits_gets_every_image(
    call: CallMethod, narrow_url: str, service_url: str, digits: Path, method: str
) -> None:
    rng = np.random.default_rng(0)
    images: list[Any] = [digits / f"{name}.png" for name in NAMES] * 4
    images[11] = b"not an image"
    images[22] = rng.integers(0, 256, (64, 64, 3), np.uint8)  # 12 kB, so two of them are too large together
    images[23] = images[22][::-1]
    images[33] = rng.integers(0, 256, (100, 100, 3), np.uint8)  # 30 kB
    patient = {"retries": Retries(attempts=30)}
    found = [result for _, result in call(narrow_url, method, images, concurrency=2, client=patient)]
    expected = [result for _, result in call(service_url, method, images, concurrency=2)]

    errors = {index: type(each) for index, each in enumerate(found) if isinstance(each, PvtError)}
    assert errors == {11: InvalidImage, 33: ImageTooLarge}
    if method == "predict_many":
        assert [found[i].best.label for i in (0, 9, 10, 39)] == ["0", "9", "0", "9"]
        assert [each for i, each in enumerate(found) if i not in errors] == [
            each for i, each in enumerate(expected) if i not in errors
        ]


def test_a_list_of_more_images_than_the_service_takes(call: CallMethod, service_url: str, digits: Path) -> None:
    found = call(service_url, "predict", [digits / f"{name}.png" for name in NAMES] * 10)

    assert "".join(each.best.label for each in found) == "0123456789" * 10


def test_a_batch_has_an_answer_for_each_image(call: CallMethod, service_url: str, digits: Path) -> None:
    batch = np.stack([np.asarray(Image.open(digits / f"{name}.png").convert("RGB")) for name in NAMES])
    tensor = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255

    for images in (batch, tensor):
        assert [each.best.label for each in call(service_url, "predict", images)] == [*"0123456789"]
        assert call(service_url, "features", images).embedding.shape == (10, 256)
        assert call(service_url, "embed", images).shape == (10, 256)


def test_embeddings_are_those_of_features_one_by_one(call: CallMethod, service_url: str, digits: Path) -> None:
    paths = [digits / f"{name}.png" for name in NAMES] * 3
    table = call(service_url, "embed", paths, normalize=True)
    single = [call(service_url, "features", path, normalize=True).embedding for path in paths[:10]]

    assert np.allclose(table, np.concatenate([single] * 3), atol=1e-5)


def test_answers_have_their_request_s_id_and_times(call: CallMethod, service_url: str, digits: Path) -> None:
    one = call(service_url, "predict", digits / "one.png")
    several = call(service_url, "predict", [digits / "one.png", digits / "two.png"])

    assert one.request_id
    assert one.request_id != several[0].request_id == several[1].request_id
    assert {"decode", "queue", "infer", "total"} <= {*one.timing_ms}
    assert 0 < one.timing_ms["infer"] < one.timing_ms["total"]


def test_a_model_has_labels_where_the_service_says_them(call: CallMethod, service_url: str) -> None:
    assert call(service_url, "model", "pvt_v2_b0.digits").labels == tuple("0123456789")
    with pytest.raises(LookupError, match=r"model\('pvt_v2_b0.digits'\) has them"):
        _ = call(service_url, "models")[0].labels

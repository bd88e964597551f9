from io import BytesIO
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from starlette.testclient import TestClient

from app.routes.images import FeaturesResponse
from tests.app.conftest import png
from tests.service.stores import add_model

IMAGES = [("image", ("red.png", png("red"))), ("image", ("blue.png", png("blue", (20, 50))))]
NPY, NPZ, SAFETENSORS = "application/x-npy", "application/x-npz", "application/vnd.safetensors"


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Posts images to a service with a small model."""
    from app.main import create_app  # noqa: PLC0415
    from app.settings import Settings  # noqa: PLC0415

    root = tmp_path_factory.mktemp("store")
    add_model(root)
    settings = Settings(
        model_store=root,
        default_model="pvt_v2_b0.tiny",
        backend="torch",
        precision="float32",
        max_input_side=96,
        max_maps_mb=2,
    )
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:

        def post(files: Any = None, *, accept: str = "*/*", **query: Any) -> Any:
            return client.post("/features", files=files or IMAGES, params=query, headers={"Accept": accept})

        yield post


def arrays(response: Any) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    kind, data = response.headers["content-type"], BytesIO(response.content)
    if kind == NPY:
        return {"array": np.load(data)}
    return dict(np.load(data)) if kind == NPZ else dict(safetensors.numpy.load(response.content))


def test_json_has_the_embedding_of_each_image(features: Any) -> None:
    response = features()

    body = FeaturesResponse.model_validate(response.json())
    assert (body.model, body.version, response.headers["content-type"]) == ("pvt_v2_b0.tiny", "1", "application/json")
    assert [(each.filename, each.width, each.height) for each in body.results] == [  # type: ignore[union-attr]
        ("red.png", 40, 30),
        ("blue.png", 20, 50),
    ]
    assert [len(each.embedding) for each in body.results] == [256, 256]  # type: ignore[union-attr, arg-type]
    assert "encode;dur=" in response.headers["server-timing"]


@pytest.mark.parametrize("form", [NPZ, SAFETENSORS])
def test_every_form_has_the_same_numbers(features: Any, form: str) -> None:
    told = features(stages="1,4").json()["results"]
    binary = arrays(features(stages="1,4", accept=form))

    assert {name: each.shape for name, each in binary.items()} == {
        "embedding": (2, 256), "stage1": (2, 32, 8, 8), "stage4": (2, 256, 1, 1),
    }  # fmt: skip
    for i, each in enumerate(told):
        np.testing.assert_array_equal(np.float32(each["embedding"]), binary["embedding"][i])
        for stage in ("1", "4"):
            flat = np.float32(each["stages"][stage]["data"])
            np.testing.assert_array_equal(flat.reshape(each["stages"][stage]["shape"]), binary[f"stage{stage}"][i])


def test_safetensors_say_which_model_they_are_of(features: Any) -> None:
    content = features(accept=SAFETENSORS).content

    assert b'"model":"pvt_v2_b0.tiny"' in content[:300]


def test_the_embedding_is_the_mean_of_the_last_stage(features: Any) -> None:
    maps = arrays(features(stages="4", size="64x96", accept=NPZ))
    pooled = arrays(features(stages="4", size="64x96", pool="avg", accept=NPZ))

    assert maps["stage4"].shape == (2, 256, 2, 3)
    np.testing.assert_allclose(maps["stage4"].mean(axis=(2, 3)), maps["embedding"], atol=1e-6)
    np.testing.assert_allclose(pooled["stage4"], pooled["embedding"], atol=1e-6)


def test_normalized_vectors_have_length_one(features: Any) -> None:
    given = arrays(features(stages="2", normalize="true", accept=NPZ))

    np.testing.assert_allclose(np.linalg.norm(given["embedding"], axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(given["stage2"], axis=1), 1, atol=1e-6)


def test_float16_halves_the_bytes(features: Any) -> None:
    whole, half = features(accept=NPY), features(accept=NPY, dtype="float16")

    assert arrays(half)["array"].dtype == np.float16
    np.testing.assert_allclose(arrays(half)["array"], arrays(whole)["array"], atol=2e-3, rtol=1e-3)
    assert len(whole.content) - len(half.content) == 2 * 256 * 2
    assert features(dtype="float16").json()["results"][0]["embedding"][0] == pytest.approx(
        float(arrays(half)["array"][0, 0]), abs=1e-3
    )


def test_npy_holds_one_array_and_says_what_to_ask_for_instead_of_two(features: Any) -> None:
    alone = arrays(features(stages="3", embedding="false", accept=NPY))["array"]
    refused = features(stages="3", accept=NPY)

    assert alone.shape == (2, 160, 2, 2)
    assert refused.status_code == 422
    assert "holds one array, and embedding, stage3 were requested; accept application/x-npz" in refused.json()["detail"]


def test_a_bad_image_is_an_error_in_its_place_in_json_and_fails_the_binary_forms(features: Any) -> None:
    files = [IMAGES[0], ("image", ("none.png", b"none"))]
    told, refused = features(files), features(files, accept=NPZ)

    good, bad = told.json()["results"]
    assert len(good["embedding"]) == 256
    assert (bad["filename"], bad["error"]["status"]) == ("none.png", 422)
    assert refused.status_code == 422
    assert refused.json()["detail"].startswith("image 2 ('none.png'): not a supported image")
    assert "holds all images or none, application/json answers the others" in refused.json()["detail"]


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ({"stages": "5"}, "stages: Value error, must be different numbers from 1 to 4"),
        ({"stages": "1,1"}, "must be different numbers from 1 to 4"),
        ({"stages": "1;2"}, "must be different numbers from 1 to 4"),
        ({"pool": "max"}, "pool: Input should be 'avg' or 'none'"),
        ({"dtype": "int8"}, "dtype: Input should be 'float32' or 'float16'"),
        ({"embedding": "false"}, "nothing is left to answer with"),
        ({"size": "33"}, "size 33x33: each side must be a multiple of 32, up to PVT_MAX_INPUT_SIDE"),
        ({"size": "128"}, "size 128x128: PVT_MAX_INPUT_SIDE allows sides of up to 96 pixels"),
        ({"size": "large"}, "must be a side in pixels, such as 224, or height and width, such as 256x384"),
        ({"size": "0"}, "must be a side in pixels"),
        ({"topk": "3"}, "topk: no such name; there are model, size, timeout_ms"),
    ],
)
def test_what_is_wrong_with_a_parameter_is_named(features: Any, query: dict[str, str], told: str) -> None:
    response = features(**query)

    assert response.status_code == 422
    assert told in response.json()["detail"]


def test_a_form_that_there_is_not_is_refused_with_those_that_there_are(features: Any) -> None:
    response = features(accept="image/png")

    assert response.status_code == 406
    assert response.json()["type"] == "urn:pvt-serve:problem:not-acceptable"
    assert f"responds with application/json, {NPZ}, {SAFETENSORS}, {NPY}" in response.json()["detail"]


def test_stage_maps_that_would_take_too_much_memory_are_refused(features: Any) -> None:
    # A image's maps at 96x96 hold 32*24*24 + 64*12*12 + 160*6*6 + 256*3*3 numbers, 143 kB: 14 of them fit into 2 MB.
    files = [("image", png())] * 15
    refused, answered = features(files, stages="1", pool="avg", size="96"), features(files[:14], stages="1", size="96")

    assert refused.status_code == 422
    assert refused.json()["detail"] == (
        "the stage maps of 15 images at 96x96 take 2.1 MB, PVT_MAX_MAPS_MB allows 2; send 14 images a request at "
        "the most, or ask for a smaller size"
    )
    assert answered.status_code == 200
    assert features(files, size="96").status_code == 200  # without maps there is nothing to be bounded


def test_a_large_answer_comes_in_pieces_and_is_whole(features: Any) -> None:
    files = [("image", (f"{i}.png", png())) for i in range(13)] + [("image", ("none.png", b"none"))]
    response = features(files[3:], stages="1,2", size="96")

    *good, bad = response.json()["results"]
    assert "content-length" not in response.headers
    assert len(response.content) > 2_000_000
    assert [(each["filename"], each["stages"]["1"]["shape"]) for each in good] == [
        (f"{i}.png", [32, 24, 24]) for i in range(3, 13)
    ]
    assert len(good[0]["stages"]["1"]["data"]) == 32 * 24 * 24
    assert bad["error"]["status"] == 422
    assert FeaturesResponse.model_validate(response.json()).size == (96, 96)

"""Against Triton's own client, unchanged, and by hand where that client can't go wrong."""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from starlette.testclient import TestClient
from tritonclient.utils import InferenceServerException

from app.open_inference.messages import HEADER_LENGTH
from tests.app.conftest import MakeClient
from tests.app.processes import serving
from tests.service.stores import add_model

MODEL = "pvt_v2_b0.digits"
NAMES = ("zero", "seven", "three")
AT_ONCE = 8


@pytest.fixture(scope="module")
def server() -> Iterator[triton.InferenceServerClient]:
    with (
        serving(timeout_ms="120000", backend="torch", precision="float32") as process,
        # A connection for each request that waits: an answer keeps its own until it is read, which may be in any order.
        triton.InferenceServerClient(process.url.removeprefix("http://"), concurrency=AT_ONCE) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def files(digits: Path) -> list[bytes]:
    return [(digits / f"{name}.png").read_bytes() for name in NAMES]


def encoded(files: list[bytes]) -> Any:
    tensor = triton.InferInput("encoded", [len(files)], "BYTES")
    tensor.set_data_from_numpy(np.array(files, dtype=np.object_), binary_data=True)
    return tensor


def pixels(count: int = 2, *, binary: bool = True, side: int = 64) -> tuple[Any, Any]:
    array = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    tensor = triton.InferInput("images", list(array.shape), "UINT8")
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor, array


def test_server_and_models_say_what_they_are(server: Any) -> None:
    assert server.is_server_live()
    assert server.is_server_ready()
    assert server.is_model_ready(MODEL)
    assert not server.is_model_ready("pvt_v2_b0.none")
    metadata = server.get_server_metadata()
    assert (metadata["name"], metadata["extensions"]) == (
        "pvt-serve",
        ["binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics"],
    )  # fmt: skip
    model = server.get_model_metadata(MODEL)
    assert (model["name"], model["versions"]) == (MODEL, ["1"])
    assert model["inputs"] == [
        {"name": "images", "datatype": "UINT8", "shape": [-1, 64, 64, 3]},
        {"name": "encoded", "datatype": "BYTES", "shape": [-1]},
    ]
    shapes = {each["name"]: each["shape"] for each in model["outputs"]}
    assert (shapes["probabilities"], shapes["embedding"], shapes["stage3"]) == ([-1, 10], [-1, 256], [-1, 160, 4, 4])


def test_a_models_configuration_is_what_its_metadata_says(server: Any) -> None:
    config, metadata = server.get_model_config(MODEL, "1"), server.get_model_metadata(MODEL, "1")

    assert (config["name"], config["max_batch_size"]) == (MODEL, 0)
    for tensors, told in ((config["input"], metadata["inputs"]), (config["output"], metadata["outputs"])):
        assert [(each["name"], each["dims"]) for each in tensors] == [(each["name"], each["shape"]) for each in told]
    assert [each["data_type"] for each in config["input"]] == ["TYPE_UINT8", "TYPE_STRING"]


def test_encoded_images_are_classified(server: Any, files: list[bytes]) -> None:
    answer = server.infer(MODEL, [encoded(files)], request_id="mine")

    assert answer.as_numpy("probabilities").argmax(axis=1).tolist() == [0, 7, 3]
    np.testing.assert_allclose(answer.as_numpy("probabilities").sum(axis=1), 1, atol=1e-5)
    assert answer.as_numpy("embedding").shape == (3, 256)
    assert answer.as_numpy("stage1") is None
    told = answer.get_response()
    assert (told["model_name"], told["model_version"], told["id"]) == (MODEL, "1", "mine")


def test_what_the_metadata_promises_comes(server: Any) -> None:
    outputs = [each["name"] for each in server.get_model_metadata(MODEL)["outputs"]]
    answer = server.infer(MODEL, [pixels()[0]], outputs=[triton.InferRequestedOutput(name) for name in outputs])

    for each in server.get_model_metadata(MODEL)["outputs"]:
        given = answer.as_numpy(each["name"])
        assert given.dtype == np.float32
        assert list(given.shape) == [2, *each["shape"][1:]]
    np.testing.assert_allclose(answer.as_numpy("stage4").mean(axis=(2, 3)), answer.as_numpy("embedding"), atol=1e-4)


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_json_and_bytes_hold_the_same_numbers(server: Any, binary_in: bool, binary_out: bool) -> None:
    outputs = [triton.InferRequestedOutput(name, binary_data=binary_out) for name in ("logits", "stage4")]
    expected = server.infer(
        MODEL, [pixels()[0]], outputs=[triton.InferRequestedOutput(n) for n in ("logits", "stage4")]
    )
    answer = server.infer(MODEL, [pixels(binary=binary_in)[0]], outputs=outputs)

    for name in ("logits", "stage4"):
        np.testing.assert_array_equal(answer.as_numpy(name), expected.as_numpy(name))
        assert ("data" in answer.get_output(name)) is not binary_out


@pytest.mark.parametrize("binary", [True, False])
def test_classes_come_as_value_index_and_label(server: Any, files: list[bytes], binary: bool) -> None:
    output = triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=2)
    classes = server.infer(MODEL, [encoded(files)], outputs=[output]).as_numpy("probabilities")

    assert classes.shape == (3, 2)
    best = [each.decode() if isinstance(each, bytes) else each for each in classes[:, 0]]
    assert [each.split(":")[1:] for each in best] == [["0", "0"], ["7", "7"], ["3", "3"]]
    assert all(float(each.split(":")[0]) > 0.5 for each in best)


def test_any_input_size_is_taken_from_the_tensor(server: Any) -> None:
    answer = server.infer(MODEL, [pixels(side=96)[0]], outputs=[triton.InferRequestedOutput("stage4")])

    assert answer.as_numpy("stage4").shape == (2, 256, 3, 3)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_bodies_may_be_compressed_both_ways(server: Any, algorithm: str) -> None:
    tensor, _ = pixels()
    plain = server.infer(MODEL, [tensor])
    compressed = server.infer(
        MODEL, [tensor], request_compression_algorithm=algorithm, response_compression_algorithm=algorithm
    )

    np.testing.assert_array_equal(compressed.as_numpy("logits"), plain.as_numpy("logits"))


def test_a_version_may_be_named(server: Any) -> None:
    assert server.is_model_ready(MODEL, "1")
    assert server.infer(MODEL, [pixels()[0]], model_version="1").get_response()["model_version"] == "1"
    assert not server.is_model_ready(MODEL, "2")


def test_many_requests_at_once_are_answered_each_with_its_own(server: Any) -> None:
    waiting = [server.async_infer(MODEL, [pixels()[0]], request_id=str(i)) for i in range(AT_ONCE)]

    assert [each.get_result().get_response()["id"] for each in waiting] == [str(i) for i in range(AT_ONCE)]


def test_what_is_wrong_is_told_in_the_protocols_form(server: Any, files: list[bytes]) -> None:
    def refused(inputs: list[Any], model: str = MODEL, **options: Any) -> tuple[str, str]:
        with pytest.raises(InferenceServerException) as raised:
            server.infer(model, inputs, **options)
        return raised.value.status(), raised.value.message()

    flat = triton.InferInput("images", [64, 64, 3], "UINT8")
    flat.set_data_from_numpy(np.zeros((64, 64, 3), np.uint8))
    floats = triton.InferInput("images", [1, 64, 64, 3], "FP32")
    floats.set_data_from_numpy(np.zeros((1, 64, 64, 3), np.float32))
    other = triton.InferInput("pixel_values", [1, 64, 64, 3], "UINT8")
    other.set_data_from_numpy(np.zeros((1, 64, 64, 3), np.uint8))
    stage = triton.InferRequestedOutput("stage1", class_count=3)

    assert refused([flat]) == (
        "400",
        "input 'images' has the shape [64, 64, 3]; expected [n, height, width, 3], n at least 1",
    )
    assert refused([floats]) == ("400", "input 'images' is FP32; expected UINT8")
    assert refused([other]) == ("400", "input 'pixel_values': a model takes 'images' or 'encoded'")
    assert refused([pixels(side=50)[0]])[0] == "400"
    assert "multiple of 32" in refused([pixels(side=50)[0]])[1]
    assert refused([encoded([files[0], b"none"])])[1].startswith("image 2: not a supported image")
    assert refused([pixels()[0]], outputs=[stage])[1].startswith("output 'stage1' has no classes")
    assert (
        "the outputs of a model are probabilities"
        in refused([pixels()[0]], outputs=[triton.InferRequestedOutput("x")])[1]
    )
    assert refused([pixels()[0]], model="pvt_v2_b0.none")[0] == "404"
    assert refused([pixels()[0]], model="pvt_v2_b5")[0] == "503"
    assert refused([pixels()[0], pixels()[0]])[1].startswith("inputs: List should have at most 1 item")
    assert refused([pixels()[0]], timeout=1)[0] == "504"


def infer(client: TestClient, body: Any = None, **options: Any) -> Any:
    return client.post(f"/v2/models/{MODEL}/infer", json=body, **options)


IMAGE = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3]}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, "inputs: Field required"),
        ([], "the body: Input should be"),
        ({"inputs": []}, "inputs: List should have at least 1 item"),
        ({"inputs": [IMAGE]}, "must have either data in JSON, or binary_data_size"),
        ({"inputs": [IMAGE | {"data": [1, 2]}]}, "has 2 elements; its shape [1, 32, 32, 3] says 3072"),
        ({"inputs": [IMAGE | {"data": [256] * 3072}]}, "whole numbers from 0 to 255 (values from 256 to 256)"),
        ({"inputs": [IMAGE | {"data": [-1] * 3072}]}, "whole numbers from 0 to 255 (values from -1 to -1)"),
        ({"inputs": [IMAGE | {"data": [0.5] * 3072}]}, "whole numbers from 0 to 255 ('.' among them)"),
        ({"inputs": [IMAGE | {"data": ["a"] * 3072}]}, "whole numbers from 0 to 255"),
        ({"inputs": [IMAGE | {"data": [[1], [1, 2]]}]}, "a flat list, or lists nested as its shape [1, 32, 32, 3] is"),
        ({"inputs": [IMAGE | {"data": [[0] * 3072]}]}, "a flat list, or lists nested"),
        ({"inputs": [IMAGE | {"data": [0, *[True] * 3071]}]}, "whole numbers from 0 to 255 ('t' among them)"),
        ({"inputs": [IMAGE | {"data": [None]}]}, "whole numbers from 0 to 255"),
        ({"inputs": [IMAGE | {"data": [0] * 3072, "parameters": {"binary_data_size": 1}}]}, "either data in JSON, or"),
        ({"inputs": [{**IMAGE, "datatype": "FP32"}]}, "either data in JSON"),
        ({"inputs": [IMAGE | {"datatype": "FP32", "data": [0.5] * 3072}]}, "is FP32; expected UINT8"),
        ({"inputs": [IMAGE | {"shape": [65, 32, 32, 3], "data": []}]}, "holds 65 images; PVT_MAX_IMAGES allows 64"),
        ({"inputs": [1] * 30_000}, "29999 commas, so many values; 20000 are allowed"),
        ({"inputs": [IMAGE | {"data": []}], "outputs": [{}] * 9}, "outputs: List should have at most 7 items"),
        ({"inputs": [{"name": "encoded", "datatype": "BYTES", "shape": [1], "data": [["a"]]}]}, "a string of base64"),
        ({"inputs": [IMAGE | {"data": [10**30] * 3072}]}, "whole numbers from 0 to 255"),
        ({"inputs": [IMAGE | {"shape": [10**9] * 4, "data": []}]}, "expected [n, height, width, 3]"),
        ({"inputs": [IMAGE | {"shape": [10**9] * 3 + [3], "data": []}]}, "holds 1000000000 images"),
        ({"inputs": [IMAGE | {"shape": [1, 10**9, 10**9, 3], "data": []}]}, "has 0 elements"),
        ({"inputs": [IMAGE | {"shape": [1, 10**9, 10**9, 3], "data": [1]}]}, "has 1 elements"),
        ({"inputs": [IMAGE | {"shape": [-1, 32, 32, 3], "data": []}]}, "greater than or equal to 0"),
        ({"inputs": [IMAGE | {"shape": [0, 32, 32, 3], "data": []}]}, "n at least 1"),
        ({"inputs": [{"name": "encoded", "datatype": "BYTES", "shape": [1], "data": ["?"]}]}, "a string of base64"),
        ({"inputs": [{"name": "encoded", "datatype": "BYTES", "shape": [1], "data": [3]}]}, "a string of base64"),
        ({"inputs": [{"name": "encoded", "datatype": "BYTES", "shape": [2], "data": [""]}]}, "has 1 elements"),
        ({"inputs": [IMAGE | {"data": [0] * 3072}], "outputs": [{"name": "logits"}] * 2}, "requested twice"),
    ],
)
def test_malformed_requests_are_told_what_was_expected(client: TestClient, body: Any, told: str) -> None:
    response = infer(client, body)

    assert response.status_code == 400
    assert told in response.json()["error"]


@pytest.mark.parametrize(
    ("body", "length", "told"),
    [
        (b"{}", "3", "must be a length within the body's 2"),
        (b"{}", "x", "must be a length within the body's 2"),
        (b"{}", "9" * 5000, "must be a length within the body's 2"),
        (b'{"inputs"', None, "the body is no JSON"),
        (b"{}xx", "2", "inputs: Field required"),
        (None, "-5", "must be a length within the body's"),
        (None, None, "0 bytes follow the JSON, input 'encoded' says 6"),
        (b"\5\0\0\0ab", "", "ends in the middle of an element of 5 bytes"),
        (b"\5\0\0\0", "", "4 bytes follow the JSON, input 'encoded' says 6"),
        (b"\1\0\0\0ab", "", "ends in the middle of a length"),
    ],
)
def test_bytes_that_do_not_fit_are_told_where(
    client: TestClient, body: bytes | None, length: str | None, told: str
) -> None:
    header = b'{"inputs":[{"name":"encoded","datatype":"BYTES","shape":[1],"parameters":{"binary_data_size":6}}]}'
    content = header + (body or b"") if not length or body is None else body
    headers = {} if length is None else {HEADER_LENGTH: length or str(len(header))}
    if length is None and body is not None:
        content = body
    response = client.post(f"/v2/models/{MODEL}/infer", content=content, headers=headers)

    assert response.status_code == 400
    assert told in response.json()["error"]


def test_numbers_in_json_are_a_flat_list_or_nested(client: TestClient) -> None:
    array = np.random.default_rng(0).integers(0, 256, (3, 96, 64, 3), dtype=np.uint8)
    tensor = {"name": "images", "datatype": "UINT8", "shape": list(array.shape)}
    outputs = {"outputs": [{"name": "logits"}]}
    flat = infer(client, {"inputs": [tensor | {"data": array.ravel().tolist()}], **outputs})
    nested = infer(client, {"inputs": [tensor | {"data": array.tolist()}], **outputs})

    assert flat.status_code == nested.status_code == 200
    assert flat.json() == nested.json()


def test_images_in_json_are_base64(client: TestClient, files: list[bytes]) -> None:
    import base64  # noqa: PLC0415

    data = [base64.b64encode(each).decode() for each in files]
    body = {"inputs": [{"name": "encoded", "datatype": "BYTES", "shape": [3], "data": data}]}
    answer = infer(client, body | {"outputs": [{"name": "logits", "parameters": {"classification": 1}}]}).json()

    (output,) = answer["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [3, 1])
    assert [each.split(":")[2] for each in output["data"]] == ["0", "7", "3"]


def test_a_small_body_that_unpacks_to_a_large_one_is_refused(make_client: MakeClient, tmp_path: Path) -> None:
    add_model(tmp_path)
    client = make_client(model_store=tmp_path, default_model="pvt_v2_b0.tiny", max_body_mb=0.1)
    packed = gzip.compress(b" " * 10_000_000)
    path = "/v2/models/pvt_v2_b0.tiny/infer"

    assert client.post(path, content=packed, headers={"Content-Encoding": "gzip"}).status_code == 413
    broken = client.post(path, content=packed[:-9], headers={"Content-Encoding": "gzip"})
    assert broken.status_code in {400, 413}
    assert (
        client.post(path, content=b"{}", headers={"Content-Encoding": "gzip"})
        .json()["error"]
        .startswith("the body is no gzip")
    )
    assert client.post(path, content=b"{}", headers={"Content-Encoding": "compress"}).status_code == 415


def test_an_unknown_path_is_told_in_the_protocols_form_too(client: TestClient) -> None:
    response = client.get("/v2/nothing")

    assert response.status_code == 404
    assert "/v2/nothing" in response.json()["error"]

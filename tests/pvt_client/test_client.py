import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from pvt_client import (
    AsyncClient,
    Client,
    ConnectionLost,
    Explanation,
    Features,
    ImageUnreadable,
    InvalidImage,
    InvalidUrl,
    Prediction,
    Unauthorized,
    UnexpectedResponse,
)
from tests.pvt_client.conftest import CallMethod
from tests.pvt_client.scripted import BAD, Received, cut, predicted, refused, response, scripted, sized


def safetensors(**arrays: Any) -> bytes:
    body = save(arrays, {"model": "m", "version": "3"})
    return response(200, body, "application/vnd.safetensors")


def test_calls_share_a_connection(call: CallMethod) -> None:
    with scripted(sized) as server:
        call(server.url, "predict_many", [b"x"] * 40, concurrency=1)

        assert len(server.requests) > 2
        assert server.connections == 1


def test_the_key_travels_as_a_bearer_token(call: CallMethod) -> None:
    with scripted(predicted()) as server:
        call(server.url, "predict", b"a", client={"api_key": "secret"})
        call(server.url, "predict", b"a")

    assert [each.headers.get("authorization") for each in server.requests] == ["Bearer secret", None]


def test_options_that_are_left_out_are_left_to_the_service(call: CallMethod) -> None:
    with scripted(predicted()) as server:
        call(server.url, "predict", b"a", client={"timeout": None})
        call(server.url, "predict", b"a", client={"timeout": None}, top_k=2, model="m@1", size=64)

    assert [each.query for each in server.requests] == [{}, {"top_k": "2", "model": "m@1", "size": "64"}]


def test_features_are_arrays_without_the_axis_of_images(call: CallMethod) -> None:
    embedding, stage = np.ones((1, 4), np.float16), np.zeros((1, 2, 3, 3), np.float16)
    with scripted(safetensors(embedding=embedding, stage2=stage)) as server:
        features: Features = call(
            server.url, "features", b"a", stages=[2], pool="none", normalize=True, dtype="float16",
            client={"timeout": None},
        )  # fmt: skip

    assert (features.embedding.shape, features.stages[2].shape) == ((4,), (2, 3, 3))
    assert features.embedding.dtype == np.float16
    assert (features.model, features.version) == ("m", "3")
    (request,) = server.requests
    assert request.query == {"stages": "2", "pool": "none", "normalize": "true", "dtype": "float16"}
    assert request.headers["accept"] == "application/vnd.safetensors"


def test_features_of_a_list_are_stacked(call: CallMethod) -> None:
    with scripted(safetensors(embedding=np.ones((2, 4), np.float32))) as server:
        features: Features = call(server.url, "features", [b"a", b"b"])

    assert features.embedding.shape == (2, 4)
    assert server.requests[0].headers["content-type"].startswith("multipart/form-data")


@pytest.mark.parametrize("cut", [0, 4, 60, -1])
def test_features_that_are_cut_off_are_refused(call: CallMethod, cut: int) -> None:
    whole = save({"embedding": np.ones((1, 4), np.float32)}, {"model": "m", "version": "3"})
    with scripted(response(200, whole[:cut], "application/x-safetensors")) as server, pytest.raises(UnexpectedResponse):
        call(server.url, "features", b"a")


def test_an_explanation_is_a_png_or_numbers(call: CallMethod) -> None:
    result = {"filename": None, "width": 9, "height": 8, "class_id": 1, "label": "one", "score": 0.5, "logit": 2.0,
              "bias": 0.5, "map": [[1, 2], [1, 2]], "of_a_newer_service": 1}  # fmt: skip
    body = json.dumps({"model": "m", "version": "1", "results": [result]}).encode()
    with scripted(response(200, b"PNG", "image/png"), response(200, body)) as server:
        assert call(server.url, "explain", b"a", class_id=1, alpha=0.4) == b"PNG"
        explanation: Explanation = call(server.url, "explain_map", b"a", class_id=1)

    assert explanation.map.mean() + explanation.bias == explanation.logit
    assert [each.headers["accept"] for each in server.requests] == ["image/png", "application/json"]
    assert server.requests[0].query["alpha"] == "0.4"


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"results": [], "model": "m", "version": "1"}'])
def test_a_response_of_something_else_says_so(call: CallMethod, body: bytes) -> None:
    with scripted(response(200, body)) as server, pytest.raises(UnexpectedResponse):
        call(server.url, "predict", b"a")


@pytest.mark.parametrize("url", ["ftp://localhost", "http://", "::", "http://localhost:99999"])
def test_a_wrong_address_is_an_error_of_the_client(call: CallMethod, url: str) -> None:
    with pytest.raises(InvalidUrl):
        call(url, "health", client={"timeout": 1})


def test_the_error_of_a_single_bad_image_in_a_list_takes_its_place(call: CallMethod) -> None:
    with scripted(refused(422, "invalid-image")) as server:
        (result,) = call(server.url, "predict", [b"a"])

    assert isinstance(result, InvalidImage)


def test_many_keep_their_order_though_responses_do_not(call: CallMethod) -> None:
    """The first image gets its response only when the three after it have had theirs."""
    others = threading.Barrier(4)

    def behaviour(connection: Any, received: Received) -> None:
        others.wait(10)
        if received.body != b"0":
            released.set()
        else:
            released.wait(10)
        sized(connection, received)

    released = threading.Event()
    images = [b"0", b"11", b"222", b"3333"]
    with scripted(behaviour) as server:
        found = call(server.url, "predict_many", images, concurrency=4)

    assert [(image, result.width) for image, result in found] == [(each, len(each)) for each in images]


def test_no_more_requests_run_than_were_allowed(call: CallMethod) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def behaviour(connection: Any, received: Received) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            running -= 1  # before the response: its client may have sent the next before this thread goes on
        sized(connection, received)

    with scripted(behaviour) as server:
        call(server.url, "predict_many", [b"x"] * 200, concurrency=3)

        assert server.connections <= 3
    assert most <= 3


def test_a_bad_image_is_an_error_in_its_place(call: CallMethod, tmp_path: Path) -> None:
    with scripted(sized) as server:
        found = call(server.url, "predict_many", [b"a", BAD, str(tmp_path / "none.png"), b"c"], concurrency=1)

    kinds = [type(result) for _, result in found]
    assert kinds == [Prediction, InvalidImage, ImageUnreadable, Prediction]


def test_a_connection_that_is_cut_costs_one_image(call: CallMethod) -> None:
    with scripted(cut, sized) as server:
        found = call(server.url, "predict_many", [b"a", b"b", b"c"], concurrency=1)

    assert [type(result) for _, result in found] == [ConnectionLost, Prediction, Prediction]


def test_an_error_that_the_next_image_would_meet_too_ends_it(call: CallMethod) -> None:
    with scripted(refused(401, "unauthorized")) as server, pytest.raises(Unauthorized):
        call(server.url, "predict_many", [b"x"] * 1000, concurrency=2)

    assert len(server.requests) < 20


def test_images_are_taken_only_as_fast_as_results() -> None:
    taken = 0

    def images() -> Iterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b"x"

    with scripted(sized) as server, Client(server.url) as client:
        results = client.predict_many(images(), concurrency=2)
        next(results)
        assert taken <= 1 + 2 * 2 * (2 + 1)  # of a request of one image, or when the first has had its response of two
        for _ in range(100):
            next(results)
        results.close()

    assert taken <= 101 + 2 * 2 * (16 + 1)


def test_leaving_an_asynchronous_loop_early_leaves_no_task() -> None:
    async def first(url: str) -> int:
        async with AsyncClient(url) as client:
            results = client.predict_many([b"x"] * 100, concurrency=2)
            async for _ in results:
                break
            await results.aclose()
        return len(asyncio.all_tasks())

    with scripted(sized) as server:
        assert asyncio.run(first(server.url)) == 1


@pytest.mark.parametrize("concurrency", [0, -1])
def test_a_concurrency_of_none_is_refused(call: CallMethod, concurrency: int) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        call("localhost", "predict_many", [b"x"], concurrency=concurrency)

"""No reference cycle on the way of a request: what it took is freed when it ends, not when garbage is collected."""

import gc
from collections.abc import Callable, Iterator
from types import CoroutineType, FrameType
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.app.conftest import png

Post = Callable[[TestClient], Any]
TENSOR = {"name": "images", "datatype": "UINT8", "shape": [1, 64, 64, 3], "data": [0] * 12_288}
RAW = {"content-type": "image/png"}
REQUESTS: dict[str, Post] = {
    "an image": lambda client: client.post("/predict", content=png(), headers=RAW),
    "images": lambda client: client.post("/predict", files=[("image", png()), ("image", b"none")]),
    "no image": lambda client: client.post("/predict", content=b"none", headers=RAW),
    "a wrong form": lambda client: client.post("/predict", files=[("other", png())]),
    "wrong JSON": lambda client: client.post("/predict", content=b"{", headers={"content-type": "application/json"}),
    "no time": lambda client: client.post("/predict?timeout_ms=1", content=png(size=(3000, 3000)), headers=RAW),
    "no model": lambda client: client.post("/predict?model=none", content=png(), headers=RAW),
    "features": lambda client: client.post("/features?stages=1", files=[("image", png())]),
    "arrays": lambda client: client.post(
        "/features", files=[("image", png()), ("image", b"none")], headers={"accept": "application/x-npz"}
    ),
    "an explanation": lambda client: client.post("/explain", files=[("image", png())]),
    "a tensor": lambda client: client.post("/v2/models/pvt_v2_b0.digits/infer", json={"inputs": [TENSOR]}),
    "a large answer": lambda client: client.post("/features?stages=1,2", files=[("image", png())] * 40),
}


@pytest.fixture
def collected() -> Iterator[Callable[[], list[Any]]]:
    """Returns what garbage collection finds; nothing is collected by itself."""
    gc.collect()
    gc.disable()

    def collect() -> list[Any]:
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        gc.set_debug(0)
        found = gc.garbage[:]
        gc.garbage.clear()
        return found

    yield collect
    gc.set_debug(0)
    gc.enable()


@pytest.mark.parametrize("name", REQUESTS)
def test_nothing_of_a_request_is_left_to_garbage_collection(
    name: str, client: TestClient, collected: Callable[[], list[Any]]
) -> None:
    REQUESTS[name](client)  # what is made once
    gc.collect()

    REQUESTS[name](client)

    left = [each for each in collected() if _is_ours(each)]
    assert left == []


def _is_ours(value: object) -> bool:
    """Of this project, or a frame or coroutine of it. The test's client leaves cycles of its own."""
    if isinstance(value, FrameType):
        return str(value.f_globals["__name__"]).startswith(("app.", "service."))
    if isinstance(value, CoroutineType):
        return "/app/" in value.cr_code.co_filename or "/service/" in value.cr_code.co_filename
    return type(value).__module__.startswith(("app.", "service."))
